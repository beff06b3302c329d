"""The data set of a source of images, converted by cache.py: its splits, classes and notes."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch

from vqvae.data.base import Dataset, Images
from vqvae.data.cache import Part, Source, cached, position, train_count
from vqvae.data.listing import in_order
from vqvae.decoding import Resize, Shape
from vqvae.errors import OptionError, printable, shown
from vqvae.registry import Options, Passes, Range, Size

DEFAULT_SIZE = Size(64)


class Reading(NamedTuple):
    """How a source is read, whatever it contains."""

    rescan: bool = False  # convert all images again
    number: int = 0  # of this machine's part of the training images
    total: int = 1
    validation: float | None = None  # the share of them in a validation split, unless a folder is one; None: no split


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Options of every data set of a source's images."""

    holdout: Annotated[float, Range(above=0, below=1), "share of the images in the test split"] = 0.1
    channels: Annotated[int, Passes(lambda c: c in (1, 3), "1 (gray) or 3 (color)"), "color channels"] = 3
    resize: Annotated[
        Resize, "images of another shape: crop keeps the center, pad adds black borders, stretch changes the aspect"
    ] = "crop"


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
    if len(names) == 1 and not outside:
        notes.append(f"no classes, because all images are of one: {shown(names[0])}")
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
