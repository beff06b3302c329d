"""Train, evaluate and draw one run as a person would, once; its held-out figures as a row for a table."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the two scripts are no part of what is installed
import train
import visualize_codes


def command_line(about: str, *, steps: int, batch_size: int, seeds: tuple[int, str]) -> argparse.ArgumentParser:
    """What benchmarks that train ask for; `seeds` says how many, of what."""
    cli = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--data-dir", default="data")
    cli.add_argument("--steps", type=int, default=steps)
    cli.add_argument("--batch-size", type=int, default=batch_size)
    cli.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of training; evaluation is in fp32")
    cli.add_argument("--seeds", type=int, default=seeds[0], help=seeds[1])
    cli.add_argument("--logs", default="logs")
    cli.add_argument("--plots", default="plots")
    return cli


def row_of(folder: Path, flags: dict, *, plots: str, iw_samples: int = 1, figures: bool = False) -> dict:
    """The figures of the run in `folder`, which is trained with these flags of train.py unless it is done already."""
    done = folder / "row.json"
    if not done.exists():
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        begun = time.perf_counter()
        flags = flags | {"--name": folder.name, "--log-dir": folder.parent, "--plot-dir": plots}
        _must(train.main([word for flag, value in flags.items() for word in (flag, *str(value).split())]))
        seconds = time.perf_counter() - begun
        checkpoint = str(folder / "checkpoint.pt")
        _must(train.main(["--evaluate", "--checkpoint", checkpoint, "--iw-samples", str(iw_samples)]))
        if figures:
            _must(visualize_codes.main(["--checkpoint", checkpoint]))
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        speeds = [entry["images_per_s"] for entry in log if entry["kind"] == "epoch"]
        row = json.loads((folder / "evaluation.json").read_text())
        row |= {"images_per_s": sum(speeds) / len(speeds), "seconds": seconds, "commit": commit}
        done.write_text(json.dumps(row, indent=2) + "\n")
    return json.loads(done.read_text())


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of Markdown."""
    return [
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def _must(code: int) -> None:
    if code:
        sys.exit(code)
