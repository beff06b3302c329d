"""`vqvae compare`: several runs in one table."""

import argparse
import sys
from pathlib import Path
from typing import Literal, get_args

from vqvae import cli, compare
from vqvae.commands import path
from vqvae.errors import counted
from vqvae.metrics import explained

EXAMPLES = f"""
examples
  vqvae compare logs/vqvae-mnist logs/vqvae-mnist-2
  vqvae compare logs/* --sort mse
  vqvae compare logs/a logs/b/best.pt --format markdown --output table.md

columns
{chr(10).join(explained({column.name: column.explanation for column in compare.COLUMNS}))}

Metrics come from the evaluation.json next to the checkpoint if it is of the checkpoint's weights (`vqvae train
--evaluate` writes it). Otherwise they are those of the last epoch in metrics.jsonl, and the run is marked with *.
Columns that no run has a value for may be left out.

Runs that cannot be read are named and left out. If the runs' data differ, a warning says that their metrics are not
comparable.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.parser("Print several runs in one table.", EXAMPLES, prog="vqvae compare")
    add = parser.add_argument
    help = "folder of a run, checkpoint, or exported folder"
    add("runs", metavar="RUN", nargs="+", type=path(""), help=help)
    forms = get_args(compare.Format)
    form = cli.value("format", compare.Format)
    add("--format", metavar=f"{{{','.join(forms)}}}", type=form, default="text", help="table format (default: text)")
    names = tuple(column.name for column in compare.COLUMNS)
    column = cli.value("sort", Literal[names])
    help = "sort by a column, the best or smallest first (default: as named)"
    add("--sort", metavar="COLUMN", type=column, help=help)
    add("--output", metavar="FILE", type=path("output", "file"), help="write the table to this file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    from vqvae import files

    rows = compare.compare(options.runs)
    if options.sort:
        rows = compare.sort(rows, options.sort)
    text = compare.table(rows, options.format)
    if options.output is None:
        print(_encodable(text, sys.stdout.encoding or "utf-8"))
    else:
        files.write_text(Path(options.output), text + "\n")
        print(f"{options.output}: {counted(len(rows), 'run')}")
    return 0


def _encodable(text: str, encoding: str) -> str:
    """The text, or its ASCII form if the terminal's encoding lacks a character."""
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return text.replace("±", "+-").encode("ascii", "backslashreplace").decode()
