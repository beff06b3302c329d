#!/usr/bin/env python3
"""Train every family with one process and with two and three that share its batches, and compare what they compute.

  python benchmarks/ranks.py                         50 steps, fp32, and the same in float64; a few minutes
  python benchmarks/ranks.py vq lfq --steps 10       cases whose names begin so

A row has the largest relative differences between one process and several: of the training loss in the first 5 steps
and in all steps; and in float64 of the loss, of all training metrics, and of the held-out metrics before and after
training. `alike` says whether all processes had the same weights, optimizer and buffers, bit for bit, at every save.
Three processes have unequal shares.

In fp32 a rounding error may change which code is nearest, and from there two runs differ; float64 shows that nothing
else differs. Dropout in priors is switched off, because each share draws its own.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqvae import distributed, objectives
from vqvae.autoencoder import SLOTS, Autoencoder, build_autoencoder
from vqvae.data.batches import crop_flip
from vqvae.evaluation import evaluate
from vqvae.registry import Choice, build
from vqvae.runs import NullRun
from vqvae.schedules import Schedule
from vqvae.stage_one import AutoencoderTraining
from vqvae.stage_two import PriorTraining
from vqvae.training import Plan, Stage, fit

ROOT = Path(__file__).resolve().parent.parent
BATCH, HELD_OUT = 7, 11  # of 2 and 3 processes, unequal shares; held-out batches of 4, the last one of 3
SHAPE = (3, 8, 8)
ENOUGH = 50  # batches of images, of which k-means finds no cluster of one vector: its distance has no gradient
PLAIN, NORMED, FLAT = "sonnet hidden=8 residual_hidden=4", "henrhoi hidden=8 residual_layers=1", "conv-vae hidden=2"
SMALL = "num_codes=16 code_dim=4"
REVIVE = "num_codes=8 code_dim=4 revive=0.3 decay=0.5 warmup=no"  # few at once: two at one place would be a tie
PRIORS = {
    "unigram": "unigram",
    "pixelcnn": "pixelcnn channels=4 blocks=1 head=8",
    "gated-pixelcnn": "gated-pixelcnn channels=4 layers=2 embedding=4 head=8",
    "transformer": "transformer layers=1 width=8 heads=2 dropout=0",
    "masked": "masked layers=1 width=8 heads=2 dropout=0",
}
BOTTLENECKS = {  # a name that begins with that of a member: its options
    "vq": SMALL,
    "vq revive": REVIVE,
    "vq gradient": f"{REVIVE} codebook=gradient",
    "vq diversity": f"{SMALL} diversity=0.1",
    "cosine": REVIVE,
    "simvq": SMALL,
    "fsq": "levels=4,3,5",
    "lfq": "bits=5",
    "residual": f"{SMALL} quantizers=2 dropout=0.7",
    "grouped": SMALL,
    "hierarchy": f"{SMALL} hidden=4 revive=0",  # two codes revived at one place would be a tie
    "multiscale": f"{SMALL} shared=yes",
    "deterministic": SMALL,
    "categorical": f"{SMALL} num_samples=2 revive=0.1 decay=0.5",
    "gumbel": f"{SMALL} num_samples=2",
    "stochastic": SMALL,
    "gaussian": "latents=3",
}


class Case(NamedTuple):
    """A small model to train. With `stage=2`, only its prior is trained, on random codes."""

    bottleneck: str
    nets: str = PLAIN
    prior: str = "uniform"
    objective: str = "elbo"
    stage: int = 1
    augment: bool = False
    conditional: bool = False
    accumulate: int = 1
    likelihood: str = "mse"


def cases() -> dict[str, Case]:
    """Every bottleneck with and without batch norm, both stages, every prior, and other uses of a whole batch."""
    found = {}
    for name, options in BOTTLENECKS.items():
        bottleneck = f"{name.split()[0]} {options}"
        if name == "gaussian":
            found[name] = Case(bottleneck, FLAT, "normal")
            continue
        found[name] = Case(bottleneck)
        found[f"{name}, batch norm"] = Case(bottleneck, NORMED)
        if " " not in name:
            found[f"{name}, stage two"] = Case(bottleneck, prior=PRIORS["transformer"], stage=2)
    vq = f"vq {SMALL}"
    found |= {f"{name}, stage two": Case(vq, prior=prior, stage=2) for name, prior in PRIORS.items()}
    labeled = PRIORS["masked"] + " label_drop=0.5"
    return found | {
        "labels, stage two": Case(vq, prior=labeled, stage=2, conditional=True),
        "masked prior of gumbel": Case(f"gumbel {BOTTLENECKS['gumbel']}", prior=PRIORS["masked"]),
        "free bits": Case("gaussian latents=3", FLAT, "normal", "elbo reduction=sum free_bits=20"),
        "augmented": Case(vq, augment=True),
        "dequantized": Case(f"fsq {BOTTLENECKS['fsq']}", likelihood="logit-gaussian"),
    }


CASES = cases()


class Notes(NullRun):
    """Keeps the losses and metrics of every step, and a hash of every save, in memory."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"))
        self.steps: list[dict[str, float]] = []
        self.saves: list[str] = []
        self.state: dict[str, Any] = {}

    def log(self, kind: str, step: int, epoch: int, metrics: Mapping[str, float], *others: Any, **more: Any) -> None:
        if kind == "train":
            self.steps.append(dict(metrics))

    def save(self, state: dict[str, Any]) -> None:
        self.saves.append(fingerprint(state))
        self.state = state


def fingerprint(state: Any) -> str:
    """A hash of all tensors and numbers in a nested state."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                add(value[key])
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()[:16]


def make(case: Case, steps: int, shape: tuple[int, int, int] = SHAPE) -> Autoencoder:
    """The case's model, the same in every process."""
    torch.manual_seed(0)
    words = {"nets": case.nets, "bottleneck": case.bottleneck, "prior": case.prior, "likelihood": case.likelihood}
    choices = {slot: Choice.parse(slot, text.split()) for slot, text in words.items()}
    classes = 3 if case.conditional else 0
    return build_autoencoder(
        {slot: choices[slot] for slot in SLOTS}, image_shape=shape, data_variance=0.06, num_classes=classes,
        total_steps=steps,
    )  # fmt: skip


def train(
    case: Case, steps: int, dtype: torch.dtype, resume: dict[str, Any] | None = None, stop: int | None = None
) -> dict[str, Any]:
    """The results of a process that trains a case: losses, held-out metrics, hashes of its saves, the last state."""
    noise = torch.Generator().manual_seed(0)
    model = make(case, steps).to(dtype)
    count, notes = max(steps, ENOUGH) * BATCH, Notes()
    images = torch.randint(256, (count + HELD_OUT, *SHAPE), dtype=torch.uint8, generator=noise)
    labels = torch.randint(3, (count + HELD_OUT,), generator=noise)
    training, held_out = (images[:count], labels[:count]), (images[count:], labels[count:])
    module: AutoencoderTraining | PriorTraining
    if case.stage == 1:
        objective = build(objectives.SLOT, Choice.parse("objective", case.objective.split()), {"total_steps": steps})
        module = AutoencoderTraining(model, objective)
        examples, held_out_metrics = training[0], partial(evaluate, model, *held_out, batch_size=4)
    else:
        module = PriorTraining(model, conditional=case.conditional)
        codes = torch.randint(model.bottleneck.num_codes, (len(images), *model.bottleneck.grid), generator=noise)
        examples, held_out_metrics = codes[:count].int(), partial(module.evaluate, codes[count:].int(), held_out[1])
    before = held_out_metrics()
    plan = Plan(
        epochs=1, batch_size=BATCH, lr=Schedule.parse("1e-3"), weight_decay=0.01, seed=0, device=torch.device("cpu"),
        precision="fp32", log_every=1, checkpoint_every=(5, None), max_steps=stop or steps, accumulate=case.accumulate,
        augment=crop_flip if case.augment else None, optimizer="muon",
    )  # fmt: skip
    if resume:
        module.load_state_dict(resume["module"])
    stage = Stage(module, examples, training[1], held_out_metrics)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        results = fit(stage, plan, notes, resume=resume)
    return {
        "steps": notes.steps,
        "before": numbers(before),
        "after": numbers(results or {}),
        "saves": notes.saves,
        "state": {**notes.state, "module": module.state_dict()},
    }


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


class Job(NamedTuple):
    """A case to train by one process and by several."""

    name: str
    kind: str  # float32 or float64
    steps: int
    pair: bool = True  # whether two processes train it too, and not only one and three


def work(folder: Path) -> None:
    """The work of each of three processes: it trains as one of three and of two, and the first one also without others.

    A resumed run is begun by one process, and goes on with three, two and one.
    """
    torch.set_num_threads(1)
    jobs = [Job(*job) for job in json.loads((folder / "jobs.json").read_text())]
    number, ports, last = int(os.environ["RANK"]), os.environ["PORTS"].split(), folder / "last.pt"
    if number == 0:
        torch.save(train(CASES[RESUMED], 8, torch.float64, stop=2)["state"], last)
    for count, stop in ((3, 4), (2, 6), (1, 8)):
        if number >= count:
            break
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": ports[count - 1]}
        if count > 1:
            distributed.start(torch.device("cpu"))
        mine = [job for job in jobs if job.pair or count != 2]
        found = {(job.name, job.kind): train(CASES[job.name], job.steps, getattr(torch, job.kind)) for job in mine}
        resumed = train(CASES[RESUMED], 8, torch.float64, torch.load(last, weights_only=False), stop=stop)
        distributed.barrier()
        if number == 0:
            torch.save(resumed["state"], last)
        found["resumed", "float64"] = resumed
        distributed.stop()
        torch.save(found, folder / f"{count}-{number}.pt")


def spawn(command: Sequence[str], count: int) -> None:
    """Run a script in several processes, which find their RANK and free PORTS in the environment.

    Raises RuntimeError with what they printed if one of them fails.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = " ".join(str(server.getsockname()[1]) for server in sockets)
    for server in sockets:
        server.close()
    about = {"PORTS": ports, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, *command], env=os.environ | about | {"RANK": str(n), "LOCAL_RANK": str(n)},
            stderr=subprocess.PIPE, text=True,
        )
        for n in range(count)
    ]  # fmt: skip

    def wait(process: subprocess.Popen[str]) -> str:
        said = process.communicate()[1]
        if process.returncode:  # the others would wait for it
            for other in processes:
                other.kill()
        return said

    with ThreadPoolExecutor(count) as pool:
        said = list(pool.map(wait, processes))
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(said))


RESUMED = "vq revive"
Found = dict[tuple[str, str], dict[str, Any]]
Results = dict[tuple[int, int], Found]  # by (number of processes, rank)


def results(jobs: Sequence[Job]) -> Results:
    """The results of each process, for (number of processes, rank); also of a resumed run, as `resumed`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        spawn([__file__, "--work", name], 3)
        paths = {(count, rank): folder / f"{count}-{rank}.pt" for count in (1, 2, 3) for rank in range(count)}
        return {key: torch.load(path, weights_only=False) for key, path in paths.items()}


def difference(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> float:
    """The largest relative difference of the numbers in two lists."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.keys() != b.keys():
            return math.inf
        for name, value in a.items():
            scale = max(abs(value), abs(b[name]))
            if math.isfinite(scale):
                worst = max(worst, abs(value - b[name]) / scale if scale else 0.0)
            elif value != b[name]:
                return math.inf
    return worst


def alike(found: dict[tuple[int, int], Found], count: int, key: tuple[str, str]) -> bool:
    """Whether all of several processes had the same bits at every save."""
    saves = [found[count, rank][key]["saves"] for rank in range(count)]
    return len(saves[0]) > 0 and all(save == saves[0] for save in saves)


def only(names: Sequence[str], rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in names if name in row} for row in rows]


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("cases", nargs="*", metavar="CASE", help="beginnings of names of cases (default: all)")
    cli.add_argument("--steps", type=int, default=50, help="training steps (default: 50)")
    cli.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.work:
        work(Path(args.work))
        return 0
    names = [name for name in CASES if not args.cases or name.startswith(tuple(args.cases))]
    found = results([Job(name, kind, args.steps) for name in names for kind in ("float32", "float64")])
    print(f"{'':32} processes  loss, 5 steps  loss, all  float64: loss  all metrics  held out  alike")
    for name in names:
        for count in (2, 3):
            single, double = (name, "float32"), (name, "float64")
            one, some = ({kind: found[n, 0][kind] for kind in (single, double)} for n in (1, count))
            row = [
                difference(only(["loss"], one[single]["steps"][:5]), only(["loss"], some[single]["steps"][:5])),
                difference(only(["loss"], one[single]["steps"]), only(["loss"], some[single]["steps"])),
                difference(only(["loss"], one[double]["steps"]), only(["loss"], some[double]["steps"])),
                difference(one[double]["steps"], some[double]["steps"]),
                max(difference([one[double][at]], [some[double][at]]) for at in ("before", "after")),
            ]
            same = alike(found, count, single) and alike(found, count, double)
            text = "  ".join(f"{value:11.1e}" for value in row)
            print(f"{name:32} {count}          {text}  {'yes' if same else 'NO'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
