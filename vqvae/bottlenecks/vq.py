"""Vector quantisation: every feature vector becomes the nearest entry of a codebook.

B batch, D code dimension, h w code grid, K codes, N = B h w vectors.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.bottlenecks.codebook import (
    GRADIENTS,
    Codebook,
    Discrete,
    check_options,
    entropy,
    soft_usage,
    vectors_of,
)
from vqvae.bottlenecks.nearest import nearest_code
from vqvae.errors import UserError
from vqvae.latent import Latent


class Nearest(Discrete):
    """z = e_k with k = argmin_j ||f - e_j|| in a table that members give as `code_vectors`, and its losses.

    weight * (beta * mean (f - sg e)^2 + mean (sg f - e)^2 - diversity * H), where the second term is there if the
    table learns by gradient, and the third in training: H is the entropy of `soft_usage`.
    """

    name: str
    learns_by_gradient = True

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int,
        code_dim: int,
        beta: float,
        gradient: str,
        diversity: float = 0.0,
        temperature: float = 1.0,
        weight: float = 1.0,
        projection: bool = True,
    ):
        super().__init__()
        check_options(
            self.name,
            num_codes=(num_codes, 1, 2**31),
            code_dim=(code_dim, 1, 2**31),
            beta=(beta, 0, math.inf),
            diversity=(diversity, 0, math.inf),
            temperature=(temperature, 1e-6, math.inf),
            weight=(weight, 0, math.inf),
        )
        if not projection and channels != code_dim:
            raise UserError(
                f"--bottleneck {self.name} projection=no: code_dim={code_dim} must equal the nets' {channels} "
                "feature channels"
            )
        self.num_codes, self.code_dim, self.grid = num_codes, code_dim, tuple(grid)
        self.beta, self.weight = beta, weight
        self.diversity, self.temperature = diversity, temperature
        self.past = GRADIENTS[gradient]
        self.projection = nn.Conv2d(channels, code_dim, 1) if projection else nn.Identity()

    def project(self, features: Tensor) -> Tensor:
        """Features `[B, channels, h, w]` as the vectors `[B, D, h, w]` that are compared with the codes."""
        return self.projection(features)

    def learn(self, rows: Tensor, codes: Tensor) -> None:
        """What a table does beside the optimiser, given a batch's vectors `[N, D]` and codes `[N]`."""

    def embed(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.code_vectors()).movedim(-1, 1)

    def forward(self, features: Tensor, step: int) -> Latent:
        f, table = self.project(features), self.code_vectors()  # [B, D, h, w], [K, D]
        rows = vectors_of(f)
        nearest = nearest_code(rows, table)
        codes = nearest.view(len(f), *f.shape[2:])
        e = F.embedding(codes, table).movedim(-1, 1)
        commitment = F.mse_loss(f, e.detach())
        loss, stats = self.beta * commitment, {"commitment": commitment.detach()}
        if self.learns_by_gradient:
            loss = loss + F.mse_loss(e, f.detach())
        if self.training and self.diversity:
            # a copy, because the gradient needs the table as it is now, and `learn` may move it
            varied = entropy(soft_usage(rows, table.clone(), self.temperature))
            loss, stats = loss - self.diversity * varied, stats | {"usage_entropy": varied.detach()}
        z = self.past(f, e)
        if self.training:
            self.learn(rows.detach(), nearest)
        log_q = torch.zeros(len(f), device=f.device)
        return Latent(z, codes, log_q, loss=self.weight * loss, stats=stats)


class VQ(Nearest):
    """Vector quantisation with a codebook that learns by EMA or by gradient (1711.00937, eq. 1-3 and appendix A.1).

    z = e_k with k = argmin_j ||f - e_j||, f the projected feature vector; by default the gradient passes straight
    through. Loss: weight * (beta * mean (f - sg e)^2), and with codebook=gradient also + weight * mean (sg f - e)^2.

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
    gradient              from z to f: straight-through copies it; rotation turns and scales it as f is turned and
                          scaled onto e_k (the rotation trick, 2410.06424, section 4.2).
    diversity             subtracts diversity * H(mean_n softmax_k(-||f_n - e_k||^2 / temperature)) from the loss,
                          which spreads use over the codes (the second term of 2310.05737, eq. 5).
    temperature           of that softmax: small ones count the nearest codes alone.
    """

    name = "vq"
    unit_norm = False

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
        gradient: Literal["straight-through", "rotation"] = "straight-through",
        diversity: float = 0.0,
        temperature: float = 1.0,
    ):
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, beta=beta, gradient=gradient,
            diversity=diversity, temperature=temperature, weight=weight, projection=projection,
        )  # fmt: skip
        check_options(
            self.name,
            decay=(decay, 0, 1 - 1e-9),
            epsilon=(epsilon, 0, math.inf),
            revive=(revive, 0, 1),
        )
        self.learns_by_gradient = codebook == "gradient"
        self.codebook = Codebook(
            num_codes,
            code_dim,
            learns=codebook,
            decay=decay,
            epsilon=epsilon,
            init=init,
            revive=revive,
            unit_norm=self.unit_norm,
        )

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        """Fit the first codebook to features `[B, channels, h, w]`, where `init` asks for it."""
        self.codebook.initialise(vectors_of(self.project(features)))

    def code_vectors(self) -> Tensor:
        return self.codebook.table()

    def learn(self, rows: Tensor, codes: Tensor) -> None:
        self.codebook.learn(rows, codes)
