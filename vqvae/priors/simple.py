"""Priors that treat every code alike.

B batch, h w code grid, K codes.
"""

import math

import torch
from torch import Tensor, nn

from vqvae.latent import Latent


class Uniform(nn.Module):
    """Every code equally likely, log p = -h w log K: what codes cost when nothing is known of them."""

    def __init__(self, *, num_codes: int, grid: tuple):
        super().__init__()
        self.num_codes, self.grid = num_codes, tuple(grid)

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        nats = -math.log(self.num_codes) * math.prod(self.grid)
        return torch.full((len(latent.codes),), nats, device=latent.codes.device)

    def sample(self, n: int, *, generator: torch.Generator | None = None, **options) -> Tensor:
        device = generator.device if generator else None
        return torch.randint(self.num_codes, (n, *self.grid), generator=generator, device=device)
