"""Models as folders of diffusers' `VQModel`, read and written without diffusers.

A `VQModel` is a model with `vqgan` nets, a `vq` bottleneck and the `mse` likelihood. It takes and returns pixels in
[-1, 1]. A model with pixels=centered, whose nets take [-0.5, 0.5], is converted exactly: the weights of the first
convolution are halved, and those of the last one are doubled. Zero padding is gray in both ranges. Nets that take
[0, 1] would need a shift, which no weights of a padded convolution can express.

C channels, H W pixels, h w code grid, D code dimension, K codes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save
from torch import Tensor

from vqvae.autoencoder import SLOTS, Autoencoder
from vqvae.config import Config
from vqvae.contracts import Discrete
from vqvae.errors import OptionError, UserError, one_line, shown
from vqvae.files import open_file, read_json, whole_file, write_json
from vqvae.likelihoods import MSE
from vqvae.nets import VQGAN
from vqvae.registry import Choice, build

SETTINGS, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
LARGEST_JSON = 2**20  # bytes
CLASS = "VQModel"
OURS = "_vqvae"  # an entry of the settings; diffusers ignores names that begin with _
RANGE = [-1, 1]  # of the pixels that the nets take and return
PIXEL_VARIANCE = 1 / 12  # of uniform pixels in [0, 1], where the training data's is not known

# beginnings of names of weights, ours and theirs; encoder. and decoder. are the same
RENAMED = {
    "bottleneck.projection.": "quant_conv.",
    "bottleneck.codebook.vectors": "quantize.embedding.weight",
    "decoder.post_quant_conv.": "post_quant_conv.",
}
# parts of names in folders of diffusers before 0.14, and now
EARLIER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# entries that settings may lack, with diffusers' defaults, and those of which only one value is supported
DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": [64], "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "layers_per_block": 1, "latent_channels": 3, "sample_size": 32,
    "num_vq_embeddings": 256, "vq_embed_dim": None, "norm_num_groups": 32, "mid_block_add_attention": True,
    "act_fn": "silu", "norm_type": "group",
}  # fmt: skip
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # whether the level attends
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


# writing


def check(content: Mapping[str, Any]) -> None:
    """Raise `OptionError` for a model, described by its checkpoint's content, that is no `VQModel`."""
    wanted = {"nets": ("vqgan",), "bottleneck": ("vq", "simvq"), "likelihood": ("mse",)}
    for slot, names in wanted.items():
        found = content["config"][slot]["name"]
        if found not in names:
            problem = f"takes the {slot} {' or '.join(names)}, and this model has {found}; choose pt2 or onnx"
            raise OptionError("format", "diffusers", problem)
    if content["config"]["likelihood"]["options"].get("pixels") == "sigmoid":
        problem = "takes nets whose output is pixels, and those of pixels=sigmoid give logits; choose pt2 or onnx"
        raise OptionError("format", "diffusers", problem)


def write(content: Mapping[str, Any], model: Autoencoder, folder: Path) -> None:
    """Write a model into an empty folder that `diffusers.VQModel.from_pretrained` opens.

    `content` is that of the model's checkpoint; raises `OptionError` as `check` does.
    """
    check(content)
    with whole_file(folder / WEIGHTS) as file:
        file.write(save(_their_weights(model), metadata={"format": "pt"}))
    write_json(folder / SETTINGS, _their_settings(content, model))


def _their_weights(model: Autoencoder) -> dict[str, Tensor]:
    bottleneck = cast(Discrete, model.bottleneck)
    ours = {name: value for name, value in model.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    projection = {
        f"bottleneck.{name}": value for name, value in bottleneck.state_dict().items() if "projection." in name
    }
    if not projection:  # the option projection=no
        one = torch.eye(bottleneck.code_dim)
        projection = {"bottleneck.projection.weight": one[..., None, None], "bottleneck.projection.bias": 0 * one[0]}
    ours |= projection | {"bottleneck.codebook.vectors": bottleneck.code_vectors().detach()}
    scale = 2 / cast(MSE, model.likelihood).scale  # their pixel range / our nets': 1 or 2, so products are exact
    ours["encoder.conv_in.weight"] = ours["encoder.conv_in.weight"] / scale
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        ours[name] = ours[name] * scale
    return {_renamed(name, RENAMED): value.clone(memory_format=torch.contiguous_format) for name, value in ours.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with its beginning replaced, if that is among `names`."""
    return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)


def _their_settings(content: Mapping[str, Any], model: Autoencoder) -> dict[str, Any]:
    """The content of their config.json."""
    channels, height, width = model.image_shape
    chosen, bottleneck = content["config"]["nets"], cast(Discrete, model.bottleneck)
    nets: VQGAN = build(SLOTS["nets"], Choice(chosen["name"], chosen["options"]), {"image_shape": model.image_shape})
    down, up = ({attends: name for name, attends in names.items()} for names in (DOWN, UP))
    data = content["data"]
    return {
        "_class_name": CLASS,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [level.width for level in nets.levels],
        "down_block_types": [down[level.attends] for level in nets.levels],
        "up_block_types": [up[level.attends] for level in reversed(nets.levels)],
        "layers_per_block": nets.blocks,
        "latent_channels": nets.channels,
        "sample_size": height if height == width else [height, width],
        "num_vq_embeddings": bottleneck.num_codes,
        "vq_embed_dim": bottleneck.code_dim,
        "norm_num_groups": nets.groups,
        "mid_block_add_attention": nets.middle_attention,
        "act_fn": "silu",
        "norm_type": "group",
        "lookup_from_codebook": True,  # so that their `decode` takes codes with force_not_quantize=True
        OURS: {
            "pixel_range": RANGE,
            "run": content["run"],
            "step": content["step"],
            "data": {key: data[key] for key in ("name", "variance", "classes", "note")},
        },
    }


# reading


def is_folder(path: Path) -> bool:
    """Whether a folder looks like one of diffusers: its weights, in any format, have their name."""
    return any(path.glob("diffusion_pytorch_model.*"))


def read(path: Path) -> dict[str, Any]:
    """Read a model in the form of a checkpoint: `kind`, `run`, `step`, `config`, `data`, and its weights (`model`).

    Training continues from the codebook's vectors, as if each code had been used once. Raises `UserError` if the folder
    is not a `VQModel`, or has parts that the nets `vqgan` do not have. Weights in half precision become float32.
    """
    settings = _read_settings(path / SETTINGS)
    try:
        with open_file(path / WEIGHTS) as file:
            theirs = load_safetensors(file.read())
    except FileNotFoundError:
        raise UserError(f"{path / WEIGHTS}: no such file; save the model with safe_serialization=True") from None
    except Exception as problem:  # safetensors raises many types for damaged files
        raise UserError(f"{path / WEIGHTS}: cannot be read ({one_line(problem)}); use another copy") from None
    with_ours = settings.get(OURS)
    about: dict[str, Any] = with_ours if isinstance(with_ours, dict) else {}
    data = {"name": "unknown", "variance": PIXEL_VARIANCE, "classes": [], "note": ""}
    known = about.get("data")
    data |= {key: known[key] for key in data if key in known} if isinstance(known, dict) else {}
    config, size = _our_config(settings, path / SETTINGS), _size(settings["sample_size"]) or []
    return {
        "kind": "autoencoder",
        "run": about.get("run", path.resolve().name),
        "step": about.get("step", 0),
        "config": config.to_dict(),
        "data": data | {"shape": [settings["in_channels"], *size]},
        "model": _our_weights(theirs),
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path, LARGEST_JSON)
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path}: cannot be read ({one_line(problem)}); use another copy") from None
    if not isinstance(settings, dict) or settings.get("_class_name") != CLASS:
        found = settings.get("_class_name") if isinstance(settings, dict) else None
        raise UserError(f"{path}: describes {shown(found) if found else 'no model'}; name the folder of a {CLASS}")
    return DEFAULTS | settings


def _our_config(settings: Mapping[str, Any], path: Path) -> Config:
    """The settings of a run that has such a model. Raises `UserError` for what the nets `vqgan` lack."""

    def need(good: bool, key: str, way_out: str) -> None:
        if not good:
            raise UserError(f"{path}: {key}={shown(settings[key])}: {way_out}")

    def count(value: Any) -> bool:
        return type(value) is int and 1 <= value < 2**24

    for key in (
        "in_channels", "layers_per_block", "latent_channels", "num_vq_embeddings", "norm_num_groups"
    ):  # fmt: skip
        need(count(settings[key]), key, "must be a whole number from 1 up")
    dim = settings["vq_embed_dim"]
    need(dim is None or count(dim), "vq_embed_dim", "must be a whole number from 1 up")
    need(_size(settings["sample_size"]) is not None, "sample_size", "must be the pixels of a side, or of two")
    need(settings["out_channels"] == settings["in_channels"], "out_channels", "must equal in_channels")
    need(settings["act_fn"] in ("silu", "swish"), "act_fn", "the nets vqgan have silu only")
    need(settings["norm_type"] == "group", "norm_type", "the nets vqgan have group norm only")
    need(type(settings["mid_block_add_attention"]) is bool, "mid_block_add_attention", "must be true or false")
    widths, down, up = (settings[key] for key in ("block_out_channels", "down_block_types", "up_block_types"))
    good = isinstance(widths, list) and 1 <= len(widths) <= 8 and all(count(width) for width in widths)
    need(good, "block_out_channels", "must be 1 to 8 whole numbers from 1 up")
    names = isinstance(down, list) and all(isinstance(name, str) and name in DOWN for name in down)
    need(names and len(down) == len(widths), "down_block_types", f"must be {' or '.join(DOWN)}, one per level")
    names = isinstance(up, list) and all(isinstance(name, str) and name in UP for name in up)
    attends = [DOWN[name] for name in down]
    mirrored = names and [UP[name] for name in reversed(up)] == attends
    need(mirrored, "up_block_types", "the decoder of the nets vqgan attends where its encoder does, and only there")
    hidden, groups = math.gcd(*widths), settings["norm_num_groups"]
    need(hidden % groups == 0, "norm_num_groups", "must divide all of block_out_channels")
    nets = {
        "hidden": hidden,
        "ch_mult": ",".join(str(width // hidden) for width in widths),
        "num_res_blocks": settings["layers_per_block"],
        "features": settings["latent_channels"],
        "attention": ",".join(str(2**i) for i, attending in enumerate(attends) if attending) or "none",
        "middle_attention": settings["mid_block_add_attention"],
        "groups": groups,
    }
    code_dim = settings["vq_embed_dim"] or settings["latent_channels"]
    return Config(
        dataset=Choice("folder", {}),
        nets=Choice("vqgan", nets),
        bottleneck=Choice("vq", {"num_codes": settings["num_vq_embeddings"], "code_dim": code_dim}),
        likelihood=Choice("mse", {"pixels": "symmetric"}),
    )


def _size(value: Any) -> list[int] | None:
    """`[H, W]` of a sample_size, or None for one that is no size."""
    size = value if isinstance(value, list) else [value, value]
    return size if len(size) == 2 and all(type(side) is int and 1 <= side <= 4096 for side in size) else None


def _our_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {new: old for old, new in RENAMED.items()}
    ours = {}
    for name, value in theirs.items():
        for before, now in EARLIER.items():
            name = name.replace(before, now)
        ours[_renamed(name, names)] = value.float() if value.is_floating_point() else value
    vectors = ours.get("bottleneck.codebook.vectors")
    if vectors is not None:
        ones = vectors.new_ones(len(vectors) if vectors.ndim else 0)
        ours |= {
            "bottleneck.codebook.totals": vectors.clone(),
            "bottleneck.codebook.counts": ones,
            "bottleneck.codebook.debias": vectors.new_ones(()),
        }
    return ours
