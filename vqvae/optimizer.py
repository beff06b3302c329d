"""The optimizer of every stage: AdamW, with weight decay on the weights of convolutions and linear layers only."""

from typing import Any

import torch
from torch import nn


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a module as AdamW groups: those that decay, then the others."""
    decayed = {id(m.weight) for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999); the training loop sets the rate at every step, multiplied by a group's `lr_scale`."""
    groups = [{"lr_scale": 1.0, **group} for group in groups]
    return torch.optim.AdamW(groups, lr=1e-3, fused=device.type in ("cpu", "cuda"))
