"""Priors over continuous latents.

B batch, D latent dimension.
"""

import math

import torch
from torch import Tensor, nn

from vqvae.flows import Stack
from vqvae.latent import Latent


def log_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I) in nats, `[B, ...]` to `[B]`."""
    return (-0.5 * (x.square() + math.log(2 * math.pi))).flatten(1).sum(1)


class Normal(nn.Module):
    """Standard normal, log p(z) = log N(z; 0, I): the prior of the VAE (1312.6114, appendix B)."""

    def __init__(self, *, latent_dim: int, grid: tuple):
        super().__init__()
        self.latent_dim, self.grid = latent_dim, tuple(grid)
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # where the samples are wanted

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        return log_normal(latent.z)

    def sample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        like = {"device": self.anchor.device, "dtype": self.anchor.dtype}
        return temperature * torch.randn(n, self.latent_dim, *self.grid, generator=generator, **like)


class MadeFlow(Normal):
    """Autoregressive flow: a VAE with it has the prior half of VLAE (1611.02731, section 3.2).

    eps = z * s(z) + mu(z) with (mu, s) from a MADE, so log p(z) = log N(eps; 0, I) + sum log s_i(z). Sampling inverts
    it coordinate by coordinate from one eps. (The paper's VLAE has a windowed autoregressive decoder besides.)

    flows    how many flows, every second one in reverse order.
    hidden   width of the MADE's hidden layers.
    layers   how many hidden layers.
    """

    def __init__(self, *, latent_dim: int, grid: tuple, flows: int = 1, hidden: int = 512, layers: int = 2):
        super().__init__(latent_dim=latent_dim, grid=grid)
        self.flow = Stack(latent_dim * math.prod(grid), hidden, flows=flows, layers=layers)

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        eps, log_det = self.flow(latent.z.flatten(1))
        return log_normal(eps) + log_det

    @torch.no_grad()
    def sample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        eps = super().sample(n, temperature=temperature, generator=generator)
        return self.flow.inverse(eps.flatten(1)).view_as(eps)
