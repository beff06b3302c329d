"""Export a trained model: a folder with its weights, its settings, programs or another library's files, and a card.

B batch, C channels, H W pixels, D latent dimension.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from vqvae import card, checkpoint, foreign, programs
from vqvae.autoencoder import Autoencoder
from vqvae.checkpoint import ABOUT, EXPORTED, UNKNOWN, seal, weights_checksum
from vqvae.errors import UserError
from vqvae.files import whole_file, write_text
from vqvae.programs import HALVES, interfaces


class Format(NamedTuple):
    """A format of an exported folder."""

    check: Callable[[Mapping[str, Any]], None]  # raises OptionError if it cannot store the model
    write: Callable[[dict[str, Any], Autoencoder, Path], Iterator[str]]  # writes the files; yields a text for each
    usage: Callable[[Autoencoder], str]  # how to use them, for the card
    library: str  # hubs' name of the library that opens them


def export(
    content: dict[str, Any],
    model: Autoencoder,
    folder: Path,
    form: str = "pt2",
    *,
    evaluation: Mapping[str, Any] | None = None,
    license: str = card.UNSTATED,
) -> Iterator[str]:
    """Write a model (on the CPU) into an empty folder. Yields a description of each file, once written and checked.

    `content` is the content of the model's checkpoint, `form` a row of FORMATS. `vqvae.load(folder)` restores the
    model. The card README.md gets the metrics of `evaluation`, the content of an evaluation.json, and names `license`.
    """
    chosen = FORMATS[form]
    chosen.check(content)
    yield from chosen.write(content, model, folder)
    usage = chosen.usage(model)
    text = card.model_card(content, model, usage, library=chosen.library, evaluation=evaluation, license=license)
    write_text(folder / card.CARD, text)
    yield f"{folder / card.CARD}: the model card"


# programs, and the model itself


def _with_programs(kind: str) -> Format:
    """The format that adds programs of a kind to the model's own weights and settings."""

    def write(content: dict[str, Any], model: Autoencoder, folder: Path) -> Iterator[str]:
        yield _write_model(content, model, folder, kind)
        inputs, described = programs.examples(model, 5), interfaces(model)
        for name, half_of in HALVES.items():
            half, path = half_of(model), folder / f"{name}.{kind}"
            # traced with a batch of two, checked with a batch of five
            programs.write_program(half, inputs[:2], path, described[name])
            yield f"{path}: {programs.agreement(half, path, inputs)}"
            inputs = half(inputs)

    return Format(lambda content: programs.need(kind), write, lambda model: _usage_of_programs(kind, model), "vqvae")


def _write_model(content: Mapping[str, Any], model: Autoencoder, folder: Path, kind: str) -> str:
    settings, weights = (folder / name for name in EXPORTED)
    # safetensors refuses tensors that share memory or are not contiguous
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    raw = save(state)  # safetensors' save_file makes files that only their owner may read
    about = {
        **{key: content[key] for key in ABOUT},
        "checksum": weights_checksum(model),
        "programs": {f"{name}.{kind}": described for name, described in interfaces(model).items()},
        "weights_sha256": hashlib.sha256(raw).hexdigest(),
        "sha256": UNKNOWN,  # of the rest of this file
    }
    with whole_file(weights) as file:
        file.write(raw)
    write_text(settings, seal(json.dumps(about, indent=2) + "\n"))
    return f"{weights} and {settings.name}: the model; vqvae.load({str(folder)!r}) restores it"


def _usage_of_programs(kind: str, model: Autoencoder) -> str:
    described = interfaces(model)
    ends = {name: [_describe(half[end]) for end in ("input", "output")] for name, half in described.items()}
    lines = [f"- `{name}.{kind}` takes {taken} and returns {returned}." for name, (taken, returned) in ends.items()]
    return "\n".join(
        [*lines, "- `model.safetensors` and `config.json` are the model itself.", "", PROGRAMS_IN_PYTHON[kind]]
    )


def _describe(end: Mapping[str, Any]) -> str:
    low_high = "" if end["range"] is None else f" from {end['range'][0]} to {end['range'][1]}"
    return f"`{end['name']}` `[{', '.join(map(str, end['shape']))}]`, {end['dtype']}{low_high}"


PROGRAMS_IN_PYTHON = {
    "pt2": """```python
import torch

encode = torch.export.load("encoder.pt2").module()  # needs only torch
decode = torch.export.load("decoder.pt2").module()
```

or, with the package vqvae, `model = vqvae.load("this folder")`.""",
    "onnx": """```python
import onnxruntime

encoder = onnxruntime.InferenceSession("encoder.onnx")
(codes,) = encoder.run(None, {encoder.get_inputs()[0].name: images})  # numpy arrays
```

The programs do not check their input: codes must be in range. With the package vqvae: `vqvae.load("this folder")`.""",
}


# diffusers


def _write_diffusers(content: dict[str, Any], model: Autoencoder, folder: Path) -> Iterator[str]:
    foreign.write(content, model, folder)
    restored, inputs = checkpoint.load(folder), programs.examples(model, 5)
    codes = model.encode(inputs)
    same = (restored.encode(inputs) == codes).float().mean().item()
    error = (restored.decode(codes) - model.decode(codes)).abs().max().item()
    if same < 0.99 or error > programs.TOLERANCE:
        raise UserError(
            f"{folder}: what was written is not the model ({same:.0%} of its codes, images off by {error:.1g})"
        )
    agrees = f"gives {same:.0%} of the model's codes on 5 random examples, images differ by at most {error:.1g}"
    yield f"{folder / foreign.WEIGHTS} and {foreign.SETTINGS}: read back, it {agrees}"


def _usage_of_diffusers(model: Autoencoder) -> str:
    low, high = foreign.RANGE
    channels, height, width = model.image_shape
    grid = ", ".join(map(str, model.bottleneck.grid))
    return f"""**Pixels are in [{low}, {high}]**, in and out: `x = 2 * image - 1` for an image in [0, 1].

```python
import torch
from diffusers import VQModel

model = VQModel.from_pretrained("this folder").eval()
x = 2 * images - 1  # images [B, {channels}, {height}, {width}] in [0, 1]
with torch.no_grad():
    latents = model.encode(x).latents
    codes = model.quantize(latents)[2][2].view(len(x), {grid})
    shape = (*codes.shape, model.config.vq_embed_dim)
    y = model.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
images = ((y + 1) / 2).clamp(0, 1)
```

With the package vqvae, `model = vqvae.load("this folder")` encodes and decodes images in [0, 1]."""


FORMATS = {
    "pt2": _with_programs("pt2"),
    "onnx": _with_programs("onnx"),
    "diffusers": Format(foreign.check, _write_diffusers, _usage_of_diffusers, "diffusers"),
}
