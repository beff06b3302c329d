"""Readers of the formats in which data sets are published: IDX, pickled CIFAR batches, MATLAB.

Files come from strangers: nothing in them is executed, and every size in them is checked before it is used. The
parsers take bytes and raise any exception for damaged ones.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqvae.archives import Built, expect, unpickle
from vqvae.errors import UserError, one_line
from vqvae.files import open_file

LARGEST = 2**30  # bytes of a file, and of what it decompresses to
BLOCK = 2**20  # bytes read at once


def contents(path: Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in .gz. Raises `UserError` for more than 1 GiB."""
    blocks, size = [], 0
    try:
        with open_file(path) as file, gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file as source:
            while block := source.read(BLOCK):
                size += len(block)
                if size > LARGEST:
                    raise OSError(f"more than {LARGEST >> 20:,} MiB")
                blocks.append(block)
    except (OSError, EOFError, zlib.error) as problem:
        raise UserError(f"{path}: cannot be read ({one_line(problem)}); delete it to download it again") from None
    return b"".join(blocks)


def idx(raw: bytes) -> Tensor:
    """The values of an IDX file of unsigned bytes, uint8, with 1 to 4 axes.

    The file contains the magic bytes 0 0 8 rank, the sizes as big-endian uint32, then the values.
    """
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\x00\x00\x08" or not 1 <= rank <= 4 or len(raw) < 4 + 4 * rank:
        raise ValueError("not an IDX file of bytes")
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if len(values) != math.prod(shape):
        raise ValueError(f"{math.prod(shape)} values announced, {len(values)} found")
    return torch.from_numpy(values.reshape(shape).copy())


class PickledArray(Built):
    """Stands for a NumPy array of uint8. Its state is any value until `array` checks it."""

    def __init__(self, *_: Any):
        self.state: Any = None

    def build(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array, of uint8."""
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            raise ValueError("an array without its state")
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, Uint8):
            raise ValueError("an array of another type than uint8")
        if not (
            isinstance(shape, tuple) and len(shape) <= 4 and all(type(size) is int and size >= 0 for size in shape)
        ):
            raise ValueError("an array without a shape of up to 4 axes")
        if not isinstance(content, str | bytes) or len(content) != math.prod(shape):
            raise ValueError(f"an array of {math.prod(shape)} bytes that contains others")
        content = content.encode("latin-1") if isinstance(content, str) else content
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class Uint8(Built):
    """Stands for numpy.dtype("uint8"), whose state is its byte order."""

    def __init__(self, name: Any, *_: Any):
        if name not in ("u1", "|u1"):
            raise ValueError("an array of another type than uint8")


def _text(text: Any, *_: Any) -> str:
    """Python 3 pickles bytes for Python 2 as text and a call that encodes it; `PickledArray.array` encodes instead."""
    return expect(text, str)


KNOWN = {
    "numpy.core.multiarray _reconstruct": PickledArray,
    "numpy._core.multiarray _reconstruct": PickledArray,
    "numpy ndarray": None,  # an argument of the function above
    "numpy dtype": Uint8,
    "_codecs encode": _text,
}


def cifar_batch(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (uint8) and labels (int64) of a pickled batch, a dictionary with the keys `data` and `labels`.

    `pickle` would build arrays from sizes and types that the file chooses.
    """
    batch = unpickle(raw, KNOWN)
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise ValueError("no dictionary with data and labels")
    data, labels = batch["data"], batch["labels"]
    if not isinstance(data, PickledArray):
        raise ValueError("its data are no array")
    if isinstance(labels, PickledArray):
        return data.array(), labels.array().astype(np.int64)
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise ValueError("its labels are not integers")
    return data.array(), np.array(labels, dtype=np.int64)


Order = Literal["<", ">"]  # of the bytes of a number
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
HEAD = 1024  # bytes of a variable that contain its name
MOST_VARIABLES = 100


class Variable(NamedTuple):
    """The head of a variable in a MATLAB file."""

    name: str
    kind: int  # class of the array; 6 to 15 are numbers
    flags: int
    shape: tuple[int, ...]
    start: int  # where the values begin


def mat(raw: bytes, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of real numbers with these names in a MATLAB file of level 5, in the types in which they are stored.

    The file is a header of 128 bytes and a list of elements, one per variable, each compressed or not:
    type (uint32), size (uint32), bytes. The other variables are skipped.
    """
    if raw[126:128] not in (b"IM", b"MI"):
        raise ValueError("not a MATLAB file of level 5")
    order: Order = "<" if raw[126:128] == b"IM" else ">"
    found: dict[str, np.ndarray] = {}
    rest = memoryview(raw)[128:]
    for _ in range(MOST_VARIABLES):
        if not rest or len(found) == len(names):
            break
        kind, size = struct.unpack_from(f"{order}2I", rest)
        body, rest = rest[8 : 8 + size], rest[8 + size :]
        if len(body) < size:
            raise ValueError("cut short")
        inflate = zlib.decompressobj() if kind == COMPRESSED else None
        if inflate:
            kind, size = struct.unpack(f"{order}2I", inflate.decompress(body, 8))
        if kind != MATRIX:
            continue
        head = inflate.decompress(inflate.unconsumed_tail, HEAD) if inflate else bytes(body[:HEAD])
        variable = _variable(head, order)
        if variable.name in names:
            if size > LARGEST:
                raise ValueError(f"{variable.name} has {size:,} bytes")
            tail = inflate.decompress(inflate.unconsumed_tail, size) if inflate and size else body[HEAD:]
            found[variable.name] = _values(variable, b"".join([head, tail]), order)
    if absent := set(names) - found.keys():
        raise ValueError(f"it has no {' and no '.join(sorted(absent))}")
    return found


def _variable(head: bytes, order: Order) -> Variable:
    """The flags, shape and name with which a variable begins."""
    _, flags, at = _element(head, 0, order)
    _, shape, at = _element(head, at, order)
    _, name, at = _element(head, at, order)
    if len(flags) != 8 or len(shape) % 4:
        raise ValueError("a variable without flags or shape")
    word = struct.unpack_from(f"{order}I", flags)[0]
    sizes = struct.unpack(f"{order}{len(shape) // 4}i", shape)
    return Variable(bytes(name).decode("latin-1"), word & 0xFF, word >> 8 & 0xFF, sizes, at)


def _values(variable: Variable, content: bytes, order: Order) -> np.ndarray:
    name, kind, flags, shape, start = variable
    stored, values, _ = _element(content, start, order)
    if not 6 <= kind <= 15 or flags & 0x0A or stored not in NUMBERS:  # 8: complex, 2: logical
        raise ValueError(f"{name} is no array of real numbers")
    dtype = np.dtype(NUMBERS[stored]).newbyteorder(order)
    if not shape or min(shape) < 0 or len(shape) > 4 or math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"{name} has {len(values):,} bytes for the shape {list(shape[:4])}")
    return np.frombuffer(values, dtype).reshape(shape, order="F")


def _element(content: bytes, at: int, order: Order) -> tuple[int, memoryview, int]:
    """The type and the bytes of the element at an offset, and the offset of the next one, a multiple of 8."""
    kind, size = struct.unpack_from(f"{order}2I", content, at)
    start, end = at + 8, at + 8 + size
    if kind >> 16:  # up to 4 bytes stand in place of the size
        kind, size = kind & 0xFFFF, kind >> 16
        start, end = at + 4, at + 4 + size
    if end > len(content) or (start == at + 4 and size > 4):
        raise ValueError("cut short")
    return kind, memoryview(content)[start:end], -(-end // 8) * 8
