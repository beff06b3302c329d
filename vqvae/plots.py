"""Plots: arrays in, an image file out. None needs a display.

Images are `[N, C, H, W]`, uint8 or float in [0, 1], gray or color. Grids of images are composed pixel by pixel, which
keeps them sharp; charts are drawn by matplotlib. Files are written whole or not at all; a file that cannot be written
raises `UserError`.

N images, C channels, H W pixels, h w code grid, K codes, D code dimension.
"""

import colorsys
import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqvae.files import whole_file
from vqvae.metrics import METRICS

Color = tuple[int, int, int]  # red, green, blue, 0 to 255
PAPER, INK, MUTED = (255, 255, 255), (30, 30, 30), (120, 120, 120)
GAP = 2  # pixels between the images of a montage


def pixels(images: Tensor) -> np.ndarray:
    """Images as `[N, H, W, 3]` uint8."""
    if images.dtype != torch.uint8:
        images = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.cpu().permute(0, 2, 3, 1).numpy()


def montage(images: Tensor, columns: int = 8, scale: int = 1) -> Tensor:
    """Images in rows of `columns`, each enlarged by the integer `scale`: one image `[3, height, width]` uint8."""
    tiles = pixels(images).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), PAPER, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return torch.from_numpy(sheet).permute(2, 0, 1)


def display_scale(images: Tensor, target: int = 64) -> int:
    """The integer factor that brings the longer side of small images closest to `target` pixels."""
    return max(1, round(target / max(images.shape[-2:])))


def image_grid(images: Tensor, path: Path, *, title: str, columns: int = 8) -> None:
    """Images in rows of `columns`, under a title."""
    image_rows([("", images)], path, title=title, columns=columns)


def image_rows(rows: Sequence[tuple[str, Tensor]], path: Path, *, title: str, columns: int = 10) -> None:
    """Rows of a label and its images, which wrap after `columns`."""
    rows = [(_short(label), images) for label, images in rows]
    blocks = [montage(images, columns, display_scale(images)).permute(1, 2, 0).numpy() for _, images in rows]
    margin = max((_text_width(label) for label, _ in rows), default=0)
    margin = margin + 12 if margin else 0
    width = max(margin + max(block.shape[1] for block in blocks), _text_width(title, 16)) + 16
    top = 30
    sheet = _Sheet(width, top + sum(block.shape[0] + 6 for block in blocks) + 2, title)
    for (label, _), block in zip(rows, blocks, strict=True):
        sheet.paste(block, 8 + margin, top)
        sheet.text((8, top + block.shape[0] // 2), label, anchor="lm")
        top += block.shape[0] + 6
    sheet.save(path)


def pairs(originals: Tensor, reconstructions: Tensor, path: Path, *, title: str, columns: int = 10) -> None:
    """Rows of originals, each above the row of their reconstructions."""
    rows: list[tuple[str, Tensor]] = []
    for start in range(0, len(originals), columns):
        rows.append(("originals", originals[start : start + columns]))
        rows.append(("reconstructions", reconstructions[start : start + columns]))
    image_rows(rows, path, title=title, columns=columns)


def code_visualization(
    images: Tensor, maps: Mapping[str, Tensor], reconstructions: Tensor, path: Path, *, title: str
) -> None:
    """Each image, its code maps `[N, h, w]` and its reconstruction, side by side.

    Colors stand for codes; large cells also show the code's number.
    """
    longest = max(max(codes.shape[1:]) for codes in maps.values())
    cell = 26 if longest <= 10 else max(1, 208 // longest)
    side = max(cell * longest, 104)
    headers = ("image", *maps, "reconstruction")
    per_row = 2 if len(images) > 1 and len(maps) == 1 else 1
    panel = len(headers) * (side + 8) + 16
    rows = -(-len(images) // per_row)
    sheet = _Sheet(max(per_row * panel + 8, _text_width(title, 16) + 16), 52 + rows * (side + 10), title)
    for i, (image, reconstruction) in enumerate(zip(pixels(images), pixels(reconstructions), strict=True)):
        top = 50 + i // per_row * (side + 10)
        lefts = [8 + i % per_row * panel + j * (side + 8) for j in range(len(headers))]
        if i < per_row:
            for left, header in zip(lefts, headers, strict=True):
                sheet.text((left + side // 2, 40), header, MUTED)
        sheet.paste(image, lefts[0], top, (side, side))
        sheet.paste(reconstruction, lefts[-1], top, (side, side))
        for left, codes in zip(lefts[1:-1], maps.values(), strict=True):
            _code_map(sheet, codes[i].cpu().numpy(), left, top, side)
    sheet.save(path)


def _code_map(sheet: "_Sheet", codes: np.ndarray, left: int, top: int, side: int) -> None:
    """Draw codes `[h, w]` as square cells, centered in a square of `side` pixels."""
    h, w = codes.shape
    cell = max(1, side // max(h, w))
    left, top = left + (side - cell * w) // 2, top + (side - cell * h) // 2
    colors = np.array([[code_color(int(code)) for code in row] for row in codes], np.uint8)
    sheet.paste(colors, left, top, (cell * w, cell * h))
    if cell < 24:  # too small for a number
        return
    for (row, column), code in np.ndenumerate(codes):
        center = (left + column * cell + cell // 2, top + row * cell + cell // 2)
        bright = sum(code_color(int(code))) > 380
        sheet.text(center, str(code), INK if bright else PAPER, size=11)


def code_color(code: int) -> Color:
    """A color for a code. Successive codes differ in hue by the golden ratio, and in lightness."""
    hue, lightness = code * 0.6180339887 % 1, (0.35, 0.55, 0.75)[code % 3]
    red, green, blue = (round(255 * value) for value in colorsys.hls_to_rgb(hue, lightness, 0.7))
    return red, green, blue


def embed_plane(vectors: Tensor, seed: int = 0) -> np.ndarray:
    """Project vectors `[K, D]` onto the plane, `[K, 2]`: t-SNE, or PCA for fewer than five distinct vectors."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = vectors.detach().float().cpu().numpy()
    distinct = len(np.unique(x, axis=0))
    if distinct < 2:
        return np.zeros((len(x), 2))
    if distinct < 5:
        flat = PCA(min(2, *x.shape)).fit_transform(x)
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    perplexity = min(30, (len(x) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="random", random_state=seed, max_iter=750).fit_transform(x)


def codebook_map(vectors: Tensor, usage: Tensor | None, patches: Tensor, path: Path, *, title: str) -> None:
    """Plot the code vectors `[K, D]` in the plane (t-SNE), each as the patch `[C, h, w]` that it decodes to.

    The area of a patch is proportional to the usage `[K]` of its code; unused codes are small crosses.
    """
    points = embed_plane(vectors)
    extent = np.ptp(points, axis=0).max() or 1.0
    side, border = 1000, 50
    points = (points - points.min(axis=0)) / extent * (side - 2 * border) + border
    points[:, 0] += (side - border - points[:, 0].max()) / 2  # center a narrow cloud
    bottom = int(points[:, 1].max()) + border
    counts = np.ones(len(points)) if usage is None else usage.double().numpy()
    share = counts / max(counts.max(), 1)
    largest = float(np.clip(2.2 * side / math.sqrt(len(points)) / 2, 10, 90))
    sheet = _Sheet(side, bottom + 60, title)
    tiles = pixels(patches)
    for k in np.argsort(-share):  # small patches last, on top
        x, y = int(points[k, 0]), int(points[k, 1]) + 40
        if counts[k] == 0:
            sheet.draw.line((x - 3, y - 3, x + 3, y + 3), MUTED)
            sheet.draw.line((x - 3, y + 3, x + 3, y - 3), MUTED)
            continue
        size = max(6, round(largest * math.sqrt(share[k])))
        left, top = x - size // 2, y - size // 2
        sheet.draw.rectangle((left - 1, top - 1, left + size, top + size), outline=MUTED)
        sheet.paste(tiles[k], left, top, (size, size))
    method = "t-SNE" if len(points) >= 5 else "PCA"
    note = f"{method} of {len(points)} codes, each as the patch it decodes to"
    if usage is not None:
        note += f"; area proportional to held-out usage; {int((counts == 0).sum())} unused codes (x)"
    sheet.text((8, bottom + 48), note, MUTED, anchor="lm")
    sheet.save(path)


def usage_chart(usage: Tensor, path: Path, *, title: str) -> None:
    """Share of positions that use each code, for the counts `[levels, K]`; codes sorted by decreasing usage."""
    counts = usage.double().sort(dim=1, descending=True).values.numpy()
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure, axes = _chart((8, 4))
    lines = []
    for level, share in enumerate(shares):
        used = share[share > 0]
        perplexity = float(np.exp(-(used * np.log(used)).sum()))
        name = f"level {level + 1}" if len(shares) > 1 else ""
        lines.append(
            f"{name + ': ' if name else ''}perplexity {perplexity:.1f} of {shares.shape[1]}, {len(used)} codes in use"
        )
        share = share[: len(used) + 1]  # the other codes have no area
        axes.fill_between(np.arange(len(share)), share, step="mid", color=f"C{level}", alpha=0.6, label=name or None)
    axes.axhline(1 / shares.shape[1], color="#cc6677", linestyle="--", label="uniform usage")
    axes.set(
        xlabel="codes, by decreasing usage",
        ylabel="share of held-out positions",
        title=_literal(title),
        xlim=(0, shares.shape[1]),
    )
    lines.append("perplexity: effective number of codes")
    axes.legend(loc="upper right", frameon=False, title="\n".join(lines), alignment="right")
    _save_chart(figure, path)


def curve_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that `curves` draws: those with at least two points that differ."""
    trained, epochs = _split(rows)
    names = []
    for name, metric in METRICS.items():
        values = {row[f"held_out_{name}"] for row in epochs if f"held_out_{name}" in row}
        single = len(epochs) == 1 and any(name in row for row in trained)
        if metric.curve and values and (single or len(values) > 1):  # the rate of a fixed prior is constant
            names.append(name)
    return names


def curves(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Metrics over the training steps, from the rows of metrics.jsonl: one panel for each of `curve_names(rows)`.

    The axes cover all held-out values, but only 95 % of the training values: the first steps would flatten the rest.
    """
    names = curve_names(rows)
    trained, epochs = _split(rows)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, grid = _chart((4.2 * columns, 3.1 * lines), lines, columns)
    panels = np.atleast_1d(grid).flatten()
    for axes, name in zip(panels, names, strict=False):
        training = [(row["step"], row[name]) for row in trained if name in row]
        held_out = [(row["step"], row[f"held_out_{name}"]) for row in epochs if f"held_out_{name}" in row]
        if training:
            axes.plot(*zip(*training, strict=True), linewidth=1, color="C0", label="train")
        axes.plot(*zip(*held_out, strict=True), marker=".", color="C1", label="held-out")
        shown = [value for _, value in held_out]
        shown += list(np.percentile([value for _, value in training], (0, 95))) if training else []
        logarithmic = METRICS[name].logarithmic and min(shown) > 0
        axes.set(xlabel="step", ylabel=METRICS[name].curve, yscale="log" if logarithmic else "linear")
        margin = 0.05 * (max(shown) - min(shown))
        if margin:
            axes.set_ylim(min(shown) / 1.05 if logarithmic else min(shown) - margin, max(shown) + margin)
        axes.legend(frameon=False)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.suptitle(_literal(title))
    _save_chart(figure, path)


def _split(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The rows of training steps, and the rows of epochs."""
    return [row for row in rows if row["kind"] == "train"], [row for row in rows if row["kind"] == "epoch"]


def read_frames(paths: Sequence[Path]) -> list[np.ndarray]:
    """The PNG files `paths` as `[H, W, 3]` uint8. Files that cannot be read are left out."""
    from PIL import Image

    frames = []
    for path in filter(Path.is_file, paths):
        with contextlib.suppress(Exception), Image.open(path, formats=["PNG"]) as image:  # Pillow raises anything
            frames.append(np.asarray(image.convert("RGB")))
    return frames


def training_animation(frames: Sequence[np.ndarray], path: Path, *, seconds_per_frame: float = 0.5) -> None:
    """The frames, `[H, W, 3]` uint8, as a GIF. Frames that differ in size from the last one are left out."""
    import imageio.v3 as imageio

    images = [frame for frame in frames if frame.shape == frames[-1].shape]
    images += [images[-1]] * 3  # pause at the end
    with whole_file(path) as file:
        imageio.imwrite(file, np.stack(images), extension=".gif", duration=int(1000 * seconds_per_frame), loop=0)


def scatter_2d(panels: Sequence[tuple[str, Tensor]], path: Path, *, title: str) -> None:
    """Scatter plots of labeled points `[N, 2]`, side by side on equal axes. Points that are not finite are left out."""
    panels = [(label, points[points.isfinite().all(dim=1)]) for label, points in panels]
    figure, grid = _chart((4.2 * len(panels), 4.4), 1, len(panels))
    everything = torch.cat([points for _, points in panels]).numpy()
    low, high = np.percentile(everything, [0.2, 99.8], axis=0)
    center, half = (low + high) / 2, (high - low).max() / 2 * 1.1 or 1.0
    for axes, (label, points) in zip(np.atleast_1d(grid), panels, strict=True):
        axes.scatter(*points.numpy().T, s=4, alpha=0.5, color="#4477aa", linewidths=0)
        axes.set(title=label, aspect="equal", xlim=(center[0] - half, center[0] + half))
        axes.set(ylim=(center[1] - half, center[1] + half), xlabel="$x_1$", ylabel="$x_2$")
    figure.suptitle(_literal(title))
    _save_chart(figure, path)


def posterior_map(means: Tensor, labels: Tensor, classes: Sequence[str], path: Path, *, title: str) -> None:
    """Scatter plot of posterior means `[N, 2]`, colored by their labels `[N]` if there are classes.

    Means that are not finite are left out.
    """
    figure, axes = _chart((6.4, 5.6))
    finite = means.isfinite().all(dim=1)
    x, labels = means[finite].numpy(), labels[finite]
    if classes:
        dots = [
            axes.scatter(*x[labels.numpy() == k].T, s=8, color=f"C{k % 10}", linewidths=0) for k in range(len(classes))
        ]
        names = [_literal(_short(name)) for name in classes]
        place: dict[str, Any] = {"title": "class", "loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(dots, names, **place, frameon=False, markerscale=2)
    else:
        axes.scatter(*x.T, s=8, color="#4477aa", linewidths=0)
    reach = max(3.5, float(np.abs(x).max(initial=0)) * 1.05)  # equal axes show a collapsed latent as a line
    axes.set(xlabel="$z_1$", ylabel="$z_2$", title=_literal(title))
    axes.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    _save_chart(figure, path)


class _Sheet:
    """A white image of `height` x `width` pixels with a title, to paste images and write text on."""

    def __init__(self, width: int, height: int, title: str):
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.text((8, 15), title, size=16, anchor="lm")

    def text(self, at: tuple[int, int], text: str, color: Color = INK, *, size: int = 13, anchor: str = "mm") -> None:
        """Write text at (x, y). `anchor` is Pillow's: "mm" centers the text, "lm" starts it there."""
        self.draw.text(at, text, color, _font(size), anchor=anchor)

    def paste(self, block: np.ndarray, left: int, top: int, size: tuple[int, int] | None = None) -> None:
        """Paste pixels `[H, W, 3]` uint8, scaled to `size` (width, height) without interpolation."""
        from PIL import Image

        tile = Image.fromarray(block)
        self.image.paste(tile if size is None else tile.resize(size, Image.Resampling.NEAREST), (left, top))

    def save(self, path: Path) -> None:
        with whole_file(path) as file:
            self.image.save(file, format="PNG")


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_width(text: str, size: int = 13) -> int:
    return math.ceil(_font(size).getlength(text))


def _short(name: str, limit: int = 40) -> str:
    return name if len(name) <= limit else f"{name[: limit - 3]}..."


def _literal(text: str) -> str:
    """The text as matplotlib shows it unchanged: dollar signs would start a formula."""
    return text.replace("$", r"\$")


def _chart(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure of `size` inches, and its axes. pyplot would need a display and keep every figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save_chart(figure: Any, path: Path) -> None:
    with whole_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in scripts that the font lacks
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
