#!/usr/bin/env python3
"""Compare all bottlenecks with codes: the same nets, batches, steps and bits per image.

  python benchmarks/bottlenecks.py --dataset cifar10 --data-dir data --steps 2000
  python benchmarks/bottlenecks.py --dataset folder --data-dir ~/Pictures --only "vq, EMA" fsq

Sizes are chosen so that an image of 32x32 pixels (8x8 features) costs the same number of bits. A second table grows the
codebook and shows which bottlenecks collapse. Finished runs with the same settings, data and version of the package are
not repeated, and interrupted ones are resumed. The tables are printed; --output also writes them after every run.
"""

import argparse
from pathlib import Path

from runs import command_line, hardware_of, row_of, standard_error, table, write

from vqvae.config import Config

SAME_RATE = {  # row: bottleneck with 64 codes x 9 bits per image, or nearly as many bits
    "vq, EMA": "vq",
    "vq, gradient": "vq codebook=gradient",
    "vq, EMA, rotation": "vq gradient=rotation",
    "vq, EMA, diversity": "vq diversity=0.1",
    "cosine": "cosine num_codes=512",
    "simvq": "simvq num_codes=512",
    "fsq": "fsq levels=8,8,8",
    "lfq": "lfq bits=9",
    "residual, 3 x 8": "residual quantizers=3 num_codes=8",
    "grouped, 3 x 8": "grouped groups=3 num_codes=8 code_dim=63",
    "hierarchy, 80 x 147": "hierarchy num_codes=147",
    "multiscale, 85 x 109": "multiscale num_codes=109",
    "deterministic": "deterministic num_codes=512 code_dim=64",
    "categorical": "categorical num_codes=512 code_dim=64 num_samples=1",
    "gumbel, distances": "gumbel num_codes=512 code_dim=64 temperature=linear:1:0.1",
    "gumbel, logits": "gumbel num_codes=512 code_dim=64 temperature=linear:1:0.1 posterior=linear entropy=exact",
}
PLAIN = "vq codebook=gradient init=uniform revive=0"
LARGE = {
    f"{name}, K = {size:,}": f"{bottleneck} num_codes={size}"
    for size in (1024, 8192)
    for name, bottleneck in (("vq, our defaults", "vq"), ("vq, gradient from ±1/K", PLAIN), ("cosine", "cosine"))
} | {"simvq, K = 8,192": "simvq num_codes=8192", "fsq, K = 8,192": "fsq levels=8,8,8,16"}
INTRODUCTION = """# Comparison of bottlenecks

{dataset}, Sonnet's nets in {precision}, {steps:,} steps of Muon at batch {batch_size}, learning rate {rate}. All rows
of a seed have the same initial nets and the same batches. Metrics are computed in fp32 on the whole test split, with
the most likely codes; MSE is that of images in [0, 1]. ± is one standard error over seeds, or over images for a single
seed.
bits/image is codes per image x log2 K. For a bottleneck with several levels, perplexity is the mean over levels.
Data: {data}. Hardware: {hardware}.
"""
COLUMNS = (
    "bottleneck",
    "bits/image",
    "MSE x 1000",
    "PSNR, dB",
    "perplexity",
    "codebook in use",
    "images/s",
    "seeds",
)


def main() -> None:
    parser = command_line(
        __doc__,
        rows=(*SAME_RATE, *LARGE),
        steps=2000,
        batch_size=32,
        seeds=(2, "seeds of the first table (default: 2); the second table has one"),
        output="results/bottlenecks.md",
    )
    words = ("NAME", "key=value")
    help = "data set, as in train.py (default: cifar10)"
    parser.add_argument("--dataset", nargs="+", default=["cifar10"], metavar=words, help=help)
    options = parser.parse_args()
    found: dict[str, list[dict]] = {}
    for seed in range(options.seeds):
        for name, bottleneck in (SAME_RATE | (LARGE if seed == 0 else {})).items():
            if name in options.only:
                found.setdefault(name, []).append(run(bottleneck, seed, options))
                write(options.output, report(found, options))
    print("\n".join(report(found, options)))


def run(bottleneck: str, seed: int, options: argparse.Namespace) -> dict:
    flags = ["--dataset", *options.dataset, "--data-dir", options.data_dir, "--bottleneck", *bottleneck.split()]
    flags += ["--max-steps", str(options.steps), "--epochs", "10000", "--batch-size", str(options.batch_size)]
    flags += ["--precision", options.precision, "--seed", str(seed), "--optimizer", "muon"]
    flags += ["--validation", "test"]  # nothing is chosen
    if bottleneck.startswith(("gumbel", "categorical")):
        # with a weight of 1 on the KL term, such a posterior stays nearly uniform for longer than these runs last
        flags += ["--kl-weight", "0.01"]
    slug = "".join(c if c.isalnum() else "-" for c in bottleneck)
    return row_of(Path(options.logs) / f"{slug}-seed{seed}", flags, plot_dir=options.plots)


def report(found: dict[str, list[dict]], options: argparse.Namespace) -> list[str]:
    """The lines of the report on the runs finished so far."""
    rows = [row for of_name in found.values() for row in of_name]
    facts = {
        "dataset": " ".join(options.dataset),
        "data": rows[0]["note"] or "as published",
        "hardware": hardware_of(rows),
    }
    lines = [INTRODUCTION.format(rate=Config.lr, **(vars(options) | facts))]
    for title, names in (("The same rate", SAME_RATE), ("Larger codebooks", LARGE)):
        if shown := [cells(name, found[name]) for name in names if name in found]:
            lines += [f"## {title}", "", *table(COLUMNS, shown), ""]
    return lines[:-1]


def cells(name: str, rows: list[dict]) -> tuple[str, ...]:
    """The table cells of one bottleneck, given its row for each seed."""

    def spread(key: str, digits: int, factor: float = 1.0) -> str:
        values = [factor * row[key] for row in rows]
        mean = sum(values) / len(values)
        if len(values) == 1:
            error = factor * rows[0][f"{key}_se"] if f"{key}_se" in rows[0] else None
        else:
            error = standard_error(values)
        return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    codes = rows[0]["codes_per_image"]
    share = [row["active_codes"] / row["codebook_size"] for row in rows]
    return (
        name,
        f"{codes * rows[0]['uniform_bits_per_code']:.0f}",
        spread("mse", 3, 1000),
        spread("psnr", 2),
        spread("perplexity", 0),
        f"{100 * sum(share) / len(share):.1f}%",
        f"{sum(row['images_per_s'] for row in rows) / len(rows):.0f}",
        ", ".join(str(row["seed"]) for row in rows),
    )


if __name__ == "__main__":
    main()
