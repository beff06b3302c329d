"""A trained model as plain files: weights as safetensors, settings as JSON, both halves as torch.export programs.

B batch, C channels, H W pixels, D latent dimension; a code's own shape is the bottleneck's `grid`.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim

from vqvae.autoencoder import Autoencoder
from vqvae.checkpoint import ABOUT, EXPORTED
from vqvae.errors import UserError
from vqvae.files import cannot_write
from vqvae.stage_two import weights_checksum

TOLERANCE = 1e-4  # sums in another order differ by less, a wrong program by more


class Encoder(nn.Module):
    """Pictures `[B, C, H, W]` uint8 to codes `[B, *grid]` int64, or to a continuous latent's mean `[B, D, 1, 1]`."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        discrete = self.model.bottleneck.num_codes is not None
        return self.model.encode(pictures) if discrete else self.model.posterior_mean(pictures)


class Decoder(nn.Module):
    """What `Encoder` gives, back to pictures `[B, C, H, W]`, floats in [0, 1]."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor) -> Tensor:
        discrete = self.model.bottleneck.num_codes is not None
        return self.model.decode(codes) if discrete else self.model.pictures(codes)


HALVES = {"encoder.pt2": Encoder, "decoder.pt2": Decoder}


def export(content: dict[str, Any], model: Autoencoder, folder: Path) -> Iterator[str]:
    """Write a model (on the CPU) into an empty folder; yields what each file is, once it is written and checked.

    `content` is that of the model's checkpoint. `vqvae.load(folder)` gives the model back; the programs need nothing
    but torch.
    """
    settings, weights = (folder / name for name in EXPORTED)
    about = {key: content[key] for key in ABOUT} | {"checksum": weights_checksum(model)}
    # cloned, because safetensors refuses weights that share memory, and strides that are not plain
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    try:
        weights.write_bytes(save(state))  # safetensors' own files are for their owner's eyes alone
        settings.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except OSError as problem:
        raise cannot_write(folder, problem) from None
    yield f"{weights} and {settings.name}: the model, as vqvae.load({str(folder)!r}) gives it back"
    inputs = _pictures(model, 5)
    for name, made in HALVES.items():
        half = made(model)
        write_program(half, inputs[:2], folder / name)  # traced with two, and checked with five
        yield f"{folder / name}: {agreement(half, folder / name, inputs)}"
        inputs = half(inputs)


def write_program(half: nn.Module, example: Tensor, path: Path) -> None:
    """Save a half of the model as a program for batches of any size, with the weights that it uses and no others."""
    # a program keeps the strides of its weights and may insist on those of its example: plain ones travel best
    half = copy.deepcopy(half).requires_grad_(False).to(memory_format=torch.contiguous_format)
    example = example.clone(memory_format=torch.contiguous_format)
    try:
        with torch.no_grad():  # strict: it alone keeps the batch's size free through len()
            program = torch.export.export(half, (example,), dynamic_shapes=({0: Dim("batch")},), strict=True)
        used = {*program.graph_signature.parameters, *program.graph_signature.buffers}
        for name in set(program.state_dict) - used:
            del program.state_dict[name]
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # source lines, and the paths of this machine
        torch.export.save(program, path)
    except Exception as problem:  # what a member computes may be beyond torch.export, which says so in many ways
        path.unlink(missing_ok=True)
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise UserError(f"{path}: cannot be made of this model ({reason}); its weights are in {path.parent}") from None


@torch.no_grad()
def agreement(half: nn.Module, path: Path, inputs: Tensor) -> str:
    """How the program in a file agrees with the half it was made from, in words; `UserError` where it does not."""
    wanted, given = half(inputs), torch.export.load(path).module()(inputs)
    if wanted.is_floating_point():
        fine = torch.allclose(wanted, given, rtol=TOLERANCE, atol=TOLERANCE)
        said = f"differs from the model by {float((wanted - given).abs().max()):.1g} at most"
    else:
        same = int((wanted == given).sum())
        fine = same >= 0.99 * wanted.numel()  # two codes may be equally near
        said = f"gives {same:,} of {wanted.numel():,} codes as the model does"
    if not fine:
        path.unlink()
        raise UserError(f"{path}: {said}; removed, since it is not the model. Its weights are in {path.parent}")
    return f"{said}, on {len(inputs)} random examples"


def _pictures(model: Autoencoder, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if model.shows_pictures:
        return torch.randint(256, (count, *model.image_shape), generator=generator, dtype=torch.uint8)
    return torch.randn(count, *model.image_shape, generator=generator)  # points of the plane
