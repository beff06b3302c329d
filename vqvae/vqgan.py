"""The convolutional encoder and decoder that image tokenizers share (2012.09841, 2112.10752).

Layers and parameters have the names of diffusers' `VQModel`, so that its weights are read and written without a table.

B batch, C channels, H W pixels, h w code grid, Z channels of the features, D code dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.devices import attention

EPSILON = 1e-6  # of every group norm


class Level(NamedTuple):
    """The layers of one resolution: that of the image at the first level, then half the previous one."""

    width: int  # channels
    attends: bool  # whether attention follows each residual block


class ResidualBlock(nn.Module):
    """h + conv3x3(swish(norm(conv3x3(swish(norm(h)))))), with a 1x1 convolution on h where widths differ."""

    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, EPSILON)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPSILON)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.conv_shortcut = nn.Conv2d(channels, out_channels, 1)
        self.widens = channels != out_channels

    def forward(self, h: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(h)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return (self.conv_shortcut(h) if self.widens else h) + residual


class Attention(nn.Module):
    """h plus one head of self-attention over all positions of the normalized h."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPSILON)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, h: Tensor) -> Tensor:
        x = self.group_norm(h).flatten(2).mT.unsqueeze(1)  # [B, 1, h*w, channels]
        attended = attention(self.to_q(x), self.to_k(x), self.to_v(x))
        return h + self.to_out[0](attended).squeeze(1).mT.unflatten(2, h.shape[2:])


class Halve(nn.Module):
    """3x3 convolution of stride 2, padded by zeros on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Double(nn.Module):
    """Nearest upsampling by 2, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Stack(nn.Module):
    """`blocks` residual blocks at a level, each followed by attention if the level attends."""

    def __init__(self, channels: int, level: Level, blocks: int, groups: int):
        super().__init__()
        inputs = [channels] + [level.width] * (blocks - 1)
        self.resnets = nn.ModuleList([ResidualBlock(n, level.width, groups) for n in inputs])
        attentions = [Attention(level.width, groups) for _ in inputs] if level.attends else []
        self.attentions = nn.ModuleList(attentions)

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.resnets):
            h = block(h)
            if self.attentions:
                h = self.attentions[i](h)
        return h


class Down(Stack):
    """A level of the encoder, which halves its output except at the last level."""

    def __init__(self, channels: int, level: Level, blocks: int, groups: int, *, last: bool):
        super().__init__(channels, level, blocks, groups)
        self.downsamplers = nn.ModuleList([] if last else [Halve(level.width)])

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h)
        for halve in self.downsamplers:
            h = halve(h)
        return h


class Up(Stack):
    """A level of the decoder, which doubles its output except at the last level."""

    def __init__(self, channels: int, level: Level, blocks: int, groups: int, *, last: bool):
        super().__init__(channels, level, blocks, groups)
        self.upsamplers = nn.ModuleList([] if last else [Double(level.width)])

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h)
        for double in self.upsamplers:
            h = double(h)
        return h


class Middle(nn.Module):
    """Two residual blocks with attention between them, if the middle attends."""

    def __init__(self, level: Level, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(level.width, groups)] if level.attends else [])
        self.resnets = nn.ModuleList([ResidualBlock(level.width, level.width, groups) for _ in range(2)])

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        for layer in self.attentions:
            h = layer(h)
        return self.resnets[1](h)


class Encoder(nn.Module):
    """Images `[B, C, H, W]` to features `[B, Z, h, w]`: conv3x3, the levels, the middle, norm, swish, conv3x3."""

    def __init__(
        self, image_channels: int, levels: Sequence[Level], blocks: int, features: int, groups: int, *, attends: bool
    ):
        super().__init__()
        widths, last = [levels[0].width, *(level.width for level in levels)], len(levels) - 1
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [Down(widths[i], level, blocks, groups, last=i == last) for i, level in enumerate(levels)]
        )
        self.mid_block = Middle(Level(widths[-1], attends), groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """z `[B, D, h, w]` to the likelihood's parameters `[B, out_channels, H, W]`: a mirror of the encoder.

    A 1x1 convolution from D to Z channels comes first. Each level has one residual block more than the encoder's.
    """

    def __init__(
        self,
        code_dim: int,
        features: int,
        levels: Sequence[Level],
        blocks: int,
        out_channels: int,
        groups: int,
        *,
        attends: bool,
    ):
        super().__init__()
        upward, last = levels[::-1], len(levels) - 1
        widths = [upward[0].width, *(level.width for level in upward)]
        self.post_quant_conv = nn.Conv2d(code_dim, features, 1)
        self.conv_in = nn.Conv2d(features, widths[0], 3, padding=1)
        self.mid_block = Middle(Level(widths[0], attends), groups)
        self.up_blocks = nn.ModuleList(
            [Up(widths[i], level, blocks + 1, groups, last=i == last) for i, level in enumerate(upward)]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(self.post_quant_conv(z)))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))
