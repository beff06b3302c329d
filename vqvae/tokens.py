"""Pictures to a file of codes, and a file of codes to pictures, a batch at a time: tokens for other programs.

N pictures, B batch, C channels, S pixels a side; a code's own shape is the bottleneck's `grid`.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqvae import pictures
from vqvae.autoencoder import Autoencoder
from vqvae.errors import UserError
from vqvae.files import cannot_write
from vqvae.stage_two import weights_checksum

FIELDS = ("codes", "num_codes", "grid", "image_shape", "files", "model")
COLOURS = {1: "grey", 3: "RGB"}  # what picture files can hold, by channels
READERS = 4  # threads that decode pictures, which releases Python's lock


class PictureFolder:
    """The pictures below a folder, in batches `[B, C, S, S]` uint8 of which two at most are in memory.

    Cropped and scaled as `--dataset folder` does it. Files that cannot be read are named on stderr and left out; the
    paths of the others, relative to the folder, gather in `names` as the batches come.
    """

    def __init__(self, folder: Path, model: Autoencoder, batch_size: int, limit: int | None = None):
        need_pictures(model, f"--input {folder}")
        self.folder, self.batch_size = folder, batch_size
        self.channels, self.size, _ = model.image_shape
        self.files = pictures.picture_files(folder, "--input")[:limit]
        self.names: list[str] = []

    def __len__(self) -> int:
        """How many files there are to read, some of which may turn out unreadable."""
        return len(self.files)

    def __iter__(self) -> Iterator[Tensor]:
        parts = [self.files[i : i + self.batch_size] for i in range(0, len(self.files), self.batch_size)]
        with ThreadPoolExecutor(READERS) as pool:
            ahead = None
            for part in [*parts, []]:  # the next batch is read while the model works on this one
                now, ahead = ahead, [(path, pool.submit(self._read, path)) for path in part]
                read = self._readable(now or [])
                if read:
                    yield torch.from_numpy(np.stack(read))

    def _read(self, path: Path) -> np.ndarray:
        return pictures.read_picture(path, self.size, self.channels)

    def _readable(self, jobs: list[tuple[Path, Future]]) -> list[np.ndarray]:
        read = []
        for path, job in jobs:
            name = path.relative_to(self.folder).as_posix()
            try:
                read.append(job.result())
                self.names.append(name)
            except Exception as problem:  # decoders raise anything on a damaged file
                reason = " ".join(str(problem).split())[:120] or type(problem).__name__
                tqdm.write(f"{name!r}: left out, cannot be read ({reason})", file=sys.stderr)
        return read


def need_pictures(model: Autoencoder, what: str) -> None:
    """`UserError` that begins with `what` unless the model's examples are pictures that a file can hold."""
    if not model.shows_pictures or model.image_shape[0] not in COLOURS:
        shape = "x".join(map(str, model.image_shape))
        raise UserError(f"{what}: the model's examples are {shape}, which no picture file holds; use --dataset")


def encode(model: Autoencoder, batches: Iterable[Tensor], at_most: int) -> np.ndarray:
    """The codes `[N, *grid]` of N <= `at_most` pictures that come in batches `[B, C, H, W]`; only codes are kept."""
    kind = np.uint16 if model.bottleneck.num_codes <= 1 << 16 else np.int32
    codes = np.empty((at_most, *model.bottleneck.grid), kind)
    count = 0
    with tqdm(total=at_most, desc="encoding", unit="picture", disable=None) as bar:
        for images in batches:
            codes[count : count + len(images)] = model.encode(images).cpu().numpy()
            count += len(images)
            bar.update(len(images))
    return codes[:count]


def write(file: BinaryIO, model: Autoencoder, codes: np.ndarray, *, files: list[str] = (), **more: Any) -> None:
    """Save codes `[N, *grid]` and what a reader needs to know of them as an npz without pickles."""
    np.savez_compressed(
        file,
        codes=codes,
        num_codes=model.bottleneck.num_codes,
        grid=np.array(model.bottleneck.grid),
        image_shape=np.array(model.image_shape),
        files=np.array(files, dtype=str),
        model=weights_checksum(model),
        **more,
    )


def read(path: Path, model: Autoencoder) -> tuple[np.ndarray, list[str]]:
    """The codes `[N, *grid]` of a file and the name of the picture that each becomes.

    The file may come from a stranger: `UserError` for one that is damaged, holds pickled objects, is of another model,
    or names a picture outside the folder it is to be written to.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `python -m vqvae encode` writes one")
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = {name: archive[name] for name in FIELDS}
    except Exception as problem:  # damaged archives raise anything
        reason = " ".join(str(problem).split())[:120] or type(problem).__name__
        raise UserError(f"{path}: truncated, or not a file of codes from `python -m vqvae encode` ({reason})") from None
    checksum = weights_checksum(model)
    if str(held["model"]) != checksum:
        raise UserError(
            f"{path}: its codes are those of model {str(held['model'])[:40]!r}, and --checkpoint is model {checksum}; "
            "give the checkpoint that encoded them"
        )
    codes, grid, num_codes = held["codes"], tuple(model.bottleneck.grid), model.bottleneck.num_codes
    for name, found, expected in [
        ("num_codes", held["num_codes"].tolist(), num_codes),
        ("grid", held["grid"].tolist(), list(grid)),
        ("image_shape", held["image_shape"].tolist(), list(model.image_shape)),
    ]:
        if found != expected:
            raise UserError(f"{path}: its {name} is {repr(found)[:40]}, and the model's {expected}; encode again")
    if codes.dtype.kind not in "iu" or codes.shape[1:] != grid or not len(codes):
        raise UserError(
            f"{path}: codes should be integers [N, {', '.join(map(str, grid))}], and are {codes.dtype} "
            f"{list(codes.shape)}"
        )
    if codes.min() < 0 or codes.max() >= num_codes:
        raise UserError(f"{path}: codes should be from 0 to {num_codes - 1}, and are {codes.min()} to {codes.max()}")
    return codes, _picture_names(path, held["files"], len(codes))


def _picture_names(path: Path, files: np.ndarray, count: int) -> list[str]:
    """`a/b.png` for a source `a/b.jpg`, `000000.png` ... where no sources are known; no two are the same."""
    if not files.size:
        return [f"{i:06}.png" for i in range(count)]
    if files.dtype.kind != "U" or files.shape != (count,) or len(set(files.tolist())) < count:
        raise UserError(f"{path}: files should be {count} different names, one for each row of codes, or none at all")
    for name in files.tolist():
        # Path reads a name as this system does: drives and backslashes matter on Windows alone
        if not Path(name).name or Path(name).anchor or ".." in Path(name).parts or "\0" in name:
            raise UserError(f"{path}: the file name {name[:80]!r} leads out of --output; remove it from files")
    sources = [PurePosixPath(name) for name in files.tolist()]
    short = [str(source.with_suffix(".png")) for source in sources]
    sharing = Counter(short)
    taken = {str(folder) for source in sources for folder in source.parents}
    names = []
    for source, name in zip(sources, short, strict=True):
        if sharing[name] > 1 or name in taken:  # a.jpg beside a.png: a.jpg.png and a.png.png
            name, number = f"{source}.png", 1
            while name in taken or name in sharing:
                number += 1
                name = f"{source}-{number}.png"
        taken.add(name)
        names.append(name)
    return names


def decode(model: Autoencoder, codes: np.ndarray, names: list[str], folder: Path, batch_size: int) -> None:
    """Write the picture of each row of codes `[N, *grid]` into a folder, under its name."""
    with tqdm(total=len(codes), desc="decoding", unit="picture", disable=None) as bar:
        for start in range(0, len(codes), batch_size):
            rows = torch.from_numpy(codes[start : start + batch_size].astype(np.int64))
            values = (model.decode(rows) * 255).round().to("cpu", torch.uint8).numpy()
            for name, pixels in zip(names[start : start + batch_size], values, strict=True):
                try:
                    _write_png(folder / name, pixels)
                except (OSError, ValueError) as problem:  # ValueError: a name that this file system cannot spell
                    raise cannot_write(folder / name, problem) from None
            bar.update(len(rows))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    """Save `[C, H, W]` uint8 under a name that must be free."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, format="PNG")
