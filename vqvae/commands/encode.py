"""`vqvae encode`: images to a file of codes."""

import argparse
from pathlib import Path

from vqvae import cli
from vqvae.commands import add_batches, add_checkpoint
from vqvae.errors import OptionError
from vqvae.registry import Choice, Range

EXAMPLES = """
examples
  vqvae encode --checkpoint logs/vqvae-cifar10 --dataset cifar10 --split test --output codes.npz
  vqvae encode --checkpoint logs/vqvae-photos --dataset photos crops=500 --limit 100 --output codes.npz
  vqvae encode --checkpoint logs/vqvae-folder --input ~/Pictures --output codes.npz --batch-size 256

A folder may be larger than memory, because images are read a batch at a time. Each image is cropped to a square, scaled
to the model's size, and converted to gray for a gray model. Unreadable files are named and skipped.

codes.npz contains
  codes        [N, *grid] uint16, or int32 for codebooks of more than 65,536 codes
  num_codes    size of the codebook; codes are from 0 to num_codes - 1
  grid         shape of the codes of one image
  image_shape  [C, H, W] of an image
  files        [N] paths relative to the folder; empty for a data set
  labels       [N] labels of a data set, -1 where unknown; absent for a folder
  model        checksum of the model, which decode compares
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.parser("Encode images to a file of codes.", EXAMPLES, prog="vqvae encode")
    add_checkpoint(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", nargs="+", metavar=("NAME", "key=value"), help="a data set, as in vqvae train")
    source.add_argument("--input", metavar="FOLDER", help="a folder; all images below it are encoded")
    parser.add_argument("--split", choices=("train", "test"), help="split of the data set (default: train)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data set's files (default: data)")
    count = cli.value("limit", Range(1), int)
    parser.add_argument("--limit", metavar="N", type=count, help="encode only the first N images")
    parser.add_argument("--output", metavar="FILE", required=True, help="the file to write, such as codes.npz")
    add_batches(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    output = Path(options.output)
    if output.suffix != ".npz":
        raise OptionError("", "output", output, f"must end in .npz, such as {output.with_suffix('.npz')}")
    if output.is_dir():
        raise OptionError("", "output", output, f"is a folder; name a file in it, such as {output / 'codes.npz'}")
    for name in ("split", "data_dir"):
        if options.input and getattr(options, name) is not None:
            raise OptionError("", name, getattr(options, name), "needs --dataset; a folder of --input has none")

    from vqvae import tokens

    model = tokens.load_model(options.checkpoint, options.device)
    source: tokens.Source
    if options.input:
        source = tokens.ImageFolder(Path(options.input).expanduser(), model, options.batch_size, options.limit)
    else:
        source = tokens.DatasetSplit(
            Choice.parse("dataset", options.dataset),
            model,
            options.batch_size,
            split=options.split or "train",
            data_dir=Path(options.data_dir or "data").expanduser(),
            limit=options.limit,
        )
    codes = tokens.encode_file(output, model, source)
    grid, size = "x".join(map(str, codes.shape[1:])), tokens.discrete(model).num_codes
    skipped = f"; {len(source) - len(codes):,} unreadable, skipped" if len(codes) < len(source) else ""
    print(f"{output}: {len(codes):,} image{'s' * (len(codes) != 1)}, {grid} codes each, codebook of {size:,}{skipped}")
    return 0
