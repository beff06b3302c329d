#!/usr/bin/env python3
"""Time a GPU: training steps, the search for codes and sampling, in under 5 minutes.

  python benchmarks/gpu.py [--batch-size 512] [--output results/gpu.json]
  python benchmarks/gpu.py --device cpu --quick     a check of this script: no figure of it is one of a GPU

Training steps of our model and of `vqp` (peers.py) in fp32, tf32 and bf16, as they are and compiled; the search for the
nearest of K codes, against distances and argmin, and against the matrix product of vectors and codes; draws of the
priors over codes. All take turns; times are medians of five rounds after a warm-up round. Measurements that would begin
after `--minutes` are left out.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from contest import ROUNDS, interleaved, seconds
from hardware import describe
from peers import DIM, need_peers, training_step
from runs import table
from torch import Tensor

from vqvae import cli
from vqvae.autoencoder import SLOTS
from vqvae.bottlenecks import nearest
from vqvae.errors import UserError
from vqvae.files import write_json
from vqvae.registry import Choice, build

PRIORS = ("pixelcnn", "gated-pixelcnn", "transformer", "masked")


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether products and convolutions in fp32 may round their inputs to TF32."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = allowed
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


class Bench(NamedTuple):
    """How long to measure, and on what."""

    device: torch.device
    batch: int  # images per step
    steps: int  # per turn
    rounds: int

    def medians(self, work: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each contestant."""
        return interleaved({name: partial(seconds, run) for name, run in work.items()}, self.rounds)


def training(bench: Bench, precision: str, backend: str | None) -> dict:
    """Images/s of ours and of vqp with Adam, and of ours with Muon."""
    autocast = "bf16" if precision == "bf16" else "fp32"
    with tf32(precision != "fp32"):
        build_step = partial(training_step, device=bench.device, precision=autocast, backend=backend, batch=bench.batch)
        names = ("ours", "muon", "vqp")
        took = bench.medians({name: partial(repeat, build_step(name), bench.steps) for name in names})
    torch.compiler.reset()
    speed = {name: bench.batch * bench.steps / took[name] for name in took}
    row = {"precision": precision, "compiled": "yes" if backend else "no"}
    row |= {"images/s": speed["ours"], "vqp images/s": speed["vqp"], "ratio": speed["ours"] / speed["vqp"]}
    return row | {"with Muon": speed["muon"]}


def repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def search(bench: Bench, num_codes: int, vectors: int) -> dict:
    """The search in fp32: `same` is the share of codes that equal those of distances and argmin."""
    z, codebook = (torch.randn(count, DIM, device=bench.device) for count in (vectors, num_codes))
    tiles = z.split(max(1, 2**28 // num_codes))  # whose scores fit into 1 GB

    def plain() -> Tensor:
        return torch.cat([torch.cdist(tile, codebook).argmin(dim=1) for tile in tiles])

    def product() -> None:
        for tile in tiles:
            tile @ codebook.T

    with tf32(False):
        same = (nearest.nearest_code(z, codebook) == plain()).float().mean()
        work = {"search": partial(nearest.nearest_code, z, codebook), "plain": plain, "product": product}
        took = bench.medians(work)
    by = "Triton" if bench.device.type == "cuda" and not nearest.FAILED else "PyTorch"
    row: dict = {"K": num_codes, "N": vectors, "by": by, "ms": 1e3 * took["search"]}
    row |= {f"/ {name}": took["search"] / took[name] for name in ("plain", "product")}
    return row | {"same": float(same)}


def sampling(bench: Bench, name: str, draws: int) -> dict:
    """Images/s of drawing 8x8 codes from an untrained prior."""
    context = {"num_codes": 512, "grid": (8, 8), "num_classes": 0, "scales": ()}
    prior = build(SLOTS["prior"], Choice(name, {}), context).to(bench.device).eval()
    took = bench.medians({name: partial(prior.sample, draws)})
    return {"prior": name, "draws": draws, "images/s": draws / took[name]}


def show(row: dict, *, first: bool) -> None:
    """Print a row of a table, and its head before the first one."""

    def cell(value: object) -> str:
        return str(value) if not isinstance(value, float) else f"{value:,.0f}" if value >= 100 else f"{value:.3f}"

    cells = tuple(map(cell, row.values()))
    head, line, body = table(tuple(row), [cells])
    print(*(["", head, line, body] if first else [body]), sep="\n", flush=True)


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__, "")
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu checks this script (default: cuda)")
    add("--quick", action="store_true", help="small batches, few codes, one precision and prior")
    add("--batch-size", type=cli.value("batch_size", int), default=512, help="images per step (default: 512)")
    add("--minutes", type=float, default=4.5, help="begin nothing after so many minutes (default: 4.5)")
    add("--output", help="JSON file to write, such as results/gpu.json (default: only print)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU was found, so nothing was measured; --device cpu --quick checks the script itself")
    need_peers()
    started, device = time.monotonic(), torch.device(args.device)
    bench = Bench(device, *((4, 1, 1) if args.quick else (args.batch_size, 20, ROUNDS)))
    # a CPU is only to check the script: it traces the nets, and generates no code for them
    compiler = "inductor" if device.type == "cuda" else "eager"
    print(describe(device.type), *([] if device.type == "cuda" else ["(a check of this script)"]))
    torch.manual_seed(0)

    precisions = ("tf32",) if args.quick else ("fp32", "tf32", "bf16")
    sizes = ((64, 256),) if args.quick else ((512, 65_536), (8192, 65_536), (65_536, 65_536))
    priors = PRIORS[:1] if args.quick else PRIORS
    sections = {
        "training": [partial(training, bench, precision, None) for precision in precisions],
        "search": [partial(search, bench, *size) for size in sizes],
        "sampling": [partial(sampling, bench, name, 2 if args.quick else 64) for name in priors],
        # last, because compilation takes most of the time
        "compiled training": [partial(training, bench, precision, compiler) for precision in precisions],
    }
    result: dict = {"hardware": describe(device.type), "batch_size": bench.batch}
    for section, rows in sections.items():
        result[section] = []
        for row in rows:
            if time.monotonic() - started > 60 * args.minutes:
                print(f"\nnot measured: {len(rows) - len(result[section])} of {section}; the time was up", flush=True)
                break
            result[section].append(row())
            show(result[section][-1], first=len(result[section]) == 1)
    if args.output:
        write_json(Path(args.output), result)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
