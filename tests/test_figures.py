"""Figures: what stands where in the picture, not how it looks."""

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from vqvae import figures


def flat(*values: float, size: int = 4) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def test_montage_puts_each_picture_in_its_place():
    sheet = figures.montage(flat(0.0, 0.2, 0.4, 0.6, 0.8), columns=2, scale=3)
    side = 4 * 3 + figures.GAP
    assert sheet.shape == (3, 3 * side - figures.GAP, 2 * side - figures.GAP)
    for i, value in enumerate((0.0, 0.2, 0.4, 0.6, 0.8)):
        corner = sheet[:, i // 2 * side, i % 2 * side]
        assert corner.tolist() == [round(255 * value)] * 3
    assert sheet[:, -1, -1].tolist() == [255] * 3  # no sixth picture


def test_uint8_and_float_pictures_look_the_same_and_grey_becomes_colour():
    pictures = torch.randint(256, (3, 1, 5, 6), dtype=torch.uint8)
    assert np.array_equal(figures.pixels(pictures), figures.pixels(pictures.float() / 255))
    assert figures.pixels(pictures).shape == (3, 5, 6, 3)


def test_the_epochs_pictures_of_a_run_are_of_one_size(tmp_path):
    for epoch in (1, 100):
        figures.image_grid(torch.rand(9, 1, 8, 8), tmp_path / f"{epoch}.png", title=f"a run, epoch {epoch}")
    shapes = {imageio.imread(p).shape for p in tmp_path.iterdir()}
    assert len(shapes) == 1


def test_pairs_put_every_original_above_its_reconstruction(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(figures, "rows_of_pictures", lambda rows, *a, **k: seen.update(rows=rows))
    figures.pairs(flat(*range(12)), flat(*range(100, 112)), tmp_path / "x.png", title="")
    labels = [label for label, _ in seen["rows"]]
    assert labels == ["originals", "reconstructions"] * 2
    assert [p[:, 0, 0, 0].tolist() for _, p in seen["rows"]][2:] == [[10, 11], [110, 111]]


def test_neighbouring_codes_have_different_colours():
    colours = [figures.code_colour(k) for k in range(512)]
    assert len(set(colours)) > 500
    steps = np.abs(np.diff(np.array(colours), axis=0)).sum(axis=1)
    assert steps.min() > 60


@pytest.mark.parametrize("count", [1, 2, 4, 5, 40])
def test_embedding_in_the_plane_works_for_any_number_of_codes(count):
    where = figures.embed_plane(torch.randn(count, 6))
    assert where.shape == (count, 2)
    assert np.isfinite(where).all()
    assert not figures.embed_plane(torch.ones(count, 6)).any()  # a codebook that has collapsed onto a point


def test_below_five_codes_the_plane_is_pca():
    vectors = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 1, 0]])
    where = figures.embed_plane(vectors)
    assert np.allclose(np.linalg.norm(where[0] - where[1]), 3, atol=1e-5)  # PCA keeps distances in a plane


def test_codebook_map_crosses_out_unused_codes(tmp_path):
    usage = torch.tensor([5, 0, 0, 7, 1, 9])
    figures.codebook_map(torch.randn(6, 3), usage, torch.rand(6, 3, 2, 2), tmp_path / "a.png", title="t")
    figures.codebook_map(torch.randn(6, 3), None, torch.rand(6, 3, 2, 2), tmp_path / "b.png", title="t")
    assert imageio.imread(tmp_path / "a.png").shape[1] == 1000


def test_animation_has_a_frame_for_each_epoch_and_a_rest(tmp_path):
    frames = []
    for epoch in range(1, 5):
        frames.append(tmp_path / f"epoch_{epoch:03d}.png")
        figures.image_grid(torch.full((4, 1, 8, 8), epoch / 8), frames[-1], title=f"epoch {epoch}")
    odd = tmp_path / "epoch_000.png"
    figures.image_grid(torch.rand(30, 3, 8, 8), odd, title="of another size")
    figures.training_animation([odd, *frames], tmp_path / "a.gif")
    gif = imageio.imread(tmp_path / "a.gif", index=None)
    assert len(gif) == 4  # the rest is one long frame, and the picture of another size is left out
    assert not np.array_equal(gif[0], gif[1])


def test_curves_draw_what_is_logged(tmp_path):
    rows = [{"kind": "epoch", "held_out_nmse": 2 / e, "held_out_rate": 5.0, "step": e} for e in (1, 2, 3)]
    rows += [{"kind": "train", "nmse": 1 / step, "step": step} for step in (1, 2, 3)]
    figures.curves(rows, tmp_path / "curves.png", title="a run")
    one = imageio.imread(tmp_path / "curves.png").shape
    rows = [row | {"held_out_perplexity": row["step"]} for row in rows]
    figures.curves(rows, tmp_path / "curves.png", title="a run")
    assert imageio.imread(tmp_path / "curves.png").shape[1] > one[1]  # a second panel; the constant rate has none
    figures.curves([rows[0], *rows[3:]], tmp_path / "curves.png", title="one epoch")
    assert imageio.imread(tmp_path / "curves.png").shape == one  # its perplexity is a point, and no curve


def test_every_other_figure_is_written(tmp_path):
    pictures = torch.rand(3, 1, 8, 8)
    codes = torch.randint(9, (3, 2, 2))
    figures.code_visualization(pictures, {"codes": codes}, pictures, tmp_path / "codes.png", title="t")
    maps = {"top": codes, "bottom": codes.repeat(1, 8, 8)}
    figures.code_visualization(pictures, maps, pictures, tmp_path / "fine.png", title="t")
    figures.usage_chart(torch.tensor([[3, 0, 5]]), tmp_path / "usage.png", title="t")
    figures.scatter_2d([("a", torch.randn(50, 2)), ("b", torch.randn(50, 2))], tmp_path / "s.png", title="t")
    figures.posterior_map(torch.randn(20, 2), torch.arange(20) % 2, ["x", "y"], tmp_path / "p.png", title="t")
    figures.posterior_map(torch.randn(20, 2), torch.full((20,), -1), [], tmp_path / "q.png", title="t")
    for name in ("codes", "fine", "usage", "s", "p", "q"):
        picture = imageio.imread(tmp_path / f"{name}.png")
        assert picture[..., :3].std() > 1, name
