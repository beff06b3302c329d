"""Encode images to a file of codes and decode such a file to images, a batch at a time.

N images, B batch, C channels, H W pixels; `grid` is the bottleneck's code grid, (h, w).
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqvae import checkpoint, data
from vqvae.archives import read_arrays, size_of
from vqvae.autoencoder import Autoencoder
from vqvae.checkpoint import weights_checksum
from vqvae.contracts import Discrete
from vqvae.data.decoding import Resize, read_image
from vqvae.data.listing import list_images
from vqvae.devices import choose_device
from vqvae.errors import OptionError, UserError, one_line, printable
from vqvae.files import WINDOWS, cannot_write, open_file, whole_file
from vqvae.registry import Choice, Size, resolve

FIELDS = ("codes", "num_codes", "grid", "image_shape", "files", "model")
COLORS = {1: "gray", 3: "RGB"}  # what an image file can store, by number of channels
ALWAYS_DECODED = 1_000_000  # images that a file of any size may contain; larger files contain up to one per byte
NOT_ON_WINDOWS = re.compile(
    r'[<>:"|?*\x00-\x1f]|[ .]$|^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)', re.IGNORECASE
)  # in a part of a path
READERS = 4  # threads that read image files; decoding releases Python's lock


class Source(Protocol):
    """Examples to encode."""

    def __len__(self) -> int:
        """The number of examples, unreadable ones included."""

    def __iter__(self) -> Iterator[Tensor]:
        """Batches `[B, C, H, W]`."""

    def columns(self) -> dict[str, np.ndarray]:
        """Arrays to store next to the codes, complete after the last batch: `files`, and `labels` where known."""


class ImageFolder:
    """The images below a folder, in batches `[B, C, H, W]` uint8; at most two batches are in memory.

    Images are brought to the model's size as `resize` says. Files that cannot be read are named on stderr and
    skipped. `names` collects the relative paths of the others as the batches are read.
    """

    def __init__(
        self, folder: Path, model: Autoencoder, batch_size: int, limit: int | None = None, resize: Resize = "crop"
    ):
        need_images(model, "input", folder)
        self.folder, self.batch_size = folder, batch_size
        self.channels, self.size, self.resize = model.image_shape[0], Size(model.image_shape[1:]), resize
        files, self.unlisted = list_images(folder, "input")
        self.files = files[:limit]
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Tensor]:
        parts = [self.files[i : i + self.batch_size] for i in range(0, len(self.files), self.batch_size)]
        for name, reason in self.unlisted.items():
            _skip(name, reason)
        with ThreadPoolExecutor(READERS) as pool:
            ahead: list[tuple[Path, Future]] = []
            for part in [*parts, []]:  # the threads read the next batch while the model encodes this one
                now, ahead = ahead, [(path, pool.submit(self._read, path)) for path in part]
                if images := self._readable(now):
                    yield torch.from_numpy(np.stack(images))
        if not self.names:
            raise OptionError("", "input", self.folder, f"none of its {len(self)} images can be read")

    def columns(self) -> dict[str, np.ndarray]:
        return {"files": np.array(self.names, dtype=str)}

    def _read(self, path: Path) -> np.ndarray:
        return read_image(path, self.size, self.channels, self.resize)

    def _readable(self, jobs: list[tuple[Path, Future]]) -> list[np.ndarray]:
        images = []
        for path, job in jobs:
            name = path.relative_to(self.folder).as_posix()
            try:
                images.append(job.result())
                self.names.append(name)
            except Exception as problem:  # decoders raise anything on a damaged file
                _skip(name, one_line(problem, 120))
        return images


class DatasetSplit:
    """A split of a data set, scaled to the model's size. Raises `OptionError` for examples of another shape."""

    def __init__(
        self,
        choice: Choice,
        model: Autoencoder,
        batch_size: int,
        *,
        split: str = "train",
        data_dir: str | Path = "data",
        limit: int | None = None,
    ):
        choice = resolve(data.SLOT, choice)
        sized = model.shows_images and choice.name != "gauss2d"  # points have no size
        size = Size(model.image_shape[1:]) if sized else None
        dataset = data.load(choice.name, data_dir=Path(data_dir), image_size=size, limit=limit, **choice.options)
        for name, reason in dataset.unreadable.items():
            _skip(name, reason)
        self.images, self.labels = getattr(dataset, split)
        self.batch_size = batch_size
        if tuple(self.images.shape[1:]) != model.image_shape:
            found, wanted = ("x".join(map(str, shape)) for shape in (self.images.shape[1:], model.image_shape))
            problem = f"its examples are {found}, and the model's are {wanted}; encode the data set that the model "
            raise OptionError("", "dataset", choice.name, problem + "was trained on, or a folder of images")

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images.split(self.batch_size))

    def columns(self) -> dict[str, np.ndarray]:
        return {"files": np.array([], dtype=str), "labels": self.labels.numpy()}


def _skip(name: str, reason: str) -> None:
    tqdm.write(f"{name!r}: skipped, cannot be read ({printable(reason)})", file=sys.stderr)


def load_model(path: str, device: str) -> Autoencoder:
    """The model of a checkpoint. Raises `UserError` if its latent is continuous."""
    return restore(checkpoint.read_model(path), path, device)


def restore(content: dict[str, Any], path: str, device: str) -> Autoencoder:
    """The same from the entries of the checkpoint, which `read_model` gives."""
    model = checkpoint.restore(content, path).to(choose_device(device))
    discrete(model, path)
    return model


def discrete(model: Autoencoder, name: str = "the model") -> Discrete:
    """The model's discrete bottleneck. Raises `UserError`, which begins with `name`, if the latent is continuous."""
    if model.discrete is None:
        raise UserError(
            f"{name}: the latent is continuous and has no codes; "
            "`vqvae export` writes programs that map images to latent means and back"
        )
    return model.discrete


def need_images(model: Autoencoder, option: str, value: object) -> None:
    """Raise `OptionError` for this option unless the model's examples are images that a file can store."""
    if not model.shows_images or model.image_shape[0] not in COLORS:
        shape = "x".join(map(str, model.image_shape))
        problem = f"the model's examples are {shape}, which image files cannot store"
        raise OptionError("", option, value, f"{problem}; encode a data set, or use vqvae.load in Python")


def encode_file(path: Path, model: Autoencoder, source: Source) -> np.ndarray:
    """Encode all examples of a source, write `path`, and return the codes `[N, *grid]`."""
    with whole_file(path) as file:
        codes = encode(model, source, len(source))
        write(file, model, codes, source.columns())
    return codes


def encode(model: Autoencoder, batches: Iterable[Tensor], at_most: int) -> np.ndarray:
    """The codes `[N, *grid]` of N <= `at_most` images that come in batches `[B, C, H, W]`. Only codes stay in memory.

    uint16, or int32 for more than 65,536 codes.
    """
    bottleneck = discrete(model)
    codes = np.empty((at_most, *bottleneck.grid), np.uint16 if bottleneck.num_codes <= 1 << 16 else np.int32)
    count = 0
    with tqdm(total=at_most, desc="encoding", unit="image", disable=None) as bar:
        for images in batches:
            codes[count : count + len(images)] = model.encode(images).cpu().numpy()
            count += len(images)
            bar.update(len(images))
    return codes[:count]


def write(file: BinaryIO, model: Autoencoder, codes: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    """Save codes `[N, *grid]`, a source's columns, and what identifies the model, as an npz without pickles."""
    bottleneck = discrete(model)
    arrays: dict[str, Any] = {
        "codes": codes,
        "num_codes": bottleneck.num_codes,
        "grid": bottleneck.grid,
        "image_shape": model.image_shape,
        "model": weights_checksum(model),
        **columns,
    }
    np.savez_compressed(file, **arrays)


def read(path: Path, model: Autoencoder) -> tuple[np.ndarray, list[str]]:
    """The codes `[N, *grid]` in a file, and the file name of each decoded image.

    The file is not trusted. Raises `UserError` if it is damaged, contains anything but arrays, comes from another
    model, or names an image outside the output folder.
    """
    try:
        with open_file(path) as file:
            content, most = read_arrays(file, FIELDS), max(ALWAYS_DECODED, size_of(file))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `vqvae encode` writes one") from None
    except Exception as problem:  # damaged archives raise anything
        reason = one_line(problem, 120)
        refusal = f"truncated, or not a file that `vqvae encode` wrote ({reason}); encode again"
        raise UserError(f"{path}: {refusal}") from None
    bottleneck, checksum = discrete(model), weights_checksum(model)
    for name in ("model", "num_codes", "grid", "image_shape"):
        if content[name].size > 8:
            raise UserError(f"{path}: its {name} has {content[name].size:,} values; encode again")
    if str(content["model"]) != checksum:
        raise UserError(
            f"{path}: encoded by model {str(content['model'])[:40]!r}, and this is model {checksum}; "
            "use the checkpoint that encoded it"
        )
    codes, grid, num_codes = content["codes"], tuple(bottleneck.grid), bottleneck.num_codes
    for name, expected in [
        ("num_codes", num_codes),
        ("grid", list(grid)),
        ("image_shape", list(model.image_shape)),
    ]:
        found = content[name].tolist()
        if found != expected:
            raise UserError(f"{path}: its {name} is {repr(found)[:40]}, and the model's is {expected}; encode again")
    if codes.dtype.kind not in "iu" or codes.shape[1:] != grid or not len(codes):
        wanted = f"integers [N, {', '.join(map(str, grid))}]"
        raise UserError(f"{path}: codes must be {wanted}, not {codes.dtype} {list(codes.shape)}; encode again")
    if len(codes) > most:
        raise UserError(f"{path}: {len(codes):,} images are far more than a file of this size contains; encode again")
    if codes.min() < 0 or codes.max() >= num_codes:
        found = f"{codes.min()} to {codes.max()}"
        raise UserError(f"{path}: codes must be from 0 to {num_codes - 1}, not {found}; encode again")
    return codes, image_names(path, content["files"], len(codes))


def image_names(path: Path, files: np.ndarray, count: int) -> list[str]:
    """Unique PNG names: `a/b.png` for a source `a/b.jpg`, or `000000.png` ... without sources.

    Errors begin with `path`, the file of codes that contains the names.
    """
    if not files.size:
        return [f"{i:06}.png" for i in range(count)]
    if files.dtype.kind != "U" or files.shape != (count,) or len(set(files.tolist())) < count:
        raise UserError(f"{path}: files must be {count} different names, one for each row of codes, or empty")
    for name in files.tolist():
        # Path follows the rules of this system: drives and backslashes count on Windows only
        if not Path(name).name or Path(name).anchor or ".." in Path(name).parts or "\0" in name:
            raise UserError(f"{path}: the file name {name[:80]!r} leads out of the output folder; remove it from files")
        if len(name) > 1024 or len(Path(name).parts) > 50:
            raise UserError(f"{path}: the file name {name[:80]!r} is too long; change it in files")
    sources = [PurePosixPath(name) for name in files.tolist()]
    short = [str(source.with_suffix(".png")) for source in sources]
    sharing = Counter(short)
    taken = {str(folder) for source in sources for folder in source.parents if folder.name.endswith(".png")}
    names = []
    for source, name in zip(sources, short, strict=True):
        if sharing[name] > 1 or name in taken:  # a.jpg next to a.png: a.jpg.png and a.png.png
            name, number = f"{source}.png", 1
            while name in taken or name in sharing:
                number += 1
                name = f"{source}-{number}.png"
        if not _possible(name):
            raise UserError(f"{path}: no file can have the name {name[:80]!r}; change it in files")
        taken.add(name)
        names.append(name)
    return names


def _possible(name: str, windows: bool = WINDOWS) -> bool:
    """Whether the parts of a path can be written as bytes, at most 255 each, as usual file systems demand.

    Windows takes some names for devices, writes others to where no program finds them, and changes some endings.
    """
    if windows and any(map(NOT_ON_WINDOWS.search, Path(name).parts)):
        return False
    try:
        return all(len(os.fsencode(part)) <= 255 for part in Path(name).parts)
    except UnicodeEncodeError:  # halves of a surrogate pair
        return False


def decode(model: Autoencoder, codes: np.ndarray, names: list[str], folder: Path, batch_size: int) -> None:
    """Decode codes `[N, *grid]` and write each image into a folder as a PNG file of that name."""
    with tqdm(total=len(codes), desc="decoding", unit="image", disable=None) as bar:
        for start in range(0, len(codes), batch_size):
            rows = torch.from_numpy(codes[start : start + batch_size].astype(np.int64))
            images = (model.decode(rows) * 255).round().to("cpu", torch.uint8).numpy()
            for name, pixels in zip(names[start : start + batch_size], images, strict=True):
                try:
                    _write_png(folder / name, pixels)
                except (OSError, ValueError) as problem:  # ValueError: a name that this file system does not allow
                    raise cannot_write(folder / name, problem) from None
            bar.update(len(rows))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    """Save pixels `[C, H, W]` uint8 as a new file; an existing one raises FileExistsError."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, format="PNG")
