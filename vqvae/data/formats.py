"""Readers of the formats in which data sets are published: IDX, pickled arrays, MATLAB.

Nothing in a file is ever executed. The readers take bytes and raise any exception for damaged ones.
"""

import gzip
import io
import math
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqvae.errors import UserError, one_line


def contents(path: Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in .gz."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as problem:
        raise UserError(f"{path}: cannot be read ({one_line(problem)}); delete it to download it again") from None


def idx(raw: bytes) -> Tensor:
    """The values of an IDX file of unsigned bytes, uint8.

    The file holds the magic bytes 0 0 8 rank, the sizes as big-endian int32, then the values.
    """
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\x00\x00\x08" or not rank or len(raw) < 4 + 4 * rank:
        raise ValueError("not an IDX file of bytes")
    shape = [int(size) for size in np.frombuffer(raw, ">i4", count=rank, offset=4)]
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if len(values) != math.prod(shape):
        raise ValueError(f"{math.prod(shape)} values announced, {len(values)} found")
    return torch.from_numpy(values.copy()).view(*shape)


def unpickle(raw: bytes) -> Any:
    """A Python 2 pickle of arrays and plain values."""
    return ArraysOnly(io.BytesIO(raw), encoding="latin1").load()


class ArraysOnly(pickle.Unpickler):
    """An unpickler that rebuilds NumPy arrays and refuses every other class or function."""

    ALLOWED = {
        *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an array never needs")
        # NumPy 2 deprecates the old module name
        module = "numpy._core.multiarray" if module == "numpy.core.multiarray" and NUMPY_2 else module
        return super().find_class(module, name)


NUMPY_2 = int(np.__version__.split(".")[0]) >= 2


def mat(raw: bytes) -> dict[str, Any]:
    """The variables of a MATLAB file, by name."""
    import scipy.io

    return scipy.io.loadmat(io.BytesIO(raw))
