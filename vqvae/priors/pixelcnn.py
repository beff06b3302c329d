"""Convolutional autoregressive priors over code grids.

Kernels are cropped to what lies before a position, so nothing is multiplied by a masked zero where cropping can avoid
it. While sampling, every layer keeps its inputs, and computes its output at the current position alone.

B batch, h w code grid, K codes, n channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.errors import UserError
from vqvae.priors.codes import ChannelNorm, CodePrior, check_dropout, check_sizes, look_up


class Conv(nn.Conv2d):
    """A convolution without padding, which on an input of its kernel's size is one matrix product.

    That is the case at every step of sampling, where starting a convolution costs far more than computing it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.with_weight(x, self.weight)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[2:] == self.kernel_size:
            return F.linear(x.flatten(1), weight.flatten(1), self.bias)[:, :, None, None]
        return F.conv2d(x, weight, self.bias)


class MaskedConv(Conv):
    """k x k convolution that sees the rows above, and of its own row what is to the left (and itself: type B)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, centre: bool):
        super().__init__(inputs, outputs, (kernel // 2 + 1, kernel))
        self.reach = kernel // 2
        mask = torch.ones(self.kernel_size)
        mask[-1, self.reach + centre :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.on_padded(F.pad(x, (self.reach, self.reach, self.reach, 0)))

    def on_padded(self, x: Tensor) -> Tensor:
        return self.with_weight(x, self.weight * self.mask)


class Block(nn.Module):
    """x + 1x1(ReLU(masked k x k(ReLU(1x1(ReLU x))))) at half the width (1601.06759, figure 5), then channel norm."""

    def __init__(self, channels: int, kernel: int, dropout: float):
        super().__init__()
        half = max(1, channels // 2)
        self.before = nn.Sequential(nn.ReLU(), Conv(channels, half, 1), nn.ReLU())
        self.conv = MaskedConv(half, half, kernel, centre=True)
        self.after = nn.Sequential(nn.ReLU(), Conv(half, channels, 1), nn.Dropout(dropout))
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor, convolve) -> Tensor:
        return self.norm(x + self.after(convolve(self.conv, self.before(x))))


class PixelCNN(CodePrior):
    """PixelCNN (1601.06759): masked 7x7 of type A, then residual blocks of type B, then two 1x1 convolutions.

    Plain masked convolutions leave a blind spot to the right above a position; gated-pixelcnn has none.

    channels   of the embedding and of every block.
    blocks     residual blocks (10 to 15).
    kernel     side of the masked convolutions, odd.
    head       width of the 1x1 convolution before the logits.
    dropout    on each residual branch.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        grid: tuple,
        num_classes: int,
        channels: int = 64,
        blocks: int = 10,
        kernel: int = 7,
        head: int = 512,
        dropout: float = 0.0,
    ):
        super().__init__(num_codes, grid, num_classes)
        check_sizes("pixelcnn", channels=channels, blocks=blocks, head=head)
        check_dropout("pixelcnn", dropout)
        _check_kernel("pixelcnn", kernel)
        self.embedding = nn.Embedding(num_codes, channels)
        self.first = MaskedConv(channels, channels, kernel, centre=False)
        self.classes = nn.Embedding(num_classes, channels) if num_classes else None
        self.blocks = nn.ModuleList(Block(channels, kernel, dropout) for _ in range(blocks))
        self.head = nn.Sequential(nn.ReLU(), Conv(channels, head, 1), nn.ReLU(), Conv(head, num_codes, 1))

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._net(look_up(self.embedding, codes).movedim(-1, 1), labels, lambda layer, x: layer(x))

    def stepper(self, n: int, labels: Tensor | None = None) -> "PixelCNNStepper":
        return PixelCNNStepper(self, n, labels)

    def _net(self, x: Tensor, labels: Tensor | None, convolve) -> Tensor:
        """The net on a grid, or on one position `[B, n, 1, 1]` when `convolve` knows the positions before it."""
        x = convolve(self.first, x)
        if self.classes is not None:
            x = x + self.classes(labels)[:, :, None, None]
        for block in self.blocks:
            x = block(x, convolve)
        return self.head(x)


class PixelCNNStepper:
    """Keeps the inputs of every masked convolution, padded, and evaluates each at one position."""

    def __init__(self, prior: PixelCNN, n: int, labels: Tensor | None):
        self.prior, self.n, self.labels = prior, n, labels
        self.inputs: dict[MaskedConv, Tensor] = {}

    def _at(self, row: int, column: int):
        def convolve(layer: MaskedConv, x: Tensor) -> Tensor:
            k, (h, w) = layer.reach, self.prior.grid
            if layer not in self.inputs:
                self.inputs[layer] = x.new_zeros(self.n, layer.in_channels, h + k, w + 2 * k)
            held = self.inputs[layer]
            held[:, :, row + k, column + k] = x[:, :, 0, 0]
            return layer.on_padded(held[:, :, row : row + k + 1, column : column + 2 * k + 1])

        return convolve

    def logits(self, row: int, column: int) -> Tensor:
        unknown = self.prior.embedding.weight.new_zeros(self.n, self.prior.embedding.embedding_dim, 1, 1)
        return self.prior._net(unknown, self.labels, self._at(row, column))[:, :, 0, 0]

    def see(self, row: int, column: int, codes: Tensor) -> None:
        reach = self.prior.first.reach
        self.inputs[self.prior.first][:, :, row + reach, column + reach] = self.prior.embedding(codes)


class GatedLayer(nn.Module):
    """A layer of the Gated PixelCNN (1606.05328, figure 2 and eq. 2; with classes eq. 4).

    The vertical stack v sees the rows above and its own; one row lower, and through a 1x1 convolution, it feeds the
    horizontal stack h, which sees what is to the left in its own row (and itself: type B). Gates tanh * sigmoid;
    residual on h alone; channel norm on both.
    """

    def __init__(self, inputs: int, channels: int, kernel: int, *, centre: bool, num_classes: int, dropout: float):
        super().__init__()
        self.reach, self.centre = kernel // 2, centre
        self.vertical = Conv(inputs, 2 * channels, (self.reach + 1, kernel), bias=False)
        self.horizontal = Conv(inputs, 2 * channels, (1, self.reach + centre), bias=False)
        self.down = Conv(2 * channels, 2 * channels, 1)
        self.out = nn.Sequential(Conv(channels, channels, 1), nn.Dropout(dropout))
        self.norm_v, self.norm_h = ChannelNorm(channels), ChannelNorm(channels)
        self.classes = nn.Embedding(num_classes, 2 * channels) if num_classes else None

    def forward(self, v: Tensor, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        k = self.reach
        from_v = self.rows(F.pad(v, (k, k, k, 0)))
        above = F.pad(from_v, (0, 0, 1, 0))[:, :, :-1]  # row r gets what v knows of the rows before r
        padded = F.pad(h, (k, 0 if self.centre else -1))
        return self.gate_v(from_v, labels), self.positions(padded, h, above, labels)

    # each of these works on the whole grid, on one row, and on one position alike

    def rows(self, v: Tensor) -> Tensor:
        return self.vertical(v)

    def gate_v(self, from_v: Tensor, labels: Tensor | None) -> Tensor:
        return self.norm_v(_gate(self._conditioned(from_v, labels)))

    def positions(self, padded: Tensor, h: Tensor, above: Tensor, labels: Tensor | None) -> Tensor:
        x = self.out(_gate(self._conditioned(self.horizontal(padded) + self.down(above), labels)))
        return self.norm_h(h + x if self.centre else x)

    def _conditioned(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return x if self.classes is None else x + self.classes(labels)[:, :, None, None]


class GatedPixelCNN(CodePrior):
    """Gated PixelCNN (1606.05328): vertical and horizontal stacks, so that every earlier position is seen.

    An input layer of type A, `layers` of type B, ReLU, 1x1 to `head`, ReLU, 1x1 to the logits.

    channels   of both stacks; embedding   of the codes.
    layers     gated layers after the first.
    kernel     side of the vertical convolutions, odd.
    head       width of the 1x1 convolution before the logits.
    dropout    on each horizontal branch.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        grid: tuple,
        num_classes: int,
        channels: int = 256,
        layers: int = 13,
        embedding: int = 64,
        kernel: int = 7,
        head: int = 512,
        dropout: float = 0.0,
    ):
        super().__init__(num_codes, grid, num_classes)
        check_sizes("gated-pixelcnn", channels=channels, layers=layers, embedding=embedding, head=head)
        check_dropout("gated-pixelcnn", dropout)
        _check_kernel("gated-pixelcnn", kernel)
        self.embedding = nn.Embedding(num_codes, embedding)
        shared = {"num_classes": num_classes, "dropout": dropout}
        self.layers = nn.ModuleList(
            [GatedLayer(embedding, channels, kernel, centre=False, **shared)]
            + [GatedLayer(channels, channels, kernel, centre=True, **shared) for _ in range(layers)]
        )
        self.head = nn.Sequential(nn.ReLU(), Conv(channels, head, 1), nn.ReLU(), Conv(head, num_codes, 1))

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        v = h = look_up(self.embedding, codes).movedim(-1, 1)
        for layer in self.layers:
            v, h = layer(v, h, labels)
        return self.head(h)

    def stepper(self, n: int, labels: Tensor | None = None) -> "GatedStepper":
        return GatedStepper(self, n, labels)


class GatedStepper:
    """Computes the vertical stack when a row is complete, and the horizontal one a position at a time."""

    def __init__(self, prior: GatedPixelCNN, n: int, labels: Tensor | None):
        self.prior, self.labels = prior, labels
        h, w = prior.grid
        zeros = prior.embedding.weight.new_zeros
        self.above, self.v_inputs, self.h_inputs = [], [], []
        for layer in prior.layers:
            inputs, k = layer.vertical.in_channels, layer.reach
            self.above.append(zeros(n, layer.down.in_channels, 1, w))
            self.v_inputs.append(zeros(n, inputs, h + k, w + 2 * k))
            self.h_inputs.append(zeros(n, inputs, 1, w + k))
        self.unknown = zeros(n, prior.embedding.embedding_dim, 1, 1)

    def logits(self, row: int, column: int) -> Tensor:
        h = self.unknown
        for layer, above, held in zip(self.prior.layers, self.above, self.h_inputs, strict=True):
            k = layer.reach
            held[:, :, 0, column + k] = h[:, :, 0, 0]
            window = held[:, :, :, column : column + k + layer.centre]
            h = layer.positions(window, h, above[:, :, :, column : column + 1], self.labels)
        return self.prior.head(h)[:, :, 0, 0]

    def see(self, row: int, column: int, codes: Tensor) -> None:
        first, k, w = self.v_inputs[0], self.prior.layers[0].reach, self.prior.grid[1]
        embedded = self.prior.embedding(codes)
        first[:, :, row + k, column + k] = embedded
        self.h_inputs[0][:, :, 0, column + k] = embedded
        if column + 1 == w:
            self._finish_row(row)

    def _finish_row(self, row: int) -> None:
        v = None
        for i, (layer, held) in enumerate(zip(self.prior.layers, self.v_inputs, strict=True)):
            k, w = layer.reach, self.prior.grid[1]
            if v is not None:
                held[:, :, row + k, k : k + w] = v[:, :, 0]
            self.above[i] = layer.rows(held[:, :, row : row + k + 1])  # [B, 2n, 1, w]
            v = layer.gate_v(self.above[i], self.labels)


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()


def _check_kernel(name: str, kernel: int) -> None:
    if kernel < 3 or kernel % 2 == 0:
        raise UserError(f"--prior {name}: kernel={kernel} must be odd, and at least 3")
