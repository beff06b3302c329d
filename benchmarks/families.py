#!/usr/bin/env python3
"""How long a training step takes, for every family of models in a preset's sizes, on noise in place of data.

A step is the loop's own: batch, forward, backward, AdamW, monitors. Against another commit, which is checked out into a
temporary worktree, two processes hold the same model and take turns, so that both meet the same machine. Prints a
table; figures are added to those in results/families.json.

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
RESULTS = ROOT / "results/families.json"

FAMILIES = {  # name: flags of train.py; where the prior alone is trained, a second stage on codes
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
SHAPES = {"gauss2d": (2, 1, 1), "mnist-binary": (1, 28, 28)}  # else CIFAR-10's; its codes are 8x8 of 512


def stepper(family: str, device: str) -> tuple[Callable[[], None], str]:
    """A function that takes one training step on the batch of a family, and what it trains, in words."""
    import torch

    import train
    from vqvae.config import parser
    from vqvae.data import Dataset, Images
    from vqvae.runs import Bystander
    from vqvae.stage_two import PriorTraining
    from vqvae.training import Loop

    torch.manual_seed(0)
    config = train.settle(vars(parser("", "").parse_args(FAMILIES[family].split())) | {"device": device}, None, None)
    plan, shape = train.plan_of(config), SHAPES.get(config.dataset.name, (3, 32, 32))
    if shape[1] == 1:
        examples = torch.randn(plan.batch_size, *shape)
    elif config.dataset.name == "mnist-binary":
        examples = 255 * torch.randint(2, (plan.batch_size, *shape), dtype=torch.uint8)
    else:
        examples = torch.randint(256, (plan.batch_size, *shape), dtype=torch.uint8)
    labels = torch.zeros(plan.batch_size, dtype=torch.int64)
    split = Images(examples, labels)
    module, model = train.autoencoder_job(config, Dataset(config.dataset.name, split, split), plan, None)
    module, on = module.module, "x".join(map(str, shape))
    if family == config.prior.name:
        module, on = PriorTraining(model, conditional=False), "8x8 codes"
        examples = torch.randint(model.bottleneck.num_codes, (plan.batch_size, 8, 8), dtype=torch.int32)
    # so long a run that no schedule ends; it logs nothing
    loop = Loop(module.train(), examples.to(plan.device), labels, plan._replace(epochs=10**6), Bystander(ROOT), {})
    loop.bar.disable = True
    index = torch.arange(plan.batch_size)

    def step() -> None:
        loop.train_step(index)

    return step, f"batch {plan.batch_size}, {on}"


def work(family: str, device: str) -> None:
    """Say what is trained; then for every number of seconds read, train for so long and answer with ms a step."""
    import torch

    step, what = stepper(family, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    print(what, flush=True)
    for line in sys.stdin:
        step()  # caches are the other process's
        wait()
        start, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - start < float(line):
            step()
            wait()
            steps += 1
        print(1000 * (time.perf_counter() - start) / steps, flush=True)


def measure(family: str, trees: list[Path], turns: int, seconds: float, device: str) -> dict:
    """Milliseconds a step in each tree, the median over turns."""
    command = [sys.executable, __file__, "--work", family, "--device", device]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tree)}, **pipes) for tree in trees]
    what = [worker.stdout.readline().strip() for worker in workers]
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(turns):
        for worker, taken in zip(workers, times, strict=True):
            print(seconds, file=worker.stdin, flush=True)
            taken.append(float(worker.stdout.readline()))
    for worker in workers:
        worker.communicate()
    *before, after = map(statistics.median, times)
    row = {"family": family, "flags": FAMILIES[family], "what": what[-1], "ms": after}
    return row | ({"before_ms": before[0], "ratio": before[0] / after} if before else {})


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--against", metavar="COMMIT", help="time this commit too")
    cli.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    cli.add_argument("--quick", action="store_true", help="3 turns of half a second each, in place of 7 of 1.5")
    cli.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    cli.add_argument("--work", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.work:
        return work(args.work, args.device)
    from hardware import describe

    hardware = describe(args.device)
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = held.get("rows", []) if (held.get("hardware"), held.get("against")) == (hardware, args.against) else []
    rows = {row["family"]: row for row in kept}
    print(f"{hardware}\n\n| family | flags | what | before, ms | after, ms | ratio |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        trees = [ROOT]
        if args.against:
            trees.insert(0, Path(folder) / "before")
            subprocess.run(["git", "worktree", "add", "--detach", "-q", trees[0], args.against], cwd=ROOT, check=True)
        try:
            for family in args.only:
                row = measure(family, trees, *((3, 0.5) if args.quick else (7, 1.5)), args.device)
                rows[family] = row
                timed = [f"{row[key]:.2f}" if key in row else "" for key in ("before_ms", "ms", "ratio")]
                cells = [family, f"`{row['flags']}`", row["what"], *timed]
                print(f"| {' | '.join(cells)} |", flush=True)
        finally:
            if args.against:
                subprocess.run(["git", "worktree", "remove", "--force", trees[0]], cwd=ROOT, check=True)
    ordered = [rows[family] for family in FAMILIES if family in rows]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"hardware": hardware, "against": args.against, "rows": ordered}, indent=2) + "\n")


if __name__ == "__main__":
    main()
