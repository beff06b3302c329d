"""Likelihoods: what the decoder's output says about pixels, as log p(x|z) in nats per example.

Each owns its pixel map: what the encoder reads, and how its parameters become a picture again. Parameters come as
`[B, P*C, H, W]`, parameter-major, for pictures x in [0, 1], `[B, C, H, W]`; losses keep the batch axis.

B batch, C channels, H W pixels, P parameters per channel.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vqvae.errors import UserError


class MSE(nn.Module):
    """Gaussian of fixed variance: log N(x; mean, variance I), a density in nats on pixels in [0, 1].

    With the default variance, half that of the training data, -log p per dimension is MSE / data variance and a
    constant: Sonnet's objective exactly.

    variance   in squared [0, 1] pixels; 0 for half the training data's variance.
    pixels     centred: nets see and predict x - 0.5; symmetric: 2x - 1.
    """

    discrete = False
    params_per_channel = 1

    def __init__(
        self,
        *,
        image_shape: tuple,
        data_variance: float,
        variance: float = 0.0,
        pixels: Literal["centred", "symmetric"] = "centred",
    ):
        super().__init__()
        if not (variance >= 0 and math.isfinite(variance)):
            raise UserError(f"--likelihood mse: variance={variance} must be a number from 0 up")
        self.variance = variance or data_variance / 2
        self.scale = {"centred": 1.0, "symmetric": 2.0}[pixels]
        self.floor = math.prod(image_shape) / 2 * math.log(2 * math.pi * self.variance)

    def network_input(self, x: Tensor) -> Tensor:
        return (x - 0.5) * self.scale

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        error = (params / self.scale + 0.5 - x).square().flatten(1).sum(1)
        return -error / (2 * self.variance) - self.floor

    def mean(self, params: Tensor) -> Tensor:
        return (params / self.scale + 0.5).clamp(0, 1)

    def sample(self, params: Tensor) -> Tensor:
        mean = params / self.scale + 0.5
        return mean + self.variance**0.5 * torch.randn_like(mean)


LIKELIHOODS = {
    "mse": MSE,
}
