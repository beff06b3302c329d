"""`vqvae decode`: a file of codes to images."""

import argparse
from pathlib import Path

from vqvae import cli
from vqvae.commands import add_batches, add_checkpoint

EXAMPLES = """
examples
  vqvae decode codes.npz --checkpoint logs/vqvae-folder --output decoded
  vqvae decode samples.npz --checkpoint exported --output samples --device cpu

Each image is a PNG file, named after its source (a/b.jpg becomes a/b.png), or 000000.png, 000001.png ... without
sources. Codes of another model, and file names that lead out of the output folder, are refused.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.parser("Decode a file of codes to images.", EXAMPLES, prog="vqvae decode")
    parser.add_argument("codes", metavar="FILE", help="a file that vqvae encode wrote, such as codes.npz")
    add_checkpoint(parser)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="a new or empty folder for the images")
    add_batches(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    from vqvae import files, tokens

    model = tokens.load_model(options.checkpoint, options.device)
    tokens.need_images(model, "checkpoint", options.checkpoint)
    codes, names = tokens.read(Path(options.codes), model)
    folder = files.claim_empty(Path(options.output))
    tokens.decode(model, codes, names, folder, options.batch_size)
    print(f"{folder}: {len(codes):,} images")
    return 0
