"""Priors under which all positions are independent.

B batch, h w code grid, K codes.
"""

import math

import torch
from torch import Tensor, nn

from vqvae.contracts import Latent
from vqvae.priors.autoregressive import AutoregressivePrior
from vqvae.priors.base import CodePrior, LabelDrop, Request
from vqvae.registry import checked


class Uniform(CodePrior):
    """All codes equally likely: log p = -h w log K."""

    def __init__(self, *, num_codes: int, grid: tuple[int, int]):
        super().__init__(num_codes, grid)

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        """log p of the codes in nats per image, `[B]`."""
        codes = latent.need_codes()
        nats = -math.log(self.num_codes) * math.prod(self.grid)
        return torch.full((len(codes),), nats, device=codes.device)

    def draw_codes(self, request: Request) -> Tensor:
        """See `CodePrior.draw_codes`. All codes are equally likely, whatever the options, temperature 0 included."""
        shape = (request.n, *self.grid)
        codes = torch.randint(self.num_codes, shape, generator=request.generator, device=self.anchor.device)
        codes[:, : request.rows] = request.given[:, : request.rows]
        positions = math.prod(self.grid)
        request.progress(positions, positions)
        return codes


class Unigram(AutoregressivePrior):
    """One categorical distribution for all positions (one per class): how often each code occurs."""

    @checked
    def __init__(self, *, num_codes: int, grid: tuple[int, int], num_classes: int, label_drop: LabelDrop = 0.0):
        super().__init__(num_codes, grid, num_classes, label_drop)
        self.table = nn.Parameter(torch.zeros(max(self.label_rows, 1), num_codes))

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        rows = self._rows(len(codes), labels)
        return rows[:, :, None, None].expand(-1, -1, *self.grid)

    def stepper(self, n: int, labels: Tensor | None = None) -> "UnigramStepper":
        return UnigramStepper(self._rows(n, labels))

    def _rows(self, n: int, labels: Tensor | None) -> Tensor:
        return self.table[labels] if self.num_classes else self.table.expand(n, -1)


class UnigramStepper:
    """Returns the same logits `[B, K]` at every position."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def logits(self, row: int, column: int) -> Tensor:
        return self.rows

    def append(self, row: int, column: int, codes: Tensor) -> None:
        pass
