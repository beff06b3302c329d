"""Disks that are full, failing or read-only.

A trial runs one command (train, resume, stage two, visualize, encode, decode, export, evaluate) under one of four
faults: files may not grow beyond a random size, a small file system of random size fills up, the file system is
read-only, or the output is on a full disk. Without the right to mount, all trials limit the size of files.

It survives if the command succeeds with exit code 0 or ends with exit code 2 and exactly one line on stderr, within a
minute and by itself (no signal, no traceback); if no temporary or half file is left; and if the checkpoint of the run,
if there is one, loads. A run that existed before must keep its checkpoint.

A loss is described in a line on stderr.
"""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import numpy as np
import torch
from _children import end_with, parts, run_script
from PIL import Image

import vqvae
from vqvae import experiment, report  # noqa: F401 (children are forks that need not import them again)

MODEL = "--hidden 8 --codes 16 --code-dim 4 --image-size 16 --device cpu --log-every 1".split()
SMALL = ["--limit", "60", "--batch-size", "20", *MODEL]
SECONDS = 60
KINDS = ("size of a file", "size of a file", "full disk", "full disk", "read-only", "output")


def run(trials: int, folder: Path) -> tuple[int, int]:
    draw = random.Random(0)
    commands = prepare(folder)
    mountable = mount(folder / "probe", 1 << 20)
    if mountable:
        unmount(folder / "probe")
    else:
        print("  no right to mount: all trials limit the size of files", file=sys.stderr)
    lost = 0
    for number in range(trials):
        name, kind = draw.choice(list(commands)), draw.choice(KINDS) if mountable else KINDS[0]
        size = round(2 ** draw.uniform(0 if kind == KINDS[0] else 12, 19 if kind == KINDS[0] else 21))
        try:
            problem = trial(folder, number, *commands[name], kind, size)
        except Exception:
            problem = traceback.format_exc()
        if problem:
            lost += 1
            print(f"  trial {number}: {name}, {kind} {size:,}: {problem}", file=sys.stderr)
    return trials - lost, trials


def prepare(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Train and encode in `folder / "made"`; returns the commands to try: script and words."""
    made = folder / "made"
    (made / "images").mkdir(parents=True)
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(made / "images" / f"{i}.png")
    photographs = [*MODEL, "--batch-size", "4", "--epochs", "2"]
    fresh = [*SMALL, "--epochs", "2", "--name"]
    encode = ["encode", "--checkpoint", "made/logs/photos", "--input", "made/images", "--output", "codes.npz"]
    for script, words in (
        ("train.py", [*fresh, "run"]),
        ("train.py", ["--dataset", "folder", "--data-dir", "images", *photographs, "--name", "photos"]),
        ("vqvae", [word.removeprefix("made/") for word in encode]),
    ):
        code, error = call(script, words, made)
        if code:
            raise SystemExit(f"exit code {code}: {error}")
    model = ["--checkpoint", str(made / "logs" / "run")]
    photos = ["--checkpoint", str(made / "logs" / "photos")]
    prior = ["--prior", "pixelcnn", "channels=8", "blocks=1", "--batch-size", "20"]
    images = str(made / "images")
    return {
        "train": ("train.py", [*fresh, "new", "--checkpoint-every", "1"]),
        "folder": ("train.py", ["--dataset", "folder", "--data-dir", images, *photographs, "--name", "new"]),
        "resume": ("train.py", ["--resume", "logs/run", "--epochs", "3"]),
        "stage two": ("train.py", [*prior, "--checkpoint", "logs/run", "--epochs", "1", "--name", "new"]),
        "evaluate": ("train.py", ["--evaluate", "--checkpoint", "logs/run", "--iw-samples", "2"]),
        "visualize": ("visualize_codes.py", [*model, "--plot-dir", "drawn"]),
        "encode": ("vqvae", ["encode", *photos, "--input", images, "--output", "codes.npz"]),
        "decode": ("vqvae", ["decode", str(made / "codes.npz"), *photos, "--output", "decoded"]),
        "export": ("vqvae", ["export", *model, "--output", "exported"]),
        "list": ("train.py", ["--list", "bottlenecks"]),
    }


def trial(folder: Path, number: int, script: str, words: list[str], kind: str, size: int) -> str:
    """A description of what was lost; empty if the trial survived."""
    here = folder / str(number)
    there = here / "logs" / "run"
    made = folder / "made" / "logs" / "run"
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in made.iterdir()) + (1 << 15)
    here.mkdir()
    mounted = kind in ("full disk", "read-only") and mount(here, size + used)
    try:
        shutil.copytree(made, there)
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(here)], check=True)
        os.environ["XDG_CACHE_HOME"] = str(here / "cache")
        limit = size if kind == KINDS[0] else None
        code, error = call(script, words, here, limit=limit, full_output=kind == "output")
        lines = error.splitlines()
        said = [line for line in lines if not line.startswith("warning: ")]
        if code not in (0, 2) or len(said) != (code == 2):
            return f"exit code {code}, {len(said)} lines: {error[-1500:]!r}"
        if code == 2 and not said[0].startswith("error: "):
            return f"said {said[0]!r}"
        if lost := parts(here):
            return f"{lost}; exit code {code}: {error[-300:]!r}"
        for path in [there, *here.glob("logs/new")]:
            if (path / "checkpoint.pt").exists():
                vqvae.load(path)
        if not (there / "checkpoint.pt").exists():
            return "the run's checkpoint is gone"
        if code == 2:
            for output in ("decoded", "exported"):
                if (left := here / output).exists() and any(left.iterdir()):
                    return f"{output} is not empty"
    finally:
        if mounted:
            unmount(here)
    shutil.rmtree(here)
    return ""


def call(
    script: str, words: list[str], cwd: Path, *, limit: int | None = None, full_output: bool = False
) -> tuple[int, str]:
    """Run a script in a fork, with a limit on the size of its files; returns exit code and stderr."""
    sys.stdout.flush()
    reading, writing = os.pipe()  # has no size

    def action() -> None:
        os.chdir(cwd)
        os.dup2(os.open("/dev/full" if full_output else os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        torch.set_num_threads(1)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run_script(script, words)

    child = os.fork()
    if child == 0:
        end_with(action)
    os.close(writing)
    end = time.perf_counter() + SECONDS
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.perf_counter() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    with os.fdopen(reading, errors="replace") as errors:
        return os.waitstatus_to_exitcode(found[1]), errors.read()


def mount(folder: Path, size: int) -> bool:
    """Mount a file system of a size, in memory; False if that is not allowed."""
    folder.mkdir(exist_ok=True)
    pages = math.ceil(size / 4096)
    command = ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)
