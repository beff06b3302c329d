"""A masked prior: a bidirectional Transformer that predicts unknown codes from known ones, in any order.

B batch, h w code grid, L = h w positions, K codes, D width.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from vqvae import shares
from vqvae.contracts import Latent
from vqvae.priors.autoregressive import look_up
from vqvae.priors.base import LabelDrop, Request, draw, guided, uniform_numbers
from vqvae.priors.transformer import CodeTransformer, TransformerOptions
from vqvae.registry import Range, checked
from vqvae.sampling import Sampling

AT_ONCE = 4096  # positions in one pass when sampling
LOGITS_AT_ONCE = 2**24  # of these positions: 64 MB


@dataclass(frozen=True, kw_only=True)
class MaskedOptions(TransformerOptions):
    blocks: Annotated[int, Range(0), "residual blocks of two 3x3 convolutions, before the attention"] = 4
    layers: Annotated[int, Range(0), "layers of attention"] = 1
    width: Annotated[int, Range(1), "channels of each position, a multiple of heads"] = 64


class Block(nn.Module):
    """A residual block of two 3x3 convolutions, for `[B, D, h, w]`. It starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.branch = nn.Sequential(nn.GroupNorm(1, width), nn.Conv2d(width, width, 3, padding=1), nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Masked(CodeTransformer):
    """Masked prior (MaskGIT: 2202.04200; absorbing diffusion: 2107.03006). p(code_i | known codes) for every unknown i.

    The chain uncovers the codes in a random order s, each drawn given those before: p(x) = E_s prod_i p(x_(s_i) |
    x_(s_1) .. x_(s_(i-1))). `log_prob` estimates the bound of any-order models, which is that of absorbing diffusion
    (2110.02037, eq. 2 and 3), from Jensen's inequality:

        log p(x) >= E_s sum_i log p(x_(s_i) | x_(s_<i)) = E_m E_M L/m sum_(i in M) log p(x_i | x without M)

    for m uniform in 1..L and M a uniform set of m positions. Training maximizes it with one M per example; evaluation
    averages over `draws` of them.

    Residual blocks of convolutions come before the attention. Attention has to learn where the neighbors of a position
    are; convolutions know from the start. On MNIST's 7x7 codes of 128, 200 steps reached 3.1 bits per code with three
    blocks only, and 4.3, in more time, with six layers of attention only.
    """

    sampling_options = (*CodeTransformer.sampling_options, "steps", "choice_temperature")
    exact = False

    @checked
    def __init__(
        self,
        *,
        num_codes: int,
        grid: tuple[int, int],
        num_classes: int,
        draws: Annotated[int, Range(1, 10_000), "sets of masked codes per image that evaluation averages over"] = 4,
        label_drop: LabelDrop = 0.1,
        options: MaskedOptions = MaskedOptions(),
    ):
        super().__init__(num_codes, grid, num_classes, label_drop, options, causal=False)
        self.draws, width = draws, options.width
        self.neighbors = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(options.blocks)))

    def logits(self, codes: Tensor, known: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[B, L, K]` of all positions, given codes `[B, h, w]` (or assignments `[B, K, h, w]`) where `known`.

        `known` `[B, L]` (bool) says which codes the net sees; the others have no influence.
        """
        return self.output(self._features(codes, known, labels))

    def _features(self, codes: Tensor, known: Tensor, labels: Tensor | None) -> Tensor:
        """The last layer's output, `[B, L, D]`."""
        known = known.view(-1, *self.grid, 1)
        embedded = look_up(self.embedding, codes)  # [B, h, w, D]
        x = torch.where(known, embedded, self.start) + self.positions(labels).unflatten(1, self.grid)  # [B, h, w, D]
        neighbors = self.neighbors(embedded.where(known, 0).movedim(-1, 1))
        x = self.blocks(x.movedim(-1, 1) + neighbors).flatten(2).mT  # [B, L, D]
        for layer in self.layers:
            x = layer(x)
        return x

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        """An unbiased estimate of the bound of log p in nats per image, `[B]`, from torch's random numbers.

        With assignments w, each position contributes sum_k w_k log p_k. Raises ValueError if labels are missing or out
        of range.
        """
        w = latent.assignments
        codes = latent.need_codes() if w is None else w
        labels = self.without_some(self.check_labels(len(codes), labels))
        draws = 1 if self.training else self.draws
        sets = [
            shares.mine(masked) for masked in masks(shares.whole(len(codes)), math.prod(self.grid), draws, codes.device)
        ]
        return torch.stack([self.log_prob_of(codes, masked, labels) for masked in sets]).mean(0)

    def log_prob_of(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        """The bound's term of a set M, L/m sum_(i in M) log p(x_i | x without M), `[B]`; `masked` `[B, L]` is M."""
        log_p = self.logits(codes, ~masked, labels).float().log_softmax(-1)  # [B, L, K]
        if codes.is_floating_point():
            of_codes = (codes.flatten(2).mT * log_p).sum(-1)
        else:
            of_codes = log_p.gather(-1, codes.flatten(1).unsqueeze(-1)).squeeze(-1)
        return of_codes.where(masked, 0).sum(1) * (masked.shape[1] / masked.sum(1))

    def draw_codes(self, request: Request) -> Tensor:
        """See `CodePrior.draw_codes`. Draws in a few steps (2202.04200, section 3.2).

        Every step draws a code for each unknown position and keeps those of largest log p + noise. The number of
        unknown codes falls as a quarter of a cosine; every step adds at least one.
        """
        n, how, device = request.n, request.how, self.anchor.device

        def uniform(count: int) -> Tensor:
            return uniform_numbers(n, count, generator=request.generator, device=device)

        codes = request.given.flatten(1).clone()
        length, first = codes.shape[1], request.rows * self.grid[1]
        unknown = torch.arange(first, length, device=device).expand(n, -1)  # [n, positions without a code]
        counts = schedule(length - first, how.steps)
        for step, left in enumerate(counts, 1):
            u = unknown.shape[1]
            drawn, score = self._draw_unknown(codes, unknown, request.labels, uniform(u), how)
            noise = -(-uniform(u).clamp(min=torch.finfo(torch.float32).tiny).log()).log()
            score = score + how.choice_temperature * (1 - step / len(counts)) * noise
            chosen, rest = score.argsort(dim=1, descending=True, stable=True).split([u - left, left], dim=1)
            codes.scatter_(1, unknown.gather(1, chosen), drawn.gather(1, chosen))
            unknown = unknown.gather(1, rest)
            request.progress(length - left, length)
        return codes.view(n, *self.grid)

    def _draw_unknown(
        self, codes: Tensor, unknown: Tensor, labels: Tensor | None, uniform: Tensor, how: Sampling
    ) -> tuple[Tensor, Tensor]:
        """A code for each position `unknown` `[n, U]`, given the codes `[n, L]` of all others, and its log p."""
        drawn, log_p = torch.empty_like(unknown), torch.empty_like(uniform)
        size = max(1, min(AT_ONCE, LOGITS_AT_ONCE // self.num_codes) // codes.shape[1])
        for start in range(0, len(codes), size):
            rows = slice(start, start + size)
            logits = self._of_unknown(
                codes[rows], unknown[rows], None if labels is None else labels[rows], how.guidance
            )  # [rows, U, K]
            found = draw(logits.flatten(0, 1), uniform[rows].flatten(), how).view_as(unknown[rows])
            drawn[rows] = found
            log_p[rows] = logits.log_softmax(-1).gather(-1, found.unsqueeze(-1)).squeeze(-1)
        return drawn, log_p

    def _of_unknown(self, codes: Tensor, unknown: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Logits `[n, U, K]` of the positions `unknown` `[n, U]`, given the codes `[n, L]` of all others."""
        known = torch.ones_like(codes, dtype=torch.bool).scatter(1, unknown, False)
        guides = guidance != 1
        if guides:
            codes, known, unknown = (x.repeat(2, 1) for x in (codes, known, unknown))
            labels = self.with_and_without(labels)
        x = self._features(codes.view(-1, *self.grid), known, labels)
        x = x.gather(1, unknown.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        logits = self.output(x)
        return guided(logits, guidance) if guides else logits


def masks(examples: int, length: int, draws: int, device: torch.device) -> list[Tensor]:
    """`draws` random sets of positions for each example, `[examples, length]` (bool).

    Each has m positions, m uniform in 1..length, and is uniform among the sets of its size. The sizes are spread evenly
    over an example's sets and over the examples, so that the mean varies less (2107.00630, appendix I.1).
    """
    how: Any = {"device": device, "generator": shares.generator(device)}
    offsets = (torch.randperm(examples, **how) + torch.rand(examples, **how)) / max(examples, 1)
    found = []
    for i in range(draws):
        sizes = ((i + offsets) / draws * length).long().clamp(max=length - 1) + 1  # [examples]
        ranks = torch.rand(examples, length, **how).argsort(1).argsort(1)
        found.append(ranks < sizes.unsqueeze(1))
    return found


def schedule(length: int, steps: int) -> list[int]:
    """How many of `length` codes are unknown after each step, down to 0: a cosine, with at least one code per step."""
    steps = min(steps, length)
    left, found = length, []
    for step in range(1, steps + 1):
        wanted = math.floor(length * math.cos(math.pi / 2 * step / steps))
        left = max(min(wanted, left - 1), steps - step)
        found.append(left)
    return found
