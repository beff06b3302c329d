"""The optimizers, Muon and AdamW. Only weights of convolutions and linear layers decay."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FEW = 4  # channels that an image may have
ADAMS_SIZE = 0.2  # typical size of the entries of AdamW's steps, so that both take similar learning rates


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a module as groups: the kernels, which decay, then the others."""
    kernels = {id(m.weight) for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in kernels], "weight_decay": weight_decay, "kernels": True},
        {"params": [p for p in trained if id(p) not in kernels], "weight_decay": 0.0},
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


class Muon(AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for groups with a momentum, AdamW for the others.

    A kernel moves by its mean gradient as a matrix `[out, height * width * in]` whose singular values are all set to
    about 1, scaled so that its entries have the size of those of AdamW's steps (2502.16982, section 2.2).
    torch.optim.Muon refuses kernels, which have four axes.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "momentum" not in group]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._move(group)
        return loss

    def _move(self, group: dict[str, Any]) -> None:
        alike = defaultdict(list)  # matrices of one shape are one batch
        for kernel in group["params"]:
            if (gradient := kernel.grad) is not None:
                matrix = self._mean(kernel, gradient, group["momentum"]).movedim(1, -1).flatten(1)
                alike[min(matrix.shape), max(matrix.shape)].append((kernel, matrix))
        for (low, high), pairs in alike.items():
            wide = torch.stack([matrix if len(matrix) == low else matrix.T for _, matrix in pairs])
            for (kernel, matrix), step in zip(pairs, orthogonal(wide), strict=True):
                step = (step if len(matrix) == low else step.T).reshape(kernel.movedim(1, -1).shape).movedim(-1, 1)
                kernel.mul_(1 - group["lr"] * group["weight_decay"])
                kernel.add_(step, alpha=-group["lr"] * ADAMS_SIZE * math.sqrt(high))

    def _mean(self, kernel: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """The mean gradient with Nesterov's momentum."""
        state = self.state[kernel]
        if not state:
            state |= {"mean": torch.zeros_like(kernel), "step": torch.tensor(0.0)}  # AdamW's loader wants a step
        mean = state["mean"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices `[B, M, N]`, M <= N, with all but tiny singular values moved close to 1, to between 0.7 and 1.2.

    These are five iterations of Newton and Schulz, x <- (a + b x x^T + c (x x^T)^2) x, with Jordan's coefficients a, b
    and c. They multiply matrices `[M, M]` only: x x^T is updated by itself, and the product of all factors is applied
    to x once.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = factor = _factor(gram)
    for _ in range(4):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ x


def _factor(gram: Tensor) -> Tensor:
    """The factor by which an iteration multiplies x, given x x^T."""
    factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
    return factor


def muon(groups: list[dict[str, Any]], device: torch.device) -> AdamW:
    """Muon for the groups' kernels with more than `FEW` input and output channels; AdamW for all other parameters."""
    split = []
    for group in groups:
        hidden = [p for p in group["params"] if "kernels" in group and min(p.shape[:2]) > FEW]
        moved = {id(p) for p in hidden}
        others = [p for p in group["params"] if id(p) not in moved]
        split += [{**group, "params": hidden, "momentum": 0.95}, {**group, "params": others}]
    return adamw([group for group in split if group["params"]], device, Muon)


def adamw(groups: list[dict[str, Any]], device: torch.device, kind: type[AdamW] = AdamW) -> AdamW:
    """AdamW (0.9, 0.999); the training loop sets the rate at every step, multiplied by a group's `lr_scale`."""
    groups = [{"lr_scale": 1.0, **group} for group in groups]
    return kind(groups, lr=1e-3, fused=device.type in ("cpu", "cuda"))


OPTIMIZERS = {"muon": muon, "adamw": adamw}
