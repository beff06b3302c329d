"""Which files below a folder are images, and which of its folders are splits and classes."""

import itertools
import os
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from vqvae.errors import OptionError, one_line

SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif", ".avif"),  # some of which need a package, see decoding.py
}
# files and folders of other programs; names that begin with a dot are hidden, too
HIDDEN = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}
SPLITS = [{"train", "training"}, {"test", "testing"}, {"val", "valid", "validation"}]  # folders, in any case


SPLIT_WORD = re.compile(rf"({'|'.join(sorted(set.union(*SPLITS), reverse=True))})(?![a-z])", re.IGNORECASE)


class Listing(NamedTuple):
    """The files below a folder. Names are relative to it, with `/` between their parts on every system."""

    names: list[str]  # of the files, sorted by their parts
    unlisted: dict[str, str]  # names of folders that cannot be listed, and why
    stamps: list[str]  # of the files: size and time of modification, and the real path where links lead to it


def list_images(folder: Path, option: str) -> Listing:
    """All image files below a folder, see `list_files`."""
    return list_files(folder, option, SUFFIXES, "the images")


def list_files(folder: Path, option: str, suffixes: Collection[str], what: str) -> Listing:
    """All files below a folder whose names have these suffixes. Named pipes, devices and sockets are left out.

    Files and folders whose names begin with a dot are left out, and so are those in `HIDDEN`. Links to folders are
    followed after all other folders, those that contain the link excepted, and no folder is entered twice.

    Raises `OptionError` for the option that chose the folder, if it cannot be listed or has no such files.
    """
    try:
        if not folder.is_dir():
            missing = "is a file, not a folder" if folder.exists() else "no such folder"
            raise OptionError(option, folder, f"{missing}; name the folder with {what}")
        os.scandir(folder).close()
    except OSError as problem:
        raise OptionError(option, folder, f"cannot be listed ({one_line(problem)})") from None
    found: list[tuple[list[str], str]] = []
    unlisted: dict[str, str] = {}
    root = os.path.realpath(folder)
    folders, links, entered = [""], list[str](), set[str]()
    endings = tuple(suffixes)
    while folders or links:
        current = folders.pop() if folders else links.pop(0)  # its name, and "/"
        real = os.path.realpath(folder / current)
        if real in entered:
            continue
        entered.add(real)
        linked = real != os.path.join(root, *current.split("/")[:-1])
        try:
            with os.scandir(folder / current) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as problem:
            unlisted[current] = one_line(problem, 120)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name in HIDDEN:
                continue
            name = current + entry.name
            if not _is_folder(entry):
                if entry.name.lower().endswith(endings):
                    there = f" {os.path.realpath(entry.path)}" if linked or entry.is_symlink() else ""
                    if (size_and_time := stamp(entry)) is not None:
                        found.append((name.split("/"), f"{size_and_time}{there}"))
            elif not entry.is_symlink():
                folders.append(f"{name}/")
            elif not _contains(os.path.realpath(entry.path), real):
                links.append(f"{name}/")
    if not found:
        kind = "image " if suffixes is SUFFIXES else ""
        known = ", ".join(sorted(suffixes))
        closed = f", and folders that cannot be listed: {len(unlisted):,}" if unlisted else ""
        raise OptionError(option, folder, f"has no {kind}files ({known}){closed}; name a folder with some")
    found.sort()
    return Listing(["/".join(parts) for parts, _ in found], unlisted, [stamp for _, stamp in found])


def _contains(folder: str, other: str) -> bool:
    """Whether a real path is another one or a folder above it."""
    return os.path.join(other, "").startswith(os.path.join(folder, ""))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def stamp(entry: os.DirEntry | Path) -> str | None:
    """Size and time of a file; "" if it cannot be read, such as a broken link; None if it is not a regular file."""
    try:
        status = entry.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else None


class Layout(NamedTuple):
    """How folders arrange images: which are splits, and which are classes. `animals/train/cats/1.png` has all of them.

    Names are relative to the folder with all images, with `/` between their parts.
    """

    above: int  # number of leading folders that all images share or that are splits; the next folder is the class
    train: frozenset[str]  # splits: folders, relative to the folder with all images; empty if none are
    test: frozenset[str]
    validation: frozenset[str] = frozenset()  # where there are folders of all three

    @classmethod
    def of(cls, names: Iterable[str]) -> "Layout":
        """The layout of the image files of these names."""
        parents = [name.split("/")[:-1] for name in names]
        pairs = zip(min(parents), max(parents), strict=False)
        shared = [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        tops = {parent[len(shared)] for parent in parents if len(parent) > len(shared)}
        splits = [{top for top in tops if top.casefold() in known} for known in SPLITS]
        above = len(shared) + bool(tops and tops == set.union(*splits))
        train, test, validation = splits if splits[1] else (splits[0], splits[2], set())
        if not (train and test):
            return cls(above, frozenset(), frozenset())
        named = (frozenset("/".join([*shared, top]) for top in split) for split in (train, test, validation))
        return cls(len(shared) + 1, *named)

    def split(self, name: str) -> str | None:
        """`train`, `validation` or `test`, by folder; None without such folders, and for an image outside them."""
        for split, folders in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            if any(name.startswith(f"{folder}/") for folder in folders):
                return split
        return None

    def label(self, name: str) -> str | None:
        """The folder that is an image's class, or None."""
        parts = name.split("/")[self.above :]
        return parts[0] if len(parts) > 1 else None


def split_of(name: str) -> str:
    """The split word at the beginning of a file's name, or else of its nearest folder; "" if there is none.

    `data/train-00000-of-00002.parquet` is of `train`, and so is `train/0000.parquet`.
    """
    words = (SPLIT_WORD.match(part) for part in reversed(name.split("/")))
    return next((match[1] for match in words if match), "")


def in_order(classes: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: that of numbers if all are numbers, else that of the alphabet."""
    names = sorted(set(classes))
    numbers = all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name) for name in names)
    return sorted(names, key=float) if numbers else names
