"""`vqvae encode`: images to a file of codes."""

import argparse
from pathlib import Path
from typing import Literal

from vqvae import cli
from vqvae.commands import add_batch_size, add_checkpoint, add_device, path
from vqvae.errors import OptionError, UserError, counted, naming
from vqvae.registry import Choice, Range, resolve

EXAMPLES = """
examples
  vqvae encode --checkpoint logs/vqvae-cifar10 --dataset cifar10 --split test --output codes.npz
  vqvae encode --checkpoint logs/vqvae-photos --dataset photos crops=500 --limit 100 --output codes.npz
  vqvae encode --checkpoint logs/vqvae-folder --input ~/Pictures --output codes.npz --batch-size 256
  vqvae encode --checkpoint logs/vqvae-folder --input ~/Pictures --output codes.npz --shards 8 --resume
  torchrun --nproc-per-node 8 -m vqvae encode --checkpoint logs/vqvae-folder --input ~/Pictures --output codes.npz

A folder may be larger than memory, because images are read a batch at a time. Images are resized to the model's size
as in its training (see --resize), and converted to gray for a gray model. Links to folders are followed, hidden files
are not read. Unreadable files are named and skipped.

Several processes (torchrun) write a shard each, codes-00000-of-00008.npz ..., which decode and vqvae.tokens.load_codes
read as one. --shards sets the number of shards, also for one process. --resume keeps finished shards.

codes.npz contains
  codes        [N, *grid] uint16, or int32 for codebooks of more than 65,536 codes
  num_codes    size of the codebook; codes are from 0 to num_codes - 1
  grid         shape of the codes of one image
  image_shape  [C, H, W] of an image
  files        [N] paths relative to the folder; empty for a data set
  labels       [N] labels of a data set, -1 where unknown; absent for a folder
  model        checksum of the model, which decode compares
  source       checksum of the images, which --resume compares
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
    shards = cli.value("shards", int, Range(1, 99_999))
    add("--shards", metavar="N", type=shards, help="files to write (default: one for each process)")
    add("--resume", action="store_true", help="keep files of the same model and images that are finished")
    add_batch_size(parser)
    add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    output = Path(options.output)
    if output.suffix != ".npz":
        example = output.with_name(f"{output.stem.strip('.') or 'codes'}.npz")
        raise OptionError("output", output, f"must end in .npz, such as {example}")
    if options.input and options.dataset:
        problem = "cannot be encoded together with --dataset; leave one of them out"
        raise OptionError("input", options.input, problem)
    if not (options.input or options.dataset):
        raise UserError("nothing to encode; name a folder with --input, or a data set with --dataset")
    for name in ("split", "data_dir"):
        if options.input and getattr(options, name) is not None:
            raise OptionError(name, getattr(options, name), "needs --dataset; a folder of --input has none")

    from vqvae import distributed
    from vqvae.devices import choose_device

    distributed.start(choose_device(options.device))
    try:
        return encode(options, output)
    finally:
        distributed.stop()


def encode(options: argparse.Namespace, output: Path) -> int:
    """Encode what the options describe, or this process's shards of it."""
    from vqvae import checkpoint, data, distributed, tokens

    typed = Choice.parse("dataset", options.dataset) if options.dataset else Choice("folder", {})
    if options.resize and options.resize != typed.options.setdefault("resize", options.resize):
        raise OptionError("resize", options.resize, f"is given twice, also as {typed}; keep one")
    choice = resolve(data.SLOT, typed)
    if options.data_dir and choice.name in data.SLOT.built_in:
        raise OptionError("data_dir", options.data_dir, f"the data set {choice.name} reads no files; leave it out")

    with naming("checkpoint", options.checkpoint):
        content = checkpoint.read_model(options.checkpoint)
        model = tokens.restore(content, options.checkpoint, options.device)
    there = content["config"]["dataset"]
    trained = dict(there["options"])
    if there["name"] != choice.name:
        trained = {"resize": trained.get("resize", "crop")}
        trained |= {"channels": 1} if model.image_shape[0] == 1 else {}
    known = {key: value for key, value in trained.items() if key in choice.options}
    choice = resolve(data.SLOT, Choice(choice.name, known | typed.options))
    source: tokens.Source
    if options.input:
        resize = choice.options["resize"]
        source = tokens.ImageFolder(Path(options.input), model, options.batch_size, options.limit, resize)
    else:
        with distributed.first_goes_first():
            source = tokens.DatasetSplit(
                choice,
                model,
                options.batch_size,
                split=options.split or "train",
                data_dir=Path(options.data_dir or "data"),
                limit=options.limit,
            )
    with naming("output", options.output):
        done = tokens.encode_shards(output, model, source, options.shards, resume=options.resume)
    bottleneck, count = tokens.discrete(model), done.images
    grid, size = "x".join(map(str, bottleneck.grid)), bottleneck.num_codes
    skipped = f"; {len(source) - count:,} unreadable, skipped" if count < len(source) else ""
    kept = f"; {done.kept} of {len(done.paths)} files were finished" if done.kept else ""
    where = done.paths[0] if len(done.paths) == 1 else f"{done.paths[0]} ... {done.paths[-1].name}"
    print(f"{where}: {counted(count, 'image')}, {grid} codes each, codebook of {size:,}{skipped}{kept}")
    return 0
