"""Priors over continuous latents.

B batch, D latent dimension, h w grid of the latent.
"""

import math
from typing import Annotated, Any

import torch
from torch import Tensor

from vqvae.contracts import Latent, Prior
from vqvae.flows import Stack
from vqvae.priors.base import check_count
from vqvae.registry import Range, checked
from vqvae.sampling import Sampling


def log_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I) in nats, `[B, ...]` to `[B]`."""
    return (-0.5 * (x.square() + math.log(2 * math.pi))).flatten(1).sum(1)


class Normal(Prior):
    """Standard normal, log p(z) = log N(z; 0, I): the prior of the VAE (1312.6114, appendix B)."""

    sampling_options = ("temperature",)

    def __init__(self, *, latent_dim: int, grid: tuple[int, int]):
        super().__init__(grid)
        self.latent_dim = latent_dim

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        """log p(z) in nats, `[B]`."""
        return log_normal(latent.need_z())

    def check_sampling(self, **options: Any) -> Sampling:
        return Sampling.of(options, self.sampling_options)

    def sample(self, n: int, *, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """Draw vectors `[n, D, h, w]`; `temperature` multiplies the standard deviation, so that 0 gives the mean."""
        shape = (check_count(n), self.latent_dim, *self.grid)
        device, dtype = self.anchor.device, self.anchor.dtype
        temperature = self.check_sampling(**options).temperature
        return temperature * torch.randn(shape, generator=generator, device=device, dtype=dtype)


class MadeFlow(Normal):
    """Autoregressive flow: a VAE with it has the prior of VLAE (1611.02731, section 3.2).

    eps = z * s(z) + mu(z) with (mu, s) from a MADE, so log p(z) = log N(eps; 0, I) + sum_i log s_i(z). Sampling
    inverts the flow coordinate by coordinate. VLAE's windowed autoregressive decoder is not implemented.
    """

    @checked
    def __init__(
        self,
        *,
        latent_dim: int,
        grid: tuple[int, int],
        flows: Annotated[int, Range(1), "flows, every second one in reverse order"] = 1,
        hidden: Annotated[int, Range(1), "units in each hidden layer of a MADE"] = 512,
        layers: Annotated[int, Range(1), "hidden layers of a MADE"] = 2,
    ):
        super().__init__(latent_dim=latent_dim, grid=grid)
        self.flow = Stack(latent_dim * math.prod(grid), hidden, flows=flows, layers=layers)

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        """log p(z) in nats, `[B]`."""
        eps, log_det = self.flow(latent.need_z().to(self.anchor.dtype).flatten(1))
        return log_normal(eps) + log_det

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """Draw vectors `[n, D, h, w]`.

        `temperature` multiplies the standard deviation of eps; with 0 and one flow, each coordinate is the likeliest
        one given those before it.
        """
        eps = super().sample(n, generator=generator, **options)
        return self.flow.inverse(eps.flatten(1)).view_as(eps)
