"""Outputs that are whole or absent, and never replace the contents of a folder."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vqvae.errors import OptionError, UserError, one_line


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` when the block ends without an error; until then the old one stays.

    The bytes go to a temporary file of this process beside `path`, opened at once: a name that cannot be written
    raises `UserError` before the work rather than after.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as problem:
        raise cannot_write(path, problem) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def make_folder(folder: Path, option: str) -> Path:
    """Make a folder that can be written to; raises `OptionError` for the option that chose it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise OptionError("", option, folder, f"cannot write there ({one_line(problem)})") from None
    return folder


def claim_empty(folder: Path) -> Path:
    """Make a folder; raises `UserError` if it holds anything or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty, and nothing is overwritten; name a new folder")
    except OSError as problem:
        raise cannot_write(folder, problem) from None
    return folder


def cannot_write(path: Path, problem: Exception) -> UserError:
    return UserError(f"{path}: cannot be written ({one_line(problem)}); name another place")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on systems that let folders be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
