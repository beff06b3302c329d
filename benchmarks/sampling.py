#!/usr/bin/env python3
"""How much faster the samplers that compute only what changed are than a whole forward pass for every code.

Fast and naive take turns in one process, and must draw the same codes. Prints a table; --output also writes JSON.

  python benchmarks/sampling.py [--quick] [--output results/sampling.json]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from hardware import describe

from vqvae.priors import PRIORS

# name -> (options, codes drawn side by side on each grid); the gated net's naive way is slow, so it draws fewer
CASES = {
    "pixelcnn": ({}, {8: 16, 16: 32}),
    "gated-pixelcnn": ({}, {8: 4, 16: 2}),
    "transformer": ({}, {8: 16, 16: 4}),
}
SMALL = {"gated-pixelcnn": {"channels": 64, "layers": 6}}


def seconds(prior, n: int, naive: bool) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    codes = prior.sample(n, generator=torch.Generator().manual_seed(0), naive=naive)
    return time.perf_counter() - start, codes


def measure(name: str, options: dict, side: int, n: int, rounds: int) -> dict:
    torch.manual_seed(0)
    prior = PRIORS[name](num_codes=512, grid=(side, side), num_classes=0, **options)
    for p in prior.parameters():  # logits that differ, as after training
        p.data.add_(0.02 * torch.randn_like(p))
    prior.sample(n)  # warm-up
    times = {True: [], False: []}
    for _ in range(rounds):
        drawn = {}
        for naive in (False, True):
            took, drawn[naive] = seconds(prior, n, naive)
            times[naive].append(took)
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
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--quick", action="store_true", help="three rounds instead of five, and a small gated net")
    cli.add_argument("--output", help="write the figures as JSON")
    args = cli.parse_args()
    print(f"{describe()}; K = 512; median of {3 if args.quick else 5} rounds, naive and fast in turn\n")
    print("| prior | grid | samples | naive, s | fast, s | ratio | same codes |\n|---|---|---|---|---|---|---|")
    rows = []
    for name, (options, counts) in CASES.items():
        options = options | (SMALL.get(name, {}) if args.quick else {})
        for side, n in counts.items():
            row = measure(name, options, side, n, 3 if args.quick else 5)
            rows.append(row)
            label = name + "".join(f" {k}={v}" for k, v in options.items())
            print(
                f"| {label} | {row['grid']} | {n} | {row['naive_s']:.2f} | {row['fast_s']:.2f} | "
                f"{row['ratio']:.1f} | {row['same_codes']:.1%} |",
                flush=True,
            )
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps({"hardware": describe(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
