"""Stochastic quantization: the Gaussian SQ-VAE (2205.07547) with one learned variance.

B batch, h w code grid, D code dimension, K codes.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.bottlenecks.base import Projection, vectors_of
from vqvae.bottlenecks.categorical import drawn_latent, entropy_of, gumbel_softmax
from vqvae.bottlenecks.nearest import nearest_code
from vqvae.contracts import Discrete, Latent
from vqvae.devices import linear
from vqvae.registry import Count, Range, checked


class Stochastic(Discrete):
    """Gaussian SQ-VAE (2205.07547, "I"; github.com/sony/sqvae): codes near the features are likely.

    The features f are the mean of a continuous latent y with q(y|x) = N(f, s I), and codes generate it as
    p(y|k) = N(e_k, s I). Bayes' rule with equally likely codes gives q(k|x) = softmax_k(-||f - e_k||^2 / 2s). The
    variance s is learned, as are the codes, by the bound only: there is no commitment loss, no EMA and no revival.
    s falls during training ("self-annealing"), and the posterior sharpens until it is nearly one code.

    In training z = w E with relaxed draws w = softmax((log q + Gumbel noise) / temperature). log q is that of the pair
    (k, y) against p(y|k): its mean over k, sum_k q_k log q_k, plus KL(q(y|x) || p(y|z)) = ||f - z||^2 / 2s. In
    evaluation k is one hard draw and log q that of the draw. The decoder does not see y, so that the bound without it
    is exact, and tighter. `quantize` takes the nearest code.

    s is 1 + a learned positive number, as published. Features and codes may grow instead of s falling below 1.
    Features with D channels are not projected, as published. Others are projected by a 1x1 convolution that starts
    such that the first vectors have variance 1, as the first codes do.
    """

    stochastic = relaxed = True

    @checked
    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, int],
        num_codes: Annotated[int, Range(2, 2**31 - 1), "codebook size K"] = 512,
        code_dim: Annotated[Count, "code dimension D"] = 64,
        variance: Annotated[float, Range(above=1, high=1e6), "s at the start (published: 11, for CIFAR-10 21)"] = 11.0,
        anneal: Annotated[float, Range(0, 1), "the temperature of a step is exp(-anneal * step)"] = 1e-5,
    ):
        super().__init__()
        self.num_codes, self.code_dim, self.grid, self.anneal = num_codes, code_dim, grid, anneal
        self.projection: nn.Module = nn.Identity() if channels == code_dim else Projection(channels, code_dim)
        self.start_vectors = self.start_vectors if isinstance(self.projection, Projection) else 0
        self.vectors = nn.Parameter(torch.randn(num_codes, code_dim))
        self.log_variance = nn.Parameter(torch.tensor(math.log(variance - 1)))

    def initialize(self, features: Tensor) -> None:
        if isinstance(self.projection, Projection):
            self.projection.standardize(features)

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        return F.embedding(codes, self.vectors).movedim(-1, 1)

    def code_vectors(self) -> Tensor:
        return self.vectors

    def variance(self) -> Tensor:
        """s, a scalar."""
        return 1 + self.log_variance.exp()

    def log_posterior(self, f: Tensor) -> Tensor:
        """log q(k|x) `[..., K]` of projected vectors `[..., D]`."""
        offset = self.vectors.detach().mean(0)  # distances are differences: far from 0 they would lose digits
        f, codes = f - offset, self.vectors - offset
        scaled = codes / self.variance()
        # without ||f||^2, which is the same for every k; divided by s before the product, which has many more rows
        return linear(f, scaled, -(codes * scaled).sum(1) / 2).log_softmax(-1)

    def quantize(self, features: Tensor) -> Latent:
        f = self.projection(features)
        codes = nearest_code(vectors_of(f), self.vectors).view(len(f), *f.shape[2:])
        return Latent.of_codes(codes, self.embed(codes))

    def forward(self, features: Tensor, step: int) -> Latent:
        f = self.projection(features).movedim(1, -1)  # [B, h, w, D]
        log_p = self.log_posterior(f)
        if not self.training:
            return drawn_latent(log_p, self.embed)
        w = gumbel_softmax(log_p, 1, math.exp(-self.anneal * step))[0].to(log_p.dtype)  # [B, h, w, K]
        z = linear(w, self.vectors.T)
        uncertainty = entropy_of(log_p).flatten(1).sum(1)
        divergence = (f - z).square().flatten(1).sum(1) / (2 * self.variance())
        return Latent(
            z.movedim(-1, 1),
            w.detach().argmax(-1),
            log_q=divergence - uncertainty,
            loss=z.new_zeros(()),
            stats={"posterior_entropy": uncertainty.detach().mean(), "variance": self.variance().detach()},
            assignments=w.movedim(-1, 1),
        )
