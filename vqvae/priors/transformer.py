"""A causal Transformer over codes in raster order.

B batch, h w code grid, L = h w positions, K codes, D width.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.errors import OptionError
from vqvae.priors.autoregressive import AutoregressivePrior, look_up
from vqvae.registry import Options, Range


class Layer(nn.Module):
    """Causal self-attention and an MLP of four times the width (1706.03762), with norms before both as in GPT-2."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, position: int = 0) -> Tensor:
        """The whole sequence x `[B, L, D]`, or one position `[B, 1, D]` with a cache.

        The cache consists of keys and values, `[B, heads, L, D/heads]`; those of the position are written into it.
        """
        parts = self.qkv(self.norm_attention(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if cache:
            for stored, new in zip(cache, (k, v), strict=True):
                stored[:, :, position] = new[:, :, 0]
            k, v = (stored[:, :, : position + 1] for stored in cache)
        p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=cache is None)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), p)
        return x + F.dropout(self.mlp(self.norm_mlp(x)), p)


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(Options):
    """Size of the Transformer."""

    layers: Annotated[int, Range(1), "causal layers"] = 6
    width: Annotated[int, Range(1), "channels of each position, a multiple of heads"] = 128
    heads: Annotated[int, Range(1), "attention heads"] = 4
    dropout: Annotated[float, Range(0, below=1), "dropout on attention weights and on both branches of a layer"] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise OptionError("", "width", self.width, f"must be a multiple of heads={self.heads}")


class Transformer(AutoregressivePrior):
    """Causal Transformer. The inputs are the codes shifted by one position; input and output share the embedding.

    Positions are encoded by learned row and column embeddings, summed. The embedding of the class is added to every
    position.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        grid: tuple[int, int],
        num_classes: int,
        options: TransformerOptions = TransformerOptions(),
    ):
        super().__init__(num_codes, grid, num_classes)
        self.options, width = options, options.width
        self.embedding = nn.Embedding(num_codes, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.rows, self.columns = (nn.Parameter(torch.zeros(size, width)) for size in grid)
        self.classes = nn.Embedding(num_classes, width) if num_classes else None
        self.layers = nn.ModuleList(Layer(width, options.heads, options.dropout) for _ in range(options.layers))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(num_codes))
        for table in (self.embedding.weight, self.start, self.rows, self.columns):
            nn.init.normal_(table, std=0.02)

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        known = look_up(self.embedding, codes).flatten(1, 2)[:, :-1]
        shifted = torch.cat([self.start.expand(len(codes), 1, -1), known], dim=1)  # [B, L, D]
        x = shifted + self._positions(labels)
        for layer in self.layers:
            x = layer(x)
        return self._output(x).transpose(1, 2).unflatten(2, self.grid)  # [B, K, h, w]

    def stepper(self, n: int, labels: Tensor | None = None) -> "TransformerStepper":
        return TransformerStepper(self, n, labels)

    def _positions(self, labels: Tensor | None) -> Tensor:
        """Embeddings of positions and class, `[1 or B, L, D]`."""
        positions = (self.rows[:, None] + self.columns).flatten(0, 1)[None]
        return positions if self.classes is None else positions + self.classes(labels)[:, None]

    def _output(self, x: Tensor) -> Tensor:
        """Logits `[B, L, K]` of the last layer's output `[B, L, D]`."""
        return F.linear(self.norm(x), self.embedding.weight, self.bias)


class TransformerStepper:
    """Caches keys and values of earlier positions."""

    def __init__(self, prior: Transformer, n: int, labels: Tensor | None):
        self.prior, self.positions = prior, prior._positions(labels)
        h, w = prior.grid
        width, heads = prior.options.width, prior.options.heads
        zeros = prior.start.new_zeros
        self.caches = [tuple(zeros(n, heads, h * w, width // heads) for _ in "kv") for _ in prior.layers]
        self.previous = prior.start.expand(n, -1)  # [B, D], embedding of the previous code

    def logits(self, row: int, column: int) -> Tensor:
        position = row * self.prior.grid[1] + column
        x = (self.previous + self.positions[:, position])[:, None]
        for layer, cache in zip(self.prior.layers, self.caches, strict=True):
            x = layer(x, cache, position)
        return self.prior._output(x)[:, 0]

    def append(self, row: int, column: int, codes: Tensor) -> None:
        self.previous = self.prior.embedding(codes)
