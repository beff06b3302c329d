"""Outputs that are whole or absent, and that never replace a folder's contents."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vqvae.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path` once the block has ended well; until then, what was there stays.

    It is opened at once, so that a name that cannot be written is refused before the work and not after.
    """
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; name a file in it, such as {path / 'codes.npz'}")
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as problem:
        raise cannot_write(path, problem) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def claim_empty(folder: Path) -> Path:
    """Make a folder; `UserError` if it holds anything already or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--output {folder}: is not empty, and nothing is overwritten; name a new folder")
    except OSError as problem:
        raise cannot_write(folder, problem) from None
    return folder


def cannot_write(path: Path, problem: OSError) -> UserError:
    return UserError(f"--output {path}: cannot be written ({problem.strerror or problem}); name another place")
