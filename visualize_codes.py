#!/usr/bin/env python3
"""Draw what a trained model learned: reconstructions, codes, codebook, samples, interpolations."""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vqvae.config import DEVICES, OneLineErrors
from vqvae.errors import UserError, near_misses

EXAMPLES = """
examples
  python visualize_codes.py --checkpoint logs/vqvae-mnist/checkpoint.pt
  python visualize_codes.py --checkpoint logs/vqvae-mnist --only codebook.png usage.png
  python visualize_codes.py --checkpoint logs/vqvae-mnist-pixelcnn --samples 100 --temperature 0.9
  python visualize_codes.py --checkpoint logs/digits-by-class --class 3 --seed 1

Every figure that makes sense for the model is drawn into plots/<run>/; the pictures come from the checkpoint itself,
so no data set is needed.
"""


class Show(NamedTuple):
    """What a figure may draw from."""

    model: Any
    content: dict  # of the checkpoint
    logs: Path  # the run's folder
    plots: Path  # where figures go
    options: argparse.Namespace
    progress: Callable[[int, int], None]

    @property
    def images(self):
        return self.content["examples"]["images"]

    @property
    def labels(self):
        return self.content["examples"]["labels"]

    @property
    def name(self) -> str:
        return self.content["run"]

    @property
    def discrete(self) -> bool:
        return self.model.bottleneck.num_codes is not None

    @property
    def conditional(self) -> bool:
        return bool(self.content["config"]["conditional"])

    def sample(self, n: int, **more):
        """n decoded draws of the prior, with the command line's temperature and seed."""
        import torch

        generator = torch.Generator(self.model.device).manual_seed(self.options.seed)
        if self.discrete:
            more |= {"top_k": self.options.top_k, "progress": self.progress}
        if self.conditional and "labels" not in more:
            classes = len(self.content["data"]["classes"])
            wanted = self.options.class_
            labels = torch.arange(n) % classes if wanted is None else torch.full((n,), wanted)
            more["labels"] = labels.to(self.model.device)
        return self.model.sample(n, temperature=self.options.temperature, generator=generator, **more)


# A figure takes a Show and a path, and returns False where it does not apply to the model.


def original(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    if not show.model.shows_pictures:
        return False
    figures.image_grid(show.images, path, title=f"{show.name}: held-out originals")


def reconstructions(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    if not show.model.shows_pictures:
        return False
    images = show.images[:50]
    title = f"{show.name}: held-out originals and reconstructions"
    figures.pairs(images, show.model.reconstruct(images), path, title=title)


def code_visualization(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    if not show.discrete:
        return False
    codes = show.model.encode(show.images[:8])
    if len(show.model.bottleneck.maps(codes)) > 1:
        codes = codes[:4]
    images = show.images[: len(codes)]
    title = f"{show.name}: pictures as codes of {show.model.bottleneck.num_codes}"
    maps = show.model.bottleneck.maps(codes)
    figures.code_visualization(images, maps, show.model.decode(codes), path, title=title)


def levels(show: Show, path: Path) -> bool | None:
    """What each further level of codes adds."""
    from vqvae import figures

    if not show.discrete:
        return False
    images = show.images[:10]
    codes = show.model.encode(images)
    bottleneck, names = show.model.bottleneck, list(show.model.bottleneck.maps(codes))
    if len(names) == 1:
        return False
    rows = [("originals", images)]
    for count, name in enumerate(names, 1):
        rows.append((f"up to {name}", show.model.pictures(bottleneck.embed(codes, levels=count))))
    figures.rows_of_pictures(rows, path, title=f"{show.name}: decoded from the first levels of codes alone")


def codebook(show: Show, path: Path) -> bool | None:
    import torch

    from vqvae import figures

    if not show.discrete:
        return False
    bottleneck = show.model.bottleneck
    h, w = bottleneck.grid
    if len(bottleneck.maps(torch.zeros(1, h, w, dtype=torch.int64))) > 1:
        return False  # what a code looks like depends on the codes of the other levels
    patches = []
    for codes in torch.arange(bottleneck.num_codes).split(256):
        pictures = show.model.decode(codes.view(-1, 1, 1).expand(-1, h, w).contiguous())
        # the pixels of one code, from the middle; a sequence of codes has no place, so there the whole picture
        high, wide = (pictures.shape[-2] // h, pictures.shape[-1] // w) if w > 1 else pictures.shape[-2:]
        top, left = (h // 2 * high, w // 2 * wide) if w > 1 else (0, 0)
        patches.append(pictures[..., top : top + high, left : left + wide].cpu())
    title = f"{show.name}: the codebook"
    usage = show.content["usage"]
    counts = None if usage is None else usage[0]
    figures.codebook_map(bottleneck.code_vectors(), counts, torch.cat(patches), path, title=title)


def usage(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    if show.content["usage"] is None:
        return False
    figures.usage_chart(show.content["usage"], path, title=f"{show.name}: use of the codebook, whole held-out split")


def curves(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    log = show.logs / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if not any(row["kind"] == "epoch" for row in rows):
        return False
    figures.curves(rows, path, title=f"{show.name}: training")


def training_animation(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    frames = sorted((show.plots / "generated_samples").glob("epoch_*.png"))
    if not frames:
        return False
    figures.training_animation(frames, path)


def samples(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    if not show.model.shows_pictures:
        return False
    prior = show.content["config"]["prior"]["name"]
    known = " (which knows nothing of pictures: train one with --prior)" if prior == "uniform" else ""
    title = f"{show.name}: samples of the {prior} prior{known}"
    columns = math.ceil(math.sqrt(show.options.samples))
    figures.image_grid(show.sample(show.options.samples), path, title=title, columns=columns)


def class_rows(show: Show, path: Path) -> bool | None:
    import torch

    from vqvae import figures

    if not show.conditional:
        return False
    classes = show.content["data"]["classes"]
    labels = torch.arange(len(classes)).repeat_interleave(10).to(show.model.device)
    pictures = show.sample(len(labels), labels=labels).split(10)
    rows = list(zip(classes, pictures, strict=True))
    figures.rows_of_pictures(rows, path, title=f"{show.name}: samples of each class")


def completions(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    if not show.discrete or show.content["kind"] != "prior":
        return False
    images, labels = show.images[:10], show.labels[:10].to(show.model.device)
    codes = show.model.encode(images)
    coarse = show.model.bottleneck.maps(codes).get("top")
    if coarse is None:
        kept, what = codes.shape[1] // 2, "the top half's codes kept, the rest sampled"
        given = images.clone()
        given[:, :, images.shape[2] * kept // codes.shape[1] :] = 127
    else:
        kept, what = coarse.shape[1], "the coarse level's codes kept, the fine ones sampled"
        given = show.model.pictures(show.model.bottleneck.embed(codes, levels=1))
    more = {"labels": labels} if show.conditional else {}
    completed = []
    for i in range(4):
        again = argparse.Namespace(**(vars(show.options) | {"seed": show.options.seed + i}))
        pictures = show._replace(options=again).sample(len(images), given=(codes, kept), **more)
        completed.append((f"completion {i + 1}", pictures))
    rows = [
        ("originals", images),
        ("reconstructions", show.model.reconstruct(images)),
        ("given", given),
        *completed,
    ]
    figures.rows_of_pictures(rows, path, title=f"{show.name}: {what}")


def interpolations(show: Show, path: Path) -> bool | None:
    import torch

    from vqvae import figures

    if show.discrete or not show.model.shows_pictures:
        return False
    start, end = show.images[:10], show.images[10:20]
    if len(end) < len(start):
        return False
    z = [show.model.posterior_mean(x) for x in (start, end)]
    rows = []
    for i in range(len(start)):
        weights = torch.linspace(0, 1, 10, device=z[0].device)[1:-1].view(-1, 1, 1, 1)
        between = show.model.pictures((1 - weights) * z[0][i] + weights * z[1][i]).cpu()
        ends = [x[i : i + 1].float() / 255 for x in (start, end)]
        rows.append(("", torch.cat([ends[0], between, ends[1]])))
    title = f"{show.name}: from one held-out picture (left) to another (right)"
    figures.rows_of_pictures(rows, path, title=title)


def traversals(show: Show, path: Path) -> bool | None:
    import torch

    from vqvae import figures

    if show.discrete or not show.model.shows_pictures:
        return False
    means = show.model.posterior_mean(show.images)
    centre, spread = means.mean(dim=0).flatten(), means.std(dim=0).flatten()
    rows = []
    for unit in spread.argsort(descending=True)[:10].tolist():
        z = means[:1].repeat(9, 1, 1, 1)
        # in the unit's own spread: under a learnt prior latents need not have unit variance
        z[:, unit, 0, 0] = centre[unit] + spread[unit] * torch.linspace(-3, 3, 9, device=z.device)
        rows.append((f"z{unit + 1}, ± 3 s.d.", show.model.pictures(z)))
    title = f"{show.name}: one latent at a time, those that vary most, around the first held-out picture"
    figures.rows_of_pictures(rows, path, title=title)


def scatter_2d(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    if show.model.shows_pictures:
        return False
    count = min(1000, len(show.images))
    z = show.model.prior.sample(count, generator=_generator(show))
    params = show.model.decoder(z)
    panels = [
        ("held-out data", show.images[:count]),
        ("samples with decoder noise", show.model.likelihood.sample(params)),
        ("samples without: decoder means", show.model.likelihood.mean(params)),
    ]
    figures.scatter_2d([(label, x.detach().cpu().flatten(1)) for label, x in panels], path, title=show.name)


def posterior_map(show: Show, path: Path) -> bool | None:
    from vqvae import figures

    if show.discrete or show.model.bottleneck.code_dim != 2:
        return False
    means = show.model.posterior_mean(show.images).flatten(1).cpu()
    title = f"{show.name}: posterior means of held-out examples"
    figures.posterior_map(means, show.labels, show.content["data"]["classes"], path, title=title)


FIGURES = {
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


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse(argv)
        draw(options)
        return 0
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    cli = OneLineErrors(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cli.add_argument(
        "--checkpoint", metavar="PATH", required=True, help="logs/<run>/checkpoint.pt, or the run's folder"
    )
    cli.add_argument("--plot-dir", metavar="DIR", help="draw into DIR/<run> (default: where the run drew)")
    cli.add_argument("--only", metavar="FIGURE", nargs="+", help=f"just these: {', '.join(FIGURES)}")
    cli.add_argument("--samples", metavar="N", type=int, default=64, help="how many samples to draw (default: 64)")
    cli.add_argument(
        "--temperature", type=float, default=1.0, help="below 1: likelier, less varied samples (default: 1)"
    )
    cli.add_argument(
        "--top-k",
        metavar="K",
        type=int,
        default=0,
        help="sample among the K likeliest codes (default: 0, all)",
    )
    cli.add_argument(
        "--class",
        dest="class_",
        metavar="LABEL",
        type=int,
        help="samples of one class, of a conditional prior",
    )
    cli.add_argument("--seed", type=int, default=0, help="seed of samples (default: 0)")
    cli.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: auto)")
    options = cli.parse_args(argv)
    for flag, value, fine, rule in [
        ("--samples", options.samples, options.samples >= 1, "must be at least 1"),
        ("--temperature", options.temperature, 0 < options.temperature < 1e3, "must be above 0"),
        ("--top-k", options.top_k, options.top_k >= 0, "must be 0 or more"),
        ("--seed", options.seed, 0 <= options.seed < 2**63, "must be 0 or more"),
    ]:
        if not fine:
            raise UserError(f"{flag} {value}: {rule}")
    for name in options.only or ():
        if name not in FIGURES:
            raise UserError(f"--only {name}: no such figure{near_misses(name, FIGURES)}; known: {', '.join(FIGURES)}")
    return options


def draw(options: argparse.Namespace) -> None:
    """Load the checkpoint and draw every figure that applies, each under a temporary name until it is whole."""
    import torch
    from tqdm import tqdm

    from vqvae import checkpoint
    from vqvae.devices import choose_device

    path = checkpoint.locate(options.checkpoint)
    content = checkpoint.read(path)
    model = checkpoint.restore(content, str(path)).to(choose_device(options.device))
    classes = len(content["data"]["classes"]) if content["config"]["conditional"] else 0
    if options.class_ is not None and not 0 <= options.class_ < classes:
        way_out = f"must be from 0 to {classes - 1}" if classes else "this model's prior knows no classes"
        raise UserError(f"--class {options.class_}: {way_out}")
    drawn_before = Path(content["plots"])
    plots = drawn_before if drawn_before.is_dir() else Path("plots") / content["run"]
    if options.plot_dir:
        plots = Path(options.plot_dir) / content["run"]
    try:
        plots.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--plot-dir {plots.parent}: cannot write there ({problem.strerror})") from None

    bar = tqdm(desc="sampling", unit="code", disable=None, leave=False)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    show = Show(model, content, path.parent, plots, options, progress)
    written = []
    for name, figure in FIGURES.items():
        if options.only and name not in options.only:
            continue
        bar.reset()
        torch.manual_seed(options.seed + 1)  # the decoder's noise; the prior's draws have the seed itself
        if figure(show, plots / name) is not False:
            written.append(name)
            print(plots / name)
        elif options.only:
            print(f"{name}: does not apply to this model", file=sys.stderr)
    bar.close()
    print(f"{len(written)} figures of {content['run']} (step {content['step']:,}) in {plots}")


def _generator(show: Show):
    import torch

    return torch.Generator(show.model.device).manual_seed(show.options.seed)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # for people, not for debuggers
    sys.exit(main())
