"""Files from strangers: images, CIFAR pickles, MATLAB and IDX files, and the cache of images, damaged or crafted.

A trial puts one bad file among good ones and loads the data set in a process of its own, with 10 seconds of the
processor and a limit of memory. It survives if the load returns valid examples, or raises a `UserError` of one line. A
damaged cache must give the same images as an intact one. Every crafted file is one trial; every format has `trials`
with random damage: flipped bits, lost, repeated and inserted bytes, extreme sizes.
"""

import functools
import gzip
import io
import os
import pickle
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
import torch
from PIL import Image

from vqvae.data import load
from vqvae.data.image_folder import cached_images
from vqvae.errors import UserError

SECONDS = 10  # of the processor; the machine may be busy
PATIENCE = 60  # seconds until a trial counts as blocked
MEMORY = 1300 * 2**20  # bytes that reading may add; a data file may unpack to 1 GiB
IMAGE_MEMORY = 560 * 2**20
NUMBERS = (0, 1, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


class Trial(NamedTuple):
    """`prepare` writes files into an empty folder; `check` reads them in a child and raises if something is wrong."""

    name: str
    prepare: Callable[[Path], None]
    check: Callable[[Path], None]
    memory: int = MEMORY


def run(trials: int, folder: Path) -> tuple[int, int]:
    """Returns how many trials survived, and their number."""
    torch.set_num_threads(1)  # forked processes must not wait for threads that stayed behind
    survived = total = 0
    for i, trial in enumerate([*crafted(), *damaged(trials)]):
        place = folder / str(i)
        place.mkdir()
        trial.prepare(place)
        problem = outcome(trial, place)
        shutil.rmtree(place, ignore_errors=True)
        total += 1
        survived += problem is None
        if problem:
            print(f"  lost: {trial.name}: {problem}", file=sys.stderr)
    return survived, total


def outcome(trial: Trial, place: Path) -> str | None:
    """None if the trial survived, otherwise what happened."""
    reader, writer = os.pipe()
    before = rss()
    child = os.fork()
    if child == 0:
        os.close(reader)
        report = in_child(trial, place)
        os.write(writer, report.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(writer)
    late = not select.select([reader], [], [], PATIENCE)[0]
    if late:
        os.kill(child, signal.SIGKILL)
    report = os.read(reader, 4096).decode()
    os.close(reader)
    _, status, usage = os.wait4(child, 0)
    taken = usage.ru_maxrss * 1024 - before
    if late:
        return f"blocked, or more than {PATIENCE} s"
    if usage.ru_utime + usage.ru_stime > SECONDS:
        return f"took {usage.ru_utime + usage.ru_stime:.0f} s"
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    if taken > trial.memory:
        return f"took {taken >> 20} MiB"
    if (place / "executed").exists():
        return "executed a program"
    return report.removeprefix("survived") or None


def in_child(trial: Trial, place: Path) -> str:
    """Run a trial's check; returns "survived" or what is wrong."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and tqdm write there
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    os.environ["PATH"] = f"{place / 'bin'}:{os.environ['PATH']}"
    socket.getaddrinfo = refuse  # no downloads
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**32, resource.RLIM_INFINITY))
    try:
        trial.check(place)
    except UserError as problem:
        return "survived" if len(str(problem).splitlines()) == 1 else f"an error of several lines: {problem}"
    except BaseException as problem:
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return "survived"


def refuse(*_: object, **__: object) -> None:
    raise OSError("no network")


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- data sets with one bad file -----------------------------------------------------------------------------------


def array_files(name: str, bad: str, raw: bytes | Callable[[Path], None], place: Path) -> None:
    """The files of a published data set, one of them bad."""
    files = {"cifar10": cifar_files, "mnist": mnist_files, "svhn": svhn_files}[name]()
    for file, content in files.items():
        path = place / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    path = place / bad
    if path.suffix == ".gz":
        path.with_suffix("").unlink()
    path.unlink(missing_ok=True)
    if callable(raw):
        raw(path)
    else:
        path.write_bytes(raw)


def check_arrays(name: str, place: Path) -> None:
    for split in load(name, data_dir=place)[1:3]:
        assert split.images.dtype == torch.uint8, split.images.dtype
        assert tuple(split.images.shape[1:]) == {"mnist": (1, 28, 28)}.get(name, (3, 32, 32)), split.images.shape
        assert len(split.images) == len(split.labels) > 0
        assert 0 <= int(split.labels.min()) <= int(split.labels.max()) <= 9


def array_trial(title: str, name: str, bad: str, raw: bytes | Callable[[Path], None]) -> Trial:
    prepare = functools.partial(array_files, name, bad, raw)
    return Trial(f"{name} {title}", prepare, functools.partial(check_arrays, name))


@functools.cache
def mnist_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for split, count in (("train", 6), ("t10k", 3)):
        pixels = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        files[f"MNIST/raw/{split}-images-idx3-ubyte"] = struct.pack(">4B3I", 0, 0, 8, 3, *pixels.shape) + bytes(pixels)
        files[f"MNIST/raw/{split}-labels-idx1-ubyte"] = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(range(count))
    return files


@functools.cache
def cifar_files(protocol: int = 2) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(256, size=(2, 3072), dtype=np.uint8), "labels": [3, 7]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch | {"filenames": ["a.png", "b.png"]}, protocol)
    return files


@functools.cache
def svhn_files(compressed: bool = False) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for split in ("train", "test"):
        out = io.BytesIO()
        pixels = rng.integers(256, size=(32, 32, 3, 4), dtype=np.uint8)
        arrays = {"X": pixels, "y": np.array([[1], [10], [3], [4]], np.uint8)}
        scipy.io.savemat(out, arrays, do_compression=compressed)
        files[f"{split}_32x32.mat"] = out.getvalue()
    return files


def image_folder(file: str, raw: bytes | Callable[[Path], None], place: Path) -> None:
    """A folder of two good images and a bad one."""
    (place / "images").mkdir()
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (16, 16), color).save(place / "images" / name)
    path = place / "images" / file
    if callable(raw):
        raw(path)
    else:
        path.write_bytes(raw)


def check_images(place: Path) -> None:
    images, paths, *_ = cached_images(place / "images", 16, 3)
    assert images.dtype == torch.uint8
    assert tuple(images.shape[1:]) == (3, 16, 16)
    assert len(images) == len(paths) >= 2


def image_trial(title: str, file: str, raw: bytes | Callable[[Path], None]) -> Trial:
    return Trial(f"image {title}", functools.partial(image_folder, file, raw), check_images, IMAGE_MEMORY)


# --- crafted files -------------------------------------------------------------------------------------------------

BATCH = "cifar-10-batches-py/data_batch_3"
IMAGES = "MNIST/raw/train-images-idx3-ubyte"


def text(value: str) -> bytes:
    """A pickled string."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def pickled_batch(kind: str, state: bytes, shape: bytes, content: bytes) -> bytes:
    """A batch whose pixels have a dtype, its state, a shape and bytes of the attacker's choice."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    dtype = b"cnumpy\ndtype\n" + text(kind) + b"\x89\x88\x87R" + (state + b"b" if state else b"")
    raw = b"B" + struct.pack("<I", len(content)) + content
    labels = text("labels") + b"](K\x01K\x02e"
    return b"\x80\x04}(" + text("data") + array + b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb" + labels + b"u."


NESTED = b")" + b"\x85" * 400_000
DOUBLED = b")" + b"\x94h\x00\x86" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(1, 60))
TWO = b"K\x02M\x00\x0c\x86"  # the shape (2, 3072)
FLAGS = b"(K\x03" + text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00t"  # objects that are said to be none
PICKLES = {
    "objects at addresses": pickled_batch("O8", FLAGS, b"K\x02M\x80\x01\x86", b"AAAAAAAA" * 768),
    "objects and lists": pickled_batch("O8", b"", TWO, bytes(6144)),
    "structured dtype": pickled_batch("V8", b"(K\x03" + text("|") + b"N}}K\x08K\x01K\x1ft", TWO, bytes(6144)),
    "array of 2**62": pickled_batch("u1", b"", b"\x8a\x08" + struct.pack("<q", 2**62) + b"\x85", bytes(6144)),
    "negative shape": pickled_batch("u1", b"", b"J\xfe\xff\xff\xffJ\x00\xf4\xff\xff\x86", bytes(6144)),
    "dtype of 2 GB": pickled_batch("V2000000000", b"", TWO, bytes(6144)),
    "nested shape": pickled_batch("u1", b"", NESTED, bytes(6144)),
    "doubled shape": pickled_batch("u1", b"", DOUBLED, bytes(6144)),
    "allocation": b"\x80\x04cnumpy\nndarray\n\x8a\x05\x00\x00\x00\x00\x01\x85R.",
    "a hundred allocations": b"\x80\x04](" + b"cnumpy\nndarray\nJ\x00\x00\x00\x40\x85R" * 100 + b"e.",
    "memo of 2**31": b"\x80\x04]r\xff\xff\xff\x7f.",
    "memo of 2**28": b"\x80\x04]r\xff\xff\xff\x0f.",
    "get from an empty memo": b"\x80\x04j\xff\xff\xff\x7f.",
    "bytearray of 1 TB": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "bytearray of 3 GB": b"\x80\x05\x96" + struct.pack("<Q", 3 * 2**30) + b"abc.",
    "bytes of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "integer of 2 GB": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "frame of 2**60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"].",
    "key of nested tuples": b"\x80\x04}" + NESTED + b"K\x01s.",
    "key of doubled tuples": b"\x80\x04}" + DOUBLED + b"K\x01s.",
    "doubled function": b"\x80\x04" + DOUBLED + b")R.",
    "nested labels": pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}, 4)[:-1] + text("labels") + NESTED + b"s.",
    "encoded again and again": (
        b"\x80\x04c_codecs\nencode\n\x94X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"\x94]("
        + b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R" * 20_000 + b"e."
    ),
    "million lists": b"\x80\x04" + b"]" * 3_000_000 + b".",
    "million marks": b"\x80\x04" + b"(" * 3_000_000 + b".",
    "digits": b"I" + b"9" * 10**7 + b"\n.",
    "a program": b"cos\nmkdir\n(S'executed'\ntR.",
    "numpy.load": b"\x80\x04cnumpy\nload\n" + text("/dev/zero") + b"\x85R.",
    "nothing": b"\x80\x04.",
    "empty": b"",
}  # fmt: skip


def repeated(block: bytes, times: int, start: bytes, path: Path) -> None:
    """A file that repeats one block many times."""
    with open(path, "wb") as file:
        file.write(start)
        for _ in range(times):
            file.write(block)


def mat_element(kind: int, raw: bytes) -> bytes:
    return struct.pack("<2I", kind, len(raw)) + raw + bytes(-len(raw) % 8)


MAT = bytes(124) + b"\x00\x01IM"


def matrix(shape: list[int], stored: int, size: int, raw: bytes, kind: int = 9, name: bytes = b"X") -> bytes:
    """A variable without its tag, with sizes of the attacker's choice."""
    head = mat_element(6, struct.pack("<2I", kind, 0)) + mat_element(5, struct.pack(f"<{len(shape)}i", *shape))
    return head + mat_element(1, name) + struct.pack("<2I", stored, size) + raw


def packed(body: bytes, announced: int | None = None) -> bytes:
    raw = zlib.compress(struct.pack("<2I", 14, len(body) if announced is None else announced) + body)
    return MAT + struct.pack("<2I", 15, len(raw)) + raw


ZEROS = bytes(2**24)
HUGE = [32, 32, 3, 2**30]
MATS = {
    "huge shape": MAT + mat_element(14, matrix(HUGE, 2, 64, bytes(64))),
    "huge size": MAT + mat_element(14, matrix([32, 32, 3, 1], 2, 2**32 - 1, bytes(64))),
    "negative shape": MAT + mat_element(14, matrix([-32, -32, 3, 1], 2, 3072, bytes(3072))),
    "a thousand axes": MAT + mat_element(14, matrix([1] * 1000, 2, 1, bytes(8))),
    "no axis": MAT + mat_element(14, matrix([], 2, 1, bytes(8))),
    "unknown type": MAT + mat_element(14, matrix([32, 32, 3, 1], 99, 3072, bytes(3072))),
    "cells of cells": MAT + mat_element(14, matrix([2**20, 2**10], 14, 64, bytes(64), kind=1)),
    "structure": MAT + mat_element(14, matrix([2**20, 2**10], 5, 4, bytes(64), kind=2)),
    "sparse": MAT + mat_element(14, matrix([2**30, 2**30], 5, 4, bytes(64), kind=5)),
    "characters": MAT + mat_element(14, matrix([2**20, 2**10], 4, 64, bytes(64), kind=4)),
    "function": MAT + mat_element(14, matrix([1, 1], 14, 64, bytes(64), kind=16)),
    "compressed huge size": packed(matrix(HUGE, 2, 2**32 - 1, b""), 2**32 - 1),
    "compressed twice": packed(b"", 0)[:128] + mat_element(15, zlib.compress(mat_element(15, zlib.compress(b"x")))),
    "compressed nothing": MAT + mat_element(15, b""),
    "a million empty variables": MAT + struct.pack("<2I", 14, 0) * 10**6,
    "text only": b"MATLAB 5.0 MAT-file" + bytes(200),
    "version 4": struct.pack("<5I", 0, 2**31 - 1, 2**31 - 1, 0, 2) + b"X\0",
}  # fmt: skip


def zip_bomb(path: Path) -> None:
    """Gzip members of zeros, 8 GB in 8 MB."""
    repeated(gzip.compress(ZEROS, 9), 512, b"", path)


def mat_bomb(path: Path) -> None:
    """A variable that announces 3 GB and has them, in 3 MB."""
    squeeze = zlib.compressobj(9)
    start = squeeze.compress(struct.pack("<2I", 14, 3 * 2**30) + matrix(HUGE, 2, 3 * 2**30 - 64, b""))
    start += squeeze.flush(zlib.Z_FULL_FLUSH)
    block = squeeze.compress(ZEROS) + squeeze.flush(zlib.Z_FULL_FLUSH)
    size = len(start) + 190 * len(block)
    repeated(block, 190, MAT + struct.pack("<2I", 15, size) + start, path)


def idx_header(*shape: int) -> bytes:
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *(size % 2**32 for size in shape))


IDX = {
    "negative sizes": idx_header(-6, -28, 28) + bytes(4704),
    "sizes whose product wraps": idx_header(2**31, 2**31, 4) + bytes(4704),
    "2**32 images": idx_header(2**32 - 1, 28, 28) + bytes(4704),
    "no images": idx_header(0, 2**32 - 1, 2**32 - 1),
    "255 axes": idx_header(*([1] * 255)) + bytes(1),
    "no axes": idx_header() + bytes(1),
    "cut header": idx_header(6, 28, 28)[:9],
    "doubles": b"\0\0\x0e\x03" + idx_header(6, 28, 28)[4:] + bytes(4704 * 8),
}


def png(width: int, height: int, *chunks: tuple[bytes, bytes], kind: int = 2) -> bytes:
    header = (b"IHDR", struct.pack(">2I5B", width, height, 8, kind, 0, 0, 0))
    parts = (
        struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw))
        for name, raw in (header, *chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@functools.cache
def black(count: int) -> bytes:
    """`count` zeros, compressed."""
    squeeze = zlib.compressobj(1)
    parts = [squeeze.compress(bytes(2**20)) for _ in range(count >> 20)]
    return b"".join([*parts, squeeze.compress(bytes(count % 2**20)), squeeze.flush()])


def tiff(tags: dict[int, int], raw: bytes = b"") -> bytes:
    entries = b"".join(struct.pack("<2H2L", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<LH", 8 + len(raw), len(tags)) + raw + entries + bytes(4)


def tiled_tiff(side: int, count: int) -> bytes:
    raw = zlib.compress(bytes(count))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 10, 325: len(raw)}
    entries = b"".join(struct.pack("<2H2L", tag, 4, 1, value) for tag, value in tags.items())
    return (
        b"II*\0" + struct.pack("<L", 10 + len(raw)) + b"\0\0" + raw + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def long_jpeg() -> bytes:
    """A progressive JPEG that paints its 9 million pixels 9,000 times."""
    out = io.BytesIO()
    Image.new("RGB", (3000, 3000), "red").save(out, "JPEG", progressive=True)
    raw = out.getvalue()
    last = raw.rindex(b"\xff\xda")
    return raw[:-2] + raw[last:-2] * 9000 + raw[-2:]


def postscript(path: Path) -> None:
    """A PostScript file with a program in the place of Ghostscript."""
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    program = path.parent.parent / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {path.parent.parent / 'executed'}\n")
    program.chmod(0o755)


def saved(form: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, form, **options)
    return out.getvalue()


def image_files() -> Iterator[tuple[str, str, bytes | Callable[[Path], None]]]:
    """Name, file name and content of crafted images."""
    yield "bomb of Pillow's warning", "x.png", png(13_000, 13_000, (b"IDAT", black(13_000 * 39_001)))
    yield "bomb below Pillow's warning", "x.png", png(9_000, 9_000, (b"IDAT", black(9_000 * 27_001)))
    yield "bomb of Pillow's error", "x.png", png(2**31 - 1, 2**31 - 1, (b"IDAT", b""))
    yield "bomb with alpha", "x.png", png(6_500, 6_500, (b"IDAT", black(6_500 * 26_001)), kind=6)
    yield "largest that is decoded", "x.png", png(7_200, 7_200, (b"IDAT", black(7_200 * 21_601)))
    yield "text of 1 GB", "x.png", png(8, 8, *[(b"zTXt", b"a\0\0" + zlib.compress(ZEROS))] * 64)
    yield "profile of 1 GB", "x.png", png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28))))
    yield "chunk of 2 GB", "x.png", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR"
    yield "tiles of 900 MB", "x.tif", tiled_tiff(30_000, 9 * 10**8)
    yield "tiles of 2**32", "x.tif", tiled_tiff(2**32 - 1, 100)
    yield "strips without end", "x.tif", tiff({256: 2**31, 257: 1, 258: 8, 259: 1, 262: 1, 273: 0, 278: 1, 279: 2**31})
    yield "9,000 scans", "x.jpg", long_jpeg()
    yield "65,535 pixels wide", "x.gif", saved("GIF", "P").replace(struct.pack("<2H", 20, 24), b"\xff" * 4)
    yield (
        "bitmap of 2**31",
        "x.bmp",
        saved("BMP").replace(struct.pack("<2i", 20, 24), struct.pack("<2i", 2**31 - 1, 24)),
    )
    yield "bitmap of negative width", "x.bmp", saved("BMP").replace(struct.pack("<i", 20), struct.pack("<i", -20), 1)
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xff\x3f\0\xff\x3f\0"
    yield "canvas of 16384", "x.webp", b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas
    yield "no number", "x.tif", saved("TIFF", "F").replace(b"\0\0\x80?", b"\0\0\xc0\x7f")
    yield "PostScript", "x.png", postscript
    yield "PostScript as JPEG", "x.jpg", postscript
    for form in ("PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000"):
        yield form, "x.png", saved(form)
    yield "text", "x.png", b"#define im_width 99999\n#define im_height 99999\nstatic char im_bits[] = {\n"
    yield "empty", "x.png", b""
    yield "300 MB of zeros", "x.webp", lambda path: (path.write_bytes(saved("WEBP")), os.truncate(path, 300 * 2**20))
    yield "pipe", "x.png", os.mkfifo
    yield "device", "x.png", lambda path: path.symlink_to("/dev/zero")
    yield "pipe behind a link", "x.png", lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe"))
    yield "folder", "x.png", Path.mkdir
    yield "link to itself", "x.png", lambda path: path.symlink_to("x.png")


def crafted() -> Iterator[Trial]:
    for title, raw in PICKLES.items():
        yield array_trial(title, "cifar10", BATCH, raw)
    for title, raw in MATS.items():
        yield array_trial(title, "svhn", "train_32x32.mat", raw)
    yield array_trial("bomb", "svhn", "train_32x32.mat", mat_bomb)
    for title, raw in IDX.items():
        yield array_trial(title, "mnist", IMAGES, raw)
        yield array_trial(f"{title}, zipped", "mnist", f"{IMAGES}.gz", gzip.compress(raw))
    yield array_trial("bomb", "mnist", f"{IMAGES}.gz", zip_bomb)
    for name, bad in (("cifar10", BATCH), ("svhn", "train_32x32.mat"), ("mnist", IMAGES)):
        yield array_trial("pipe", name, bad, os.mkfifo)
        yield array_trial("device", name, bad, lambda path: path.symlink_to("/dev/zero"))
    for title, file, raw in image_files():
        yield image_trial(title, file, raw)
    for size in (0, 50, 500, 1500, 2500):
        yield Trial(
            f"cache on a disk with {size} bytes", functools.partial(image_folder, "c.bad", b""), full_disk(size)
        )
    yield Trial("permissions that change", functools.partial(image_folder, "c.png", saved("PNG")), changed_permissions)
    yield Trial("content that changes", functools.partial(image_folder, "c.png", saved("PNG")), changed_content)


def full_disk(size: int) -> Callable[[Path], None]:
    def check(place: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            check_images(place)
        except UserError as problem:
            left = list((place / "cache" / "vqvae").iterdir())
            if left or "cannot be written" not in str(problem):
                raise RuntimeError(f"{problem}; left behind: {left}") from None

    return check


def changed_permissions(place: Path) -> None:
    """An image that first nobody and then everybody may read, for a user who is not root."""
    for path in (place, place / "images", place.parent):
        path.chmod(0o777)
    image = place / "images" / "c.png"
    image.chmod(0)
    if os.getuid() == 0:
        os.chown(image, 65534, 65534)
        os.setuid(65534)
    found = cached_images(place / "images", 16, 3)[1]
    assert len(found) == 2, found
    image.chmod(0o644)
    found = cached_images(place / "images", 16, 3)[1]
    assert len(found) == 3, found


def changed_content(place: Path) -> None:
    before = cached_images(place / "images", 16, 3)[0].clone()
    (place / "images" / "c.png").write_bytes(saved("PNG", "L"))
    assert not torch.equal(cached_images(place / "images", 16, 3)[0], before)


# --- random damage -------------------------------------------------------------------------------------------------


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """A file after one to three random accidents."""
    content = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        # headers are short, and where the sizes are
        at = rng.randrange(min(len(content), rng.choice((40, 400, len(content)))) or 1)
        match rng.choice(("flip", "flip", "number", "cut", "lose", "repeat", "insert")):
            case "flip":
                content[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in content[at : at + 1])
            case "number":
                size = rng.choice((1, 2, 4, 8))
                order = rng.choice(("little", "big"))
                content[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, order)
            case "cut":
                del content[at:]
            case "lose":
                del content[at : at + rng.choice((1, 4, 50))]
            case "repeat":
                content[at:at] = content[at : at + rng.choice((1, 8, 200))] * rng.choice((1, 3, 50))
            case "insert":
                content[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
    return bytes(content)


def damaged_cache(which: str, seed: int, place: Path) -> None:
    """An image folder with a cache, one file of which is damaged, and the images that the cache had."""
    image_folder("c.png", saved("PNG"), place)
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    np.save(place / "expected.npy", cached_images(place / "images", 16, 3)[0].numpy())
    file = next((place / "cache" / "vqvae").glob(f"*.{which}"))
    file.write_bytes(mutated(file.read_bytes(), random.Random(seed)))


def check_cache(place: Path) -> None:
    images, paths, *_ = cached_images(place / "images", 16, 3)
    assert sorted(paths) == ["a.png", "b.png", "c.png"], paths
    assert np.array_equal(images.numpy(), np.load(place / "expected.npy")), "other images"


def damaged(trials: int) -> Iterator[Trial]:
    arrays = {
        "pickle": ("cifar10", BATCH, cifar_files(2)[BATCH]),
        "pickle of protocol 4": ("cifar10", BATCH, cifar_files(4)[BATCH]),
        "IDX": ("mnist", IMAGES, mnist_files()[IMAGES]),
        "zipped IDX": ("mnist", f"{IMAGES}.gz", gzip.compress(mnist_files()[IMAGES])),
        "MATLAB": ("svhn", "train_32x32.mat", svhn_files()["train_32x32.mat"]),
        "compressed MATLAB": ("svhn", "train_32x32.mat", svhn_files(True)["train_32x32.mat"]),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "x.png": saved("PNG", exif=exif),
        "y.png": saved("PNG", "P"),
        "x.jpg": saved("JPEG", exif=exif),
        "y.jpg": saved("JPEG", progressive=True),
        "x.webp": saved("WEBP", exif=exif),
        "x.bmp": saved("BMP"),
        "x.gif": saved("GIF", "P"),
        "x.tif": saved("TIFF", exif=exif),
        "y.tif": saved("TIFF", compression="tiff_lzw"),
        "z.tif": saved("TIFF", "I;16" if hasattr(Image, "I16") else "F", compression="tiff_adobe_deflate"),
    }
    for seed in range(trials):
        for title, (name, bad, raw) in arrays.items():
            yield array_trial(f"damaged {title}, seed {seed}", name, bad, mutated(raw, random.Random(seed)))
        for file, raw in images.items():
            yield image_trial(f"damaged {file}, seed {seed}", file, mutated(raw, random.Random(seed)))
        for which in ("npy", "json"):
            prepare = functools.partial(damaged_cache, which, seed)
            yield Trial(f"damaged cache ({which}), seed {seed}", prepare, check_cache)
