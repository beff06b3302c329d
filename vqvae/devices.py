"""Where to compute."""

import ctypes

import torch

from vqvae.errors import UserError


def choose_device(name: str) -> torch.device:
    """`auto` is the first there is of cuda, mps, cpu; `UserError` for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise UserError(f"--device {name}: not available here; there is {', '.join(k for k, v in there.items() if v)}")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let glibc, where that is the C library, keep freed memory for the next step instead of returning it.

    Else the system hands out every step's large tensors as new pages, and clears each when it is first touched: up to a
    fifth of a training step on a CPU (benchmarks/families.py). The peak of memory grows by up to a tenth.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(trim_threshold, -1)  # never shrink the heap
    mallopt(mmap_max, 0)  # and take large blocks from there too
