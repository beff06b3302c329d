"""Train, evaluate and plot one run with the commands that a user types; return its held-out metrics as a table row.

A row is stored in the run's folder, whose name ends in a hash of everything that determines it: all settings, the data,
and the version of this package. So rows of other settings or data are never mistaken for it.
"""

import argparse
import hashlib
import json
import math
import resource
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hardware import commit, describe

from vqvae import __version__, cli, experiment, load, run_data
from vqvae.checkpoint import weights_checksum
from vqvae.commands import train, visualize
from vqvae.compare import training_seconds
from vqvae.config import PATHS, TEST, add_flags, configure
from vqvae.devices import choose_device
from vqvae.files import write_json, write_text
from vqvae.runs import LAST, LOG, Lock, read_metrics


def command_line(
    about: str, *, rows: Collection[str], steps: int, batch_size: int, seeds: tuple[int, str] | None, output: str
) -> argparse.ArgumentParser:
    """The flags of a benchmark that trains; `seeds` is the default number and its help text, or None for one seed.

    `output` is the tracked file with the published results, which is only written if it is named.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", default="data", help="folder of the data's files")
    add("--steps", type=int, default=steps, help=f"training steps (default: {steps:,})")
    add("--batch-size", type=int, default=batch_size, help=f"images per step (default: {batch_size})")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="precision of training; evaluation is in fp32")
    if seeds:
        add("--seeds", type=int, default=seeds[0], help=seeds[1])
    add("--only", nargs="+", default=tuple(rows), choices=rows, metavar="ROW", help=f"only these of: {'; '.join(rows)}")
    add("--logs", default="logs", help="folder of the runs (default: logs)")
    add("--plots", default="plots", help="folder of the plots (default: plots)")
    add("--output", help=f"Markdown file to write after every run, such as {output} (default: print at the end)")
    return parser


def key_of(settings: Mapping[str, Any]) -> str:
    """A hash of settings and the version of this package: ten hexadecimal digits."""
    text = json.dumps({**settings, "version": __version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def settings_of(flags: list[str]) -> dict[str, Any]:
    """All settings of a run, defaults included, and the checksums of its data, from its flags of train.py."""
    parser = cli.parser("", "")
    add_flags(parser)
    given = vars(parser.parse_args(flags))
    config = configure(given, experiment.how_it_starts(given, None, Lock()), experiment.SLOTS)
    settings = {name: value for name, value in config.to_dict().items() if name not in (*PATHS, "name")}
    settings["device"] = choose_device(config.device).type
    settings["optimizer"] = experiment.choose_optimizer(config)  # `auto` may mean another one some day
    for name in ("init_from", "checkpoint"):
        if path := getattr(config, name):  # whatever its folder is called
            settings[name] = weights_checksum(load(path))
    if config.validation == TEST:
        del settings["validation"]  # rows of runs that hold out no training images keep their hash
    return settings | {"data": run_data.identity(run_data.load(config))}


def steps_of(settings: Mapping[str, Any]) -> int:
    """How many updates a run with these settings takes."""
    steps = settings["epochs"] * (settings["data"]["examples"]["train"] // settings["batch_size"])
    return min(steps, settings["max_steps"] or steps)


def row_of(
    folder: Path,
    flags: list[str],
    *,
    plot_dir: str,
    iw_samples: int = 1,
    plots: bool = False,
    asked: Sequence[str] = (),
) -> dict:
    """The held-out metrics of the run with these flags of train.py, in `<folder>-<hash>`.

    `asked` are further flags of `--evaluate`, such as `--metrics lite0`.
    Trains the run, or resumes an interrupted one, unless a previous call has stored its row.
    """
    settings = settings_of(flags) | {"iw_samples": iw_samples} | ({"asked": list(asked)} if asked else {})
    key = key_of(settings)
    run = folder.with_name(f"{folder.name}-{key}")
    stored, checkpoint = run / "row.json", run / LAST
    if stored.exists():
        row = json.loads(stored.read_text())
        if row["key"] == key:
            return row
    if not checkpoint.exists():
        flags = [*flags, "--name", run.name, "--log-dir", str(run.parent), "--plot-dir", plot_dir]
        _call(train.main, flags)
    elif experiment.checkpoint.read(run)["step"] < steps_of(settings):
        _call(train.main, ["--resume", str(run), "--plot-dir", plot_dir])
    _call(train.main, ["--evaluate", "--checkpoint", str(checkpoint), "--iw-samples", str(iw_samples), *asked])
    if plots:
        _call(visualize.main, ["--checkpoint", str(checkpoint), "--plot-dir", plot_dir])
    epochs = [entry for entry in read_metrics(run / LOG) if entry["kind"] == "epoch"]
    row = json.loads((run / "evaluation.json").read_text())
    row |= {
        "images_per_s": sum(entry["images_per_s"] for entry in epochs) / len(epochs),
        "seconds": training_seconds(epochs, row["step"], settings["batch_size"]),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # of this process, so far
        "commit": commit(),
        "hardware": describe(settings["device"]),
        "key": key,
        "settings": settings,
    }
    write_json(stored, row)
    return row


def hardware_of(rows: list[dict]) -> str:
    """The machines that rows were measured on."""
    return "; ".join(sorted({row["hardware"] for row in rows}))


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def write(path: str | None, lines: list[str]) -> None:
    """Write lines to a file, if one is named."""
    if path is not None:
        write_text(Path(path), "\n".join(lines) + "\n")


def _call(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Run a command of vqvae; exit with its code if it fails."""
    if code := cli.run(main, argv):
        sys.exit(code)
