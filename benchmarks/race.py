"""Time to quality: steps and seconds until the held-out MSE / variance on CIFAR-10 is below a goal.

Ours is what `train.py --dataset cifar10 --batch-size 32` trains by default; the peers have the same nets, the same data
in the same order, and Adam at 3e-4 as in Sonnet's example. Every run has a process of its own. Seconds include training
and our k-means start, but not evaluation. Only the CPU seconds are independent of other load on the machine.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contest import fresh_process
from peers import QUANTIZERS, Peer, peer_update
from runs import table
from torch import Tensor

from vqvae import experiment, run_data
from vqvae.autoencoder import unit_range
from vqvae.config import Config, Fresh, configure
from vqvae.contracts import evaluating
from vqvae.data import Dataset
from vqvae.data.batches import batch_indices
from vqvae.registry import Choice
from vqvae.runs import NullRun
from vqvae.training import Loop, take

BATCH, EVERY, HELD_OUT = 32, 200, 2000  # images a step, steps between evaluations, held-out images


def race(
    goal: float, data_dir: str, seeds: Sequence[int], precisions: Sequence[str], device: torch.device, *, most: int
) -> list[dict[str, Any]]:
    """Train all contestants to the goal, or for `most` steps; prints and returns a row for each run."""
    rows: list[dict[str, Any]] = []
    print("", *table(("run", "seed", "steps", "seconds", "CPU seconds", "MSE / variance"), []), sep="\n", flush=True)
    for precision in precisions:
        for name, seed in itertools.product(QUANTIZERS, seeds):
            with fresh_process() as fresh:
                row = fresh.submit(run, name, precision, goal, data_dir, seed, device, most).result()
            rows.append({"name": name, "precision": precision, "seed": seed, **row})
            steps = f"{row['steps']:,}" + ("" if row["reached"] else ", not reached")
            cells = (steps, f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['error']:.4f}")
            print(f"| {name} {precision} | {seed} | {' | '.join(cells)} |", flush=True)
        ours = [row for row in rows if row["name"] == "ours" and row["precision"] == precision]
        for name in QUANTIZERS:
            theirs = [row for row in rows if row["name"] == name and row["precision"] == precision]
            if name != "ours" and all(row["reached"] for row in ours + theirs):
                ratio = mean(theirs, "cpu_seconds") / mean(ours, "cpu_seconds")
                print(f"\n{precision}: ours takes {ratio:.2f} times less CPU time than {name}", flush=True)
    return rows


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def run(
    name: str, precision: str, goal: float, data_dir: str, seed: int, device: torch.device, most: int
) -> dict[str, Any]:
    """Train one contestant in this process."""
    settings = {"dataset": Choice("cifar10", {}), "data_dir": data_dir, "batch_size": BATCH, "seed": seed}
    settings |= {"device": device.type, "precision": precision, "max_steps": most}
    config = configure(settings, Fresh(), experiment.SLOTS)
    dataset = run_data.load(config)
    training = (our_training if name == "ours" else peer_training)(name, config, dataset)
    held_out = dataset.held_out.images[:HELD_OUT].to(device)
    variance = experiment.pixel_variance(dataset.train.images)
    watch, taken, error = Stopwatch(), 0, float("inf")
    with watch:
        training.start()
    while error > goal and taken < most:
        with watch:
            for _ in range(min(EVERY, most - taken)):
                training.step(taken)
                taken += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
        error = error_of(training.reconstruct, held_out) / variance
    return {"steps": taken, "reached": error <= goal, "seconds": watch.wall, "cpu_seconds": watch.cpu, "error": error}


class Training(NamedTuple):
    """A contestant in training."""

    start: Callable[[], None]
    step: Callable[[int], None]  # takes step i
    reconstruct: Callable[[Tensor], Tensor]  # images `[B, C, H, W]` (uint8), decoded in [0, 1]


class Stopwatch:
    """Seconds within `with`, of the clock and of this process's CPU time."""

    wall = cpu = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]


@torch.no_grad()
def error_of(reconstruct: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The mean squared error of reconstructions, in [0, 1]."""
    errors = [(reconstruct(tile) - unit_range(tile)).square().sum() for tile in images.split(250)]
    return float(sum(errors)) / images.numel()


def our_training(name: str, config: Config, dataset: Dataset) -> Training:
    """The training of train.py, without its files."""
    plan = experiment.plan_of(config)
    torch.manual_seed(config.seed)
    stage, model, _ = experiment.stage_one(config, dataset, plan, Fresh())
    stage.module.train()
    loop = Loop(stage.module, stage.examples, stage.labels, plan, NullRun(Path("nowhere")), {})
    order = Order(len(stage.examples), config.seed)
    return Training(loop.start, lambda i: loop.train_step(order[i]), model.reconstruct)


def peer_training(name: str, config: Config, dataset: Dataset) -> Training:
    """The training of a peer, with Adam at 3e-4."""
    device, images = torch.device(config.device), dataset.train.images
    torch.manual_seed(config.seed)
    peer = Peer(QUANTIZERS[name](512), experiment.pixel_variance(images)).to(device).train()
    update, order = peer_update(peer, config.precision), Order(len(images), config.seed)

    def reconstruct(batch: Tensor) -> Tensor:
        with evaluating(peer):
            return peer.reconstruct(batch)

    return Training(lambda: None, lambda i: update(take(images, order[i], device)), reconstruct)


class Order:
    """The batches of our training by step: each epoch's, as vqvae.training orders them."""

    def __init__(self, examples: int, seed: int):
        self.examples, self.seed, self.epoch = examples, seed, -1

    def __getitem__(self, step: int) -> Tensor:
        epoch, at = divmod(step, self.examples // BATCH)
        if epoch != self.epoch:
            self.epoch = epoch
            self.batches = batch_indices(self.examples, BATCH, seed=self.seed, epoch=epoch)
        return self.batches[at]
