"""Vector quantisation with a codebook that moves as one: frozen vectors under a learnt linear map.

D code dimension, K codes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vqvae import ranks
from vqvae.bottlenecks.codebook import kmeans_codebook, standardise, vectors_of
from vqvae.bottlenecks.vq import Nearest


class SimVQ(Nearest):
    """Nearest code in a table C W of frozen vectors C and a learnt matrix W (2411.02038, section 4).

    Every code's gradient moves W and with it all codes, so that none is left behind and dies. Loss:
    beta * mean (f - sg e)^2 + mean (sg f - e)^2. Features are standardised before the first step.

    num_codes, code_dim   K and D; code_dim is also what the decoder reads.
    beta                  commitment: how hard the encoder is pulled to its codes.
    gradient              from z to f: straight-through or rotation, as for vq.
    init                  kmeans: C W starts as the k-means centres of the first features; normal: C is drawn from
                          N(0, 1/D), as published, and C W starts with the features' covariance. Among many random
                          dimensions the few vectors nearest the origin are nearest to most features as well: with
                          code_dim=64 use starts at a perplexity of 8 of 512, and recovers slowly.
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
        init: Literal["kmeans", "normal"] = "kmeans",
    ):
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, beta=beta, gradient=gradient
        )
        self.init = init
        self.register_buffer("frozen", torch.randn(num_codes, code_dim) / code_dim**0.5)
        self.mapping = nn.Linear(code_dim, code_dim, bias=False)

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        """Lay the table over features `[B, channels, h, w]`."""
        standardise(self.projection, features)
        vectors, scale = vectors_of(self.projection(features)), self.code_dim**0.5
        if self.init == "kmeans":
            self.frozen.copy_(kmeans_codebook(vectors, self.num_codes) / scale)
            self.mapping.weight.copy_(scale * torch.eye(self.code_dim))
            return
        covariance = torch.cov(ranks.gather_rows(vectors).T).double().cpu()
        variances, axes = torch.linalg.eigh(covariance)
        self.mapping.weight.copy_(scale * axes * variances.clamp(min=0).sqrt() @ axes.T)

    def code_vectors(self) -> Tensor:
        return self.mapping(self.frozen)
