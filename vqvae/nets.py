"""Encoders and decoders: pixels to a feature grid, and codes to the likelihood's parameters.

A member keeps the sizes and builds the encoder and the decoder. The projection from features to the code space
belongs to the bottleneck, so that nets and bottlenecks combine freely. ReLUs overwrite their input, which saves 1% of a
training step, unless a skip connection needs it.

B batch, C channels, H W pixels, h w code grid, D code dimension.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import vqgan
from vqvae.batch_norm import BatchNorm
from vqvae.contracts import Nets
from vqvae.errors import OptionError
from vqvae.registry import Passes, Range, Size, checked, whole_numbers

ImageShape = tuple[int, int, int]  # (C, H, W)
POINT = (2, 1, 1)


def divisible(image_shape: ImageShape, stride: int) -> tuple[int, int]:
    """The code grid (h, w) of an image under a stride. Raises `OptionError` with sizes that divide, and for points."""
    channels, height, width = image_shape
    if (channels, height, width) == POINT:
        raise OptionError("nets", None, "must be mlp or conv-vae, because the data are points of the plane")
    if height % stride or width % stride:
        lower = [max(stride, side // stride * stride) for side in (height, width)]
        upper = [-(-side // stride) * stride for side in (height, width)]
        upper = upper if upper != lower else [side + stride for side in lower]
        size, low, high = (Size(sides) for sides in ((height, width), lower, upper))
        raise OptionError("image_size", size, f"does not divide by {stride}; try {low} or {high}")
    return height // stride, width // stride


def initialize_fan_in(net: nn.Sequential, *, truncate: bool = True) -> nn.Sequential:
    """Draw weights from a normal of std 1/sqrt(fan-in), truncated at two std, and set biases to 0, as Sonnet does.

    Activations then start at unit scale, which saves several hundred steps compared with PyTorch's own initialization.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            # Sonnet counts a transposed convolution's fan-in as kernel area times input channels
            channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            area = 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)
            std = 1 / math.sqrt(channels * area)
            if truncate:
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


@torch.no_grad()
def keep_scale(layers: Iterable[nn.Module]) -> None:
    """Scale the weights that `initialize_fan_in` drew, so that each convolution and its ReLU keep the second moment.

    A ReLU halves it. Sonnet's fan-in of a transposed convolution counts all taps of the kernel, but an output pixel
    sees only one in stride x stride of them.
    """
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            seen = math.prod(layer.stride) if isinstance(layer, nn.ConvTranspose2d) else 1
            layer.weight.mul_(math.sqrt(2 * seen))


class ResidualLayer(nn.Module):
    """h + conv1x1(ReLU(conv3x3(ReLU(h)))), with a batch norm before each ReLU on request (pre-activation)."""

    def __init__(self, channels: int, hidden: int, *, batch_norm: bool = False):
        super().__init__()
        norm: Callable[[int], nn.Module] = BatchNorm if batch_norm else nn.Identity
        self.residual = nn.Sequential(
            norm(channels),
            nn.ReLU(inplace=batch_norm),  # else of h itself, which the sum needs
            nn.Conv2d(channels, hidden, 3, padding=1, bias=not batch_norm),
            norm(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.residual(h)


class Sonnet(Nets):
    """Nets of the Sonnet example (github.com/google-deepmind/sonnet, nets/vqvae.py and its CIFAR-10 notebook).

    Encoder: 4x4 stride 2, 4x4 stride 2, 3x3, then residual layers. The decoder mirrors it. Code grid [H/4, W/4].
    downsample=8 and 16 add one or two more 4x4 stride 2, with as many channels as the features have. They start with
    larger weights than Sonnet's, which would shrink the signal further. At stride 8, on photographs of 64 pixels and
    without quantization, the error after 150 steps was 0.017 with them and 0.030 without.
    """

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(2), "channels of the features"] = 128,
        residual_hidden: Annotated[int, Range(1), "hidden channels of a residual layer"] = 32,
        residual_layers: Annotated[int, Range(0), "residual layers of each net"] = 2,
        downsample: Annotated[
            int, Passes(lambda n: n in (4, 8, 16), "4, 8 or 16"), "stride of the code grid: 4, 8 or 16 pixels per code"
        ] = 4,
    ):
        self.image_channels, self.channels = image_shape[0], hidden
        self.grid = divisible(image_shape, downsample)
        self.residual_hidden, self.residual_layers = residual_hidden, residual_layers
        self.more_halvings = {4: 0, 8: 1, 16: 2}[downsample]

    def encoder(self) -> nn.Module:
        n, more = self.channels, self._more(nn.Conv2d)
        net = initialize_fan_in(
            nn.Sequential(
                nn.Conv2d(self.image_channels, n // 2, 4, stride=2, padding=1),  # [B, n/2, H/2, W/2]
                nn.ReLU(inplace=True),
                nn.Conv2d(n // 2, n, 4, stride=2, padding=1),  # [B, n, H/4, W/4]
                nn.ReLU(inplace=True),
                *more,  # [B, n, h, w]
                nn.Conv2d(n, n, 3, padding=1),
                *self._residual_stack(),
            )
        )
        keep_scale(more)
        return net

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n, more = self.channels, self._more(nn.ConvTranspose2d)
        net = initialize_fan_in(
            nn.Sequential(
                nn.Conv2d(code_dim, n, 3, padding=1),
                *self._residual_stack(),
                *more,  # [B, n, H/4, W/4]
                nn.ConvTranspose2d(n, n // 2, 4, stride=2, padding=1),  # [B, n/2, H/2, W/2]
                nn.ReLU(inplace=True),
                DoubleToPixels(n // 2, out_channels),  # [B, C, H, W]
            )
        )
        keep_scale(more)
        return net

    def _more(self, convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d]) -> list[nn.Module]:
        """The halvings, or doublings, beyond the published two."""
        n = self.channels
        layers = [(convolution(n, n, 4, stride=2, padding=1), nn.ReLU(inplace=True)) for _ in range(self.more_halvings)]
        return [*itertools.chain.from_iterable(layers)]

    def _residual_stack(self) -> list[nn.Module]:
        layers = [ResidualLayer(self.channels, self.residual_hidden) for _ in range(self.residual_layers)]
        return [*layers, nn.ReLU(inplace=True)]


class Henrhoi(Nets):
    """VQ-VAE nets with batch norm (github.com/henrhoi/vae-pytorch): the same number of channels throughout, stride 4.

    Encoder: 4x4 stride 2, BN, ReLU, 4x4 stride 2, then residual layers (BN, ReLU, 3x3, BN, ReLU, 1x1, add). The
    decoder mirrors it. Code grid [H/4, W/4].
    """

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(1), "channels of every layer"] = 256,
        residual_layers: Annotated[int, Range(0), "residual layers of each net"] = 2,
    ):
        self.image_channels, self.channels, self.residual_layers = image_shape[0], hidden, residual_layers
        self.grid = divisible(image_shape, 4)
        if self.grid == (1, 1):  # with a batch of one image, batch norm would get one vector
            raise OptionError("image_size", 4, "gives the batch norm of henrhoi a single vector per image; try 8")

    def encoder(self) -> nn.Module:
        n = self.channels
        return nn.Sequential(
            nn.Conv2d(self.image_channels, n, 4, stride=2, padding=1, bias=False),  # [B, n, H/2, W/2]
            BatchNorm(n),
            nn.ReLU(inplace=True),
            nn.Conv2d(n, n, 4, stride=2, padding=1),  # [B, n, h, w]
            *self._residual_layers(),
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.channels
        return nn.Sequential(
            nn.Conv2d(code_dim, n, 1) if code_dim != n else nn.Identity(),
            *self._residual_layers(),
            BatchNorm(n),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(n, n, 4, stride=2, padding=1, bias=False),  # [B, n, H/2, W/2]
            BatchNorm(n),
            nn.ReLU(inplace=True),
            DoubleToPixels(n, out_channels),  # [B, C, H, W]
        )

    def _residual_layers(self) -> list[nn.Module]:
        return [ResidualLayer(self.channels, self.channels, batch_norm=True) for _ in range(self.residual_layers)]


class PostNormBlock(nn.Module):
    """h + BN(conv1x1(ReLU(BN(conv3x3(ReLU(h))))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            BatchNorm(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1),
            BatchNorm(channels),
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.residual(h)


class SQVAE(Nets):
    """Nets of SQ-VAE with batch norm (github.com/sony/sqvae, vision; 2205.07547), n = hidden.

    Encoder: 4x4 stride 2 to n/2, BN, ReLU, 4x4 stride 2 to n, then residual blocks (ReLU, 3x3, BN, ReLU, 1x1, BN, add).
    With `middle`, as published for CIFAR-10, BN, ReLU, 3x3, BN, ReLU come before the blocks. The decoder mirrors it.
    Code grid [H/4, W/4]: 7x7 of MNIST's 28 pixels, which are not padded.

    The published decoder ends in a sigmoid: that is --likelihood mse pixels=sigmoid. Weights start from N(0, 0.02^2),
    the scales of batch norm from N(1, 0.02^2). The published code dimension is n; codes of another one are first mapped
    to n channels by a 1x1 convolution.
    """

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(2), "n, channels of the features"] = 64,
        residual_layers: Annotated[int, Range(0), "residual blocks of each net"] = 2,
        middle: Annotated[bool, "3x3 convolution before the blocks, as for CIFAR-10"] = False,
    ):
        self.image_channels, self.channels = image_shape[0], hidden
        self.residual_layers, self.middle = residual_layers, middle
        self.grid = divisible(image_shape, 4)
        if self.grid == (1, 1):  # with a batch of one image, batch norm would get one vector
            raise OptionError("image_size", 4, "gives the batch norm of sqvae a single vector per image; try 8")

    def encoder(self) -> nn.Module:
        n = self.channels
        middle = [BatchNorm(n), nn.ReLU(inplace=True), nn.Conv2d(n, n, 3, padding=1)]
        middle += [BatchNorm(n), nn.ReLU(inplace=True)]
        return _initialize_small(
            nn.Sequential(
                nn.Conv2d(self.image_channels, n // 2, 4, stride=2, padding=1),  # [B, n/2, H/2, W/2]
                BatchNorm(n // 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(n // 2, n, 4, stride=2, padding=1),  # [B, n, h, w]
                *(middle if self.middle else []),
                *self._blocks(),
            )
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.channels
        middle = [nn.ConvTranspose2d(n, n, 3, padding=1), BatchNorm(n), nn.ReLU(inplace=True)]
        return _initialize_small(
            nn.Sequential(
                nn.Conv2d(code_dim, n, 1) if code_dim != n else nn.Identity(),
                *self._blocks(),
                *(middle if self.middle else []),
                nn.ConvTranspose2d(n, n // 2, 4, stride=2, padding=1),  # [B, n/2, H/2, W/2]
                BatchNorm(n // 2),
                nn.ReLU(inplace=True),
                DoubleToPixels(n // 2, out_channels),  # [B, C, H, W]
            )
        )

    def _blocks(self) -> list[nn.Module]:
        return [PostNormBlock(self.channels) for _ in range(self.residual_layers)]


def _initialize_small(net: nn.Sequential) -> nn.Sequential:
    """Draw weights from N(0, 0.02^2), and the scales of batch norm from N(1, 0.02^2), as DCGAN does."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(layer, BatchNorm):
            nn.init.normal_(layer.weight, mean=1.0, std=0.02)
    return net


class ConvVAE(Nets):
    """Convolutional VAE nets with a flat latent (github.com/henrhoi/vae-pytorch, image VAE), n = hidden.

    Encoder: 3x3 to n, then 3x3 stride 2 to 2n, 4n, 8n, ReLU, flattened into one feature vector. Decoder: linear to a
    grid of stride 8 with 4n channels, transposed 4x4 stride 2 to 4n, 2n, n, conv 3x3. Code grid [1, 1].
    """

    spatial = False

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(1), "n, unit of all widths (32 as published)"] = 32,
    ):
        self.image_channels, self.hidden = image_shape[0], hidden
        # 28 pixels do not divide by 8: the encoder's last stride rounds up, and the decoder crops
        self.inner = (math.ceil(image_shape[1] / 8), math.ceil(image_shape[2] / 8))
        self.size = (image_shape[1], image_shape[2])
        self.channels, self.grid = 8 * hidden * math.prod(self.inner), (1, 1)

    def encoder(self) -> nn.Module:
        n = self.hidden
        return nn.Sequential(
            nn.Conv2d(self.image_channels, n, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n, 2 * n, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * n, 4 * n, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * n, 8 * n, 3, stride=2, padding=1),  # [B, 8n, ceil(H/8), ceil(W/8)]
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Unflatten(1, (self.channels, 1, 1)),  # [B, features, 1, 1]
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.hidden
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(code_dim, 4 * n * math.prod(self.inner)),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, (4 * n, *self.inner)),
            nn.ConvTranspose2d(4 * n, 4 * n, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(4 * n, 2 * n, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * n, n, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            CenterCrop(self.size),
            ToPixels(n, out_channels, 3),  # [B, C, H, W]
        )


class MnistConv(Nets):
    """Nets of the probabilistic VQ-VAEs, n = hidden: the features are a sequence of L = latents vectors.

    Encoder: 5x5 to n, 5x5 stride 2 to n, 5x5 to 2n, 5x5 stride 2 to 2n, a convolution over the whole grid (7x7 at 28
    pixels) to 4 channels per latent, and a linear map to the features. Decoder: a transposed convolution of the same
    size, 5x5 to 2n, 5x5 stride 2 to 2n, 5x5 to n, 5x5 stride 2 to n, 5x5 to n, conv 5x5. ELU. Code grid [L, 1].

    Weights start at unit gain. With PyTorch's own initialization the features hardly depend on the image, and soft
    assignments stay uniform.
    """

    spatial = False

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(1), "n, unit of all widths (32 as published)"] = 32,
        latents: Annotated[int, Range(1), "L, vectors per image"] = 10,
        features: Annotated[int, Range(1), "channels of each vector"] = 16,
    ):
        self.image_channels, self.hidden = image_shape[0], hidden
        self.channels, self.grid = features, (latents, 1)
        self.inner = divisible(image_shape, 4)

    def encoder(self) -> nn.Module:
        n, latents = self.hidden, self.grid[0]
        return initialize_fan_in(
            nn.Sequential(
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
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n, latents = self.hidden, self.grid[0]
        return initialize_fan_in(
            nn.Sequential(
                nn.Flatten(),
                nn.Unflatten(1, (code_dim * latents, 1, 1)),
                nn.ConvTranspose2d(code_dim * latents, 2 * n, self.inner),  # [B, 2n, H/4, W/4]
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
                ToPixels(n, out_channels, 5),  # [B, C, H, W]
            )
        )


class PostActivationBlock(nn.Module):
    """ReLU(h + conv1x1(ReLU(conv3x3(h)))), so that the residual stream is never negative."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, h: Tensor) -> Tensor:
        return (h + self.residual(h)).relu_()


class DeepMind(Nets):
    """VQ-VAE nets of github.com/karpathy/deep-vector-quantization (deepmind_enc_dec), n = hidden.

    Encoder: 4x4 stride 2 to n, 4x4 stride 2 to 2n, 3x3 to 2n, each with ReLU, two post-activation residual blocks of
    n/2 channels. Decoder: 3x3 to 2n, ReLU, two blocks, transposed 4x4 stride 2 to n, ReLU, transposed 4x4 stride 2.
    PyTorch's own initialization, as published. Code grid [H/4, W/4], 2n feature channels.
    """

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(2), "n, unit of all widths (64 as published)"] = 64,
    ):
        self.image_channels, self.hidden, self.channels = image_shape[0], hidden, 2 * hidden
        self.grid = divisible(image_shape, 4)

    def encoder(self) -> nn.Module:
        n = self.hidden
        return nn.Sequential(
            nn.Conv2d(self.image_channels, n, 4, stride=2, padding=1),  # [B, n, H/2, W/2]
            nn.ReLU(inplace=True),
            nn.Conv2d(n, 2 * n, 4, stride=2, padding=1),  # [B, 2n, h, w]
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * n, 2 * n, 3, padding=1),
            nn.ReLU(inplace=True),
            *self._blocks(),
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.hidden
        return nn.Sequential(
            nn.Conv2d(code_dim, 2 * n, 3, padding=1),
            nn.ReLU(inplace=True),
            *self._blocks(),
            nn.ConvTranspose2d(2 * n, n, 4, stride=2, padding=1),  # [B, n, H/2, W/2]
            nn.ReLU(inplace=True),
            DoubleToPixels(n, out_channels),  # [B, C, H, W]
        )

    def _blocks(self) -> list[nn.Module]:
        return [PostActivationBlock(2 * self.hidden, self.hidden // 2) for _ in range(2)]


class BottleneckBlock(nn.Module):
    """id(h) + gain * residual(h), the block of DALL-E's nets (2102.12092, appendix A.1).

    id is a 1x1 convolution where widths differ. residual is four ReLU-convolutions at a quarter of the width, with
    the given kernel sizes. The small gain makes deep nets start near the identity.

    With `upsample`, the block applies to h at twice its size (nearest). Its 1x1 convolutions on h come before the
    upsampling, which gives the same result for a quarter of the work; the first kernel must be 1.
    """

    def __init__(
        self, channels: int, out_channels: int, *, kernels: tuple[int, ...], gain: float, upsample: bool = False
    ):
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


class DallE(Nets):
    """The dVAE nets of DALL-E (2102.12092, appendix A.1; github.com/openai/DALL-E), n = hidden.

    Encoder: 7x7 to n, four groups of residual blocks at n, 2n, 4n, 8n with a 2x2 max-pool after each of the first
    three, ReLU. The published encoder ends in a 1x1 to K logits, which here belongs to the bottleneck. Decoder: 1x1
    from the codes to `init`, groups at 8n, 4n, 2n, n with nearest upsampling after the first three, ReLU, 1x1.

    Blocks add 1/(blocks of the net)^2 of their residual path. Weights start from N(0, 1/fan-in), biases from 0. Code
    grid [H/8, W/8], 8n feature channels.
    """

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(4), "n, unit of all widths (256 in DALL-E)"] = 64,
        blocks: Annotated[int, Range(1), "residual blocks per group"] = 2,
        init: Annotated[int, Range(1), "channels of the decoder's first layer"] = 128,
    ):
        self.image_channels, self.hidden, self.blocks, self.init = image_shape[0], hidden, blocks, init
        self.channels, self.grid = 8 * hidden, divisible(image_shape, 8)

    def encoder(self) -> nn.Module:
        n = self.hidden
        net = nn.Sequential(
            nn.Conv2d(self.image_channels, n, 7, padding=3),
            *self._groups([n, n, 2 * n, 4 * n, 8 * n], (3, 3, 3, 1), downsample=True),  # [B, 8n, h, w]
            nn.ReLU(inplace=True),
        )
        return initialize_fan_in(net, truncate=False)

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        n = self.hidden
        net = nn.Sequential(
            nn.Conv2d(code_dim, self.init, 1),
            *self._groups([self.init, 8 * n, 4 * n, 2 * n, n], (1, 3, 3, 3), downsample=False),  # [B, n, H, W]
            nn.ReLU(inplace=True),
            nn.Conv2d(n, out_channels, 1),
        )
        return initialize_fan_in(net, truncate=False)

    def _groups(self, widths: list[int], kernels: tuple[int, ...], *, downsample: bool) -> list[nn.Module]:
        """Groups of blocks; every group after the first works at half the size of the previous one, or at twice."""
        gain = 1 / ((len(widths) - 1) * self.blocks) ** 2
        layers: list[nn.Module] = []
        for channels, out_channels in itertools.pairwise(widths):
            later = bool(layers)
            if later and downsample:
                layers.append(nn.MaxPool2d(2))
            upsample = later and not downsample
            layers.append(BottleneckBlock(channels, out_channels, kernels=kernels, gain=gain, upsample=upsample))
            for _ in range(self.blocks - 1):
                layers.append(BottleneckBlock(out_channels, out_channels, kernels=kernels, gain=gain))
        return layers


def _are_multipliers(text: str) -> bool:
    return all(1 <= n <= 64 for n in whole_numbers(text)) and len(whole_numbers(text)) <= 8


class VQGAN(Nets):
    """The nets that image tokenizers share (VQGAN, 2012.09841; latent diffusion, 2112.10752), n = hidden.

    Encoder: 3x3 to n, levels of residual blocks (group norm, swish, 3x3, twice) with a 3x3 stride 2 between them, two
    blocks with attention between them, group norm, swish, 3x3 to `features`. The decoder mirrors it with nearest
    upsampling, and has one block more per level. The bottleneck's projection is the published quant_conv.

    ch_mult has one number per level, its channels in units of n. L levels give the code grid [H/s, W/s] with
    s = 2^(L-1): 1,2,2 has stride 4, 1,1,2,2 stride 8 and 1,1,2,2,4 stride 16. As published for images of 256 pixels:
    hidden=128 ch_mult=1,1,2,2,4 num_res_blocks=2 features=256 groups=32 attention=16 (29.3M + 42.5M parameters).
    """

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(1), "n (ch), unit of all widths (128 as published)"] = 32,
        ch_mult: Annotated[
            str,
            Passes(_are_multipliers, "1 to 8 whole numbers from 1 to 64, separated by commas"),
            "channels of each level in units of n; L numbers give a stride of 2^(L-1)",
        ] = "1,2,2",
        num_res_blocks: Annotated[int, Range(1, 64), "residual blocks per level of the encoder"] = 1,
        features: Annotated[int, Range(1), "channels of the features (z_channels)"] = 64,
        attention: Annotated[
            str,
            Passes(lambda text: text == "none" or 0 not in whole_numbers(text), "none, or strides separated by commas"),
            "levels with attention after every block, by their stride (attn_resolutions=16 at 256 pixels is 16)",
        ] = "none",
        middle_attention: Annotated[bool, "attention between the two middle blocks"] = True,
        groups: Annotated[int, Range(1), "groups of group norm; or the next lower number that divides all widths"] = 8,
    ):
        multipliers = whole_numbers(ch_mult)
        strides = [2**i for i in range(len(multipliers))]
        attending = [] if attention == "none" else whole_numbers(attention)
        if unknown := [stride for stride in attending if stride not in strides]:
            problem = f"has {unknown[0]}, and the levels of ch_mult={ch_mult} have {', '.join(map(str, strides))}"
            raise OptionError("attention", attention, problem)
        self.levels = [vqgan.Level(hidden * n, s in attending) for n, s in zip(multipliers, strides, strict=True)]
        self.image_channels, self.channels, self.blocks = image_shape[0], features, num_res_blocks
        self.middle_attention = middle_attention
        self.grid = divisible(image_shape, strides[-1])
        width = math.gcd(*(level.width for level in self.levels))
        self.groups = max(n for n in range(1, min(groups, width) + 1) if width % n == 0)
        if self.grid == (1, 1) and self.levels[-1].width == self.groups:  # a single value is normalized to 0
            size = Size(image_shape[1:])
            raise OptionError("image_size", size, f"leaves group norm one value per group; try {2 * strides[-1]}")

    def encoder(self) -> nn.Module:
        return vqgan.Encoder(
            self.image_channels, self.levels, self.blocks, self.channels, self.groups, attends=self.middle_attention
        )

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        return vqgan.Decoder(
            code_dim, self.channels, self.levels, self.blocks, out_channels, self.groups, attends=self.middle_attention
        )


class ToPixels(nn.Conv2d):
    """A convolution to few channels that keeps the size, computed on a CPU as an equivalent transposed convolution.

    CPU kernels vectorize over output channels, of which there are few here. The transposed convolution of the mirrored
    kernel computes the same sums and vectorizes over the input channels.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int):
        super().__init__(channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        mirrored = self.weight.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, mirrored, self.bias, padding=self.kernel_size[0] // 2)


class DoubleToPixels(nn.ConvTranspose2d):
    """A transposed 4x4 convolution of stride 2 to few channels, whose forward pass has an equivalent form on a CPU.

    That form is a 2x2 convolution to four times as many channels, which fill a CPU's vectors better. They are the
    pixels of cells of 2x2 pixels. The outermost pixels of the outermost cells are outside the image.
    """

    bias: Tensor

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if x.device.type != "cpu" or self.out_channels > 8 or output_size is not None:
            return super().forward(x, output_size)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return _DoubleToPixels.apply(x, weight, bias)


class _DoubleToPixels(torch.autograd.Function):
    """The forward pass of `DoubleToPixels`; the backward pass is that of the transposed convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        channels, out_channels = weight.shape[:2]
        # tap 2a + p of the weight [C, O, 4, 4] is tap 1 - a of output pixel p: [O, C, 4 pixels, 2, 2]
        taps = F.pixel_unshuffle(weight.transpose(0, 1), 2).flip(2, 3).view(out_channels, channels, 4, 2, 2)
        kernel = taps.transpose(1, 2).reshape(4 * out_channels, channels, 2, 2)
        pixels = F.conv2d(x, kernel, bias.repeat_interleave(4), padding=1)  # [B, 4 O, H + 1, W + 1]
        return F.pixel_shuffle(pixels, 2)[..., 1:-1, 1:-1].contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sizes = {"bias_sizes": [weight.shape[1]], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1]}
        return torch.ops.aten.convolution_backward(
            dy, x, weight, **sizes, transposed=True, output_padding=[0, 0], groups=1, output_mask=ctx.needs_input_grad
        )


class CenterCrop(nn.Module):
    """Crop `[B, C, H', W']` to `[B, C, *size]` around the center."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        top, left = (x.shape[-2] - self.size[0]) // 2, (x.shape[-1] - self.size[1]) // 2
        return x[..., top : top + self.size[0], left : left + self.size[1]]


class MLP(Nets):
    """Multilayer perceptrons with ReLU on the flattened input, for points and very small images. Code grid [1, 1]."""

    spatial = False

    @checked
    def __init__(
        self,
        *,
        image_shape: ImageShape,
        hidden: Annotated[int, Range(1), "units of each hidden layer"] = 32,
        layers: Annotated[int, Range(1), "hidden layers of each net (1 in the 2-D VAE)"] = 1,
    ):
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
        return [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU(inplace=True))]


NETS = {
    "sonnet": Sonnet,
    "henrhoi": Henrhoi,
    "sqvae": SQVAE,
    "conv-vae": ConvVAE,
    "mnist-conv": MnistConv,
    "deepmind": DeepMind,
    "dalle": DallE,
    "vqgan": VQGAN,
    "mlp": MLP,
}
