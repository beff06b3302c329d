#!/usr/bin/env python3
"""Time a training step of every family of models, in the sizes of a preset, on noise instead of data.

A step is the training loop's: batch, forward, backward, AdamW, metrics. With --against, another commit is checked out
into a temporary worktree. Two processes, one per tree, train the same model with the tree's own code. They take turns,
so that both meet the same load on the machine. The other tree must have this tree's layout (vqvae/experiment.py); to
compare older commits, run this benchmark as of commit 1b8b365.

Prints a table. --output adds the times to a JSON file. Other families in the file stay if they were timed with the same
settings, commits and hardware.

  python benchmarks/families.py [--against COMMIT] [--only dvae transformer] [--quick]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FAMILIES = {  # name: flags of train.py; the last three train only the prior, on codes (stage two)
    "categorical": "--preset probabilistic-2.3",
    "gumbel": "--preset probabilistic-3",
    "gumbel-iaf": "--preset probabilistic-4.1",
    "vae-points": "--preset vae-2d-1",
    "vae": "--preset vae-cifar10",
    "vlae": "--preset vlae-cifar10",
    "dvae": "--preset dvq-dalle",
    "dvae-deepmind": "--preset dvq-gumbel",
    "pixelcnn": "--prior pixelcnn --batch-size 64",
    "gated-pixelcnn": "--prior gated-pixelcnn channels=64 layers=5 kernel=5 --batch-size 64",
    "transformer": "--prior transformer --batch-size 64",
}
SHAPES = {"gauss2d": (2, 1, 1), "mnist-binary": (1, 28, 28)}  # otherwise CIFAR-10's, whose codes are 8x8 of 512


def stepper(family: str, device: str) -> tuple[Callable[[], object], str]:
    """A function that takes one training step of a family, always on the same batch; and a description of the batch."""
    # imported here from the worker's tree, which may be another commit's
    import torch

    from vqvae import cli, experiment
    from vqvae.config import Fresh, add_flags, configure
    from vqvae.data import Dataset, Images
    from vqvae.runs import NullRun
    from vqvae.stage_two import PriorTraining
    from vqvae.training import Loop

    torch.manual_seed(0)
    parser = cli.parser("", "")
    add_flags(parser)
    given = vars(parser.parse_args(FAMILIES[family].split())) | {"device": device}
    config = configure(given, Fresh(), experiment.SLOTS)
    plan, shape = experiment.plan_of(config), SHAPES.get(config.dataset.name, (3, 32, 32))
    if shape[1] == 1:
        examples = torch.randn(plan.batch_size, *shape)
    elif config.dataset.name == "mnist-binary":
        examples = 255 * torch.randint(2, (plan.batch_size, *shape), dtype=torch.uint8)
    else:
        examples = torch.randint(256, (plan.batch_size, *shape), dtype=torch.uint8)
    labels = torch.zeros(plan.batch_size, dtype=torch.int64)
    split = Images(examples, labels)
    stage, model, *_ = experiment.stage_one(config, Dataset(config.dataset.name, split, split), plan, Fresh())
    module, size = stage.module, "x".join(map(str, shape))
    if family == config.prior.name:
        module, size = PriorTraining(model, conditional=False), "8x8 codes"
        examples = torch.randint(model.bottleneck.num_codes, (plan.batch_size, 8, 8), dtype=torch.int32)
    endless = plan._replace(epochs=10**6)  # no schedule ends
    loop = Loop(module.train(), examples.to(plan.device), labels, endless, NullRun(ROOT), {})
    index = torch.arange(plan.batch_size)
    return lambda: loop.train_step(index), f"batch {plan.batch_size}, {size}"


def work(family: str, device: str) -> None:
    """Print a description of the batch. For each number of seconds read, train that long and print ms per step."""
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr  # the loop prints, too
    step, what = stepper(family, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    print(what, file=answers, flush=True)
    for line in sys.stdin:
        step()  # the other process has filled the caches
        wait()
        start, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - start < float(line):
            step()
            wait()
            steps += 1
        print(1000 * (time.perf_counter() - start) / steps, file=answers, flush=True)


def measure(family: str, trees: list[Path], turns: int, seconds: float, device: str) -> dict:
    """Milliseconds per step in each tree, the median over turns."""
    command = [sys.executable, __file__, "--work", family, "--device", device]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tree)}, **pipes) for tree in trees]
    what = [worker.stdout.readline().strip() for worker in workers]
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(turns):
        for worker, measured in zip(workers, times, strict=True):
            print(seconds, file=worker.stdin, flush=True)
            measured.append(float(worker.stdout.readline()))
    for worker in workers:
        worker.communicate()
    *before, after = map(statistics.median, times)
    row = {"family": family, "flags": FAMILIES[family], "what": what[-1], "ms": after}
    return row | ({"before_ms": before[0], "ratio": before[0] / after} if before else {})


def stored_rows(path: Path | None, settings: dict) -> dict[str, dict]:
    """The rows of a file by family. Exits if the file has rows that were timed with other settings."""
    if path is None or not path.exists():
        return {}
    stored = json.loads(path.read_text())
    if other := [key for key in settings if stored.get(key) != settings[key]]:
        sys.exit(f"error: --output {path}: has times of other settings ({', '.join(other)}); name another file")
    return {row["family"]: row for row in stored["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--against", metavar="COMMIT", help="time this commit too; it must have the layout of this one")
    add("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY",
        help=f"time only these of: {', '.join(FAMILIES)}")  # fmt: skip
    add("--quick", action="store_true", help="3 turns of 0.5 s each, instead of 7 turns of 1.5 s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    add("--output", type=Path, help="JSON file to update, such as results/families.json (default: only print)")
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.device)
    from hardware import commit, describe

    from vqvae import __version__

    turns, seconds = (3, 0.5) if args.quick else (7, 1.5)
    settings = {
        "hardware": describe(args.device),
        "against": args.against and commit(args.against),
        "commit": commit(),
        "version": __version__,
        "turns": turns,
        "seconds": seconds,
    }
    rows = stored_rows(args.output, settings)
    with tempfile.TemporaryDirectory() as folder:
        trees = [ROOT]
        if args.against:
            trees.insert(0, Path(folder) / "before")
            subprocess.run(["git", "worktree", "add", "--detach", "-q", trees[0], args.against], cwd=ROOT, check=True)
        try:
            if not (trees[0] / "vqvae/experiment.py").exists():
                sys.exit(f"error: --against {args.against}: has another layout; see --help")
            print(f"{settings['hardware']}\n")
            print("| family | flags | what | before, ms | after, ms | ratio |\n|---|---|---|---|---|---|")
            for family in args.only:
                row = measure(family, trees, turns, seconds, args.device)
                rows[family] = row
                times = [f"{row[key]:.2f}" if key in row else "" for key in ("before_ms", "ms", "ratio")]
                cells = [family, f"`{row['flags']}`", row["what"], *times]
                print(f"| {' | '.join(cells)} |", flush=True)
        finally:
            if args.against:
                subprocess.run(["git", "worktree", "remove", "--force", trees[0]], cwd=ROOT, check=True)
    if args.output:
        from vqvae.files import write_json

        write_json(args.output, settings | {"rows": [rows[family] for family in FAMILIES if family in rows]})


if __name__ == "__main__":
    main()
