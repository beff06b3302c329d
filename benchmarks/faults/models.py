"""Checkpoints, exported folders and files of codes from strangers: changed at random, and crafted.

Their checksums are right, because anyone can compute them. A trial changes an entry, an option, a weight or an array to
something odd (other types, huge numbers, other shapes, NaN, long or unprintable text), or changes bytes of the pickle,
of the header of the weights or of the archive. Every fifth file is crafted: code in a pickle, false sizes, archives
that expand, keys that take very long to hash, members that occur twice or are not arrays.

A forked process then reads the file, builds the model, encodes, decodes and samples, or reads the codes, in 10 seconds
and with at most 1 GiB of new memory. The trial survives if that works or ends in one line that begins with the file's
name. It is lost if the process crashes, runs code from the file or leaves a traceback.
"""

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import random
import resource
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from vqvae import checkpoint, cli, load, tokens
from vqvae.commands import train
from vqvae.errors import UserError
from vqvae.export import export
from vqvae.registry import Choice

SECONDS = 10
NEW_MEMORY, NEW_ADDRESSES = 2**30, 2**33  # bytes; an address that is never written to costs nothing
SMALL = "--limit 60 --batch-size 20 --image-size 16 --device cpu --epochs 1"
RUNS = {
    "vq": "--hidden 8 --codes 16 --code-dim 4",
    "classes": "--nets mlp hidden=8 --codes 16 --code-dim 4 --prior transformer layers=1 width=8 heads=2 --conditional",
    "gaussian": "--nets conv-vae hidden=4 --bottleneck gaussian latents=3 --prior made-flow hidden=8",
    "fsq": "--nets mnist-conv hidden=4 latents=3 --bottleneck fsq levels=3,4 --prior unigram",
}


def run(trials: int, folder: Path) -> tuple[int, int]:
    torch.set_num_threads(1)  # threads do not survive a fork
    originals, draw, survived = Originals(folder), random.Random(0), 0
    os.chdir(folder)  # code in a file would leave a file here
    for trial in range(trials):
        kind = ("checkpoint", "exported", "codes")[trial % 3]
        what, use = getattr(originals, kind)(draw, crafted=trial % 5 == 4)
        problem = forked(use)
        if os.path.exists("executed"):
            problem = "code from the file was run"
            os.unlink("executed")
        survived += not problem
        if problem:
            print(f"  trial {trial}: {kind}, {what}: {problem}", file=sys.stderr)
    return survived, trials


def forked(use: Callable[[], Path]) -> str:
    """Why a function did not survive in a process of its own; "" if it did."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 2)
        status = 1
        try:
            with open("/proc/self/statm") as file:
                size = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + NEW_ADDRESSES, size + NEW_ADDRESSES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            use()
            status = 0
        except UserError as problem:
            print(problem, file=sys.stderr, flush=True)
            status = 2
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as pipe:
        text = pipe.read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, status, usage = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        return f"ended by signal {os.WTERMSIG(status)} {text[-300:]}"
    if (usage.ru_maxrss - before) * 1024 > NEW_MEMORY:
        return f"took {(usage.ru_maxrss - before) >> 10:,} MiB: {text[-300:]}"
    code = os.WEXITSTATUS(status)
    if code == 0 and not text:
        return ""
    if code == 2 and text.count("\n") == 1 and text.startswith(NAMES) and len(text) < 3000:
        return ""
    return f"exit {code}: {text[-1000:]}"


NAMES = ("stranger/", "stranger: ", "stranger.npz: ")  # with which errors begin


class Originals:
    """Files of small runs, and changed copies of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "stranger").mkdir()
        self.contents, self.settings, self.archives = [], [], []
        for name, words in RUNS.items():
            places = ["--log-dir", str(folder / "logs"), "--plot-dir", str(folder / "plots"), "--name", name]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                code = cli.run(train.main, [*SMALL.split(), *words.split(), *places])
            if code:
                raise SystemExit(f"the run {name} failed")
            run = folder / "logs" / name
            self.contents.append(checkpoint.read(run))
            self.archives.append((run / "checkpoint.pt").read_bytes())
            (folder / name).mkdir()
            next(export(self.contents[-1], load(run), folder / name))  # settings and weights, no programs
            self.settings.append(json.loads((folder / name / "config.json").read_text()))
        self.model = load(folder / "logs" / "vq")
        path = folder / "codes.npz"
        tokens.encode_file(path, self.model, tokens.DatasetSplit(Choice("digits", {}), self.model, 20, limit=40))
        with np.load(path) as archive:
            self.arrays = dict(archive)
        self.arrays["files"] = np.array([f"a/{i}.png" for i in range(40)])

    def checkpoint(self, draw: random.Random, *, crafted: bool) -> tuple[str, Callable[[], Any]]:
        path = Path("stranger", "checkpoint.pt")
        _empty(path.parent)
        if crafted:
            what = draw.choice(list(CRAFTED))
            path.write_bytes(sealed(CRAFTED[what]()))
        elif draw.random() < 0.3:
            raw, what = bytes_changed(draw, draw.choice(self.archives))
            path.write_bytes(raw)
        else:
            content, what = changed(draw, draw.choice(self.contents))
            with contextlib.suppress(Exception):  # what cannot be pickled is no trial of the reader
                checkpoint.write(path, content)
        return what, lambda: use_model(path)

    def exported(self, draw: random.Random, *, crafted: bool) -> tuple[str, Callable[[], Any]]:
        folder, number = Path("stranger"), draw.randrange(len(self.settings))
        _empty(folder)
        settings, weights, what = copy.deepcopy(self.settings[number]), dict(self.contents[number]["model"]), ""
        raw = save({key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()})
        if draw.random() < 0.6:
            settings, what = changed(draw, settings, plain=True)
        elif crafted or draw.random() < 0.5:
            raw, what = header_changed(draw, raw)
        else:
            weights, what = changed(draw, weights, tensors=True)
            with contextlib.suppress(Exception):
                raw = save(weights)
        if isinstance(settings, dict):
            settings |= {"weights_sha256": hashlib.sha256(raw).hexdigest(), "sha256": "0" * 64}
        text = json.dumps(settings, default=str, indent=2)
        (folder / "config.json").write_text(checkpoint.seal(text) if SEALED else text)
        (folder / "model.safetensors").write_bytes(raw)
        return what, lambda: use_model(folder)

    def codes(self, draw: random.Random, *, crafted: bool) -> tuple[str, Callable[[], Any]]:
        path = Path("stranger.npz")
        if crafted:
            what = draw.choice(list(ARCHIVES))
            path.write_bytes(ARCHIVES[what](self.arrays))
        elif draw.random() < 0.3:
            raw, what = members_changed(draw, npz(self.arrays))
            path.write_bytes(raw)
        else:
            arrays = dict(self.arrays)
            name = draw.choice(sorted(arrays))
            arrays[name], what = array_changed(draw, arrays[name])
            what = f"{name}: {what}"
            path.write_bytes(npz(arrays))
        return what, lambda: use_codes(path, self.model)


SEALED = "seal" in vars(checkpoint)  # earlier versions have no checksums


def use_model(path: Path) -> None:
    """Load a model, and use it as the programs do."""
    content = checkpoint.read_model(path)
    if SEALED:
        checkpoint.verify(content, str(path))
    model = checkpoint.restore(content, str(path))
    images = content["examples"]["images"][:2] if "examples" in content else torch.zeros(2, *model.image_shape)
    model.reconstruct(images)
    labels = torch.zeros(2, dtype=torch.int64) if content["config"]["conditional"] else None
    model.sample(2, **({"labels": labels} if model.discrete is not None else {}))


def use_codes(path: Path, model: Any) -> None:
    codes, names = tokens.read(path, model)
    model.decode(torch.from_numpy(codes[:2].astype(np.int64)))
    for name in names[:100]:
        os.fsencode(name)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


# changes of entries

VALUES = (
    *(None, True, -1, 0, 1, 7, 2**31 - 1, 2**63 - 1, 10**9, 10**8, 2**24, 10**30),
    *(0.5, math.nan, math.inf, -math.inf, 1e-320, 1e300),
    *("", "x" * 10_000, "\ud800", "../../x", "\x1b[31m", "a\nb", "cosine:1:2", b"bytes"),
    *([], {}, (), [[]], [1, 2, 3], {"name": "vq", "options": {}}),
)
ODD: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in VALUES),
    lambda: deep(300),
    lambda: [deep(3)] * 100_000,
]
TENSORS: list[Callable[[], torch.Tensor]] = [
    lambda: torch.zeros(0),
    lambda: torch.zeros(()),
    lambda: torch.full((2, 2), math.nan),
    lambda: torch.zeros(3, dtype=torch.int64),
    lambda: torch.full((2,), 2**62),
    lambda: torch.zeros(2, dtype=torch.complex64),
    lambda: torch.zeros(1).expand(10**9),
    lambda: torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(10**6, 3, 10**4, 10**4),
    lambda: torch.zeros(2, 3).to_sparse(),
    lambda: torch.nn.Parameter(torch.zeros(2)),
    lambda: torch.zeros(4, device="meta"),
]


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def changed(draw: random.Random, content: Any, *, plain: bool = False, tensors: bool = False) -> tuple[Any, str]:
    """A copy with one to three changes. `plain` makes no tensors, `tensors` nothing else."""
    changes = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = copy.copy(content)
        holder, key, path = content, draw.choice(list(content)), []
        while True:
            path.append(str(key))
            value = holder[key]
            inside = isinstance(value, dict | list) and len(value) > 0
            if not inside or draw.random() < 0.15:
                break
            value = copy.copy(value)
            holder[key] = value
            holder, key = value, draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        how = draw.random()
        if how < 0.08:
            del holder[key]
            what = "deleted"
        elif how < 0.14 and isinstance(holder, dict):
            holder[draw.choice(("x", "", "\ud800", "x" * 3000))] = holder.pop(key)
            what = "renamed"
        elif isinstance(value, torch.Tensor) and how < 0.7:
            holder[key], what = tensor_changed(draw, value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and how < 0.5:
            holder[key] = value * draw.choice((2, -1, 10**3, 10**6, 10**9)) + draw.choice((0, 0, 1))
            what = str(holder[key])
        else:
            odd = draw.choice(TENSORS if tensors else ODD if plain or draw.random() < 0.8 else TENSORS)()
            holder[key], what = odd, f"{odd!s:.30}" if not isinstance(odd, list) else "a list"
        changes.append(f"{'.'.join(path)[:80]} -> {what}")
    return content, "; ".join(changes)


def tensor_changed(draw: random.Random, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    changes: dict[str, Callable[[], torch.Tensor]] = {
        "flat": lambda: tensor.reshape(-1).clone(),
        "transposed": lambda: tensor.movedim(0, -1) if tensor.ndim else tensor[None],
        "cut": lambda: tensor[: len(tensor) // 2] if tensor.ndim else tensor,
        "twice": lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(2),
        "float64": lambda: tensor.double(),
        "float16": lambda: tensor.half(),
        "int64": lambda: tensor.long(),
        "huge": lambda: torch.full_like(tensor, 127) * 2**40,
        "negative": lambda: torch.full_like(tensor, 1) * -5,
        "nan": lambda: torch.full_like(tensor.float(), math.nan),
    }
    what = draw.choice(list(changes))
    return changes[what](), what


# changes of bytes


def sealed(archive: bytes) -> bytes:
    """A ZIP archive with the right checksum as its comment."""
    if not SEALED:
        return archive
    archive = archive[:-2] + (len(checkpoint.SEAL) + 64).to_bytes(2, "little")
    return archive + checkpoint.SEAL + hashlib.sha256(archive).hexdigest().encode()


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, raw in members:
            archive.writestr(zipfile.ZipInfo(name), raw, compression)
    return buffer.getvalue()


def garbled(draw: random.Random, raw: bytes) -> bytes:
    """Bytes with one to four changes."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(raw) + 1)
        new = draw.choice(
            (bytes([draw.randrange(256)]), b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"0", b"}q\x00", b"")
        )
        raw = raw[:at] + new + raw[at + draw.choice((0, len(new), 1, 9)) :]
    return raw


def bytes_changed(draw: random.Random, raw: bytes) -> tuple[bytes, str]:
    """A checkpoint with changes in its pickle, or anywhere in the archive."""
    if SEALED:
        raw = raw[: -len(checkpoint.SEAL) - 64]
    if draw.random() < 0.3:
        return sealed(garbled(draw, raw)), "bytes of the archive"
    with zipfile.ZipFile(io.BytesIO(raw[:-2] + b"\0\0")) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    if draw.random() < 0.3:
        chosen = draw.choice([number for number, (name, _) in enumerate(members) if "/data/" in name])
        name, old = members[chosen]
        members[chosen] = name, old[: draw.randrange(len(old) + 1)] + draw.choice((b"", b"", old))
        return sealed(zipped(members)), f"the length of {name}"
    members = [(name, garbled(draw, old) if name.endswith("data.pkl") else old) for name, old in members]
    return sealed(zipped(members)), "bytes of the pickle"


def header_changed(draw: random.Random, raw: bytes) -> tuple[bytes, str]:
    """safetensors with a changed header."""
    size = int.from_bytes(raw[:8], "little")
    header, rest = raw[8 : 8 + size], raw[8 + size :]
    if draw.random() < 0.4:
        header, what = garbled(draw, header), "bytes of the header"
    else:
        entries = json.loads(header)
        entries, what = changed(draw, entries, plain=True)
        header = json.dumps(entries, default=str).encode()
    length = draw.choice((len(header), len(header), len(header), 2**40, 0, len(header) + 1))
    return length.to_bytes(8, "little") + header + rest, f"header: {what}"


# crafted checkpoints


def text(word: str) -> bytes:
    return b"X" + len(word.encode()).to_bytes(4, "little") + word.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(count: int, size: int, *, stride: int = 1, offset: int = 0, kind: str = "Float") -> bytes:
    """Instructions that rebuild a tensor of a storage of `count` values, of which the file has 16 bytes."""
    storage = f"((X\7\0\0\0storagectorch\n{kind}Storage\n".encode() + text("0") + text("cpu") + number(count) + b"tQ"
    shape = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + shape + b"\x89ccollections\nOrderedDict\n)RtR"


def checkpoint_of(*pickle: bytes, compression: int = zipfile.ZIP_STORED, more: bytes = bytes(16)) -> bytes:
    members = [
        ("archive/data.pkl", b"\x80\x02" + b"".join(pickle)),
        ("archive/data/0", more),
        ("archive/version", b"3\n"),
    ]
    return zipped([*members, ("archive/byteorder", sys.byteorder.encode())], compression)


def in_model(*instructions: bytes) -> bytes:
    """A pickle of {"format": 2, "model": {"x": ...}}."""
    return checkpoint_of(b"}(" + text("format") + b"K\x02" + text("model") + b"}" + text("x"), *instructions, b"su.")


LAUGHS = b"]q\x00" + b"".join(b"](" + b"h\x00" * 10 + b"eq\x00" for _ in range(12))
CRAFTED: dict[str, Callable[[], bytes]] = {
    "a command": lambda: checkpoint_of(b"cposix\nsystem\n(", text("touch executed"), b"tR."),
    "an opened file": lambda: checkpoint_of(b"cbuiltins\nopen\n(", text("executed"), text("w"), b"tR."),
    "bytes without end": lambda: checkpoint_of(b"cbuiltins\nbytearray\n(", number(2**36), b"tR."),
    "a set without end": lambda: checkpoint_of(b"cbuiltins\nset\n(", LAUGHS, b"tR."),
    "a key that takes ages to hash": lambda: checkpoint_of(
        b"}(", b"K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60, b"K\x01u."
    ),
    "a list of lists of lists": lambda: in_model(LAUGHS),
    "a format that takes ages to print": lambda: checkpoint_of(b"}(" + text("format"), LAUGHS, b"u."),
    "a number without end": lambda: checkpoint_of(
        b"}(" + text("format") + b"\x8b\x00\x00\x00\x01" + b"\x7f" * 2**24 + b"u."
    ),
    "depth without end": lambda: in_model(b"]" * 900_000 + b"a" * 899_999),
    "instructions without end": lambda: in_model(b"N0" * 1_500_000 + b"N"),
    "a tensor beyond the file": lambda: in_model(tensor(2**30, 2**30)),
    "a tensor beyond its storage": lambda: in_model(tensor(4, 2**30)),
    "a tensor of one value": lambda: in_model(tensor(4, 2**40, stride=0)),
    "an offset beyond": lambda: in_model(tensor(4, 2, offset=2**40)),
    "a negative offset": lambda: in_model(tensor(4, 2, offset=-8)),
    "a negative size": lambda: in_model(tensor(4, -2)),
    "a stride beyond": lambda: in_model(tensor(4, 2, stride=2**62)),
    "a negative storage": lambda: in_model(tensor(-4, 2)),
    "an untyped storage": lambda: in_model(tensor(4, 2, kind="Untyped")),
    "a storage of 128 bits": lambda: in_model(tensor(1, 1, kind="ComplexDouble")),
    "a record that expands": lambda: checkpoint_of(b"}.", compression=zipfile.ZIP_DEFLATED, more=bytes(2**28)),
    "a pickle that expands": lambda: checkpoint_of(b"N0" * 2**24 + b"}.", compression=zipfile.ZIP_DEFLATED),
    "records that share bytes": lambda: overlapping(2000),
    "two pickles": lambda: zipped([("archive/data.pkl", b"}."), ("other/data.pkl", b"].")]),
    "no pickle": lambda: zipped([("archive/version", b"3\n")]),
    "names of folders": lambda: zipped([("../../data.pkl", b"}."), ("/etc/data.pkl", b"}.")]),
    "an empty archive": lambda: zipped([]),
    "nothing": lambda: b"\0\0",
}


def overlapping(count: int) -> bytes:
    """An archive whose records are all the same mebibyte."""
    raw = checkpoint_of(b"}.", more=bytes(2**20))
    start = raw.index(b"PK\x01\x02")
    end = raw.rindex(b"PK\x05\x06")
    entry = raw.index(b"PK\x01\x02", start + 1)
    one = raw[entry : raw.index(b"PK\x01\x02", entry + 1)]
    name = b"archive/data/0"
    more = b"".join(one.replace(name, b"archive/%06d" % i) for i in range(count))
    directory = raw[start:end] + more
    total = (3 + count).to_bytes(2, "little")
    place = len(directory).to_bytes(4, "little") + start.to_bytes(4, "little")
    return raw[:start] + directory + b"PK\x05\x06\0\0\0\0" + total * 2 + place + b"\0\0"


# files of codes


def npz(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


class Payload:
    """Pickles as a call that writes the file `executed`."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def array_changed(draw: random.Random, array: np.ndarray) -> tuple[np.ndarray, str]:
    changes: dict[str, Callable[[], np.ndarray]] = {
        "object": lambda: np.array([Payload()] * max(array.size, 1), dtype=object).reshape(array.shape or ()),
        "flat": lambda: array.reshape(-1),
        "cut": lambda: array[: len(array) // 2] if array.ndim else array.reshape(1),
        "twice": lambda: np.concatenate([array, array]) if array.ndim else np.array([array, array]),
        "float64": lambda: array.astype(np.float64) if array.dtype.kind != "U" else np.zeros(array.shape),
        "bytes": lambda: array.astype("S8"),
        "text": lambda: array.astype(str),
        "uint64": lambda: np.full(array.shape, 2**64 - 1, np.uint64),
        "negative": lambda: np.full(array.shape, -1),
        "big-endian": lambda: np.zeros(array.shape, ">i4"),
        "records": lambda: np.zeros(array.shape, [("a", "i4"), ("b", "O")]),
        "nan": lambda: np.full(array.shape, math.nan),
        "complex": lambda: np.zeros(array.shape, complex),
        "empty": lambda: np.zeros(0),
        "many": lambda: np.zeros(2**24, np.uint8),
        "dates": lambda: np.zeros(array.shape, "M8[s]"),
        **{
            f"names like {name[:20]!r}": lambda name=name: np.array([f"{i}{name}" for i in range(40)])
            for name in ("\ud800", "/../../x", "a" * 300, "/" * 40, "a/" * 400, "\0", "\x1b[31m\n", ".png/x", "é" * 130)
        },
        "one name": lambda: np.array(["x"] * 40),
        "long names": lambda: np.array([f"{'x' * 60_000}{i}" for i in range(40)]),
    }  # fmt: skip
    what = draw.choice(list(changes))
    return changes[what](), what


def header(shape: str, dtype: str = "'|u1'", version: bytes = b"\x01\x00") -> bytes:
    """The start of an npy file that claims this shape."""
    words = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(words).to_bytes(2, "little") + words


def members_changed(draw: random.Random, raw: bytes) -> tuple[bytes, str]:
    """An npz file with changed bytes in a member, whose CRC is right, or anywhere in the archive."""
    if draw.random() < 0.3:
        return garbled(draw, raw), "bytes of the archive"
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    chosen = draw.randrange(len(members))
    name, old = members[chosen]
    members[chosen] = (name, garbled(draw, old[:128]) + old[128:] if draw.random() < 0.8 else garbled(draw, old))
    return zipped(members, draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))), f"bytes of {name}"


def with_member(name: str, member: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Callable[[dict], bytes]:
    """A function that replaces a member."""

    def make(arrays: dict[str, Any]) -> bytes:
        with zipfile.ZipFile(io.BytesIO(npz(arrays))) as archive:
            members = {old: archive.read(old) for old in archive.namelist()}
        return zipped(list((members | {name: member}).items()), compression)

    return make


def twice(arrays: dict[str, Any]) -> bytes:
    return npz(arrays | {"codez": arrays["codes"]}).replace(b"codez.npy", b"codes.npy")


ARCHIVES: dict[str, Callable[[dict], bytes]] = {
    "a member that is no array": with_member("codes.npy", b"no array"),
    "an empty member": with_member("files.npy", b""),
    "an unknown version": with_member("codes.npy", header("(40, 4, 4)", version=b"\x09\x00") + bytes(640)),
    "a shape beyond memory": with_member("codes.npy", header("(2**40, 4, 4)") + bytes(640)),
    "a huge shape": with_member("codes.npy", header(f"({2**40}, 4, 4)") + bytes(640)),
    "a negative shape": with_member("codes.npy", header("(-1, 4, 4)") + bytes(640)),
    "a shape of floats": with_member("codes.npy", header("(40.0, 4, 4)") + bytes(640)),
    "a shape that overflows": with_member("codes.npy", header(f"({2**62}, {2**62}, 0)") + bytes(640)),
    "values without bytes": with_member("files.npy", header(f"({10**12},)", "'<U0'")),
    "characters that do not exist": with_member("files.npy", header("(40,)", "'<U1'") + b"\xff" * 160),
    "an expanding array": with_member("codes.npy", header(f"({2**24}, 4, 4)") + bytes(2**28)),
    "expanding names": with_member("files.npy", header(f"({2**24},)", "'<U4'") + bytes(2**28)),
    "an expanding grid": with_member("grid.npy", header(f"({2**27},)") + bytes(2**27)),
    "a program as header": with_member("codes.npy", header("(__import__('os').system('touch executed'),)")),
    "brackets without end": with_member("codes.npy", header("(" * 9000)),
    "lzma": with_member("extra.npy", b"", zipfile.ZIP_LZMA),
    "bzip2": with_member("extra.npy", b"", zipfile.ZIP_BZIP2),
    "an array that stands twice": twice,
    "pickled objects": lambda arrays: npz(arrays | {"files": np.array([Payload()] * 40)}),
    "a checkpoint": lambda arrays: checkpoint_of(b"cposix\nsystem\n(", text("touch executed"), b"tR."),
    "nothing": lambda arrays: b"",
}
