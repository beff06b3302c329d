"""Bottlenecks with several codes per position, or several grids: residual, grouped and hierarchical quantization.

Priors, tokenizers and plots see their codes as one grid; `maps` takes it apart, level by level.

B batch, D code dimension, K codes, Q levels, h w feature grid, sg stop-gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import shares
from vqvae.bottlenecks.base import Projection, vectors_of
from vqvae.bottlenecks.codebook import Codebook, CodebookOptions
from vqvae.bottlenecks.gradients import straight_through
from vqvae.bottlenecks.vq import VQ, VQOptions
from vqvae.contracts import Discrete, Latent
from vqvae.errors import OptionError
from vqvae.registry import Count, Range


class Level(NamedTuple):
    """The input and the output of one codebook."""

    given: Tensor  # [B, D, h, w], the vectors to quantize
    vectors: Tensor  # [B, D, h, w], the vectors of their codes
    codes: Tensor  # [B, h, w]

    @classmethod
    def of(cls, book: Codebook, given: Tensor) -> "Level":
        codes = book.nearest(vectors_of(given.detach())).view(len(given), *given.shape[2:])
        return cls(given, book.embed(codes), codes)


class MultiCodebook(Discrete):
    """Q codebooks, each with one code per position.

    A row of the code grid `[B, h, w Q]` is [code 1 .. code Q] of position 1, then of position 2, and so on.
    """

    options: CodebookOptions
    codebooks: Sequence[Codebook]

    def __init__(self, channels: int, grid: tuple[int, int], options: CodebookOptions, *, levels: int, dim: int):
        super().__init__()
        self.options, self.levels = options, levels
        self.level_names = tuple(f"level {i + 1}" for i in range(levels))
        self.num_codes, self.code_dim = options.num_codes, options.code_dim
        self.start_vectors = options.start_vectors
        self.grid = (grid[0], grid[1] * levels)
        self.projection = Projection(channels, self.code_dim)
        options.start(self.projection)
        books = nn.ModuleList(Codebook(options, dim, learns=options.codebook) for _ in range(levels))
        self.codebooks = cast(Sequence[Codebook], books)  # ModuleList has no type parameter

    def search(self, f: Tensor) -> list[Level]:
        """Quantize vectors f `[B, D, h, w]`, level by level."""
        raise NotImplementedError

    def join(self, vectors: list[Tensor]) -> Tensor:
        """The decoder's input `[B, D, h, w]` for the vectors of the first levels, or of all."""
        raise NotImplementedError

    def draw_depth(self) -> int:
        """How many of the first levels a training step uses."""
        return self.levels

    def code_vectors(self) -> Tensor:
        """The first level's codebook `[K, D]`."""
        return self.codebooks[0].table()

    def maps(self, codes: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.level_names, codes.unflatten(2, (-1, self.levels)).unbind(3), strict=True))

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        maps = self.maps(codes).values()
        return self.join([book.embed(level) for book, level in zip(self.codebooks, maps, strict=True)][:levels])

    def quantize(self, features: Tensor) -> Latent:
        f = self.projection(features)
        return self._latent(f, self.search(f), self.levels)

    def forward(self, features: Tensor, step: int) -> Latent:
        f = self.projection(features)
        levels = self.search(f)
        depth = self.draw_depth() if self.training else self.levels
        if self.training:
            self.update(levels[:depth], step)
        return self._latent(f, levels, depth)

    def update(self, levels: list[Level], step: int) -> None:
        """Update the codebooks of the first levels outside the optimizer (EMA, revival)."""
        for book, level in zip(self.codebooks, levels, strict=False):
            book.update(vectors_of(level.given.detach()), level.codes.flatten(), step)

    def _latent(self, f: Tensor, levels: list[Level], depth: int) -> Latent:
        """The latent of all codes, with z and the losses of the first `depth` levels."""
        used = levels[:depth]
        commitment = torch.stack([F.mse_loss(level.given, level.vectors.detach()) for level in used]).mean()
        loss = self.options.beta * commitment
        if not self.codebooks[0].learns_by_ema:
            loss = loss + torch.stack([F.mse_loss(level.vectors, level.given.detach()) for level in used]).mean()
        codes = torch.stack([level.codes for level in levels], dim=3).flatten(2)  # [B, h, w Q]
        z = straight_through(f, self.join([level.vectors for level in used]))
        return Latent.of_codes(codes, z, loss=loss, stats={"commitment": commitment.detach()})


@dataclass(frozen=True, kw_only=True)
class ResidualOptions(CodebookOptions):
    quantizers: Annotated[int, Range(1, 1024), "levels Q; an image has h w Q codes"] = 4
    dropout: Annotated[
        float, Range(0, 1), "probability that a training step uses a random number of first levels only"
    ] = 0.0


class ResidualVQ(MultiCodebook):
    """Residual quantization: every level quantizes the error of those before (2107.03312, alg. 1; 2203.01941, eq. 3).

    r_0 = f, k_i = argmin_k ||r_(i-1) - e_ik||, r_i = r_(i-1) - e_(i, k_i), z = sum_i e_(i, k_i), straight through.
    Loss: beta * mean over levels of mean (r_(i-1) - sg e_i)^2 [+ mean (sg r_(i-1) - e_i)^2 with codebook=gradient].
    With dropout, the first levels decode well without the rest (2107.03312, section III.C).
    """

    options: ResidualOptions

    def __init__(self, *, channels: int, grid: tuple[int, int], options: ResidualOptions = ResidualOptions()):
        super().__init__(channels, grid, options, levels=options.quantizers, dim=options.code_dim)

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        self.options.prepare(self.projection, features)
        rest = vectors_of(self.projection(features))
        for book in self.codebooks:
            book.initialize(rest)
            rest = rest - F.embedding(book.nearest(rest), book.table())

    def search(self, f: Tensor) -> list[Level]:
        levels, rest = [], f
        for book in self.codebooks:
            levels.append(Level.of(book, rest))
            rest = rest - levels[-1].vectors.detach()
        return levels

    def join(self, vectors: list[Tensor]) -> Tensor:
        return torch.stack(vectors).sum(0)

    def draw_depth(self) -> int:
        if not self.options.dropout:
            return self.levels
        # the same in all processes: if they updated different levels, they would wait for each other's sums forever
        cpu = torch.device("cpu")
        few = shares.draw_alike(partial(torch.randint, 1, self.levels + 1), (), device=cpu)
        drops = shares.draw_alike(torch.rand, (), device=cpu) < self.options.dropout
        return int(few) if drops else self.levels


@dataclass(frozen=True, kw_only=True)
class GroupedOptions(CodebookOptions):
    code_dim: Annotated[Count, "dimension D of the whole vector, a multiple of groups"] = 64
    groups: Annotated[int, Range(1, 1024), "groups G of channels; an image has h w G codes"] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.code_dim % self.groups:
            raise OptionError("code_dim", self.code_dim, f"must be a multiple of groups={self.groups}")


class GroupedVQ(MultiCodebook):
    """Product quantization: the vector is split into groups of channels, each with a codebook.

    z = [e_1 .. e_G], each the code nearest to its group (1711.00937 with several codebooks per position; product
    quantization of Jegou et al., 2011). G codebooks of K codes give K^G vectors.
    """

    def __init__(self, *, channels: int, grid: tuple[int, int], options: GroupedOptions = GroupedOptions()):
        super().__init__(channels, grid, options, levels=options.groups, dim=options.code_dim // options.groups)

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        self.options.prepare(self.projection, features)
        for book, part in zip(self.codebooks, self.projection(features).chunk(self.levels, 1), strict=True):
            book.initialize(vectors_of(part))

    def search(self, f: Tensor) -> list[Level]:
        return [Level.of(book, part) for book, part in zip(self.codebooks, f.chunk(self.levels, 1), strict=True)]

    def join(self, vectors: list[Tensor]) -> Tensor:
        missing = [torch.zeros_like(vectors[0])] * (self.levels - len(vectors))
        return torch.cat([*vectors, *missing], dim=1)


@dataclass(frozen=True, kw_only=True)
class HierarchyOptions(CodebookOptions):
    hidden: Annotated[Count, "channels of the convolutions between the levels"] = 128


class Hierarchy(Discrete):
    """Two levels, a coarse grid and a fine one that refines it: VQ-VAE-2 (1906.00446, section 3.1 and figure 2a).

    The features are halved in size and quantized: the top grid [h/2, w/2]. The bottom grid [h, w] quantizes the
    features together with the decoded top. K and D are those of one level; the decoder's input is
    z = [up(top), bottom] with 2 D channels.

    The code grid `[B, h/2 + 2 h, w/2]` has the top's rows first. Each bottom row follows as two rows, its even and its
    odd columns. So a prior in raster order predicts the top first, and codes of the same place share a column.
    """

    level_names = ("top", "bottom")

    def __init__(self, *, channels: int, grid: tuple[int, int], options: HierarchyOptions = HierarchyOptions()):
        super().__init__()
        h, w = grid
        if h % 2 or w % 2:
            problem = f"halves the nets' grid, which is {h}x{w}; use sonnet nets, and an image size such as 32"
            raise OptionError("bottleneck", "hierarchy", problem)
        hidden, code_dim = options.hidden, options.code_dim
        self.num_codes, self.code_dim = options.num_codes, 2 * code_dim
        self.start_vectors = options.start_vectors
        self.fine, self.grid = grid, (h // 2 + 2 * h, w // 2)
        level = VQOptions(**{name: value for name, value in asdict(options).items() if name != "hidden"})
        self.down = nn.Sequential(
            nn.Conv2d(channels, hidden, 4, stride=2, padding=1),  # [B, hidden, h/2, w/2]
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.top = VQ(channels=hidden, grid=(h // 2, w // 2), options=level)
        self.decode_top = nn.Sequential(
            nn.Conv2d(code_dim, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(hidden, hidden, 4, stride=2, padding=1),  # [B, hidden, h, w]
            nn.ReLU(inplace=True),
        )
        self.bottom = VQ(channels=channels + hidden, grid=grid, options=level)
        self.up = nn.ConvTranspose2d(code_dim, code_dim, 4, stride=2, padding=1)

    def code_vectors(self) -> Tensor:
        """The top level's codebook `[K, D]`."""
        return self.top.code_vectors()

    def maps(self, codes: Tensor) -> dict[str, Tensor]:
        h = self.fine[0]
        top, bottom = codes.split((h // 2, 2 * h), dim=1)
        return {"top": top, "bottom": bottom.unflatten(1, (h, 2)).movedim(2, 3).flatten(2)}

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        coarse = self.down(features)
        self.top.initialize(coarse)
        top = self.top.quantize(coarse)
        self.bottom.initialize(torch.cat([features, self.decode_top(top.z)], dim=1))

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        maps = self.maps(codes)
        bottom = self.bottom.embed(maps["bottom"])
        bottom = torch.zeros_like(bottom) if levels == 1 else bottom
        return torch.cat([self.up(self.top.embed(maps["top"])), bottom], dim=1)

    def quantize(self, features: Tensor) -> Latent:
        return self._latent(features, self.top.quantize, self.bottom.quantize)

    def forward(self, features: Tensor, step: int) -> Latent:
        return self._latent(features, partial(self.top, step=step), partial(self.bottom, step=step))

    def _latent(
        self, features: Tensor, quantize_top: Callable[[Tensor], Any], quantize_bottom: Callable[[Tensor], Any]
    ) -> Latent:
        top = quantize_top(self.down(features))
        bottom = quantize_bottom(torch.cat([features, self.decode_top(top.z)], dim=1))
        below = bottom.codes.unflatten(2, (-1, 2)).movedim(3, 2).flatten(1, 2)  # [B, 2h, w/2]
        return Latent.of_codes(
            torch.cat([top.codes, below], dim=1),
            torch.cat([self.up(top.z), bottom.z], dim=1),
            loss=top.loss + bottom.loss,
            stats={f"commitment_{name}": part.stats["commitment"] for name, part in (("top", top), ("bottom", bottom))},
        )
