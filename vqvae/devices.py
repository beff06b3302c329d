"""Choices of the machine: device, precision, compilation, matrix products, and how much freed memory is kept."""

import contextlib
import ctypes
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.errors import OptionError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # parameters of mallopt, from glibc's malloc.h
WITHOUT_FLOAT64 = {"mps"}  # types of devices
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
IMAGES = range(16, 65)  # with fewer images, one thread does not use oneDNN; with one pixel per image, oneDNN is slow
FEW = 256  # vectors; with fewer, oneDNN's overhead is larger than its gain


def widest_float(device: torch.device) -> torch.dtype:
    """The most precise type of floats that a device has."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first available of cuda, mps, cpu. Raises `OptionError` if unavailable."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [kind for kind, present in available.items() if present]
    if name == "auto":
        name = names[0]
    if name not in names:
        raise OptionError("device", name, f"not available on this machine; available: {', '.join(names)}")
    return torch.device(name)


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """`fp32` or `bf16`; `auto` is bf16 on a GPU with bf16 hardware, otherwise fp32."""
    if name == "bf16" and device.type == "cpu" and not computes_bf16():
        slow = "this CPU has no instructions for it, and emulates them several times slower than fp32"
        warnings.warn(f"precision bf16: {slow}; use fp32, or auto", stacklevel=2)
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def computes_bf16() -> bool:
    """Whether the CPU has instructions for products in bf16 (AVX-512 BF16, AMX, and those of ARM)."""
    capabilities = getattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})()  # earlier versions do not tell
    return any("bf16" in name and present for name, present in capabilities.items())


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the tensor's device: operations have the precision of their inputs."""
    kind = x.device.type
    # programs are exported without autocast, and some runtimes cannot run a region for it
    if torch.compiler.is_exporting() or not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of x `[..., D]`; in fp32 on a CPU with AVX-512 as a 1x1 convolution, which oneDNN computes.

    PyTorch's matrix product on CPUs is MKL's, which uses AVX-512 only on Intel's: oneDNN is twice as fast on others.
    """
    count = x.numel() // x.shape[-1]
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and count >= FEW
    fast = AVX512 and fits and not torch.compiler.is_compiling()
    images = next((n for n in IMAGES if count % n == 0), None) if fast else None
    if images is None:
        return F.linear(x, weight, bias)
    pixels = x.reshape(images, -1, 1, x.shape[-1]).movedim(-1, 1)  # channels last
    return F.conv2d(pixels, weight[:, :, None, None], bias).movedim(1, -1).reshape(*x.shape[:-1], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention`; on a CPU in fp32, because its backward pass takes 6 times as long in bf16."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with full_precision(q):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


def choose_compile(wanted: bool | None, device: torch.device, steps: int) -> bool:
    """Whether to compile the nets; None means on GPUs where torch.compile works, for runs of at least 2,000 steps.

    Shorter runs do not earn back the time that compilation takes.
    """
    if wanted is not None:
        return wanted
    return device.type == "cuda" and steps >= 2000 and _compiles(device)


def _compiles(device: torch.device) -> bool:
    """Whether torch.compile works here: it needs Triton, a C compiler and Python's headers."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except Exception as problem:  # each missing part raises another exception
        warnings.warn(f"the nets are not compiled because torch.compile fails here: {problem!r:.200}", stacklevel=2)
        return False


def computes_again() -> bool:
    """Whether a backward pass is running: gradient checkpointing then runs a forward pass for the second time."""
    running = getattr(torch._C, "_current_graph_task_id", lambda: -1)  # PyTorch has no public name for it
    return running() >= 0


def keep_memory() -> None:
    """Let glibc's allocator keep up to 1 GiB of freed memory in this process. No effect with other allocators.

    By default glibc returns large blocks to the system. Each training step on the CPU would then wait for the system
    to map and clear the same pages again.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_MMAP_MAX, 0)  # take every block from the heap
