#!/usr/bin/env python3
"""What several GPUs exchange in a training step, against what they compute; and a check of the calculation.

  python benchmarks/scaling.py            the tables of docs/scaling.md
  python benchmarks/scaling.py --check    bytes and seconds of real steps over links with a limited bandwidth

An all-reduce of m bytes over n processes takes 2 (n - 1) / n m / bandwidth in a ring, and 2 log2(n) latencies where
small messages go through a tree. The check replaces torch's all-reduce by a ring over gloo, whose sends take as long as
on a slow link, and counts bytes.
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
from collections.abc import Iterator
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
    """What connects the processes of a ring."""

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
    """Bytes that an EMA codebook's step sums: counts, sums of vectors, and vectors onto which dead codes may move."""
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
        self.bandwidth, self.bytes, self.calls = bandwidth, 0, 0
        self.small = dist.all_reduce  # votes of the host, which this does not slow down

    def __call__(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if not tensor.is_floating_point():
            self.small(tensor, op=op)
            return
        self.bytes, self.calls = self.bytes + tensor.numel() * tensor.element_size(), self.calls + 1
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


STEPS = 6


def check(folder: Path) -> None:
    """What each process does: a few steps with each codebook, fast and slowed down."""
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": os.environ["PORTS"].split()[0]}
    distributed.start(torch.device("cpu"))
    rows = []
    for num_codes in (512, 4096, 16_384):
        for bandwidth in (1e12, 20e6):
            slow = Slow(bandwidth)
            distributed.dist.all_reduce, small = slow, dist.all_reduce  # type: ignore[assignment]
            case = Case(f"vq num_codes={num_codes} code_dim=64 init=normal", "sonnet hidden=16 residual_hidden=8")
            module = AutoencoderTraining(
                make(case, STEPS), build(objectives.SLOT, Choice("elbo", {}), {"total_steps": STEPS})
            )
            times: list[tuple[float, int]] = []
            module.register_forward_pre_hook(
                lambda *_, times=times, slow=slow: times.append((time.perf_counter(), slow.bytes))
            )
            plan = Plan(
                epochs=1, batch_size=16, lr=Schedule.parse("1e-3"), weight_decay=0.0, seed=0, log_every=1000,
                device=torch.device("cpu"), precision="fp32", save_every=(1000, None),
            )  # fmt: skip
            images = torch.randint(256, (16 * STEPS, 3, 8, 8), dtype=torch.uint8)
            labels = torch.zeros(len(images), dtype=torch.int64)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                fit(Stage(module, images, labels, lambda: {"neg_elbo": 0.0}, None, ""), plan, NullRun(Path("nowhere")))
            distributed.dist.all_reduce = small
            steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(times)]
            seconds = sorted(seconds for seconds, _ in steps)[len(steps) // 2]
            parameters = sum(p.numel() for p in module.parameters())
            rows.append((num_codes, bandwidth, parameters, steps[-1][1], seconds))
    if distributed.rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    distributed.stop()


def report_check() -> None:
    with tempfile.TemporaryDirectory() as name:
        spawn([__file__, "--work", name], 2)
        rows = json.loads(Path(name, "rows.json").read_text())
    heads = ("K", "weights, MB", "bytes a step, MB", "calculated", "slower by, s", "calculated")
    print("  ".join(f"{head:>16}" for head in heads))
    for fast, slow in zip(rows[::2], rows[1::2], strict=True):
        num_codes, _, parameters, size, seconds = fast
        expected = BYTES * parameters + codebook_bytes(num_codes, 64) + monitor_bytes(num_codes)
        calculated = Link("", 2, slow[1], 0.0).all_reduce(size)
        row = (BYTES * parameters / 1e6, size / 1e6, expected / 1e6, slow[4] - seconds, calculated)
        print("  ".join((f"{num_codes:16,}", *(f"{value:16.3f}" for value in row))))


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--check", action="store_true", help="train over slow links, in two processes")
    cli.add_argument(
        "--images", type=int, default=128, help="images of 32x32 a GPU; an eighth of 256x256 (default: 128)"
    )
    cli.add_argument("--code-dim", type=int, default=64, help="D (default: 64)")
    cli.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.work:
        check(Path(args.work))
    elif args.check:
        report_check()
    else:
        print("\n".join(tables(args.images, args.code_dim)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
