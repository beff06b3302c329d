#!/usr/bin/env python3
"""Break runs, files and inputs on purpose, and count what survives.

  python benchmarks/faults.py                        every section
  python benchmarks/faults.py stops disk --trials 50

Each section is a module in benchmarks/faults/ whose docstring says what a trial does and what it means to survive.
Prints `survived S of N` per section; exits with 1 if any trial was lost. Every trial works in a temporary folder.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).with_suffix("")
sys.path.insert(0, str(FOLDER))  # sections import what they share
SECTIONS = {path.stem: path for path in sorted(FOLDER.glob("[a-z]*.py"))}


def load(name: str):
    """The module of a section. A plain import would fail, because this file has the same name as the folder."""
    spec = importlib.util.spec_from_file_location(f"faults_{name}", SECTIONS[name])
    if spec is None or spec.loader is None:
        raise SystemExit(f"{SECTIONS[name]}: cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    cli.add_argument("--trials", type=int, default=20, help="trials per section (default: 20)")
    args = cli.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        cli.error(f"no section {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    lost, here = 0, os.getcwd()
    for name in args.sections or SECTIONS:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            survived, total = load(name).run(args.trials, Path(folder))
            os.chdir(here)  # a section may end in its folder, which is removed now
        lost += total - survived
        print(f"{name:14} survived {survived} of {total}   ({time.perf_counter() - started:.0f} s)", flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
