"""Readers of published formats, on valid, damaged and hostile bytes. test_published.py tests the data sets."""

import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import scipy.io

from vqvae import archives
from vqvae.data import formats
from vqvae.errors import UserError

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
    content = pickle.dumps({"data": PIXELS, "labels": [3, 4]}, protocol)
    for known in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        if protocol == 2:  # names are lines of text; later protocols put their length first
            content = content.replace(b"c" + known + b"\n", b"c" + module.encode() + b"\n")
        else:
            old, new = (b"\x8c" + bytes([len(name)]) + name for name in (known, module.encode()))
            body = content[11:].replace(old, new)
            content = content[:3] + struct.pack("<Q", len(body)) + body
    pixels, labels = formats.cifar_batch(content)
    assert np.array_equal(pixels, PIXELS)
    assert labels.tolist() == [3, 4]


@pytest.fixture
def bounded():
    """Fails a test whose readers take more than 64 MiB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize("shape", [(2**31,) * 4, (2**32 - 1, 2**32 - 1), (2**31 + 1, 0, 5), (2**31,)])
def test_an_idx_file_that_announces_other_sizes_than_it_has_is_refused(shape, bounded):
    with pytest.raises(ValueError, match="values announced, 24 found"):
        formats.idx(struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + bytes(24))


def test_sizes_of_an_idx_file_are_unsigned(bounded):
    with pytest.raises(ValueError, match="announced"):
        formats.idx(struct.pack(">4B3i", 0, 0, 8, 3, -2, -3, 4) + bytes(24))  # whose product is 24
    with pytest.raises(ValueError, match="not an IDX file"):
        formats.idx(struct.pack(">4B", 0, 0, 8, 64) + bytes(300))


def test_a_gzip_bomb_is_refused_without_being_unpacked(tmp_path, monkeypatch, bounded):
    monkeypatch.setattr(formats, "LARGEST", 2**22)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(2**22 + 1)))
    with pytest.raises(UserError, match="cannot be read .more than 4 MiB.; delete it"):
        formats.contents(path)
    path.write_bytes(gzip.compress(bytes(2**22)))
    assert len(formats.contents(path)) == 2**22


def test_named_pipes_devices_and_folders_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "device")
    os.symlink(tmp_path / "pipe", tmp_path / "link")
    for name in ("pipe", "device", "link", ""):
        with pytest.raises(UserError, match="cannot be read .not a regular file"):
            formats.contents(tmp_path / name)


def short(text: str) -> bytes:
    """A pickled string of less than 256 characters."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def array_pickle(state: bytes = b"", dtype: bytes = b"", reconstruct: bytes = b"") -> bytes:
    """A pickle of a batch whose array has the given state, dtype and arguments."""
    named = b"cnumpy.core.multiarray\n_reconstruct\n"
    built = named + (reconstruct or b"cnumpy\nndarray\nK\x00\x85C\x01b\x87") + b"R"
    kind = b"cnumpy\ndtype\n" + short("u1") + b"\x89\x88\x87R" + dtype
    content = b"(K\x01K\x02K\x0c\x86" + kind + b"\x89C\x18" + bytes(24) + b"t"
    labels = b"](K\x01K\x02e"
    return b"\x80\x04}(" + short("data") + built + (state or content) + b"b" + short("labels") + labels + b"u."


def test_the_hostile_pickles_below_would_be_read_without_their_payload():
    pixels, labels = formats.cifar_batch(array_pickle())
    assert pixels.shape == (2, 12)
    assert labels.tolist() == [1, 2]


NESTED = b")" + b"\x85" * 20_000  # a tuple in a tuple in a tuple ...
DOUBLED = b")" + b"\x94h\x00\x86" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(1, 60))


@pytest.mark.parametrize(
    "content",
    [
        # a dtype with fields that are no fields: NumPy follows the pointer
        array_pickle(dtype=b"(K\x03" + short("|") + b"NN}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb").replace(
            b"u1", b"V8"
        ),
        array_pickle(dtype=b"(K\x03" + short("|") + b"NNNK\x08K\x08K\x3ftb").replace(b"u1", b"O8"),
        array_pickle(b"(K\x01K\x02K\x0c\x86cnumpy\nndarray\n\x89C\x18" + bytes(24) + b"t"),  # no dtype
        array_pickle(
            b"(K\x01\x8a\x08" + b"\xff" * 7 + b"\x7f\x85cnumpy\ndtype\nU\x02u1\x85R\x89C\x01at"
        ),  # 2**63 - 1 pixels
        array_pickle(
            b"(K\x01J\xff\xff\xff\xffJ\xe8\xff\xff\xff\x86cnumpy\ndtype\nU\x02u1\x85R\x89C\x18" + bytes(24) + b"t"
        ),
        array_pickle(NESTED),
        array_pickle(DOUBLED),
        b"\x80\x04cnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",  # numpy.ndarray(2**44)
        b"\x80\x04]r\xff\xff\xff\x7f.",  # a memo of 2**31 places
        b"\x80\x04j\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",  # BYTEARRAY8
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",  # BINBYTES8
        b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",  # LONG4
        b"\x80\x04\x8b" + struct.pack("<i", -1) + b"abc.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"].",  # FRAME
        b"\x80\x04}" + DOUBLED + b"K\x01s.",  # a key whose hash takes 2**60 steps
        b"\x80\x04}" + NESTED + b"K\x01s.",
        b"\x80\x04" + DOUBLED + b")R.",  # a function that is a tuple
        b"\x80\x04" + b"]" * 30_001 + b".",
        b"\x80\x02c_codecs\nencode\n" + NESTED + b"R.",
        b"\x80\x04N.",
        b"\x80\x04.",
        b"\x80\x04tttt.",
        b"I" + b"9" * 100_000 + b"\n.",
        pickle.dumps({"data": PIXELS, "labels": [1, 2**70]}, 2),
        pickle.dumps({"data": PIXELS, "labels": ["1", "2"]}, 2),
        pickle.dumps({"data": PIXELS.tolist(), "labels": [1, 2]}, 2),
        pickle.dumps({"data": PIXELS, "labels": [1, 2]}, 5),  # with a buffer, which no batch has
    ],
)
def test_a_hostile_pickle_takes_neither_memory_nor_time(content, bounded, monkeypatch):
    monkeypatch.setattr(archives, "MOST_INSTRUCTIONS", 30_000)
    with pytest.raises((ValueError, IndexError, KeyError, EOFError, OverflowError)):
        formats.cifar_batch(content)


def test_an_array_in_fortran_order_is_read():
    content = {"data": np.asfortranarray(PIXELS), "labels": np.array([1, 2], np.uint8)}
    for protocol in range(5):
        pixels, labels = formats.cifar_batch(pickle.dumps(content, protocol))
        assert np.array_equal(pixels, PIXELS)
        assert labels.tolist() == [1, 2]


VALUES = np.arange(2 * 3 * 3 * 4, dtype=np.uint8).reshape(2, 3, 3, 4)


def mat_file(compressed: bool = False, **variables) -> bytes:
    out = io.BytesIO()
    scipy.io.savemat(out, variables, do_compression=compressed)
    return out.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.float64, ">i4", np.int64])
def test_matlab_arrays_are_those_that_scipy_reads(compressed, kind):
    others = {"text": "abc", "structure": {"X": 1}, "cells": np.array([1, "x"], object)}
    content = mat_file(compressed, **others, X=VALUES, y=np.arange(4).reshape(4, 1).astype(kind), z=VALUES)
    arrays, expected = formats.mat(content, ("X", "y")), scipy.io.loadmat(io.BytesIO(content))
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        assert np.array_equal(array, expected[name])


def test_a_big_endian_matlab_file_is_read():
    def element(kind: int, raw: bytes) -> bytes:
        return struct.pack(">2I", kind, len(raw)) + raw + bytes(-len(raw) % 8)

    matrix = element(6, struct.pack(">2I", 6, 0)) + element(5, struct.pack(">2i", 2, 1)) + b"\x00\x01\x00\x01y\0\0\0"
    content = bytes(124) + b"\x01\x00MI" + element(14, matrix + element(4, struct.pack(">2H", 500, 7)))
    assert formats.mat(content, ["y"])["y"].tolist() == [[500], [7]]


def compressed_matrix(matrix: bytes, announced: int | None = None) -> bytes:
    """A file of one compressed variable."""
    packed = zlib.compress(struct.pack("<2I", 14, len(matrix) if announced is None else announced) + matrix)
    return bytes(124) + b"\x00\x01IM" + struct.pack("<2I", 15, len(packed)) + packed


HEAD = (
    struct.pack("<4I", 6, 8, 9, 0)
    + struct.pack("<2I4i", 5, 16, 2**30, 2**30, 2**30, 2**30)
    + b"\x01\x00\x01\x00X\0\0\0"
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(200),
        mat_file(X=VALUES)[:-9],
        mat_file(X=VALUES, y=VALUES)[:-40],
        mat_file(X="text", y=VALUES),
        mat_file(X={"a": 1}, y=VALUES),
        mat_file(X=VALUES + 1j, y=VALUES),
        mat_file(X=VALUES > 3, y=VALUES),
        mat_file(X=VALUES.astype(object), y=VALUES),
        compressed_matrix(HEAD + struct.pack("<2I", 2, 2**32 - 1)),
        compressed_matrix(HEAD + struct.pack("<2I", 2, 0)),
        compressed_matrix(HEAD + struct.pack("<2I", 2, 4) + b"abcd", announced=2**32 - 1),
        compressed_matrix(HEAD + bytes(2**27)),
        compressed_matrix(b""),
        bytes(124) + b"\x00\x01IM" + bytes(8 * 1000),
    ],
)
def test_a_hostile_matlab_file_takes_neither_memory_nor_time(content, bounded, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", 2**24)
    with pytest.raises((ValueError, struct.error)):
        formats.mat(content, ("X", "y"))
