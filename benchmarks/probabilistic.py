"""The ten probabilistic experiments on binarised MNIST, trained alike and judged by one evaluator.

    python benchmarks/probabilistic.py --data-dir data --steps 10000 --batch-size 128

Each run is a preset of train.py with steps, batch and seed of this command; flows that start late start half-way. The
controls are presets with one flag changed. Writes results/probabilistic.md. A run that is done is not repeated, so an
interrupted command goes on where it was.
"""

import argparse
from pathlib import Path

from hardware import describe
from runs import command_line, row_of, table

EXPERIMENTS = ["1", "2.1", "2.2", "2.3", "2.4", "2.5", "3", "4.1", "4.2.1", "4.2.2"]
LATE = {"2.5", "4.2.1", "4.2.2"}
CONTROLS = ["2.1 --beta 0.05", "2.3 --entropy-scale 0", "2.4 --entropy-scale 0"]  # which of two changes did it
RUNS = EXPERIMENTS + CONTROLS
SEEDS = {"1": 2, "2.1": 3, "2.2": 3, "2.3": 3, "3": 2, "2.3 --entropy-scale 0": 3}  # the others run once
INTRODUCTION = """# The ten probabilistic experiments on binarised MNIST

MNIST, binarised at 0.5; {steps:,} steps at batch {batch_size} each, nets in {precision}; flows that start late start at
step {half:,}. Held out, in fp32: the 10,000 test images, nats per image, one hard draw of the codes; prior and log q
are summed over the 10 latents. IW is the importance-weighted bound with {iw_samples} draws; a point posterior has but
one, and its bound is its -ELBO. ± one standard error over images. The last rows are controls, experiments with one flag
changed. Hardware: {on}.
"""
COLUMNS = (
    "experiment",
    "seed",
    "-ELBO",
    "IW bound",
    "reconstruction",
    "-log p(z)",
    "log q",
    "active codes",
    "images/s",
    "seconds",
    "commit",
)


def main() -> None:
    cli = command_line(__doc__, steps=10_000, batch_size=128, seeds=(3, "at most; most experiments run once"))
    cli.add_argument("--iw-samples", type=int, default=100)
    cli.add_argument("--only", nargs="+", default=RUNS, choices=RUNS, metavar="RUN", help="of " + "; ".join(RUNS))
    options = cli.parse_args()
    rows = []
    for seed in range(options.seeds):
        for experiment in options.only:
            if seed < SEEDS.get(experiment, 1):
                rows.append({"experiment": experiment} | run(experiment, seed, options))
                write(rows, options)


def run(experiment: str, seed: int, options: argparse.Namespace) -> dict:
    name, *change = experiment.split()
    flags = {
        "--preset": f"probabilistic-{name}",
        "--seed": seed,
        "--max-steps": options.steps,
        "--epochs": 10_000,
        "--batch-size": options.batch_size,
        "--precision": options.precision,
        "--data-dir": options.data_dir,
    } | dict(zip(change[::2], change[1::2], strict=True))
    if name in LATE:
        flags["--iaf-startup-steps"] = options.steps // 2
    folder = Path(options.logs) / f"probabilistic-{'-'.join((name, *change))}-seed{seed}"
    return row_of(folder, flags, plots=options.plots, iw_samples=options.iw_samples, figures=True)


def write(rows: list[dict], options: argparse.Namespace) -> None:
    cells = [
        (
            r["experiment"],
            str(r["seed"]),
            f"{r['neg_elbo']:.2f} ± {r['neg_elbo_se']:.2f}",
            f"{r['iw_bound']:.2f} ± {r['iw_bound_se']:.2f}",
            f"{r['reconstruction_nats']:.2f}",
            f"{r['prior_nats']:.2f}",
            f"{0 - r['entropy']:.2f}",
            f"{r['active_codes']} of 64",
            f"{r['images_per_s']:.0f}",
            f"{r['seconds']:.0f}",
            r["commit"],
        )
        for r in sorted(rows, key=lambda r: (RUNS.index(r["experiment"]), r["seed"]))
    ]
    introduction = INTRODUCTION.format(half=options.steps // 2, on=describe(), **vars(options))
    lines = [introduction, *table(COLUMNS, cells)]
    Path("results/probabilistic.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
