"""Images from many files, converted once into an array on disk that later runs map into memory.

N images, C channels, H W pixels.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqvae.data.base import Dataset, Images
from vqvae.data.decoding import Resize, Shape, optional_formats
from vqvae.data.listing import Layout, in_order
from vqvae.errors import OptionError, UserError, one_line, shown
from vqvae.files import WINDOWS, NotWritten, whole_file, write_text
from vqvae.registry import Options, Passes, Range, Size

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None  # type: ignore[assignment]

FORMAT = 3  # of the caches; those of another one are made again
Read = Callable[[], np.ndarray]  # an image as `[C, H, W]` uint8; raises any exception if it cannot be read


class Contents(NamedTuple):
    """What a source contains, before any image is read."""

    names: list[str]  # of the images, with `/` between their parts: folders are splits and classes
    labels: list[str | None] | None = None  # names of their classes; None if folders are the classes
    classes: list[str] | None = None  # all names, in the order of their labels; None if the labels are to be ordered


class Source(Protocol):
    """Where images come from."""

    path: Path  # as the user named it
    kind: str  # the data set's name
    unlisted: dict[str, str]  # names of parts that cannot be listed, and why

    def facts(self) -> Any:
        """JSON that changes when any image does."""

    def contents(self) -> Contents:
        """Raises `UserError` for a damaged source."""

    def images(self, chosen: Sequence[int], shape: Shape) -> Iterator[tuple[int, Read]]:
        """The images of these indices into `contents`, in any order, each with its index."""

    def access(self, name: str) -> list[int]:
        """Differs where an image may be read by others than before."""


class CachedImages(NamedTuple):
    """The images of a source."""

    images: Tensor  # [N, C, H, W] uint8, mapped from a cache; those of the test split are last
    paths: list[str]  # their names
    unreadable: dict[str, str]  # names of the others, and why they cannot be read
    labels: list[str | None]  # names of their classes
    classes: list[str] | None  # all names, in the order of their labels, if the source has such an order
    unused: list[str]  # names of images that are in none of the folders that are splits
    layout: Layout


def cached(source: Source, shape: Shape) -> CachedImages:
    """The images of a source, those of the test split last: each split is one slice of the mapped array.

    Images outside the folders that are splits are left out. Raises `UserError` if no image is left, or if the cache
    cannot be written.

    The cache is an array and an index with a checksum of both. A damaged one is made again, and so is one that lacks
    a file whose permissions have changed since.
    """
    facts = [FORMAT, source.kind, *shape, optional_formats(), source.facts()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    array, index = cache_folder() / f"{key}.npy", cache_folder() / f"{key}.json"
    content = _stored(array, index, source)
    if content is None:
        contents = source.contents()
        if not contents.names:
            raise OptionError("", "data_dir", source.path, f"has no images in its {source.kind} files; name others")
        try:
            content = _convert(contents, source, shape, array)
            try:
                write_text(index, json.dumps(content | {"checksum": _checksum(array, content)}))
            except BaseException:
                array.unlink()  # without its index it would only fill the disk
                raise
        except NotWritten as problem:
            content = _stored(array, index, source)  # on Windows, where nobody replaces one that a faster process uses
            if content is None:
                where = "this is the cache of images; XDG_CACHE_HOME sets its folder"
                raise UserError(f"{problem} ({where})") from None
    unreadable = source.unlisted | {name: file["reason"] for name, file in content["unreadable"].items()}
    if not content["paths"]:
        name, reason = next(iter(unreadable.items()))
        found = f"none of its {len(unreadable):,} images can be read ({quoted(name)}: {reason})"
        raise OptionError("", "data_dir", source.path, found)
    above, *splits = content["layout"]
    images = torch.from_numpy(_mapped(array)[: len(content["paths"])])
    layout = Layout(above, *map(frozenset, splits))
    others = {name: content[name] for name in ("paths", "labels", "classes", "unused")}
    return CachedImages(images, unreadable=unreadable, layout=layout, **others)


def cache_folder() -> Path:
    """Where caches are: ~/.cache/vqvae, or below XDG_CACHE_HOME."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae"
    except RuntimeError as problem:
        raise UserError(f"no place for the cache of images ({one_line(problem)}); set XDG_CACHE_HOME") from None


def _convert(contents: Contents, source: Source, shape: Shape, array: Path) -> dict[str, Any]:
    """Write the readable images as a .npy file `[all, C, H, W]`, zeros at its end. Returns the content of its index:

    the fields of `CachedImages` without the images, where each unreadable one has its `access` and the `reason`; and
    `source`, `kind` and `shape`, which `caches` lists.
    """
    names = contents.names
    layout = Layout.of(names)
    splits = [layout.split(name) for name in names]
    chosen = [i for i, split in enumerate(splits) if split or not layout.train]
    chosen.sort(key=lambda i: (splits[i] == "test", -position(names[i]), names[i]))
    rows = {i: row for row, i in enumerate(chosen)}
    unreadable: dict[int, dict[str, Any]] = {}  # by row
    size = shape.channels * math.prod(shape.size)
    with whole_file(array) as out:
        _share(out.raw.fileno())  # type: ignore[attr-defined]
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), shape.channels, *shape.size)}
        np.lib.format.write_array_header_1_0(out, header)
        start = out.tell()
        jobs = source.images(chosen, shape)
        few = True if len(chosen) <= 200 else None
        for i, read in tqdm(jobs, total=len(chosen), desc="reading images", unit="image", disable=few):
            access = source.access(names[i])
            try:
                pixels = read().tobytes()
            except Exception as problem:  # decoders raise anything on a damaged file
                unreadable[rows[i]] = {"access": access, "reason": quoted(one_line(problem, 120))}
            else:
                out.seek(start + rows[i] * size)
                out.write(pixels)
        kept = [row for row in range(len(chosen)) if row not in unreadable]
        _close_gaps(out, kept, start, size)
        out.truncate(start + len(kept) * size)
        out.truncate(start + len(chosen) * size)
    labels = contents.labels or [layout.label(name) for name in names]
    return {
        "paths": [names[chosen[row]] for row in kept],
        "labels": [labels[chosen[row]] for row in kept],
        "classes": contents.classes,
        "unused": [name for name, split in zip(names, splits, strict=True) if layout.train and not split],
        "layout": [layout.above, sorted(layout.train), sorted(layout.held_out)],
        "unreadable": {names[chosen[row]]: unreadable[row] for row in sorted(unreadable)},
        "source": os.path.abspath(source.path),
        "kind": source.kind,
        "shape": [len(chosen), shape.channels, *shape.size],
    }


def _close_gaps(out: BinaryIO, kept: Sequence[int], start: int, size: int) -> None:
    """Move rows of `size` bytes forward, so that those in `kept` follow each other."""
    out.flush()
    with open(out.name, "rb") as written:
        for row, before in enumerate(kept):
            if row != before:
                written.seek(start + before * size)
                out.seek(start + row * size)
                out.write(written.read(size))


def _stored(array: Path, index: Path, source: Source) -> dict[str, Any] | None:
    """The content of the index of a cache, None if the cache is absent, damaged, or lacks what can be read by now."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        whole = content.pop("checksum") == _checksum(array, content)
        whole = whole and all(source.access(name) == file["access"] for name, file in content["unreadable"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return content if whole else None


def _checksum(array: Path, content: dict[str, Any]) -> int:
    """The CRC32 of the array, continued over the rest of the index."""
    checksum = 0
    with open(array, "rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return zlib.crc32(json.dumps(content).encode(), checksum)


def _mapped(array: Path) -> np.ndarray:
    """The array of a cache, `[N, C, H, W]` uint8. As long as it exists, `remove` leaves the cache.

    Copy-on-write: PyTorch expects writable memory, and the file must stay unchanged.
    """
    images = np.load(array, mmap_mode="c")
    file = open(array, "rb")  # noqa: SIM115
    _share(file.fileno())
    weakref.finalize(images, file.close)
    return images


def _share(file: int) -> None:
    """Lock an open file for `remove`, until it is closed. Where there are no locks, Windows removes no open file."""
    if fcntl:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


# the data set of a source


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Options of every data set of a source's images."""

    holdout: Annotated[float, Range(above=0, below=1), "share of the images in the test split"] = 0.1
    channels: Annotated[int, Passes(lambda c: c in (1, 3), "1 (gray) or 3 (color)"), "color channels"] = 3
    resize: Annotated[
        Resize, "images of another shape: crop keeps the center, pad adds black borders, stretch changes the aspect"
    ] = "crop"


DEFAULT_SIZE = Size(64)


def dataset(source: Source, size: Size | None, options: ImageOptions) -> Dataset:
    """The data set of a source's images. Raises `UserError` if they cannot be read or do not fill two splits."""
    found = cached(source, Shape(size or DEFAULT_SIZE, options.channels, options.resize))
    images, paths, labels, layout = found.images, found.paths, found.labels, found.layout
    folder = source.path
    if len(paths) < 2:
        raise OptionError("", "data_dir", folder, "has one readable image, and the two splits need two")
    notes = []
    if layout.train:
        train = sum(layout.split(path) == "train" for path in paths)
        for folders, count in ((layout.train, train), (layout.held_out, len(paths) - train)):
            if not count:
                raise OptionError("", "data_dir", folder, f"none of the images in {_listed(folders)} can be read")
        notes.append(f"split by the folders {_listed(layout.train)} and {_listed(layout.held_out)}")
        if found.unused:
            notes.append(f"images outside of these left out: {len(found.unused):,}, such as {shown(found.unused[0])}")
    else:
        train = min(max(sum(position(path) >= options.holdout for path in paths), 1), len(paths) - 1)
    names = found.classes or in_order(label for label in labels if label is not None)
    outside = [path for path, label in zip(paths, labels, strict=True) if label is None]
    classes = names if len(names) > 1 and not outside else []
    if len(names) > 1 and outside:
        notes.append(f"no classes, because of images outside of them: {len(outside):,}, such as {shown(outside[0])}")
    if found.unreadable:
        notes.append(f"unreadable files left out: {len(found.unreadable):,}")
    numbers = {name: number for number, name in enumerate(classes)}
    indices = torch.tensor([numbers.get(label or "", -1) for label in labels])
    return Dataset(
        source.kind,
        Images(images[:train], indices[:train]),
        Images(images[train:], indices[train:]),
        tuple(map(quoted, classes)),
        "; ".join(notes),
        unreadable=dict(sorted(found.unreadable.items())),
        shuffled=True,  # by the hashes of their names
    )


def quoted(name: str) -> str:
    """A name without control characters, which a terminal would obey."""
    return name if name.isprintable() else repr(name)


def _listed(folders: Iterable[str]) -> str:
    return " and ".join(shown(folder) for folder in sorted(folders))


def position(path: str) -> float:
    """A number in [0, 1), a hash of the relative path. Images below `holdout` are the test split."""
    return int(hashlib.sha256(os.fsencode(path)).hexdigest()[:12], 16) / 16**12


# the caches on this machine


class Cache(NamedTuple):
    """The files of one cache, whole or not."""

    files: list[Path]  # sorted
    size: int  # bytes
    changed: float  # seconds since 1970
    kind: str  # of its source; "" if unknown
    source: str  # path
    shape: list[int]  # [N, C, H, W], or empty


def caches() -> list[Cache]:
    """All caches, the oldest first. Files that no cache has are left out."""
    found: dict[str, list[Path]] = {}
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(cache_folder().iterdir()):
            if (match := CACHE_FILE.fullmatch(path.name)) and path.is_file() and not path.is_symlink():
                found.setdefault(match[1], []).append(path)
    return sorted((_described(files) for files in found.values()), key=lambda cache: cache.changed)


CACHE_FILE = re.compile(r"([0-9a-f]{24})\.(?:npy|json)(?:\.\d+\.partial)?")


def _described(files: list[Path]) -> Cache:
    content: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(files[0].with_suffix(".json").read_text(encoding="utf-8"))
    content = content if isinstance(content, dict) else {}
    kind, source, shape = (content.get(key, default) for key, default in (("kind", ""), ("source", ""), ("shape", [])))
    known = isinstance(kind, str) and isinstance(source, str) and isinstance(shape, list) and len(shape) == 4
    status = [path.stat() for path in files]
    size, changed = sum(entry.st_size for entry in status), max(entry.st_mtime for entry in status)
    return Cache(files, size, changed, *((kind, source, shape) if known else ("", "", [])))


def remove(cache: Cache) -> bool:
    """Remove the files of a cache. False if a process uses it, which leaves it whole.

    Raises `UserError` for files that cannot be removed.
    """
    with contextlib.ExitStack() as stack:
        for path in cache.files if fcntl else ():
            try:
                file = stack.enter_context(open(path, "rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # no locks here, or another process has removed it
                continue
        for path in reversed(cache.files):  # the array before its index
            try:
                path.unlink(missing_ok=True)
            except OSError as problem:
                if WINDOWS and isinstance(problem, PermissionError):  # it is open
                    return False
                raise UserError(f"{path}: cannot be removed ({one_line(problem)}); change its permissions") from None
    return True
