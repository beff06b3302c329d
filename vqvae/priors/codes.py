"""What every prior over code grids shares: log p from logits, and one loop that draws codes in raster order.

B batch, h w code grid, K codes.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.errors import UserError
from vqvae.latent import Latent


class Stepper(Protocol):
    """Logits of one position after another, in raster order, given the codes seen so far."""

    def logits(self, row: int, column: int) -> Tensor:
        """`[B, K]`, for the first position not yet seen."""

    def see(self, row: int, column: int, codes: Tensor) -> None:
        """Take in the codes `[B]` of that position."""


class CodePrior(nn.Module):
    """p(codes) = prod_i p(code_i | codes before i in raster order), and given the label when there are classes.

    A member gives `logits` of a whole grid for training, and a `stepper` that computes one position at a time.
    """

    def __init__(self, num_codes: int, grid: tuple, num_classes: int):
        super().__init__()
        self.num_codes, self.grid, self.num_classes = num_codes, tuple(grid), num_classes

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[B, K, h, w]` of every position given the codes `[B, h, w]`, or assignments, before it."""
        raise NotImplementedError

    def stepper(self, n: int, labels: Tensor | None = None) -> Stepper:
        raise NotImplementedError

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        """log p of the codes, `[B]` nats per image; of assignments w sum_k w_k log p_k, at every position."""
        self._check(labels)
        codes, w = latent.codes, latent.assignments
        # with the codes last, as nets leave them in memory, nothing is copied
        logits = self.logits(codes if w is None else w, labels).movedim(1, -1).float()  # [B, h, w, K]
        if w is not None:
            return (w.movedim(1, -1) * logits.log_softmax(-1)).flatten(1).sum(1)
        nats = F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
        return -nats.view_as(codes).flatten(1).sum(1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        labels: Tensor | None = None,
        given: tuple[Tensor, int] | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int, int], None] | None = None,
        naive: bool = False,
    ) -> Tensor:
        """Draw codes `[n, h, w]`; of `given = (codes, rows)` the first rows are kept and the rest completed.

        Each position takes one uniform number, drawn beforehand, through the inverse of its distribution function; so
        the stepper and the `naive` way (a whole forward pass for every position) draw the same codes from one seed.
        """
        self._check(labels)
        training = self.training
        self.eval()
        h, w = self.grid
        device = next(self.parameters()).device
        uniform = torch.rand(h * w, n, generator=generator, device=generator.device if generator else device).to(device)
        codes = torch.zeros(n, h, w, dtype=torch.int64, device=device)
        kept, rows = given if given else (codes, 0)
        stepper = Naive(self, codes, labels) if naive else self.stepper(n, labels)
        for position in range(h * w):
            row, column = divmod(position, w)
            logits = stepper.logits(row, column)
            if row < rows:
                codes[:, row, column] = kept[:, row, column]
            else:
                codes[:, row, column] = draw(logits, uniform[position], temperature, top_k)
            stepper.see(row, column, codes[:, row, column])
            if progress:
                progress(position + 1, h * w)
        self.train(training)
        return codes

    def _check(self, labels: Tensor | None) -> None:
        if self.num_classes and labels is None:
            raise ValueError(f"this prior is conditional: labels from 0 to {self.num_classes - 1} are needed")


class Naive:
    """The stepper that recomputes everything: the oracle of the fast ones, and what they are measured against."""

    def __init__(self, prior: CodePrior, codes: Tensor, labels: Tensor | None):
        self.prior, self.codes, self.labels = prior, codes, labels

    def logits(self, row: int, column: int) -> Tensor:
        return self.prior.logits(self.codes, self.labels)[:, :, row, column]

    def see(self, row: int, column: int, codes: Tensor) -> None:
        self.codes[:, row, column] = codes


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int) -> Tensor:
    """Codes `[B]` of logits `[B, K]` by inverting the distribution function at uniform numbers `[B]`."""
    device = logits.device
    if device.type == "mps":  # which has no float64
        logits, uniform = logits.cpu(), uniform.cpu()
    logits = logits.double() / temperature
    if top_k and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cumulative = logits.softmax(1).cumsum(1)
    reached = uniform.double().unsqueeze(1) * cumulative[:, -1:]
    return (cumulative <= reached).sum(1).clamp(max=logits.shape[1] - 1).to(device)


def look_up(embedding: nn.Embedding, codes: Tensor) -> Tensor:
    """Embeddings `[B, h, w, n]` of codes `[B, h, w]`, or of assignments `[B, K, h, w]`: mixtures of them."""
    if codes.is_floating_point():
        return codes.movedim(1, -1) @ embedding.weight
    return embedding(codes)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position alone: statistics that cannot tell of the future."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def check_sizes(name: str, minimum: int = 1, **sizes: int) -> None:
    for option, size in sizes.items():
        if size < minimum:
            raise UserError(f"--prior {name}: {option}={size} must be at least {minimum}")


def check_dropout(name: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise UserError(f"--prior {name}: dropout={dropout} must be from 0 to below 1")
