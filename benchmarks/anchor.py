#!/usr/bin/env python3
"""Compare a run of `--preset sonnet-cifar10` with the metrics that Sonnet's example prints, as a Markdown table.

Both columns are means over the last 100 training steps, at batch 32: MSE / data variance, and perplexity of a batch.

  python train.py --preset sonnet-cifar10
  python benchmarks/anchor.py logs/sonnet-cifar10
"""

import sys
from pathlib import Path

from vqvae.runs import LOG, read_metrics

# step: (MSE / variance, perplexity), github.com/google-deepmind/sonnet, VQ-VAE example, EMA codebook
SONNET = {
    100: (0.483, 10.4),
    500: (0.147, 34),
    1000: (0.105, 72),
    2000: (0.081, 154),
    3000: (0.071, 227),
    5000: (0.061, 327),
    10000: (0.056, 326),
}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    rows = read_metrics(Path(sys.argv[1]) / LOG)
    ours = {row["step"]: row for row in rows if row["kind"] == "train"}
    print("| step | Sonnet: MSE / variance | ours | Sonnet: perplexity | ours |\n|---|---|---|---|---|")
    for step, (error, perplexity) in SONNET.items():
        if step in ours:
            our_error, our_perplexity = ours[step]["reconstruction"], ours[step]["batch_perplexity"]
            print(f"| {step:,} | {error:.3f} | {our_error:.3f} | {perplexity:g} | {our_perplexity:.0f} |")


if __name__ == "__main__":
    main()
