"""Decode one image file from a stranger, within bounds.

C channels, S pixels a side.
"""

import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from vqvae.files import open_file

if TYPE_CHECKING:
    from PIL import ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no other decoder is tried
MOST_MEMORY = 500 * 2**20  # bytes to decode one image
LARGEST_FILE = 240 * 2**20  # bytes; a decoder may read the file twice
BITS_PER_SAMPLE, TILE_WIDTH, TILE_LENGTH = 258, 322, 323  # tags of TIFF


def read_image(path: Path, size: int, channels: int) -> np.ndarray:
    """An image file as `[C, S, S]` uint8: rotated as its EXIF data say, transparency on white, cropped square.

    Raises any exception for a file that is no image, or one that takes more than 500 MB to decode.
    """
    from PIL import Image, ImageOps

    # warnings.catch_warnings is not safe in threads
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_FILE:
            raise ValueError(f"a file of more than {LARGEST_FILE >> 20} MiB")
        image: Image.Image = _open(file)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel, which PIL would clip to 8
            values = np.array(image, dtype=np.float64)
            white = 65535 if image.mode.startswith("I") else max(float(values.max()), 1e-9)
            if not math.isfinite(white):
                raise ValueError("pixels that are not finite")
            values *= 255 / white
            image = Image.fromarray(values.round(out=values).clip(0, 255, out=values).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mode = "RGB" if channels == 3 else "L"
        if image.mode != mode:
            image = image.convert(mode)
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _open(file: BinaryIO) -> "ImageFile.ImageFile":
    """The image of a file, not yet decoded, if it can be decoded within bounds.

    The bytes per pixel are the peaks of `read_image`, measured for every format and mode: 4 in memory, the rest for
    copies, for coefficients of progressive JPEG (6), for float64 (8), and for the canvases of WebP (12).
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"no image in {', '.join(FORMATS)}") from None
    tags = getattr(image, "tag_v2", {})
    plain = image.mode in ("1", "L", "P", "RGB") and "transparency" not in image.info
    shallow = max(tags.get(BITS_PER_SAMPLE, (8,))) <= 8
    pixels = max(image.width * image.height, tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0))
    memory = pixels * (21 if image.format == "WEBP" or image.mode in ("I", "F") else 10 if plain and shallow else 14)
    if memory > MOST_MEMORY:
        raise ValueError(
            f"{image.width}x{image.height} pixels take more than {MOST_MEMORY >> 20} MB; save it at a smaller size"
        )
    if image.format in ("JPEG", "MPO"):
        _check_scans(file)
    return image


def _check_scans(file: BinaryIO) -> None:
    """Raise `ValueError` for a JPEG with hundreds of scans, each of which is a pass over all pixels."""
    start = file.tell()
    file.seek(0)
    scans, size = 0, 0
    while block := file.read(2**20):
        scans += block.count(b"\xff\xda")
        size += len(block)
    file.seek(start)
    if scans > 100 + size // 2**15:  # a video that a phone has appended contains the marker once in 2**16 bytes
        raise ValueError(f"a JPEG of {scans} scans")
