"""Autoregressive flows: invertible maps whose Jacobian is triangular.

B batch, d dimensions.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.errors import UserError


class MaskedLinear(nn.Linear):
    """A linear layer some of whose weights are held at zero by a fixed mask `[out, in]`."""

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """Masked autoencoder for distribution estimation (1502.03509): x `[B, d]` to `[B, outputs, d]`.

    Entry i of every output sees only the inputs before i in the ordering (after i, when `reverse`). Inputs have
    degrees 1..d, hidden units cycle through 1..d - 1; weights connect where the later degree is at least the earlier
    one, and greater at the output.
    """

    def __init__(self, dimensions: int, hidden: int, *, layers: int = 2, outputs: int = 2, reverse: bool = False):
        super().__init__()
        if hidden < 1 or layers < 1:
            raise UserError(f"MADE: hidden={hidden} and layers={layers} must be at least 1")
        self.dimensions, self.outputs = dimensions, outputs
        inputs = torch.arange(1, dimensions + 1)
        inputs = inputs.flip(0) if reverse else inputs
        # with d = 1 no hidden unit may see the input: degree 1 reaches no output, whose degree is 1 too
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
    """eps = z * s(z) + mu(z), with s_i and mu_i functions of z_<i (1705.07057, section 3).

    `forward` maps z `[B, d]` to eps and log |d eps / d z| = sum_i log s_i, `[B]`; `inverse` maps back, coordinate by
    coordinate. log s is kept in (-4, 4) by a scaled tanh.
    """

    def __init__(self, dimensions: int, hidden: int, *, layers: int = 2, reverse: bool = False):
        super().__init__()
        self.made = MADE(dimensions, hidden, layers=layers, reverse=reverse)
        self.order = range(dimensions - 1, -1, -1) if reverse else range(dimensions)

    def _shift_and_log_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.made(z).unbind(1)
        return mean, 4 * torch.tanh(log_scale / 4)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self._shift_and_log_scale(z)
        return z * log_scale.exp() + mean, log_scale.sum(1)

    def inverse(self, eps: Tensor) -> Tensor:
        z = torch.zeros_like(eps)
        for i in self.order:
            mean, log_scale = self._shift_and_log_scale(z)
            z = z.clone()
            z[:, i] = (eps[:, i] - mean[:, i]) * (-log_scale[:, i]).exp()
        return z


class Stack(nn.Module):
    """Flows one after the other, every second one in reverse order, so that each coordinate comes first somewhere."""

    def __init__(self, dimensions: int, hidden: int, *, flows: int, layers: int = 2):
        super().__init__()
        if flows < 1:
            raise UserError(f"flows={flows} must be at least 1")
        self.flows = nn.ModuleList(
            AutoregressiveFlow(dimensions, hidden, layers=layers, reverse=i % 2 == 1) for i in range(flows)
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        for flow in self.flows:
            z, log_det = flow(z)
            total = total + log_det
        return z, total

    def inverse(self, eps: Tensor) -> Tensor:
        for flow in reversed(self.flows):
            eps = flow.inverse(eps)
        return eps
