"""The machine and the commit that a benchmark ran on, as text for its table."""

import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(device: str = "cpu") -> str:
    """`AMD EPYC, 2 threads, torch 2.15.0`, or the name of the GPU."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__.split('+')[0]}"


def commit(name: str = "HEAD") -> str:
    """The abbreviated hash of a commit, the checked-out one by default."""
    command = ["git", "rev-parse", "--short", name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
