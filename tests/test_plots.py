"""Plots: which values they show, and where. Their appearance is not tested."""

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from vqvae import plots
from vqvae.errors import UserError
from vqvae.metrics import METRICS


def flat(*values: float, size: int = 4) -> torch.Tensor:
    """Color images, each filled with one value."""
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


def stripes(size: int) -> torch.Tensor:
    """A color image of black and white columns, one pixel wide."""
    return (torch.arange(size) % 2).float().expand(1, 3, size, size)


@pytest.mark.parametrize("size", [500, 1000])
def test_large_images_are_reduced_with_antialiasing(tmp_path, size):
    plots.image_grid(stripes(size), tmp_path / "grid.png", title="t", columns=1)
    plots.code_visualization(
        stripes(size), {"codes": torch.zeros(1, 2, 2)}, {"codes": np.zeros((1, 2, 2, 3), np.uint8)}, stripes(size),
        tmp_path / "codes.png", title="t",
    )  # fmt: skip
    for path in tmp_path.iterdir():
        sheet = imageio.imread(path)
        left = 8 + plots.LARGEST_TILE // 2
        column = sheet[-150, left - 60 : left + 60].astype(int)
        assert len(sheet) < 400
        assert np.abs(column - 128).max() < 40, "a mean of black and white; single pixels would be either"


def test_a_grid_of_many_images_has_a_bounded_width(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "WIDEST", 800)
    plots.image_grid(torch.rand(40, 1, 16, 16), tmp_path / "many.png", title="t", columns=20)
    plots.image_grid(torch.rand(20, 1, 256, 256), tmp_path / "large.png", title="t", columns=20)
    assert all(imageio.imread(path).shape[1] < 900 for path in tmp_path.iterdir())


def test_text_grows_with_the_width_of_a_sheet(tmp_path):
    letters = []
    for size in (64, 256):
        path = tmp_path / f"{size}.png"
        plots.image_rows([("H", torch.zeros(10, 1, size, size))], path, title="H", headers=("H",))
        ink = (imageio.imread(path)[:-1, :, 0] < 128).any(axis=1)  # rows of pixels: the headline, then the images
        letters.append(int(np.flatnonzero(~ink[ink.argmax() :])[0]))
    assert letters[1] == pytest.approx(2 * letters[0], abs=2)


@pytest.mark.parametrize(("size", "cells"), [(8, 4), (28, 7), (32, 8), (320, 80), (300, 75), (600, 300)])
def test_an_image_and_the_map_of_its_codes_have_one_size(tmp_path, size, cells):
    black = torch.zeros(1, 3, size, size)
    maps = {"codes": torch.zeros(1, cells, cells)}, {"codes": np.zeros((1, cells, cells, 3), np.uint8)}
    plots.code_visualization(black, *maps, black, tmp_path / "a.png", title="t")
    row = imageio.imread(tmp_path / "a.png")[-60, :, 0]
    starts = np.flatnonzero(np.diff(np.concatenate([[255], row, [255]]).astype(int)))
    widths = starts[1::2] - starts[::2]
    assert len(widths) == 3
    assert len(set(widths.tolist())) == 1


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [(0, 3, []), (1, 3, [0]), (3, 3, [0, 1, 2]), (5, 3, [0, 2, 4]), (10, 4, [0, 3, 6, 9]), (100, 2, [0, 99])],
)
def test_items_are_chosen_evenly_with_the_first_and_the_last(count, most, chosen):
    assert plots.evenly(range(count), most) == chosen


def test_a_long_title_wraps_and_its_notes_are_below(tmp_path):
    heights, widths = [], []
    for title in ("short", "short\nnote", "a long title " * 20, "x" * 400):
        plots.image_grid(torch.rand(1, 1, 8, 8), tmp_path / "a.png", title=title)
        heights.append(imageio.imread(tmp_path / "a.png").shape[0])
        widths.append(imageio.imread(tmp_path / "a.png").shape[1])
    assert heights[0] < heights[1] < heights[2]
    assert heights[1] < heights[3]
    assert set(widths) == {plots.NARROWEST}


def test_the_parts_of_a_row_stand_apart(tmp_path):
    parts = [flat(0.0, size=64), flat(0.0, 0.0, size=64)]
    plots.image_rows([("", parts)], tmp_path / "a.png", title="t", headers=("one", "two"))
    row = imageio.imread(tmp_path / "a.png")[-40, :, 0]
    black = np.flatnonzero(row == 0)
    gaps = np.diff(black)
    assert black[0] == 8
    assert gaps[gaps > 1].tolist() == [plots.WIDE_GAP + 1, plots.GAP + 1]


def test_pairs_put_each_original_above_its_reconstruction(tmp_path, monkeypatch):
    seen: list[tuple[str, torch.Tensor]] = []
    monkeypatch.setattr(plots, "image_rows", lambda rows, *args, **options: seen.extend(rows))
    plots.pairs(flat(*range(12)), flat(*range(100, 112)), tmp_path / "x.png", title="")
    labels = [label for label, _ in seen]
    assert labels == ["originals", "reconstructions"] * 2
    assert [images[:, 0, 0, 0].tolist() for _, images in seen[2:]] == [[10, 11], [110, 111]]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).sum())


@pytest.mark.parametrize("means", [None, torch.full((60, 3), 0.5)])
def test_near_vectors_have_like_colors_and_equal_ones_the_same(means):
    torch.manual_seed(0)
    groups = 5 * torch.randn(3, 8)
    vectors = groups.repeat(20, 1) + 0.05 * torch.randn(60, 8)
    vectors[3] = vectors[0]
    colors = plots.vector_colors(vectors, means)
    assert colors.shape == (60, 3)
    assert colors.dtype == np.uint8
    assert difference(colors[0], colors[3]) == 0
    within = max(difference(colors[i], colors[i + 3]) for i in range(57))
    between = min(difference(colors[i], colors[i + 1]) for i in range(59))
    assert within < 40 < between


def test_codes_of_bright_parts_of_an_image_are_bright():
    colors = plots.vector_colors(torch.randn(10, 4), torch.linspace(0, 1, 10).unsqueeze(1).expand(10, 3))
    assert colors[-1].mean() > 150 > 100 > colors[0].mean()


@pytest.mark.parametrize("vectors", [torch.ones(5, 3), torch.zeros(1, 4), torch.randn(4, 1), torch.randn(2, 6)])
def test_any_vectors_have_colors(vectors):
    assert plots.vector_colors(vectors).shape == (len(vectors), 3)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 40])
def test_any_number_of_codes_can_be_projected_onto_the_plane(count):
    points, _ = plots.embed_plane(torch.randn(count, 6))
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()


@pytest.mark.parametrize("count", [1, 4, 40])
def test_a_collapsed_codebook_is_projected_onto_one_point(count):
    assert not plots.embed_plane(torch.ones(count, 6))[0].any()


def test_fewer_than_five_distinct_codes_are_projected_by_pca():
    vectors = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 1, 0]])
    assert plots.embed_plane(vectors.repeat(4, 1))[1] == "PCA"
    points, method = plots.embed_plane(vectors)
    assert method == "PCA"
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


def test_used_codes_fill_the_codebook_map_wherever_dead_codes_are(tmp_path, monkeypatch):
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(24, 3, 2, 2)
    usage = torch.tensor([5] * 20 + [0] * 4)
    monkeypatch.setattr(plots, "embed_plane", lambda vectors: (vectors.numpy(), "PCA"))
    images = []
    for distance in (10, 1000):
        vectors = torch.cat(
            [torch.rand(20, 2, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2) * distance]
        )
        plots.codebook_map(vectors, usage, red, tmp_path / "a.png", title="t")
        images.append(imageio.imread(tmp_path / "a.png"))
    assert np.array_equal(*images)
    columns = (images[0] == (255, 0, 0)).all(axis=2).any(axis=0).nonzero()[0]
    assert np.ptp(columns) > 800


def durations(path) -> list[int]:
    return [imageio.immeta(path, index=i)["duration"] for i in range(len(imageio.imread(path, index=None)))]


def test_animation_has_a_frame_for_each_epoch_and_pauses_at_the_end(tmp_path):
    frames = []
    for epoch in range(1, 5):
        frames.append(tmp_path / f"epoch_{epoch:03d}.png")
        plots.image_grid(torch.full((4, 1, 8, 8), epoch / 8), frames[-1], title=f"epoch {epoch}")
    broken = tmp_path / "epoch_002b.png"
    broken.write_bytes(frames[0].read_bytes()[:100])
    plots.training_animation(plots.read_frames([broken, *frames]), tmp_path / "a.gif")
    gif = imageio.imread(tmp_path / "a.gif", index=None)
    assert len(gif) == 4
    assert not np.array_equal(gif[0], gif[1])
    assert durations(tmp_path / "a.gif") == [500, 500, 500, 2000]


def test_frames_whose_title_takes_another_line_fit_those_before(tmp_path):
    for name, lines in (("a", 1), ("b", 3)):
        title = "\n".join("title" for _ in range(lines))
        plots.image_grid(flat(*(1 - i / 8 for i in range(8)), size=8), tmp_path / f"{name}.png", title=title)
    plots.training_animation(plots.read_frames([tmp_path / "a.png", tmp_path / "b.png"]), tmp_path / "a.gif")
    first, second = imageio.imread(tmp_path / "a.gif", index=None)
    assert first.shape == second.shape
    assert np.array_equal(first[-60:], second[-60:])


def test_an_animation_has_at_most_sixty_frames_with_the_first_and_the_last(tmp_path):
    frames = [np.full((40, 40, 3), value, np.uint8) for value in range(150)]
    plots.training_animation(frames, tmp_path / "a.gif")
    gif = imageio.imread(tmp_path / "a.gif", index=None)
    assert len(gif) == plots.MOST_FRAMES == 60
    assert [int(frame[0, 0, 0]) for frame in (gif[0], gif[-1])] == [0, 149]
    assert sum(durations(tmp_path / "a.gif")) < 13_000


def test_an_animation_keeps_its_limit_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "LARGEST_GIF", 60_000)
    monkeypatch.setattr(plots, "FEWEST_FRAMES", 4)
    noise = np.random.default_rng(0).integers(0, 256, (20, 80, 100, 3), dtype=np.uint8)
    plots.training_animation(list(noise), tmp_path / "a.gif")
    assert 20_000 < (tmp_path / "a.gif").stat().st_size <= 60_000
    assert len(imageio.imread(tmp_path / "a.gif", index=None)) >= 4


EPOCHS = [{"kind": "epoch", "held_out_nmse": 2 / e, "held_out_rate": 5.0, "step": e} for e in (1, 2, 3)]
STEPS = [{"kind": "train", "nmse": 1 / step, "step": step} for step in (1, 2, 3)]


def test_curves_are_drawn_for_metrics_that_change():
    assert plots.curve_names(EPOCHS + STEPS) == ["nmse"]  # the rate is constant
    assert plots.curve_names([row | {"held_out_perplexity": row["step"]} for row in EPOCHS]) == ["nmse", "perplexity"]


def test_one_epoch_gives_curves_of_the_metrics_that_training_logged():
    first = EPOCHS[0] | {"held_out_perplexity": 3.0}
    assert plots.curve_names([first, *STEPS]) == ["nmse"]
    assert plots.curve_names([first, *(row | {"rate": 5 + 1e-7 * row["step"]} for row in STEPS)]) == ["nmse"]
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


def drawn_curve(rows, tmp_path, monkeypatch) -> list[tuple[int, float]]:
    """The points of the training curve of `nmse`."""
    seen = []
    monkeypatch.setattr(plots, "_save_chart", lambda figure, path: seen.append(figure.axes[0].lines[0].get_xydata()))
    plots.curves(rows, tmp_path / "curves.png", title="t")
    return [(int(step), value) for step, value in seen[0]]


def test_a_short_window_at_the_end_of_an_epoch_is_no_point_of_its_own(tmp_path, monkeypatch):
    # 46 steps an epoch, a window every 20 steps
    steps = [20, 40, 46, 60, 80, 92, 100, 120, 138]
    values = [1.0, 1.0, 0.1, 1.0, 1.0, 0.2, 1.0, 1.0, 0.0]
    rows = [{"kind": "train", "step": step, "nmse": value} for step, value in zip(steps, values, strict=True)]
    curve = drawn_curve(rows + EPOCHS, tmp_path, monkeypatch)
    assert [step for step, _ in curve] == [20, 40, 60, 80, 100, 138]
    expected = [1, 1, (6 * 0.1 + 14) / 20, 1, (12 * 0.2 + 8) / 20, 20 / 38]
    assert [value for _, value in curve] == pytest.approx(expected)


def test_whole_windows_are_drawn_as_they_were_logged(tmp_path, monkeypatch):
    assert drawn_curve(STEPS + EPOCHS, tmp_path, monkeypatch) == [(1, 1), (2, 1 / 2), (3, pytest.approx(1 / 3))]


@pytest.mark.parametrize(
    ("counts", "shares"), [([5, 5], [0.5, 0.5]), ([3, 0, 1, 0], [0.75, 0.25]), ([4], [1]), ([0, 0], [0])]
)
def test_every_used_code_has_the_width_of_one_in_the_chart_of_usage(counts, shares, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save_chart", lambda figure, path: figures.append(figure))
    plots.usage_chart(torch.tensor([counts]), tmp_path / "usage.png", title="t")
    (axes,) = figures[0].axes
    assert axes.get_xlim() == (0, len(counts))
    values, edges, _ = axes.patches[0].get_data()
    assert values.tolist() == shares
    assert edges.tolist() == list(range(len(shares) + 1))


def test_every_other_plot_is_written(tmp_path):
    images = torch.rand(3, 1, 8, 8)
    codes = torch.randint(9, (3, 2, 2))
    maps = {"top": codes, "bottom": codes.repeat(1, 8, 8)}
    colors = {name: np.random.default_rng(0).integers(0, 256, (*m.shape, 3), np.uint8) for name, m in maps.items()}
    plots.code_visualization(images, {"codes": codes}, {"codes": colors["top"]}, images, tmp_path / "c.png", title="t")
    plots.code_visualization(images, maps, colors, images, tmp_path / "levels.png", title="t")
    plots.usage_chart(torch.tensor([[3, 0, 5]]), tmp_path / "usage.png", title="t")
    plots.scatter_2d([("a", torch.randn(50, 2)), ("b", torch.randn(50, 2))], tmp_path / "scatter.png", title="t")
    plots.posterior_map(torch.randn(20, 2), torch.arange(20) % 2, ["x", "y"], tmp_path / "classes.png", title="t")
    plots.posterior_map(torch.randn(20, 2), torch.full((20,), -1), [], tmp_path / "no_classes.png", title="t")
    written = sorted(tmp_path.iterdir())
    assert len(written) == 6
    for path in written:
        assert imageio.imread(path)[..., :3].std() > 1, path.name


def test_usage_of_a_single_code_is_a_bar_below_the_legend(tmp_path):
    plots.usage_chart(torch.tensor([[7.0]]), tmp_path / "usage.png", title="t")
    image = imageio.imread(tmp_path / "usage.png")[..., :3].astype(int)
    height, width, _ = image.shape
    column = image[:, width // 4]  # left of the legend
    blue = column[:, 2] - column[:, 0] > 50
    assert not blue[: height // 8].any()
    assert blue[height // 3 : height * 3 // 4].all()


ODD_NAMES = ["a$b^", "_hidden", "名前", "x{y}^\\z$", "long" * 60, "∑𝔸 é", "a\nb", "\udcff", "$$", "\\$"]


def test_any_name_can_be_a_title_and_a_class(tmp_path, recwarn):
    means, labels, title = torch.randn(20, 2), torch.arange(20) % len(ODD_NAMES), "\n".join(ODD_NAMES)
    plots.posterior_map(means, labels, ODD_NAMES, tmp_path / "map.png", title=title)
    plots.usage_chart(torch.tensor([[3, 0, 5]] * 2), tmp_path / "usage.png", title=title, names=ODD_NAMES)
    plots.scatter_2d([("a", means)], tmp_path / "scatter.png", title=title)
    plots.curves(EPOCHS, tmp_path / "curves.png", title=title)
    plots.image_rows([(name, torch.rand(2, 1, 8, 8)) for name in ODD_NAMES], tmp_path / "rows.png", title=title)
    assert all(imageio.imread(path).shape[1] < 1500 for path in tmp_path.iterdir())
    assert not [str(w.message) for w in recwarn]


def test_names_are_shown_as_they_are_and_start_no_formula(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save_chart", lambda figure, path: figures.append(figure))
    names = ["$x^2$", "a\\$b"]
    plots.posterior_map(torch.randn(4, 2), torch.arange(4) % 2, names, tmp_path / "a.png", title="$y$ and $z$")
    texts = [figures[0].get_suptitle(), *(text.get_text() for text in figures[0].axes[0].get_legend().get_texts())]
    assert texts == ["$y$ and $z$", *names]
    assert not figures[0]._suptitle.get_parse_math()
    assert not any(text.get_parse_math() for text in figures[0].axes[0].get_legend().get_texts())


@pytest.mark.parametrize("count", [1, 10, 11, 20, 21, 1000])
def test_any_number_of_classes_has_colors_and_a_short_legend(tmp_path, monkeypatch, count):
    figures = []
    monkeypatch.setattr(plots, "_save_chart", lambda figure, path: figures.append(figure))
    labels = torch.arange(-1, count)
    names = [f"class {k}" for k in range(count)]
    plots.posterior_map(torch.randn(count + 1, 2), labels, names, tmp_path / "a.png", title="t")
    dots, legend = figures[0].axes[0].collections[0], figures[0].axes[0].get_legend()
    assert len(dots.get_offsets()) == count + 1, "an example without a label is shown too"
    assert len({tuple(color) for color in dots.get_facecolors()}) >= min(count + 1, 200)
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == min(count, plots.MOST_NAMED)
    assert (shown[0], shown[-1]) == (names[0], names[-1])


def test_points_that_are_not_finite_are_left_out(tmp_path):
    points = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [torch.inf, 1.0]])
    for kept in (points, points[1:]):
        plots.posterior_map(kept, torch.full((len(kept),), -1), [], tmp_path / "map.png", title="t")
    for data in (torch.zeros(1, 2), points[1:]):
        plots.scatter_2d([("data", data), ("samples", points[1:])], tmp_path / "scatter.png", title="t")


def test_a_curve_that_reaches_zero_has_a_linear_axis(tmp_path, recwarn):
    rows = [row | {"held_out_nmse": 0.0} for row in EPOCHS[:1]] + EPOCHS[1:]
    plots.curves(rows, tmp_path / "curves.png", title="black images")
    assert not list(recwarn)


def test_a_plot_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written") as error:
        plots.image_grid(torch.rand(4, 1, 8, 8), tmp_path / "file" / "a.png", title="t")
    assert "\n" not in str(error.value)


def test_bars_of_usage_are_sorted_and_uniform_usage_reaches_half_the_panel():
    image = plots.usage_bars(torch.tensor([[1, 1, 1, 1], [0, 8, 0, 0]]), width=8, height=20)
    assert image.shape == (3, 2 * 20 + plots.GAP, 8)
    assert image.dtype == torch.uint8
    blue = (image == torch.tensor([68, 119, 170])[:, None, None]).all(0)
    assert blue[:20].sum(0).tolist() == [9] * 8  # half the panel, without the line at uniform usage
    assert blue[22:].sum(0).tolist() == [19, 19, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("height", "width"), [(96, 32), (32, 96)])
def test_rectangles_and_their_code_maps_leave_no_empty_bands(tmp_path, height, width):
    path = tmp_path / "codes.png"
    images, codes = torch.full((1, 1, height, width), 0.5), torch.zeros(1, height // 4, width // 4, dtype=torch.int64)
    colors = np.full((*codes.shape, 3), 90, np.uint8)
    plots.code_visualization(images, {"codes": codes}, {"codes": colors}, images, path, title="t")
    sheet = imageio.imread(path).min(axis=-1)
    filled = (sheet < 200)[30:].mean(axis=1)
    assert (filled > 0.1).mean() > 0.6  # most rows below the title have pixels of images
    assert sheet.shape[1] < 3 * 208 + 60


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0.0131, 0.0284, ["0.016", "0.02", "0.024", "0.028"]), (0.002, 3.0, ["0.01", "0.1", "1"])],
)
def test_logarithmic_axes_have_decimals(low, high, labels):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(low, high))
    plots._label_plainly(axes)
    shown = [t for t in axes.yaxis.get_majorticklocs() if low <= t <= high]
    assert [axes.yaxis.get_major_formatter()(tick, 0) for tick in shown] == labels
