"""Images from many files, converted once into an array on disk that later runs map into memory.

N images, C channels, H W pixels.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vqvae.data.base import Dataset, Images, validation_count
from vqvae.data.listing import Layout, in_order
from vqvae.decoding import Read, Resize, Shape, optional_formats
from vqvae.errors import OptionError, UserError, one_line, printable, shown
from vqvae.files import WINDOWS, NotWritten, partial_of, replace, whole_file, write_text
from vqvae.progress import images_bar
from vqvae.registry import Options, Passes, Range, Size
from vqvae.workers import cores, read_all

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None  # type: ignore[assignment]

FORMAT = 5  # of the caches; images in a cache of another format are converted again
FEW = 100  # images that one process can read before other processes would have started
NOTED = 64  # images between two entries in the journal of a conversion
BACKDATED = 10 * 10**9  # ns


class Contents(NamedTuple):
    """The contents of a source, before any image is read."""

    names: list[str]  # of the images, with `/` between their parts: folders are splits and classes
    labels: list[str | None] | None = None  # names of their classes; None if folders are the classes
    classes: list[str] | None = None  # all names, in the order of their labels; None if the labels are to be ordered
    stamps: list[str] | None = None  # one per image, changes with the image; None if all images change together


class Source(Protocol):
    """Where images come from."""

    path: Path  # as the user named it
    kind: str  # the data set's name
    unlisted: dict[str, str]  # names of parts that cannot be listed, and why

    def facts(self) -> Any:
        """JSON that changes when any image does."""

    def contents(self) -> Contents:
        """The names of the images and their labels. Raises `UserError` for a damaged source."""

    def images(self, chosen: Sequence[int], shape: Shape) -> Iterator[tuple[int, Read]]:
        """The images of these indices into `contents`, in any order, each with its index.

        Reading an image imports no torch, because another process may do it.
        """

    def access(self, name: str) -> list[int]:
        """Values that change if other users may now read an image, or no longer."""


class Part(NamedTuple):
    """One machine's part of the training images. Every machine has all held-out images."""

    number: int
    total: int
    holdout: float  # the share of the images in the test split, where no folders are splits
    validation: float | None  # the share of the training images in the validation split, if there is one


class Reading(NamedTuple):
    """How a source is read, whatever it contains."""

    rescan: bool = False  # convert all images again
    number: int = 0  # of this machine's part of the training images
    total: int = 1
    validation: float | None = None  # the share of them in a validation split, unless a folder is one; None: no split


class CachedImages(NamedTuple):
    """The images of a source."""

    images: Tensor  # [N, C, H, W] uint8, mapped from a cache; those of the validation and test splits are last
    paths: list[str]  # their names
    unreadable: dict[str, str]  # names of the others, and why they cannot be read
    labels: list[str | None]  # names of their classes
    classes: list[str] | None  # all names, in the order of their labels, if the source has such an order
    unused: list[str]  # names of images outside the folders of the splits
    layout: Layout
    sizes: list[int] | None  # of the training, validation and test split, if the cache is a part


def cached(source: Source, shape: Shape, part: Part | None = None, *, rescan: bool = False) -> CachedImages:
    """The images of a source, the test split last: each split is one slice of the mapped array.

    Images outside the folders of the splits are left out. Raises `UserError` if no image is left, or if the cache
    cannot be written.

    The cache is an array and an index with checksums of the index and of each image. Images in an earlier, damaged or
    unfinished cache of the same source are used again, unless `rescan` is set.
    """
    recipe = [FORMAT, source.kind, *shape, optional_formats()]
    facts = json.dumps([recipe, part, source.facts()])
    key = hashlib.sha256(facts.encode()).hexdigest()[:24]
    array, index = cache_folder() / f"{key}.npy", cache_folder() / f"{key}.json"
    content = None if rescan else _stored(array, index, source)
    if content is None:
        contents = source.contents()
        if not contents.names:
            raise OptionError("data_dir", source.path, f"has no images in its {source.kind} files; name others")
        if contents.stamps is None:
            contents = contents._replace(stamps=[f"{key} {i}" for i in range(len(contents.names))])
        plan = _Plan.of(contents, part)
        about = {
            "source": os.path.abspath(source.path),
            "kind": source.kind,
            "part": part and [part.number, part.total],
            "recipe": json.loads(json.dumps(recipe)),  # as it is read
            "shape": [len(plan.chosen), shape.channels, *shape.size],
            "resize": shape.resize,
        }
        try:
            content = _convert(plan, source, shape, array, index, about, rescan)
        except NotWritten as problem:
            content = _stored(array, index, source)  # on Windows, where nobody replaces one that a faster process uses
            if content is None:
                where = "this is the cache of images; XDG_CACHE_HOME sets its folder"
                raise UserError(f"{problem} ({where})") from None
    unreadable = source.unlisted | {name: file["reason"] for name, file in content["unreadable"].items()}
    if not content["paths"]:
        name, reason = next(iter(unreadable.items()))
        found = f"none of its {len(unreadable):,} images can be read ({printable(name)}: {reason})"
        raise OptionError("data_dir", source.path, found)
    above, *splits = content["layout"]
    images = torch.from_numpy(_mapped(array)[: len(content["paths"])])
    layout = Layout(above, *map(frozenset, splits))
    others = {name: content[name] for name in ("paths", "labels", "classes", "unused", "sizes")}
    return CachedImages(images, unreadable=unreadable, layout=layout, **others)


def cache_folder() -> Path:
    """Where caches are: ~/.cache/vqvae, or below XDG_CACHE_HOME."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae"
    except RuntimeError as problem:
        raise UserError(f"no place for the cache of images ({one_line(problem)}); set XDG_CACHE_HOME") from None


class _Plan(NamedTuple):
    """Which images a cache is to have, by row."""

    contents: Contents
    layout: Layout
    chosen: list[int]  # indices into the contents
    labels: list[str | None]  # of all images of the contents
    unused: list[str]
    sizes: list[int] | None  # of the splits, where the cache is a part

    @classmethod
    def of(cls, contents: Contents, part: Part | None) -> "_Plan":
        names = contents.names
        layout = Layout.of(names)
        splits = [layout.split(name) for name in names]
        places = [position(name) for name in names]
        chosen = [i for i, split in enumerate(splits) if split or not layout.train]
        if part and part.validation is None:
            chosen = [i for i in chosen if splits[i] != "validation"]
        chosen.sort(key=lambda i: (splits[i] == "test", splits[i] == "validation", -places[i], names[i]))
        labels = contents.labels or [layout.label(name) for name in names]
        unused = [name for name, split in zip(names, splits, strict=True) if layout.train and not split]
        if part is None:
            return cls(contents, layout, chosen, labels, unused, None)
        held_out = "test" in splits
        train = train_count([splits[i] != "test" if held_out else places[i] >= part.holdout for i in chosen])
        validation = sum(splits[i] == "validation" for i in chosen)
        if part.validation and not validation:
            validation = validation_count(part.validation, train)
        shared = (train - validation) // part.total
        if not shared:
            problem = f"leaves no training image of {train:,} to each part; use fewer, or test for the validation split"
            raise OptionError("data_shards", part.total, problem)
        mine = chosen[part.number : shared * part.total : part.total]
        known = {labels[i] for i in chosen}
        if None in known:
            labels = [None] * len(labels)
        contents = contents._replace(classes=contents.classes or in_order(label for label in known if label))
        chosen = mine + chosen[train - validation :]
        return cls(contents, layout, chosen, labels, unused, [shared, validation, len(chosen) - shared - validation])


def _convert(
    plan: _Plan, source: Source, shape: Shape, array: Path, index: Path, about: dict[str, Any], rescan: bool
) -> dict[str, Any]:
    """Write the readable images as a .npy file `[all, C, H, W]`, padded with zeros, and its index; returns the index.

    The index has the fields of `CachedImages` except the images. An unreadable image has its `access`, its `stamp` and
    the `reason`. The index also has the recipe (`about`), the `stamps` and checksums (`sums`) of the images, and the
    modification time of the array (`written`), which any later write changes.

    A journal lists the converted images, so that a conversion that is killed can be continued. The caches that the new
    one replaces are removed, if locks show that no process uses them.
    """
    names, stamps = plan.contents.names, plan.contents.stamps or []
    partial, journal = partial_of(array), partial_of(index)
    with contextlib.ExitStack() as stack:
        if not rescan:
            _adopt(array, index, stack)
        before = _earlier(about)
        used = [] if rescan else before
        stack.callback(_tidy, partial, journal)
        out = stack.enter_context(whole_file(array, resumable=True))
        _share(out.raw.fileno())  # type: ignore[attr-defined]
        rows = _Rows(out, about["shape"])
        files = {old.array: stack.enter_context(file) for old in used if (file := _opened(old.array))}
        known = {image[:2]: (old.array, image) for old in used if old.array in files for image in old.images}
        for row, i in enumerate(plan.chosen):
            place, image = known.get((names[i], stamps[i]), (None, None))
            if image and place:
                rows.take(row, image, files[place], same=(place, image.row) == (partial, row))
            if row in rows.unreadable and rows.unreadable[row]["access"] != source.access(names[i]):
                del rows.unreadable[row]
        _write_journal(journal, [about])
        numbers = {i: row for row, i in enumerate(plan.chosen) if rows.lacks(row)}
        results = stack.enter_context(contextlib.closing(_read(source, sorted(numbers), shape, names)))
        while found := list(itertools.islice(results, NOTED)):
            fresh = [rows.put(numbers[i], result, access, (names[i], stamps[i])) for i, access, result in found]
            out.flush()
            _write_journal(journal, fresh)
        kept = rows.close_gaps()
        content = about | {
            "paths": [names[plan.chosen[row]] for row in kept],
            "labels": [plan.labels[plan.chosen[row]] for row in kept],
            "classes": plan.contents.classes,
            "unused": plan.unused,
            "layout": [plan.layout.above, *map(sorted, plan.layout[1:])],
            "unreadable": {names[plan.chosen[row]]: rows.unreadable[row] for row in sorted(rows.unreadable)},
            "sizes": plan.sizes and _counts(plan.sizes, kept),
            "stamps": [stamps[plan.chosen[row]] for row in kept],
            "sums": [rows.sums[row] for row in kept],
            "written": _backdate(out),
        }
        _write_index(index, content)
    for old in before:
        if old.array != array and old.about["part"] == about["part"]:
            with contextlib.suppress(UserError):
                _remove([old.notes, old.array], unsure=False)
    return content


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
        if not (whole and isinstance(name, str) and isinstance(stamp, str) and row >= 0):
            raise ValueError("damaged")
        return cls(name, stamp, row, known, unreadable)


class _Rows:
    """The rows of an array that is being written: one for each image, readable or not."""

    def __init__(self, out: BinaryIO, shape: Sequence[int]):
        self.out, self.start, self.size = out, len(_header(shape)), math.prod(shape[1:])
        self.sums: list[int | None] = [None] * shape[0]  # of the rows that are written
        self.unreadable: dict[int, dict[str, Any]] = {}
        out.write(_header(shape))
        out.flush()

    def lacks(self, row: int) -> bool:
        return self.sums[row] is None and row not in self.unreadable

    def take(self, row: int, image: Image, file: BinaryIO, *, same: bool) -> None:
        """Copy an image of an earlier array, unless it is at the same place. A damaged one stays missing."""
        if image.unreadable:
            self.unreadable[row] = image.unreadable
            return
        try:
            file.seek(self.start + image.row * self.size)
            pixels = file.read(self.size)
        except OSError:
            return
        if len(pixels) == self.size and zlib.crc32(pixels) == image.sum:
            self.sums[row] = image.sum
            if not same:
                self._write(row, pixels)

    def put(self, row: int, result: bytes | str, access: list[int], name: tuple[str, str]) -> Image:
        """Write an image, or remember why it cannot be read; `name` is its name and stamp."""
        if isinstance(result, str):
            self.unreadable[row] = {"access": access, "stamp": name[1], "reason": printable(result)}
            return Image(*name, row, 0, self.unreadable[row])
        self._write(row, result)
        self.sums[row] = known = zlib.crc32(result)
        return Image(*name, row, known, None)

    def _write(self, row: int, pixels: bytes) -> None:
        self.out.seek(self.start + row * self.size)
        self.out.write(pixels)

    def close_gaps(self) -> list[int]:
        """Move the images forward to fill gaps, with zeros after the last one; returns their former rows."""
        kept = [row for row, known in enumerate(self.sums) if known is not None]
        self.out.flush()
        with open(self.out.name, "rb") as written:
            for row, before in enumerate(kept):
                if row != before:
                    written.seek(self.start + before * self.size)
                    self._write(row, written.read(self.size))
        for count in (len(kept), len(self.sums)):
            self.out.truncate(self.start + count * self.size)
        return kept


def _read(
    source: Source, missing: Sequence[int], shape: Shape, names: Sequence[str]
) -> Generator[tuple[int, list[int], bytes | str], None, None]:
    """The index, the access and the bytes of each image, or why it cannot be read."""
    started: deque[tuple[int, list[int]]] = deque()

    def reads() -> Iterator[Read]:
        for i, read in source.images(missing, shape):
            started.append((i, source.access(names[i])))
            yield read

    with images_bar(len(missing), "reading images") as bar:
        for result in read_all(reads(), cores() if len(missing) > FEW else 1):
            bar.update()
            yield *started.popleft(), result


def _header(shape: Sequence[int]) -> bytes:
    """The beginning of a .npy file `[N, C, H, W]` uint8."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return out.getvalue()


def _counts(sizes: Sequence[int], kept: Sequence[int]) -> list[int]:
    """How many of the rows in `kept` are in each of the splits that follow each other."""
    ends = np.searchsorted(kept, np.cumsum(sizes))
    return np.diff(ends, prepend=0).tolist()


def _backdate(out: BinaryIO) -> int:
    """Give an array a modification time in the past, unlike that of any later write; returns it, in ns."""
    out.flush()
    moment = time.time_ns() - BACKDATED
    with contextlib.suppress(OSError):
        os.utime(out.name, ns=(moment, moment))
    return os.stat(out.name).st_mtime_ns


def _stored(array: Path, index: Path, source: Source) -> dict[str, Any] | None:
    """The content of a cache's index; None if the cache is absent, damaged, or lacks images that are now readable."""
    try:
        content = _index(index)
        whole = _is_whole(array, content)
        whole = whole and all(source.access(name) == file["access"] for name, file in content["unreadable"].items())
    except UNUSABLE:
        return None
    return content if whole else None


UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of a damaged index


def _index(path: Path) -> dict[str, Any]:
    """The content of an index. Raises any of `UNUSABLE`."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("checksum") != zlib.crc32(json.dumps(content).encode()):
        raise ValueError("damaged")
    return content


def _write_index(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content | {"checksum": zlib.crc32(json.dumps(content).encode())}))


def _is_whole(array: Path, content: dict[str, Any]) -> bool:
    """Whether an array has the images of its index. It is read only if it was written to, or copied, since."""
    header, size = _header(content["shape"]), math.prod(content["shape"][1:])
    status = array.stat()
    if status.st_size != len(header) + content["shape"][0] * size:
        return False
    if status.st_mtime_ns == content["written"]:
        return True
    sums = content["sums"] + [zlib.crc32(bytes(size))] * (content["shape"][0] - len(content["sums"]))
    with open(array, "rb") as file:
        whole = file.read(len(header)) == header and all(zlib.crc32(file.read(size)) == known for known in sums)
    if whole:
        with contextlib.suppress(OSError):
            os.utime(array, ns=(content["written"], content["written"]))
    return whole


def _mapped(array: Path) -> np.ndarray:
    """The array of a cache, `[N, C, H, W]` uint8. `remove` does not remove the cache while the array exists.

    Copy-on-write: PyTorch expects writable memory, and the file must stay unchanged.
    """
    images = np.load(array, mmap_mode="c")
    file = open(array, "rb")  # noqa: SIM115
    _share(file.fileno())
    weakref.finalize(images, file.close)
    return images


def _share(file: int) -> None:
    """Lock an open file against `remove`, until it is closed. Windows has no such locks, but keeps open files."""
    if fcntl:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


# what earlier conversions have


class Earlier(NamedTuple):
    """A cache of a source, or an unfinished one."""

    array: Path
    notes: Path  # its index, or journal
    about: dict[str, Any]
    images: list[Image]


def _earlier(about: dict[str, Any]) -> list[Earlier]:
    """The caches of the same source and recipe. Unfinished ones are last: they have the newest images."""
    found: list[Earlier] = []
    files: list[tuple[Path, re.Match[str]]] = []
    with contextlib.suppress(OSError):  # of a folder that cannot be listed, and perhaps not be written to
        files = sorted(_cache_files(), key=lambda file: bool(file[1][3]))
    for path, match in files:
        if match[2] == "json":
            with contextlib.suppress(*UNUSABLE):
                content, images = _read_journal(path) if match[3] else _read_index(path)
                if all(content[key] == about[key] for key in ("source", "recipe")):
                    array = path.with_name(f"{match[1]}.npy{match[3] or ''}")
                    found.append(Earlier(array, path, content, images))
    return found


def _read_index(path: Path) -> tuple[dict[str, Any], list[Image]]:
    content = _index(path)
    rows = zip(content["paths"], content["stamps"], range(len(content["paths"])), content["sums"], strict=True)
    failed = [Image(name, file["stamp"], 0, 0, file) for name, file in content["unreadable"].items()]
    return content, failed + [Image(*row, None) for row in rows]


def _write_journal(path: Path, entries: Sequence[Any]) -> None:
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


def _adopt(array: Path, index: Path, stack: contextlib.ExitStack) -> None:
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


def _tidy(array: Path, journal: Path) -> None:
    """After a conversion: remove the journal, unless it has images of an unfinished array."""
    with contextlib.suppress(OSError):
        if array.exists() and _read_journal(journal)[1]:
            return
    for path in (array, journal):
        with contextlib.suppress(OSError):
            path.unlink()


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except OSError:
        return None


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


def dataset(source: Source, size: Size | None, options: ImageOptions, reading: Reading) -> Dataset:
    """The data set of a source's images. Raises `UserError` if they cannot be read or do not fill two splits.

    Where several machines share the training images, it has its validation split already.
    """
    part = None
    if reading.total > 1:
        part = Part(reading.number, reading.total, options.holdout, reading.validation)
    found = cached(source, Shape(size or DEFAULT_SIZE, options.channels, options.resize), part, rescan=reading.rescan)
    images, paths, labels, layout = found.images, found.paths, found.labels, found.layout
    folder = source.path
    if len(paths) < 2:
        raise OptionError("data_dir", folder, "has one readable image, and the two splits need two")
    notes = []
    if part:
        notes.append(f"part {part.number + 1} of {part.total} of the training images")
    validation = 0
    if layout.train:
        counts = Counter(layout.split(path) for path in paths)
        chooses = layout.validation if reading.validation else frozenset[str]()
        groups = {"train": layout.train, "validation": chooses, "test": layout.test}
        for split, folders in groups.items():
            if folders and not counts[split]:
                raise OptionError("data_dir", folder, f"none of the images in {_listed(folders)} can be read")
        validation = counts["validation"]
        train = counts["train"] + validation
        *others, last = filter(None, map(_listed, groups.values()))
        notes.append(f"split by the folders {', '.join(others)} and {last}")
        if validation and not chooses:
            notes.append(f"images of {_listed(layout.validation)} not used: {validation:,}")
        if found.unused:
            notes.append(f"images outside of these left out: {len(found.unused):,}, such as {shown(found.unused[0])}")
    else:
        train = train_count([position(path) >= options.holdout for path in paths])
    if found.sizes:
        train, validation = found.sizes[0] + found.sizes[1], found.sizes[1]
    names = found.classes or in_order(label for label in labels if label is not None)
    outside = [path for path, label in zip(paths, labels, strict=True) if label is None]
    classes = names if len(names) > 1 and not outside else []
    if len(names) > 1 and outside:
        notes.append(f"no classes, because of images without one: {len(outside):,}, such as {shown(outside[0])}")
    if found.unreadable:
        notes.append(f"unreadable files left out: {len(found.unreadable):,}")
    numbers = {name: number for number, name in enumerate(classes)}
    indices = torch.tensor([numbers.get(label or "", -1) for label in labels])
    ends = (0, train - validation, train, len(paths))
    splits = [Images(images[start:end], indices[start:end]) for start, end in itertools.pairwise(ends)]
    return Dataset(
        source.kind,
        splits[0],
        splits[2],
        tuple(map(printable, classes)),
        "; ".join(notes),
        unreadable=dict(sorted(found.unreadable.items())),
        shuffled=True,  # by the hashes of their names
        validation=splits[1] if validation and reading.validation else None,
    )


def _listed(folders: Iterable[str]) -> str:
    return " and ".join(shown(folder) for folder in sorted(folders))


def position(path: str) -> float:
    """A number in [0, 1), a hash of the relative path. Images below `holdout` are the test split."""
    return int(hashlib.sha256(os.fsencode(path)).hexdigest()[:12], 16) / 16**12


def train_count(train: Sequence[bool]) -> int:
    """The size of the training split, given which images should be in it; each split has at least one image."""
    return min(max(sum(train), 1), len(train) - 1)


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
    found: dict[str, list[Path]] = {}
    for path, match in _cache_files():
        found.setdefault(match[1], []).append(path)
    return sorted((_described(files) for files in found.values()), key=lambda cache: cache.changed)


CACHE_FILE = re.compile(r"([0-9a-f]{24})\.(npy|json)(\.\d+\.partial)?")


def _cache_files() -> Iterator[tuple[Path, re.Match[str]]]:
    """The files of caches, sorted, with the parts of their names."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(cache_folder().iterdir()):
            if (match := CACHE_FILE.fullmatch(path.name)) and path.is_file() and not path.is_symlink():
                yield path, match


def _described(files: list[Path]) -> Cache:
    content: Any = {}
    done = None
    names = {path.name: path for path in files}
    index = f"{files[0].name[:24]}.json"
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
    status = [path.stat() for path in files]
    size, changed = sum(entry.st_size for entry in status), max(entry.st_mtime for entry in status)
    about = (kind, source, shape, resize, done, part) if known else ("", "", [], "", None, None)
    return Cache(files, size, changed, *about)


def _are_counts(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(type(value) is int for value in values)


def remove(cache: Cache) -> bool:
    """Remove the files of a cache. If a process uses the cache, remove nothing and return False.

    Raises `UserError` for files that cannot be removed.
    """
    return _remove(cache.files, unsure=True)


def _remove(files: Sequence[Path], *, unsure: bool) -> bool:
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
