"""Vector quantisation: every feature vector becomes the nearest entry of a codebook.

B batch, D code dimension, h w code grid, K codes, N = B h w vectors.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.bottlenecks.codebook import Codebook, Discrete, check_options, straight_through, vectors_of
from vqvae.errors import UserError
from vqvae.latent import Latent


class VQ(Discrete):
    """Vector quantisation with a codebook that learns by EMA or by gradient (1711.00937, eq. 1-3 and appendix A.1).

    z = e_k with k = argmin_j ||f - e_j||, f the projected feature vector; the gradient passes straight through.
    Loss: weight * (beta * mean (f - sg e)^2), and with codebook=gradient also + weight * mean (sg f - e)^2.

    num_codes, code_dim   K and D; code_dim is also what the decoder reads.
    beta                  commitment: how hard the encoder is pulled to its codes.
    codebook              ema: e_k = m_k / N_k, running means over the vectors assigned to k (Sonnet's
                          VectorQuantizerEMA, both zero-debiased); gradient: learnt by the optimiser.
    decay, epsilon        of the running means: N <- decay N + (1 - decay) n; Laplace smoothing of the counts.
    init                  kmeans: k-means++ on the first batches' features; uniform: in ±1/K; fan-in: uniform
                          in ±sqrt(3/D), Sonnet's; normal: N(0, 1).
    revive                a code used less than this share of the average code is dead: it moves onto a vector
                          of the batch, its running mean and count with it. 0 never revives.
    weight                factor on the whole loss (10 in deep-vector-quantization).
    projection            1x1 convolution from the features to code_dim; without it the widths must agree.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int = 512,
        code_dim: int = 64,
        beta: float = 0.25,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Literal["kmeans", "uniform", "fan-in", "normal"] = "kmeans",
        revive: float = 0.03,
        weight: float = 1.0,
        projection: bool = True,
    ):
        super().__init__()
        check_options(
            "vq",
            num_codes=(num_codes, 1, 2**31),
            code_dim=(code_dim, 1, 2**31),
            beta=(beta, 0, math.inf),
            decay=(decay, 0, 1 - 1e-9),
            epsilon=(epsilon, 0, math.inf),
            revive=(revive, 0, 1),
            weight=(weight, 0, math.inf),
        )
        if not projection and channels != code_dim:
            raise UserError(
                f"--bottleneck vq projection=no: code_dim={code_dim} must equal the nets' {channels} feature channels"
            )
        self.num_codes, self.code_dim, self.grid = num_codes, code_dim, tuple(grid)
        self.beta, self.weight = beta, weight
        self.projection = nn.Conv2d(channels, code_dim, 1) if projection else nn.Identity()
        self.codebook = Codebook(
            num_codes, code_dim, learns=codebook, decay=decay, epsilon=epsilon, init=init, revive=revive
        )

    def initialise(self, features: Tensor) -> None:
        """Fit the first codebook to features `[B, channels, h, w]`, where `init` asks for it."""
        with torch.no_grad():
            self.codebook.initialise(vectors_of(self.projection(features)))

    def embed(self, codes: Tensor) -> Tensor:
        return self.codebook.embed(codes)

    def code_vectors(self) -> Tensor:
        return self.codebook.table()

    def forward(self, features: Tensor, step: int) -> Latent:
        f = self.projection(features)  # [B, D, h, w]
        rows = vectors_of(f.detach())
        codes = self.codebook.nearest(rows)
        e = self.embed(codes.view(len(f), *f.shape[2:]))
        commitment = F.mse_loss(f, e.detach())
        loss = self.beta * commitment
        if not self.codebook.learns_by_ema:
            loss = loss + F.mse_loss(e, f.detach())
        z = straight_through(f, e)
        if self.training:
            self.codebook.learn(rows, codes)
        return Latent(
            z,
            codes.view(len(f), *f.shape[2:]),
            log_q=torch.zeros(len(f), device=f.device),
            loss=self.weight * loss,
            stats={"commitment": commitment.detach()},
        )
