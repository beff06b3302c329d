"""`vqvae export`: a trained model as files for other programs."""

import argparse
import re
from pathlib import Path
from typing import Literal, get_args

from vqvae import cli
from vqvae.commands import add_checkpoint, path
from vqvae.errors import naming
from vqvae.registry import Passes

Form = Literal["pt2", "onnx", "diffusers"]
EXAMPLES = """
examples
  vqvae export --checkpoint logs/vqvae-cifar10 --output exported
  vqvae export --checkpoint logs/vqvae-cifar10 --output exported --format onnx
  vqvae export --checkpoint logs/tokenizer --output exported --format diffusers --license mit

With --format pt2 or onnx the folder then contains
  model.safetensors, config.json  weights and settings; vqvae.load("exported") restores the model
  encoder.pt2 or encoder.onnx     program: uint8 images [B, C, H, W] to codes (int64)
  decoder.pt2 or decoder.onnx     program: codes to float images in [0, 1]
  README.md                       a model card, with the metrics of evaluation.json if it lies next to the checkpoint

For a continuous latent, the encoder returns the mean of z and the decoder takes z. The programs take any batch size and
need only torch, or only an ONNX runtime:
  encoder = torch.export.load("exported/encoder.pt2").module()
  encoder = onnxruntime.InferenceSession("exported/encoder.onnx")

A decoder.pt2 raises RuntimeError for codes out of range. The names, shapes, dtypes and ranges of what the programs take
and return are in config.json under `programs`, and in each program (ONNX: as metadata of the same name):
  extra = {"interface.json": ""}
  torch.export.load("exported/decoder.pt2", extra_files=extra)  # fills in extra

With --format diffusers, for models with vqgan nets, a vq bottleneck and the mse likelihood:
  config.json, diffusion_pytorch_model.safetensors  for diffusers.VQModel.from_pretrained("exported"); pixels in [-1, 1]
  README.md
vqvae.load("exported") reads that folder too, and `train.py --init-from exported` starts from it.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.parser("Write a trained model as files for other programs.", EXAMPLES, prog="vqvae export")
    add_checkpoint(parser)
    output = path("output", "folder")
    help = "a new or empty folder for the files"
    parser.add_argument("--output", metavar="FOLDER", required=True, type=output, help=help)
    metavar, form = f"{{{','.join(get_args(Form))}}}", cli.value("format", Form)
    help = "torch.export programs, ONNX programs, or the files of diffusers' VQModel (default: pt2)"
    parser.add_argument("--format", metavar=metavar, type=form, default="pt2", help=help)
    rule = Passes(lambda text: bool(re.fullmatch(r"[\w.+-]{1,60}", text)), "an identifier such as mit or cc-by-4.0")
    help = "license of the model, for its card (default: other, which states none)"
    parser.add_argument("--license", metavar="ID", type=cli.value("license", str, rule), default="other", help=help)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    from vqvae import checkpoint, files
    from vqvae.export import FORMATS, export

    with naming("checkpoint", options.checkpoint):
        content = checkpoint.read_model(options.checkpoint)
        model = checkpoint.restore(content, options.checkpoint)
        evaluation = checkpoint.read_evaluation(checkpoint.locate(options.checkpoint), content)
    FORMATS[options.format].check(content)
    with naming("output", options.output):
        folder = files.claim_empty(Path(options.output))
    with files.emptied_if_not_written(folder):
        for line in export(content, model, folder, options.format, evaluation=evaluation, license=options.license):
            print(line)
    return 0
