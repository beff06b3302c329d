#!/usr/bin/env python3
"""The gain of averaged weights and of gradient clipping over the default, as a Markdown table.

  python benchmarks/endings.py --data-dir data --precision bf16 --output results/endings.md

Every run is `train.py --dataset cifar10` with one change. A gain is the difference to the run of the same seed without
the change. An option should be on by default only where the mean gain is more than two standard errors above 0.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runs import command_line, hardware_of, row_of, standard_error, table, write


class Ending(NamedTuple):
    flags: str
    than: str | None = None  # the run that it is compared with


RUNS = {
    "default": Ending(""),
    "averaged": Ending("--ema-weights 0.999", "default"),
    "clipped": Ending("--clip 1", "default"),
    "constant": Ending("--lr 3e-4", "default"),
    "constant-averaged": Ending("--lr 3e-4 --ema-weights 0.999", "constant"),
}
COLUMNS = ("run", "flags", "MSE / variance of each seed", "mean", "compared with", "gain", "gain / s.e.")
Rows = dict[str, dict[int, dict]]  # by name and seed


def main() -> None:
    parser = command_line(
        __doc__,
        rows=RUNS,
        steps=2000,
        batch_size=32,
        seeds=(3, "seeds (default: 3)"),
        output="results/endings.md",
    )
    options = parser.parse_args()
    flags = ["--dataset", "cifar10", "--data-dir", options.data_dir, "--validation", "test", "--epochs", "10000"]
    flags += ["--max-steps", str(options.steps), "--batch-size", str(options.batch_size)]
    flags += ["--precision", options.precision]
    rows: Rows = {name: {} for name in options.only}
    for seed in range(options.seeds):
        for name in options.only:
            folder = Path(options.logs) / f"endings-{name}-seed{seed}"
            own = ["--seed", str(seed), *RUNS[name].flags.split()]
            rows[name][seed] = row_of(folder, flags + own, plot_dir=options.plots)
            write(options.output, report(rows, options))
    print("\n".join(report(rows, options)))


def report(rows: Rows, options: argparse.Namespace) -> list[str]:
    """The lines of the report on the runs finished so far."""
    cells = []
    for name, found in rows.items():
        errors = {seed: row["nmse"] for seed, row in found.items()}
        how, than = RUNS[name]
        base = {seed: row["nmse"] for seed, row in rows.get(than or "", {}).items()}
        gains = [base[seed] - error for seed, error in errors.items() if seed in base]
        each = ", ".join(f"{error:.5f}" for error in errors.values())
        shown = f"`{how}`" if how else ""
        cells.append((name, shown, each, mean(list(errors.values())), than or "", *of(gains)))
    done = [row for found in rows.values() for row in found.values()]
    return [
        "# Averaged weights and gradient clipping",
        "",
        f"Written by `benchmarks/endings.py` on {hardware_of(done)}. CIFAR-10"
        + (" (files differ from the published ones)" if any(row["note"] for row in done) else "")
        + f", {options.steps:,} steps at batch {options.batch_size}, {options.precision}; MSE / variance of the test",
        "split after the last step; ± is one standard error over seeds. A gain is the mean difference to the run of "
        "the same seed.",
        "",
        *table(COLUMNS, cells),
    ]


def mean(values: Sequence[float]) -> str:
    """The mean, and its standard error where there is one."""
    if len(values) < 2:
        return f"{values[0]:.5f}" if values else ""
    return f"{statistics.mean(values):.5f} ± {standard_error(values):.5f}"


def of(gains: Sequence[float]) -> tuple[str, str]:
    """The last two cells of a row: the mean gain, and the gain divided by its standard error."""
    error = standard_error(gains) if len(gains) > 1 else 0.0
    return mean(gains), f"{statistics.mean(gains) / error:.1f}" if error else ""


if __name__ == "__main__":
    main()
