"""Outputs that are whole or absent, and never replace the contents of a folder."""

import contextlib
import errno
import io
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vqvae.errors import OptionError, UserError, one_line

NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}  # full disk, limit of a file's size, quota
WINDOWS = os.name == "nt"
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds between the attempts to replace a file that is open


class NotWritten(UserError):
    """A file or folder that cannot be written."""


@contextlib.contextmanager
def whole_file(path: Path, *, resumable: bool = False) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` when the block ends without an error; until then the old one stays.

    The bytes go to a temporary file of this process in the same folder. It is opened at once, so that a name that
    cannot be written raises `UserError` before the work rather than after. After a failed write, any exception of the
    block becomes a `UserError`, because libraries replace the write error. Other errors leave the block unchanged.

    With `resumable`, the block continues the temporary file if there is one, and an interrupt keeps that file.
    """
    partial = partial_of(path)
    raw, kept = None, False
    try:
        with writing(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = _Raw(partial, "r+b" if resumable and partial.exists() else "wb")
        with _Buffered(raw) as file:
            yield file
            with writing(path):
                file.flush()
                os.fsync(raw.fileno())
        with writing(path):
            replace(partial, path)
            _sync_folder(path.parent)
    except Exception:
        if raw and raw.failure:
            raise cannot_write(path, raw.failure) from None
        raise
    except BaseException:
        kept = resumable
        raise
    finally:
        if not kept:
            with contextlib.suppress(OSError):
                partial.unlink()


def partial_of(path: Path) -> Path:
    """The temporary file of this process for a file."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def replace(source: Path, target: Path) -> None:
    """Rename a file, also over another one. Windows refuses while a program has either file open: wait and retry."""
    for pause in PAUSES if WINDOWS else ():
        try:
            return os.replace(source, target)
        except PermissionError:  # a virus scanner, or a reader of a checkpoint
            time.sleep(pause)
    os.replace(source, target)


def remove_parts(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that killed processes left for files with this name (a pattern)."""
    for path in folder.glob(f"{name}.*.partial"):
        with contextlib.suppress(OSError):
            path.unlink()


class _Raw(io.FileIO):
    """A file that remembers the first error of writing it."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        return self._try(super().write, data)

    def truncate(self, size: int | None = None, /) -> int:
        return self._try(super().truncate, size)

    def _try(self, action: Callable[[Any], int], value: Any) -> int:
        if self.failure:
            raise self.failure  # not again: `close` would append to what is incomplete
        try:
            return action(value)
        except OSError as problem:
            self.failure = problem
            raise


class _Buffered(io.BufferedWriter):
    """Without a file number, so that no library writes past `_Raw`."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an `OSError` of the block a `UserError`: `path` cannot be written."""
    try:
        yield
    except OSError as problem:
        raise cannot_write(path, problem) from None


def append(path: Path, text: str) -> None:
    """Add UTF-8 text to the end of a file, all of it or nothing."""
    with writing(path), open(path, "ab", buffering=0) as file:
        before, data = file.tell(), text.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


@contextlib.contextmanager
def emptied_if_not_written(folder: Path) -> Iterator[None]:
    """Empty a folder, which was empty before, if the block is interrupted or cannot write a file in it."""
    try:
        yield
    except (NotWritten, OSError, KeyboardInterrupt):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


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
        raise OptionError(option, folder, f"cannot write there ({one_line(problem)})") from None
    return folder


def claim_empty(folder: Path) -> Path:
    """Make a folder; raises `UserError` if it contains anything or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty, and nothing is overwritten; name a new folder")
    except OSError as problem:
        raise cannot_write(folder, problem) from None
    return folder


def cannot_write(path: Path, problem: Exception) -> NotWritten:
    way_out = "free some space, or name another place" if _no_room(problem) else "name another place"
    if WINDOWS and isinstance(problem, PermissionError):
        way_out = "close the programs that have it open, or name another place"
    return NotWritten(f"{path}: cannot be written ({one_line(problem)}); {way_out}")


def _no_room(problem: Exception) -> bool:
    return isinstance(problem, OSError) and problem.errno in NO_ROOM


def failed_line(problem: OSError) -> str:
    """The message of an `OSError` that nothing else has explained: which file, and why."""
    names = [os.fsdecode(name) for name in (problem.filename, problem.filename2) if isinstance(name, str | bytes)]
    where = " -> ".join(names) or "the output or a file"
    if _no_room(problem) or problem.errno == errno.EROFS:
        return str(cannot_write(Path(where), problem))
    return f"{where}: cannot be read or written ({one_line(problem)})"


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on systems that let folders be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(path: Path, most: int) -> Any:
    """The content of a JSON file of at most `most` bytes. Raises OSError, ValueError or RecursionError."""
    with open_file(path) as file:
        return json.loads(file.read(most).decode())


def size_of(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading. Raises `OSError` for named pipes, devices, sockets and folders, which stay unopened."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    # a pipe that takes the file's place right now must not block
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file
