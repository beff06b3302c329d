#!/usr/bin/env python3
"""Count the code that a maintainer must read: lines, long functions, files that a batch and a plot pass through.

Runs the two scripts: one training step of the default model on digits, then the plot code_visualization.png. A file
counts as entered when one of its functions is called, by the loop's train_step or by the command that draws the plot.

  python benchmarks/entered.py [--tree PATH]
"""

import argparse
import ast
import contextlib
import importlib
import io
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLOT = "code_visualization.png"
TRAIN = "--dataset digits --epochs 1 --max-steps 1 --device cpu --name run"
DRAW = f"--checkpoint logs/run/checkpoint.pt --only {PLOT} --device cpu"


def source_files(tree: Path) -> dict[str, Path]:
    """The package and its two scripts; files by their path relative to the tree."""
    paths = [*sorted((tree / "vqvae").rglob("*.py")), tree / "train.py", tree / "visualize_codes.py"]
    return {str(path.relative_to(tree)): path for path in paths}


@contextlib.contextmanager
def recording(entered: set[str]) -> Iterator[None]:
    """Add the file of every Python function called in this thread."""

    def record(frame, event: str, argument: object) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    sys.setprofile(record)
    try:
        yield
    finally:
        sys.setprofile(None)


def files_entered(tree: Path) -> dict[str, list[str]]:
    """The tree's files that a training step and a plot enter."""
    sys.path.insert(0, str(tree))
    # runpy, because only the scripts have the same place and flags in every tree
    train, visualize = (runpy.run_path(str(tree / name))["main"] for name in ("train.py", "visualize_codes.py"))
    loop = importlib.import_module("vqvae.training").Loop
    take_step = loop.train_step
    step: set[str] = set()
    plot: set[str] = set()

    def recorded_step(self, index):
        with recording(step):
            return take_step(self, index)

    loop.train_step = recorded_step
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(TRAIN.split())
        visualize(DRAW.split())  # imports modules, which would count as calls
        with recording(plot):
            visualize(DRAW.split())
    files = source_files(tree)
    called = {"a training step": step, PLOT: plot}
    return {what: [name for name, path in files.items() if str(path) in names] for what, names in called.items()}


def longest_functions(tree: Path, count: int) -> list[tuple[int, str, str]]:
    """Lines, name and file of the longest functions."""
    functions = [
        (node.end_lineno - node.lineno + 1, node.name, name)
        for name, path in source_files(tree).items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    return sorted(functions, reverse=True)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", default=ROOT, help="checkout to measure, also of an older layout (default: this one)")
    tree = Path(parser.parse_args().tree).resolve()
    lines = {name: len(path.read_text().splitlines()) for name, path in source_files(tree).items()}
    print(f"{sum(lines.values()):,} lines in {len(lines)} files: vqvae/ and the two scripts")
    print("longest functions")
    for length, name, file in longest_functions(tree, 5):
        print(f"  {length:4} lines  {name}  {file}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for what, files in files_entered(tree).items():
            print(f"{what} enters {len(files)} files of {sum(lines[name] for name in files):,} lines")
            print("\n".join(f"  {name}" for name in files))
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
