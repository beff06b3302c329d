"""The continuous bottleneck of a variational autoencoder.

B batch, D latent dimension.
"""

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from vqvae import shares
from vqvae.contracts import Continuous, Latent
from vqvae.errors import OptionError
from vqvae.registry import Count, checked


class Gaussian(Continuous):
    """Diagonal Gaussian posterior q(z|x) = N(mu, sigma^2), reparametrized (1312.6114, section 2.4 and appendix B).

    A linear map of the features gives mu and log sigma; z = mu + sigma * eps with eps ~ N(0, I), in evaluation too,
    because the bound needs a draw. log q is the density of that draw, so that any prior fits. `quantize` returns mu
    and its density.
    """

    stochastic = True

    @checked
    def __init__(self, *, channels: int, grid: tuple[int, int], latents: Annotated[Count, "latent dimensions D"] = 16):
        super().__init__()
        if grid != (1, 1):
            problem = f"takes one vector per image, and these nets give {grid[0]}x{grid[1]}; use conv-vae or mlp"
            raise OptionError("bottleneck", "gaussian", problem)
        self.code_dim, self.grid = latents, grid
        self.head = nn.Conv2d(channels, 2 * latents, 1)

    def posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma, each `[B, D, 1, 1]`, for features `[B, channels, 1, 1]`."""
        mean, log_std = self.head(features).chunk(2, dim=1)
        return mean, log_std.clamp(-8, 8)  # exp(2 * 8) is far from overflow in the KL term

    def quantize(self, features: Tensor) -> Latent:
        mean, log_std = self.posterior(features)
        return self._latent(mean, log_std, torch.zeros_like(mean))

    def forward(self, features: Tensor, step: int) -> Latent:
        mean, log_std = self.posterior(features)
        return self._latent(mean, log_std, shares.draw(torch.randn, mean.shape, device=mean.device, dtype=mean.dtype))

    def _latent(self, mean: Tensor, log_std: Tensor, noise: Tensor) -> Latent:
        z = mean + log_std.exp() * noise
        log_q = (-0.5 * (noise.square() + math.log(2 * math.pi)) - log_std).flatten(1).sum(1)  # [B]
        return Latent(z, None, log_q, loss=z.new_zeros(()), stats={})
