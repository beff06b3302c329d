#!/usr/bin/env python3
"""Time the samplers of the autoregressive priors against a naive sampler.

Our samplers compute only the positions that a new code changes; the naive one runs a whole forward pass for every code.
The two take turns in one process and must draw the same codes. Prints a table; --output also writes JSON.

  python benchmarks/sampling.py [--quick] [--output results/sampling.json]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from hardware import describe

from vqvae.autoencoder import SLOTS
from vqvae.files import write_json
from vqvae.registry import Choice, build

# prior: {side of the code grid: number of samples}; naive sampling of the gated net is slow, so it draws fewer
CASES = {"pixelcnn": {8: 16, 16: 32}, "gated-pixelcnn": {8: 4, 16: 2}, "transformer": {8: 16, 16: 4}}
PUBLISHED = {"gated-pixelcnn": {"channels": 256, "layers": 13, "kernel": 7}}
SMALL = {"gated-pixelcnn": {"channels": 64, "layers": 6, "kernel": 7}}


def seconds(prior, n: int, naive: bool) -> tuple[float, torch.Tensor]:
    """The time to draw n samples, and their codes `[n, h, w]`."""
    prior.naive = naive
    start = time.perf_counter()
    codes = prior.sample(n, generator=torch.Generator().manual_seed(0))
    return time.perf_counter() - start, codes


def measure(name: str, options: dict, side: int, n: int, rounds: int) -> dict:
    torch.manual_seed(0)
    context = {"num_codes": 512, "grid": (side, side), "num_classes": 0, "scales": ()}
    prior = build(SLOTS["prior"], Choice(name, options), context)
    for p in prior.parameters():  # an untrained prior may be uniform; its logits should differ
        p.data.add_(0.02 * torch.randn_like(p))
    prior.sample(n)  # warm-up
    times: dict[bool, list[float]] = {True: [], False: []}
    drawn = {}
    for _ in range(rounds):
        for naive in (False, True):
            elapsed, drawn[naive] = seconds(prior, n, naive)
            times[naive].append(elapsed)
    fast, slow = (statistics.median(times[naive]) for naive in (False, True))
    same = float((drawn[True] == drawn[False]).float().mean())
    return {
        "prior": name,
        "options": options,
        "grid": f"{side}x{side}",
        "samples": n,
        "naive_s": slow,
        "fast_s": fast,
        "ratio": slow / fast,
        "same_codes": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of five, and a small gated net")
    parser.add_argument("--output", help="write the times to this JSON file")
    args = parser.parse_args()
    rounds = 3 if args.quick else 5
    print(f"{describe()}; K = 512; median of {rounds} rounds, in which naive and fast take turns\n")
    print("| prior | grid | samples | naive, s | fast, s | ratio | same codes |\n|---|---|---|---|---|---|---|")
    rows = []
    for name, counts in CASES.items():
        options = (SMALL if args.quick else PUBLISHED).get(name, {})
        for side, n in counts.items():
            row = measure(name, options, side, n, rounds)
            rows.append(row)
            print(
                f"| {Choice(name, options)} | {row['grid']} | {n} | {row['naive_s']:.2f} | {row['fast_s']:.2f} | "
                f"{row['ratio']:.1f} | {row['same_codes']:.1%} |",
                flush=True,
            )
    if args.output:
        write_json(Path(args.output), {"hardware": describe(), "rounds": rounds, "rows": rows})


if __name__ == "__main__":
    main()
