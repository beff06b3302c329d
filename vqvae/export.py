"""Export a trained model: weights as safetensors, settings as JSON, encoder and decoder as torch.export programs.

B batch, C channels, H W pixels, D latent dimension; `grid` is the bottleneck's code grid, (h, w).
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim

from vqvae.autoencoder import Autoencoder
from vqvae.checkpoint import ABOUT, EXPORTED, UNKNOWN, seal, weights_checksum
from vqvae.errors import UserError, one_line
from vqvae.files import NotWritten, whole_file, write_text

TOLERANCE = 1e-4  # sums in another order differ by less, a wrong program by more
INTERFACE = "interface.json"  # the extra file of a program that describes it


class Encoder(nn.Module):
    """Images `[B, C, H, W]` uint8 to codes `[B, *grid]` int64, or to a continuous latent's mean `[B, D, 1, 1]`."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode(images) if self.model.discrete is not None else self.model.posterior_mean(images)


class Decoder(nn.Module):
    """Codes or means, as `Encoder` returns them, to images `[B, C, H, W]`, floats in [0, 1]."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent) if self.model.discrete is not None else self.model.decode_latents(latent)


HALVES = {"encoder.pt2": Encoder, "decoder.pt2": Decoder}


def export(content: dict[str, Any], model: Autoencoder, folder: Path) -> Iterator[str]:
    """Write a model (on the CPU) into an empty folder. Yields a description of each file, once written and checked.

    `content` is the content of the model's checkpoint. `vqvae.load(folder)` restores the model; the programs need only
    torch. What each takes and returns stands in `config.json` under `programs`, and in its extra file `interface.json`.
    """
    settings, weights = (folder / name for name in EXPORTED)
    # safetensors refuses tensors that share memory or are not contiguous
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    raw = save(state)  # safetensors' save_file makes files that only their owner may read
    about = {
        **{key: content[key] for key in ABOUT},
        "checksum": weights_checksum(model),
        "programs": interfaces(model),
        "weights_sha256": hashlib.sha256(raw).hexdigest(),
        "sha256": UNKNOWN,  # of the rest of this file
    }
    with whole_file(weights) as file:
        file.write(raw)
    write_text(settings, seal(json.dumps(about, indent=2) + "\n"))
    yield f"{weights} and {settings.name}: the model; vqvae.load({str(folder)!r}) restores it"
    inputs = _examples(model, 5)
    for name, half_of in HALVES.items():
        half = half_of(model)
        # traced with a batch of two, checked with a batch of five
        write_program(half, inputs[:2], folder / name, interfaces(model)[name])
        yield f"{folder / name}: {agreement(half, folder / name, inputs)}"
        inputs = half(inputs)


def interfaces(model: Autoencoder) -> dict[str, dict[str, Any]]:
    """What each program takes and returns: for its `input` and its `output`, name, shape, dtype and range.

    A range is the smallest and the largest value, or None where any number may occur. `B` in a shape is any batch size.
    """
    points = not model.shows_images
    image: dict[str, Any] = {"shape": ["B", *model.image_shape]}
    images = image | {"dtype": "float32" if points else "uint8", "range": None if points else [0, 255]}
    shown = image | {"dtype": "float32", "range": None if points else [0, 1]}
    if model.discrete is not None:
        shape, codes = ["B", *model.discrete.grid], [0, model.discrete.num_codes - 1]
        latent: dict[str, Any] = {"name": "codes", "shape": shape, "dtype": "int64", "range": codes}
    else:
        shape = ["B", model.bottleneck.code_dim, *model.bottleneck.grid]
        latent = {"name": "latent", "shape": shape, "dtype": "float32", "range": None}
    return {
        "encoder.pt2": {"input": {"name": "images", **images}, "output": latent},
        "decoder.pt2": {"input": latent, "output": {"name": "images", **shown}},
    }


def write_program(half: nn.Module, example: Tensor, path: Path, interface: Mapping[str, Any]) -> None:
    """Save an encoder or decoder as a program for any batch size, with only the weights that it uses.

    `interface` describes it, in its extra file `interface.json`. Raises `UserError` if torch.export cannot trace it.
    """
    # a program keeps the strides of its weights and may require those of its example, so make both contiguous
    half = copy.deepcopy(half).requires_grad_(False).to(memory_format=torch.contiguous_format)
    example = example.clone(memory_format=torch.contiguous_format)
    try:
        with torch.no_grad():  # only strict mode keeps the batch size free through len()
            program = torch.export.export(half, (example,), dynamic_shapes=({0: Dim("batch")},), strict=True)
        used = {*program.graph_signature.parameters, *program.graph_signature.buffers}
        for name in set(program.state_dict) - used:
            del program.state_dict[name]
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # contains source lines and paths of this machine
        with whole_file(path) as file:
            torch.export.save(program, file, extra_files={INTERFACE: json.dumps(interface)})
    except NotWritten:
        raise
    except Exception as problem:  # torch.export raises many types for what it cannot trace
        reason = one_line(problem)
        raise UserError(
            f"{path}: cannot be made from this model ({reason}); its weights are in {path.parent}"
        ) from None


@torch.no_grad()
def agreement(half: nn.Module, path: Path, inputs: Tensor) -> str:
    """Compare the program in a file with the module it was made from, and describe the difference.

    A program that disagrees is deleted, and raises `UserError`.
    """
    expected, found = half(inputs), torch.export.load(path).module()(inputs)
    if expected.is_floating_point():
        agrees = torch.allclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE)
        text = f"differs from the model by at most {float((expected - found).abs().max()):.1g}"
    else:
        same = int((expected == found).sum())
        agrees = expected.numel() - same <= max(1, expected.numel() // 100)  # a vector may be as near to two codes
        text = f"gives {same:,} of {expected.numel():,} codes as the model does"
    if not agrees:
        path.unlink()
        raise UserError(f"{path}: {text}; deleted, because it is not the model. Its weights are in {path.parent}")
    return f"{text}, on {len(inputs)} random examples"


def _examples(model: Autoencoder, count: int) -> Tensor:
    """Random examples `[count, C, H, W]`: uint8 pixels, or float points of the plane."""
    generator = torch.Generator().manual_seed(0)
    if model.shows_images:
        return torch.randint(256, (count, *model.image_shape), generator=generator, dtype=torch.uint8)
    return torch.randn(count, *model.image_shape, generator=generator)
