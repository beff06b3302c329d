"""Readers of published formats. test_published.py tests them on damaged and hostile files."""

import pickle
import struct

import numpy as np
import pytest

from vqvae.data import formats

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 12)


def test_idx_values_keep_their_shape():
    values = PIXELS.reshape(2, 3, 4)
    raw = struct.pack(">4B3i", 0, 0, 8, 3, 2, 3, 4) + values.tobytes()
    assert np.array_equal(formats.idx(raw), values)
    with pytest.raises(ValueError, match="24 values announced, 23 found"):
        formats.idx(raw[:-1])
    with pytest.raises(ValueError, match="not an IDX file"):
        formats.idx(b"\x00\x00\x0d" + raw[3:])  # float32 instead of bytes


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_old_and_recent_numpy_are_rebuilt(module, protocol):
    content = pickle.dumps(PIXELS, protocol)
    for known in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        if protocol == 2:  # names are lines of text; later protocols put their length first
            content = content.replace(b"c" + known + b"\n", b"c" + module.encode() + b"\n")
        else:
            old, new = (b"\x8c" + bytes([len(name)]) + name for name in (known, module.encode()))
            body = content[11:].replace(old, new)
            content = content[:3] + struct.pack("<Q", len(body)) + body
    assert np.array_equal(formats.unpickle(content), PIXELS)
