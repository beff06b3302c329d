"""`vqvae export`: a trained model as files for other programs."""

import argparse
from pathlib import Path

from vqvae import cli
from vqvae.commands import add_checkpoint, path
from vqvae.errors import naming

EXAMPLES = """
example
  vqvae export --checkpoint logs/vqvae-cifar10 --output exported

The folder then contains
  model.safetensors, config.json  weights and settings; vqvae.load("exported") restores the model
  encoder.pt2                     torch.export program: uint8 images [B, C, H, W] to codes (int64)
  decoder.pt2                     torch.export program: codes to float images in [0, 1]

For a continuous latent, the encoder returns the mean of z and the decoder takes z. The programs take any batch size and
need only torch:
  encoder = torch.export.load("exported/encoder.pt2").module()

A decoder raises RuntimeError for codes out of range. The names, shapes, dtypes and ranges of what the programs take and
return are in config.json under `programs`, and in each program:
  extra = {"interface.json": ""}
  torch.export.load("exported/decoder.pt2", extra_files=extra)  # fills in extra
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.parser("Write a trained model as files for other programs.", EXAMPLES, prog="vqvae export")
    add_checkpoint(parser)
    output = path("output", "folder")
    help = "a new or empty folder for the files"
    parser.add_argument("--output", metavar="FOLDER", required=True, type=output, help=help)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    from vqvae import checkpoint, files
    from vqvae.export import export

    with naming("checkpoint", options.checkpoint):
        content = checkpoint.read_model(options.checkpoint)
        model = checkpoint.restore(content, options.checkpoint)
    with naming("output", options.output):
        folder = files.claim_empty(Path(options.output))
    with files.emptied_if_not_written(folder):
        for line in export(content, model, folder):
            print(line)
    return 0
