"""Vector quantisation on the unit sphere: the code of largest cosine similarity.

B batch, D code dimension, h w code grid, K codes.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vqvae.bottlenecks.vq import VQ


class CosineVQ(VQ):
    """Nearest code by angle, among few dimensions: features and codes have length 1 (2110.04627, section 3.2).

    There the nearest code is that of the largest dot product, and ||f - e||^2 = 2 - 2 cos(f, e). Losses and updates
    are those of vq on unit vectors; an EMA codebook holds the directions of its running means.

    num_codes, code_dim   K and D; that D be small keeps many codes in use.
    beta                  commitment: how hard the encoder is pulled to its codes.
    codebook              ema: the direction of the mean of the vectors assigned to k; gradient: learnt.
    decay, epsilon        of the running means, as for vq.
    init                  kmeans: k-means++ on the first batches' features; normal: uniform on the sphere.
    revive, weight        as for vq.
    gradient              straight-through or rotation, as for vq; between unit vectors nothing is scaled.
    diversity             as for vq; temperature of its softmax over distances that are at most 4.
    """

    name = "cosine"
    unit_norm = True

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int = 512,
        code_dim: int = 8,
        beta: float = 0.25,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Literal["kmeans", "normal"] = "kmeans",
        revive: float = 0.03,
        weight: float = 1.0,
        gradient: Literal["straight-through", "rotation"] = "straight-through",
        diversity: float = 0.0,
        temperature: float = 0.1,
    ):
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, beta=beta, codebook=codebook,
            decay=decay, epsilon=epsilon, init=init, revive=revive, weight=weight, gradient=gradient,
            diversity=diversity, temperature=temperature,
        )  # fmt: skip

    def project(self, features: Tensor) -> Tensor:
        return F.normalize(super().project(features), dim=1)
