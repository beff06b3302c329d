"""The machine and the commit that a benchmark ran on, as text for its table."""

import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# variables that torch, oneDNN and MKL read
HELD = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def describe(device: str = "cpu", *, versions: bool = True) -> str:
    """`AMD EPYC, 2 threads, AVX2, torch 2.15.0`, or the name of the GPU. `versions` adds that of torch."""
    version = f", torch {torch.__version__.split('+')[0]}" if versions else ""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}{version}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, {instructions()}{version}"


def instructions() -> str:
    """`AVX2`, `AVX-512 with bf16 and AMX`, or on a restricted CPU `AVX2, emulated (ONEDNN_MAX_CPU_ISA=AVX2)`."""
    widest = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    if held := restricted():
        return f"{widest}, emulated ({' '.join(held)})"
    has = getattr(torch.cpu, "get_capabilities", dict)()  # earlier versions do not tell
    units = {"bf16": ("avx512_bf16", "bf16"), "AMX": ("amx_bf16",)}
    present = [unit for unit, names in units.items() if any(has.get(name) for name in names)]
    return widest + (f" with {' and '.join(present)}" if present else "")


def restricted() -> list[str]:
    """The variables, with their values, that hold this process to fewer instructions than the CPU has."""
    return [f"{name}={os.environ[name]}" for name in HELD if name in os.environ]


def commit(name: str = "HEAD") -> str:
    """The abbreviated hash of a commit, the checked-out one by default."""
    command = ["git", "rev-parse", "--short", name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
