"""Images from many files, converted once into an array on disk that later runs map into memory.

`cached` converts; cache_files.py has the files. N images, C channels, H W pixels.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vqvae.data.base import validation_count
from vqvae.data.cache_files import (
    UNUSABLE,
    Image,
    adopt,
    backdate,
    cache_folder,
    earlier,
    header,
    is_whole,
    mapped,
    read_index,
    remove_files,
    share,
    tidy,
    write_index,
    write_journal,
)
from vqvae.data.listing import Layout, in_order
from vqvae.decoding import Read, Shape, optional_formats
from vqvae.errors import OptionError, UserError, printable
from vqvae.files import NotWritten, partial_of, whole_file
from vqvae.progress import images_bar
from vqvae.workers import cores, read_all

FORMAT = 5  # of the caches; images in a cache of another format are converted again
FEW = 100  # images that one process can read before other processes would have started
NOTED = 64  # images between two entries in the journal of a conversion


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
    images = torch.from_numpy(mapped(array)[: len(content["paths"])])
    layout = Layout(above, *map(frozenset, splits))
    others = {name: content[name] for name in ("paths", "labels", "classes", "unused", "sizes")}
    return CachedImages(images, unreadable=unreadable, layout=layout, **others)


def _stored(array: Path, index: Path, source: Source) -> dict[str, Any] | None:
    """The content of a cache's index; None if the cache is absent, damaged, or lacks images that are now readable."""
    try:
        content = read_index(index)
        whole = is_whole(array, content)
        whole = whole and all(source.access(name) == file["access"] for name, file in content["unreadable"].items())
    except UNUSABLE:
        return None
    return content if whole else None


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


def position(path: str) -> float:
    """A number in [0, 1), a hash of the relative path. Images below `holdout` are the test split."""
    return int(hashlib.sha256(os.fsencode(path)).hexdigest()[:12], 16) / 16**12


def train_count(train: Sequence[bool]) -> int:
    """The size of the training split, given which images should be in it; each split has at least one image."""
    return min(max(sum(train), 1), len(train) - 1)


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
            adopt(array, index, stack)
        before = earlier(about)
        used = [] if rescan else before
        stack.callback(tidy, partial, journal)
        out = stack.enter_context(whole_file(array, resumable=True))
        share(out.raw.fileno())  # type: ignore[attr-defined]
        rows = _Rows(out, about["shape"])
        files = {old.array: stack.enter_context(file) for old in used if (file := _opened(old.array))}
        known = {image[:2]: (old.array, image) for old in used if old.array in files for image in old.images}
        for row, i in enumerate(plan.chosen):
            place, image = known.get((names[i], stamps[i]), (None, None))
            if image and place:
                rows.take(row, image, files[place], same=(place, image.row) == (partial, row))
            if row in rows.unreadable and rows.unreadable[row]["access"] != source.access(names[i]):
                del rows.unreadable[row]
        write_journal(journal, [about])
        numbers = {i: row for row, i in enumerate(plan.chosen) if rows.lacks(row)}
        results = stack.enter_context(contextlib.closing(_read(source, sorted(numbers), shape, names)))
        while found := list(itertools.islice(results, NOTED)):
            fresh = [rows.put(numbers[i], result, access, (names[i], stamps[i])) for i, access, result in found]
            out.flush()
            write_journal(journal, fresh)
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
            "written": backdate(out),
        }
        write_index(index, content)
    for old in before:
        if old.array != array and old.about["part"] == about["part"]:
            with contextlib.suppress(UserError):
                remove_files([old.notes, old.array], unsure=False)
    return content


class _Rows:
    """The rows of an array that is being written: one for each image, readable or not."""

    def __init__(self, out: BinaryIO, shape: Sequence[int]):
        self.out, self.start, self.size = out, len(header(shape)), math.prod(shape[1:])
        self.sums: list[int | None] = [None] * shape[0]  # of the rows that are written
        self.unreadable: dict[int, dict[str, Any]] = {}
        out.write(header(shape))
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
        except (OSError, ValueError):  # ValueError: a damaged journal names a row that no file can have
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


def _counts(sizes: Sequence[int], kept: Sequence[int]) -> list[int]:
    """How many of the rows in `kept` are in each of the splits that follow each other."""
    ends = np.searchsorted(kept, np.cumsum(sizes))
    return np.diff(ends, prepend=0).tolist()


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except OSError:
        return None
