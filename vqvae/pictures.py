"""A tree of picture files, converted once into one memory-mapped array.

N pictures, C channels, S pixels a side.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqvae.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read_tree(folder: Path, size: int, channels: int, order: Callable[[str], float]) -> tuple[Tensor, list[str], str]:
    """The pictures below a folder: `[N, C, S, S]` uint8 mapped from a cache, their relative paths, and a note.

    The N pictures come in the order of their paths' keys. Files that cannot be read are counted, named in a warning
    and left out; `UserError` if none is left.
    """
    files = picture_files(folder, "--data-dir")
    files.sort(key=lambda p: (order(p.relative_to(folder).as_posix()), p))
    stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([1, size, channels, stamps]).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae"
    array, index = cache / f"{key}.npy", cache / f"{key}.json"
    if not (index.exists() and array.exists()):  # the index is written last: it means that the array was whole
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _convert(files, folder, size, channels, array, index)
        except OSError as problem:
            reason = problem.strerror or problem
            raise UserError(
                f"{cache}: cannot cache pictures there ({reason}); set XDG_CACHE_HOME to a folder that can"
            ) from None
    content = json.loads(index.read_text())
    paths, unreadable = content["paths"], content["unreadable"]
    note = ""
    if unreadable:
        named = ", ".join(unreadable[:3]) + (" ..." if len(unreadable) > 3 else "")
        note = f"{len(unreadable)} unreadable files left out"
        warnings.warn(f"--data-dir {folder}: {len(unreadable)} unreadable files left out: {named}", stacklevel=2)
    if not paths:
        raise UserError(f"--data-dir {folder}: none of its {len(unreadable)} pictures can be read")
    # copy-on-write: PyTorch wants writable memory, the file stays as it is
    return torch.from_numpy(np.load(array, mmap_mode="c")[: len(paths)]), paths, note


def picture_files(folder: Path, flag: str) -> list[Path]:
    """Every picture file below a folder, in the order of their paths; `UserError` with the flag's name if none is."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{flag} {folder}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return files


def _convert(files: list[Path], folder: Path, size: int, channels: int, array: Path, index: Path) -> None:
    paths, unreadable = [], []
    partial = array.with_name(array.name + f".{os.getpid()}.partial")
    pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(files), channels, size, size))
    for path in tqdm(files, desc="reading pictures", unit="file", disable=None if len(files) > 200 else True):
        name = path.relative_to(folder).as_posix()
        try:
            pixels[len(paths)] = read_picture(path, size, channels)
            paths.append(name)
        except Exception:  # decoders raise anything on a damaged file; every one is named in the end
            unreadable.append(name)
    pixels.flush()
    os.replace(partial, array)
    listing = index.with_name(index.name + f".{os.getpid()}.partial")
    listing.write_text(json.dumps({"paths": paths, "unreadable": unreadable}))
    os.replace(listing, index)


def read_picture(path: Path, size: int, channels: int) -> np.ndarray:
    """A picture file as `[C, S, S]` uint8: upright as EXIF says, on white where transparent, cropped square."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith(("I", "F")):  # 16 and 32 bits a pixel; PIL's own conversion would clip them
            values = np.asarray(picture, dtype=np.float64)
            top = 65535 if picture.mode.startswith("I") else max(float(values.max()), 1e-9)
            picture = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        picture = picture.convert("RGB" if channels == 3 else "L")
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    values = np.asarray(picture)
    return values.transpose(2, 0, 1) if channels == 3 else values[None]
