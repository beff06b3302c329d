"""Where to compute, in what precision and memory, and whether compiled."""

import contextlib
import ctypes
import warnings

import torch

from vqvae.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """`auto` is the first there is of cuda, mps, cpu; `UserError` for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise UserError(f"--device {name}: not available here; there is {', '.join(k for k, v in there.items() if v)}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def choose_compile(wanted: bool | None, device: torch.device, steps: int) -> bool:
    """None is True on a GPU where compiling works, in runs long enough to earn back the time that it takes."""
    if wanted is not None:
        return wanted
    return device.type == "cuda" and steps >= 2000 and _compiles(device)


def _compiles(device: torch.device) -> bool:
    """Whether torch.compile, which asks for Triton, a C compiler and Python's headers, gets through a sum."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except Exception as problem:  # each of the three fails in its own way
        warnings.warn(f"the nets are not compiled, since torch.compile fails here: {problem!r:.200}", stacklevel=2)
        return False


def keep_memory() -> None:
    """Let this process keep up to 1 GiB that it frees, where its allocator is glibc's.

    On a CPU a step frees all its activations, and waits for the system to map and clear as many pages for the next:
    glibc by itself never keeps more than 64 MiB, and no block of more than 32.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_MMAP_MAX, 0)  # no block comes from the system by itself
