"""`vqvae cache`: the images that were converted for training, listed and removed."""

import os
import time
from typing import Any

from vqvae import cli
from vqvae.commands import path
from vqvae.errors import OptionError, counted, printable

ALL = object()  # no text: a folder may have any name
EXAMPLES = """
examples
  vqvae cache                              list the caches, the oldest first
  vqvae cache --clear                      remove all
  vqvae cache --clear ~/Pictures           remove those of this folder or file
  vqvae cache --clear ~/.cache/vqvae/0f1e2d3c4b5a69788796a5b4.npy

Training on --dataset folder, npz, parquet or webdataset converts the images once, for each size and each change of the
files, into ~/.cache/vqvae (or below XDG_CACHE_HOME). Removed images are converted again when they are needed. Caches
that a running process uses, and files that are not caches, are never removed. An interrupted conversion leaves an
unfinished cache, and the next run continues it.
"""


def main(argv: list[str]) -> int:
    parser = cli.parser("List and remove the caches of images.", EXAMPLES, prog="vqvae cache")
    help = "remove the caches of a folder or file, or one cache (default: all)"
    parser.add_argument("--clear", metavar="WHAT", nargs="?", const=ALL, type=path("clear"), help=help)
    options = parser.parse_args(argv)

    from vqvae.data import cache_files

    found = cache_files.caches()
    if options.clear is None:
        print(_table(found))
        return 0
    chosen = found if options.clear is ALL else [c for c in found if _is_of(c, os.path.abspath(options.clear))]
    if not chosen and options.clear is not ALL:
        raise OptionError("clear", options.clear, "has no cache; see vqvae cache")
    removed = [c for c in chosen if cache_files.remove(c)]
    print(f"removed {counted(len(removed), 'cache')}, {_bytes(sum(c.size for c in removed))}")
    if len(removed) < len(chosen):
        print(f"in use by a running process, not removed: {counted(len(chosen) - len(removed), 'cache')}")
    return 0


def _is_of(cache: Any, path: str) -> bool:
    """Whether the cache is of this folder or file, or is this file itself."""
    return path == cache.source or path in map(os.path.abspath, cache.files)


def _table(found: list) -> str:
    from vqvae.data.cache_files import cache_folder

    rows = [("size", "age", "images", "source")]
    for cache in found:
        count, *shape = cache.shape or [0]
        images = printable(f"{count:,}, {'x'.join(map(str, shape))} {cache.resize}".strip()) if shape else "unknown"
        if cache.done is not None:
            images = f"unfinished: {cache.done:,} of {images}"
        part = f" (part {cache.part[0] + 1} of {cache.part[1]})" if cache.part else ""
        source = printable(f"{cache.kind} {cache.source}{part}".strip()) or f"unknown: {cache.files[0].name}"
        rows.append((_bytes(cache.size), _age(time.time() - cache.changed), images, source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{s:>{widths[0]}}  {a:>{widths[1]}}  {i:{widths[2]}}  {source}" for s, a, i, source in rows]
    total = f"{counted(len(found), 'cache')}, {_bytes(sum(cache.size for cache in found))}, in {cache_folder()}"
    return "\n".join([*(lines if found else []), total])


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _age(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return counted(seconds // length, unit)
    return "new"
