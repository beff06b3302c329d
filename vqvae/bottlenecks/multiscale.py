"""Residual quantization from coarse to fine grids.

B batch, D code dimension, K codes, h w feature grid, S scales, sg stop-gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.bottlenecks.base import Projection, vectors_of
from vqvae.bottlenecks.codebook import Codebook, CodebookOptions
from vqvae.bottlenecks.gradients import straight_through
from vqvae.contracts import Discrete, Latent
from vqvae.errors import OptionError
from vqvae.registry import Range


@dataclass(frozen=True, kw_only=True)
class MultiScaleOptions(CodebookOptions):
    scales: Annotated[int, Range(0, 16), "scales S, each half as large as the next; 0: down to a single code"] = 0
    phi: Annotated[float, Range(0, 1), "share of a 3x3 convolution in each enlarged scale; 0: none"] = 0.5
    shared: Annotated[bool, "one codebook for all scales, as in VAR; otherwise one for each"] = False


class Search(NamedTuple):
    """The codes of all scales, the vectors that they quantize, and the sums of their vectors."""

    given: list[Tensor]  # [B, D, h_s, w_s], the vectors to quantize at each scale
    codes: list[Tensor]  # [B, h_s, w_s]
    sums: list[Tensor]  # [B, D, h, w], the sum of the scales so far


class MultiScale(Discrete):
    """Every scale quantizes the error of the coarser ones, on its own grid (VAR: 2404.02905, alg. 1 and 2).

    Every scale has a codebook of its own, or shares one with all others (`shared`, as published). With a shared one,
    the single code of the coarsest scale used only half of the codes in our runs.

    r_0 = f, k_s = nearest codes of area(r_(s-1)), z_s = phi_s(bicubic(e_(k_s))), r_s = r_(s-1) - z_s, z = sum_s z_s,
    straight through. The grids are h x w and its halves, rounded up: 1x1, 2x2, 4x4 and 7x7 codes for 7x7 features.
    phi_s(x) = (1 - phi) x + phi conv_s(x) repairs what enlarging blurs. The finest scale is not enlarged and has no
    phi, so that one scale is `vq`.
    Loss: beta * mean over scales of mean (f - sg sum_(i<=s) z_i)^2, and mean (sg f - sum_(i<=s) z_i)^2 for the
    convolutions and a codebook that is trained by gradient.

    The code grid `[B, tokens, 1]` has the scales one after the other, the coarsest first, each row by row. With only
    one scale it is `[B, h, w]`.
    """

    options: MultiScaleOptions

    def __init__(self, *, channels: int, grid: tuple[int, int], options: MultiScaleOptions = MultiScaleOptions()):
        super().__init__()
        sizes = halves(grid)
        if options.scales > len(sizes):
            problem = f"must be at most {len(sizes)}, the halves of the nets' {grid[0]}x{grid[1]} grid"
            raise OptionError("scales", options.scales, problem)
        self.options, self.sizes = options, sizes[-options.scales :]
        self.scales = self.sizes if len(self.sizes) > 1 else ()
        self.level_names = tuple(f"{h}x{w}" for h, w in self.scales) or ("codes",)
        self.num_codes, self.code_dim = options.num_codes, options.code_dim
        self.start_vectors = options.start_vectors
        self.grid = (sum(h * w for h, w in self.sizes), 1) if self.scales else (grid[0], grid[1])
        self.projection = Projection(channels, self.code_dim)
        options.start(self.projection)
        count = 1 if options.shared else len(self.sizes)
        books = nn.ModuleList(Codebook(options, self.code_dim, learns=options.codebook) for _ in range(count))
        self.codebooks = cast(Sequence[Codebook], books)  # ModuleList has no type parameter
        enlarged = len(self.sizes) - 1 if options.phi else 0
        self.convolutions = nn.ModuleList(identity(self.code_dim) for _ in range(enlarged))

    def code_vectors(self) -> Tensor:
        """The finest scale's codebook `[K, D]`."""
        return self.codebooks[-1].table()

    def book(self, scale: int) -> Codebook:
        """The codebook of a scale."""
        return self.codebooks[0 if self.options.shared else scale]

    def per_book(self, scales: list[Tensor]) -> list[Tensor]:
        """Regroup the rows of each scale, `[B, h_s w_s, ...]`, as rows `[N, ...]` for each codebook, image by image."""
        return [part.flatten(0, 1) for part in ([torch.cat(scales, dim=1)] if self.options.shared else scales)]

    def maps(self, codes: Tensor) -> dict[str, Tensor]:
        parts = codes.flatten(1).split([h * w for h, w in self.sizes], dim=1)
        grids = (part.unflatten(1, size) for part, size in zip(parts, self.sizes, strict=True))
        return dict(zip(self.level_names, grids, strict=True))

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        maps = list(self.maps(codes).values())[:levels]
        return torch.stack([self.enlarge(self.book(scale).embed(part), scale) for scale, part in enumerate(maps)]).sum(
            0
        )

    def enlarge(self, vectors: Tensor, scale: int) -> Tensor:
        """Code vectors `[B, D, h_s, w_s]` of a scale at full size, `[B, D, h, w]`."""
        if scale == len(self.sizes) - 1:
            return vectors
        full = F.interpolate(vectors, self.sizes[-1], mode="bicubic")
        phi = self.options.phi
        return (1 - phi) * full + phi * self.convolutions[scale](full) if phi else full

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        self.options.prepare(self.projection, features)
        rest, given = self.projection(features), []
        for size in self.sizes:  # the vectors of all scales, as if every coarser one were coded without error
            given.append(F.adaptive_avg_pool2d(rest, size))
            rest = rest - F.interpolate(given[-1], self.sizes[-1], mode="bicubic") if size != self.sizes[-1] else rest
        for book, vectors in zip(self.codebooks, self.per_book([part.flatten(2).mT for part in given]), strict=True):
            book.initialize(vectors)

    def search(self, f: Tensor) -> Search:
        """Quantize vectors f `[B, D, h, w]`, scale by scale."""
        found, total = Search([], [], []), None
        for scale, size in enumerate(self.sizes):
            rest = f.detach() if total is None else f.detach() - total.detach()
            given = F.adaptive_avg_pool2d(rest, size) if size != self.sizes[-1] else rest
            codes = self.book(scale).nearest(vectors_of(given)).view(len(f), *size)
            part = self.enlarge(self.book(scale).embed(codes), scale)
            total = part if total is None else total + part
            found.given.append(given)
            found.codes.append(codes)
            found.sums.append(total)
        return found

    def quantize(self, features: Tensor) -> Latent:
        f = self.projection(features)
        return self._latent(f, self.search(f))

    def forward(self, features: Tensor, step: int) -> Latent:
        f = self.projection(features)
        found = self.search(f)
        latent = self._latent(f, found)
        if self.training:
            vectors = self.per_book([given.flatten(2).mT for given in found.given])
            codes = self.per_book([codes.flatten(1) for codes in found.codes])
            for book, f_s, codes_s in zip(self.codebooks, vectors, codes, strict=True):
                book.update(f_s, codes_s, step)
        return latent

    def _latent(self, f: Tensor, found: Search) -> Latent:
        commitment = torch.stack([F.mse_loss(f, total.detach()) for total in found.sums]).mean()
        loss = self.options.beta * commitment
        if len(self.convolutions) or not self.codebooks[0].learns_by_ema:
            loss = loss + torch.stack([F.mse_loss(total, f.detach()) for total in found.sums]).mean()
        codes = torch.cat([codes.flatten(1) for codes in found.codes], dim=1).unflatten(1, self.grid)
        z = straight_through(f, found.sums[-1])
        return Latent.of_codes(codes, z, loss=loss, stats={"commitment": commitment.detach()})


def identity(channels: int) -> nn.Conv2d:
    """A 3x3 convolution that starts as the identity."""
    convolution = nn.Conv2d(channels, channels, 3, padding=1)
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    nn.init.dirac_(convolution.weight)
    return convolution


def halves(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(h, w) and its halves, rounded up, from 1x1 on."""
    sizes = [(grid[0], grid[1])]
    while sizes[0] != (1, 1):
        h, w = sizes[0]
        sizes.insert(0, (-(-h // 2), -(-w // 2)))
    return tuple(sizes)
