"""The continuous bottleneck of a variational autoencoder.

B batch, D latent dimension.
"""

import math

import torch
from torch import Tensor, nn

from vqvae.errors import UserError
from vqvae.latent import Latent


class Gaussian(nn.Module):
    """Diagonal Gaussian posterior q(z|x) = N(mu, sigma^2), reparametrised (1312.6114, section 2.4 and appendix B).

    A linear map of the features gives mu and log sigma; z = mu + sigma * eps with eps ~ N(0, I), also in evaluation,
    where the bound needs a draw; `mode` takes the mean. log q is of that draw, so that any prior can stand against it.

    latents   dimensions of z.
    """

    stochastic = True

    def __init__(self, *, channels: int, grid: tuple, latents: int = 16):
        super().__init__()
        if latents < 1:
            raise UserError(f"--bottleneck gaussian: latents={latents} must be at least 1")
        if tuple(grid) != (1, 1):
            raise UserError(
                f"--bottleneck gaussian: needs nets with one flat feature vector, such as --nets conv-vae or mlp; "
                f"these give a grid of {grid[0]}x{grid[1]}"
            )
        self.num_codes, self.code_dim, self.grid = None, latents, (1, 1)
        self.head = nn.Conv2d(channels, 2 * latents, 1)

    def prior_context(self) -> dict:
        return {"latent_dim": self.code_dim, "grid": self.grid}

    def posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma, each `[B, D, 1, 1]`."""
        mean, log_std = self.head(features).chunk(2, dim=1)
        return mean, log_std.clamp(-8, 8)  # exp(2 * 8) is still far from overflow in the KL term

    def mode(self, features: Tensor) -> Latent:
        """The posterior's mean and its density there, without noise."""
        mean, log_std = self.posterior(features)
        return self._latent(mean, log_std, torch.zeros_like(mean))

    def forward(self, features: Tensor, step: int) -> Latent:
        mean, log_std = self.posterior(features)
        return self._latent(mean, log_std, torch.randn_like(mean))

    def _latent(self, mean: Tensor, log_std: Tensor, noise: Tensor) -> Latent:
        z = mean + log_std.exp() * noise
        log_q = (-0.5 * (noise.square() + math.log(2 * math.pi)) - log_std).flatten(1).sum(1)  # [B]
        return Latent(z, None, log_q, loss=z.new_zeros(()), stats={})
