"""The files of the caches of images: an array and its index, or the parts and the journal of an unfinished conversion.

Any of them may be damaged, incomplete, or in use by another process. N images, C channels, H W pixels.
"""

import contextlib
import io
import json
import math
import os
import re
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vqvae.errors import UserError, one_line
from vqvae.files import WINDOWS, partial_of, replace, write_text

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None  # type: ignore[assignment]

BACKDATED = 10 * 10**9  # ns
UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of a damaged index
CACHE_FILE = re.compile(r"([0-9a-f]{24})\.(npy|json)(\.\d+\.partial)?")


def cache_folder() -> Path:
    """Where caches are: ~/.cache/vqvae, or below XDG_CACHE_HOME."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae"
    except RuntimeError as problem:
        raise UserError(f"no place for the cache of images ({one_line(problem)}); set XDG_CACHE_HOME") from None


# an array and its index


def header(shape: Sequence[int]) -> bytes:
    """The beginning of a .npy file `[N, C, H, W]` uint8."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return out.getvalue()


def read_index(path: Path) -> dict[str, Any]:
    """The content of an index. Raises any of `UNUSABLE`."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("checksum") != zlib.crc32(json.dumps(content).encode()):
        raise ValueError("damaged")
    return content


def write_index(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content | {"checksum": zlib.crc32(json.dumps(content).encode())}))


def is_whole(array: Path, content: dict[str, Any]) -> bool:
    """Whether an array has the images of its index. It is read only if it was written to, or copied, since."""
    start, size = header(content["shape"]), math.prod(content["shape"][1:])
    status = array.stat()
    if status.st_size != len(start) + content["shape"][0] * size:
        return False
    if status.st_mtime_ns == content["written"]:
        return True
    sums = content["sums"] + [zlib.crc32(bytes(size))] * (content["shape"][0] - len(content["sums"]))
    with open(array, "rb") as file:
        whole = file.read(len(start)) == start and all(zlib.crc32(file.read(size)) == known for known in sums)
    if whole:
        with contextlib.suppress(OSError):
            os.utime(array, ns=(content["written"], content["written"]))
    return whole


def backdate(out: BinaryIO) -> int:
    """Give an array a modification time in the past, unlike that of any later write; returns it, in ns."""
    out.flush()
    moment = time.time_ns() - BACKDATED
    with contextlib.suppress(OSError):
        os.utime(out.name, ns=(moment, moment))
    return os.stat(out.name).st_mtime_ns


def mapped(array: Path) -> np.ndarray:
    """The array of a cache, `[N, C, H, W]` uint8. No process removes the cache while the array exists.

    Copy-on-write: PyTorch expects writable memory, and the file must stay unchanged.
    """
    images = np.load(array, mmap_mode="c")
    file = open(array, "rb")  # noqa: SIM115
    share(file.fileno())
    weakref.finalize(images, file.close)
    return images


def share(file: int) -> None:
    """Lock an open file against `remove_files`, until it is closed. Windows has no such locks, but keeps open files."""
    if fcntl:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


# unfinished and earlier conversions


class Image(NamedTuple):
    """An image that is converted, or known as unreadable."""

    name: str
    stamp: str
    row: int
    sum: int  # CRC32 of its pixels
    unreadable: dict[str, Any] | None  # its `access` and `stamp`, and the `reason`

    @classmethod
    def of(cls, entry: Any) -> "Image":
        """The inverse of what a journal notes. Raises `ValueError` for anything else."""
        name, stamp, row, known, unreadable = entry
        whole = unreadable is None or set(unreadable) == {"access", "stamp", "reason"}
        if not (whole and isinstance(name, str) and isinstance(stamp, str) and type(row) is int and row >= 0):
            raise ValueError("damaged")
        return cls(name, stamp, row, known, unreadable)


class Earlier(NamedTuple):
    """A cache of a source, or an unfinished one."""

    array: Path
    notes: Path  # its index, or journal
    about: dict[str, Any]
    images: list[Image]


def earlier(about: dict[str, Any]) -> list[Earlier]:
    """The caches of the same source and recipe. Unfinished ones are last: they have the newest images."""
    found: list[Earlier] = []
    files: list[tuple[Path, re.Match[str]]] = []
    with contextlib.suppress(OSError):  # of a folder that cannot be listed, and perhaps not be written to
        files = sorted(_cache_files(), key=lambda file: bool(file[1][3]))
    for path, match in files:
        if match[2] == "json":
            with contextlib.suppress(*UNUSABLE):
                content, images = _read_journal(path) if match[3] else _images_of_index(path)
                if all(content[key] == about[key] for key in ("source", "recipe")):
                    array = path.with_name(f"{match[1]}.npy{match[3] or ''}")
                    found.append(Earlier(array, path, content, images))
    return found


def _images_of_index(path: Path) -> tuple[dict[str, Any], list[Image]]:
    content = read_index(path)
    rows = zip(content["paths"], content["stamps"], range(len(content["paths"])), content["sums"], strict=True)
    failed = [Image(name, file["stamp"], 0, 0, file) for name, file in content["unreadable"].items()]
    return content, failed + [Image(*row, None) for row in rows]


def write_journal(path: Path, entries: Sequence[Any]) -> None:
    """Note the source of a conversion, or its images so far. If this fails, the conversion goes on."""
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(entry)}\n" for entry in entries))


def _read_journal(path: Path) -> tuple[dict[str, Any], list[Image]]:
    """The source of an unfinished conversion, and the images that it has. Incomplete lines are left out."""
    about: dict[str, Any] = {}
    images = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(*UNUSABLE):
            entry = json.loads(line)
            if isinstance(entry, dict):
                about = entry
            else:
                images.append(Image.of(entry))
    return about, images


def adopt(array: Path, index: Path, stack: contextlib.ExitStack) -> None:
    """Take over the files of a conversion that was killed: they get the names of this process's."""
    for path in sorted(array.parent.glob(f"{array.name}.*.partial")):
        try:
            if fcntl:  # Windows renames no file that is open
                file = stack.enter_context(open(path, "rb"))  # noqa: SIM115
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            replace(path.with_name(path.name.replace(".npy.", ".json.")), partial_of(index))
            replace(path, partial_of(array))
            return
        except OSError:  # another process writes it
            continue


def tidy(array: Path, journal: Path) -> None:
    """After a conversion: remove the journal, unless it has images of an unfinished array."""
    with contextlib.suppress(OSError):
        if array.exists() and _read_journal(journal)[1]:
            return
    for path in (array, journal):
        with contextlib.suppress(OSError):
            path.unlink()


# the caches on this machine


class Cache(NamedTuple):
    """The files of one cache, whole or not."""

    files: list[Path]  # sorted
    size: int  # bytes
    changed: float  # seconds since 1970
    kind: str  # of its source; "" if unknown
    source: str  # path
    shape: list[int]  # [N, C, H, W], or empty
    resize: str  # how images of another shape were resized; "" if unknown
    done: int | None  # images so far in an unfinished cache; None if finished
    part: list[int] | None  # its number, and how many parts there are


def caches() -> list[Cache]:
    """All caches, the oldest first. Files that no cache has are left out."""
    found: dict[str, dict[Path, os.stat_result]] = {}
    for path, match in _cache_files():
        with contextlib.suppress(FileNotFoundError):  # a conversion that ends renames its files
            found.setdefault(match[1], {})[path] = path.stat()
    return sorted((_described(files) for files in found.values()), key=lambda cache: cache.changed)


def _cache_files() -> Iterator[tuple[Path, re.Match[str]]]:
    """The files of caches, sorted, with the parts of their names."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(cache_folder().iterdir()):
            if (match := CACHE_FILE.fullmatch(path.name)) and path.is_file() and not path.is_symlink():
                yield path, match


def _described(files: dict[Path, os.stat_result]) -> Cache:
    content: Any = {}
    done = None
    names = {path.name: path for path in files}
    index = f"{next(iter(names))[:24]}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if index in names:
            content = json.loads(names[index].read_text(encoding="utf-8"))
            done = None if index.replace(".json", ".npy") in names else 0
        else:
            journals = [_read_journal(path) for path in files if path.name.startswith(index)]
            content, images = max(journals, key=lambda journal: len(journal[1]), default=({}, []))
            done = len(images)
    content = content if isinstance(content, dict) else {}
    kind, source, shape = (content.get(key, default) for key, default in (("kind", ""), ("source", ""), ("shape", [])))
    part, resize = content.get("part"), content.get("resize", "")
    known = isinstance(resize, str) and isinstance(kind, str) and isinstance(source, str) and _are_counts(shape, 4)
    known = known and (part is None or _are_counts(part, 2))
    size = sum(status.st_size for status in files.values())
    changed = max(status.st_mtime for status in files.values())
    about = (kind, source, shape, resize, done, part) if known else ("", "", [], "", None, None)
    return Cache([*files], size, changed, *about)


def _are_counts(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(type(value) is int for value in values)


def remove(cache: Cache) -> bool:
    """Remove the files of a cache. If a process uses the cache, remove nothing and return False.

    Raises `UserError` for files that cannot be removed.
    """
    return remove_files(cache.files, unsure=True)


def remove_files(files: Sequence[Path], *, unsure: bool) -> bool:
    """See `remove`. With `unsure`, remove files even if no lock can tell whether a process uses them."""
    with contextlib.ExitStack() as stack:
        for path in files if fcntl else ():
            try:
                file = stack.enter_context(open(path, "rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except FileNotFoundError:  # another process has removed it
                continue
            except OSError:  # no locks here
                if not unsure:
                    return False
        for path in reversed(files):  # the array before its index
            try:
                path.unlink(missing_ok=True)
            except OSError as problem:
                if WINDOWS and isinstance(problem, PermissionError):  # it is open
                    return False
                raise UserError(f"{path}: cannot be removed ({one_line(problem)}); change its permissions") from None
    return True
