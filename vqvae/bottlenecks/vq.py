"""Vector quantisation: every feature vector becomes the nearest entry of a codebook.

B batch, D code dimension, h w code grid, K codes, N = B h w vectors.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.bottlenecks.codebook import (
    code_usage,
    first_codebook,
    kmeans_codebook,
    nearest_code,
    straight_through,
)
from vqvae.errors import UserError
from vqvae.latent import Latent


class VQ(nn.Module):
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
        for name, value, low, high in [
            ("num_codes", num_codes, 1, 2**31),
            ("code_dim", code_dim, 1, 2**31),
            ("beta", beta, 0, float("inf")),
            ("decay", decay, 0, 1 - 1e-9),
            ("epsilon", epsilon, 0, float("inf")),
            ("revive", revive, 0, 1),
            ("weight", weight, 0, float("inf")),
        ]:
            if not low <= value <= high:
                raise UserError(f"--bottleneck vq: {name}={value} is out of range, it must be from {low} to {high:.9g}")
        if not projection and channels != code_dim:
            raise UserError(
                f"--bottleneck vq projection=no: code_dim={code_dim} must equal the nets' {channels} feature channels"
            )
        self.num_codes, self.code_dim, self.grid = num_codes, code_dim, grid
        self.beta, self.decay, self.epsilon, self.init = beta, decay, epsilon, init
        self.revive, self.weight, self.learns_by_ema = revive, weight, codebook == "ema"
        self.projection = nn.Conv2d(channels, code_dim, 1) if projection else nn.Identity()

        first = first_codebook(init, num_codes, code_dim)
        if self.learns_by_ema:
            self.register_buffer("codebook", first)
            self.register_buffer("totals", torch.zeros(num_codes, code_dim))  # m, before debiasing
        else:
            self.codebook = nn.Parameter(first)
        self.register_buffer("counts", torch.zeros(num_codes))  # N, before debiasing
        self.register_buffer("debias", torch.zeros(()))  # 1 - decay^t after t updates

    def prior_context(self) -> dict:
        return {"num_codes": self.num_codes, "grid": self.grid}

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        """Fit the first codebook to features `[B, channels, h, w]`, where `init` asks for it."""
        if self.init == "kmeans":
            self.codebook.copy_(kmeans_codebook(self._flat(self.projection(features)), self.num_codes))

    def embed(self, codes: Tensor) -> Tensor:
        """The code vectors `[B, D, h, w]` of indices `[B, h, w]`."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    def forward(self, features: Tensor, step: int) -> Latent:
        f = self.projection(features)  # [B, D, h, w]
        codes = nearest_code(self._flat(f), self.codebook).view(len(f), *f.shape[2:])  # [B, h, w]
        e = self.embed(codes)
        commitment = F.mse_loss(f, e.detach())
        loss = self.beta * commitment
        if not self.learns_by_ema:
            loss = loss + F.mse_loss(e, f.detach())
        z = straight_through(f, e)
        if self.training:
            self._learn(self._flat(f.detach()), codes.flatten())
        zero = torch.zeros(len(f), device=f.device)
        return Latent(z, codes, log_q=zero, loss=self.weight * loss, stats={"commitment": commitment.detach()})

    def _flat(self, f: Tensor) -> Tensor:
        return f.permute(0, 2, 3, 1).reshape(-1, self.code_dim)  # [N, D]

    @torch.no_grad()
    def _learn(self, f: Tensor, codes: Tensor) -> None:
        """Move the running counts, and with codebook=ema the codes, towards the batch; then revive dead codes."""
        n = code_usage(codes, self.num_codes)
        self.counts.lerp_(n, 1 - self.decay)
        self.debias.lerp_(torch.ones_like(self.debias), 1 - self.decay)
        if self.learns_by_ema:
            sums = torch.zeros_like(self.totals).index_add_(0, codes, f)
            self.totals.lerp_(sums, 1 - self.decay)
            total = self.counts.sum()
            smoothed = (self.counts + self.epsilon * self.debias) / (
                total + self.num_codes * self.epsilon * self.debias
            )
            means = self.totals / (smoothed * total).unsqueeze(1)
            # a code that no vector has ever used keeps its value: debiasing alone would make it the origin
            self.codebook.copy_(torch.where((self.counts > 0).unsqueeze(1), means, self.codebook))
        if self.revive:
            self._revive(f)

    def _revive(self, f: Tensor) -> None:
        average = self.counts.sum() / self.num_codes
        # a code is judged only once the running counts rest on enough batches (23 with a decay of 0.99)
        dead = (self.counts < self.revive * average) & (self.debias > 0.2)  # [K]
        replacement = f[torch.randint(len(f), (self.num_codes,), device=f.device)]  # [K, D]
        self.codebook.copy_(torch.where(dead.unsqueeze(1), replacement, self.codebook))
        # count and mean start afresh too, else the next update would drag the code back; the small count lets the
        # code follow its first vectors quickly, and lets it move again soon if none comes
        fresh = 2 * self.revive * average
        self.counts.copy_(torch.where(dead, fresh, self.counts))
        if self.learns_by_ema:
            self.totals.copy_(torch.where(dead.unsqueeze(1), replacement * fresh, self.totals))
