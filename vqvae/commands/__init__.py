"""The commands of `vqvae COMMAND`, one module each, and the arguments that several of them share.

A command's `main(argv)` takes the words after its name, checks them, imports the library and calls it. It returns the
exit code and raises `UserError`, which `vqvae.cli.run` prints. Importing a command does not import torch.
"""

import argparse

from vqvae import cli
from vqvae.registry import Range


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    text = "logs/<run>/checkpoint.pt, the folder of a run, or an exported folder"
    parser.add_argument("--checkpoint", metavar="PATH", required=True, help=text)


def add_batches(parser: argparse.ArgumentParser) -> None:
    size = cli.value("batch_size", Range(1), int)
    parser.add_argument("--batch-size", metavar="N", type=size, default=64, help="images per batch (default: 64)")
    parser.add_argument("--device", choices=cli.DEVICES, default="auto", help="where to compute (default: auto)")
