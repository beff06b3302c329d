"""Priors under which every position is independent of the others.

B batch, h w code grid, K codes.
"""

import math

import torch
from torch import Tensor, nn

from vqvae.latent import Latent
from vqvae.priors.codes import CodePrior


class Uniform(nn.Module):
    """Every code equally likely, log p = -h w log K: what codes cost when nothing is known of them."""

    def __init__(self, *, num_codes: int, grid: tuple):
        super().__init__()
        self.num_codes, self.grid = num_codes, tuple(grid)
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # where the samples are wanted

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        nats = -math.log(self.num_codes) * math.prod(self.grid)
        return torch.full((len(latent.codes),), nats, device=latent.codes.device)

    def sample(self, n: int, *, generator: torch.Generator | None = None, **options) -> Tensor:
        """Codes `[n, h, w]`; the temperature of a uniform distribution changes nothing."""
        shape = (n, *self.grid)
        return torch.randint(self.num_codes, shape, generator=generator, device=self.anchor.device)


class Unigram(CodePrior):
    """One categorical for all positions: learns how often each code occurs, nothing of where."""

    def __init__(self, *, num_codes: int, grid: tuple, num_classes: int):
        super().__init__(num_codes, grid, num_classes)
        self.table = nn.Parameter(torch.zeros(max(num_classes, 1), num_codes))

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        rows = self._rows(len(codes), labels)
        return rows[:, :, None, None].expand(-1, -1, *self.grid)

    def stepper(self, n: int, labels: Tensor | None = None) -> "UnigramStepper":
        return UnigramStepper(self._rows(n, labels))

    def _rows(self, n: int, labels: Tensor | None) -> Tensor:
        return self.table[labels] if self.num_classes else self.table.expand(n, -1)


class UnigramStepper:
    def __init__(self, rows: Tensor):
        self.rows = rows

    def logits(self, row: int, column: int) -> Tensor:
        return self.rows

    def see(self, row: int, column: int, codes: Tensor) -> None:
        pass
