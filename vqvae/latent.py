"""What a bottleneck hands on: the one value that bottlenecks make and priors and decoders read.

B batch, D code dimension, h w code grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Latent(NamedTuple):
    """A draw from the posterior q(z|x) of a batch.

    Flat latents are 1x1 grids, so that every net, prior and figure sees one shape.
    """

    z: Tensor | None  # [B, D, h, w], what the decoder reads; None in stage two, which knows codes alone
    codes: Tensor | None  # [B, h, w] int64, indices into the codebook; None for continuous latents
    log_q: Tensor  # [B] nats, log q(z|x) of this draw; 0 where the posterior is a point of a discrete set
    loss: Tensor  # scalar, training only: commitment, codebook, diversity ...
    stats: dict[str, Tensor]  # detached scalars worth watching, by name
    mean: Tensor | None = None  # [B, D, h, w], the mean of q(z|x), of continuous latents

    @classmethod
    def of_codes(cls, codes: Tensor) -> "Latent":
        """A latent known by its codes alone (`[B, h, w]` int64), as stage two trains on."""
        zero = torch.zeros(len(codes), device=codes.device)
        return cls(z=None, codes=codes, log_q=zero, loss=zero.new_zeros(()), stats={})
