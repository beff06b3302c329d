"""Encoders and decoders: pixels to a feature grid, and a code grid back to the likelihood's parameters.

A member holds the sizes and makes the two halves. The projection from features into the code space belongs to the
bottleneck, so that nets and bottlenecks combine freely.

B batch, C channels, H W pixels, h w code grid, D code dimension.
"""

import itertools
import math

import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.errors import UserError


def divisible(image_shape: tuple[int, int, int], stride: int, name: str) -> tuple[int, int]:
    """The code grid of an image under a stride, or a `UserError` that names sizes which divide."""
    _, height, width = image_shape
    if height % stride or width % stride or min(height, width) < stride:
        low = max(stride, min(height, width) // stride * stride)
        raise UserError(
            f"--nets {name}: images of {height}x{width} pixels do not divide by its stride {stride}; "
            f"try --image-size {low} or {low + stride}"
        )
    return height // stride, width // stride


def at_least(minimum: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < minimum:
            raise UserError(f"--nets: {name}={size} must be at least {minimum}")


def initialise_fan_in(module: nn.Module) -> None:
    """Weights from a normal of std 1/sqrt(fan-in) truncated at two std, biases 0: Sonnet's initialisation.

    Beside PyTorch's own it gives activations of unit scale, which is worth several hundred steps at the start.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            # Sonnet counts a transposed convolution's fan-in as kernel area times input channels
            channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            area = 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)
            std = 1 / math.sqrt(channels * area)
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ResidualLayer(nn.Module):
    """h + conv1x1(ReLU(conv3x3(ReLU(h)))), with batch norms before the ReLUs if asked (pre-activation)."""

    def __init__(self, channels: int, hidden: int, *, batch_norm: bool = False):
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else lambda channels: nn.Identity()
        self.residual = nn.Sequential(
            norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, hidden, 3, padding=1, bias=not batch_norm),
            norm(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.residual(h)


class Sonnet:
    """Nets of the Sonnet example (github.com/google-deepmind/sonnet, nets/vqvae.py and its CIFAR-10 notebook).

    Encoder 4x4 stride 2, 4x4 stride 2, 3x3, then `residual_layers` residual layers of `residual_hidden` channels;
    the decoder mirrors it. Code grid [H/4, W/4], `hidden` feature channels.
    """

    def __init__(self, *, image_shape: tuple, hidden: int = 128, residual_hidden: int = 32, residual_layers: int = 2):
        at_least(2, hidden=hidden)
        at_least(1, residual_hidden=residual_hidden)
        at_least(0, residual_layers=residual_layers)
        self.image_channels, self.channels = image_shape[0], hidden
        self.grid = divisible(image_shape, 4, "sonnet")
        self.residual_hidden, self.residual_layers = residual_hidden, residual_layers

    def encoder(self) -> nn.Module:
        n = self.channels
        net = nn.Sequential(
            nn.Conv2d(self.image_channels, n // 2, 4, stride=2, padding=1),  # [B, n/2, H/2, W/2]
            nn.ReLU(),
            nn.Conv2d(n // 2, n, 4, stride=2, padding=1),  # [B, n, h, w]
            nn.ReLU(),
            nn.Conv2d(n, n, 3, padding=1),
            *self._residual_stack(),
        )
        initialise_fan_in(net)
        return net

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.channels
        net = nn.Sequential(
            nn.Conv2d(code_dim, n, 3, padding=1),
            *self._residual_stack(),
            nn.ConvTranspose2d(n, n // 2, 4, stride=2, padding=1),  # [B, n/2, H/2, W/2]
            nn.ReLU(),
            nn.ConvTranspose2d(n // 2, out_channels, 4, stride=2, padding=1),  # [B, C, H, W]
        )
        initialise_fan_in(net)
        return net

    def _residual_stack(self) -> list[nn.Module]:
        layers = [ResidualLayer(self.channels, self.residual_hidden) for _ in range(self.residual_layers)]
        return [*layers, nn.ReLU()]


class Henrhoi:
    """VQ-VAE nets with batch norm (github.com/henrhoi/vae-pytorch): 256 channels throughout, stride 4.

    Encoder 4x4 stride 2, BN, ReLU, 4x4 stride 2, two residual layers (BN, ReLU, 3x3, BN, ReLU, 1x1, add); the
    decoder mirrors it. Code grid [H/4, W/4].
    """

    def __init__(self, *, image_shape: tuple, hidden: int = 256, residual_layers: int = 2):
        at_least(1, hidden=hidden)
        at_least(0, residual_layers=residual_layers)
        self.image_channels, self.channels, self.residual_layers = image_shape[0], hidden, residual_layers
        self.grid = divisible(image_shape, 4, "henrhoi")

    def encoder(self) -> nn.Module:
        n = self.channels
        return nn.Sequential(
            nn.Conv2d(self.image_channels, n, 4, stride=2, padding=1, bias=False),  # [B, n, H/2, W/2]
            nn.BatchNorm2d(n),
            nn.ReLU(),
            nn.Conv2d(n, n, 4, stride=2, padding=1),  # [B, n, h, w]
            *self._residual_layers(n),
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.channels
        return nn.Sequential(
            nn.Conv2d(code_dim, n, 1) if code_dim != n else nn.Identity(),
            *self._residual_layers(n),
            nn.BatchNorm2d(n),
            nn.ReLU(),
            nn.ConvTranspose2d(n, n, 4, stride=2, padding=1, bias=False),  # [B, n, H/2, W/2]
            nn.BatchNorm2d(n),
            nn.ReLU(),
            nn.ConvTranspose2d(n, out_channels, 4, stride=2, padding=1),  # [B, C, H, W]
        )

    def _residual_layers(self, channels: int) -> list[nn.Module]:
        return [ResidualLayer(channels, channels, batch_norm=True) for _ in range(self.residual_layers)]


class ConvVAE:
    """Convolutional VAE nets with a flat latent (github.com/henrhoi/vae-pytorch, image VAE).

    Encoder 3x3 x32, then 3x3 stride 2 x64, x128, x256, ReLU, flattened into one feature vector; decoder
    linear to a x128 grid of stride 8, transposed 4x4 stride 2 x128, x64, x32, conv 3x3. `hidden` scales every width
    (32 as published). Code grid [1, 1].
    """

    def __init__(self, *, image_shape: tuple, hidden: int = 32):
        at_least(1, hidden=hidden)
        self.image_channels, self.hidden = image_shape[0], hidden
        # 28x28 pictures have no stride of 8: there the last halving rounds up, and the decoder crops
        self.inner = (math.ceil(image_shape[1] / 8), math.ceil(image_shape[2] / 8))
        self.size = tuple(image_shape[1:])
        self.channels, self.grid = 8 * hidden * math.prod(self.inner), (1, 1)

    def encoder(self) -> nn.Module:
        n = self.hidden
        return nn.Sequential(
            nn.Conv2d(self.image_channels, n, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(n, 2 * n, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * n, 4 * n, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * n, 8 * n, 3, stride=2, padding=1),  # [B, 8n, ceil(H/8), ceil(W/8)]
            nn.ReLU(),
            nn.Flatten(),
            nn.Unflatten(1, (self.channels, 1, 1)),  # [B, features, 1, 1]
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.hidden
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(code_dim, 4 * n * math.prod(self.inner)),
            nn.ReLU(),
            nn.Unflatten(1, (4 * n, *self.inner)),
            nn.ConvTranspose2d(4 * n, 4 * n, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * n, 2 * n, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * n, n, 4, stride=2, padding=1),
            nn.ReLU(),
            CentreCrop(self.size),
            ToPixels(n, out_channels, 3, padding=1),  # [B, C, H, W]
        )


class MnistConv:
    """Nets of the probabilistic VQ-VAEs: a sequence of `latents` feature vectors of `features` channels, flat in space.

    Encoder 5x5 x32, 5x5 stride 2 x32, 5x5 x64, 5x5 stride 2 x64, then a convolution over all that is left (7x7 at 28
    pixels) to 4 channels per latent, and a linear map to latents * features; the decoder begins with a transposed
    convolution as large, then 5x5 x64, 5x5 stride 2 x64, 5x5 x32, 5x5 stride 2 x32, 5x5 x32, conv 5x5. ELU.
    `hidden` scales the widths (32 as published). Code grid [latents, 1]. Weights start at unit gain: with PyTorch's own
    the features hardly depend on the picture, and soft assignments of such features never leave the uniform.
    """

    def __init__(self, *, image_shape: tuple, hidden: int = 32, latents: int = 10, features: int = 16):
        at_least(1, hidden=hidden, latents=latents, features=features)
        self.image_channels, self.hidden = image_shape[0], hidden
        self.channels, self.grid = features, (latents, 1)
        self.inner = divisible(image_shape, 4, "mnist-conv")

    def encoder(self) -> nn.Module:
        n, latents = self.hidden, self.grid[0]
        net = nn.Sequential(
            nn.Conv2d(self.image_channels, n, 5, padding=2),
            nn.ELU(inplace=True),
            nn.Conv2d(n, n, 5, stride=2, padding=2),  # [B, n, H/2, W/2]
            nn.ELU(inplace=True),
            nn.Conv2d(n, 2 * n, 5, padding=2),
            nn.ELU(inplace=True),
            nn.Conv2d(2 * n, 2 * n, 5, stride=2, padding=2),  # [B, 2n, H/4, W/4]
            nn.ELU(inplace=True),
            nn.Conv2d(2 * n, 4 * latents, self.inner),  # [B, 4L, 1, 1]
            nn.ELU(inplace=True),
            nn.Flatten(),
            nn.Linear(4 * latents, latents * self.channels),
            nn.Unflatten(1, (self.channels, latents, 1)),  # [B, features, L, 1]
        )
        initialise_fan_in(net)
        return net

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.hidden
        net = nn.Sequential(
            nn.Flatten(),
            nn.Unflatten(1, (code_dim * self.grid[0], 1, 1)),
            nn.ConvTranspose2d(code_dim * self.grid[0], 2 * n, self.inner),  # [B, 2n, H/4, W/4]
            nn.ELU(inplace=True),
            nn.ConvTranspose2d(2 * n, 2 * n, 5, padding=2),
            nn.ELU(inplace=True),
            nn.ConvTranspose2d(2 * n, 2 * n, 5, stride=2, padding=2, output_padding=1),  # [B, 2n, H/2, W/2]
            nn.ELU(inplace=True),
            nn.ConvTranspose2d(2 * n, n, 5, padding=2),
            nn.ELU(inplace=True),
            nn.ConvTranspose2d(n, n, 5, stride=2, padding=2, output_padding=1),  # [B, n, H, W]
            nn.ELU(inplace=True),
            nn.ConvTranspose2d(n, n, 5, padding=2),
            nn.ELU(inplace=True),
            ToPixels(n, out_channels, 5, padding=2),  # [B, C, H, W]
        )
        initialise_fan_in(net)
        return net


class PostActivationBlock(nn.Module):
    """ReLU(h + conv1x1(ReLU(conv3x3(h)))): what is skipped is never negative."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, h: Tensor) -> Tensor:
        return (h + self.residual(h)).relu()


class DeepMind:
    """The VQ-VAE nets of github.com/karpathy/deep-vector-quantization (deepmind_enc_dec), n = hidden = 64.

    Encoder 4x4 stride 2 to n, 4x4 stride 2 to 2n, 3x3 to 2n, ReLU after each, two post-activation residual blocks of
    n/2 channels; decoder 3x3 to 2n, ReLU, two blocks, transposed 4x4 stride 2 to n, ReLU, transposed 4x4 stride 2.
    PyTorch's own initialisation, as published. Code grid [H/4, W/4], 2n feature channels.
    """

    def __init__(self, *, image_shape: tuple, hidden: int = 64):
        at_least(2, hidden=hidden)
        self.image_channels, self.hidden, self.channels = image_shape[0], hidden, 2 * hidden
        self.grid = divisible(image_shape, 4, "deepmind")

    def encoder(self) -> nn.Module:
        n = self.hidden
        return nn.Sequential(
            nn.Conv2d(self.image_channels, n, 4, stride=2, padding=1),  # [B, n, H/2, W/2]
            nn.ReLU(),
            nn.Conv2d(n, 2 * n, 4, stride=2, padding=1),  # [B, 2n, h, w]
            nn.ReLU(),
            nn.Conv2d(2 * n, 2 * n, 3, padding=1),
            nn.ReLU(),
            *self._blocks(),
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.hidden
        return nn.Sequential(
            nn.Conv2d(code_dim, 2 * n, 3, padding=1),
            nn.ReLU(),
            *self._blocks(),
            nn.ConvTranspose2d(2 * n, n, 4, stride=2, padding=1),  # [B, n, H/2, W/2]
            nn.ReLU(),
            nn.ConvTranspose2d(n, out_channels, 4, stride=2, padding=1),  # [B, C, H, W]
        )

    def _blocks(self) -> list[nn.Module]:
        return [PostActivationBlock(2 * self.hidden, self.hidden // 2) for _ in range(2)]


class BottleneckBlock(nn.Module):
    """id(h) + gain * residual(h): id a 1x1 where widths differ, residual four ReLU-convolutions at a quarter width.

    `kernels` are their sizes; the small gain makes deep nets start near the identity path (2102.12092, appendix A.1).
    With `upsample`, of h at twice its size (nearest): what is 1x1, the identity path and the first convolution, comes
    before that, where it gives the same for a quarter of the work.
    """

    def __init__(self, channels: int, out_channels: int, *, kernels: tuple, gain: float, upsample: bool = False):
        super().__init__()
        quarter, self.gain = out_channels // 4, gain
        widths = [channels, quarter, quarter, quarter, out_channels]
        self.identity = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        layers = zip(itertools.pairwise(widths), kernels, strict=True)
        self.residual = nn.Sequential(
            *(m for (a, b), size in layers for m in (nn.ReLU(), nn.Conv2d(a, b, size, padding=size // 2)))
        )
        self.resize = nn.Upsample(scale_factor=2, mode="nearest") if upsample else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        first, rest = self.residual[:2], self.residual[2:]
        return self.resize(self.identity(h)).add(rest(self.resize(first(h))), alpha=self.gain)


class DallE:
    """The dVAE nets of DALL-E (2102.12092, appendix A.1; github.com/openai/DALL-E), h = hidden, without the 1x1 to K.

    Encoder 7x7 to h, four groups of residual blocks at h, 2h, 4h, 8h with a 2x2 max-pool after each of the first
    three, ReLU; the map to logits belongs to the bottleneck. Decoder 1x1 from the codes to `init`, groups at 8h, 4h,
    2h, h with nearest upsampling after the first three, ReLU, 1x1. Blocks add 1/(blocks of the net)^2 of their
    residual path; weights N(0, 1/fan-in), biases 0. Code grid [H/8, W/8], 8h feature channels.

    hidden   h: 256 in DALL-E, 64 for CIFAR-10 (deep-vector-quantization).
    blocks   per group.
    init     the decoder's first width.
    """

    def __init__(self, *, image_shape: tuple, hidden: int = 64, blocks: int = 2, init: int = 128):
        at_least(4, hidden=hidden)
        at_least(1, blocks=blocks, init=init)
        self.image_channels, self.hidden, self.blocks, self.init = image_shape[0], hidden, blocks, init
        self.channels, self.grid = 8 * hidden, divisible(image_shape, 8, "dalle")

    def encoder(self) -> nn.Module:
        n = self.hidden
        net = nn.Sequential(
            nn.Conv2d(self.image_channels, n, 7, padding=3),
            *self._groups([n, n, 2 * n, 4 * n, 8 * n], (3, 3, 3, 1), halve=True),  # [B, 8n, h, w]
            nn.ReLU(),
        )
        return self._initialised(net)

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.hidden
        widths = [self.init, 8 * n, 4 * n, 2 * n, n]
        net = nn.Sequential(
            nn.Conv2d(code_dim, self.init, 1),
            *self._groups(widths, (1, 3, 3, 3), halve=False),  # [B, n, H, W]
            nn.ReLU(),
            nn.Conv2d(n, out_channels, 1),
        )
        return self._initialised(net)

    def _groups(self, widths: list[int], kernels: tuple, *, halve: bool) -> list[nn.Module]:
        """Groups of blocks, each after the first at half the size of the one before, or else at twice."""
        shared = {"kernels": kernels, "gain": 1 / ((len(widths) - 1) * self.blocks) ** 2}
        layers: list[nn.Module] = []
        for channels, out_channels in itertools.pairwise(widths):
            later = bool(layers)
            if later and halve:
                layers.append(nn.MaxPool2d(2))
            layers.append(BottleneckBlock(channels, out_channels, upsample=later and not halve, **shared))
            layers += [BottleneckBlock(out_channels, out_channels, **shared) for _ in range(self.blocks - 1)]
        return layers

    def _initialised(self, net: nn.Module) -> nn.Module:
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_channels * math.prod(layer.kernel_size)))
                nn.init.zeros_(layer.bias)
        return net


class ToPixels(nn.Conv2d):
    """A convolution to few channels, of the same size: on a CPU computed as the transposed one of the mirrored kernel.

    They are the same sums; the library that computes them is made for many channels on the side it writes to, and the
    transposed one has them where it reads.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        mirrored = self.weight.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, mirrored, self.bias, padding=self.padding)


class CentreCrop(nn.Module):
    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        top, left = (x.shape[-2] - self.size[0]) // 2, (x.shape[-1] - self.size[1]) // 2
        return x[..., top : top + self.size[0], left : left + self.size[1]]


class MLP:
    """Multilayer perceptrons on the flattened input, for points and very small images; code grid [1, 1].

    `layers` hidden layers of `hidden` ReLU units on each side (one of 32 for the 2-D VAE).
    """

    def __init__(self, *, image_shape: tuple, hidden: int = 32, layers: int = 1):
        at_least(1, hidden=hidden, layers=layers)
        self.image_shape, self.channels, self.layers, self.grid = tuple(image_shape), hidden, layers, (1, 1)

    def encoder(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), *self._hidden(math.prod(self.image_shape)), nn.Unflatten(1, (self.channels, 1, 1))
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        _, height, width = self.image_shape
        return nn.Sequential(
            nn.Flatten(),
            *self._hidden(code_dim),
            nn.Linear(self.channels, out_channels * height * width),
            nn.Unflatten(1, (out_channels, height, width)),
        )

    def _hidden(self, inputs: int) -> list[nn.Module]:
        widths = [inputs] + [self.channels] * self.layers
        return [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]


NETS = {
    "sonnet": Sonnet,
    "henrhoi": Henrhoi,
    "conv-vae": ConvVAE,
    "mnist-conv": MnistConv,
    "deepmind": DeepMind,
    "dalle": DallE,
    "mlp": MLP,
}
