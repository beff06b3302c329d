#!/usr/bin/env python3
"""Compare what several GPUs exchange in a training step with what they compute, and check the calculation.

  python benchmarks/scaling.py            the tables of docs/scaling.md
  python benchmarks/scaling.py --check    bytes and seconds of real steps over links with a limited bandwidth
  python benchmarks/scaling.py --measure  a step of Sonnet's nets in one and two processes of one thread, on this CPU

An all-reduce of m bytes over n processes takes 2 (n - 1) / n m / bandwidth in a ring, and 2 log2(n) latencies where
small messages go through a tree. The check replaces torch's all-reduce by a ring over gloo, whose sends take as long as
on a slow link, and counts bytes and seconds.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ranks import Case, make, spawn
from torch import Tensor

from vqvae import distributed, objectives
from vqvae.autoencoder import SLOTS, build_autoencoder
from vqvae.registry import Choice, build
from vqvae.runs import NullRun
from vqvae.schedules import Schedule
from vqvae.stage_one import AutoencoderTraining
from vqvae.training import Plan, Stage, fit

BYTES = 4  # of a gradient, a sum or a count


class Link(NamedTuple):
    """The links between the processes of a ring."""

    name: str
    processes: int
    bandwidth: float  # bytes/s of the whole ring: of its slowest link, times the rings side by side
    latency: float  # seconds of one message

    def all_reduce(self, size: float) -> float:
        """Seconds for a message of `size` bytes."""
        n = self.processes
        return 2 * (n - 1) / n * size / self.bandwidth + 2 * math.log2(n) * self.latency


LINKS = (  # assumed, not measured: what such machines reach in a ring
    Link("8 GPUs, NVLink", 8, 300e9, 3e-6),
    Link("64 GPUs, 400 Gb/s each", 64, 200e9, 8e-6),
    Link("64 GPUs, 100 Gb/s a node", 64, 12.5e9, 20e-6),
)
RATE = 200e12  # FLOP/s of a GPU in the nets (bf16), assumed
SEARCH = 50e12  # FLOP/s of the code search (fp32 or TF32), assumed
LAUNCH = 5e-3  # seconds of a step of small nets, in which the host launches some hundred kernels, assumed


def codebook_bytes(num_codes: int, code_dim: int, *, levels: int = 1, revives: bool = True) -> int:
    """Bytes that a step of an EMA codebook sums over processes: counts, sums of vectors, and vectors for dead codes."""
    return BYTES * levels * num_codes * (1 + code_dim * (2 if revives else 1))


def monitor_bytes(num_codes: int, *, levels: int = 1) -> int:
    """Bytes of the code usage that every step sums for its metrics."""
    return BYTES * levels * num_codes


class Workload(NamedTuple):
    """Nets on images of a size."""

    name: str
    parameters: int  # trained by gradient
    flops: float  # of a training step, per image
    positions: int  # codes of an image


def workload(name: str, nets: str, side: int) -> Workload:
    """Parameters and FLOPs of real nets, without their code search."""
    from torch.utils.flop_counter import FlopCounterMode

    words = {"nets": nets, "bottleneck": "vq num_codes=2", "prior": "uniform", "likelihood": "mse"}
    choices = {slot: Choice.parse(slot, words[slot].split()) for slot in SLOTS}
    with torch.device("meta"):
        model = build_autoencoder(choices, image_shape=(3, side, side), data_variance=0.06)
    with FlopCounterMode(display=False) as counter:
        features = model.encoder(torch.empty(1, 3, side, side, device="meta"))
        model.decoder(model.bottleneck.projection(features))  # type: ignore[operator]
    parameters = sum(p.numel() for p in model.parameters())
    h, w = model.bottleneck.grid
    return Workload(name, parameters, 3 * counter.get_total_flops(), h * w)  # backward costs twice the forward


def tables(per_gpu: int, code_dim: int) -> Iterator[str]:
    """The tables of docs/scaling.md."""
    for work in (
        workload("Sonnet's nets, 32x32", "sonnet", 32),
        workload("vqgan nets, 256x256", "vqgan ch_mult=1,1,2,2,4", 256),
    ):
        count = per_gpu if work.positions <= 64 else per_gpu // 8
        vectors = count * work.positions
        weights, nets = BYTES * work.parameters, max(count * work.flops / RATE, LAUNCH)
        yield f"{work.name}: {work.parameters / 1e6:.1f} M parameters, {work.flops / 1e9:.1f} GFLOP an image and step"
        yield f"  {count} images a GPU, {vectors:,} vectors; nets {1e3 * nets:.1f} ms, weights {weights / 1e6:.1f} MB"
        yield f"  {'K':>7}  {'codebook, MB':>12}  {'search, ms':>10}  " + "  ".join(
            f"{link.name:>26}" for link in LINKS
        )
        for num_codes in (512, 1024, 4096, 8192, 16_384, 65_536):
            statistics = codebook_bytes(num_codes, code_dim) + monitor_bytes(num_codes)
            search = 2 * vectors * num_codes * code_dim / SEARCH
            cells = []
            for link in LINKS:
                both = link.all_reduce(weights) + link.all_reduce(statistics)
                cells.append(f"{1e3 * both:8.2f} ms, efficiency {100 * (nets + search) / (nets + search + both):3.0f}%")
            yield f"  {num_codes:7,}  {statistics / 1e6:12.1f}  {1e3 * search:10.2f}  " + "  ".join(
                f"{cell:>26}" for cell in cells
            )


# the check


class Slow:
    """An all-reduce in a ring over gloo, whose sends take as long as on a slow link; counts its bytes."""

    def __init__(self, bandwidth: float):
        self.bandwidth, self.bytes, self.seconds = bandwidth, 0, 0.0
        self.small = dist.all_reduce  # votes of the host, which this does not slow down

    def __call__(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if not tensor.is_floating_point():
            self.small(tensor, op=op)
            return
        began = time.perf_counter()
        self.bytes += tensor.numel() * tensor.element_size()
        n, me = dist.get_world_size(), dist.get_rank()
        parts = list(tensor.view(-1).tensor_split(n))
        for step in range(2 * (n - 1)):
            sums = step < n - 1
            out, came = parts[(me - step + (not sums)) % n], parts[(me - step - sums) % n]
            arrived = torch.empty_like(came)
            started = time.perf_counter()
            sending = dist.isend(out.contiguous(), (me + 1) % n)
            dist.recv(arrived, (me - 1) % n)
            sending.wait()
            if sums:
                came += arrived
            else:
                came.copy_(arrived)
            time.sleep(max(0.0, started + out.numel() * out.element_size() / self.bandwidth - time.perf_counter()))
        self.seconds += time.perf_counter() - began


STEPS, BANDWIDTH = 5, 5e6


def take_steps(case: Case, shape: tuple[int, int, int], batch: int, before: Callable[[], None]) -> int:
    """Train for a few steps, calling `before` before each; returns the number of parameters."""
    objective = build(objectives.SLOT, Choice("elbo", {}), {"total_steps": STEPS})
    module = AutoencoderTraining(make(case, STEPS, shape), objective)
    module.register_forward_pre_hook(lambda *_: before())
    plan = Plan(
        epochs=1, batch_size=batch, lr=Schedule.parse("1e-3"), weight_decay=0.0, seed=0, log_every=1000,
        device=torch.device("cpu"), precision="fp32", checkpoint_every=(1000, None),
    )  # fmt: skip
    images = torch.randint(256, (batch * STEPS, *shape), dtype=torch.uint8)
    stage = Stage(module, images, torch.zeros(len(images), dtype=torch.int64), lambda: {"neg_elbo": 0.0})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fit(stage, plan, NullRun(Path("nowhere")))
    return sum(p.numel() for p in module.parameters())


def measure(folder: Path, batch: int = 128) -> None:
    """The work of each process: steps of Sonnet's nets by two processes, then by the first one."""
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": os.environ["PORTS"].split()[0]}
    distributed.start(torch.device("cpu"))
    case, found = Case("vq init=normal", "sonnet"), []
    for processes in (2, 1):
        seen: list[tuple[float, float]] = []
        note = lambda seen=seen: seen.append((time.perf_counter(), time.process_time()))  # noqa: E731
        take_steps(case, (3, 32, 32), batch, note)
        wall, cpu = (min(b - a for a, b in itertools.pairwise(column)) for column in zip(*seen, strict=True))
        if processes == 2:
            found += [wall, sum(distributed.gather_objects(cpu))]
            leaves = distributed.rank() > 0
            distributed.stop()
            if leaves:
                return
        else:
            found += [wall, cpu]
    (folder / "rows.json").write_text(json.dumps(found))


def report_measure() -> None:
    with tempfile.TemporaryDirectory() as name:
        spawn([__file__, "--measure", "--work", name], 2)
        wall2, cpu2, wall, cpu = json.loads(Path(name, "rows.json").read_text())
    print("Sonnet's step at batch 128, fp32, one thread a process; the quickest of a few steps")
    print(f"one process:   {wall:.2f} s, {cpu:.2f} CPU seconds")
    print(f"two processes: {wall2:.2f} s, {cpu2:.2f} CPU seconds in all")
    print(f"efficiency: {100 * wall / wall2 / 2:.0f}% of twice the speed; {100 * cpu / cpu2:.0f}% by CPU seconds")


def check(folder: Path) -> None:
    """The work of each process: a few steps with each codebook over a slow link."""
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": os.environ["PORTS"].split()[0]}
    distributed.start(torch.device("cpu"))
    slow = Slow(BANDWIDTH)
    distributed.dist.all_reduce = slow  # type: ignore[assignment]
    rows = []
    for num_codes in (512, 4096, 16_384):
        case = Case(f"vq num_codes={num_codes} code_dim=64 init=normal", "sonnet hidden=16 residual_hidden=8")
        seen: list[tuple[int, float]] = []
        parameters = take_steps(case, (3, 8, 8), 16, lambda seen=seen: seen.append((slow.bytes, slow.seconds)))
        steps = [(b - a, t - s) for (a, s), (b, t) in itertools.pairwise(seen)]
        # the quickest step: others may have waited for a busy machine
        rows.append((num_codes, parameters, steps[0][0], min(seconds for _, seconds in steps)))
    if distributed.rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    distributed.dist.all_reduce = slow.small
    distributed.stop()


def report_check() -> None:
    with tempfile.TemporaryDirectory() as name:
        spawn([__file__, "--work", name], 2)
        rows = json.loads(Path(name, "rows.json").read_text())
    print(f"one step of two processes, {BANDWIDTH / 1e6:.0f} MB/s between them")
    heads = ("K", "weights, MB", "sent, MB", "calculated", "seconds", "calculated")
    print("  ".join(f"{head:>11}" for head in heads))
    for num_codes, parameters, size, seconds in rows:
        expected = BYTES * parameters + codebook_bytes(num_codes, 64) + monitor_bytes(num_codes)
        calculated = Link("", 2, BANDWIDTH, 0.0).all_reduce(expected)
        row = (BYTES * parameters / 1e6, size / 1e6, expected / 1e6, seconds, calculated)
        print("  ".join((f"{num_codes:11,}", *(f"{value:11.3f}" for value in row))))


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--check", action="store_true", help="train over slow links, in two processes")
    cli.add_argument(
        "--images", type=int, default=128, help="images of 32x32 a GPU; an eighth of 256x256 (default: 128)"
    )
    cli.add_argument("--code-dim", type=int, default=64, help="D (default: 64)")
    cli.add_argument("--measure", action="store_true", help="steps of one and two processes on this CPU")
    cli.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.work:
        (measure if args.measure else check)(Path(args.work))
    elif args.measure:
        report_measure()
    elif args.check:
        report_check()
    else:
        print("\n".join(tables(args.images, args.code_dim)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
