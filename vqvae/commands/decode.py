"""`vqvae decode`: a file of codes to images."""

import argparse
from pathlib import Path

from vqvae import cli
from vqvae.commands import add_batch_size, add_checkpoint, add_device, path
from vqvae.errors import counted, naming

EXAMPLES = """
examples
  vqvae decode codes.npz --checkpoint logs/vqvae-folder --output decoded
  vqvae decode codes-*.npz --checkpoint logs/vqvae-folder --output decoded    all shards; codes.npz stands for them too
  vqvae decode samples.npz --checkpoint exported --output samples --device cpu

Each image is a PNG file, named after its source (a/b.jpg becomes a/b.png), or 000000.png, 000001.png ... without
sources. Codes of another model, and file names that lead out of the output folder, are refused.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.parser("Decode a file of codes to images.", EXAMPLES, prog="vqvae decode")
    help = "a file that vqvae encode wrote, such as codes.npz, or its shards"
    parser.add_argument("codes", metavar="FILE", nargs="+", type=path(""), help=help)
    add_checkpoint(parser)
    output = path("output", "folder")
    help = "a new or empty folder for the images"
    parser.add_argument("--output", metavar="FOLDER", required=True, type=output, help=help)
    add_batch_size(parser)
    add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    from vqvae import files, tokens

    with naming("checkpoint", options.checkpoint):
        model = tokens.load_model(options.checkpoint, options.device)
    tokens.need_images(model, "checkpoint", options.checkpoint)
    codes, names = tokens.read(options.codes if len(options.codes) > 1 else options.codes[0], model)
    with naming("output", options.output):
        folder = files.claim_empty(Path(options.output))
    with files.emptied_if_not_written(folder):
        tokens.decode(model, codes, names, folder, options.batch_size)
    print(f"{folder}: {counted(len(codes), 'image')}")
    return 0
