"""Small models, images and runs that tests share."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vqvae import cli
from vqvae.autoencoder import SLOTS, Autoencoder, build_autoencoder
from vqvae.commands import train
from vqvae.contracts import Objective
from vqvae.objectives import SLOT as OBJECTIVE
from vqvae.registry import Choice, build, signature
from vqvae.stage_one import AutoencoderTraining

ROOT = Path(__file__).parent.parent
SMALL_OPTIONS = {
    "num_codes": 7,
    "code_dim": 4,
    "levels": "3,4",
    "bits": 4,
    "hidden": 8,
    "layers": 1,
    "blocks": 1,
    "channels": 8,
    "width": 8,
    "heads": 2,
}
# flags of a run that takes a second
SMALL = ("--limit", "60", "--batch-size", "20", "--hidden", "8", "--codes", "16", "--code-dim", "4")
SMALL += ("--image-size", "16", "--device", "cpu", "--validation", "test")
CONSTANT = ("--lr", "3e-4")  # resumed for more epochs, a run equals one of that length from the start


def choose(slot: str, name: str, **options: Any) -> Choice:
    """A member at a size that trains in milliseconds."""
    known = signature(SLOTS[slot].table[name]).options
    return Choice(name, {k: v for k, v in SMALL_OPTIONS.items() if k in known} | options)


def make(
    shape: tuple[int, int, int] = (3, 8, 8), num_classes: int = 0, total_steps: int = 1, **names: Any
) -> Autoencoder:
    """A small autoencoder; each slot takes a name or a choice."""
    names = {"nets": "sonnet", "bottleneck": "vq", "prior": "uniform", "likelihood": "mse"} | names
    choices = {slot: name if isinstance(name, Choice) else choose(slot, name) for slot, name in names.items()}
    return build_autoencoder(
        choices, image_shape=shape, data_variance=0.06, num_classes=num_classes, total_steps=total_steps
    )


def objective(words: str = "elbo", total_steps: int = 1) -> Objective:
    """An objective as the command line spells it."""
    return build(OBJECTIVE, Choice.parse("objective", words.split()), {"total_steps": total_steps})


def training(words: str = "elbo", *, total_steps: int = 1, **names: Any) -> AutoencoderTraining:
    """A small autoencoder with an objective, ready for the loop."""
    model = make(total_steps=total_steps, **names)
    return AutoencoderTraining(model, objective(words, total_steps))


def fitting(bottleneck: str) -> dict[str, str]:
    """The bottleneck with nets and a prior that go with it."""
    if bottleneck == "gaussian":
        return {"bottleneck": bottleneck, "prior": "normal", "nets": "conv-vae"}
    return {"bottleneck": bottleneck, "prior": "uniform"}


def images(n: int, shape: tuple[int, int, int] = (3, 8, 8)) -> torch.Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8)


def run_train(*words: str, small: bool = True) -> int:
    """Call the train command as a person would; returns its exit code. Of SMALL, flags in `words` are left out."""
    rate = () if "--preset" in words else CONSTANT
    flags = (*SMALL, *rate) if small else ()
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return cli.run(train.main, [*(word for pair in pairs if pair[0] not in words for word in pair), *words])


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size in bytes: a full disk. pytest's own log is such a file too."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def most_allocated(work: Callable[[], None]) -> int:
    """The peak number of bytes that torch has allocated during `work()`, beyond those allocated before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
