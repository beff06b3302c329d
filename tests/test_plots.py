"""Plots: which values they show, and where. Their looks are not tested."""

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from vqvae import plots
from vqvae.errors import UserError
from vqvae.metrics import METRICS


def flat(*values: float, size: int = 4) -> torch.Tensor:
    """Color images, each of one value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def test_montage_puts_each_image_in_its_place():
    values = (0.0, 0.2, 0.4, 0.6, 0.8)
    sheet = plots.montage(flat(*values), columns=2, scale=3)
    side = 4 * 3 + plots.GAP
    assert sheet.shape == (3, 3 * side - plots.GAP, 2 * side - plots.GAP)
    for i, value in enumerate(values):
        top, left = i // 2 * side, i % 2 * side
        block = sheet[:, top : top + 12, left : left + 12]
        assert block.unique().tolist() == [round(255 * value)]
    assert sheet[:, -1, -1].tolist() == [255] * 3  # there is no sixth image


def test_uint8_and_float_images_give_the_same_pixels_and_gray_becomes_color():
    images = torch.randint(256, (3, 1, 5, 6), dtype=torch.uint8)
    assert np.array_equal(plots.pixels(images), plots.pixels(images.float() / 255))
    assert plots.pixels(images).shape == (3, 5, 6, 3)


def test_float_images_outside_the_unit_range_are_clipped():
    assert plots.pixels(flat(-0.5, 1.5))[:, 0, 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize(("shape", "scale"), [((8, 8), 8), ((28, 28), 2), ((32, 64), 1), ((500, 500), 1)])
def test_small_images_are_enlarged_by_an_integer(shape, scale):
    assert plots.display_scale(torch.zeros(1, 1, *shape)) == scale


def test_images_of_all_epochs_have_one_size(tmp_path):
    for epoch in (1, 100):
        plots.image_grid(torch.rand(9, 1, 8, 8), tmp_path / f"{epoch}.png", title=f"a run, epoch {epoch}")
    shapes = {imageio.imread(path).shape for path in tmp_path.iterdir()}
    assert len(shapes) == 1


def test_pairs_put_each_original_above_its_reconstruction(tmp_path, monkeypatch):
    seen: list[tuple[str, torch.Tensor]] = []
    monkeypatch.setattr(plots, "image_rows", lambda rows, *args, **options: seen.extend(rows))
    plots.pairs(flat(*range(12)), flat(*range(100, 112)), tmp_path / "x.png", title="")
    labels = [label for label, _ in seen]
    assert labels == ["originals", "reconstructions"] * 2
    assert [images[:, 0, 0, 0].tolist() for _, images in seen[2:]] == [[10, 11], [110, 111]]


def test_successive_codes_have_different_colors():
    colors = [plots.code_color(code) for code in range(512)]
    assert len(set(colors)) > 500
    steps = np.abs(np.diff(np.array(colors), axis=0)).sum(axis=1)
    assert steps.min() > 60


@pytest.mark.parametrize("count", [1, 2, 4, 5, 40])
def test_any_number_of_codes_can_be_projected_onto_the_plane(count):
    points = plots.embed_plane(torch.randn(count, 6))
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()


@pytest.mark.parametrize("count", [1, 4, 40])
def test_a_collapsed_codebook_is_projected_onto_one_point(count):
    assert not plots.embed_plane(torch.ones(count, 6)).any()


def test_fewer_than_five_codes_are_projected_by_pca():
    vectors = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 1, 0]])
    points = plots.embed_plane(vectors)
    assert np.allclose(np.linalg.norm(points[0] - points[1]), 3, atol=1e-5)  # PCA keeps distances within a plane


def test_codebook_map_draws_used_codes_as_patches_and_unused_codes_as_crosses(tmp_path):
    vectors, red = torch.randn(6, 3), torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(6, 3, 2, 2)
    red_pixels = {}
    for name, usage in (("all", None), ("some", torch.tensor([5, 0, 0, 7, 1, 9])), ("none", torch.zeros(6))):
        path = tmp_path / f"{name}.png"
        plots.codebook_map(vectors, usage, red, path, title="t")
        image = imageio.imread(path)
        assert image.shape[1] == 1000
        red_pixels[name] = int((image == (255, 0, 0)).all(axis=2).sum())
    assert red_pixels["all"] > red_pixels["some"] > red_pixels["none"] == 0


def test_animation_has_a_frame_for_each_epoch_and_pauses_at_the_end(tmp_path):
    frames = []
    for epoch in range(1, 5):
        frames.append(tmp_path / f"epoch_{epoch:03d}.png")
        plots.image_grid(torch.full((4, 1, 8, 8), epoch / 8), frames[-1], title=f"epoch {epoch}")
    odd = tmp_path / "epoch_000.png"
    plots.image_grid(torch.rand(30, 3, 8, 8), odd, title="another size")
    broken = tmp_path / "epoch_002b.png"
    broken.write_bytes(frames[0].read_bytes()[:100])
    plots.training_animation(plots.read_frames([odd, broken, *frames]), tmp_path / "a.gif")
    gif = imageio.imread(tmp_path / "a.gif", index=None)
    assert len(gif) == 4  # without the frame of another size; GIF stores the pause as one long frame
    assert not np.array_equal(gif[0], gif[1])
    durations = [imageio.immeta(tmp_path / "a.gif", index=i)["duration"] for i in range(4)]
    assert durations == [500, 500, 500, 2000]


EPOCHS = [{"kind": "epoch", "held_out_nmse": 2 / e, "held_out_rate": 5.0, "step": e} for e in (1, 2, 3)]
STEPS = [{"kind": "train", "nmse": 1 / step, "step": step} for step in (1, 2, 3)]


def test_curves_are_drawn_for_metrics_that_change():
    assert plots.curve_names(EPOCHS + STEPS) == ["nmse"]  # the rate is constant
    assert plots.curve_names([row | {"held_out_perplexity": row["step"]} for row in EPOCHS]) == ["nmse", "perplexity"]


def test_one_epoch_gives_curves_of_the_metrics_that_training_logged():
    first = EPOCHS[0] | {"held_out_perplexity": 3.0}
    assert plots.curve_names([first, *STEPS]) == ["nmse"]
    assert plots.curve_names([first]) == []
    assert plots.curve_names([]) == []


def test_curves_are_drawn_only_for_metrics_with_a_label():
    name = next(metric.name for metric in METRICS.values() if not metric.curve)
    assert plots.curve_names([row | {f"held_out_{name}": row["step"]} for row in EPOCHS]) == ["nmse"]


def test_each_curve_has_a_panel(tmp_path):
    widths = []
    for rows in (EPOCHS + STEPS, [row | {"held_out_perplexity": row["step"]} for row in EPOCHS] + STEPS):
        plots.curves(rows, tmp_path / "curves.png", title="a run")
        widths.append(imageio.imread(tmp_path / "curves.png").shape[1])
    assert widths[0] < widths[1]


def test_every_other_plot_is_written(tmp_path):
    images = torch.rand(3, 1, 8, 8)
    codes = torch.randint(9, (3, 2, 2))
    plots.code_visualization(images, {"codes": codes}, images, tmp_path / "codes.png", title="t")
    maps = {"top": codes, "bottom": codes.repeat(1, 8, 8)}
    plots.code_visualization(images, maps, images, tmp_path / "levels.png", title="t")
    plots.usage_chart(torch.tensor([[3, 0, 5]]), tmp_path / "usage.png", title="t")
    plots.scatter_2d([("a", torch.randn(50, 2)), ("b", torch.randn(50, 2))], tmp_path / "scatter.png", title="t")
    plots.posterior_map(torch.randn(20, 2), torch.arange(20) % 2, ["x", "y"], tmp_path / "classes.png", title="t")
    plots.posterior_map(torch.randn(20, 2), torch.full((20,), -1), [], tmp_path / "no_classes.png", title="t")
    written = sorted(tmp_path.iterdir())
    assert len(written) == 6
    for path in written:
        assert imageio.imread(path)[..., :3].std() > 1, path.name


ODD_NAMES = ["a$b^", "_hidden", "名前", "x{y}^\\z$", "long" * 60]


def test_any_name_can_be_a_title_and_a_class(tmp_path, recwarn):
    means, labels = torch.randn(20, 2), torch.arange(20) % len(ODD_NAMES)
    for i, name in enumerate(ODD_NAMES):
        plots.posterior_map(means, labels, ODD_NAMES, tmp_path / f"{i}.png", title=name)
        plots.usage_chart(torch.tensor([[3, 0, 5]]), tmp_path / "usage.png", title=name)
        plots.scatter_2d([("a", means)], tmp_path / "scatter.png", title=name)
        plots.curves(EPOCHS, tmp_path / "curves.png", title=name)
    plots.image_rows([(name, torch.rand(2, 1, 8, 8)) for name in ODD_NAMES], tmp_path / "rows.png", title="名前")
    assert imageio.imread(tmp_path / "rows.png").shape[1] < 1000
    assert imageio.imread(tmp_path / "0.png").shape[1] < 2000
    assert not [str(w.message) for w in recwarn]


def test_points_that_are_not_finite_are_left_out(tmp_path):
    points = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [torch.inf, 1.0]])
    for kept in (points, points[1:]):
        plots.posterior_map(kept, torch.full((len(kept),), -1), [], tmp_path / "map.png", title="t")
    plots.scatter_2d([("data", torch.zeros(1, 2)), ("samples", points[1:])], tmp_path / "scatter.png", title="t")


def test_a_curve_that_reaches_zero_has_a_linear_axis(tmp_path, recwarn):
    rows = [row | {"held_out_nmse": 0.0} for row in EPOCHS[:1]] + EPOCHS[1:]
    plots.curves(rows, tmp_path / "curves.png", title="black images")
    assert not list(recwarn)


def test_a_plot_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written") as error:
        plots.image_grid(torch.rand(4, 1, 8, 8), tmp_path / "file" / "a.png", title="t")
    assert "\n" not in str(error.value)
