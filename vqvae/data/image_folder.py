"""Folders of image files: finding and caching them, and the data set made of one.

N images, C channels, S pixels a side.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqvae.data.base import Dataset, Images
from vqvae.data.decoding import optional_formats, read_image
from vqvae.data.listing import Layout, in_order, list_images
from vqvae.errors import OptionError, UserError, one_line, shown
from vqvae.files import whole_file, write_text
from vqvae.registry import Passes, Range, checked


@checked
def folder(
    *,
    data_dir: Path,
    image_size: int | None,
    holdout: Annotated[float, Range(above=0, below=1), "share of the images in the test split"] = 0.1,
    channels: Annotated[int, Passes(lambda c: c in (1, 3), "1 (gray) or 3 (color)"), "color channels"] = 3,
) -> Dataset:
    """Your own images: every PNG, JPEG, WebP, BMP, GIF and TIFF file below data_dir, also behind links to folders.

    HEIC and AVIF files need a package, which their error names. Hidden files and folders are skipped. The shorter
    side is scaled to image_size (default: 64), and the center square kept.

    Folders train and test (or val) at the top are the splits. Without them, a hash of its path assigns each image to
    a split, so that new images move no other. If every image lies in a subfolder, of data_dir or of the splits, these
    subfolders are the classes. The first run converts the files into a cache (~/.cache/vqvae) that later runs map into
    memory.
    """
    images, paths, unreadable, layout, unused = cached_images(data_dir, image_size or 64, channels)
    if len(paths) < 2:
        raise OptionError("", "data_dir", data_dir, "has one readable image, and the two splits need two")
    notes = []
    if layout.train:
        train = sum(layout.split(path) == "train" for path in paths)
        for folders, count in ((layout.train, train), (layout.held_out, len(paths) - train)):
            if not count:
                raise OptionError("", "data_dir", data_dir, f"none of the images in {_listed(folders)} can be read")
        notes.append(f"split by the folders {_listed(layout.train)} and {_listed(layout.held_out)}")
        if unused:
            notes.append(f"images outside of these left out: {len(unused):,}, such as {shown(unused[0])}")
    else:
        train = min(max(sum(_position(path) >= holdout for path in paths), 1), len(paths) - 1)
    labels = [layout.label(path) for path in paths]
    names = in_order(label for label in labels if label is not None)
    outside = [path for path, label in zip(paths, labels, strict=True) if label is None]
    classes = names if len(names) > 1 and not outside else []
    if len(names) > 1 and outside:
        notes.append(f"no classes, because of images outside of them: {len(outside):,}, such as {shown(outside[0])}")
    if unreadable:
        notes.append(f"unreadable files left out: {len(unreadable):,}")
    numbers = {name: number for number, name in enumerate(classes)}
    indices = torch.tensor([numbers.get(label or "", -1) for label in labels])
    return Dataset(
        "folder",
        Images(images[:train], indices[:train]),
        Images(images[train:], indices[train:]),
        tuple(map(_shown, classes)),
        "; ".join(notes),
        unreadable=dict(sorted(unreadable.items())),
    )


class FolderImages(NamedTuple):
    """The images below a folder."""

    images: Tensor  # [N, C, S, S] uint8, mapped from a cache
    paths: list[str]  # of the images, relative to the folder
    unreadable: dict[str, str]  # paths of the other files, and why they cannot be read
    layout: Layout
    unused: list[str]  # paths of images that are in none of the folders that are splits


def cached_images(folder: Path, size: int, channels: int) -> FolderImages:
    """The images below a folder, those of the test split last: each split is one slice of the mapped array.

    Images outside the folders that are splits are left out. Raises `UserError` if no image is left, or if the cache
    cannot be written.

    The cache is an array and an index with a checksum of both. A damaged one is made again, and so is one that lacks
    a file whose permissions have changed since.
    """
    files, unreadable = list_images(folder, "data_dir")
    names = [file.relative_to(folder).as_posix() for file in files]
    layout = Layout.of(names)
    unused = [name for name in names if layout.train and not layout.split(name)]
    names = [name for name in names if not layout.train or layout.split(name)]
    names.sort(key=lambda name: (layout.split(name) == "test", -_position(name), name))
    facts = [2, size, channels, optional_formats(), [(name, *_stamp(folder / name)) for name in names]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae"
    except RuntimeError as problem:
        raise UserError(f"no place for the cache of images ({one_line(problem)}); set XDG_CACHE_HOME") from None
    array, index = cache / f"{key}.npy", cache / f"{key}.json"
    content = _stored(array, index, folder)
    if content is None:
        try:
            content = _convert(names, folder, size, channels, array)
            try:
                write_text(index, json.dumps(content))
            except BaseException:
                array.unlink()  # without its index it would only fill the disk
                raise
        except UserError as problem:
            content = _stored(array, index, folder)  # on Windows, where nobody replaces one that a faster process uses
            if content is None:
                where = "this is the cache of images; XDG_CACHE_HOME sets its folder"
                raise UserError(f"{problem} ({where})") from None
    paths = content["paths"]
    unreadable |= {name: file["reason"] for name, file in content["unreadable"].items()}
    if not paths:
        name, reason = next(iter(unreadable.items()))
        found = f"none of its {len(unreadable):,} image files can be read ({_shown(name)}: {reason})"
        raise OptionError("", "data_dir", folder, found)
    # Copy-on-write: PyTorch expects writable memory, and the file must stay unchanged.
    images = torch.from_numpy(np.load(array, mmap_mode="c")[: len(paths)])
    return FolderImages(images, paths, unreadable, layout, unused)


def _stamp(file: Path) -> tuple[str, int, int]:
    """Differs where the content of a file has changed: its path, size and time of modification."""
    try:
        status = file.stat()
        return str(file.resolve()), status.st_size, status.st_mtime_ns
    except OSError:
        return str(file), 0, 0


def _access(file: Path) -> list[int]:
    """Differs where a file may be read by others than before."""
    try:
        status = file.stat()
    except OSError:
        return []
    return [status.st_mode, status.st_uid, status.st_gid, status.st_ctime_ns, os.access(file, os.R_OK)]


def _convert(names: list[str], folder: Path, size: int, channels: int, array: Path) -> dict[str, Any]:
    """Write the readable images as a .npy file `[names, C, S, S]`, zeros at its end. Returns the content of its index:

    `paths` of the readable images, the other paths, each with its `access` and the `reason`, and `checksum`.
    """
    paths: list[str] = []
    unreadable: dict[str, dict[str, Any]] = {}
    shape = (len(names), channels, size, size)
    with whole_file(array) as out:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        out.write(header.getvalue())
        checksum = zlib.crc32(header.getvalue())
        for name in tqdm(names, desc="reading images", unit="file", disable=None if len(names) > 200 else True):
            path = folder / name
            access = _access(path)
            try:
                pixels = read_image(path, size, channels).tobytes()
            except Exception as problem:  # decoders raise anything on a damaged file
                unreadable[name] = {"access": access, "reason": _shown(one_line(problem, 120))}
            else:
                out.write(pixels)
                checksum = zlib.crc32(pixels, checksum)
                paths.append(name)
        for _ in unreadable:
            checksum = zlib.crc32(bytes(channels * size * size), checksum)
        out.truncate(out.tell() + len(unreadable) * channels * size * size)
    return {"paths": paths, "unreadable": unreadable, "checksum": _with_names(checksum, paths, unreadable)}


def _stored(array: Path, index: Path, folder: Path) -> dict[str, Any] | None:
    """The content of the index of a cache, None if the cache is absent, damaged, or lacks what can be read by now."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        checksum = 0
        with open(array, "rb") as file:
            while block := file.read(2**22):
                checksum = zlib.crc32(block, checksum)
        whole = content["checksum"] == _with_names(checksum, content["paths"], content["unreadable"])
        whole = whole and all(_access(folder / name) == file["access"] for name, file in content["unreadable"].items())
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if whole else None


def _with_names(checksum: int, paths: list[str], unreadable: dict[str, dict[str, Any]]) -> int:
    """The CRC32 of the array, continued over the rest of the index."""
    return zlib.crc32(json.dumps([paths, unreadable]).encode(), checksum)


def _shown(name: str) -> str:
    """A file name without control characters, which a terminal would obey."""
    return name if name.isprintable() else repr(name)


def _listed(folders: Iterable[str]) -> str:
    return " and ".join(shown(folder) for folder in sorted(folders))


def _position(path: str) -> float:
    """A number in [0, 1), a hash of the relative path. Images below `holdout` are the test split."""
    return int(hashlib.sha256(os.fsencode(path)).hexdigest()[:12], 16) / 16**12
