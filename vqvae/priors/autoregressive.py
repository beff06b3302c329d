"""Base class of priors that predict code after code: log p from logits, and one sampling loop in raster order.

B batch, h w code grid, K codes.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.contracts import Latent
from vqvae.priors.base import CodePrior, Request, draw, guided, uniform_numbers


class Stepper(Protocol):
    """Computes logits one position at a time, in raster order, and keeps what later positions need."""

    def logits(self, row: int, column: int) -> Tensor:
        """Logits `[B, K]` of the first position whose code is unknown."""

    def append(self, row: int, column: int, codes: Tensor) -> None:
        """Take the codes `[B]` of that position."""


class AutoregressivePrior(CodePrior):
    """p(codes) = prod_i p(code_i | codes before i in raster order), conditional on the label if there are classes.

    A member implements `logits` of the whole grid, for training, and a `stepper`, for sampling.
    """

    naive = False  # whether to sample with a whole forward pass for each position, for tests and timing

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[B, K, h, w]` of each position, given earlier codes `[B, h, w]` or assignments `[B, K, h, w]`."""
        raise NotImplementedError

    def stepper(self, n: int, labels: Tensor | None = None) -> Stepper:
        """A stepper for n grids, none of whose codes are known."""
        raise NotImplementedError

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        """log p of the codes in nats per image, `[B]`.

        With assignments w, each position contributes sum_k w_k log p_k. Raises ValueError if labels are missing or out
        of range.
        """
        w = latent.assignments
        known = latent.need_codes() if w is None else w
        labels = self.without_some(self.check_labels(len(known), labels))
        # nets produce channels-last memory, so that K last needs no copy
        logits = self.logits(known, labels).movedim(1, -1).float()  # [B, h, w, K]
        if w is not None:
            return (w.movedim(1, -1) * logits.log_softmax(-1)).flatten(1).sum(1)
        nats = F.cross_entropy(logits.flatten(0, 2), known.flatten(), reduction="none")
        return -nats.view_as(known).flatten(1).sum(1)

    def draw_codes(self, request: Request) -> Tensor:
        """See `CodePrior.draw_codes`.

        The uniform numbers are drawn in advance, one per position, and go through the inverse distribution function.
        A stepper and the naive one thus draw the same codes from one seed.
        """
        n, how, labels = request.n, request.how, request.labels
        h, w = self.grid
        uniform = uniform_numbers(h * w, n, generator=request.generator, device=self.anchor.device)
        codes = request.given.clone()
        make: Callable[[int, Tensor | None], Stepper] = partial(NaiveStepper, self) if self.naive else self.stepper
        guides = how.guidance != 1
        stepper = GuidedStepper(make(2 * n, self.with_and_without(labels)), how.guidance) if guides else make(n, labels)
        for position in range(h * w):
            row, column = divmod(position, w)
            logits = stepper.logits(row, column)
            if row >= request.rows:
                codes[:, row, column] = draw(logits, uniform[position], how)
            stepper.append(row, column, codes[:, row, column])
            request.progress(position + 1, h * w)
        return codes


class GuidedStepper:
    """Combines the logits of a stepper that has each grid twice, with its label and without."""

    def __init__(self, stepper: Stepper, guidance: float):
        self.stepper, self.guidance = stepper, guidance

    def logits(self, row: int, column: int) -> Tensor:
        return guided(self.stepper.logits(row, column), self.guidance)

    def append(self, row: int, column: int, codes: Tensor) -> None:
        self.stepper.append(row, column, codes.repeat(2))


class NaiveStepper:
    """Runs the whole forward pass at every position: the reference that fast steppers are tested against."""

    def __init__(self, prior: AutoregressivePrior, n: int, labels: Tensor | None):
        self.prior, self.labels = prior, labels
        self.codes = torch.zeros(n, *prior.grid, dtype=torch.int64, device=prior.anchor.device)

    def logits(self, row: int, column: int) -> Tensor:
        return self.prior.logits(self.codes, self.labels)[:, :, row, column]

    def append(self, row: int, column: int, codes: Tensor) -> None:
        self.codes[:, row, column] = codes


def look_up(embedding: nn.Embedding, codes: Tensor) -> Tensor:
    """Embeddings `[B, h, w, n]` of codes `[B, h, w]`, or their mixtures for assignments `[B, K, h, w]`."""
    if codes.is_floating_point():
        return codes.movedim(1, -1) @ embedding.weight
    return embedding(codes)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position, so that no position sees a later one through the statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
