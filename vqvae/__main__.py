"""A trained model for other programs: pictures to codes, codes to pictures, and the model itself as plain files."""

import argparse
import sys
import warnings
from pathlib import Path

from vqvae.config import DEVICES, OneLineErrors
from vqvae.errors import UserError

EXAMPLES = """
examples
  python -m vqvae encode --checkpoint logs/vqvae-cifar10 --dataset cifar10 --output codes.npz
  python -m vqvae encode --checkpoint logs/vqvae-folder --input ~/Pictures --output codes.npz
  python -m vqvae decode codes.npz --checkpoint logs/vqvae-folder --output decoded
  python -m vqvae export --checkpoint logs/vqvae-folder --output exported

`python -m vqvae encode --help` and so on say more. Models are trained by train.py.
"""
ENCODE = """
examples
  python -m vqvae encode --checkpoint logs/vqvae-cifar10 --dataset cifar10 --split test --output codes.npz
  python -m vqvae encode --checkpoint logs/vqvae-photos --dataset photos crops=500 --limit 100 --output codes.npz
  python -m vqvae encode --checkpoint logs/vqvae-folder --input ~/Pictures --output codes.npz --batch-size 256

A folder may be larger than memory: its pictures are read a batch at a time, cropped square, scaled to the model's size
and made grey for a grey model. Unreadable files are named and left out.

codes.npz holds
  codes        [N, *grid] uint16, or int32 where the codebook has more than 65,536 codes
  num_codes    how many codes there are: codes are from 0 to num_codes - 1
  grid         the shape of one picture's codes
  image_shape  [C, H, W] of a picture
  files        [N] paths relative to the folder; empty for a data set
  labels       [N] of a data set, -1 where it has none; absent for a folder
  model        checksum of the model, which decode asks for
"""
DECODE = """
examples
  python -m vqvae decode codes.npz --checkpoint logs/vqvae-folder --output decoded
  python -m vqvae decode drawn.npz --checkpoint exported --output drawn --device cpu

Pictures are PNG files, named after the file each was encoded from (a/b.jpg becomes a/b.png), or 000000.png, 000001.png
... where there is none. Codes of another model, and file names that lead out of the folder, are refused.
"""
EXPORT = """
example
  python -m vqvae export --checkpoint logs/vqvae-cifar10 --output exported

The folder then holds
  model.safetensors, config.json  weights and settings, which vqvae.load("exported") makes the same model of
  encoder.pt2                     torch.export program: uint8 pictures [B, C, H, W] to codes (int64)
  decoder.pt2                     codes to float pictures in [0, 1]

Of a model with a continuous latent the encoder gives the mean of z, and the decoder takes z. The programs need torch
alone, for any batch size:
  encoder = torch.export.load("exported/encoder.pt2").module()
"""


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse(argv)
        COMMANDS[options.command](options)
        return 0
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    def taught(epilog: str) -> dict:
        return {
            "epilog": epilog,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }

    cli = OneLineErrors(prog="python -m vqvae", description=__doc__, **taught(EXAMPLES))
    commands = cli.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **taught(epilog))
        known = "logs/<run>/checkpoint.pt, the run's folder, or one that export wrote"
        sub.add_argument("--checkpoint", metavar="PATH", required=True, help=known)
        return sub

    def working(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--batch-size", metavar="N", type=int, default=64, help="pictures at a time (default: 64)")
        sub.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: auto)")

    sub = command("encode", "pictures to a file of codes", ENCODE)
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", nargs="+", metavar=("NAME", "key=value"), help="a data set, as for train.py")
    source.add_argument("--input", metavar="FOLDER", help="every picture below a folder")
    sub.add_argument("--split", choices=("train", "test"), help="of the data set (default: train)")
    sub.add_argument("--data-dir", metavar="DIR", help="where the data set's files are (default: data)")
    sub.add_argument("--limit", metavar="N", type=int, help="the first N pictures only")
    sub.add_argument("--output", metavar="FILE", required=True, help="the file to write, such as codes.npz")
    working(sub)

    sub = command("decode", "a file of codes to pictures", DECODE)
    sub.add_argument("codes", metavar="FILE", help="what encode wrote, such as codes.npz")
    sub.add_argument("--output", metavar="FOLDER", required=True, help="a new or empty folder for the pictures")
    working(sub)

    sub = command("export", "a model to files that other programs read", EXPORT)
    sub.add_argument("--output", metavar="DIR", required=True, help="a new or empty folder for them")

    options = cli.parse_args(argv)
    for flag in ("batch_size", "limit"):
        value = getattr(options, flag, None)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    return options


def encode(options: argparse.Namespace) -> None:
    from vqvae import tokens
    from vqvae.files import whole_file

    output = Path(options.output)
    if output.suffix != ".npz":
        raise UserError(f"--output {output}: must end in .npz, such as {output.with_suffix('.npz')}")
    for flag, value in (("--split", options.split), ("--data-dir", options.data_dir)):
        if options.input and value is not None:
            raise UserError(f"{flag} {value}: goes with --dataset, not with --input")
    model = load_coder(options)
    if options.input:
        batches = tokens.PictureFolder(Path(options.input).expanduser(), model, options.batch_size, options.limit)
        count, labels = len(batches), {}
    else:
        split = load_split(options, model)
        batches, count, labels = split.images.split(options.batch_size), len(split.images), {"labels": split.labels}
    with whole_file(output) as file:
        codes = tokens.encode(model, batches, count)
        names = batches.names if options.input else []
        if not len(codes):
            raise UserError(f"--input {options.input}: none of its {count} pictures can be read")
        tokens.write(file, model, codes, files=names, **labels)
    grid = "x".join(map(str, codes.shape[1:]))
    left_out = f"; {count - len(codes):,} left out, unreadable" if len(codes) < count else ""
    print(f"{output}: {len(codes):,} pictures as {grid} codes of {model.bottleneck.num_codes:,}{left_out}")


def load_coder(options: argparse.Namespace):
    """The model of --checkpoint on --device; `UserError` unless it has codes."""
    from vqvae import checkpoint
    from vqvae.devices import choose_device

    model = checkpoint.load(options.checkpoint, choose_device(options.device))
    if model.bottleneck.num_codes is None:
        raise UserError(
            f"--checkpoint {options.checkpoint}: its latent is continuous, so it has no codes; "
            "the programs that `python -m vqvae export` writes map pictures to its means and back"
        )
    return model


def load_split(options: argparse.Namespace, model):
    """The pictures and labels to encode, at the model's size; `UserError` where they are not of the model's shape."""
    from vqvae import data
    from vqvae.members import Choice, resolve

    choice = resolve(data.SLOT, Choice.parse("--dataset", options.dataset))
    size = model.image_shape[1] if model.shows_pictures and choice.name != "gauss2d" else None  # points have no size
    dataset = data.load(
        choice.name, data_dir=options.data_dir or "data", image_size=size, limit=options.limit, **choice.options
    )
    split = getattr(dataset, options.split or "train")
    if tuple(split.images.shape[1:]) != model.image_shape:
        found, wanted = ("x".join(map(str, shape)) for shape in (split.images.shape[1:], model.image_shape))
        raise UserError(
            f"--dataset {choice.name}: its examples are {found}, and the model's are {wanted}; "
            "name the data set it was trained on, or give pictures with --input, which adapts them"
        )
    return split


def decode(options: argparse.Namespace) -> None:
    from vqvae import tokens
    from vqvae.files import claim_empty

    model = load_coder(options)
    tokens.need_pictures(model, f"--checkpoint {options.checkpoint}")
    codes, names = tokens.read(Path(options.codes), model)
    folder = claim_empty(Path(options.output))
    tokens.decode(model, codes, names, folder, options.batch_size)
    print(f"{folder}: {len(codes):,} pictures")


def export(options: argparse.Namespace) -> None:
    from vqvae import checkpoint
    from vqvae.export import export
    from vqvae.files import claim_empty

    content = checkpoint.read_model(options.checkpoint)
    model = checkpoint.restore(content, options.checkpoint)
    for line in export(content, model, claim_empty(Path(options.output))):
        print(line)


COMMANDS = {"encode": encode, "decode": decode, "export": export}

if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # for people, not for debuggers
    sys.exit(main())
