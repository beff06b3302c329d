"""Finite scalar quantisation: a few channels, each rounded to a few levels; the codebook is their grid.

B batch, h w code grid, D channels, K codes.
"""

import math

import torch
from torch import Tensor, nn

from vqvae.bottlenecks.codebook import Discrete, standardise, straight_through
from vqvae.errors import UserError
from vqvae.latent import Latent


class FSQ(Discrete):
    """Finite scalar quantisation (2309.15505, section 3.1 and appendix A.1): no codebook, no loss of its own.

    Each channel is bounded by a tanh to L levels and rounded, straight through; z is the level scaled to [-1, 1].
    A code is the channels' levels read as the digits of one number, those of the first channel counting ones. The
    projection starts such that the first features spread over the levels.

    levels   L of each channel, divided by commas: K is their product and D their number. 8,6,5 gives 240 codes,
             8,5,5,5 gives 1,000 and 7,5,5,5,5 gives 4,375 (section 4.1: five levels and more work best).
    """

    def __init__(self, *, channels: int, grid: tuple, levels: str = "8,8,8"):
        super().__init__()
        sizes = _parse(levels)
        self.num_codes, self.code_dim, self.grid = math.prod(sizes), len(sizes), tuple(grid)
        self.projection = nn.Conv2d(channels, len(sizes), 1)
        places = [math.prod(sizes[:i]) for i in range(len(sizes))]
        self.register_buffer("levels", torch.tensor(sizes), persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def bounded(self, f: Tensor) -> Tensor:
        """f `[..., D]` squeezed so that rounding gives -(L // 2) to (L - 1) // 2, and 0 for 0."""
        half = (self.levels - 1) * (1 + 1e-3) / 2  # a little wide, so that the outermost levels can be reached
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        # with two levels 0 would lie on the flat end of the tanh, and the lower level out of reach: no shift then
        shift = torch.where(self.levels > 2, torch.atanh(offset / half), 0.0)
        return torch.tanh(f + shift) * half - offset

    def vectors(self, codes: Tensor) -> Tensor:
        """`[..., D]` of codes `[...]`."""
        half = self.levels // 2
        return (codes.unsqueeze(-1) // self.places % self.levels - half) / half

    def initialise(self, features: Tensor) -> None:
        """Spread features `[B, channels, h, w]` over the codes."""
        standardise(self.projection, features)

    def embed(self, codes: Tensor) -> Tensor:
        return self.vectors(codes).movedim(-1, 1)

    def code_vectors(self) -> Tensor:
        return self.vectors(torch.arange(self.num_codes, device=self.levels.device))

    def forward(self, features: Tensor, step: int) -> Latent:
        bounded = self.bounded(self.projection(features).movedim(1, -1))  # [B, h, w, D]
        rounded = bounded.detach().round()
        half = self.levels // 2
        codes = ((rounded.long() + half) * self.places).sum(-1)
        z = straight_through(bounded, rounded) / half
        return Latent.of_codes(codes)._replace(z=z.movedim(-1, 1))


def _parse(levels: str) -> list[int]:
    sizes = [int(word) if word.strip().isdecimal() else 0 for word in levels.split(",")]
    if min(sizes) < 2 or math.prod(sizes) >= 2**31:
        raise UserError(
            f"--bottleneck fsq: levels={levels} must be whole numbers from 2 up, divided by commas, as in 8,5,5,5, "
            "and fewer than 2^31 codes in all"
        )
    return sizes
