"""A checkpoint becomes plots and a page that shows them: one function per plot, listed in `PLOTS`.

Images come from the checkpoint, which stores some of the held-out split, so no data set is needed.

B examples, C channels, H W pixels, h w code grid.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vqvae import checkpoint, page, plots, randomness, sampling
from vqvae.autoencoder import Autoencoder, unit_range
from vqvae.contracts import Discrete
from vqvae.devices import choose_device
from vqvae.errors import OptionError, counted, naming, near_misses, printable
from vqvae.files import make_folder, write_text
from vqvae.metrics import METRICS
from vqvae.registry import Choice
from vqvae.runs import LOG, read_metrics

MOST_CODES = 16_384  # that the plot of the codebook shows; t-SNE of more takes many minutes
MOST_CELLS = 11  # of each side of a grid, to see what a code decodes to
MOST_CLASSES = 40  # that have a row of samples
MOST_LEVELS = 8  # of codes that are shown one by one
PAGE = "index.html"


class NotApplicable(Exception):
    """A plot does not apply to the model; the message says why."""


@dataclass(frozen=True)
class Report:
    """A trained model, its checkpoint, and the options of the command `visualize`."""

    model: Autoencoder
    content: dict[str, Any]  # of the checkpoint
    logs: Path  # the run's folder, with metrics.jsonl
    options: argparse.Namespace

    @property
    def images(self) -> Tensor:
        """The held-out examples in the checkpoint, `[B, C, H, W]`."""
        return self.content["examples"]["images"]

    @property
    def labels(self) -> Tensor:
        """Their labels, `[B]`; -1 without classes."""
        return self.content["examples"]["labels"]

    @property
    def classes(self) -> list[str]:
        return self.content["data"]["classes"]

    @property
    def conditional(self) -> bool:
        """Whether the prior is conditioned on labels."""
        return bool(self.content["config"]["conditional"])

    @property
    def name(self) -> str:
        """The run's name, that of its folder."""
        return printable(Path(os.path.abspath(self.logs)).name) or "run"

    @property
    def prior(self) -> str:
        return self.content["config"]["prior"]["name"]

    @property
    def held_out(self) -> int:
        """The number of images in the held-out split, as far as the checkpoint knows it."""
        counts = self.content["data"].get("examples", {})
        return counts.get("validation", counts.get("test", len(self.images)))

    def title(self, text: str, *notes: str) -> str:
        return "\n".join((f"{self.name}: {text}", " · ".join(filter(None, notes)))).strip()

    def tokens(self) -> str:
        """The codes of an image in words, such as `7x7 codes, K = 512`; the dimensions of a continuous latent."""
        bottleneck = self.model.discrete
        if bottleneck is None:
            return f"latent of {self.model.bottleneck.describe()}"
        shapes = {name: tuple(level.shape[1:]) for name, level in _levels(bottleneck).items()}
        sizes = {name: f"{h}x{w}" if self.model.spatial else str(h * w) for name, (h, w) in shapes.items()}
        if len(sizes) == 1:
            size = sizes.popitem()[1]
            words = f"{size} code{'' if size in ('1', '1x1') else 's'}"
        elif len(set(sizes.values())) == 1:
            words = f"{len(sizes)} levels of {sizes.popitem()[1]} codes"
        else:
            # the name of a scale is its size
            words = " + ".join(name if "x" in name else f"{size} {name}" for name, size in sizes.items()) + " codes"
        return f"{words}, K = {bottleneck.num_codes:,}"

    def sampling(self) -> str:
        """How samples are drawn, in words."""
        options = self.options
        words = [
            f"temperature {options.temperature:g}",
            f"the {options.top_k} likeliest codes" if options.top_k else "",
            f"top p {options.top_p:g}" if options.top_p != 1 else "",
            f"guidance {options.guidance:g}" if options.guidance != 1 else "",
            counted(options.steps, "step") if options.steps else "",
            f"choice temperature {options.choice_temperature:g}" if options.choice_temperature is not None else "",
        ]
        return ", ".join(filter(None, words))

    def sampled_class(self) -> str:
        """Which class samples have, in words; "" if the prior knows none."""
        label = self.options.label
        in_turn = "classes in turn" if self.conditional else ""
        return in_turn if label is None else f"class {plots.short(self.classes[label])}"

    def need_trained_prior(self) -> None:
        """Raise `NotApplicable` for the uniform prior, whose samples look like noise, unless they are asked for."""
        if self.prior == "uniform" and not self.options.only:
            raise NotApplicable("the uniform prior knows nothing of the data; train a prior on the codes first")

    def need_images(self) -> None:
        if not self.model.shows_images:
            raise NotApplicable("the examples are points, not images")

    def need_codes(self) -> Discrete:
        """The bottleneck, if it has codes."""
        if self.model.discrete is None:
            raise NotApplicable("the latent is continuous, and has no codes")
        return self.model.discrete

    def need_continuous_latent(self) -> None:
        if self.model.discrete is not None:
            raise NotApplicable("the latent consists of codes, and is not continuous")

    def need_plane(self) -> None:
        self.need_continuous_latent()
        if self.model.bottleneck.code_dim != 2:
            raise NotApplicable("the latent does not have two dimensions")

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Posterior means `[N, 2]` and labels `[N]` of the held-out split, or of the examples in an old checkpoint."""
        kept = self.content.get("posterior")
        if kept is not None:
            return kept["means"], kept["labels"]
        return self.model.posterior_mean(self.images).flatten(1).cpu(), self.labels

    def generator(self, draw: int = 0) -> torch.Generator:
        return randomness.generator(self.options.seed, "samples", draw, device=self.model.device)

    def sample(self, n: int, *, draw: int = 0, **options: Any) -> Tensor:
        """Decode n samples of the prior, `[n, C, H, W]`; `options` are those of the prior's `sample`.

        A conditional prior without `labels` gets the class chosen by the user, or else all classes in turn.
        """
        if self.conditional and "labels" not in options:
            label = self.options.label
            labels = torch.arange(n) % len(self.classes) if label is None else torch.full((n,), label)
            options["labels"] = labels.to(self.model.device)
        options |= {"generator": self.generator(draw), **sampling_options(self.options, self.model)}
        if self.model.discrete is None:
            return self.model.sample(n, **options)
        # closed before anything is printed; it appears only where sampling takes long
        with tqdm(desc="sampling", unit="code", delay=2, disable=None, leave=False) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return self.model.sample(n, progress=progress, **options)


def sampling_options(options: argparse.Namespace, model: Autoencoder) -> dict[str, Any]:
    """The given sampling options. Raises `OptionError` for options that the model's prior does not take."""
    prior, given = model.prior, {}
    for name, option in sampling.OPTIONS.items():
        value = getattr(options, name)
        if value == option.default:
            continue
        if name not in prior.sampling_options:
            has_no_codes = "the model's latent is continuous and has no codes; leave it out"
            problem = has_no_codes if model.discrete is None else "only a masked prior draws in steps; leave it out"
            raise OptionError(name, value, problem)
        given[name] = value
    prior.check_sampling(**given)
    return given


def _levels(bottleneck: Discrete) -> dict[str, Tensor]:
    """Where the codes of each level are in the grid: indices into its flattened form, one map `[1, h, w]` a level."""
    return bottleneck.maps(torch.arange(math.prod(bottleneck.grid)).view(1, *bottleneck.grid))


def _shown_maps(bottleneck: Discrete, codes: Tensor) -> dict[str, Tensor]:
    """The maps of codes `[N, h, w]`, of `MOST_LEVELS` levels where there are more."""
    maps = bottleneck.maps(codes)
    return {name: maps[name] for name in plots.evenly(list(maps), MOST_LEVELS)}


def _some(names: Sequence[str]) -> str:
    """A note for the title of a plot that cannot show all levels."""
    return f"{MOST_LEVELS} of {len(names)} levels" if len(names) > MOST_LEVELS else ""


def original(report: Report, path: Path) -> None:
    """Held-out images."""
    report.need_images()
    title = report.title("held-out originals", f"{len(report.images)} of {report.held_out:,}")
    plots.image_grid(report.images, path, title=title)


def reconstructions(report: Report, path: Path) -> None:
    """Held-out images and their reconstructions."""
    report.need_images()
    images = report.images[:50]
    title = report.title("held-out originals and reconstructions", report.tokens())
    plots.pairs(images, report.model.reconstruct(images), path, title=title)


def code_visualization(report: Report, path: Path) -> None:
    """Held-out images, their codes as colors, and their reconstructions."""
    report.need_images()
    bottleneck = report.need_codes()
    codes = report.model.encode(report.images[:8])
    names = bottleneck.level_names
    if len(names) > 1:
        codes = codes[:4]
    images, maps = report.images[: len(codes)], _shown_maps(bottleneck, codes)
    title = report.title("images and their codes", report.tokens(), _some(names), "like colors, like codes")
    colors = code_colors(report.model, bottleneck, maps, images)
    plots.code_visualization(images, maps, colors, report.model.decode(codes), path, title=title)


def code_colors(
    model: Autoencoder, bottleneck: Discrete, maps: Mapping[str, Tensor], images: Tensor
) -> dict[str, np.ndarray]:
    """Colors `[N, h, w, 3]` (uint8) of each level's codes `[N, h, w]` for N images: like vectors have like colors.

    A code's vector is the decoder's mean input for an image with that code at every position of the level. The colors
    are based on the mean color of the images' parts that have the code.
    """
    colors = {}
    positions, x = _levels(bottleneck), unit_range(images)
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    for name, level in maps.items():
        used, cells = level.cpu().flatten().unique(return_inverse=True)
        vectors = []
        for some in used.split(256):
            grids = torch.zeros(len(some), math.prod(bottleneck.grid), dtype=torch.int64)
            grids[:, positions[name].flatten()] = some.unsqueeze(1)
            grids = grids.view(-1, *bottleneck.grid).to(level.device)
            vectors.append(bottleneck.embed(grids).flatten(2).mean(dim=2))
        h, w = level.shape[1:]
        means = None
        if model.spatial:
            parts = F.adaptive_avg_pool2d(x, (h, w)).movedim(1, -1).reshape(-1, 3)  # [N h w, 3]
            sums = torch.zeros(len(used), 3).index_add_(0, cells, parts)
            means = (sums / cells.bincount().unsqueeze(1))[cells]
        of_cells = torch.cat(vectors)[cells.to(level.device)]  # [N h w, D], so that frequent codes count more
        colors[name] = plots.vector_colors(of_cells, means).reshape(*level.shape, 3)
    return colors


@torch.no_grad()
def code_maps(model: Autoencoder, bottleneck: Discrete, images: Tensor) -> Tensor:
    """Each of N images `[N, C, H, W]`, followed by the maps of its codes as colors: `[M, 3, H, W]` uint8."""
    colors = code_colors(model, bottleneck, _shown_maps(bottleneck, model.encode(images)), images)
    rows = [torch.from_numpy(plots.pixels(images)).movedim(-1, 1)]
    for level in colors.values():
        rows.append(F.interpolate(torch.from_numpy(level).movedim(-1, 1), images.shape[2:], mode="nearest"))
    return torch.stack(rows, dim=1).flatten(0, 1)


def levels(report: Report, path: Path) -> None:
    """Reconstructions from the first level of codes, from the first two levels, and so on."""
    report.need_images()
    bottleneck = report.need_codes()
    images = report.images[:10]
    codes = report.model.encode(images)
    names = bottleneck.level_names
    if len(names) == 1:
        raise NotApplicable("the codes have a single level")
    rows = [("originals", images)]
    for count in plots.evenly(range(1, len(names) + 1), MOST_LEVELS):
        label = f"{names[0]} only" if count == 1 else f"up to {names[count - 1]}"
        label = "all levels" if count == len(names) else label
        rows.append((label, report.model.decode(codes, levels=count)))
    title = report.title("reconstructions from the first levels of codes", report.tokens(), _some(names))
    plots.image_rows(rows, path, title=title)


def codebook(report: Report, path: Path) -> None:
    """The codebook in the plane, each code as the patch it decodes to."""
    report.need_images()
    bottleneck = report.need_codes()
    if len(bottleneck.level_names) > 1:
        raise NotApplicable("a code's image depends on the codes of the other levels")
    if bottleneck.num_codes > MOST_CODES:
        raise NotApplicable(f"there are {bottleneck.num_codes:,} codes, and the plot shows at most {MOST_CODES:,}")
    counts = report.content["usage"]
    counts = None if counts is None else counts[0]
    title = report.title("codebook")
    plots.codebook_map(bottleneck.code_vectors(), counts, code_patches(report.model, bottleneck), path, title=title)


def code_patches(model: Autoencoder, bottleneck: Discrete) -> Tensor:
    """The image of each of the K codes, `[K, C, height, width]`: decode a grid filled with the code, crop its center.

    Codes of a sequence have no place in the image: their patch is the whole image. Of a large grid only the middle is
    decoded, because the net sees no more around a cell (`vqgan` sees a little more: it is deeper, with attention and
    norms over the grid).
    """
    h, w = (min(cells, MOST_CELLS) if model.spatial else cells for cells in bottleneck.grid)
    patches = []
    for codes in torch.arange(bottleneck.num_codes, device=model.device).split(256):
        images = model.decode_latents(bottleneck.embed(codes.view(-1, 1, 1).expand(-1, h, w)))
        rows, columns = (h, w) if model.spatial else (1, 1)
        height, width = images.shape[-2] // rows, images.shape[-1] // columns
        top, left = rows // 2 * height, columns // 2 * width
        patches.append(images[..., top : top + height, left : left + width].cpu())
    return torch.cat(patches)


def usage(report: Report, path: Path) -> None:
    """How often the held-out split uses each code."""
    bottleneck = report.need_codes()
    if report.content["usage"] is None:
        raise NotApplicable("only a stage-one checkpoint written after an evaluation has the code usage")
    names = bottleneck.level_names
    shown = plots.evenly(range(len(names)), MOST_LEVELS)
    title = report.title("code usage over the whole held-out split", report.tokens(), _some(names))
    counts = report.content["usage"][shown]
    plots.usage_chart(counts, path, title=title, names=[names[level] for level in shown])


def curves(report: Report, path: Path) -> None:
    """Metrics over the training steps."""
    log = report.logs / LOG
    rows = read_metrics(log)
    if not plots.curve_names(rows):
        raise NotApplicable(f"{log} has too few evaluations to draw a curve")
    plots.curves(rows, path, title=report.title("metrics over training"))


def training_animation(report: Report, path: Path) -> None:
    """The images drawn after each epoch of this run, as a GIF."""
    trained = Path(report.content["plots"])
    source = (trained if trained.is_dir() else Path("plots") / report.name) / "generated_samples"
    names = ((re.fullmatch(r"epoch_(\d+)\.png", found.name), found) for found in source.glob("epoch_*.png"))
    numbered = sorted((int(match[1]), found) for match, found in names if match)
    # later ones are of an earlier run with this name
    frames = plots.read_frames(
        plots.evenly([f for n, f in numbered if n <= report.content["epoch"]], plots.MOST_FRAMES)
    )
    if not frames:
        raise NotApplicable(f"{source} has no images epoch_*.png")
    plots.training_animation(frames, path)


def samples(report: Report, path: Path) -> None:
    """Samples of the prior."""
    report.need_images()
    report.need_trained_prior()
    count = report.options.samples
    title = report.title(
        f"samples of the {report.prior} prior", report.sampling(), report.sampled_class(), report.tokens()
    )
    plots.image_grid(report.sample(count), path, title=title, columns=math.ceil(math.sqrt(count)))


def class_rows(report: Report, path: Path) -> None:
    """Samples of each class."""
    report.need_images()
    if not report.conditional:
        raise NotApplicable("the prior is not conditioned on classes")
    chosen = plots.evenly(range(len(report.classes)), MOST_CLASSES)
    labels = torch.tensor(chosen).repeat_interleave(10).to(report.model.device)
    images = report.sample(len(labels), labels=labels).split(10)
    rows = [(report.classes[label], row) for label, row in zip(chosen, images, strict=True)]
    some = "each class" if len(chosen) == len(report.classes) else f"{len(chosen)} of {len(report.classes)} classes"
    title = report.title(f"samples of {some}", report.sampling(), report.tokens())
    plots.image_rows(rows, path, title=title)


def completions(report: Report, path: Path) -> None:
    """Held-out images whose first half of codes (with levels: all but the finest) is kept, and the rest sampled."""
    report.need_images()
    bottleneck = report.need_codes()
    if report.content["kind"] != "prior":
        raise NotApplicable("only a prior that was trained on codes (stage two) completes images")
    images, labels = report.images[:10], report.labels[:10].to(report.model.device)
    codes = report.model.encode(images)
    h, w = bottleneck.grid
    if h == 1:
        raise NotApplicable("the codes of an image have a single row, of which no half can be kept")
    rows = [("originals", images), ("reconstructions", report.model.reconstruct(images))]
    *coarser, finest = maps = bottleneck.maps(codes)
    if len({level.shape for level in maps.values()}) > 1:
        kept = sum(maps[name][0].numel() for name in coarser) // w
        words = coarser[0] if len(coarser) == 1 else "coarser"
        explanation = f"the {words} codes kept, the {finest} codes sampled"
        rows.append(("given", report.model.decode_latents(bottleneck.embed(codes, levels=len(coarser)))))
    else:
        kept, explanation = h // 2, "codes of the top half kept, the rest sampled"
        if report.model.spatial:
            given = images.clone()
            given[:, :, images.shape[2] * kept // h :] = 127
            rows.append(("given", given))
    options = {"labels": labels} if report.conditional else {}
    for i in range(4):
        completed = report.sample(len(images), draw=i, given=(codes, kept), **options)
        rows.append((f"completion {i + 1}", completed))
    title = report.title(explanation, report.sampling(), report.tokens())
    plots.image_rows(rows, path, title=title)


def interpolations(report: Report, path: Path) -> None:
    """Decoded points on the line between the latents of two held-out images, ends included."""
    report.need_images()
    report.need_continuous_latent()
    count = min(10, len(report.images) // 2)
    if count == 0:
        raise NotApplicable("the checkpoint has a single held-out image")
    start, end = report.images[:count], report.images[count : 2 * count]
    weights = torch.linspace(0, 1, 8, device=report.model.device).view(-1, 1, 1, 1)
    rows = []
    for a, b in zip(start.split(1), end.split(1), strict=True):
        from_a, to_b = report.model.posterior_mean(a), report.model.posterior_mean(b)
        rows.append(("", [a, report.model.decode_latents(torch.lerp(from_a, to_b, weights)), b]))
    title = report.title("interpolations between two held-out images", report.tokens())
    headers = ("image A", "from the reconstruction of A to the reconstruction of B", "image B")
    plots.image_rows(rows, path, title=title, headers=headers)


def traversals(report: Report, path: Path) -> None:
    """The latent of a held-out image, one dimension varied at a time."""
    report.need_images()
    report.need_continuous_latent()
    if len(report.images) == 1:
        raise NotApplicable("the checkpoint has a single held-out image")
    means = report.model.posterior_mean(report.images)
    center, spread = means.mean(dim=0).flatten(), means.std(dim=0).flatten()
    rows = []
    for unit in spread.argsort(descending=True)[:10].tolist():
        z = means[:1].repeat(9, 1, 1, 1)
        # in standard deviations over the examples: under a learned prior latents need not have unit variance
        z[:, unit, 0, 0] = center[unit] + spread[unit] * torch.linspace(-3, 3, 9, device=z.device)
        rows.append((f"z{unit + 1}", report.model.decode_latents(z)))
    title = report.title(
        "the latent of a held-out image, one dimension varied at a time",
        "from -3 to +3 standard deviations over held-out images",
        f"{len(rows)} of {center.numel()} dimensions, those of largest variance first",
    )
    plots.image_rows(rows, path, title=title)


def scatter_2d(report: Report, path: Path) -> None:
    """Held-out points, their reconstructions, and samples with and without the decoder's noise."""
    model = report.model
    if model.shows_images:
        raise NotApplicable("the examples are images, not points")
    points = report.images[:1000]
    panels = [("held-out data", points), ("reconstructions", model.reconstruct(points))]
    if report.prior != "uniform" or report.options.only:
        options = {"generator": report.generator(), **sampling_options(report.options, model)}
        draws = model.prior.sample(len(points), **options)
        params = model.decoder(draws if model.discrete is None else model.discrete.embed(draws))
        panels.append(("samples with decoder noise", model.likelihood.sample(params)))
        panels.append(("samples without noise: decoder means", model.likelihood.center(params)))
    panels = [(label, x.detach().cpu().flatten(1)) for label, x in panels]
    notes = [f"{len(points):,} of {report.held_out:,} held-out points", report.tokens()]
    if len(panels) > 2:
        notes.append(f"samples of the {report.prior} prior, {report.sampling()}")
    plots.scatter_2d(panels, path, title=report.title("data and model", *notes))


def posterior_map(report: Report, path: Path) -> None:
    """Posterior means of the held-out split in the plane, for latents of two dimensions."""
    report.need_plane()
    means, labels = report.posterior()
    total = max(report.held_out, len(means))
    share = f"{len(means):,} of " if len(means) < total else "all " if total > 1 else ""
    normal = report.prior == "normal"
    title = report.title(
        "posterior means in the latent plane",
        f"{share}{counted(total, 'held-out example')}",
        "rings: 1, 2 and 3 standard deviations of the prior" if normal else "",
    )
    plots.posterior_map(means, labels, report.classes, path, title=title, rings=normal)


def latent_grid(report: Report, path: Path) -> None:
    """The plane of a latent of two dimensions, decoded at quantiles of the normal prior or of the posterior means."""
    report.need_images()
    report.need_plane()
    shares = torch.linspace(0.025, 0.975, 20)
    if report.prior == "normal":
        axes, of_what = torch.special.ndtri(shares).expand(2, -1), "the normal prior"
    else:
        means = report.posterior()[0]
        axes, of_what = means[means.isfinite().all(dim=1)].quantile(shares, dim=0).T, "the posterior means"
    up, right = torch.meshgrid(axes[1].flip(0), axes[0], indexing="ij")  # z2 grows upwards
    z = torch.stack([right, up], dim=-1).view(-1, 2, 1, 1).to(report.model.device)
    title = report.title(
        "the latent plane, decoded",
        "z1 grows to the right, z2 upwards",
        f"20x20 quantiles of {of_what}, from 2.5% to 97.5%",
    )
    plots.image_grid(report.model.decode_latents(z), path, title=title, columns=20)


class Plot(NamedTuple):
    """A row of `PLOTS`."""

    draw: Callable[[Report, Path], None]  # raises NotApplicable
    heading: str
    reading: str  # one sentence: how to read it


PLOTS: dict[str, Plot] = {
    "original.png": Plot(
        original, "Held-out images", "These images were not trained on; all other plots of images start from them."
    ),
    "reconstructions.png": Plot(
        reconstructions, "Reconstructions",
        "Compare each row of originals with the row of reconstructions below it: what differs is lost in the latent.",
    ),
    "code_visualization.png": Plot(
        code_visualization, "Codes of images",
        "Each cell is the code of one position, and codes whose vectors are near have like colors: areas of one color "
        "are areas that the model describes alike.",
    ),
    "levels.png": Plot(
        levels, "Levels of codes",
        "Every row adds a level of codes to the row above: what changes is what that level describes.",
    ),
    "codebook.png": Plot(
        codebook, "Codebook",
        "Each code is the patch that it decodes to, and codes whose vectors are near lie together; large patches are "
        "used often, and a cross is a code without use.",
    ),
    "usage.png": Plot(
        usage, "Code usage",
        "A curve that stays near the dashed line uses the whole codebook; one that falls steeply uses few codes.",
    ),
    "curves.png": Plot(
        curves, "Metrics over training",
        "Held-out curves that turn around while training curves go on show overfitting; curves that still improve need "
        "more epochs.",
    ),
    "training_animation.gif": Plot(
        training_animation, "Training, epoch by epoch",
        "The same held-out images or samples after each epoch: details appear as training goes on.",
    ),
    "samples.png": Plot(
        samples, "Samples",
        "New images, drawn from the prior and decoded: good ones look like the data and differ from each other.",
    ),
    "class_rows.png": Plot(
        class_rows, "Samples by class", "Each row has ten samples of one class, which should show that class and vary."
    ),
    "completions.png": Plot(
        completions, "Completions",
        "Each column starts from the same given half: completions should fit it and differ from each other.",
    ),
    "interpolations.png": Plot(
        interpolations, "Interpolations",
        "Each row decodes points on the line between the latents of two images: in a smooth latent space every step "
        "looks like data.",
    ),
    "traversals.png": Plot(
        traversals, "Latent dimensions",
        "Each row changes one dimension of the latent: what changes along the row is what that dimension encodes.",
    ),
    "scatter_2d.png": Plot(
        scatter_2d, "Data and model in the plane",
        "Reconstructions and samples should cover the same region as the data, as densely.",
    ),
    "posterior_map.png": Plot(
        posterior_map, "Latent plane",
        "Each dot is a held-out example: the latent tells apart classes that form separate clouds, and the "
        "whole should fill the prior.",
    ),
    "latent_grid.png": Plot(
        latent_grid, "Latent plane, decoded",
        "Each image is decoded from its place in the plane of the plot above: neighbors should change gradually.",
    ),
}  # fmt: skip


def draw(options: argparse.Namespace) -> None:
    """Draw all plots that apply to the model of a checkpoint, or those of `options.only`.

    `options` are those of `vqvae.commands.visualize`. Raises `UserError` for bad options, and for checkpoints and
    folders that cannot be used.
    """
    for name in options.only or ():
        if name not in PLOTS:
            problem = f"no such plot{near_misses(name, PLOTS)}; known: {', '.join(PLOTS)}"
            raise OptionError("only", name, problem)
    path = checkpoint.locate(options.checkpoint)
    with naming("checkpoint", options.checkpoint):
        content = checkpoint.read(path)
        model = checkpoint.restore(content, str(path)).to(choose_device(options.device))
    sampling_options(options, model)
    options.label = _label_of(options.label, content["data"]["classes"] if content["config"]["conditional"] else [])
    # names and places inside a checkpoint do not choose where anything is written: it may come from anywhere
    run = printable(Path(os.path.abspath(path)).parent.name) or "run"
    folder = make_folder(Path(options.plot_dir or "plots") / run, "plot_dir")
    report = Report(model, content, path.parent, options)
    drawn, left_out = [], []
    for name, plot in PLOTS.items():
        if options.only and name not in options.only:
            continue
        torch.manual_seed(randomness.stream(options.seed, "decoder"))
        try:
            plot.draw(report, folder / name)
        except NotApplicable as reason:
            left_out.append((name, str(reason)))
            continue
        drawn.append(name)
        print(printable(str(folder / name)))
    if options.only:  # the page of all plots stays, and shows what was drawn again
        if not drawn:
            name, why = left_out[0]
            raise OptionError("only", name, f"cannot be drawn: {why}; leave it out")
        for name, why in left_out:
            print(f"{name}: not drawn: {why}", file=sys.stderr)
    else:
        write_text(folder / PAGE, run_page(report, folder, drawn, left_out))
        print(printable(str(folder / PAGE)))
    print(printable(f"{counted(len(drawn), 'plot')} of {run} (step {content['step']:,}) in {folder}"))


def run_page(report: Report, folder: Path, drawn: list[str], left_out: list[tuple[str, str]]) -> str:
    """The HTML page of a run: what it is, its plots in `folder`, its metrics and its settings."""
    from PIL import Image

    content, model = report.content, report.model
    data, config = content["data"], content["config"]
    counts = data.get("examples", {})
    sizes = [f"{count:,} {split}" for split, count in counts.items()]
    shape = "x".join(map(str, data["shape"]))
    codes = model.discrete
    bits = "" if codes is None else f", {counted(codes.bits, 'bit')} an image"
    facts = [
        ("run", f"{report.name}, step {content['step']:,}, epoch {content['epoch']:,}"),
        ("data", f"{data['name']}: {', '.join([*sizes, shape])}" + (f" ({data['note']})" if data["note"] else "")),
        ("latent", report.tokens() + bits),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        (
            "model",
            ", ".join(f"{config[slot]['name']} {slot}" for slot in ("nets", "bottleneck", "prior", "likelihood")),
        ),
    ]
    shown = []
    for name in drawn:
        with Image.open(folder / name) as image:
            shown.append(page.Shown(name, PLOTS[name].heading, PLOTS[name].reading, image.size))
    rows = [row for row in read_metrics(report.logs / LOG) if row["kind"] == "epoch" and row["step"] <= content["step"]]
    settings = {key: Choice(**v) if isinstance(v, dict) else v for key, v in config.items() if v is not None}
    tables = [page.Table("Settings", ("setting", "value"), [(key, "", (str(v),)) for key, v in settings.items()])]
    if rows:
        heading = f"Metrics after epoch {rows[-1].get('epoch', 0):,}"
        tables.insert(
            0,
            page.Table(
                heading, ("metric", "train", rows[-1].get("split", "held out")), _metric_rows(rows[-1]), numbers=True
            ),
        )
    return page.html(report.name, facts, shown, left_out, tables)


def _metric_rows(row: dict[str, Any]) -> list[tuple[str, str, tuple[str, str]]]:
    """Name, explanation, training value and held-out value of every metric in a row of metrics.jsonl."""
    logged = dict.fromkeys(key.removeprefix("train_").removeprefix("held_out_") for key in row)
    table = []
    for name in sorted(logged, key=lambda name: list(METRICS).index(name) if name in METRICS else len(METRICS)):
        trained, held_out, error = (
            row.get(key) for key in (f"train_{name}", f"held_out_{name}", f"held_out_{name}_se")
        )
        if name.endswith("_se") or (trained is None and held_out is None):
            continue
        cell = "" if held_out is None else f"{held_out:,.4g}"
        if held_out is not None and error and error > 0:  # as many decimals as the error's first digit has
            decimals = min(max(0, -math.floor(math.log10(error))), 9)
            cell = f"{held_out:,.{decimals}f} ± {error:.{decimals}f}"
        explanation = METRICS[name].explanation if name in METRICS else ""
        table.append((name, explanation, ("" if trained is None else f"{trained:,.4g}", cell)))
    return table


def _label_of(typed: str | None, classes: Sequence[str]) -> int | None:
    """The label of a class that was typed as its name or number."""
    if typed is None:
        return None
    if not classes:
        raise OptionError("class", typed, "the model's prior is not conditioned on classes; leave it out")
    if typed in classes:
        return list(classes).index(typed)
    if typed.isdecimal() and int(typed) < len(classes):
        return int(typed)
    problem = f"must be from 0 to {len(classes) - 1}, or the name of a class{near_misses(typed, classes)}"
    raise OptionError("class", typed, problem)
