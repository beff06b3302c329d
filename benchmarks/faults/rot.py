"""Bit rot: files of a small run, with a single bit flipped or their end cut off at a random place.

The files are checkpoint.pt, the config.json and model.safetensors of an exported folder, the codes that stage two
caches, and a file of codes from `vqvae encode`. A trial survives if the checkpoint or the exported model is refused in
one line that begins with the file's name, if the cached codes are made again and are the same, and if the file of codes
is refused or gives the same codes and names. Two thirds of the trials flip a bit.
"""

import contextlib
import io
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vqvae import checkpoint, cli, data, load, tokens
from vqvae.commands import train
from vqvae.errors import UserError
from vqvae.export import export
from vqvae.registry import Choice
from vqvae.stage_two import extract_codes

SMALL = "--limit 60 --batch-size 20 --hidden 8 --codes 16 --code-dim 4 --image-size 16 --device cpu --epochs 1"


def run(trials: int, folder: Path) -> tuple[int, int]:
    files, draw, survived = Files(folder), random.Random(0), 0
    for trial in range(trials):
        path, survives = files.kinds[trial % len(files.kinds)]
        whole = path.read_bytes()
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        flips = draw.random() < 2 / 3
        path.write_bytes(whole[:at] + (bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] if flips else b""))
        problem = survives()
        survived += not problem
        if problem:
            what = f"bit {bit} of byte {at} flipped" if flips else f"cut to {at} bytes"
            print(f"  trial {trial}: {path.name} of {len(whole)} bytes, {what}: {problem}", file=sys.stderr)
        path.write_bytes(whole)
    return survived, trials


class Files:
    """A run, its export and its codes. `kinds` has each file, and a function that says why it did not survive."""

    def __init__(self, folder: Path):
        places = ["--log-dir", str(folder / "logs"), "--plot-dir", str(folder / "plots")]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cli.run(train.main, [*SMALL.split(), "--name", "run", *places])
        self.run, self.exported = folder / "logs" / "run", folder / "exported"
        self.model = load(self.run)
        self.exported.mkdir()
        next(export(checkpoint.read(self.run), self.model, self.exported))  # settings and weights, no programs
        self.images = data.load("digits", image_size=16, limit=60).train.images
        self.cache, self.tokens = folder / "codes-train.npz", folder / "codes.npz"
        self.codes = extract_codes(self.model, self.images, self.cache)
        source = tokens.DatasetSplit(Choice("digits", {}), self.model, 20, limit=60)
        tokens.encode_file(self.tokens, self.model, source)
        self.stored = tokens.read(self.tokens, self.model)
        self.kinds: list[tuple[Path, Callable[[], str]]] = [
            (self.run / "checkpoint.pt", lambda: self._refused(self.run)),
            (self.exported / "model.safetensors", lambda: self._refused(self.exported)),
            (self.exported / "config.json", lambda: self._refused(self.exported)),
            (self.cache, self._made_again),
            (self.tokens, self._refused_or_same),
        ]

    def _refused(self, folder: Path) -> str:
        try:
            load(folder)
        except UserError as problem:
            return _not_a_line(problem, folder)
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return "loaded"

    def _made_again(self) -> str:
        try:
            codes = extract_codes(self.model, self.images, self.cache)
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return "" if torch.equal(codes, self.codes) else "other codes"

    def _refused_or_same(self) -> str:
        try:
            codes, names = tokens.read(self.tokens, self.model)
        except UserError as problem:
            return _not_a_line(problem, self.tokens)
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return "" if np.array_equal(codes, self.stored[0]) and names == self.stored[1] else "other codes or names"


def _not_a_line(problem: UserError, path: Path) -> str:
    text = str(problem)
    return "" if text.startswith(os.fspath(path)) and "\n" not in text else text
