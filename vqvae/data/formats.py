"""Readers of the formats in which data sets are published: IDX, pickled CIFAR batches, MATLAB.

Files come from strangers: nothing in them is executed, and every size in them is checked before it is used. The
parsers take bytes and raise any exception for damaged ones.
"""

import gzip
import math
import pickletools
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

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

    The file holds the magic bytes 0 0 8 rank, the sizes as big-endian uint32, then the values.
    """
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\x00\x00\x08" or not 1 <= rank <= 4 or len(raw) < 4 + 4 * rank:
        raise ValueError("not an IDX file of bytes")
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if len(values) != math.prod(shape):
        raise ValueError(f"{math.prod(shape)} values announced, {len(values)} found")
    return torch.from_numpy(values.reshape(shape).copy())


class Name(NamedTuple):
    """Stands for a class or function that a pickle names. Nothing is imported."""

    module: str
    name: str


class PickledArray:
    """Stands for a NumPy array. Its state is any value until `array` checks it."""

    state: Any = None

    def array(self) -> np.ndarray:
        """The array, of uint8."""
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            raise ValueError("an array without its state")
        _, shape, dtype, fortran, content = self.state
        if dtype is not UINT8:
            raise ValueError("an array of another type than uint8")
        if not (
            isinstance(shape, tuple) and len(shape) <= 4 and all(type(size) is int and size >= 0 for size in shape)
        ):
            raise ValueError("an array without a shape of up to 4 axes")
        if not isinstance(content, str | bytes) or len(content) != math.prod(shape):
            raise ValueError(f"an array of {math.prod(shape)} bytes that holds others")
        content = content.encode("latin-1") if isinstance(content, str) else content
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


UINT8 = object()  # stands for numpy.dtype("uint8")
KNOWN = {
    *(Name(module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    Name("numpy", "ndarray"),
    Name("numpy", "dtype"),
    Name("_codecs", "encode"),
}

MOST_INSTRUCTIONS = 500_000  # the published batches have 50,000
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def cifar_batch(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (uint8) and labels (int64) of a pickled batch, a dictionary with the keys `data` and `labels`."""
    batch = unpickle(raw)
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


def unpickle(raw: bytes) -> Any:
    """A pickle of dictionaries, lists, tuples, plain values and uint8 arrays, which become `PickledArray`.

    The pickle is interpreted here, because `pickle` builds objects from sizes and types that the file chooses. Time and
    memory are proportional to the length of the file: no instruction copies what is on the stack. Strings of Python 2
    are read as Latin-1.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    value: Any
    for count, (opcode, value, _) in enumerate(pickletools.genops(raw)):
        if count == MOST_INSTRUCTIONS:
            raise ValueError(f"more than {MOST_INSTRUCTIONS:,} instructions")
        name = opcode.name
        if name in VALUES:
            stack.append(value)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[value])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            if name == "DICT":
                stack.append({})
            keys = [_expect(key, str) for key in items[::2]]  # hashing nested tuples takes exponential time
            _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        elif name in ("TUPLE", "LIST"):
            items = since_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = value.split(" ", 1) if name == "GLOBAL" else [stack.pop(-2), stack.pop()]
            known = Name(*(_expect(word, str) for word in words))
            if known not in KNOWN:
                raise ValueError(f"it asks for {known.module}.{known.name}, which an array never needs")
            stack.append(known)
        elif name == "REDUCE":
            stack[-2:] = [_call(stack[-2], _expect(stack[-1], tuple))]
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], PickledArray):
                stack[-1].state = state
            elif stack[-1] is not UINT8:  # whose state is its byte order
                raise ValueError("it sets the state of something else than an array")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the instruction {name}, which an array never needs")
    raise EOFError("cut short")


def _call(function: Any, arguments: tuple) -> Any:
    """The result of a function that a pickle calls."""
    match function:
        case Name(name="_reconstruct"):
            return PickledArray()
        case Name(name="dtype"):
            if arguments[0] not in ("u1", "|u1"):
                raise ValueError("an array of another type than uint8")
            return UINT8
        case Name(name="encode"):  # Python 3 writes bytes for Python 2 as text; `PickledArray.array` encodes it
            return _expect(arguments[0], str)
    raise ValueError("it calls something that an array never calls")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} expected, found a {type(value).__name__}")
    return value


Order = Literal["<", ">"]  # of the bytes of a number
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
HEAD = 1024  # bytes of a variable that hold its name
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
