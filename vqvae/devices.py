"""Where to compute."""

import torch

from vqvae.errors import UserError


def choose_device(name: str) -> torch.device:
    """`auto` is the first there is of cuda, mps, cpu; `UserError` for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise UserError(f"--device {name}: not available here; there is {', '.join(k for k, v in there.items() if v)}")
    return torch.device(name)
