"""Bottlenecks of several codes per position, or of several grids: residual, grouped and hierarchical quantisation.

To priors, tokenizers and figures their codes are one grid; `maps` takes it apart, level by level.

B batch, D code dimension, K codes, Q levels, h w feature grid.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import ranks
from vqvae.bottlenecks.codebook import Codebook, Discrete, check_options, straight_through, vectors_of
from vqvae.bottlenecks.vq import VQ
from vqvae.errors import UserError
from vqvae.latent import Latent


class Stacked(Discrete):
    """Q codebooks, each giving one code to every position; the codes of a position stand side by side.

    A row of the code grid is [code 1 .. code Q] of position 1, then of position 2 ...: `[B, h, w Q]`.
    """

    name: str

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int,
        code_dim: int,
        levels: int,
        vector_dim: int,
        beta: float,
        codebook: str,
        decay: float,
        epsilon: float,
        init: str,
        revive: float,
    ):
        super().__init__()
        check_options(
            self.name,
            num_codes=(num_codes, 1, 2**31),
            beta=(beta, 0, math.inf),
            decay=(decay, 0, 1 - 1e-9),
            epsilon=(epsilon, 0, math.inf),
            revive=(revive, 0, 1),
        )
        self.num_codes, self.code_dim, self.levels, self.beta = num_codes, code_dim, levels, beta
        self.grid = (grid[0], grid[1] * levels)
        self.projection = nn.Conv2d(channels, code_dim, 1)
        self.codebooks = nn.ModuleList(
            Codebook(num_codes, vector_dim, learns=codebook, decay=decay, epsilon=epsilon, init=init, revive=revive)
            for _ in range(levels)
        )

    def code_vectors(self) -> Tensor:
        """The first level's codebook `[K, D]`."""
        return self.codebooks[0].table()

    def maps(self, codes: Tensor) -> dict[str, Tensor]:
        levels = codes.unflatten(2, (-1, self.levels)).unbind(3)
        return {f"level {i + 1}": level for i, level in enumerate(levels)}

    def vectors(self, codes: Tensor) -> list[Tensor]:
        """Each level's vectors, `[B, D, h, w]`, of codes `[B, h, w Q]`."""
        maps = self.maps(codes).values()
        return [book.embed(level) for book, level in zip(self.codebooks, maps, strict=True)]

    def assemble(self, f: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]], used: int | None = None) -> Latent:
        """A latent of what each level was given, its vectors and its codes; `used` levels share in z and the loss."""
        used = len(parts) if used is None else used
        commitment = torch.stack([F.mse_loss(given, e.detach()) for given, e, _ in parts[:used]]).mean()
        loss = self.beta * commitment
        if not self.codebooks[0].learns_by_ema:
            loss = loss + torch.stack([F.mse_loss(e, given.detach()) for given, e, _ in parts[:used]]).mean()
        codes = torch.stack([codes for _, _, codes in parts], dim=3).flatten(2)  # [B, h, w Q]
        z = straight_through(f, self.join([e for _, e, _ in parts[:used]]))
        zero = torch.zeros(len(f), device=f.device)
        return Latent(z, codes, log_q=zero, loss=loss, stats={"commitment": commitment.detach()})

    def quantise(self, level: int, given: Tensor, learn: bool) -> tuple[Tensor, Tensor]:
        """One level's vectors `[B, D, h, w]` and codes `[B, h, w]`; its codebook then follows what it was given."""
        book, rows = self.codebooks[level], vectors_of(given.detach())
        flat = book.nearest(rows)
        codes = flat.view(len(given), *given.shape[2:])
        e = book.embed(codes)
        if learn:
            book.learn(rows, flat)
        return e, codes

    def join(self, vectors: list[Tensor]) -> Tensor:
        """What the decoder reads, `[B, D, h, w]`, of the levels' vectors; of the first levels alone, a preview."""
        raise NotImplementedError

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """What the decoder reads of codes; with `levels`, of that many first levels alone."""
        return self.join(self.vectors(codes)[:levels])


class ResidualVQ(Stacked):
    """Residual quantisation: every level quantises what the levels before left (2107.03312, alg. 1; 2203.01941, eq. 3).

    r_0 = f, k_i = argmin_k ||r_(i-1) - e_ik||, r_i = r_(i-1) - e_(i, k_i), z = sum_i e_(i, k_i), straight through.
    Loss: beta * mean over levels of mean (r_(i-1) - sg e_i)^2, and with codebook=gradient the same the other way round.

    num_codes, code_dim   K of every level, and D.
    quantisers            levels Q; an image costs h w Q codes.
    dropout               chance that a training batch uses only a random number of first levels, so that a prefix of
                          the codes decodes well too (2107.03312, section III.C).
    beta, codebook, decay, epsilon, init, revive   as for vq.
    """

    name = "residual"

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int = 512,
        code_dim: int = 64,
        quantisers: int = 4,
        dropout: float = 0.0,
        beta: float = 0.25,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Literal["kmeans", "uniform", "fan-in", "normal"] = "kmeans",
        revive: float = 0.03,
    ):
        check_options(
            "residual", quantisers=(quantisers, 1, 1024), code_dim=(code_dim, 1, 2**31), dropout=(dropout, 0, 1)
        )
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, levels=quantisers,
            vector_dim=code_dim, beta=beta, codebook=codebook, decay=decay, epsilon=epsilon, init=init, revive=revive,
        )  # fmt: skip
        self.dropout = dropout

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        rest = vectors_of(self.projection(features))
        for book in self.codebooks:
            book.initialise(rest)
            rest = rest - F.embedding(book.nearest(rest), book.table())

    def join(self, vectors: list[Tensor]) -> Tensor:
        return torch.stack(vectors).sum(0)

    def forward(self, features: Tensor, step: int) -> Latent:
        f = self.projection(features)
        used = self.levels
        if self.training and self.dropout:
            few = torch.randint(1, self.levels + 1, ())
            # processes that learnt different levels would wait for each other's sums for ever
            used = int(ranks.broadcast(torch.where(torch.rand(()) < self.dropout, few, used)))
        rest, parts = f, []
        for level in range(self.levels):
            e, codes = self.quantise(level, rest, learn=self.training and level < used)
            parts.append((rest, e, codes))
            rest = rest - e.detach()
        return self.assemble(f, parts, used)


class GroupedVQ(Stacked):
    """Product quantisation: the vector is cut into groups of channels, each with a codebook of its own.

    z = [e_1 .. e_G], each the nearest code to its part of the vector (1711.00937 with several codebooks per position;
    product quantisation of Jegou et al., 2011). K^G vectors for the price of G codes.

    num_codes, code_dim   K of every group, and D of the whole vector, a multiple of groups.
    groups                G; an image costs h w G codes.
    beta, codebook, decay, epsilon, init, revive   as for vq.
    """

    name = "grouped"

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int = 512,
        code_dim: int = 64,
        groups: int = 2,
        beta: float = 0.25,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Literal["kmeans", "uniform", "fan-in", "normal"] = "kmeans",
        revive: float = 0.03,
    ):
        check_options("grouped", groups=(groups, 1, 1024), code_dim=(code_dim, 1, 2**31))
        if code_dim % groups:
            raise UserError(f"--bottleneck grouped: code_dim={code_dim} must be a multiple of groups={groups}")
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, levels=groups,
            vector_dim=code_dim // groups, beta=beta, codebook=codebook, decay=decay, epsilon=epsilon, init=init,
            revive=revive,
        )  # fmt: skip

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        for book, part in zip(self.codebooks, self.projection(features).chunk(self.levels, 1), strict=True):
            book.initialise(vectors_of(part))

    def join(self, vectors: list[Tensor]) -> Tensor:
        missing = [torch.zeros_like(vectors[0])] * (self.levels - len(vectors))
        return torch.cat([*vectors, *missing], dim=1)

    def forward(self, features: Tensor, step: int) -> Latent:
        f = self.projection(features)
        parts = []
        for level, part in enumerate(f.chunk(self.levels, 1)):
            e, codes = self.quantise(level, part, learn=self.training)
            parts.append((part, e, codes))
        return self.assemble(f, parts)


class Hierarchy(Discrete):
    """Two levels, a coarse grid that the fine one refines: VQ-VAE-2 (1906.00446, section 3.1 and figure 2a).

    The features are halved in size to the top grid [h/2, w/2] and quantised; the bottom grid [h, w] quantises the
    features together with the decoded top. The decoder reads both, z = [up(top), bottom] of 2 D channels.

    As one grid the codes are first the top's rows, then the bottom's, each bottom row as its even and its odd columns:
    `[B, h/2 + 2 h, w/2]`. So a raster-order prior predicts the top first, then the bottom given the top, and codes of
    one place stand in one column.

    num_codes, code_dim   K and D of either level.
    hidden                channels of the convolutions between the levels.
    beta, codebook, decay, epsilon, init, revive   as for vq.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int = 512,
        code_dim: int = 64,
        hidden: int = 128,
        beta: float = 0.25,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Literal["kmeans", "uniform", "fan-in", "normal"] = "kmeans",
        revive: float = 0.03,
    ):
        super().__init__()
        check_options("hierarchy", code_dim=(code_dim, 1, 2**31), hidden=(hidden, 1, 2**31))
        h, w = grid
        if h % 2 or w % 2:
            raise UserError(
                f"--bottleneck hierarchy: the nets' grid of {h}x{w} cannot be halved; try another --image-size, "
                "such as 32"
            )
        self.num_codes, self.code_dim = num_codes, 2 * code_dim
        self.fine, self.grid = (h, w), (h // 2 + 2 * h, w // 2)
        shared = {"num_codes": num_codes, "code_dim": code_dim, "beta": beta, "codebook": codebook, "decay": decay}
        shared |= {"epsilon": epsilon, "init": init, "revive": revive}
        self.down = nn.Sequential(
            nn.Conv2d(channels, hidden, 4, stride=2, padding=1),  # [B, hidden, h/2, w/2]
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
        )
        self.top = VQ(channels=hidden, grid=(h // 2, w // 2), **shared)
        self.decode_top = nn.Sequential(
            nn.Conv2d(code_dim, hidden, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden, hidden, 4, stride=2, padding=1),  # [B, hidden, h, w]
            nn.ReLU(),
        )
        self.bottom = VQ(channels=channels + hidden, grid=self.fine, **shared)
        self.up = nn.ConvTranspose2d(code_dim, code_dim, 4, stride=2, padding=1)

    def code_vectors(self) -> Tensor:
        """The top level's codebook `[K, D]`."""
        return self.top.code_vectors()

    def maps(self, codes: Tensor) -> dict[str, Tensor]:
        h = self.fine[0]
        top, bottom = codes.split((h // 2, 2 * h), dim=1)
        return {"top": top, "bottom": bottom.unflatten(1, (h, 2)).movedim(2, 3).flatten(2)}

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        coarse = self.down(features)
        self.top.initialise(coarse)
        self.bottom.initialise(torch.cat([features, self.decode_top(self.top.mode(coarse).z)], dim=1))

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """What the decoder reads of codes; with `levels=1`, of the top alone, the bottom's vectors 0."""
        maps = self.maps(codes)
        bottom = self.bottom.embed(maps["bottom"])
        bottom = torch.zeros_like(bottom) if levels == 1 else bottom
        return torch.cat([self.up(self.top.embed(maps["top"])), bottom], dim=1)

    def forward(self, features: Tensor, step: int) -> Latent:
        coarse = self.down(features)
        top = self.top(coarse, step)
        bottom = self.bottom(torch.cat([features, self.decode_top(top.z)], dim=1), step)
        below = bottom.codes.unflatten(2, (-1, 2)).movedim(3, 2).flatten(1, 2)  # [B, 2h, w/2]
        return Latent(
            torch.cat([self.up(top.z), bottom.z], dim=1),
            torch.cat([top.codes, below], dim=1),
            log_q=bottom.log_q,
            loss=top.loss + bottom.loss,
            stats={f"commitment_{name}": part.stats["commitment"] for name, part in (("top", top), ("bottom", bottom))},
        )
