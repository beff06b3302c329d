"""Metrics of saved models on the test split: at the end of a run, and when `--evaluate` asks for them."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqvae import __version__, checkpoint, distributed, metrics
from vqvae.autoencoder import Autoencoder
from vqvae.config import Config
from vqvae.data import Dataset
from vqvae.errors import OptionError, counted
from vqvae.evaluation import evaluate, weighable
from vqvae.features import Net
from vqvae.files import write_json
from vqvae.probe import probe
from vqvae.progress import WIDTH, columns
from vqvae.randomness import generator
from vqvae.runs import BEST, LAST, Run
from vqvae.schedules import parse_rate
from vqvae.training import KEPT

USUAL_DRAWS = 100


class Asked(NamedTuple):
    """Metrics to compute beyond the usual ones."""

    iw_samples: int | None = 0  # None: `USUAL_DRAWS` if the model has the bound
    nets: Sequence[Net] = ()  # feature networks, for metrics that compare reconstructions with images
    samples: int = 0  # number of draws from the prior to compare with images, too
    probed: bool = False  # classify the images from their latents


def assess(
    path: Path, content: dict[str, Any], dataset: Dataset, device: torch.device, asked: Asked = Asked()
) -> tuple[dict[str, Any], dict[str, float]]:
    """Evaluate a checkpoint on the test split; returns the protocol and the metrics.

    Raises `OptionError` if the data have no labels to probe, or the model no images to compare.
    """
    if asked.probed:
        dataset.need_classes("probe")
    config, test = Config.from_dict(content["config"]), dataset.test
    model = checkpoint.restore(content, str(path)).to(device)
    if asked.nets and not model.shows_images:
        problem = f"compares images, and the data set {dataset.name} has points; leave it out"
        raise OptionError("metrics", None, problem)
    draws = drawn(model, asked.samples, test.labels if config.conditional else None, config.seed)
    iw_samples = asked.iw_samples
    if iw_samples is None:
        iw_samples = USUAL_DRAWS if weighable(model) else 0
    results = evaluate(model, *test, iw_samples=iw_samples, seed=config.seed, nets=asked.nets, samples=draws)
    protocols = [protocol_of(config, dataset, model), *(net.protocol for net in asked.nets)]
    if asked.samples:
        protocols.append(f"{asked.samples:,} samples at temperature 1")
    if asked.probed:
        numbers, how = probe(model, dataset.train, test, seed=config.seed)
        results |= numbers
        protocols.append(how)
    for tensors in KEPT:
        results.pop(tensors, None)
    if dataset.entropy is not None:
        results |= {"data_entropy": dataset.entropy, "gap": results["neg_elbo"] - dataset.entropy}
    chosen = path.name == BEST or config.patience is not None or parse_rate(config.lr)[1] is not None
    about = checkpoint.identity_of(content) | {
        "data": dataset.name,
        "note": dataset.note,
        "split": "test",
        "chosen_on": config.held_out if chosen else "nothing: the last step",
        "protocol": "; ".join(protocols),
        "likelihood": config.likelihood.name,
        "prior": config.prior.name,
        "images": len(test.images),
        "fingerprint": test.fingerprint(),
        "seed": config.seed,
        "iw_samples": iw_samples,
    }
    return about, results


def assess_end(run: Run, dataset: Dataset, headline: Sequence[str], device: torch.device) -> dict[str, float]:
    """Evaluate on the test split, once, the models that a run leaves at its end: checkpoint.pt and best.pt.

    Prints and logs their metrics, and stores them in evaluation.json and evaluation-best.json; returns those of
    checkpoint.pt. Several processes share the images.
    """

    def saved() -> dict[str, dict[str, Any]]:
        return {name: checkpoint.read(run.folder / name) for name in (LAST, BEST) if (run.folder / name).exists()}

    contents = distributed.on_first(saved)  # the other processes may not see the first one's files
    if contents[LAST]["step"] == contents.get(BEST, contents[LAST])["step"]:
        contents.pop(BEST, None)
    for name, content in reversed(contents.items()):  # in the order of their steps, checkpoint.pt last
        path = run.folder / name
        about, results = assess(path, content, dataset, device)
        values = {f"held_out_{key}": value for key, value in results.items()}
        run.log("test", content["step"], content["epoch"], values, held_out="test")
        names = columns(tuple(headline), results, "test")
        print(_fitting(f"test   {'last' if name == LAST else 'best'}: ", names, results))
        table = metrics.for_json(about | results)
        distributed.on_first(partial(write_json, checkpoint.evaluation_of(path), table))
    return results


def with_earlier(found: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Add the metrics that only an earlier evaluation has, if it used the same images, seed and versions."""
    earlier = earlier or {}
    now, then = (str(evaluation.get("protocol", "")).split("; ") for evaluation in (found, earlier))
    if now[:2] != then[:2] or any(earlier.get(key) != found[key] for key in ("seed", "images")):
        return found
    if earlier.get("fingerprint") not in (None, found["fingerprint"]):  # None: of an earlier version
        return found
    joined = {"protocol": "; ".join(dict.fromkeys([*now, *then]))}
    if not found["iw_samples"] and "iw_bound" in earlier:
        joined["iw_samples"] = earlier["iw_samples"]
    return earlier | found | joined


def _fitting(start: str, names: Sequence[str], results: dict[str, float]) -> str:
    """A line with as many of the metrics as fit the terminal, the first ones."""
    lines = (start + metrics.line(tuple(names[:count]), results) for count in range(len(names), 0, -1))
    return next((line for line in lines if len(line) <= WIDTH), start)


def protocol_of(config: Config, dataset: Dataset, model: Autoencoder) -> str:
    """The images that a model is evaluated on, and the programs, in words."""
    size = "x".join(map(str, model.image_shape))
    if "resize" in config.dataset.options:
        scaled = f"scaled by Lanczos ({config.dataset.options['resize']})"
    else:
        scaled = "not scaled" if config.image_size is None else "scaled (bilinear, antialiased)"
    images = f"{counted(len(dataset.test.images), 'image')} of the test split of {dataset.name}, {size}, {scaled}"
    return f"{images}; vqvae {__version__}, torch {torch.__version__}"


def drawn(model: Autoencoder, count: int, labels: Tensor | None, seed: int, batch_size: int = 256) -> Iterator[Tensor]:
    """Draw `count` images in batches `[B, C, H, W]`; with labels `[N]`, image i has label i, starting over after N."""
    draws = generator(seed, "samples", device=model.device)
    for first in range(0, count, batch_size):
        index = torch.arange(first, min(first + batch_size, count))
        options = {} if labels is None else {"labels": labels[index % len(labels)]}
        yield model.sample(len(index), generator=draws, **options)
