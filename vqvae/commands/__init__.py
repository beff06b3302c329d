"""The commands of `vqvae COMMAND`, one module each, and the arguments that several of them share.

A command's `main(argv)` takes the words after its name, checks them, imports the library and calls it. It returns the
exit code and raises `UserError`, which `vqvae.cli.run` prints. Importing a command does not import torch.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

from vqvae import cli
from vqvae.config import FIELDS, Location
from vqvae.registry import Range


def path(option: str, write: Literal["", "file", "folder"] = "") -> Callable[[str], Any]:
    """The `type=` of an argument that is a path; `write` says whether a file or a folder will be written there."""
    checked = cli.value(option, str, Location(write))
    return lambda text: os.path.expanduser(checked(text))


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    text = "logs/<run>/checkpoint.pt, the folder of a run, or an exported folder"
    parser.add_argument("--checkpoint", metavar="PATH", required=True, type=path("checkpoint"), help=text)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    size = cli.value("batch_size", int, Range(1, 65_536))
    parser.add_argument("--batch-size", metavar="N", type=size, default=64, help="images per batch (default: 64)")


def add_device(parser: argparse.ArgumentParser) -> None:
    known = FIELDS["device"].kind
    metavar, device = f"{{{','.join(get_args(known))}}}", cli.value("device", known)
    help = "where to compute (default: auto)"
    parser.add_argument("--device", metavar=metavar, type=device, default="auto", help=help)
