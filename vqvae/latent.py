"""What a bottleneck hands on: the one value that bottlenecks make and priors and decoders read.

B batch, S samples, D code dimension, K codes, h w code grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Latent(NamedTuple):
    """A draw from the posterior q(z|x) of a batch; in training of some bottlenecks S draws, S leading: `[S*B, ...]`.

    Flat latents are 1x1 grids, so that every net, prior and figure sees one shape.
    """

    z: Tensor | None  # [S*B, D, h, w], what the decoder reads; None in stage two, which knows codes alone
    codes: Tensor | None  # [S*B, h, w] int64, indices into the codebook; None for continuous latents
    log_q: Tensor  # [S*B] nats, log q(z|x) of this draw; 0 where the posterior is a point of a discrete set
    loss: Tensor  # scalar, training only: commitment, codebook, diversity ...
    stats: dict[str, Tensor]  # detached scalars worth watching, by name
    # [S*B, K, h, w] points of the simplex that stand for the codes while a relaxed bottleneck trains
    assignments: Tensor | None = None

    @classmethod
    def of_codes(cls, codes: Tensor) -> "Latent":
        """A latent known by its codes alone (`[B, h, w]` int64), as stage two trains on."""
        zero = torch.zeros(len(codes), device=codes.device)
        return cls(z=None, codes=codes, log_q=zero, loss=zero.new_zeros(()), stats={})

    def detached(self) -> "Latent":
        """The same for a prior that must not pull the encoder towards itself."""
        return self if self.assignments is None else self._replace(assignments=self.assignments.detach())
