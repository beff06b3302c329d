"""`vqvae encode`: images to a file of codes."""

import argparse
from pathlib import Path
from typing import Literal

from vqvae import cli
from vqvae.commands import add_batch_size, add_checkpoint, add_device, path
from vqvae.errors import OptionError, UserError, naming
from vqvae.registry import Choice, Range, resolve

EXAMPLES = """
examples
  vqvae encode --checkpoint logs/vqvae-cifar10 --dataset cifar10 --split test --output codes.npz
  vqvae encode --checkpoint logs/vqvae-photos --dataset photos crops=500 --limit 100 --output codes.npz
  vqvae encode --checkpoint logs/vqvae-folder --input ~/Pictures --output codes.npz --batch-size 256

A folder may be larger than memory, because images are read a batch at a time. Each image gets the model's size, in the
way of its training (see --resize), and is converted to gray for a gray model. Links to folders are followed, hidden
files are not read. Unreadable files are named and skipped.

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
    add = parser.add_argument
    add("--dataset", nargs="+", metavar=("NAME", "key=value"), help="a data set, as in vqvae train")
    add("--input", metavar="FOLDER", type=path("input"), help="a folder; all images below it are encoded")
    resize = cli.value("resize", Literal["crop", "pad", "stretch"])
    help = "images of another shape (default: as the model was trained)"
    add("--resize", metavar="{crop,pad,stretch}", type=resize, help=help)
    split = cli.value("split", Literal["train", "test"])
    add("--split", metavar="{train,test}", type=split, help="split of the data set (default: train)")
    add("--data-dir", metavar="DIR", type=path("data_dir"), help="folder with the data set's files (default: data)")
    add("--limit", metavar="N", type=cli.value("limit", int, Range(1)), help="encode only the first N images")
    output = path("output", "file")
    add("--output", metavar="FILE", required=True, type=output, help="the file to write, such as codes.npz")
    add_batch_size(parser)
    add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    output = Path(options.output)
    if output.suffix != ".npz":
        example = output.with_name(f"{output.stem.strip('.') or 'codes'}.npz")
        raise OptionError("", "output", output, f"must end in .npz, such as {example}")
    if options.input and options.dataset:
        problem = "cannot be encoded together with --dataset; leave one of them out"
        raise OptionError("", "input", options.input, problem)
    if not (options.input or options.dataset):
        raise UserError("nothing to encode; name a folder with --input, or a data set with --dataset")
    for name in ("split", "data_dir"):
        if options.input and getattr(options, name) is not None:
            raise OptionError("", name, getattr(options, name), "needs --dataset; a folder of --input has none")

    from vqvae import checkpoint, data, tokens

    typed = Choice.parse("dataset", options.dataset) if options.dataset else Choice("folder", {})
    if options.resize and options.resize != typed.options.setdefault("resize", options.resize):
        raise OptionError("", "resize", options.resize, f"is given twice, also as {typed}; keep one")
    choice = resolve(data.SLOT, typed)
    if options.data_dir and choice.name in data.SLOT.built_in:
        raise OptionError("", "data_dir", options.data_dir, f"the data set {choice.name} reads no files; leave it out")

    with naming("checkpoint", options.checkpoint):
        content = checkpoint.read_model(options.checkpoint)
        model = tokens.restore(content, options.checkpoint, options.device)
    if "resize" in choice.options and "resize" not in typed.options:  # as in training
        trained = content["config"]["dataset"]["options"].get("resize", "crop")
        choice = resolve(data.SLOT, Choice(choice.name, choice.options | {"resize": trained}))
    source: tokens.Source
    if options.input:
        resize = choice.options["resize"]
        source = tokens.ImageFolder(Path(options.input), model, options.batch_size, options.limit, resize)
    else:
        source = tokens.DatasetSplit(
            choice,
            model,
            options.batch_size,
            split=options.split or "train",
            data_dir=Path(options.data_dir or "data"),
            limit=options.limit,
        )
    with naming("output", options.output):
        codes = tokens.encode_file(output, model, source)
    grid, size = "x".join(map(str, codes.shape[1:])), tokens.discrete(model).num_codes
    skipped = f"; {len(source) - len(codes):,} unreadable, skipped" if len(codes) < len(source) else ""
    print(f"{output}: {len(codes):,} image{'s' * (len(codes) != 1)}, {grid} codes each, codebook of {size:,}{skipped}")
    return 0
