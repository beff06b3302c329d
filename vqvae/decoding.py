"""Decode one image from a stranger, within bounds.

C channels, H W pixels.
"""

import contextlib
import importlib
import importlib.util
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

import numpy as np

from vqvae.files import open_file, size_of
from vqvae.registry import Size

if TYPE_CHECKING:
    from PIL import Image, ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no other decoder is tried, except those of PACKAGES
PACKAGES = {"HEIF": "pillow-heif", "AVIF": "pillow-avif-plugin"}  # format -> the optional package that reads it
BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIF": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"},
}  # words in the first bytes of a file in a format of PACKAGES
MOST_MEMORY = 500 * 2**20  # bytes to decode one image
LARGEST_FILE = 240 * 2**20  # bytes; a decoder may read the file twice
BITS_PER_SAMPLE, TILE_WIDTH, TILE_LENGTH = 258, 322, 323  # tags of TIFF


Resize = Literal["crop", "pad", "stretch"]  # how an image of another shape gets the size asked for


Read = Callable[[], np.ndarray]  # an image as `[C, H, W]` uint8; raises any exception if it cannot be read


class Shape(NamedTuple):
    """The shape that every image gets, and how."""

    size: Size
    channels: int = 3
    resize: Resize = "crop"


def read_image(path: Path, size: int | tuple[int, int], channels: int, resize: Resize = "crop") -> np.ndarray:
    """An image file as `[C, H, W]` uint8, see `decode` and `fit`."""
    with open_file(path) as file:
        if size_of(file) > LARGEST_FILE:
            raise ValueError(f"a file of more than {LARGEST_FILE >> 20} MiB")
        return decode(file, Shape(Size(size), channels, resize))


def read_part(path: Path, place: tuple[int, int], shape: Shape) -> np.ndarray:
    """An image file that lies in another file, at an offset and with a size, as `[C, H, W]` uint8."""
    offset, size = place
    with open_file(path) as file:
        file.seek(offset)
        return read_bytes(file.read(min(size, LARGEST_FILE + 1)), shape)


def read_bytes(raw: bytes | None, shape: Shape) -> np.ndarray:
    """The bytes of an image file as `[C, H, W]` uint8."""
    if not isinstance(raw, bytes):
        raise ValueError("no bytes")
    if len(raw) > LARGEST_FILE:
        raise ValueError(f"more than {LARGEST_FILE >> 20} MiB")
    return decode(io.BytesIO(raw), shape)


def read_array(values: np.ndarray, white: int | None, shape: Shape) -> np.ndarray:
    """An array `[H, W]` or `[H, W, C]` as `[C, H, W]` uint8; `white` is the value of white, None for uint8."""
    from PIL import Image

    if values.shape[0] * values.shape[1] * 14 > MOST_MEMORY:  # bytes per pixel, see `_open`
        raise ValueError(f"more than {MOST_MEMORY >> 20} MB; save it at a smaller size")
    if white is not None:
        values = eight_bits(values.astype(np.float64), white)
    if values.shape[2:] == (1,):
        values = values[..., 0]
    return fit(Image.fromarray(np.ascontiguousarray(values)), shape)


def decode(file: BinaryIO, shape: Shape) -> np.ndarray:
    """An open image file as `[C, H, W]` uint8, rotated as its EXIF data say.

    Pixels of 16 and 32 bits are scaled as `white` says. Raises any exception for a file that is no image, or one that
    takes more than 500 MB to decode.
    """
    from PIL import Image, ImageOps

    # Pillow warns only of images that `_open` refuses anyway. warnings.catch_warnings is not safe in threads.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    image: Image.Image = _open(file)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel, which PIL would clip to 8
        values = np.array(image, dtype=np.float64)
        image = Image.fromarray(eight_bits(values, white(values, floats=image.mode == "F")))
    return fit(image, shape)


def fit(image: "Image.Image", shape: Shape) -> np.ndarray:
    """An image of 8 bits as `[C, H, W]` uint8: transparency on white, gray or color, at the size asked for.

    `crop` scales it to fill that size and keeps the center, `pad` scales it to fit and adds black borders, and
    `stretch` changes its aspect.
    """
    from PIL import Image, ImageOps

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # which Pillow converts to RGB only
        image = image.convert("RGB")
    mode = "RGB" if shape.channels == 3 else "L"
    if image.mode != mode:
        image = image.convert(mode)
    height, width = shape.size
    if shape.resize == "crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    elif shape.resize == "pad":
        factor = min(width / image.width, height / image.height)
        inner = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.LANCZOS)
        image = Image.new(mode, (width, height))
        image.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    else:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if shape.channels == 3 else pixels[None]


def white(values: np.ndarray, *, floats: bool) -> int:
    """The value of white in images of more than 8 bits, so that equal values of different images stay equal.

    It is 65535 for integers. For floats it is 1, 255 or 65535: the first that no pixel exceeds. Raises `ValueError` for
    pixels that are below 0, above 65535, or not finite.
    """
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels that are not finite")
    whites, slack = ((1, 255, 65535), 0.001) if floats else ((65535,), 0)  # filters overshoot a little
    found = next((white for white in whites if high <= (1 + slack) * white), None)
    if found is None or low < -slack * found:
        raise ValueError(f"pixels from {low:g} to {high:g}; save it with 8 or 16 bits, or with floats from 0 to 1")
    return found


def eight_bits(values: np.ndarray, white: int) -> np.ndarray:
    """Values from 0 to `white`, of float64, as uint8. Changes the values."""
    values *= 255 / white
    return values.round(out=values).clip(0, 255, out=values).astype(np.uint8)


def optional_formats() -> list[str]:
    """The formats in PACKAGES that can be read here."""
    from PIL import features

    built_in = {"AVIF"} if importlib.util.find_spec("PIL.AvifImagePlugin") and features.check("avif") else set()
    return [name for name in PACKAGES if name in built_in or importlib.util.find_spec(_module(name))]


def _module(name: str) -> str:
    return PACKAGES[name].removesuffix("-plugin").replace("-", "_")


def _optional_format(file: BinaryIO) -> str | None:
    """Detect a format in PACKAGES and register it with Pillow; None for other formats.

    Raises `ValueError` that names the package if it is not installed.
    """
    start = file.read(64)
    file.seek(0)
    brands = {start[at : at + 4] for at in range(8, min(int.from_bytes(start[:4], "big"), 64), 4)}
    name = next((name for name, known in BRANDS.items() if known & brands), None)
    if start[4:8] != b"ftyp" or name is None:
        return None
    if name not in optional_formats():
        kind = "HEIC" if name == "HEIF" else name
        raise ValueError(f"{kind}, which needs a package: pip install {PACKAGES[name]}")
    with contextlib.suppress(ImportError):  # Pillow's own
        module = importlib.import_module(_module(name))
        if name == "HEIF":
            module.register_heif_opener()
    return name


def _open(file: BinaryIO) -> "ImageFile.ImageFile":
    """Open an image without decoding it. Raises `ValueError` if decoding would take too much memory or time.

    The bytes per pixel are the peaks of `read_image`, measured for every format and mode: 4 in memory, the rest for
    copies, for coefficients of progressive JPEG (6), for float64 (8), and for the canvases of WebP and AVIF (12).
    """
    from PIL import Image, UnidentifiedImageError

    optional = _optional_format(file)
    try:
        image = Image.open(file, formats=(optional,) if optional else FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        if file.read(4) in (b"II*\0", b"MM\0*"):
            raise ValueError("a TIFF of a kind that Pillow does not read, or damaged; save it as PNG") from None
        raise ValueError(f"no image in {optional or ', '.join(FORMATS)}") from None
    tags = getattr(image, "tag_v2", {})
    plain = image.mode in ("1", "L", "P", "RGB") and "transparency" not in image.info
    shallow = max(tags.get(BITS_PER_SAMPLE, (8,))) <= 8
    pixels = max(image.width * image.height, tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0))
    large = image.format in ("WEBP", "AVIF") or image.mode in ("I", "F")
    memory = pixels * (21 if large else 10 if plain and shallow else 14)
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
