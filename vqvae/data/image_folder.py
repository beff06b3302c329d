"""Folders of image files: finding, reading and caching them, and the data set made of one.

N images, C channels, S pixels a side.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqvae.data.base import Dataset, Images
from vqvae.errors import OptionError, UserError
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
        "folder", Images(images[:train], labels[:train]), Images(images[train:], labels[train:]), classes, note
    )


def cached_images(folder: Path, size: int, channels: int) -> tuple[Tensor, list[str], str]:
    """The images below a folder as `[N, C, S, S]` uint8, mapped from a cache, with their relative paths and a note.

    They are sorted by descending position (see `_position`), which makes each split one slice of the mapped array.
    Unreadable files are skipped, with a warning that names them. Raises `UserError` if no image is left, or if the
    cache cannot be written.
    """
    files = image_files(folder, "data_dir")
    files.sort(key=lambda file: (-_position(file.relative_to(folder).as_posix()), file))
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([1, size, channels, stamps]).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae"
    array, index = cache / f"{key}.npy", cache / f"{key}.json"
    if not (index.exists() and array.exists()):
        try:
            listing = _convert(files, folder, size, channels, array)
            write_text(index, json.dumps(listing))  # written last: an index implies a complete array
        except UserError as problem:
            raise UserError(f"{problem} (this is the cache of images; XDG_CACHE_HOME sets its folder)") from None
    content = json.loads(index.read_text(encoding="utf-8"))
    paths, unreadable = content["paths"], content["unreadable"]
    note = ""
    if unreadable:
        note = f"unreadable files left out: {len(unreadable)}"
        named = ", ".join(unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
        warnings.warn(f"{folder}: {note} ({named})", stacklevel=2)
    if not paths:
        raise OptionError("", "data_dir", folder, f"none of its {len(unreadable)} image files can be read")
    # Copy-on-write: PyTorch expects writable memory, and the file must stay unchanged.
    return torch.from_numpy(np.load(array, mmap_mode="c")[: len(paths)]), paths, note


def image_files(folder: Path, option: str) -> list[Path]:
    """All image files below a folder, sorted by path.

    Raises `OptionError` for the option that chose the folder, if it does not exist or has no image files.
    """
    if not folder.is_dir():
        raise OptionError("", option, folder, "no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise OptionError("", option, folder, f"has no image files ({', '.join(sorted(SUFFIXES))})")
    return files


def read_image(path: Path, size: int, channels: int) -> np.ndarray:
    """An image file as `[C, S, S]` uint8: rotated as its EXIF data say, transparency on white, cropped square."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel, which PIL would clip to 8
            values = np.asarray(image, dtype=np.float64)
            white = 65535 if image.mode.startswith("I") else max(float(values.max()), 1e-9)
            image = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB" if channels == 3 else "L")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _convert(files: list[Path], folder: Path, size: int, channels: int, array: Path) -> dict[str, list[str]]:
    """Write the readable images as a .npy file `[files, C, S, S]`, zeros at its end. Returns which were readable."""
    paths, unreadable = [], []
    shape = (len(files), channels, size, size)
    with whole_file(array) as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for path in tqdm(files, desc="reading images", unit="file", disable=None if len(files) > 200 else True):
            name = path.relative_to(folder).as_posix()
            try:
                pixels = read_image(path, size, channels)
            except Exception:  # decoders raise anything on a damaged file
                unreadable.append(name)
            else:
                out.write(pixels.tobytes())
                paths.append(name)
        out.truncate(out.tell() + len(unreadable) * channels * size * size)
    return {"paths": paths, "unreadable": unreadable}


def _position(path: str) -> float:
    """A number in [0, 1), a hash of the relative path. Images below `holdout` are the test split."""
    return int(hashlib.sha256(os.fsencode(path)).hexdigest()[:12], 16) / 16**12
