"""Autoregressive flows: invertible maps with a triangular or block triangular Jacobian.

B batch, d dimensions; L latents, K codes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedLinear(nn.Linear):
    """A linear layer whose weights are multiplied by a fixed mask `[out, in]` of zeros and ones."""

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """Masked autoencoder for distribution estimation (1502.03509): x `[B, d]` to `[B, outputs, d]`.

    Entry i of every output depends only on the inputs before i (after i with `reverse`). Inputs have degrees 1..d,
    and hidden units cycle through 1..d - 1. A hidden weight leads to a unit of the same or a greater degree, an output
    weight only to a greater one.
    """

    def __init__(self, dimensions: int, hidden: int, *, layers: int = 2, outputs: int = 2, reverse: bool = False):
        super().__init__()
        self.dimensions, self.outputs = dimensions, outputs
        inputs = torch.arange(1, dimensions + 1)
        inputs = inputs.flip(0) if reverse else inputs
        # at d = 1 hidden units have degree 1, like the only output, and are not connected to it
        hidden_degrees = torch.arange(hidden) % max(dimensions - 1, 1) + 1
        degrees = [inputs] + [hidden_degrees] * layers
        net: list[nn.Module] = []
        for before, after in itertools.pairwise(degrees):
            net += [MaskedLinear(after[:, None] >= before), nn.ReLU()]
        last = MaskedLinear(inputs.repeat(outputs)[:, None] > degrees[-1])
        nn.init.zeros_(last.bias)
        last.weight.data.mul_(0.01)  # outputs start near 0, so that a flow starts near the identity
        self.net = nn.Sequential(*net, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(len(x), self.outputs, self.dimensions)


class AutoregressiveFlow(nn.Module):
    """eps = z * s(z) + mu(z), where s_i and mu_i are functions of z_<i (1705.07057, section 3).

    A scaled tanh keeps log s in (-4, 4).
    """

    def __init__(self, dimensions: int, hidden: int, *, layers: int = 2, reverse: bool = False):
        super().__init__()
        self.made = MADE(dimensions, hidden, layers=layers, reverse=reverse)
        self.order = range(dimensions - 1, -1, -1) if reverse else range(dimensions)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z `[B, d]` to eps `[B, d]` and log |d eps / d z| = sum_i log s_i, `[B]`."""
        mean, log_scale = self._shift_and_log_scale(z)
        return z * log_scale.exp() + mean, log_scale.sum(1)

    def inverse(self, eps: Tensor) -> Tensor:
        """eps `[B, d]` to z `[B, d]`, coordinate by coordinate."""
        z = torch.zeros_like(eps)
        for i in self.order:
            mean, log_scale = self._shift_and_log_scale(z)
            z = z.clone()
            z[:, i] = (eps[:, i] - mean[:, i]) * (-log_scale[:, i]).exp()
        return z

    def _shift_and_log_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.made(z).unbind(1)
        return mean, 4 * torch.tanh(log_scale / 4)


class Stack(nn.Module):
    """Autoregressive flows in sequence, every second one in reverse order of the coordinates."""

    def __init__(self, dimensions: int, hidden: int, *, flows: int, layers: int = 2):
        super().__init__()
        stacked = nn.ModuleList(
            AutoregressiveFlow(dimensions, hidden, layers=layers, reverse=i % 2 == 1) for i in range(flows)
        )
        self.flows = cast(Sequence[AutoregressiveFlow], stacked)  # ModuleList has no type parameter

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z `[B, d]` to eps `[B, d]` and log |d eps / d z|, `[B]`."""
        total = z.new_zeros(len(z))
        for flow in self.flows:
            z, log_det = flow(z)
            total = total + log_det
        return z, total

    def inverse(self, eps: Tensor) -> Tensor:
        """eps `[B, d]` to z `[B, d]`."""
        for flow in reversed(self.flows):
            eps = flow.inverse(eps)
        return eps


class SimplexFlow(nn.Module):
    """An inverse autoregressive flow on points of the simplex, w `[B, L, K]`: w'_k = w_k s_k / n, n = sum_k w_k s_k.

    The scales of a latent are s = 1 + softplus(u) - log 2, `[B, L, K - 1]`, where u is a function of the latents before
    it; the last code's scale is 1. At u = 0, where the flow starts, s = 1.

    log |dw'/dw| on the K - 1 free coordinates of a latent is sum_k log s_k - K log n, because the flow is a projective
    map of the simplex. The Jacobian is block triangular, so that the latents' terms add up. Corners of the simplex are
    fixed points.

    With `parameters="transformer"`, u is the output of a causal Transformer on the latents shifted by one, times a
    learned scalar that starts at 0. With "triangular", u = T w, where T `[L, L]` is strictly lower triangular and
    starts at 0.
    """

    future: Tensor  # [L, L] additive attention mask, of the Transformer only

    def __init__(
        self,
        latents: int,
        num_codes: int,
        *,
        parameters: Literal["transformer", "triangular"],
        width: int = 32,
        layers: int = 2,
    ):
        super().__init__()
        self.by_transformer = parameters == "transformer"
        if self.by_transformer:
            self.read, self.write = nn.Linear(num_codes, width), nn.Linear(width, num_codes - 1)
            self.positions = nn.Parameter(0.02 * torch.randn(latents, width))
            layer = nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.gate = nn.Parameter(torch.zeros(()))
            future = torch.full((latents, latents), -math.inf).triu(1)
            self.register_buffer("future", future, persistent=False)
        else:
            self.weight = nn.Parameter(torch.zeros(latents, latents))

    def scales(self, w: Tensor) -> Tensor:
        """s `[B, L, K - 1]`."""
        if self.by_transformer:
            shifted = F.pad(w, (0, 0, 1, 0))[:, :-1]
            # without is_causal, torch compares the mask with a causal one, which synchronizes with the GPU
            h = self.layers(self.read(shifted) + self.positions, mask=self.future, is_causal=True)
            u = self.gate * self.write(h)
        else:
            u = torch.einsum("lj,bjk->blk", self.weight.tril(-1), w[..., :-1])
        return F.softplus(u) + math.log(math.e / 2)  # 1 - log 2

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """w' `[B, L, K]` and log |dw'/dw|, `[B]`."""
        log_s = F.pad(self.scales(w).log(), (0, 1))
        scaled = w * log_s.exp()
        total = scaled.sum(-1, keepdim=True)
        log_det = log_s.sum(-1) - w.shape[-1] * total.squeeze(-1).log()
        return scaled / total, log_det.sum(-1)
