"""Where to compute, and in what memory."""

import contextlib
import ctypes

import torch

from vqvae.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """`auto` is the first there is of cuda, mps, cpu; `UserError` for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise UserError(f"--device {name}: not available here; there is {', '.join(k for k, v in there.items() if v)}")
    return torch.device(name)


def keep_memory(most: int = 1 << 30) -> None:
    """Let this process keep up to `most` bytes that it frees, where its allocator is glibc's.

    On a CPU a step frees all its activations, and waits for the system to map and clear as many pages for the next:
    glibc by itself never keeps more than 64 MiB.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, most)
        mallopt(M_MMAP_THRESHOLD, most // 2) or mallopt(M_MMAP_THRESHOLD, 1 << 25)  # all that older ones take
