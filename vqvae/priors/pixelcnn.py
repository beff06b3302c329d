"""Convolutional autoregressive priors over code grids.

Kernels are cropped to the rows and columns before a position, which saves most multiplications with masked zeros.
While sampling, every layer keeps its inputs and computes its output at the current position only.

B batch, h w code grid, K codes, n channels.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.priors.autoregressive import AutoregressivePrior, ChannelNorm, look_up
from vqvae.priors.base import LabelDrop
from vqvae.registry import Passes, Range, checked

Kernel = Annotated[int, Range(3), Passes(lambda k: k % 2 == 1, "odd"), "side of the masked convolutions"]


class Conv(nn.Conv2d):
    """A convolution without padding. An input of the kernel's size takes one matrix product instead.

    That is the case at every step of sampling, where launching a convolution costs far more than computing it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.with_weight(x, self.weight)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[2:] == self.kernel_size:
            return F.linear(x.flatten(1), weight.flatten(1), self.bias)[:, :, None, None]
        return F.conv2d(x, weight, self.bias)


class MaskedConv(Conv):
    """k x k convolution over the rows above a position and what is to its left in its own row.

    With `center` (type B) it also sees the position itself.
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, *, center: bool):
        super().__init__(inputs, outputs, (kernel // 2 + 1, kernel))
        self.radius = kernel // 2
        mask = torch.ones(kernel // 2 + 1, kernel)
        mask[-1, self.radius + center :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.on_padded(F.pad(x, (self.radius, self.radius, self.radius, 0)))

    def on_padded(self, x: Tensor) -> Tensor:
        return self.with_weight(x, self.weight * self.mask)


# applies a masked convolution: to a whole grid, or to one position given the inputs of earlier ones
Convolve = Callable[[MaskedConv, Tensor], Tensor]


class Block(nn.Module):
    """x + 1x1(ReLU(masked k x k(ReLU(1x1(ReLU x))))) at half the width (1601.06759, figure 5), then channel norm."""

    def __init__(self, channels: int, kernel: int, dropout: float):
        super().__init__()
        half = max(1, channels // 2)
        self.before = nn.Sequential(nn.ReLU(), Conv(channels, half, 1), nn.ReLU())
        self.conv = MaskedConv(half, half, kernel, center=True)
        self.after = nn.Sequential(nn.ReLU(), Conv(half, channels, 1), nn.Dropout(dropout))
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor, convolve: Convolve) -> Tensor:
        return self.norm(x + self.after(convolve(self.conv, self.before(x))))


class PixelCNN(AutoregressivePrior):
    """PixelCNN (1601.06759): masked 7x7 of type A, then residual blocks of type B, then two 1x1 convolutions.

    Stacked masked convolutions have a blind spot above a position to the right; gated-pixelcnn has none.
    """

    @checked
    def __init__(
        self,
        *,
        num_codes: int,
        grid: tuple[int, int],
        num_classes: int,
        channels: Annotated[int, Range(1), "channels of the embedding and of every block"] = 64,
        blocks: Annotated[int, Range(1), "residual blocks (10 to 15 in the paper)"] = 10,
        kernel: Kernel = 7,
        head: Annotated[int, Range(1), "width of the 1x1 convolution before the logits"] = 512,
        dropout: Annotated[float, Range(0, below=1), "dropout on each residual branch"] = 0.0,
        label_drop: LabelDrop = 0.0,
    ):
        super().__init__(num_codes, grid, num_classes, label_drop)
        self.embedding = nn.Embedding(num_codes, channels)
        self.first = MaskedConv(channels, channels, kernel, center=False)
        self.classes = nn.Embedding(self.label_rows, channels) if num_classes else None
        self.blocks = nn.ModuleList(Block(channels, kernel, dropout) for _ in range(blocks))
        self.head = nn.Sequential(nn.ReLU(), Conv(channels, head, 1), nn.ReLU(), Conv(head, num_codes, 1))

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.net(look_up(self.embedding, codes).movedim(-1, 1), labels, lambda layer, x: layer(x))

    def stepper(self, n: int, labels: Tensor | None = None) -> "PixelCNNStepper":
        return PixelCNNStepper(self, n, labels)

    def net(self, x: Tensor, labels: Tensor | None, convolve: Convolve) -> Tensor:
        """Logits of embeddings `[B, n, h, w]`, or of one position `[B, n, 1, 1]`, depending on `convolve`."""
        x = convolve(self.first, x)
        if self.classes is not None:
            x = x + self.classes(labels)[:, :, None, None]
        for block in self.blocks:
            x = block(x, convolve)
        return self.head(x)


class PixelCNNStepper:
    """Keeps the padded inputs of every masked convolution and evaluates each at one position."""

    def __init__(self, prior: PixelCNN, n: int, labels: Tensor | None):
        self.prior, self.n, self.labels = prior, n, labels
        self.inputs: dict[MaskedConv, Tensor] = {}

    def logits(self, row: int, column: int) -> Tensor:
        def convolve(layer: MaskedConv, x: Tensor) -> Tensor:
            k, (h, w) = layer.radius, self.prior.grid
            if layer not in self.inputs:
                self.inputs[layer] = x.new_zeros(self.n, layer.in_channels, h + k, w + 2 * k)
            stored = self.inputs[layer]
            stored[:, :, row + k, column + k] = x[:, :, 0, 0]
            return layer.on_padded(stored[:, :, row : row + k + 1, column : column + 2 * k + 1])

        unknown = self.prior.embedding.weight.new_zeros(self.n, self.prior.embedding.embedding_dim, 1, 1)
        return self.prior.net(unknown, self.labels, convolve)[:, :, 0, 0]

    def append(self, row: int, column: int, codes: Tensor) -> None:
        k = self.prior.first.radius
        self.inputs[self.prior.first][:, :, row + k, column + k] = self.prior.embedding(codes)


class GatedLayer(nn.Module):
    """A layer of the Gated PixelCNN (1606.05328, figure 2 and eq. 2; with classes eq. 4).

    The vertical stack v sees the rows above and its own row. The horizontal stack h sees what is to the left in its
    own row, and with `center` (type B) also the position itself. A 1x1 convolution adds v of the row above to h.
    Gates are tanh * sigmoid. Only h has a residual connection; both have channel norm.
    """

    def __init__(self, inputs: int, channels: int, kernel: int, *, center: bool, num_classes: int, dropout: float):
        super().__init__()
        self.radius, self.center = kernel // 2, center
        self.vertical = Conv(inputs, 2 * channels, (self.radius + 1, kernel), bias=False)
        self.horizontal = Conv(inputs, 2 * channels, (1, self.radius + center), bias=False)
        self.down = Conv(2 * channels, 2 * channels, 1)
        self.out = nn.Sequential(Conv(channels, channels, 1), nn.Dropout(dropout))
        self.norm_v, self.norm_h = ChannelNorm(channels), ChannelNorm(channels)
        self.classes = nn.Embedding(num_classes, 2 * channels) if num_classes else None

    def forward(self, v: Tensor, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks `[B, inputs, h, w]` to `[B, n, h, w]`."""
        k = self.radius
        from_v = self.vertical(F.pad(v, (k, k, k, 0)))
        above = F.pad(from_v, (0, 0, 1, 0))[:, :, :-1]  # row r gets the vertical features of row r - 1
        padded = F.pad(h, (k, 0 if self.center else -1))
        return self.next_v(from_v, labels), self.next_h(padded, h, above, labels)

    # next_v and next_h work on a whole grid, on one row and on one position

    def next_v(self, from_v: Tensor, labels: Tensor | None) -> Tensor:
        """The next layer's v, from the vertical convolution's output."""
        return self.norm_v(_gate(self._conditioned(from_v, labels)))

    def next_h(self, padded: Tensor, h: Tensor, above: Tensor, labels: Tensor | None) -> Tensor:
        """The next layer's h, from h with and without padding, and the vertical features of the row above."""
        x = self.out(_gate(self._conditioned(self.horizontal(padded) + self.down(above), labels)))
        return self.norm_h(h + x if self.center else x)

    def _conditioned(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return x if self.classes is None else x + self.classes(labels)[:, :, None, None]


class GatedPixelCNN(AutoregressivePrior):
    """Gated PixelCNN (1606.05328): a vertical and a horizontal stack, which together have no blind spot.

    An input layer of type A, `layers` of type B, ReLU, 1x1 to `head`, ReLU, 1x1 to the logits.
    """

    @checked
    def __init__(
        self,
        *,
        num_codes: int,
        grid: tuple[int, int],
        num_classes: int,
        channels: Annotated[int, Range(1), "channels of both stacks (256 published)"] = 64,
        layers: Annotated[int, Range(1), "gated layers after the input layer (13 published)"] = 5,
        embedding: Annotated[int, Range(1), "channels of the code embedding"] = 64,
        kernel: Kernel = 5,
        head: Annotated[int, Range(1), "width of the 1x1 convolution before the logits"] = 512,
        dropout: Annotated[float, Range(0, below=1), "dropout on each horizontal branch"] = 0.0,
        label_drop: LabelDrop = 0.0,
    ):
        super().__init__(num_codes, grid, num_classes, label_drop)
        self.embedding = nn.Embedding(num_codes, embedding)
        gated = nn.ModuleList(
            GatedLayer(embedding if i == 0 else channels, channels, kernel,
                       center=i > 0, num_classes=self.label_rows, dropout=dropout)
            for i in range(layers + 1)
        )  # fmt: skip
        self.layers = cast(Sequence[GatedLayer], gated)  # ModuleList has no type parameter
        self.head = nn.Sequential(nn.ReLU(), Conv(channels, head, 1), nn.ReLU(), Conv(head, num_codes, 1))

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        v = h = look_up(self.embedding, codes).movedim(-1, 1)
        for layer in self.layers:
            v, h = layer(v, h, labels)
        return self.head(h)

    def stepper(self, n: int, labels: Tensor | None = None) -> "GatedStepper":
        return GatedStepper(self, n, labels)


class GatedStepper:
    """Computes the horizontal stack position by position, and the vertical stack when a row is complete."""

    def __init__(self, prior: GatedPixelCNN, n: int, labels: Tensor | None):
        self.prior, self.labels = prior, labels
        h, w = prior.grid
        zeros = prior.embedding.weight.new_zeros
        # of each layer: vertical features of the row above, and padded inputs of both convolutions
        self.above: list[Tensor] = []
        self.v_inputs: list[Tensor] = []
        self.h_inputs: list[Tensor] = []
        for layer in prior.layers:
            inputs, k = layer.vertical.in_channels, layer.radius
            self.above.append(zeros(n, layer.down.in_channels, 1, w))
            self.v_inputs.append(zeros(n, inputs, h + k, w + 2 * k))
            self.h_inputs.append(zeros(n, inputs, 1, w + k))
        self.unknown = zeros(n, prior.embedding.embedding_dim, 1, 1)

    def logits(self, row: int, column: int) -> Tensor:
        h = self.unknown
        for layer, above, stored in zip(self.prior.layers, self.above, self.h_inputs, strict=True):
            k = layer.radius
            stored[:, :, 0, column + k] = h[:, :, 0, 0]
            window = stored[:, :, :, column : column + k + layer.center]
            h = layer.next_h(window, h, above[:, :, :, column : column + 1], self.labels)
        return self.prior.head(h)[:, :, 0, 0]

    def append(self, row: int, column: int, codes: Tensor) -> None:
        k = self.prior.layers[0].radius
        embedded = self.prior.embedding(codes)
        self.v_inputs[0][:, :, row + k, column + k] = embedded
        self.h_inputs[0][:, :, 0, column + k] = embedded
        if column + 1 == self.prior.grid[1]:
            self._finish_row(row)

    def _finish_row(self, row: int) -> None:
        v = None
        for i, (layer, stored) in enumerate(zip(self.prior.layers, self.v_inputs, strict=True)):
            k, w = layer.radius, self.prior.grid[1]
            if v is not None:
                stored[:, :, row + k, k : k + w] = v[:, :, 0]
            self.above[i] = layer.vertical(stored[:, :, row : row + k + 1])  # [B, 2n, 1, w]
            v = layer.next_v(self.above[i], self.labels)


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()
