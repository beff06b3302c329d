"""Plots: arrays in, an image file out. None needs a display.

Images are `[N, C, H, W]`, uint8 or float in [0, 1], gray or color. Grids of images are composed pixel by pixel, which
keeps small images sharp; large ones are reduced with antialiasing. Charts are drawn by matplotlib. The first line of a
title is its headline; further lines are smaller. Files are written whole or not at all; a file that cannot be written
raises `UserError`.

N images, C channels, H W pixels, h w code grid, K codes, D code dimension.
"""

import contextlib
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae import fonts
from vqvae.errors import counted
from vqvae.files import whole_file
from vqvae.metrics import METRICS, perplexity

Color = tuple[int, int, int]  # red, green, blue, 0 to 255
Item = TypeVar("Item")
PAPER, INK, MUTED = (255, 255, 255), (30, 30, 30), (110, 110, 110)
GAP, WIDE_GAP = 2, 14  # pixels between the images of a montage, and between the parts of a row
NARROWEST, WIDEST = 480, 4000  # pixels across a grid of images
SCREEN = 1300  # pixels; text grows with what is wider, which a screen shows reduced
LARGEST_TILE = 256  # pixels; larger images are reduced
MOST_NAMED = 20  # classes in a legend
FILLING = 10  # used codes that fill the plot of a codebook
MANY_POINTS = 10  # of a curve; with so many, the axis may leave out the largest ones
MOST_FRAMES, FEWEST_FRAMES, LARGEST_GIF = 60, 16, 2_000_000  # of an animation; bytes
LONGEST_SIDE = 1000  # pixels of a frame


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


def display_scale(images: Tensor) -> int:
    """The integer factor that brings the longer side of small images closest to 64 pixels."""
    return max(1, round(64 / max(images.shape[-2:])))


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` (2 or more) of the items, evenly spaced, with the first and the last one."""
    count = min(len(items), most)
    return [items[i * (len(items) - 1) // max(count - 1, 1)] for i in range(count)]


def _tiles(images: Tensor, columns: int) -> Tensor:
    """A montage of images at a size that suits `columns` of them: small ones enlarged, large ones reduced."""
    longest, room = max(images.shape[-2:]), max(16, min(LARGEST_TILE, WIDEST // columns))
    if longest <= room:
        return montage(images, columns, min(display_scale(images), room // longest))
    size = [max(1, round(side * room / longest)) for side in images.shape[-2:]]
    values = images.detach().cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    return montage(F.interpolate(values, size, mode="bilinear", antialias=True), columns)


def image_grid(images: Tensor, path: Path, *, title: str, columns: int = 8) -> None:
    """Images in rows of `columns`, under a title."""
    image_rows([("", images)], path, title=title, columns=columns)


def image_rows(
    rows: Sequence[tuple[str, Tensor | Sequence[Tensor]]],
    path: Path,
    *,
    title: str,
    columns: int = 10,
    headers: Sequence[str] = (),
) -> None:
    """Rows of a label and its images, which wrap after `columns`.

    A row may consist of several parts, which stand side by side with a wider gap, each below its header.
    """
    rows = [(short(label), [images] if isinstance(images, Tensor) else images) for label, images in rows]
    blocks = []
    for _, parts in rows:
        tiles = [_tiles(part, columns).permute(1, 2, 0).numpy() for part in parts]
        gap = np.full((len(tiles[0]), WIDE_GAP, 3), PAPER, np.uint8)
        blocks.append([block for tile in tiles for block in (gap, tile)][1:])
    wide = max(sum(block.shape[1] for block in line) for line in blocks)
    scale = max(1, round(wide / SCREEN))
    margin = scale * max((_text_width(label) for label, _ in rows), default=0)
    margin = margin + 12 if margin else 0
    head = top = 18 * scale if headers else 0
    sheet = _Sheet(8 + margin + wide + 8, top + sum(line[0].shape[0] + 6 for line in blocks) + 2, title, scale)
    for (label, _), line in zip(rows, blocks, strict=True):
        left = 8 + margin
        for i, block in enumerate(line):
            sheet.paste(block, left, top)
            if headers and top == head and i % 2 == 0:
                sheet.text((left + block.shape[1] // 2, 8 * scale), headers[i // 2], MUTED, size=12)
            left += block.shape[1]
        sheet.text((8, top + line[0].shape[0] // 2), label, anchor="lm")
        top += line[0].shape[0] + 6
    sheet.save(path)


def pairs(originals: Tensor, reconstructions: Tensor, path: Path, *, title: str, columns: int = 10) -> None:
    """Rows of originals, each above the row of their reconstructions."""
    rows: list[tuple[str, Tensor]] = []
    for start in range(0, len(originals), columns):
        rows.append(("originals", originals[start : start + columns]))
        rows.append(("reconstructions", reconstructions[start : start + columns]))
    image_rows(rows, path, title=title, columns=columns)


def code_visualization(
    images: Tensor,
    maps: Mapping[str, Tensor],
    colors: Mapping[str, np.ndarray],
    reconstructions: Tensor,
    path: Path,
    *,
    title: str,
) -> None:
    """Each image, its code maps `[N, h, w]` in their colors `[N, h, w, 3]` (uint8), and its reconstruction, in a row.

    Large cells also show the code's number.
    """
    longest = max(max(codes.shape[1:]) for codes in maps.values())
    side = max(images.shape[-2:])
    # images and maps get one size, where small images are enlarged by an integer
    side = side * max(1, round(208 / side)) if side <= LARGEST_TILE else longest * max(1, LARGEST_TILE // longest)
    side = max(side, longest)
    # the part of a square that all images and maps fill, which is less for rectangles
    shapes = [images.shape[-2:], *(codes.shape[1:] for codes in maps.values())]
    tall, wide = (max(math.ceil(side * shape[axis] / max(shape)) for shape in shapes) for axis in (0, 1))
    wide = max(wide, 100)  # room for the headers
    headers = ("image", *maps, "reconstruction")
    per_row = 2 if len(images) > 1 and len(maps) == 1 else 1
    panel = len(headers) * (wide + 8) + 16
    rows = -(-len(images) // per_row)
    sheet = _Sheet(per_row * panel, 24 + rows * (tall + 10), title)
    for i, (image, reconstruction) in enumerate(zip(pixels(images), pixels(reconstructions), strict=True)):
        top = 22 + i // per_row * (tall + 10)
        lefts = [8 + i % per_row * panel + j * (wide + 8) for j in range(len(headers))]
        if i < per_row:
            for left, header in zip(lefts, headers, strict=True):
                sheet.text((left + wide // 2, 10), header, MUTED)
        top, lefts = top - (side - tall) // 2, [left - (side - wide) // 2 for left in lefts]
        sheet.paste(image, lefts[0], top, side)
        sheet.paste(reconstruction, lefts[-1], top, side)
        for left, name in zip(lefts[1:-1], maps, strict=True):
            _code_map(sheet, maps[name][i].cpu().numpy(), colors[name][i], left, top, side)
    sheet.save(path)


def _code_map(sheet: "_Sheet", codes: np.ndarray, colors: np.ndarray, left: int, top: int, side: int) -> None:
    """Draw codes `[h, w]` as cells of their colors `[h, w, 3]`, centered in a square of `side` pixels."""
    h, w = codes.shape
    sheet.paste(colors, left, top, side)
    cell = max(1, side // max(h, w))
    if cell < 24:  # too small for a number
        return
    left, top = left + (side - cell * w) // 2, top + (side - cell * h) // 2
    for (row, column), code in np.ndenumerate(codes):
        center = (left + column * cell + cell // 2, top + row * cell + cell // 2)
        bright = colors[row, column] @ (0.3, 0.6, 0.1) > 128
        sheet.text(center, str(code), INK if bright else PAPER, size=11)


def vector_colors(vectors: Tensor, means: Tensor | None = None) -> np.ndarray:
    """Colors `[N, 3]` (uint8) for vectors `[N, D]`: near vectors get like colors, equal ones the same.

    The base is the `means` `[N, 3]` in [0, 1], the mean color of what each vector stands for, or else a gray whose
    lightness is the first principal component of the vectors. The next two components shift it along opponent colors.
    """
    x = vectors.detach().cpu().double().nan_to_num()
    x = x - x.mean(dim=0)
    x = x / x.abs().max().clamp(min=1e-300)
    _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
    directions = directions[sizes > 1e-6 * sizes[:1]][:3]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    scores = x @ (directions * largest.sign()).T  # signs of components are arbitrary
    scores = F.pad(scores, (0, 3 - scores.shape[1]))  # [N, 3]
    spread = scores.std(dim=0, correction=0)
    spread = torch.maximum(spread, 0.2 * spread[0]).clamp(min=1e-300)  # a component that hardly varies stays faint
    scores = (scores / (2 * spread)).clamp(-1, 1)
    if means is None:
        base, first, second = 0.55 + 0.33 * scores[:, :1], scores[:, 1:2], scores[:, 2:]
    else:
        base, first, second = 0.2 + 0.65 * means.cpu(), scores[:, :1], scores[:, 1:2]
    rgb = base + 0.25 * (first * torch.tensor([1.0, -0.5, -1.0]) + second * torch.tensor([-0.2, 0.6, -1.0]))
    return (255 * rgb.clamp(0, 1)).round().to(torch.uint8).numpy()


def embed_plane(vectors: Tensor, seed: int = 0) -> tuple[np.ndarray, Literal["t-SNE", "PCA"]]:
    """Vectors `[K, D]` in the plane, `[K, 2]`, and how: by t-SNE, or by PCA for fewer than five distinct vectors."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = vectors.detach().float().cpu().nan_to_num().numpy()
    distinct = len(np.unique(x, axis=0))
    if distinct < 2:
        return np.zeros((len(x), 2)), "PCA"
    if distinct < 5:
        flat = PCA(min(2, *x.shape)).fit_transform(x)
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "PCA"
    perplexity = min(30, (len(x) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="random", random_state=seed, max_iter=750)
    return tsne.fit_transform(x), "t-SNE"


def codebook_map(vectors: Tensor, usage: Tensor | None, patches: Tensor, path: Path, *, title: str) -> None:
    """Plot the code vectors `[K, D]` in the plane (`embed_plane`), each as the patch `[C, h, w]` that it decodes to.

    The area of a patch is proportional to the usage `[K]` of its code; unused codes are small crosses. If `FILLING`
    codes are used, they fill the plot, and unused codes around them are left out: dead codes may lie far away.
    """
    points, method = embed_plane(vectors)
    counts = np.ones(len(points)) if usage is None else usage.double().numpy()
    shown = points[counts > 0] if (counts > 0).sum() >= FILLING else points
    low, extent = shown.min(axis=0), np.ptp(shown, axis=0).max() or 1.0
    side, border = 1000, 50
    scale = (side - 2 * border) / extent
    left = (side - np.ptp(shown[:, 0]) * scale) / 2  # in the middle, if the cloud is narrow
    points = (points - low) * scale + (left, border)
    bottom = int(np.ptp(shown[:, 1]) * scale) + 2 * border
    outside = ((points < 10) | (points > (side - 10, bottom - 10))).any(axis=1)
    share = counts / max(counts.max(), 1)
    largest = float(np.clip(2.2 * side / math.sqrt(len(points)) / 2, 10, 90))
    note = f"{method} of {counted(len(points), 'code')}, each as the patch it decodes to"
    if usage is not None:
        unused, left_out = int((counts == 0).sum()), int(outside[counts == 0].sum())
        note += f"; area proportional to held-out usage; {counted(unused, 'unused code')} (x)"
        note += f", {left_out:,} of them outside" if left_out else ""
    sheet = _Sheet(side, bottom, f"{title}\n{note}")
    tiles = pixels(patches)
    for k in np.argsort(-share, kind="stable"):  # small patches last, on top
        x, y = int(points[k, 0]), int(points[k, 1])
        if counts[k] == 0:
            if not outside[k]:
                sheet.cross(x, y)
            continue
        size = max(6, round(largest * math.sqrt(share[k])))
        sheet.frame(x - size // 2, y - size // 2, size)
        sheet.paste(tiles[k], x - size // 2, y - size // 2, size, exact=True)
    sheet.save(path)


def usage_chart(usage: Tensor, path: Path, *, title: str, names: Sequence[str] = ()) -> None:
    """Share of positions that use each code, for the counts `[levels, K]`; codes sorted by decreasing usage.

    `names` are those of the levels, if there are several.
    """
    counts = usage.double().sort(dim=1, descending=True).values.numpy()
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure, axes = _chart((8, 4))
    for level, share in enumerate(shares):
        used = int((share > 0).sum())
        label = f"perplexity {perplexity(usage[level]):,.1f} of {shares.shape[1]:,}, {counted(used, 'code')} in use"
        label = f"{names[level]}: {label}" if len(shares) > 1 else label
        share = share[: max(used, 1)]  # the other codes have no area
        few = len(shares) <= 2  # the areas of more would hide each other
        axes.stairs(share, fill=few, color=f"C{level}", alpha=0.6 if few else 1, label=label)
    axes.axhline(1 / shares.shape[1], color="#cc6677", linestyle="--", label=f"uniform usage, 1 / {shares.shape[1]:,}")
    axes.set(xlabel="codes, by decreasing usage", ylabel="share of held-out positions", xlim=(0, shares.shape[1]))
    below_legend = max(1 / shares.shape[1], shares[:, shares.shape[1] * 2 // 5 :].max())
    room = max(0.2, 1 - 0.065 * (len(shares) + 2.5))  # share of the height that the legend leaves
    axes.set_ylim(0, max(1.05 * shares.max(), below_legend / room))
    note = "perplexity: effective number of codes"
    _plain(axes.legend(loc="upper right", frameon=False, title=note, alignment="right"))
    _headline(figure, title)
    _save_chart(figure, path)


def usage_bars(usage: Tensor, width: int = 512, height: int = 128) -> Tensor:
    """Code usage for TensorBoard, `[3, H, W]` uint8: a panel per level, codes sorted by decreasing usage `[levels, K]`.

    A bar that reaches half the panel stands for uniform usage; longer bars are cut at the top.
    """
    counts = usage.double().sort(dim=1, descending=True).values.numpy()
    shares = counts / counts.mean(axis=1, keepdims=True).clip(min=1e-12)  # 1 where usage is uniform
    columns = shares[:, np.arange(width) * shares.shape[1] // width]
    filled = np.arange(height, 0, -1)[None, :, None] <= (columns * height / 2)[:, None]  # [levels, height, width]
    panels = np.where(filled[..., None], np.array([68, 119, 170], np.uint8), np.array(PAPER, np.uint8))
    panels[:, height // 2] = (204, 102, 119)
    sheet = np.pad(panels, ((0, 0), (0, GAP), (0, 0), (0, 0)), constant_values=200).reshape(-1, width, 3)
    return torch.from_numpy(sheet[:-GAP]).permute(2, 0, 1)


def curve_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that `curves` draws: those with at least two points that differ by more than rounding."""
    trained, epochs = _split(rows)
    names = []
    for name, metric in METRICS.items():
        values = [row[f"held_out_{name}"] for row in epochs if f"held_out_{name}" in row]
        if len(epochs) == 1:
            values += [row[name] for row in trained if name in row]
        if metric.curve and values and not math.isclose(min(values), max(values), rel_tol=1e-6):  # as of a fixed prior
            names.append(name)
    return names


def curves(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Metrics over the training steps, from the rows of metrics.jsonl: one panel for each of `curve_names(rows)`.

    The axes cover all held-out values, but only 95 % of many training values: the first steps would flatten the rest.
    """
    names = curve_names(rows)
    trained, epochs = _split(rows)
    steps = [0, *(row["step"] for row in trained)]
    longest = max((after - before for before, after in pairwise(steps)), default=0)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, grid = _chart((4.2 * columns, 3.1 * lines), lines, columns)
    panels = np.atleast_1d(grid).flatten()
    for axes, name in zip(panels, names, strict=False):
        training = _whole_windows([(row["step"], row[name]) for row in trained if name in row], longest)
        held_out = [(row["step"], row[f"held_out_{name}"]) for row in epochs if f"held_out_{name}" in row]
        if training:
            marker = "." if len(training) < 3 else None
            axes.plot(*zip(*training, strict=True), linewidth=1, marker=marker, color="C0", label="train")
        axes.plot(*zip(*held_out, strict=True), marker=".", color="C1", label="held-out")
        shown = [value for _, value in held_out]
        most = 95 if len(training) >= MANY_POINTS else 100
        shown += list(np.percentile([value for _, value in training], (0, most))) if training else []
        logarithmic = METRICS[name].logarithmic and min(shown) > 0
        axes.set(xlabel="step", ylabel=METRICS[name].curve, yscale="log" if logarithmic else "linear")
        # short, so that labels do not overlap
        axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step >= 1000 else f"{step:g}")
        margin = 0.05 * (max(shown) - min(shown))
        if margin:
            low, high = min(shown), max(shown)
            axes.set_ylim(*((low / 1.05, high * 1.05) if logarithmic else (low - margin, high + margin)))
        if logarithmic:
            _label_plainly(axes)
        axes.legend(frameon=False)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    _headline(figure, title)
    _save_chart(figure, path)


def _label_plainly(axes: Any) -> None:
    """Label a logarithmic axis with decimals, and within one decade at round numbers: 0.02 rather than 2 x 10^-2."""
    from matplotlib import ticker

    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _whole_windows(points: Sequence[tuple[int, float]], longest: int) -> list[tuple[int, float]]:
    """Join windows, given by their last step and mean, until each averages at least `longest` steps.

    Training logs a shorter window at the end of an epoch. As a point of its own its noise would look like a dip.
    """
    windows: list[tuple[int, int, float]] = []  # last step, steps, mean
    previous = 0
    for step, value in points:
        window, previous = (step, max(step - previous, 1), value), step
        windows.append(_join(windows.pop(), window) if windows and windows[-1][1] < longest else window)
    if len(windows) > 1 and windows[-1][1] < longest:
        windows[-2:] = [_join(*windows[-2:])]
    return [(step, mean) for step, _, mean in windows]


def _join(a: tuple[int, int, float], b: tuple[int, int, float]) -> tuple[int, int, float]:
    """One window of two successive ones."""
    return b[0], a[1] + b[1], a[2] + (b[2] - a[2]) * (b[1] / (a[1] + b[1]))


def _split(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The rows of training steps, and the rows of epochs."""
    return [row for row in rows if row["kind"] == "train"], [row for row in rows if row["kind"] == "epoch"]


def read_frames(paths: Sequence[Path]) -> list[np.ndarray]:
    """The PNG files `paths` as `[H, W, 3]` uint8, at most `LONGEST_SIDE` pixels a side.

    Files that cannot be read are left out.
    """
    from PIL import Image

    frames = []
    for path in filter(Path.is_file, paths):
        with contextlib.suppress(Exception), Image.open(path, formats=["PNG"]) as image:  # Pillow raises anything
            frame = image.convert("RGB")
            frame.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
            frames.append(np.asarray(frame))
    return frames


def training_animation(frames: Sequence[np.ndarray], path: Path) -> None:
    """The frames, `[H, W, 3]` uint8, as a GIF of about ten seconds at most, which pauses at its end.

    At most `MOST_FRAMES`, evenly chosen, are shown, and fewer and smaller ones if the file would exceed `LARGEST_GIF`
    bytes.
    """
    from PIL import Image

    chosen = evenly(frames, MOST_FRAMES)
    height, width = np.max([frame.shape[:2] for frame in chosen], axis=0)
    images = []
    for frame in chosen:  # a title may wrap into a second line
        images.append(Image.new("RGB", (int(width), int(height)), PAPER))
        images[-1].paste(Image.fromarray(frame), (0, int(height) - len(frame)))
    data, excess = b"", len(images) * len(_gif(images[-1:])) / LARGEST_GIF  # an estimate: all frames take seconds
    while not data or excess > 1:
        if excess > 1 and len(images) > FEWEST_FRAMES:
            kept = max(FEWEST_FRAMES, int(len(images) / excess))
            images, excess = evenly(images, kept), excess * kept / len(images)
        if excess > 1:
            size = [max(1, int(side / math.sqrt(1.05 * excess))) for side in images[0].size]
            images = [image.resize((size[0], size[1]), Image.Resampling.LANCZOS) for image in images]
        data = _gif(images)
        excess = len(data) / LARGEST_GIF
    with whole_file(path) as file:
        file.write(data)


def _gif(images: Sequence[Any]) -> bytes:
    """Images of Pillow as a GIF."""
    duration = int(min(500, 10_000 / len(images)))
    first, *others = (image.quantize(256, dither=0) for image in images)  # dithering is noise, which packs badly
    buffer = io.BytesIO()
    durations = [duration] * len(others) + [duration + 1500]
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()


def scatter_2d(panels: Sequence[tuple[str, Tensor]], path: Path, *, title: str) -> None:
    """Scatter plots of labeled points `[N, 2]`, side by side on equal axes. Points that are not finite are left out."""
    panels = [(label, points[points.isfinite().all(dim=1)]) for label, points in panels]
    figure, grid = _chart((4.2 * len(panels), 4.2), 1, len(panels))
    everything = torch.cat([points for _, points in panels]).numpy()
    low, high = np.percentile(everything, [0.2, 99.8], axis=0) if len(everything) else np.zeros((2, 2))
    center, half = (low + high) / 2, (high - low).max() / 2 * 1.1 or 1.0
    for axes, (label, points) in zip(np.atleast_1d(grid), panels, strict=True):
        axes.scatter(*points.numpy().T, s=4, alpha=0.5, color="#4477aa", linewidths=0)
        axes.set(title=label, aspect="equal", xlim=(center[0] - half, center[0] + half))
        axes.set(ylim=(center[1] - half, center[1] + half), xlabel="$x_1$", ylabel="$x_2$")
    _headline(figure, title)
    _save_chart(figure, path)


def posterior_map(
    means: Tensor, labels: Tensor, classes: Sequence[str], path: Path, *, title: str, rings: bool = False
) -> None:
    """Scatter plot of posterior means `[N, 2]`, colored by their labels `[N]` if there are classes.

    Means that are not finite are left out. `rings` shows 1, 2 and 3 standard deviations of a standard normal prior.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    figure, axes = _chart((7, 6))
    finite = means.isfinite().all(dim=1)
    x = means[finite].numpy()
    area = float(np.clip(30_000 / max(len(x), 1), 2, 16))
    style: dict[str, Any] = {"s": area, "alpha": 0.85 if len(x) < 2000 else 0.6, "linewidths": 0}
    if classes:
        palette = class_colors(len(classes))
        axes.scatter(*x.T, c=[palette[k] if k >= 0 else (0.6, 0.6, 0.6) for k in labels[finite].tolist()], **style)
        named = evenly(range(len(classes)), MOST_NAMED)
        dots = [Line2D([], [], marker="o", linestyle="", color=palette[k]) for k in named]
        names = [short(classes[k]) for k in named]
        heading = "class" if len(named) == len(classes) else f"{len(named)} of {len(classes)} classes"
        place: dict[str, Any] = {"title": heading, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
        _plain(axes.legend(dots, names, **place, frameon=False))
    else:
        axes.scatter(*x.T, color="#4477aa", **style)
    for radius in (1, 2, 3) if rings else ():
        axes.add_patch(Circle((0, 0), radius, fill=False, color="#999999", linewidth=0.6, zorder=0))
    reach = max(3.5, float(np.abs(x).max(initial=0)) * 1.05)  # equal axes show a collapsed latent as a line
    axes.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    _headline(figure, title)
    _save_chart(figure, path)


def class_colors(count: int) -> list[Any]:
    """Colors of classes, which differ as far as their number allows."""
    from matplotlib import colormaps

    if count > 20:
        return [colormaps["turbo"](k / (count - 1)) for k in range(count)]
    return [colormaps["tab10" if count <= 10 else "tab20"](k) for k in range(count)]


class _Sheet:
    """A white image with a title, and room for `width` x `height` pixels of images and text below it.

    A sheet is at least `NARROWEST` wide, and a title that does not fit wraps. All text is `scale` times its size.
    """

    def __init__(self, width: int, height: int, title: str, scale: int = 1):
        from PIL import Image, ImageDraw

        width, self.scale = max(width, NARROWEST), scale
        headline, *notes = title.split("\n")
        lines = [(line, 16, INK) for line in _wrap(headline, width - 16, 16 * scale)]
        lines += [(line, 12, MUTED) for note in notes for line in _wrap(note, width - 16, 12 * scale)]
        self.top = 10 + scale * sum(size + 6 for _, size, _ in lines)
        self.image = Image.new("RGB", (width, self.top + height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        y = 6 - self.top
        for line, size, color in lines:
            self.text((8, y + scale * (size // 2 + 2)), line, color, size=size, anchor="lm")
            y += scale * (size + 6)

    def text(self, at: tuple[int, int], text: str, color: Color = INK, *, size: int = 13, anchor: str = "mm") -> None:
        """Write text centered at (x, y), or with the anchor "lm" from there."""
        size *= self.scale
        ascent, descent = _font(None, size).getmetrics()
        x = at[0] - (_text_width(text, size) / 2 if anchor == "mm" else 0)
        y = self.top + at[1] + (ascent - descent) / 2
        for file, piece in fonts.runs(fonts.drawable(text)):
            self.draw.text((x, y), piece, color, _font(file, size), anchor="ls")
            x += _font(file, size).getlength(piece)

    def paste(self, block: np.ndarray, left: int, top: int, side: int | None = None, *, exact: bool = False) -> None:
        """Paste pixels `[H, W, 3]` uint8; with `side`, in the middle of a square of that size.

        Small blocks are enlarged by an integer, or with `exact` to fill the square; large ones are reduced with
        antialiasing.
        """
        from PIL import Image

        tile = Image.fromarray(block)
        if side is not None:
            longest = max(tile.size)
            factor = side / longest if exact or longest > side else side // longest
            size = [max(1, round(pixels * factor)) for pixels in tile.size]
            method = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
            tile = tile.resize((size[0], size[1]), method)
            left, top = left + (side - size[0]) // 2, top + (side - size[1]) // 2
        self.image.paste(tile, (left, self.top + top))

    def frame(self, left: int, top: int, side: int) -> None:
        """Outline a square."""
        self.draw.rectangle((left - 1, self.top + top - 1, left + side, self.top + top + side), outline=MUTED)

    def cross(self, x: int, y: int) -> None:
        """Mark a point."""
        y += self.top
        self.draw.line((x - 3, y - 3, x + 3, y + 3), MUTED)
        self.draw.line((x - 3, y + 3, x + 3, y - 3), MUTED)

    def save(self, path: Path) -> None:
        with whole_file(path) as file:
            self.image.save(file, format="PNG")


@cache
def _font(file: str | None, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


def _text_width(text: str, size: int = 13) -> int:
    return math.ceil(sum(_font(file, size).getlength(piece) for file, piece in fonts.runs(fonts.drawable(text))))


def _wrap(text: str, width: int, size: int) -> list[str]:
    """The text in lines that are at most `width` pixels wide, broken at spaces or within long words."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if _text_width(longer, size) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if _text_width(lines[-1] + character, size) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line] or [""]


def short(name: str, limit: int = 40) -> str:
    """The name, or its beginning."""
    return name if len(name) <= limit else f"{name[: limit - 3]}..."


def _plain(legend: Any) -> None:
    """Show a legend's names as they are: a dollar sign starts no formula, and each script gets its font."""
    for text in legend.get_texts():
        name = fonts.drawable(text.get_text())
        text.set(text=name, parse_math=False, fontfamily=fonts.families(name))


def _headline(figure: Any, title: str) -> None:
    """Put a title above all panels of a figure, and make the figure taller by the title's lines."""
    width, height = figure.get_size_inches()
    longest = int(12 * width)  # characters of 11 points
    text = "\n".join(textwrap.fill(fonts.drawable(line), longest) for line in title.split("\n"))
    figure.set_size_inches(width, height + 0.2 * (text.count("\n") + 1))
    figure.suptitle(text, fontsize=11, parse_math=False, fontfamily=fonts.families(text))


def _chart(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure of `size` inches, and its axes. pyplot would need a display and keep every figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save_chart(figure: Any, path: Path) -> None:
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
