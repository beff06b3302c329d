"""A causal Transformer over codes in raster order.

B batch, h w code grid, L = h w positions, K codes, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.errors import UserError
from vqvae.priors.codes import CodePrior, check_dropout, check_sizes, look_up


class Layer(nn.Module):
    """Pre-norm causal self-attention and an MLP of four times the width (1706.03762; GPT-2's order of norms)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, position: int = 0) -> Tensor:
        """x `[B, L, D]`; or with a cache of keys and values `[B, heads, L, D/heads]`, one position `[B, 1, D]`."""
        parts = self.qkv(self.norm_attention(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if cache:
            for held, fresh in zip(cache, (k, v), strict=True):
                held[:, :, position] = fresh[:, :, 0]
            k, v = (held[:, :, : position + 1] for held in cache)
        p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=cache is None)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), p)
        return x + F.dropout(self.mlp(self.norm_mlp(x)), p)


class Transformer(CodePrior):
    """Causal Transformer: inputs shifted by one position, code embedding tied between input and output.

    Position i is told by a learned vector for its row and one for its column. The class, if any, is added to every
    position.

    layers    causal layers.
    width     D, a multiple of heads.
    heads     attention heads.
    dropout   on attention and on both branches of each layer.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        grid: tuple,
        num_classes: int,
        layers: int = 6,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__(num_codes, grid, num_classes)
        check_sizes("transformer", layers=layers, width=width, heads=heads)
        check_dropout("transformer", dropout)
        if width % heads:
            raise UserError(f"--prior transformer: width={width} must be a multiple of heads={heads}")
        self.embedding = nn.Embedding(num_codes, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.rows, self.columns = (nn.Parameter(torch.zeros(size, width)) for size in grid)
        self.classes = nn.Embedding(num_classes, width) if num_classes else None
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(num_codes))
        for table in (self.embedding.weight, self.start, self.rows, self.columns):
            nn.init.normal_(table, std=0.02)

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        known = look_up(self.embedding, codes).flatten(1, 2)[:, :-1]
        shifted = torch.cat([self.start.expand(len(codes), 1, -1), known], dim=1)  # [B, L, D]
        x = shifted + self._where(labels)
        for layer in self.layers:
            x = layer(x)
        return self._read(x).transpose(1, 2).unflatten(2, self.grid)  # [B, K, h, w]

    def stepper(self, n: int, labels: Tensor | None = None) -> "TransformerStepper":
        return TransformerStepper(self, n, labels)

    def _where(self, labels: Tensor | None) -> Tensor:
        """What every position knows beside the code before it, `[1 or B, L, D]`."""
        where = (self.rows[:, None] + self.columns).flatten(0, 1)[None]
        return where if self.classes is None else where + self.classes(labels)[:, None]

    def _read(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight, self.bias)


class TransformerStepper:
    """Keeps keys and values of the positions seen."""

    def __init__(self, prior: Transformer, n: int, labels: Tensor | None):
        self.prior, self.where = prior, prior._where(labels)
        h, w = prior.grid
        width = prior.start.shape[0]
        heads = prior.layers[0].heads
        zeros = prior.start.new_zeros
        self.caches = [tuple(zeros(n, heads, h * w, width // heads) for _ in "kv") for _ in prior.layers]
        self.before = prior.start.expand(n, -1)  # the embedding of the code before the current position

    def logits(self, row: int, column: int) -> Tensor:
        position = row * self.prior.grid[1] + column
        x = (self.before + self.where[:, position])[:, None]
        for layer, cache in zip(self.prior.layers, self.caches, strict=True):
            x = layer(x, cache, position)
        return self.prior._read(x)[:, 0]

    def see(self, row: int, column: int, codes: Tensor) -> None:
        self.before = self.prior.embedding(codes)
