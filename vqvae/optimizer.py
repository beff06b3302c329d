"""The optimizer of every stage: AdamW, with weight decay on the weights of convolutions and linear layers only."""

import inspect
from collections.abc import Callable
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


def _unwrapped(name: str) -> Callable[..., Any]:
    return inspect.unwrap(getattr(torch.optim.AdamW, name))


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its import of torch._dynamo, which costs a run seconds and 120 MB at its start.

    torch wraps these methods so that torch.compile passes over them. This project compiles nets only.
    """

    step = torch.no_grad()(_unwrapped("step"))
    add_param_group, zero_grad = _unwrapped("add_param_group"), _unwrapped("zero_grad")
    state_dict, load_state_dict = _unwrapped("state_dict"), _unwrapped("load_state_dict")


def adamw(groups: list[dict[str, Any]], device: torch.device, beta2: float = 0.999) -> AdamW:
    """AdamW (0.9, beta2); the training loop sets the rate at every step, multiplied by a group's `lr_scale`."""
    groups = [{"lr_scale": 1.0, **group} for group in groups]
    return AdamW(groups, lr=1e-3, betas=(0.9, beta2), fused=device.type in ("cpu", "cuda"))
