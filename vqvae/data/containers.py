"""Data sets from files that contain many images each: npz, parquet, and the tar files of WebDataset.

The images have names, as if they were files in a folder (`train/cats/1.png`). The names determine splits and classes in
the same way. Nothing in a file is executed or extracted.

N images, C channels, H W pixels.
"""

import contextlib
import functools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vqvae.archives import array_names, most_bytes, read_arrays
from vqvae.data.base import Dataset
from vqvae.data.cache import Contents
from vqvae.data.listing import SUFFIXES, Listing, list_files, split_of, stamp
from vqvae.data.sources import ImageOptions, Reading, dataset
from vqvae.decoding import Read, Shape, read_array, read_bytes, read_part, white
from vqvae.errors import OptionError, UserError, one_line
from vqvae.files import open_file, size_of
from vqvae.registry import Size

LARGEST_LABEL = 2**20  # bytes of a file with the label of an image, and of a header in a tar file


def npz(
    *, data_dir: Path, image_size: Size | None, reading: Reading, options: ImageOptions = ImageOptions()
) -> Dataset:
    """Images in an .npz file of NumPy: data_dir names the file, or a folder of such files.

    The arrays are named images and labels, x_train, y_train, x_test and y_test, train_images ..., or arr_0 and arr_1.
    Images are [N, H, W], [N, H, W, C] or [N, C, H, W], with 1, 3 or 4 channels, of uint8, uint16 or floats from 0 to
    1, 255 or 65535. Labels are integers or text, [N].

    Splits, size and cache are those of --dataset folder, where image 7 would be the file 000007.png.
    """
    return dataset(Npz(data_dir), image_size, options, reading)


def parquet(
    *, data_dir: Path, image_size: Size | None, reading: Reading, options: ImageOptions = ImageOptions()
) -> Dataset:
    """Images in a .parquet file, as on Hugging Face: data_dir names the file, or a folder of such files.

    The column image (or img) has encoded images, as bytes or as a struct of bytes and path; label has integers or text.
    Files whose names begin with train and test (or val) are splits. Needs pyarrow: pip install 'vqvae[data]'.

    Otherwise splits, size and cache are those of --dataset folder.
    """
    return dataset(Parquet(data_dir), image_size, options, reading)


def webdataset(
    *, data_dir: Path, image_size: Size | None, reading: Reading, options: ImageOptions = ImageOptions()
) -> Dataset:
    """Images in a .tar file: data_dir names the file, or a folder of such files.

    The label of a/7.jpg is the number or name in a/7.cls, or under label, cls or class in a/7.json. Without such files,
    folders are the classes. Files whose names begin with train and test (or val) are splits.

    Otherwise splits, size and cache are those of --dataset folder.
    """
    return dataset(WebDataset(data_dir), image_size, options, reading)


class Container(NamedTuple):
    """A file with many images."""

    path: Path
    split: str  # of its images, such as "train"; "" where no name says one


class Containers:
    """The container files that a path names, as a source of images. Raises `OptionError` if there are none."""

    kind: str
    suffix: str

    def __init__(self, path: Path):
        self.path = path
        if path.is_file():
            folder, found = path.parent, Listing([path.name], {}, [stamp(path) or ""])
        else:
            folder, found = path, list_files(path, "data_dir", [self.suffix], f"{self.suffix} files, or one of them")
        self.files = [Container(folder / name, split_of(name)) for name in found.names]
        self.unlisted = found.unlisted
        self._facts = [os.path.realpath(folder), found.names, found.stamps, [file.split for file in self.files]]

    def facts(self) -> Any:
        return self._facts

    def access(self, name: str) -> list[int]:
        return []

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """Open one of the files. Any exception in the block becomes a `UserError` about a damaged file."""
        try:
            with open_file(path) as file:
                yield file
        except (UserError, MemoryError):
            raise
        except Exception as problem:  # damaged files raise anything
            reason = one_line(problem)
            raise UserError(f"{path}: no {self.suffix} file of images ({reason}); replace it, or remove it") from None


class NpzSplit(NamedTuple):
    """The images of a split in an npz file."""

    split: str
    images: np.ndarray  # [N, H, W] or [N, H, W, C]
    labels: list[str | None]

    @classmethod
    def of(cls, split: str, images: np.ndarray, labels: np.ndarray | None) -> "NpzSplit":
        """Check the arrays of a split. Raises `ValueError` if they are not images and labels."""
        found = f"{images.dtype} {list(images.shape)}"
        if images.ndim == 4 and images.shape[3] not in CHANNELS and images.shape[1] in CHANNELS:
            images = np.moveaxis(images, 1, -1)
        if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in CHANNELS)) or not images.size:
            raise ValueError(f"images must be [N, H, W], [N, H, W, C] or [N, C, H, W], with C 1, 3 or 4, not {found}")
        if images.dtype.kind != "f" and images.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"images must be of uint8, uint16 or floats, not {found}")
        if labels is None:
            return cls(split, images, [None] * len(images))
        if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "iuU":
            shape = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"labels must be integers or text, [{len(images)}], not {shape}")
        return cls(split, images, [_label(value) for value in labels.ravel().tolist()])


CHANNELS = (1, 3, 4)
IMAGES = ("images", "image", "imgs", "x", "data", "arr_0", "")  # names of arrays, without the split
LABELS = ("labels", "label", "y", "targets", "target", "arr_1")


class Npz(Containers):
    """Arrays of images, which stay in memory while they are converted."""

    kind, suffix = "npz", ".npz"

    def contents(self) -> Contents:
        self.parts: list[NpzSplit] = []
        whites: dict[str, int] = {}  # of each kind of number: one for all arrays, so that equal values stay equal
        for container in self.files:
            with self.open(container.path) as file:
                for part in _parts(file):
                    self.parts.append(part._replace(split=part.split or container.split))
                    if (kind := part.images.dtype.kind) == "f" or part.images.dtype != np.uint8:
                        whites[kind] = max(whites.get(kind, 0), white(part.images, floats=kind == "f"))
        self.whites = whites
        counts = Counter[str]()
        names = []
        for split, images, _ in self.parts:
            names += [_inside(split, f"{i:06}.png") for i in range(counts[split], counts[split] + len(images))]
            counts[split] += len(images)
        return Contents(names, [label for part in self.parts for label in part.labels])

    def images(self, chosen: Sequence[int], shape: Shape) -> Iterator[tuple[int, Read]]:
        starts = np.cumsum([0, *(len(part.images) for part in self.parts)])
        for i in chosen:
            part = int(np.searchsorted(starts, i, side="right")) - 1
            values = self.parts[part].images[i - starts[part]]
            white = None if values.dtype == np.uint8 else self.whites[values.dtype.kind]
            yield i, functools.partial(read_array, values, white, shape)


def _parts(file: BinaryIO) -> list[NpzSplit]:
    """The images of each split in an npz file, and their labels."""
    roles: dict[tuple[str, str], str] = {}  # split and role -> name of the array
    names = array_names(file)
    for name in names:
        words = name.lower().split("_")
        split = next((word for word in words if split_of(word) == word), "")
        rest = "_".join(word for word in words if word != split)
        role = "images" if rest in IMAGES else "labels" if rest in LABELS else ""
        roles.setdefault((split, role), name)
    splits = [split for split, role in roles if role == "images"]
    if not splits:
        raise ValueError(
            f"its arrays are {', '.join(names)[:100] or 'none'}; images, or x_train and x_test, are needed"
        )
    arrays = read_arrays(file, [name for (split, role), name in roles.items() if role and split in splits])
    found = {key: arrays.get(name) for key, name in roles.items()}
    return [NpzSplit.of(split, arrays[roles[split, "images"]], found.get((split, "labels"))) for split in splits]


class Parquet(Containers):
    """Tables with a column of encoded images.

    A table states the size of its decompressed columns, which is limited here. A page that contradicts its table can
    still make pyarrow allocate 2 GiB.
    """

    kind, suffix = "parquet", ".parquet"

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            import pyarrow.parquet
        except ImportError:
            problem = "needs the package pyarrow: pip install 'vqvae[data]'"
            raise OptionError("dataset", self.kind, problem) from None
        self._parquet_file = pyarrow.parquet.ParquetFile

    def _open_table(self, file: BinaryIO) -> Any:
        """A pyarrow.parquet.ParquetFile. Raises `ValueError` for a table that is far larger than the file."""
        table, size = self._parquet_file(file), size_of(file)
        about = table.metadata
        if about.num_rows > size:
            raise ValueError(f"{about.num_rows:,} rows are far more than the file")
        total = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if total > most_bytes(size):
            raise ValueError(f"it decompresses to {total:,} bytes, which is far more than the file")
        return table

    def contents(self) -> Contents:
        names, labels = list[str](), list[str | None]()
        classes: list[str] | None = None
        counts = Counter[str]()
        for container in self.files:
            with self.open(container.path) as file:
                table = self._open_table(file)
                columns = _Columns.of(table.schema_arrow)
                paths, found = (
                    _column(table, name) if name else [None] * table.metadata.num_rows
                    for name in (columns.path, columns.label)
                )  # fmt: skip
                for path in paths:
                    inner = (path or "").replace("\\", "/").lstrip("/") or f"{counts[container.split]:06}.png"
                    names.append(_inside(container.split, inner))
                    counts[container.split] += 1
                labels += [columns.name(label) for label in found]
                classes = classes or columns.classes
        return Contents(names, labels if set(labels) - {None} else None, classes)

    def images(self, chosen: Sequence[int], shape: Shape) -> Iterator[tuple[int, Read]]:
        wanted, i = set(chosen), 0
        for container in self.files:
            with self.open(container.path) as file:
                table = self._open_table(file)
                column = _Columns.of(table.schema_arrow).image
                for batch in table.iter_batches(16, columns=[column]):
                    values = batch.column(0)
                    for value in values.field("bytes") if column.endswith(".bytes") else values:
                        if i in wanted:
                            yield i, functools.partial(read_bytes, value.as_py(), shape)
                        i += 1


class _Columns(NamedTuple):
    """The columns of a Hugging Face table that have its images and labels."""

    image: str  # encoded images
    path: str  # their paths, or ""
    label: str  # their labels, or ""
    classes: list[str] | None  # names of the labels 0, 1, ...

    @classmethod
    def of(cls, schema: Any) -> "_Columns":
        """Find the columns in a schema. Raises `ValueError` for a table without images."""
        image = next((name for name in ("image", "img") if name in schema.names), None)
        if image is None:
            raise ValueError(f"its columns are {', '.join(schema.names)[:100]}; image is needed")
        kind = schema.field(image).type
        fields = [kind.field(i).name for i in range(kind.num_fields)]
        path = f"{image}.path" if "path" in fields else ""
        image = f"{image}.bytes" if "bytes" in fields else image
        known = [name for name in ("label", "labels", "fine_label") if name in schema.names]
        label = next((name for name in known if re.match("u?int|(large_)?string", str(schema.field(name).type))), "")
        described: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for key in ("info", "features", label, "names"):
            described = described.get(key) if isinstance(described, dict) else None
        if not (isinstance(described, list) and all(isinstance(name, str) for name in described)):
            return cls(image, path, label, None)
        counts = Counter(described)  # ImageNet has two classes of one name
        names = [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(described)]
        return cls(image, path, label, names)

    def name(self, label: Any) -> str | None:
        """The name of a label's class, or None."""
        if self.classes is None or not isinstance(label, int) or label == -1:
            return _label(label)
        if not 0 <= label < len(self.classes):
            raise ValueError(f"the label {label}, and {len(self.classes)} classes")
        return self.classes[label]


def _column(table: Any, name: str) -> list[Any]:
    """The values of a column, or of a field of a struct (`image.path`)."""
    values: list[Any] = []
    for batch in table.iter_batches(columns=[name]):
        column = batch.column(0)
        values += (column.field(name.partition(".")[2]) if "." in name else column).to_pylist()
    return values


class WebDataset(Containers):
    """Tar files, read in place."""

    kind, suffix = "webdataset", ".tar"

    def contents(self) -> Contents:
        self.places: list[list[tuple[int, int]]] = []  # offset and size of each image, file by file
        names, labels = list[str](), list[str | None]()
        for container in self.files:
            with self.open(container.path) as file:
                images, known = _members(file)
            self.places.append(list(images.values()))
            names += [_inside(container.split, name) for name in images]
            labels += [known.get(_key(name)) for name in images]
        return Contents(names, labels if set(labels) - {None} else None)

    def images(self, chosen: Sequence[int], shape: Shape) -> Iterator[tuple[int, Read]]:
        places = [(file.path, place) for file, inside in zip(self.files, self.places, strict=True) for place in inside]
        for i in chosen:
            yield i, functools.partial(read_part, *places[i], shape)


def _members(file: BinaryIO) -> tuple[dict[str, tuple[int, int]], dict[str, str | None]]:
    """The offset and size of each image in a tar file, by name, and the labels by key."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str | None] = {}
    if file.read(2) == b"\x1f\x8b":
        raise ValueError("it is compressed with gzip; gunzip makes a .tar of it")
    file.seek(0)
    with tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:  # type: ignore[call-overload]
        while member := tar.next():
            tar.members.clear()  # it would keep all of them
            if tar.offset <= member.offset:  # after a negative size it would read the same header for ever
                raise ValueError(f"{member.name} has a size below 0")
            name = member.name.removeprefix("./").lstrip("/")
            hidden = any(part.startswith(".") for part in name.split("/"))
            if hidden or not member.isreg() or member.issparse():
                continue
            ending = name.removeprefix(_key(name)).lower()
            if PurePosixPath(name).suffix.lower() in SUFFIXES:
                images[name] = (member.offset_data, member.size)
            elif ending in (".cls", ".json"):
                if member.size > LARGEST_LABEL:
                    raise ValueError(f"{name} has {member.size:,} bytes")
                file.seek(member.offset_data)
                labels[_key(name)] = _label_in(file.read(member.size).decode(), ending)
    plain = {_key(name) for name in images if _is_plain(name)}  # next to 7.jpg, 7.seg.png is something else
    return {name: at for name, at in images.items() if _is_plain(name) or _key(name) not in plain}, labels


def _is_plain(name: str) -> bool:
    """Whether a file name has one dot."""
    return name.rpartition("/")[2].count(".") == 1


def _key(name: str) -> str:
    """The part that the names of an example's files share: all up to the first dot."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _label_in(text: str, ending: str) -> str | None:
    """The label in a .cls or .json file."""
    if ending == ".cls":
        return _label(text.strip())
    content = json.loads(text)
    found = [content[key] for key in ("label", "cls", "class") if key in content] if isinstance(content, dict) else []
    return _label(found[0]) if found and isinstance(found[0], int | str) else None


class _Bounded:
    """A file that limits the reads of `tarfile`, which trusts the sizes in headers."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, LARGEST_LABEL))


def _inside(split: str, name: str) -> str:
    """The name of an image in a file of this split."""
    return f"{split}/{name}" if split else name


def _label(value: Any) -> str | None:
    """An integer or text as the name of a class; None for -1, empty text and null."""
    if value is None or value in ("", "-1", -1):
        return None
    if not isinstance(value, int | str):
        raise ValueError(f"labels must be integers or text, not {type(value).__name__}")
    return str(value)
