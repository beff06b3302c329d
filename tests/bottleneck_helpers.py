"""Small bottlenecks and the oracle of the nearest code."""

from typing import Any

import torch
from torch import Tensor

from vqvae.bottlenecks import BOTTLENECKS
from vqvae.registry import Choice, Slot, build

SLOT = Slot("bottleneck", BOTTLENECKS)


def make(name: str, grid: tuple[int, int] = (2, 4), channels: int = 6, **options: Any) -> Any:
    """A bottleneck as the command line would build it."""
    return build(SLOT, Choice(name, options), {"channels": channels, "grid": grid, "total_steps": 10})


def with_identity(name: str, channels: int, grid: tuple[int, int] = (2, 3), **options: Any) -> Any:
    """A bottleneck whose projection is the identity, so that it quantizes the features themselves."""
    bottleneck = make(name, grid, channels, **options)
    torch.nn.init.dirac_(bottleneck.projection.weight)
    torch.nn.init.zeros_(bottleneck.projection.bias)
    return bottleneck


def rows(x: Tensor) -> Tensor:
    """`[B, D, h, w]` as `[N, D]`."""
    return x.movedim(1, -1).flatten(0, 2)


def distances(f: Tensor, table: Tensor) -> tuple[Tensor, float]:
    """Squared distances `[N, K]` in float64, and the scale of the numbers that a search in fp32 rounds."""
    f, table = f.detach().double(), table.detach().double()
    squares = torch.cdist(f, table, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squares, sum(float(x.square().sum(1).max()) if len(x) else 0.0 for x in (f, table))


def assert_nearest(codes: Tensor, f: Tensor, table: Tensor, tolerance: float = 4e-6) -> None:
    """No code `[N]` may be farther from its vector `[N, D]` than the nearest, except by rounding."""
    assert codes.dtype == torch.int64
    assert codes.shape == f.shape[:1]
    squares, scale = distances(f, table)
    excess = squares.gather(1, codes[:, None]).squeeze(1) - squares.amin(1)
    assert (excess <= tolerance * scale).all()


def clearly_nearest(f: Tensor, table: Tensor) -> Tensor:
    """The nearest codes `[N]`. Fails if the second nearest is so close that rounding could decide."""
    squares, scale = distances(f, table)
    first, second = squares.topk(2, largest=False).values.unbind(1)
    assert (second - first > 3e-6 * scale).all()
    return squares.argmin(1)
