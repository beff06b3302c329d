"""Finite scalar quantization: a few channels, each rounded to a few levels.

B batch, h w code grid, D channels, K codes.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from vqvae.bottlenecks.base import FixedCodes, Projection
from vqvae.bottlenecks.gradients import straight_through
from vqvae.contracts import Latent
from vqvae.registry import Passes, checked, whole_numbers


def valid_levels(levels: str) -> bool:
    return min(whole_numbers(levels)) >= 2 and math.prod(whole_numbers(levels)) < 2**31


class FSQ(FixedCodes):
    """Finite scalar quantization (2309.15505, section 3.1 and appendix A.1): no codebook, no loss.

    Each channel is bounded by a tanh to L levels and rounded, straight through; z is the level scaled to [-1, 1].
    A code is a number whose digits are the channels' levels, the first channel the least significant. The projection
    starts such that the first features spread over the levels.

    levels=8,6,5 gives K = 240 codes of D = 3 channels, 8,5,5,5 gives 1,000 and 7,5,5,5,5 gives 4,375. Section 4.1
    advises five levels or more per channel.
    """

    levels: Tensor  # [D]

    @checked
    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, int],
        levels: Annotated[
            str,
            Passes(valid_levels, "whole numbers from 2 up, separated by commas, with a product below 2^31"),
            "levels of each channel",
        ] = "8,8,8",
    ):
        super().__init__()
        sizes = whole_numbers(levels)
        self.num_codes, self.code_dim, self.grid = math.prod(sizes), len(sizes), grid
        self.projection = Projection(channels, len(sizes))
        places = [math.prod(sizes[:i]) for i in range(len(sizes))]
        self.register_buffer("levels", torch.tensor(sizes), persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def bounded(self, f: Tensor) -> Tensor:
        """f `[..., D]` bounded so that it rounds to -(L // 2) ... (L - 1) // 2, and to 0 at 0."""
        half = (self.levels - 1) * (1 + 1e-3) / 2  # a little wider, so that the outermost levels can be reached
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        # no shift with two levels: it would put 0 on the flat end of the tanh, and the lower level out of reach
        shift = torch.where(self.levels > 2, torch.atanh(offset / half), 0.0)
        return torch.tanh(f + shift) * half - offset

    def vectors(self, codes: Tensor) -> Tensor:
        half = self.levels // 2
        return (codes.unsqueeze(-1) // self.places % self.levels - half) / half

    def quantize(self, features: Tensor) -> Latent:
        bounded = self.bounded(self.projection(features).movedim(1, -1))  # [B, h, w, D]
        rounded = bounded.detach().round()
        half = self.levels // 2
        codes = ((rounded.long() + half) * self.places).sum(-1)
        z = straight_through(bounded, rounded) / half
        return Latent.of_codes(codes, z.movedim(-1, 1), loss=z.new_zeros(()))

    def forward(self, features: Tensor, step: int) -> Latent:
        return self.quantize(features)
