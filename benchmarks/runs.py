"""Train, evaluate and plot one run with the commands that a user types; return its held-out metrics as a table row."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hardware import commit

from vqvae import cli
from vqvae.commands import train, visualize
from vqvae.runs import LOG, read_metrics


def command_line(
    about: str, *, steps: int, batch_size: int, seeds: tuple[int, str], output: str
) -> argparse.ArgumentParser:
    """The flags of a benchmark that trains; `seeds` is the default number and its help text."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", default="data", help="folder of the data's files")
    add("--steps", type=int, default=steps, help=f"training steps (default: {steps:,})")
    add("--batch-size", type=int, default=batch_size, help=f"images per step (default: {batch_size})")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="precision of training; evaluation is in fp32")
    add("--seeds", type=int, default=seeds[0], help=seeds[1])
    add("--logs", default="logs", help="folder of the runs (default: logs)")
    add("--plots", default="plots", help="folder of the plots (default: plots)")
    add("--output", default=output, help=f"Markdown file to write (default: {output})")
    return parser


def row_of(folder: Path, flags: list[str], *, plot_dir: str, iw_samples: int = 1, plots: bool = False) -> dict:
    """The held-out metrics of the run in `folder`.

    Trains the run with these flags of train.py, unless a previous call has stored its row.
    """
    stored = folder / "row.json"
    if not stored.exists():
        start = time.perf_counter()
        _call(train.main, [*flags, "--name", folder.name, "--log-dir", str(folder.parent), "--plot-dir", plot_dir])
        seconds = time.perf_counter() - start
        checkpoint = str(folder / "checkpoint.pt")
        _call(train.main, ["--evaluate", "--checkpoint", checkpoint, "--iw-samples", str(iw_samples)])
        if plots:
            _call(visualize.main, ["--checkpoint", checkpoint])
        log = read_metrics(folder / LOG)
        speeds = [entry["images_per_s"] for entry in log if entry["kind"] == "epoch"]
        row = json.loads((folder / "evaluation.json").read_text())
        row |= {"images_per_s": sum(speeds) / len(speeds), "seconds": seconds, "commit": commit()}
        stored.write_text(json.dumps(row, indent=2) + "\n")
    return json.loads(stored.read_text())


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def write(path: str, lines: list[str]) -> None:
    """Write lines to a file in a folder that may not exist yet."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")


def _call(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Run a command of vqvae; exit with its code if it fails."""
    if code := cli.run(main, argv):
        sys.exit(code)
