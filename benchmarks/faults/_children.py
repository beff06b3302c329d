"""Helpers of several sections: scripts of this package in forked processes, and incomplete files."""

import json
import os
import runpy
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

import vqvae

ROOT = Path(vqvae.__file__).parent.parent


def run_script(script: str, words: list[str]) -> None:
    """Run train.py, visualize_codes.py or the program `vqvae` in this process, as if it had been started."""
    sys.argv = [script, *words]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__")


def end_with(action: Callable[[], None]) -> NoReturn:
    """End a forked process with the exit code of a script, and never return into the code of its parent."""
    code: Any = 1
    try:
        action()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            code = 120  # as Python does
        os._exit(code)


def parts(folder: Path) -> str:
    """The first temporary or incomplete file below a folder, and its problem; empty if there is none."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.name.endswith(".partial") or path.name.startswith(".writable"):
                return f"{path.relative_to(folder)} stayed"
            if not path.is_file():
                continue
            if path.suffix in (".png", ".gif"):
                Image.open(path).load()
            elif path.suffix in (".npz", ".pt", ".pt2"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip():
                        return f"{path.relative_to(folder)} is damaged"
            elif path.suffix in (".json", ".jsonl"):
                for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                    json.loads(text)
        except Exception as problem:
            return f"{path.relative_to(folder)} cannot be read ({problem})"
    return ""
