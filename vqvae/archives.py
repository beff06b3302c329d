"""Safe readers of pickles and of files from torch.save and numpy.savez, for files from strangers.

Nothing in a file is executed, every size in it is checked before it is used, and time and memory are proportional to
the length of the file. For a damaged or hostile file, the functions may raise any exception.
"""

import math
import os
import pickletools
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vqvae.files import size_of

MOST_INSTRUCTIONS = 2_000_000  # of a pickle; a model with 1,000 weights and its optimizer needs 100,000
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
ALWAYS_FITS, RATIO = 2**26, 300  # bytes that arrays may have from any file, and per byte of a larger file


def read_torch(file: BinaryIO) -> Any:
    """Read a file of torch.save: plain values, dictionaries, lists, tuples and tensors (on the CPU).

    torch.load is not used. It reads past the end of a tensor whose size the file exaggerates. It also hashes any keys
    and allocates any byte arrays that the file asks for.
    """
    members = _members(file)
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise ValueError("compressed members")
    if sum(info.file_size for info in members.values()) > size_of(file):
        raise ValueError("members that share bytes")
    values = [name for name in members if name.endswith("/data.pkl")]
    if len(values) != 1:
        raise ValueError("a ZIP archive of something else")
    (pickled,) = values
    root = pickled.removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order and bytes(_record(file, order).numpy()) != sys.byteorder.encode():
        raise ValueError("written on a machine with another byte order")
    records: dict[str, Tensor] = {}

    def storage(reference: Any) -> Tensor:
        """The values `[n]` that a tensor views: `("storage", dtype, name of the record, device, n)`."""
        _, dtype, name, _, count = expect(reference, tuple)
        if not isinstance(dtype, torch.dtype) or expect(count, int) < 0:
            raise ValueError("a storage without type and size")
        info = members[f"{root}data/{expect(name, str)}"]
        if info.file_size != count * dtype.itemsize:
            raise ValueError(f"a tensor of {count:,} values in {info.file_size:,} bytes")
        if name not in records:
            records[name] = _record(file, info)
        return records[name].view(dtype)

    names = {f"torch {name}": dtype for name, dtype in STORAGES.items()}
    known = {**names, "torch._utils _rebuild_tensor_v2": _tensor, "collections OrderedDict": _ordered}
    return unpickle(_record(file, members[pickled]).numpy().tobytes(), known, storage)


def _tensor(values: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage. The remaining arguments, such as `requires_grad`, are ignored."""
    numbers = [offset, *expect(size, tuple), *expect(stride, tuple)]
    if not isinstance(values, Tensor) or any(expect(number, int) < 0 for number in numbers):
        raise ValueError("a tensor without values or shape")
    if math.prod(size) > len(values):
        raise ValueError("a tensor larger than its storage")
    return torch.as_strided(values, size, stride, offset)  # which checks that it ends within the storage


def _ordered(*nothing: Any) -> dict[str, Any]:
    if nothing:
        raise ValueError("an ordered dictionary made of something")
    return {}


def _members(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The members of a ZIP archive by name."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("several members of one name")
    return members


def _record(file: BinaryIO, info: zipfile.ZipInfo) -> Tensor:
    """The bytes of a member that is not compressed, uint8."""
    file.seek(info.header_offset)
    signature, *lengths = struct.unpack("<4s22x2H", file.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError("a member without its header")
    file.seek(sum(lengths), os.SEEK_CUR)
    values = torch.empty(info.file_size, dtype=torch.uint8)
    view, done = memoryview(values.numpy().data), 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("cut short")
        done += count
    return values


VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Built:
    """A value whose state a pickle sets after it is made."""

    def build(self, state: Any) -> None:
        """Take any value as the state."""


def unpickle(raw: bytes, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """Interpret a pickle and return its value; `pickle` would execute code in it.

    `known` maps each name that the pickle may use, `"module name"`, to its value; the pickle may call those that are
    functions. `persistent` gives the value of a persistent id. Strings of Python 2 are read as Latin-1. Attributes of
    dictionaries are ignored. No instruction copies values on the stack, and keys are hashed in constant time.
    """
    machine = _Machine(known, persistent)
    for count, (opcode, value, _) in enumerate(pickletools.genops(raw)):
        if count == MOST_INSTRUCTIONS:
            raise ValueError(f"more than {MOST_INSTRUCTIONS:,} instructions")
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.execute(opcode.name, value)
    raise EOFError("cut short")


class _Machine:
    """The stack, the marks on it and the memo of a pickle, and what its instructions do."""

    def __init__(self, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None):
        self.known, self.persistent = known, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def execute(self, name: str, value: Any) -> None:
        if name in VALUES:
            if isinstance(value, int) and value.bit_length() > 64:
                raise ValueError("a number of more than 64 bits")
            self.stack.append(value)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            self.stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else value] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[value])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD"):
            self.construct(name, value)
        elif name not in ("PROTO", "FRAME"):
            self.collect(name)

    def collect(self, name: str) -> None:
        """Put values from the stack into a list, a dictionary or a tuple."""
        stack = self.stack
        if name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.since_mark()
            expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self.since_mark()
            if name == "DICT":
                stack.append({})
            # hashing nested tuples would take exponential time
            keys = [key if type(key) is int else expect(key, str) for key in items[::2]]
            expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        elif name in ("TUPLE", "LIST"):
            items = self.since_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        else:
            raise Forbidden(name)

    def construct(self, name: str, value: Any) -> None:
        """Name, make or complete what is no plain value."""
        stack = self.stack
        if name in ("GLOBAL", "STACK_GLOBAL"):
            asked = value if name == "GLOBAL" else f"{expect(stack.pop(-2), str)} {expect(stack.pop(), str)}"
            if asked not in self.known:
                raise Forbidden(asked)
            stack.append(self.known[asked])
        elif name == "BINPERSID":
            if not self.persistent:
                raise Forbidden(name)
            stack.append(self.persistent(stack.pop()))
        elif name == "REDUCE":
            function, arguments = stack.pop(-2), expect(stack.pop(), tuple)
            if not callable(function):
                raise ValueError("it calls something that is not a function")
            stack.append(function(*arguments))
        else:
            state = stack.pop()
            if isinstance(stack[-1], Built):
                stack[-1].build(state)
            else:
                expect(stack[-1], dict)

    def since_mark(self) -> list[Any]:
        """Take what was put on the stack since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


class Forbidden(ValueError):
    """A pickle asks for a class, a function or an instruction that is not allowed."""

    def __init__(self, asked: str):
        super().__init__(f"it asks for {asked}, which such a file never needs")


def expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} expected, found a {type(value).__name__}")
    return value


def most_bytes(size: int) -> int:
    """How many bytes a file of this size may decompress to."""
    return max(ALWAYS_FITS, RATIO * size)


def array_names(file: BinaryIO) -> list[str]:
    """The names of the arrays in an npz file."""
    return [name.removesuffix(".npy") for name in _members(file) if name.endswith(".npy")]


def read_arrays(file: BinaryIO, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of these names, of numbers or text, in an npz file. The others are not read."""
    left = most_bytes(size_of(file))
    members, arrays = _members(file), {}
    with zipfile.ZipFile(file) as archive:
        for name in names:
            if f"{name}.npy" not in members:
                raise ValueError(f"it has no array {name}")
            info = members[f"{name}.npy"]
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others expand without bound
                raise ValueError(f"{name} is compressed in an unknown way")
            with archive.open(info) as member:
                arrays[name] = _array(member, name, left)
            left -= arrays[name].nbytes
    return arrays


def _array(member: Any, name: str, most: int) -> np.ndarray:
    """The array in a member, of at most so many bytes."""
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in header:
        raise ValueError(f"{name} has an unknown format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of odd text in the header
        shape, fortran, dtype = header[version](member)
    if dtype.kind not in "biufU":
        raise ValueError(f"{name} has objects, not numbers or text")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or not dtype.itemsize or count * dtype.itemsize > most:
        raise ValueError(f"{name} has {count * dtype.itemsize:,} bytes, far more than the file")
    raw = member.read(count * dtype.itemsize + 1)  # a byte too many, so that zipfile gets to its checksum
    if len(raw) != count * dtype.itemsize:
        raise ValueError(f"{name} is not as long as its header says")
    if dtype.kind == "U" and count and np.frombuffer(raw, f"{dtype.str[0]}u4").max() > sys.maxunicode:
        raise ValueError(f"{name} has characters that do not exist")
    return np.ndarray(shape, dtype, raw, order="F" if fortran else "C")
