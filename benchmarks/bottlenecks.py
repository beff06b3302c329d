"""Every bottleneck with codes in the same nets, on the same batches, at the same bits per image and steps.

    python benchmarks/bottlenecks.py --dataset cifar10 --data-dir data --steps 2000

Sizes are chosen so that an image costs the same bits on an 8x8 grid of features (32x32 pixels). A second table grows
the codebook to see who collapses. Writes results/bottlenecks.md. A run that is done is not repeated, so an interrupted
command goes on where it was.
"""

import argparse
import math
from pathlib import Path

from hardware import describe
from runs import command_line, row_of, table

SAME_RATE = {  # name: the bottleneck, 64 positions x 9 bits, or as near as may be
    "vq, EMA": "vq",
    "vq, gradient": "vq codebook=gradient",
    "vq, EMA, rotation": "vq gradient=rotation",
    "vq, EMA, diversity": "vq diversity=0.1",
    "cosine": "cosine num_codes=512",
    "simvq": "simvq num_codes=512",
    "fsq": "fsq levels=8,8,8",
    "lfq": "lfq bits=9",
    "residual, 3 x 8": "residual quantisers=3 num_codes=8",
    "grouped, 3 x 8": "grouped groups=3 num_codes=8 code_dim=63",
    "hierarchy, 80 x 147": "hierarchy num_codes=147",
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
INTRODUCTION = """# Bottlenecks side by side

{dataset}, Sonnet's nets in {precision}, {steps:,} steps at batch {batch_size}, learning rate 3e-4, the same initial
nets and batches for every row of a seed. Held out, in fp32: the whole test split, likeliest codes; MSE of pictures in
[0, 1]. ± one standard error over seeds, or over images where there is one seed. bits/image: codes per image x log2 K.
Perplexity is the mean over levels, where a bottleneck has several. Data: {data}.
Hardware: {on}.
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
    cli = command_line(__doc__, steps=2000, batch_size=32, seeds=(2, "of the first table; the second has one"))
    cli.add_argument("--dataset", default="cifar10")
    options = cli.parse_args()
    found: dict[str, list[dict]] = {}
    for seed in range(options.seeds):
        for name, bottleneck in (SAME_RATE | (LARGE if seed == 0 else {})).items():
            found.setdefault(name, []).append(run(bottleneck, seed, options))
            write(found, options)


def run(bottleneck: str, seed: int, options: argparse.Namespace) -> dict:
    flags = {
        "--dataset": options.dataset,
        "--data-dir": options.data_dir,
        "--bottleneck": bottleneck,
        "--max-steps": options.steps,
        "--epochs": 10_000,
        "--batch-size": options.batch_size,
        "--precision": options.precision,
        "--seed": seed,
    }
    if bottleneck.startswith(("gumbel", "categorical")):
        # the bound's own weight on the rate leaves such a posterior near the uniform for longer than these runs last
        flags["--kl-weight"] = "0.01"
    slug = "".join(c if c.isalnum() else "-" for c in bottleneck)
    return row_of(Path(options.logs) / f"{slug}-seed{seed}", flags, plots=options.plots)


def write(found: dict[str, list[dict]], options: argparse.Namespace) -> None:
    lines = [
        INTRODUCTION.format(data=note(found), on=describe(), **vars(options)),
        "## The same rate",
        "",
        *table(COLUMNS, [cells(name, found[name]) for name in SAME_RATE if name in found]),
        "",
        "## Larger codebooks",
        "",
        *table(COLUMNS, [cells(name, found[name]) for name in LARGE if name in found]),
    ]
    Path("results/bottlenecks.md").write_text("\n".join(lines) + "\n")


def note(found: dict[str, list[dict]]) -> str:
    return next(iter(found.values()))[0]["note"] or "as published"


def cells(name: str, rows: list[dict]) -> tuple[str, ...]:
    def spread(key: str, digits: int, factor: float = 1.0) -> str:
        values = [factor * row[key] for row in rows]
        mean = sum(values) / len(values)
        if len(values) == 1:
            error = factor * rows[0][f"{key}_se"] if f"{key}_se" in rows[0] else None
        else:
            error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
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
