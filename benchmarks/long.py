#!/usr/bin/env python3
"""Watch a run of many tiny epochs: does its memory grow, and do its epochs become slower?

  python benchmarks/long.py [--epochs 5000] [--output long.png]

Trains a small VQ-VAE on 40 digits, three steps an epoch. Once a second, reads the run's progress and memory. Prints a
line per tenth of the run; `--output` draws the two curves. Linux only.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from hardware import ROOT, describe
from memory import memory_of
from runs import table

from vqvae.runs import LOG

FLAGS = (
    "--dataset digits --image-size 16 --limit 60 --batch-size 20 --validation test --hidden 8 --codes 16 --code-dim 4 "
    "--lr 3e-4 --device cpu --name run"
)


class Moment(NamedTuple):
    seconds: float
    epoch: int
    megabytes: float  # resident


def watch(epochs: int, folder: str) -> list[Moment]:
    """The memory and progress of a run, about once a second, from its first epoch to its last."""
    command = [sys.executable, "train.py", *FLAGS.split(), "--log-dir", folder, "--plot-dir", folder]
    found = list[Moment]()
    child = subprocess.Popen([*command, "--epochs", str(epochs)], cwd=ROOT, stdout=subprocess.DEVNULL)
    log = Path(folder, "run", LOG)
    while child.poll() is None:
        time.sleep(1)
        (resident,), epoch = memory_of(child.pid, "VmRSS"), last_epoch(log)
        if resident and epoch and (not found or epoch > found[-1].epoch):
            found.append(Moment(time.monotonic(), epoch, resident / 2**20))
        if epoch == epochs:
            break
    if child.wait():
        sys.exit(f"error: train.py ended with {child.returncode}")
    return found


def last_epoch(log: Path, most: int = 50_000) -> int:
    """The last finished epoch, from the last bytes of a run's log; 0 if there is none."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - most))
        return max(map(int, re.findall(rb'"kind": "epoch", "step": \d+, "epoch": (\d+)', file.read())), default=0)


def tenths(moments: list[Moment], epochs: int) -> list[tuple[str, ...]]:
    """For each tenth of the run: its last epoch, the memory then, and the milliseconds of an epoch."""
    ends = [min(moments, key=lambda m, at=at: abs(m.epoch - at * epochs / 10)) for at in range(11)]
    return [
        (f"{b.epoch:,}", f"{b.megabytes:.1f}", f"{1000 * (b.seconds - a.seconds) / (b.epoch - a.epoch):.1f}")
        for a, b in itertools.pairwise(ends)
        if b.epoch > a.epoch
    ]


def draw(moments: list[Moment], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, duration) = pyplot.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    memory.plot([m.epoch for m in moments], [m.megabytes for m in moments])
    memory.set(ylabel="resident memory, MB", title=describe())
    spans = list(zip(moments[::20], moments[20::20], strict=False))  # 20 seconds each
    duration.plot([b.epoch for _, b in spans], [1000 * (b.seconds - a.seconds) / (b.epoch - a.epoch) for a, b in spans])
    duration.set(xlabel="epoch", ylabel="ms per epoch")
    for axes in (memory, duration):
        axes.set_ylim(0, 1.2 * axes.dataLim.ymax)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5000, help="length of the run (default: 5,000)")
    parser.add_argument("--output", metavar="IMAGE", help="image file with the curves (default: only print)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moments = watch(args.epochs, folder)
    print(describe(), "", *table(("epoch", "resident, MB", "ms per epoch"), tenths(moments, args.epochs)), sep="\n")
    if args.output:
        draw(moments, args.output)


if __name__ == "__main__":
    main()
