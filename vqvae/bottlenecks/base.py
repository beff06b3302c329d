"""Parts that several bottlenecks share: options, the projection, fixed codes, entropy.

B batch, h w feature grid, N = B h w vectors, D code dimension, K codes.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from vqvae import distributed
from vqvae.contracts import Discrete
from vqvae.registry import Count, Options, Range


@dataclass(frozen=True, kw_only=True)
class CodeOptions(Options):
    """Options of every bottleneck with a table of code vectors."""

    num_codes: Annotated[Count, "codebook size K"] = 512
    code_dim: Annotated[Count, "code dimension D"] = 64
    beta: Annotated[float, Range(0), "weight of the commitment loss"] = 0.25


class Projection(nn.Conv2d):
    """1x1 convolution from the nets' features `[B, channels, h, w]` to the vectors to quantize, `[B, D, h, w]`."""

    bias: Tensor

    def __init__(self, channels: int, code_dim: int):
        super().__init__(channels, code_dim, 1)

    def start_as_sonnet(self) -> None:
        """Sonnet's first weights: a normal of std 1/sqrt(channels), truncated at two std; biases 0."""
        std = self.in_channels**-0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def standardize(self, features: Tensor, spread: float = 1.0) -> None:
        """Shift and rescale the output channels to mean 0 and deviation `spread` over features `[B, channels, h, w]`.

        Data-dependent initialization (1602.07868, section 3). The first features are small: without it, all vectors
        would get the fixed code nearest to the origin, which may pass no gradient to the encoder.
        """
        vectors = distributed.gather_rows(vectors_of(self(features)))
        std, mean = torch.std_mean(vectors, dim=0, correction=min(1, len(vectors) - 1))  # one vector varies by 0
        std = torch.where(std > 1e-6, std, 1.0)  # a channel that does not vary is only shifted
        self.weight.div_(std.view(-1, 1, 1, 1)).mul_(spread)
        self.bias.sub_(mean).div_(std).mul_(spread)


class FixedCodes(Discrete):
    """A bottleneck whose code vectors are a fixed function of the code. Features are standardized at the start."""

    projection: Projection
    places: Tensor  # [D], place value of each channel's digit in a code

    def vectors(self, codes: Tensor) -> Tensor:
        """The vectors `[..., D]` of codes `[...]`."""
        raise NotImplementedError

    def initialize(self, features: Tensor) -> None:
        self.projection.standardize(features)

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        return self.vectors(codes).movedim(-1, 1)

    def code_vectors(self) -> Tensor:
        return self.vectors(torch.arange(self.num_codes, device=self.places.device))


def vectors_of(features: Tensor) -> Tensor:
    """`[B, D, h, w]` as rows `[N, D]`."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions `[..., K]`. The gradient is finite even where a probability is 0."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(dim=-1)
