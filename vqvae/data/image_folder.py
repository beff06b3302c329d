"""Folders of image files: finding and caching them, and the data set made of one.

N images, C channels, S pixels a side.
"""

import hashlib
import io
import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqvae.data.base import Dataset, Images
from vqvae.data.decoding import read_image
from vqvae.errors import OptionError, UserError, one_line
from vqvae.files import whole_file, write_text
from vqvae.registry import Passes, Range, checked

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@checked
def folder(
    *,
    data_dir: Path,
    image_size: int | None,
    holdout: Annotated[float, Range(above=0, below=1), "share of the images in the test split"] = 0.1,
    channels: Annotated[int, Passes(lambda c: c in (1, 3), "1 (gray) or 3 (color)"), "color channels"] = 3,
) -> Dataset:
    """Your own images: every PNG, JPEG, WebP, BMP, GIF and TIFF file below data_dir.

    The shorter side is scaled to image_size (default: 64), and the center square kept. If every image lies in a
    subfolder of data_dir, these subfolders are the classes. A hash of its path assigns each image to a split, so that
    new images move no other. The first run converts the files into a cache (~/.cache/vqvae) that later runs
    map into memory.
    """
    images, paths, note = cached_images(data_dir, image_size or 64, channels)
    if len(paths) < 2:
        raise OptionError("", "data_dir", data_dir, "has one readable image, and the two splits need two")
    train = min(max(sum(_position(path) >= holdout for path in paths), 1), len(paths) - 1)
    names = sorted({path.split("/")[0] for path in paths if "/" in path})
    classes = tuple(names) if len(names) > 1 and all("/" in path for path in paths) else ()
    index = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([index.get(path.split("/")[0], -1) for path in paths])
    return Dataset(
        "folder",
        Images(images[:train], labels[:train]),
        Images(images[train:], labels[train:]),
        tuple(map(_shown, classes)),
        note,
    )


def cached_images(folder: Path, size: int, channels: int) -> tuple[Tensor, list[str], str]:
    """The images below a folder as `[N, C, S, S]` uint8, mapped from a cache, with their relative paths and a note.

    They are sorted by descending position (see `_position`), which makes each split one slice of the mapped array.
    Unreadable files are skipped, with a warning that names them. Raises `UserError` if no image is left, or if the
    cache cannot be written.

    The cache is an array and an index with a checksum of both. A damaged one is made again, and so is one that lacks
    a file whose permissions have changed since.
    """
    files = image_files(folder, "data_dir")
    files.sort(key=lambda file: (-_position(file.relative_to(folder).as_posix()), file))
    key = hashlib.sha256(json.dumps([1, size, channels, [_stamp(file) for file in files]]).encode()).hexdigest()[:24]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae"
    except RuntimeError as problem:
        raise UserError(f"no place for the cache of images ({one_line(problem)}); set XDG_CACHE_HOME") from None
    array, index = cache / f"{key}.npy", cache / f"{key}.json"
    content = _stored(array, index)
    if content is None or any(_access(folder / name) != file["access"] for name, file in content["unreadable"].items()):
        try:
            content = _convert(files, folder, size, channels, array)
            try:
                write_text(index, json.dumps(content))
            except BaseException:
                array.unlink()  # without its index it would only fill the disk
                raise
        except UserError as problem:
            raise UserError(f"{problem} (this is the cache of images; XDG_CACHE_HOME sets its folder)") from None
    paths, unreadable = content["paths"], content["unreadable"]
    note = ""
    if unreadable:
        note = f"unreadable files left out: {len(unreadable)}"
        named = ", ".join(f"{_shown(name)}: {file['reason']}" for name, file in list(unreadable.items())[:3])
        named += ", ..." if len(unreadable) > 3 else ""
        warnings.warn(f"{folder}: {note} ({named})", stacklevel=2)
    if not paths:
        raise OptionError("", "data_dir", folder, f"none of its {len(unreadable)} image files can be read")
    # Copy-on-write: PyTorch expects writable memory, and the file must stay unchanged.
    return torch.from_numpy(np.load(array, mmap_mode="c")[: len(paths)]), paths, note


def image_files(folder: Path, option: str) -> list[Path]:
    """All image files below a folder, sorted by path. Named pipes, devices and sockets are left out.

    Raises `OptionError` for the option that chose the folder, if it cannot be listed or has no image files.
    """
    try:
        if not folder.is_dir():
            raise OptionError("", option, folder, "no such folder; name the one with the images")
        os.scandir(folder).close()
    except OSError as problem:
        raise OptionError("", option, folder, f"cannot be listed ({one_line(problem)})") from None
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and _may_be_file(path))
    if not files:
        raise OptionError(
            "", option, folder, f"has no image files ({', '.join(sorted(SUFFIXES))}); name a folder with some"
        )
    return files


def _may_be_file(path: Path) -> bool:
    """Whether a path is a regular file, or one of a folder that may not be entered."""
    try:
        return path.is_file()
    except OSError:
        return True


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


def _convert(files: list[Path], folder: Path, size: int, channels: int, array: Path) -> dict[str, Any]:
    """Write the readable images as a .npy file `[files, C, S, S]`, zeros at its end. Returns the content of its index:

    `paths` of the readable images, the other paths, each with its `access` and the `reason`, and `checksum`.
    """
    paths: list[str] = []
    unreadable: dict[str, dict[str, Any]] = {}
    shape = (len(files), channels, size, size)
    with whole_file(array) as out:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        out.write(header.getvalue())
        checksum = zlib.crc32(header.getvalue())
        for path in tqdm(files, desc="reading images", unit="file", disable=None if len(files) > 200 else True):
            name = path.relative_to(folder).as_posix()
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


def _stored(array: Path, index: Path) -> dict[str, Any] | None:
    """The content of the index of a cache, None if the cache is absent or damaged."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        checksum = 0
        with open(array, "rb") as file:
            while block := file.read(2**22):
                checksum = zlib.crc32(block, checksum)
        whole = content["checksum"] == _with_names(checksum, content["paths"], content["unreadable"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if whole else None


def _with_names(checksum: int, paths: list[str], unreadable: dict[str, dict[str, Any]]) -> int:
    """The CRC32 of the array, continued over the rest of the index."""
    return zlib.crc32(json.dumps([paths, unreadable]).encode(), checksum)


def _shown(name: str) -> str:
    """A file name without control characters, which a terminal would obey."""
    return name if name.isprintable() else repr(name)


def _position(path: str) -> float:
    """A number in [0, 1), a hash of the relative path. Images below `holdout` are the test split."""
    return int(hashlib.sha256(os.fsencode(path)).hexdigest()[:12], 16) / 16**12
