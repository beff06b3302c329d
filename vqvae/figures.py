"""Arrays in, a picture file out. Every figure says in words which row is what; none needs a display.

Pictures are `[N, C, H, W]`, uint8 or float in [0, 1], grey or colour. Sheets are composed pixel by pixel, so
that nothing is blurred; charts are drawn by matplotlib.

N pictures, C channels, H W pixels, h w code grid, K codes, D code dimension.
"""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PAPER, INK, MUTED = (255, 255, 255), (30, 30, 30), (120, 120, 120)
GAP = 2


def pixels(pictures: Tensor) -> np.ndarray:
    """`[N, C, H, W]` as `[N, H, W, 3]` uint8."""
    if pictures.dtype != torch.uint8:
        pictures = (pictures.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    if pictures.shape[1] == 1:
        pictures = pictures.expand(-1, 3, -1, -1)
    return pictures.cpu().permute(0, 2, 3, 1).numpy()


def montage(pictures: Tensor, columns: int = 8, scale: int = 1) -> Tensor:
    """Pictures side by side, row after row, each enlarged by a whole factor: one `[3, rows, columns]` uint8."""
    tiles = pixels(pictures).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), PAPER, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return torch.from_numpy(sheet).permute(2, 0, 1)


def whole_scale(pictures: Tensor, wanted: int = 64) -> int:
    """The whole factor that brings small pictures near the wanted size."""
    return max(1, round(wanted / max(pictures.shape[-2:])))


def image_grid(pictures: Tensor, path: Path, *, title: str, columns: int = 8) -> None:
    """All pictures in rows under a title; the size of the file depends only on the number and size of pictures."""
    rows_of_pictures([("", pictures)], path, title=title, columns=columns)


def rows_of_pictures(rows: Sequence[tuple[str, Tensor]], path: Path, *, title: str, columns: int = 10) -> None:
    """Labelled rows: each label stands to the left of its pictures, which wrap after `columns`."""
    blocks = [montage(p, columns, whole_scale(p)).permute(1, 2, 0).numpy() for _, p in rows]
    margin = max((_text_width(label) for label, _ in rows), default=0)
    margin = margin + 12 if margin else 0
    top = 30
    width = max(margin + max(b.shape[1] for b in blocks), _text_width(title, 16)) + 16
    height = top + sum(b.shape[0] + 6 for b in blocks) + 2
    canvas, draw = _canvas(width, height, title)
    for (label, _), block in zip(rows, blocks, strict=True):
        _paste(canvas, block, 8 + margin, top)
        draw.text((8, top + block.shape[0] // 2), label, INK, _font(13), anchor="lm")
        top += block.shape[0] + 6
    _save(canvas, path)


def pairs(originals: Tensor, reconstructions: Tensor, path: Path, *, title: str, columns: int = 10) -> None:
    """Rows of originals, each above the row of what they become."""
    rows: list[tuple[str, Tensor]] = []
    for start in range(0, len(originals), columns):
        rows.append(("originals", originals[start : start + columns]))
        rows.append(("reconstructions", reconstructions[start : start + columns]))
    rows_of_pictures(rows, path, title=title, columns=columns)


def code_visualization(
    images: Tensor, maps: dict[str, Tensor], reconstructions: Tensor, path: Path, *, title: str
) -> None:
    """Picture | its code maps `[N, h, w]`, a colour for each code, numbered where they fit | its reconstruction."""
    longest = max(max(map_.shape[1:]) for map_ in maps.values())
    cell = 26 if longest <= 10 else max(1, 208 // longest)
    side = max(cell * longest, 104)
    headers = ("picture", *maps, "reconstruction")
    per_row = 2 if len(images) > 1 and len(maps) == 1 else 1
    panel = len(headers) * (side + 8) + 16
    rows = -(-len(images) // per_row)
    width = max(per_row * panel + 8, _text_width(title, 16) + 16)
    canvas, draw = _canvas(width, 52 + rows * (side + 10), title)
    for i, (picture, back) in enumerate(zip(pixels(images), pixels(reconstructions), strict=True)):
        left, top = 8 + i % per_row * panel, 50 + i // per_row * (side + 10)
        places = [left + j * (side + 8) for j in range(len(headers))]
        if i < per_row:
            for x, header in zip(places, headers, strict=True):
                draw.text((x + side // 2, 40), header, MUTED, _font(13), anchor="mm")
        for x, tile in ((places[0], picture), (places[-1], back)):
            _paste(canvas, tile, x, top, (side, side))
        for x, map_ in zip(places[1:], maps.values(), strict=False):
            _code_map(canvas, draw, map_[i].cpu().numpy(), x, top, side)
    _save(canvas, path)


def _code_map(canvas, draw, codes: np.ndarray, left: int, top: int, side: int) -> None:
    """One code map `[h, w]`, centred in a square, its cells square."""
    h, w = codes.shape
    cell = max(1, side // max(h, w))
    left, top = left + (side - cell * w) // 2, top + (side - cell * h) // 2
    _paste(canvas, np.array([[code_colour(int(k)) for k in row] for row in codes], np.uint8), left, top,
           (cell * w, cell * h))  # fmt: skip
    if cell >= 24:
        for (r, c), k in np.ndenumerate(codes):
            dark = sum(code_colour(int(k))) > 380
            centre = (left + c * cell + cell // 2, top + r * cell + cell // 2)
            draw.text(centre, str(k), INK if dark else PAPER, _font(11), anchor="mm")


def code_colour(code: int) -> tuple[int, int, int]:
    """A colour for a code: hues a golden ratio apart, so that neighbouring numbers differ; lightness in three steps."""
    hue, level = code * 0.6180339887 % 1, code % 3
    return tuple(round(255 * v) for v in colorsys.hls_to_rgb(hue, (0.35, 0.55, 0.75)[level], 0.7))


def embed_plane(vectors: Tensor, seed: int = 0) -> np.ndarray:
    """Vectors `[K, D]` in the plane, `[K, 2]`: t-SNE, or below five vectors PCA."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = vectors.detach().float().cpu().numpy()
    different = len(np.unique(x, axis=0))
    if different < 2:
        return np.zeros((len(x), 2))
    if different < 5:
        flat = PCA(min(2, *x.shape)).fit_transform(x)
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    perplexity = min(30, (len(x) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="random", random_state=seed, max_iter=750).fit_transform(x)


def codebook_map(vectors: Tensor, usage: Tensor | None, patches: Tensor, path: Path, *, title: str) -> None:
    """The codebook in the plane (t-SNE): each code drawn as the patch `[K, C, h, w]` it decodes to, sized by its use.

    Codes that the held-out split never uses are small crosses.
    """
    from PIL import Image

    where = embed_plane(vectors)
    spread = np.ptp(where, axis=0).max() or 1.0
    side, border = 1000, 50
    points = (where - where.min(axis=0)) / spread * (side - 2 * border) + border
    points[:, 0] += (side - border - points[:, 0].max()) / 2  # a narrow cloud stands in the middle
    bottom = int(points[:, 1].max()) + border
    counts = np.ones(len(where)) if usage is None else usage.double().numpy()
    share = counts / max(counts.max(), 1)
    largest = float(np.clip(2.2 * side / math.sqrt(len(where)) / 2, 10, 90))
    canvas, draw = _canvas(side, bottom + 60, title)
    tiles = pixels(patches)
    for k in np.argsort(-share):  # small ones last, on top
        x, y = int(points[k, 0]), int(points[k, 1]) + 40
        if counts[k] == 0:
            draw.line((x - 3, y - 3, x + 3, y + 3), MUTED)
            draw.line((x - 3, y + 3, x + 3, y - 3), MUTED)
            continue
        size = max(6, round(largest * math.sqrt(share[k])))
        draw.rectangle(
            (x - size // 2 - 1, y - size // 2 - 1, x - size // 2 + size, y - size // 2 + size), outline=MUTED
        )
        canvas.paste(
            Image.fromarray(tiles[k]).resize((size, size), Image.Resampling.NEAREST),
            (x - size // 2, y - size // 2),
        )
    method = "t-SNE" if len(where) >= 5 else "PCA"
    unused = int((counts == 0).sum())
    note = (
        f"{method} of {len(where)} codes, each drawn as what it decodes to; area ~ held-out use; x: {unused} never used"
    )
    draw.text((8, bottom + 48), note, MUTED, _font(13), anchor="lm")
    _save(canvas, path)


def usage_chart(usage: Tensor, path: Path, *, title: str) -> None:
    """How often each code of each level `[levels, K]` is used on the held-out split, most used first."""
    counts = usage.double().sort(dim=1, descending=True).values.numpy()
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure, axes = _axes((8, 4))
    lines = []
    for level, share in enumerate(shares):
        used = share[share > 0]
        perplexity = float(np.exp(-(used * np.log(used)).sum()))
        name = f"level {level + 1}" if len(shares) > 1 else ""
        lines.append(
            f"{name + ': ' if name else ''}perplexity {perplexity:.1f} of {len(share)}, {len(used)} codes in use"
        )
        axes.fill_between(np.arange(len(share)), share, step="mid", color=f"C{level}", alpha=0.6, label=name or None)
    axes.axhline(1 / shares.shape[1], color="#cc6677", linestyle="--", label="uniform use")
    axes.set(
        xlabel="codes, most used first",
        ylabel="share of held-out positions",
        title=title,
        xlim=(0, shares.shape[1]),
    )
    lines.append("perplexity: as varied as so many codes used equally")
    axes.legend(loc="upper right", frameon=False, title="\n".join(lines), alignment="right")
    _save_chart(figure, path)


CURVES = {  # metric -> (label, logarithmic)
    "nmse": ("MSE / data variance", True),
    "neg_elbo": ("-ELBO, nats per image", False),
    "bits_per_dim": ("bits/dim", False),
    "reconstruction_nats": ("reconstruction: -log p(x|z), nats", False),
    "rate": ("rate: log q - log p, nats", False),
    "commitment": ("commitment", False),
    "perplexity": ("perplexity of code use", False),
    "active_codes": ("active codes", False),
    "active_units": ("active latent units", False),
    "bits_per_code": ("bits per code", False),
}


def curves(rows: list[dict], path: Path, *, title: str) -> None:
    """Training figures as logged between steps and held-out ones by epoch, from the rows of metrics.jsonl.

    Draws the metrics that are there. A run's first steps may leave the picture, else nothing after them could be told.
    """
    trained, epochs = ([row for row in rows if row["kind"] == kind] for kind in ("train", "epoch"))
    held_out = {n: {row[f"held_out_{n}"] for row in epochs if f"held_out_{n}" in row} for n in CURVES}
    # the rate of a fixed prior is a constant, and no curve; nor is a single point
    curved = {n for row in trained for n in row if len(epochs) == 1}
    names = [n for n, values in held_out.items() if len(values) > 1 or (values and n in curved)]
    columns = min(3, len(names))
    figure, grid = _axes((4.2 * columns, 3.1 * -(-len(names) // columns)), -(-len(names) // columns), columns)
    panels = np.atleast_1d(grid).flatten()
    for axes, name in zip(panels, names, strict=False):
        during = [(row["step"], row[name]) for row in trained if name in row]
        after = [(row["step"], row[f"held_out_{name}"]) for row in epochs if f"held_out_{name}" in row]
        if during:
            axes.plot(*zip(*during, strict=True), linewidth=1, color="C0", label="train")
        axes.plot(*zip(*after, strict=True), marker=".", color="C1", label="held-out")
        label, logarithmic = CURVES[name]
        axes.set(xlabel="step", ylabel=label, yscale="log" if logarithmic else "linear")
        shown = [value for _, value in after] + list(np.percentile([v for _, v in during], (0, 95)) if during else [])
        margin = 0.05 * (max(shown) - min(shown))
        if margin:
            axes.set_ylim(min(shown) / 1.05 if logarithmic else min(shown) - margin, max(shown) + margin)
        axes.legend(frameon=False)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    _save_chart(figure, path)


def training_animation(frames: Sequence[Path], path: Path, *, seconds_per_frame: float = 0.5) -> None:
    """The per-epoch pictures, whose titles carry the epoch, as a GIF; frames of another size are left out."""
    import imageio.v3 as imageio

    pictures = [imageio.imread(frame)[..., :3] for frame in frames]
    pictures = [p for p in pictures if p.shape == pictures[-1].shape]
    pictures += [pictures[-1]] * 3  # rest on the result before starting again
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, np.stack(pictures), duration=int(1000 * seconds_per_frame), loop=0)


def scatter_2d(panels: Sequence[tuple[str, Tensor]], path: Path, *, title: str) -> None:
    """Points `[N, 2]` of each panel on the same axes, side by side."""
    figure, grid = _axes((4.2 * len(panels), 4.4), 1, len(panels))
    everything = torch.cat([points for _, points in panels]).numpy()
    low, high = np.percentile(everything, [0.2, 99.8], axis=0)
    centre, half = (low + high) / 2, (high - low).max() / 2 * 1.1
    for axes, (label, points) in zip(np.atleast_1d(grid), panels, strict=True):
        axes.scatter(*points.numpy().T, s=4, alpha=0.5, color="#4477aa", linewidths=0)
        axes.set(title=label, aspect="equal", xlim=(centre[0] - half, centre[0] + half))
        axes.set(ylim=(centre[1] - half, centre[1] + half), xlabel="$x_1$", ylabel="$x_2$")
    figure.suptitle(title)
    _save_chart(figure, path)


def posterior_map(means: Tensor, labels: Tensor, classes: Sequence[str], path: Path, *, title: str) -> None:
    """Posterior means `[N, 2]` of held-out examples, coloured by class where there are classes."""
    figure, axes = _axes((6.4, 5.6))
    x = means.numpy()
    if classes:
        for k, name in enumerate(classes):
            axes.scatter(*x[labels.numpy() == k].T, s=8, label=name, color=f"C{k % 10}", linewidths=0)
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2)
    else:
        axes.scatter(*x.T, s=8, color="#4477aa", linewidths=0)
    reach = max(3.5, float(np.abs(x).max()) * 1.05)  # both axes alike, so that a collapsed latent shows as a line
    axes.set(xlabel="$z_1$", ylabel="$z_2$", title=title, aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    _save_chart(figure, path)


def _canvas(width: int, height: int, title: str):
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (int(width), int(height)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 15), title, INK, _font(16), anchor="lm")
    return canvas, draw


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_width(text: str, size: int = 13) -> int:
    return math.ceil(_font(size).getlength(text))


def _paste(canvas, block: np.ndarray, left: int, top: int, size: tuple[int, int] | None = None) -> None:
    """Paste pixels `[H, W, 3]`, blown up to `size` (width, height) where it is given."""
    from PIL import Image

    tile = Image.fromarray(block)
    canvas.paste(tile if size is None else tile.resize(size, Image.Resampling.NEAREST), (left, top))


def _save(canvas, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _axes(size: tuple[float, float], rows: int = 1, columns: int = 1):
    """A figure and its axes without pyplot, which would look for a display and keep every figure alive."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save_chart(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
