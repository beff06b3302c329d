"""A checkpoint becomes plots: one function per plot, listed in `PLOTS`.

Images come from the checkpoint, which stores some of the held-out split, so no data set is needed.

B examples, C channels, H W pixels, h w code grid.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vqvae import checkpoint, plots
from vqvae.autoencoder import Autoencoder
from vqvae.contracts import Discrete
from vqvae.devices import choose_device
from vqvae.errors import OptionError, naming, near_misses, printable
from vqvae.files import make_folder
from vqvae.runs import LOG, read_metrics

MOST_CODES = 16_384  # that the plot of the codebook shows; t-SNE of more takes many minutes


class NotApplicable(Exception):
    """A plot does not apply to the model; the message says why."""


@dataclass(frozen=True)
class Report:
    """A trained model, its checkpoint, and the options of the command `visualize`."""

    model: Autoencoder
    content: dict[str, Any]  # of the checkpoint
    logs: Path  # the run's folder, with metrics.jsonl
    options: argparse.Namespace
    progress: Callable[[int, int], None]  # gets the codes sampled so far, and their total

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

    def title(self, text: str) -> str:
        return f"{self.name}: {text}"

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

    def generator(self, seed_offset: int = 0) -> torch.Generator:
        return torch.Generator(self.model.device).manual_seed(self.options.seed + seed_offset)

    def sample(self, n: int, *, seed_offset: int = 0, **options: Any) -> Tensor:
        """Decode n samples of the prior, `[n, C, H, W]`; `options` are those of the prior's `sample`.

        A conditional prior without `labels` gets the class chosen by the user, or else all classes in turn.
        """
        if self.model.discrete is not None:
            options |= {"top_k": self.options.top_k, "progress": self.progress}
        if self.conditional and "labels" not in options:
            label = self.options.label
            labels = torch.arange(n) % len(self.classes) if label is None else torch.full((n,), label)
            options["labels"] = labels.to(self.model.device)
        generator = self.generator(seed_offset)
        return self.model.sample(n, temperature=self.options.temperature, generator=generator, **options)


def original(report: Report, path: Path) -> None:
    """Held-out images."""
    report.need_images()
    plots.image_grid(report.images, path, title=report.title("held-out originals"))


def reconstructions(report: Report, path: Path) -> None:
    """Held-out images and their reconstructions."""
    report.need_images()
    images = report.images[:50]
    title = report.title("held-out originals and reconstructions")
    plots.pairs(images, report.model.reconstruct(images), path, title=title)


def code_visualization(report: Report, path: Path) -> None:
    """Held-out images, their codes as colors, and their reconstructions."""
    report.need_images()
    bottleneck = report.need_codes()
    codes = report.model.encode(report.images[:8])
    if len(bottleneck.maps(codes)) > 1:
        codes = codes[:4]
    title = report.title(f"images and their codes (K = {bottleneck.num_codes})")
    images = report.images[: len(codes)]
    plots.code_visualization(images, bottleneck.maps(codes), report.model.decode(codes), path, title=title)


def levels(report: Report, path: Path) -> None:
    """Reconstructions from the first level of codes, from the first two levels, and so on."""
    report.need_images()
    bottleneck = report.need_codes()
    images = report.images[:10]
    codes = report.model.encode(images)
    names = list(bottleneck.maps(codes))
    if len(names) == 1:
        raise NotApplicable("the codes have a single level")
    rows = [("originals", images)]
    for count, name in enumerate(names, 1):
        rows.append((f"up to {name}", report.model.decode_latents(bottleneck.embed(codes, levels=count))))
    plots.image_rows(rows, path, title=report.title("reconstructions from the first levels of codes"))


def codebook(report: Report, path: Path) -> None:
    """The codebook in the plane, each code as the patch it decodes to."""
    report.need_images()
    bottleneck = report.need_codes()
    h, w = bottleneck.grid
    if len(bottleneck.maps(torch.zeros(1, h, w, dtype=torch.int64))) > 1:
        raise NotApplicable("a code's image depends on the codes of the other levels")
    if bottleneck.num_codes > MOST_CODES:
        raise NotApplicable(f"there are {bottleneck.num_codes:,} codes, and the plot shows at most {MOST_CODES:,}")
    patches = []
    for codes in torch.arange(bottleneck.num_codes).split(256):
        images = report.model.decode(codes.view(-1, 1, 1).expand(-1, h, w).contiguous())
        # The patch of a code near the center. In a sequence (w = 1) codes have no position: take the whole image.
        height, width = (images.shape[-2] // h, images.shape[-1] // w) if w > 1 else images.shape[-2:]
        top, left = (h // 2 * height, w // 2 * width) if w > 1 else (0, 0)
        patches.append(images[..., top : top + height, left : left + width].cpu())
    counts = report.content["usage"]
    counts = None if counts is None else counts[0]
    title = report.title("codebook")
    plots.codebook_map(bottleneck.code_vectors(), counts, torch.cat(patches), path, title=title)


def usage(report: Report, path: Path) -> None:
    """How often the held-out split uses each code."""
    report.need_codes()
    if report.content["usage"] is None:
        raise NotApplicable("only a stage-one checkpoint written after an evaluation has the code usage")
    plots.usage_chart(report.content["usage"], path, title=report.title("code usage over the whole held-out split"))


def curves(report: Report, path: Path) -> None:
    """Metrics over the training steps."""
    log = report.logs / LOG
    rows = read_metrics(log)
    if not plots.curve_names(rows):
        raise NotApplicable(f"{log} has too few evaluations")
    plots.curves(rows, path, title=report.title("training"))


def training_animation(report: Report, path: Path) -> None:
    """The images drawn after each epoch, as a GIF."""
    trained = Path(report.content["plots"])
    source = (trained if trained.is_dir() else Path("plots") / report.name) / "generated_samples"
    frames = plots.read_frames(sorted(source.glob("epoch_*.png")))
    if not frames:
        raise NotApplicable(f"{source} has no images epoch_*.png")
    plots.training_animation(frames, path)


def samples(report: Report, path: Path) -> None:
    """Samples of the prior."""
    report.need_images()
    prior = report.content["config"]["prior"]["name"]
    untrained = " (not trained on images: train a prior with --prior)" if prior == "uniform" else ""
    title = report.title(f"samples of the {prior} prior{untrained}")
    columns = math.ceil(math.sqrt(report.options.samples))
    plots.image_grid(report.sample(report.options.samples), path, title=title, columns=columns)


def class_rows(report: Report, path: Path) -> None:
    """Samples of each class."""
    report.need_images()
    if not report.conditional:
        raise NotApplicable("the prior is not conditioned on classes")
    labels = torch.arange(len(report.classes)).repeat_interleave(10).to(report.model.device)
    images = report.sample(len(labels), labels=labels).split(10)
    rows = list(zip(report.classes, images, strict=True))
    plots.image_rows(rows, path, title=report.title("samples of each class"))


def completions(report: Report, path: Path) -> None:
    """Held-out images whose first half of codes (with levels: the top level) is kept, and the rest sampled."""
    report.need_images()
    bottleneck = report.need_codes()
    if report.content["kind"] != "prior":
        raise NotApplicable("needs a prior trained on codes (stage two)")
    images, labels = report.images[:10], report.labels[:10].to(report.model.device)
    codes = report.model.encode(images)
    h, w = bottleneck.grid
    if h == 1:
        raise NotApplicable("the codes of an image have a single row, of which no half can be kept")
    rows = [("originals", images), ("reconstructions", report.model.reconstruct(images))]
    top = bottleneck.maps(codes).get("top")
    if top is not None:
        kept, explanation = top.shape[1], "codes of the top level kept, those of the bottom level sampled"
        rows.append(("given", report.model.decode_latents(bottleneck.embed(codes, levels=1))))
    else:
        kept, explanation = h // 2, "codes of the top half kept, the rest sampled"
        if w > 1:  # in a sequence (w = 1) codes have no position
            given = images.clone()
            given[:, :, images.shape[2] * kept // h :] = 127
            rows.append(("given", given))
    options = {"labels": labels} if report.conditional else {}
    for i in range(4):
        completed = report.sample(len(images), seed_offset=i, given=(codes, kept), **options)
        rows.append((f"completion {i + 1}", completed))
    plots.image_rows(rows, path, title=report.title(explanation))


def interpolations(report: Report, path: Path) -> None:
    """Decoded points on the line between the latents of two held-out images."""
    report.need_images()
    report.need_continuous_latent()
    count = min(10, len(report.images) // 2)
    if count == 0:
        raise NotApplicable("the checkpoint has a single held-out image")
    start, end = report.images[:count], report.images[count : 2 * count]
    z = [report.model.posterior_mean(x) for x in (start, end)]
    rows = []
    for i in range(len(start)):
        weights = torch.linspace(0, 1, 10, device=z[0].device)[1:-1].view(-1, 1, 1, 1)
        between = report.model.decode_latents((1 - weights) * z[0][i] + weights * z[1][i]).cpu()
        ends = [x[i : i + 1].float() / 255 for x in (start, end)]
        rows.append(("", torch.cat([ends[0], between, ends[1]])))
    title = report.title("interpolations between two held-out images, left and right")
    plots.image_rows(rows, path, title=title)


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
        rows.append((f"z{unit + 1}, ± 3 s.d.", report.model.decode_latents(z)))
    title = report.title("one latent dimension varied at a time, those of largest variance, from one held-out image")
    plots.image_rows(rows, path, title=title)


def scatter_2d(report: Report, path: Path) -> None:
    """Held-out points and samples, with and without the decoder's noise."""
    model = report.model
    if model.shows_images:
        raise NotApplicable("the examples are images, not points")
    count = min(1000, len(report.images))
    draws = model.prior.sample(count, generator=report.generator())
    params = model.decoder(draws if model.discrete is None else model.discrete.embed(draws))
    panels = [
        ("held-out data", report.images[:count]),
        ("samples with decoder noise", model.likelihood.sample(params)),
        ("samples without noise: decoder means", model.likelihood.mean(params)),
    ]
    points = [(label, x.detach().cpu().flatten(1)) for label, x in panels]
    plots.scatter_2d(points, path, title=report.name)


def posterior_map(report: Report, path: Path) -> None:
    """Posterior means in the plane, for latents of two dimensions."""
    report.need_continuous_latent()
    if report.model.bottleneck.code_dim != 2:
        raise NotApplicable("the latent does not have two dimensions")
    means = report.model.posterior_mean(report.images).flatten(1).cpu()
    title = report.title("posterior means of held-out examples")
    plots.posterior_map(means, report.labels, report.classes, path, title=title)


PLOTS: dict[str, Callable[[Report, Path], None]] = {
    "original.png": original,
    "reconstructions.png": reconstructions,
    "code_visualization.png": code_visualization,
    "levels.png": levels,
    "codebook.png": codebook,
    "usage.png": usage,
    "curves.png": curves,
    "training_animation.gif": training_animation,
    "samples.png": samples,
    "class_rows.png": class_rows,
    "completions.png": completions,
    "interpolations.png": interpolations,
    "traversals.png": traversals,
    "scatter_2d.png": scatter_2d,
    "posterior_map.png": posterior_map,
}


def draw(options: argparse.Namespace) -> None:
    """Draw all plots that apply to the model of a checkpoint, or those of `options.only`.

    `options` are those of `vqvae.commands.visualize`. Raises `UserError` for bad options, and for checkpoints and
    folders that cannot be used.
    """
    for name in options.only or ():
        if name not in PLOTS:
            problem = f"no such plot{near_misses(name, PLOTS)}; known: {', '.join(PLOTS)}"
            raise OptionError("", "only", name, problem)
    path = checkpoint.locate(options.checkpoint)
    with naming("checkpoint", options.checkpoint):
        content = checkpoint.read(path)
        model = checkpoint.restore(content, str(path)).to(choose_device(options.device))
    if options.top_k and model.discrete is None:
        raise OptionError("", "top_k", options.top_k, "the model's latent is continuous and has no codes; leave it out")
    _check_label(options.label, len(content["data"]["classes"]) if content["config"]["conditional"] else 0)
    # names and places inside a checkpoint do not choose where anything is written: it may come from anywhere
    run = printable(Path(os.path.abspath(path)).parent.name) or "run"
    folder = make_folder(Path(options.plot_dir or "plots") / run, "plot_dir")
    with tqdm(desc="sampling", unit="code", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = Report(model, content, path.parent, options, progress)
        drawn = 0
        for name, plot in PLOTS.items():
            if options.only and name not in options.only:
                continue
            bar.reset()
            torch.manual_seed(options.seed + 1)  # for the decoder's noise; the prior's generator has `seed` itself
            try:
                plot(report, folder / name)
            except NotApplicable as reason:
                if options.only:
                    print(f"{name}: not drawn: {reason}", file=sys.stderr)
                continue
            drawn += 1
            print(folder / name)
    plural = "" if drawn == 1 else "s"
    print(f"{drawn} plot{plural} of {run} (step {content['step']:,}) in {folder}")


def _check_label(label: int | None, classes: int) -> None:
    if label is not None and not 0 <= label < classes:
        unconditional = "the model's prior is not conditioned on classes; leave it out"
        problem = f"must be from 0 to {classes - 1}" if classes else unconditional
        raise OptionError("", "class", label, problem)
