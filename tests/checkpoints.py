"""Small models saved as checkpoints, for tests of code that reads them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers import choose, images, make
from vqvae import checkpoint, load
from vqvae.autoencoder import Autoencoder, unit_range
from vqvae.config import Config
from vqvae.registry import Choice

CHOICES: dict[str, Any] = {"nets": "sonnet", "bottleneck": "vq", "prior": "uniform", "likelihood": "mse"}


def choices(**names: Any) -> dict[str, Any]:
    """A small member for every slot; `names` replace the defaults."""
    return {slot: choose(slot, name) if isinstance(name, str) else name for slot, name in (CHOICES | names).items()}


def content(model: Autoencoder | None = None, chosen: dict[str, Any] | None = None, **changes: Any) -> dict:
    """The content of a checkpoint of `model`, with some entries replaced."""
    if model is None:
        torch.manual_seed(0)
        model = make(**choices())
    return {
        "kind": "autoencoder",
        "run": "test",
        "config": Config(dataset=Choice("digits", {}), **(chosen or choices())).to_dict(),
        "data": {"name": "none", "shape": list(model.image_shape), "variance": 0.06, "classes": [], "note": ""},
        "model": model.state_dict(),
        "objective": {},
        "step": 3,
        "epoch": 1,
        "examples": {"images": images(2, model.image_shape), "labels": torch.zeros(2, dtype=torch.int64)},
        "usage": None,
        "plots": "plots/test",
    } | changes


@torch.no_grad()
def stored(folder: Path, shape: tuple[int, int, int] = (3, 8, 8), **names: Any) -> Autoencoder:
    """A model whose codebook fits its features, saved as folder/checkpoint.pt and loaded again."""
    chosen = choices(**names)
    model = make(shape, **chosen)
    model.bottleneck.initialize(model.features(unit_range(images(500, shape))))
    checkpoint.write(folder / "checkpoint.pt", content(model, chosen))
    return load(folder)


@torch.no_grad()
def unambiguous(model: Autoencoder, candidates: Tensor, count: int) -> Tensor:
    """The first `count` images whose codes are far from ties: noise on the features, or rounding, does not change them.

    The noise has 1% of each channel's standard deviation. Less can vanish in the rounding of distances, because the
    features of an untrained net vary little around a large mean.
    """
    assert model.discrete is not None
    features = model.features(unit_range(candidates))
    scale = 0.01 * features.std(dim=(0, 2, 3), keepdim=True)
    noisy = [features + scale * torch.randn_like(features) for _ in range(8)]
    codes: list[Any] = [model.discrete.quantize(either).codes for either in (features, *noisy)]
    far = (torch.stack(codes) == codes[0]).flatten(2).all(dim=2).all(dim=0)
    assert far.sum() >= count
    return candidates[far][:count]


class Payload:
    """Pickles as a call that writes the file `executed`."""

    def __reduce__(self):
        return (open, ("executed", "w"))
