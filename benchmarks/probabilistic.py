#!/usr/bin/env python3
"""Train the ten probabilistic experiments on binarized MNIST alike, and evaluate them alike.

  python benchmarks/probabilistic.py --data-dir data --steps 10000 --batch-size 128

Each run is a preset of train.py with this command's steps, batch size and seed. Flows that start late start after half
of the steps. A control is a preset with one option changed. Finished runs with the same settings, data and version of
the package are not repeated, and interrupted ones are resumed. The table is printed; --output also writes it after
every run.
"""

import argparse
from pathlib import Path

from runs import command_line, hardware_of, row_of, table, write

EXPERIMENTS = ("1", "2.1", "2.2", "2.3", "2.4", "2.5", "3", "4.1", "4.2.1", "4.2.2")
LATE = {"2.5", "4.2.1", "4.2.2"}
NO_ENTROPY = ["--objective", "probabilistic", "entropy_scale=0"]
UNBIASED = ["--bottleneck", "categorical", "estimator=rloo", "num_samples=4"]  # each sample is decoded
CONTROLS = {  # name: the flags added to the experiment's; they separate the effects of two changes
    "2.1 beta=0.05": ["--beta", "0.05"],
    "2.3 entropy_scale=0": NO_ENTROPY,
    "2.4 entropy_scale=0": NO_ENTROPY,
    "2.3 rloo": UNBIASED,
    "2.3 rloo entropy_scale=0": UNBIASED + NO_ENTROPY,
}
RUNS = (*EXPERIMENTS, *CONTROLS)
SEEDS = {"1": 2, "3": 2} | dict.fromkeys(  # the others run once
    ("2.1", "2.2", "2.3", "2.3 entropy_scale=0", "2.3 rloo", "2.3 rloo entropy_scale=0"), 3
)
INTRODUCTION = """# The ten probabilistic experiments on binarized MNIST

MNIST, binarized at 0.5; {steps:,} steps at batch {batch_size}, nets in {precision}. Flows that start late start at step
{half:,}. Metrics are computed in fp32 on the 10,000 test images, in nats per image, with one hard draw of the codes.
-log p(z) and log q are summed over the 10 latents. The IW bound is the importance-weighted bound with {iw_samples}
draws; where the posterior is one code, it equals the -ELBO. ± is one standard error over images. The last rows are
controls: experiments with one or two options changed; rloo is `estimator=rloo` with four samples. Hardware: {hardware}.
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
    parser = command_line(
        __doc__,
        rows=RUNS,
        steps=10_000,
        batch_size=128,
        seeds=(3, "largest number of seeds of an experiment (default: 3); most experiments run once"),
        output="results/probabilistic.md",
    )
    parser.add_argument("--iw-samples", type=int, default=100, help="draws for the IW bound (default: 100)")
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        for name in options.only:
            if seed < SEEDS.get(name, 1):
                rows.append({"experiment": name} | run(name, seed, options))
                write(options.output, report(rows, options))
    print("\n".join(report(rows, options)))


def run(name: str, seed: int, options: argparse.Namespace) -> dict:
    experiment = name.split()[0]
    flags = ["--preset", f"probabilistic-{experiment}", "--data-dir", options.data_dir, "--seed", str(seed)]
    flags += ["--max-steps", str(options.steps), "--epochs", "10000", "--batch-size", str(options.batch_size)]
    flags += ["--precision", options.precision, *CONTROLS.get(name, [])]
    if experiment in LATE:  # the preset has the same objective, so this option is added to its options
        flags += ["--objective", "probabilistic", f"iaf_startup_steps={options.steps // 2}"]
    folder = Path(options.logs) / f"probabilistic-{name.replace(' ', '-')}-seed{seed}"
    return row_of(folder, flags, plot_dir=options.plots, iw_samples=options.iw_samples, plots=True)


def report(rows: list[dict], options: argparse.Namespace) -> list[str]:
    """The lines of the report on the runs finished so far."""
    cells = [
        (
            r["experiment"],
            str(r["seed"]),
            f"{r['neg_elbo']:.2f} ± {r['neg_elbo_se']:.2f}",
            f"{r['iw_bound']:.2f} ± {r['iw_bound_se']:.2f}",
            f"{r['reconstruction_nats']:.2f}",
            f"{r['prior_nats']:.2f}",
            f"{0 - r['entropy']:.2f}",
            f"{r['active_codes']} of {r['codebook_size']}",
            f"{r['images_per_s']:.0f}",
            f"{r['seconds']:.0f}",
            r["commit"],
        )
        for r in sorted(rows, key=lambda r: (RUNS.index(r["experiment"]), r["seed"]))
    ]
    introduction = INTRODUCTION.format(half=options.steps // 2, hardware=hardware_of(rows), **vars(options))
    return [introduction, *table(COLUMNS, cells)]


if __name__ == "__main__":
    main()
