"""Vector quantisation with a codebook that moves as one: random vectors under a learnt linear map.

D code dimension, K codes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vqvae import ranks
from vqvae.bottlenecks.codebook import standardise, vectors_of
from vqvae.bottlenecks.vq import Nearest


class SimVQ(Nearest):
    """Nearest code in a table C W of frozen random vectors C and a learnt matrix W (2411.02038, section 4).

    Every code's gradient moves W and with it all codes, so that none is left behind and dies. C is drawn from
    N(0, 1/D). Loss: beta * mean (f - sg e)^2 + mean (sg f - e)^2. W starts such that the table has the covariance of
    the first features, which are standardised: drawn at random, it would give nearly all of them one code.

    num_codes, code_dim   K and D; code_dim is also what the decoder reads.
    beta                  commitment: how hard the encoder is pulled to its codes.
    gradient              from z to f: straight-through or rotation, as for vq.
    """

    name = "simvq"

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int = 512,
        code_dim: int = 64,
        beta: float = 0.25,
        gradient: Literal["straight-through", "rotation"] = "straight-through",
    ):
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, beta=beta, gradient=gradient
        )
        self.register_buffer("frozen", torch.randn(num_codes, code_dim) / code_dim**0.5)
        self.mapping = nn.Linear(code_dim, code_dim, bias=False)

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        """Lay the table over features `[B, channels, h, w]`."""
        standardise(self.projection, features)
        covariance = torch.cov(ranks.gather_rows(vectors_of(self.projection(features))).T).double().cpu()
        variances, axes = torch.linalg.eigh(covariance)
        root = axes * variances.clamp(min=0).sqrt() @ axes.T
        self.mapping.weight.copy_(root * self.code_dim**0.5)

    def code_vectors(self) -> Tensor:
        return self.mapping(self.frozen)
