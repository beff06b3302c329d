"""Random numbers: every use has a stream of its own, a function of (seed, purpose, index)."""

import contextlib
import hashlib
from typing import Literal, get_args

import torch

Purpose = Literal[
    "weights",  # of a new model
    "start",  # of the bottleneck, before the first step
    "order",  # of the batches; index: the epoch
    "noise",  # of a training step and its augmentation; index: the step
    "evaluation",
    "validation",  # which training images are held out
    "samples",  # of a prior; index: the number of the draw
    "decoder",  # draws of pixels
    "binarization",  # of training images that are drawn; index: the epoch
]
PURPOSES: tuple[str, ...] = get_args(Purpose)  # a new one goes to the end, so that the others keep their streams
INDICES = 2**28


def stream(seed: int, purpose: Purpose, index: int = 0, *, process: int = 0) -> int:
    """The number that seeds a generator, from 0 to 2^63 - 1.

    PyTorch's generator of a CPU uses only the lower 32 bits. They contain the purpose, and a hash of seed and process
    to which the index is added: two uses of one seed in a process never share a generator.
    """
    digest = hashlib.sha256(f"{seed} {process}".encode()).digest()
    upper, first = int.from_bytes(digest[:4], "big") >> 1, int.from_bytes(digest[4:8], "big")
    return upper << 32 | PURPOSES.index(purpose) * INDICES | (first + index) % INDICES


def generator(seed: int, purpose: Purpose, index: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator at the beginning of its stream."""
    return torch.Generator(device).manual_seed(stream(seed, purpose, index))


def forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Give the global generators of the CPU and of a device their states back, at the end of a block."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])  # by default those of all GPUs


def seed_globally(seed: int, purpose: Purpose, index: int = 0, *, process: int = 0, device: str = "cpu") -> None:
    """Put the global generators of the CPU and of a device at the beginning of a stream."""
    number = stream(seed, purpose, index, process=process)
    # torch.manual_seed formats a stack trace at every step, for devices that are not in use
    torch.default_generator.manual_seed(number)
    if device in ("cuda", "mps"):
        getattr(torch, device).manual_seed(number)
