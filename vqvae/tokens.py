"""Encode images to a file of codes and decode such a file to images, a batch at a time.

N images, B batch, C channels, H W pixels; `grid` is the bottleneck's code grid, (h, w).
"""

import contextlib
import copy
import glob
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqvae import checkpoint, data, distributed
from vqvae.archives import array_names, read_arrays
from vqvae.autoencoder import Autoencoder
from vqvae.checkpoint import weights_checksum
from vqvae.contracts import Discrete
from vqvae.data.base import fingerprint
from vqvae.data.listing import list_images
from vqvae.decoding import Resize, read_image
from vqvae.devices import choose_device
from vqvae.errors import OptionError, UserError, one_line, printable
from vqvae.files import WINDOWS, cannot_write, open_file, size_of, whole_file
from vqvae.progress import images_bar
from vqvae.registry import Choice, Size, resolve

FIELDS = ("codes", "num_codes", "grid", "image_shape", "files", "model")
ABOUT = {"model": ("U", 0), "num_codes": ("iu", 0), "grid": ("iu", 1), "image_shape": ("iu", 1)}  # type, dimensions
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

    def identity(self) -> str:
        """A checksum of what the examples are."""

    def share(self, number: int, count: int) -> "Source":
        """The source of one of `count` shares of the examples, in order."""


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
        found = list_images(folder, "input")
        self.files, self.stamps = [folder / name for name in found.names[:limit]], found.stamps[:limit]
        self.unlisted, self.whole = found.unlisted, True
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
        if self.whole and not self.names:
            raise OptionError("input", self.folder, f"none of its {len(self)} images can be read")

    def columns(self) -> dict[str, np.ndarray]:
        return {"files": np.array(self.names, dtype=str), "source": np.array(self.identity())}

    def identity(self) -> str:
        """A checksum of the files' paths, sizes and times, and of how they are read."""
        names = [path.relative_to(self.folder).as_posix() for path in self.files]
        about = list(zip(names, self.stamps, strict=True))
        return hashlib.sha256(repr((about, self.size, self.resize)).encode()).hexdigest()

    def share(self, number: int, count: int) -> "ImageFolder":
        part = copy.copy(self)
        mine = torch.arange(len(self.files)).tensor_split(count)[number].tolist()
        part.files, part.stamps = [self.files[i] for i in mine], [self.stamps[i] for i in mine]
        part.names, part.whole = [], False
        part.unlisted = self.unlisted if number == 0 else {}
        return part

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
            raise OptionError("dataset", choice.name, problem + "was trained on, or a folder of images")

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images.split(self.batch_size))

    def columns(self) -> dict[str, np.ndarray]:
        files = np.array([], dtype=str)
        return {"files": files, "labels": self.labels.numpy(), "source": np.array(self.identity())}

    def identity(self) -> str:
        """A checksum of the images and labels."""
        return fingerprint(self.images, self.labels)

    def share(self, number: int, count: int) -> "DatasetSplit":
        part = copy.copy(self)
        part.images, part.labels = (rows.tensor_split(count)[number] for rows in (self.images, self.labels))
        return part


def _skip(name: str, reason: str) -> None:
    tqdm.write(f"{name!r}: skipped, cannot be read ({printable(reason)})", file=sys.stderr)


def load_model(path: str, device: str) -> Autoencoder:
    """The model of a checkpoint. Raises `UserError` if its latent is continuous."""
    return restore(checkpoint.read_model(path), path, device)


def restore(content: dict[str, Any], path: str, device: str) -> Autoencoder:
    """Like `load_model`, from the entries that `checkpoint.read_model` returns."""
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
        raise OptionError(option, value, f"{problem}; encode a data set, or use vqvae.load in Python")


class Encoded(NamedTuple):
    """The outcome of `encode_shards`."""

    paths: list[Path]  # the files
    images: int  # encoded in this call or before
    kept: int  # files that were finished before


def encode_file(path: Path, model: Autoencoder, source: Source) -> np.ndarray:
    """Encode all examples of a source, write `path`, and return the codes `[N, *grid]`."""
    with whole_file(path) as file:
        codes = encode(model, source, len(source))
        write(file, model, codes, source.columns())
    return codes


def encode_shards(
    path: Path, model: Autoencoder, source: Source, shards: int | None = None, *, resume: bool = False
) -> Encoded:
    """Encode a source to one file, or to shards (see `shard_paths`), which processes share.

    By default there is one shard for each process, and one process writes `path` itself. With `resume`, files of the
    same model and the same examples are kept. Raises `UserError` if there are files that would be read in place of the
    shards, or together with them.
    """
    shards = shards or (distributed.world() if distributed.world() > 1 else None)
    if shards and path.exists():
        raise UserError(f"{path}: exists, and would be read in place of its shards; remove it, or use another name")
    paths, checksum = shard_paths(path, shards), weights_checksum(model)
    if shards and (others := sorted({*_shards_of(path)} - {*paths})):
        problem = f"{others[0].name} is one of another number of shards, next to which {path.name} stands for neither"
        raise UserError(f"{path}: {problem}; remove those, or use another name")
    images, kept = 0, 0
    for number in range(distributed.rank(), len(paths), distributed.world()):
        part = source if shards is None else source.share(number, len(paths))
        finished = _finished(paths[number], checksum, part.identity()) if resume else None
        kept += finished is not None
        images += len(encode_file(paths[number], model, part)) if finished is None else finished
    found = distributed.gather_objects((images, kept))
    return Encoded(paths, sum(images for images, _ in found), sum(kept for _, kept in found))


def shard_paths(path: Path, shards: int | None) -> list[Path]:
    """`codes-00000-of-00008.npz` ... for `codes.npz` in 8 shards; the path itself without shards."""
    if shards is None:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05}-of-{shards:05}{path.suffix}") for number in range(shards)]


def _finished(path: Path, checksum: str, identity: str) -> int | None:
    """The number of images in a file of codes of this model and these examples; None if it is not there."""
    with contextlib.suppress(Exception):  # damaged archives raise anything
        with open_file(path) as file:
            content = read_arrays(file, ("codes", "model", "source"))
        if (str(content["model"]), str(content["source"])) == (checksum, identity):
            return len(content["codes"])
    return None


def encode(model: Autoencoder, batches: Iterable[Tensor], at_most: int) -> np.ndarray:
    """The codes `[N, *grid]` of N <= `at_most` images that come in batches `[B, C, H, W]`. Only codes stay in memory.

    uint16, or int32 for more than 65,536 codes.
    """
    bottleneck = discrete(model)
    codes = np.empty((at_most, *bottleneck.grid), np.uint16 if bottleneck.num_codes <= 1 << 16 else np.int32)
    count = 0
    with images_bar(at_most, "encoding") as bar:
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


UNLABELED = np.empty(0, np.int64)


class Codes(NamedTuple):
    """The contents of files of `vqvae encode`."""

    codes: np.ndarray  # [N, *grid] integers, from 0 to num_codes - 1
    files: list[str]  # [N] the images' paths; empty for a data set
    labels: np.ndarray | None  # [N] labels of a data set, -1 where unknown
    num_codes: int
    image_shape: tuple[int, ...]  # [C, H, W]
    model: str  # checksum


def load_codes(files: str | Path | Sequence[str | Path]) -> Codes:
    """The codes in a file that `vqvae encode` wrote, or in all shards of one, in their order.

    `files` is a path, a pattern such as `codes-*.npz`, or a list of paths; `codes.npz` stands for its shards where
    there is no such file. The files are not trusted. Raises `UserError` if one is missing or damaged, or if they do
    not belong together.
    """
    paths = find_files(files)
    return _joined(paths, [_content(path) for path in paths])


def read(files: str | Path | Sequence[str | Path], model: Autoencoder) -> tuple[np.ndarray, list[str]]:
    """The codes `[N, *grid]` in a file or its shards, and the file name of each decoded image.

    `files` are those of `load_codes`, and are not trusted. Raises `UserError` if one is damaged, contains anything but
    arrays, comes from another model, or names an image outside the output folder.
    """
    bottleneck, checksum, paths = discrete(model), weights_checksum(model), find_files(files)
    contents = [_content(path) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        if str(content["model"]) != checksum:
            raise UserError(
                f"{path}: encoded by model {str(content['model'])[:40]!r}, and this is model {checksum}; "
                "use the checkpoint that encoded it"
            )
        for name, expected in [
            ("num_codes", bottleneck.num_codes),
            ("grid", list(bottleneck.grid)),
            ("image_shape", list(model.image_shape)),
        ]:
            found = content[name].tolist()
            if found != expected:
                problem = f"its {name} is {repr(found)[:40]}, and the model's is {expected}; encode again"
                raise UserError(f"{path}: {problem}")
    whole = _joined(paths, contents)
    return whole.codes, image_names(paths[0], np.array(whole.files, dtype=str), len(whole.codes))


SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.npz$")


def _shards_of(path: Path) -> list[Path]:
    """The files that are named like shards of `path`."""
    return [p for p in path.parent.glob(f"{glob.escape(path.stem)}-*-of-*{path.suffix}") if SHARD.search(p.name)]


def find_files(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that a path, a pattern or a list of paths names; shards in their order. See `load_codes`."""
    if isinstance(files, str | Path):
        path = Path(files)
        if os.path.exists(path):  # False for names that no file can have
            return [path]
        paths = sorted(_shards_of(path) or map(Path, glob.glob(str(path)))) or [path]
    else:
        paths = [*map(Path, files)]
        if not paths:
            raise UserError("the list of files of codes is empty; name at least one")
    found = [(path, match) for path in paths if (match := SHARD.search(path.name))]
    if not found:
        return paths
    counts = {int(match[2]) for _, match in found}
    if len(counts) > 1 or len(found) < len(paths):
        of_first = found[0][1][2]
        other = next(p for p in paths if not (match := SHARD.search(p.name)) or match[2] != of_first)
        raise UserError(f"{found[0][0]}: does not belong to {other}; name the shards of one encoding")
    missing = set(range(*counts)) - {int(match[1]) for _, match in found}
    if missing or len(found) > max(counts):
        first = SHARD.sub(f"-{min(missing, default=0):05}-of-{max(counts):05}.npz", str(found[0][0]))
        raise UserError(f"{first}: this shard is {'missing' if missing else 'given twice'}; encode again with resume")
    return sorted(paths, key=lambda path: path.name)


def _content(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a file of codes, each within its bounds. Raises `UserError` if the file is damaged."""
    try:
        with open_file(path) as file:
            labels = ("labels",) if "labels" in array_names(file) else ()
            content, most = read_arrays(file, (*FIELDS, *labels)), max(ALWAYS_DECODED, size_of(file))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `vqvae encode` writes one") from None
    except Exception as problem:  # damaged archives raise anything
        reason = one_line(problem, 120)
        refusal = f"truncated, or not a file that `vqvae encode` wrote ({reason}); encode again"
        raise UserError(f"{path}: {refusal}") from None
    for name in ABOUT:
        if content[name].size > 8:
            raise UserError(f"{path}: its {name} has {content[name].size:,} values; encode again")
    codes = content["codes"]
    if codes.ndim and len(codes) > most:
        raise UserError(f"{path}: {len(codes):,} images are far more than a file of this size contains; encode again")
    return content


def _joined(paths: list[Path], contents: list[dict[str, np.ndarray]]) -> Codes:
    """Files of codes as one. Raises `UserError` if codes are out of range, or files do not belong together."""
    first = contents[0]
    for name, (kinds, dimensions) in ABOUT.items():
        value = first[name]
        if value.dtype.kind not in kinds or value.ndim != dimensions or not value.size:
            raise UserError(f"{paths[0]}: its {name} is not as `vqvae encode` writes it; encode again")
    for path, content in zip(paths, contents, strict=True):
        for name in ABOUT:
            if content[name].tolist() != first[name].tolist():
                raise UserError(f"{path}: its {name} is not that of {paths[0]}; encode both again")
        codes, grid = content["codes"], tuple(first["grid"].tolist())
        if codes.dtype.kind not in "iu" or codes.shape[1:] != grid or not (len(codes) or len(paths) > 1):
            wanted = f"integers [N, {', '.join(map(str, grid))}]"
            raise UserError(f"{path}: codes must be {wanted}, not {codes.dtype} {list(codes.shape)}; encode again")
        if len(codes) and (codes.min() < 0 or codes.max() >= first["num_codes"]):
            found = f"{codes.min()} to {codes.max()}"
            raise UserError(f"{path}: codes must be from 0 to {int(first['num_codes']) - 1}, not {found}; encode again")
        files, labels = content["files"], content.get("labels", UNLABELED)
        if files.size and (files.dtype.kind != "U" or files.shape != (len(codes),)):
            raise UserError(_names_problem(path, len(codes)))
        if labels.shape != (0,) and (labels.dtype.kind not in "iu" or labels.shape != (len(codes),)):
            raise UserError(f"{path}: labels must be {len(codes)} integers, or empty")
    joined = np.concatenate([content["codes"] for content in contents])
    labels = np.concatenate([content.get("labels", UNLABELED).astype(np.int64) for content in contents])
    return Codes(
        joined,
        [name for content in contents for name in content["files"].tolist()],
        labels if len(labels) == len(joined) else None,
        int(first["num_codes"]),
        tuple(first["image_shape"].tolist()),
        str(first["model"]),
    )


def _names_problem(path: Path, count: int) -> str:
    return f"{path}: files must be {count} different names, one for each row of codes, or empty"


def image_names(path: Path, files: np.ndarray, count: int) -> list[str]:
    """Unique PNG names: `a/b.png` for a source `a/b.jpg`, or `000000.png` ... without sources.

    Errors begin with `path`, the file of codes that contains the names.
    """
    if not files.size:
        return [f"{i:06}.png" for i in range(count)]
    if files.shape != (count,) or len(set(files.tolist())) < count:
        raise UserError(_names_problem(path, count))
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
    with images_bar(len(codes), "decoding") as bar:
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
