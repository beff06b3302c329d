"""A Transformer over codes, in raster order or scale after scale, and the net that it shares with the masked prior.

B batch, h w code grid, L = h w positions, K codes, D width.
"""

import itertools
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.devices import attention, linear
from vqvae.errors import OptionError
from vqvae.priors.autoregressive import AutoregressivePrior, look_up
from vqvae.priors.base import CodePrior, LabelDrop
from vqvae.registry import Options, Range, checked


class Linear(nn.Linear):
    """`nn.Linear` by the fastest product of the machine."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Layer(nn.Module):
    """Self-attention and an MLP of four times the width (1706.03762), with norms before both as in GPT-2."""

    def __init__(self, width: int, heads: int, dropout: float, *, causal: bool):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0, mask: Tensor | None = None
    ) -> Tensor:
        """Process the whole sequence x `[B, L, D]` or, with a cache, the n positions from `start` on, `[B, n, D]`.

        The cache has the keys and the values, `[B, heads, L, D/heads]` each. Those of the n positions are written into
        it, and these positions see each other and all earlier ones. `mask` `[L, L]` says which position (row) sees
        which.
        """
        parts = self.qkv(self.norm_attention(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if cache:
            end = start + x.shape[1]
            for stored, new in zip(cache, (k, v), strict=True):
                stored[:, :, start:end] = new
            k, v = (stored[:, :, :end] for stored in cache)
        p = self.dropout if self.training else 0.0
        causal = self.causal and cache is None
        attended = attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), p)
        return x + F.dropout(self.mlp(self.norm_mlp(x)), p)


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(Options):
    """Size of the Transformer."""

    layers: Annotated[int, Range(1), "layers of attention"] = 6
    width: Annotated[int, Range(1), "channels of each position, a multiple of heads"] = 128
    heads: Annotated[int, Range(1), "attention heads"] = 4
    dropout: Annotated[float, Range(0, below=1), "dropout on attention weights and on both branches of a layer"] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise OptionError("width", self.width, f"must be a multiple of heads={self.heads}")


class CodeTransformer(CodePrior):
    """Embeddings, layers of attention and logits. `start` is the input where no code is known.

    Positions are encoded by learned row and column embeddings, summed. The embedding of the class is added to every
    position. Input and output share the embedding of the codes.
    """

    optimizer = "muon"

    def __init__(
        self,
        num_codes: int,
        grid: tuple[int, int],
        num_classes: int,
        label_drop: float,
        options: TransformerOptions,
        *,
        causal: bool,
    ):
        super().__init__(num_codes, grid, num_classes, label_drop)
        self.options, width = options, options.width
        self.embedding = nn.Embedding(num_codes, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.rows, self.columns = (nn.Parameter(torch.zeros(size, width)) for size in grid)
        self.classes = nn.Embedding(self.label_rows, width) if num_classes else None
        self.layers = nn.ModuleList(
            Layer(width, options.heads, options.dropout, causal=causal) for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(num_codes))
        for table in (self.embedding.weight, self.start, self.rows, self.columns):
            nn.init.normal_(table, std=0.02)

    def positions(self, labels: Tensor | None) -> Tensor:
        """Embeddings of positions and class, `[1 or B, L, D]`."""
        positions = (self.rows[:, None] + self.columns).flatten(0, 1)[None]
        return positions if self.classes is None else positions + self.classes(labels)[:, None]

    def output(self, x: Tensor) -> Tensor:
        """Logits `[B, n, K]` of the last layer's output `[B, n, D]`."""
        return linear(self.norm(x), self.embedding.weight, self.bias)


class Transformer(CodeTransformer, AutoregressivePrior):
    """Causal Transformer. The inputs are the codes shifted by one position.

    Multi-scale codes are predicted scale after scale instead (VAR: 2404.02905, figure 4): all codes of a scale at once,
    given those of the coarser scales. The input of a position is the code that covers it in the scale before.
    """

    scale: Tensor  # [L], which scale a position belongs to
    source: Tensor  # [L], index of a position's input in [start, code 1, code 2, ...]

    @checked
    def __init__(
        self,
        *,
        num_codes: int,
        grid: tuple[int, int],
        num_classes: int,
        scales: tuple[tuple[int, int], ...],
        label_drop: LabelDrop = 0.0,
        options: TransformerOptions = TransformerOptions(),
    ):
        super().__init__(num_codes, grid, num_classes, label_drop, options, causal=not scales)
        length = grid[0] * grid[1]
        sizes = [h * w for h, w in scales] if scales else [1] * length
        self.ends = torch.tensor(sizes).cumsum(0).tolist()  # of the blocks of positions that are predicted at once
        self.register_buffer("scale", torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), persistent=False)
        self.register_buffer("source", sources(scales) if scales else torch.arange(length), persistent=False)

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        known = look_up(self.embedding, codes).flatten(1, 2)[:, :-1]
        inputs = torch.cat([self.start.expand(len(codes), 1, -1), known], dim=1)  # [B, L, D]
        mask = None
        if len(self.ends) < inputs.shape[1]:
            inputs, mask = inputs[:, self.source], self.scale[:, None] >= self.scale
        x = inputs + self.positions(labels)
        for layer in self.layers:
            x = layer(x, mask=mask)
        return self.output(x).transpose(1, 2).unflatten(2, self.grid)  # [B, K, h, w]

    def stepper(self, n: int, labels: Tensor | None = None) -> "TransformerStepper":
        return TransformerStepper(self, n, labels)


def sources(scales: tuple[tuple[int, int], ...]) -> Tensor:
    """For each position, 1 + the index of the code that covers it in the previous scale; 0 in the first scale."""
    parts, first = [torch.zeros(scales[0][0] * scales[0][1], dtype=torch.int64)], 1
    for (h, w), (height, width) in itertools.pairwise(scales):
        rows, columns = torch.arange(height) * h // height, torch.arange(width) * w // width
        parts.append((first + rows[:, None] * w + columns).flatten())
        first += h * w
    return torch.cat(parts)


class TransformerStepper:
    """Caches keys and values of earlier positions, and computes the logits of a whole block at its first position."""

    def __init__(self, prior: Transformer, n: int, labels: Tensor | None):
        self.prior, self.positions = prior, prior.positions(labels)
        length = prior.grid[0] * prior.grid[1]
        width, heads = prior.options.width, prior.options.heads
        zeros = prior.start.new_zeros
        self.caches = [tuple(zeros(n, heads, length, width // heads) for _ in "kv") for _ in prior.layers]
        self.inputs = torch.cat([prior.start.expand(n, 1, -1), zeros(n, length, width)], dim=1)
        self.first, self.block, self.ends = 0, zeros(n, 0, prior.num_codes), iter(prior.ends)

    def logits(self, row: int, column: int) -> Tensor:
        position = row * self.prior.grid[1] + column
        if position == self.first + self.block.shape[1]:
            self.first, end = position, next(self.ends)
            x = self.inputs[:, self.prior.source[position:end]] + self.positions[:, position:end]
            for layer, cache in zip(self.prior.layers, self.caches, strict=True):
                x = layer(x, cache, position)
            self.block = self.prior.output(x)
        return self.block[:, position - self.first]

    def append(self, row: int, column: int, codes: Tensor) -> None:
        self.inputs[:, 1 + row * self.prior.grid[1] + column] = self.prior.embedding(codes)
