"""Nets: shapes, published sizes, layers computed by hand, and initial weights."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqvae.errors import OptionError
from vqvae.nets import (
    NETS,
    BottleneckBlock,
    DallE,
    DeepMind,
    DoubleToPixels,
    PostActivationBlock,
    PostNormBlock,
    ResidualLayer,
    Sonnet,
    ToPixels,
    initialize_fan_in,
)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in NETS for shape in ((3, 16, 24), (1, 28, 28)) if (name, shape[1]) != ("dalle", 28)],
)
def test_every_net_maps_pixels_to_its_grid_and_back(name, shape):
    nets = NETS[name](image_shape=shape, hidden=8)
    features = nets.encoder()(torch.randn(2, *shape))
    assert features.shape == (2, nets.channels, *nets.grid)
    out = nets.decoder(5, 7)(torch.randn(2, 5, *nets.grid))
    assert out.shape == (2, 7, *shape[1:])


def test_sonnet_has_the_published_parameters():
    nets = Sonnet(image_shape=(3, 32, 32))
    layers = [m for m in nets.encoder().modules() if isinstance(m, nn.Conv2d)]
    sizes = [(m.in_channels, m.out_channels, *m.kernel_size, *m.stride) for m in layers]
    residual = [(128, 32, 3, 3, 1, 1), (32, 128, 1, 1, 1, 1)]
    assert sizes == [(3, 64, 4, 4, 2, 2), (64, 128, 4, 4, 2, 2), (128, 128, 3, 3, 1, 1), *residual * 2]
    assert nets.grid == (8, 8)


@pytest.mark.parametrize("stride", [8, 16])
def test_sonnet_halves_further_by_layers_of_the_same_kind(stride):
    nets = Sonnet(image_shape=(3, 32, 48), hidden=6, residual_layers=0, downsample=stride)
    more = {8: 1, 16: 2}[stride]
    assert nets.grid == (32 // stride, 48 // stride)
    assert convolutions(nets.encoder()) == [(3, 3, 4), (3, 6, 4), *[(6, 6, 4)] * more, (6, 6, 3)]
    assert convolutions(nets.decoder(5, 3)) == [(5, 6, 3), *[(6, 6, 4)] * more, (6, 3, 4), (3, 3, 4)]
    halvings = [m for m in nets.encoder() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(halvings) == 2 + more
    assert nets.encoder()(torch.randn(2, 3, 32, 48)).shape == (2, 6, *nets.grid)
    assert nets.decoder(5, 7)(torch.randn(2, 5, *nets.grid)).shape == (2, 7, 32, 48)


def test_sonnet_takes_only_strides_of_4_8_and_16():
    with pytest.raises(OptionError, match="downsample=2: must be 4, 8 or 16"):
        Sonnet(image_shape=(3, 32, 32), downsample=2)


def test_a_residual_layer_adds_the_input_itself():
    layer = Sonnet(image_shape=(3, 8, 8), hidden=4)._residual_stack()[0]
    nn.init.zeros_(layer.residual[-1].weight)
    nn.init.zeros_(layer.residual[-1].bias)
    x = torch.randn(1, 4, 2, 2)
    assert torch.allclose(layer(x.clone()), x)  # an in-place ReLU would make it ReLU(x)


def convolutions(net: nn.Module) -> list[tuple[int, int, int]]:
    """(inputs, outputs, kernel) of every convolution, in order."""
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in layers]


def test_deepmind_nets_have_the_published_sizes():
    nets = DeepMind(image_shape=(3, 32, 32))
    blocks = [(128, 32, 3), (32, 128, 1)] * 2
    assert (nets.grid, nets.channels) == ((8, 8), 128)
    assert convolutions(nets.encoder()) == [(3, 64, 4), (64, 128, 4), (128, 128, 3), *blocks]
    assert convolutions(nets.decoder(64, 3)) == [(64, 128, 3), *blocks, (128, 64, 4), (64, 3, 4)]


def test_a_post_activation_block_agrees_with_its_formula():
    block = PostActivationBlock(4, 2).double()
    h = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    inner, outer = block.residual[0], block.residual[2]
    hidden = F.relu(F.conv2d(h, inner.weight, inner.bias, padding=1))
    expected = F.relu(h + F.conv2d(hidden, outer.weight, outer.bias))
    assert torch.allclose(block(h.clone()), expected)


@pytest.mark.parametrize(("shape", "middle"), [((1, 28, 28), False), ((3, 32, 32), True)])
def test_sqvae_nets_have_the_published_sizes(shape, middle):
    nets = NETS["sqvae"](image_shape=shape, middle=middle)
    channels, blocks, more = shape[0], [(64, 64, 3), (64, 64, 1)] * 2, [(64, 64, 3)] * middle
    assert (nets.grid, nets.channels) == ((shape[1] // 4, shape[2] // 4), 64)
    assert convolutions(nets.encoder()) == [(channels, 32, 4), (32, 64, 4), *more, *blocks]
    assert convolutions(nets.decoder(64, channels)) == [*blocks, *more, (64, 32, 4), (32, channels, 4)]
    assert convolutions(nets.decoder(5, channels))[0] == (5, 64, 1)
    norms = [m for m in nets.encoder().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 5 + 2 * middle
    weights = torch.cat([m.weight.flatten() for m in nets.encoder().modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_post_norm_block_agrees_with_its_formula():
    block = PostNormBlock(4).double().train()
    h = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    _, inner, norm, _, outer, last = block.residual
    hidden = F.conv2d(F.relu(h), inner.weight, inner.bias, padding=1)
    hidden = F.relu(F.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True))
    out = F.batch_norm(F.conv2d(hidden, outer.weight, outer.bias), None, None, last.weight, last.bias, training=True)
    assert torch.allclose(block(h.clone()), h + out)


def test_dalle_nets_have_the_published_sizes():
    nets = DallE(image_shape=(3, 32, 32), hidden=16, blocks=2, init=8)
    assert (nets.grid, nets.channels) == ((4, 4), 128)

    def group(channels, width, kernels):
        q = width // 4
        sizes = []
        for inputs in (channels, width):
            identity = [(inputs, width, 1)] if inputs != width else []
            widths = [(inputs, q), (q, q), (q, q), (q, width)]
            sizes += identity + [(a, b, k) for (a, b), k in zip(widths, kernels, strict=True)]
        return sizes

    down, up = (3, 3, 3, 1), (1, 3, 3, 3)
    encoder = [size for a, b in ((16, 16), (16, 32), (32, 64), (64, 128)) for size in group(a, b, down)]
    assert convolutions(nets.encoder()) == [(3, 16, 7), *encoder]
    decoder = [size for a, b in ((8, 128), (128, 64), (64, 32), (32, 16)) for size in group(a, b, up)]
    assert convolutions(nets.decoder(5, 6)) == [(5, 8, 1), *decoder, (16, 6, 1)]
    assert isinstance(nets.encoder()[-1], nn.ReLU)


@pytest.mark.parametrize("kernels", [(3, 3, 3, 1), (1, 3, 3, 3)])
def test_a_bottleneck_block_agrees_with_its_formula(kernels):
    block = BottleneckBlock(4, 8, kernels=kernels, gain=0.25).double()
    h = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    r = h
    for layer, size in zip(block.residual[1::2], kernels, strict=True):
        r = F.conv2d(F.relu(r), layer.weight, layer.bias, padding=size // 2)
    expected = F.conv2d(h, block.identity.weight, block.identity.bias) + 0.25 * r
    assert torch.allclose(block(h.clone()), expected)
    assert isinstance(BottleneckBlock(8, 8, kernels=kernels, gain=1.0).identity, nn.Identity)


def test_an_upsampling_bottleneck_block_equals_a_plain_one_on_the_upsampled_input():
    block = BottleneckBlock(4, 8, kernels=(1, 3, 3, 3), gain=0.25, upsample=True).double()
    plain = BottleneckBlock(4, 8, kernels=(1, 3, 3, 3), gain=0.25).double()
    plain.load_state_dict(block.state_dict())
    h = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    expected = plain(h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.allclose(block(h), expected)


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_gain_of_dalle_is_one_over_its_blocks_squared(blocks):
    nets = DallE(image_shape=(3, 8, 8), hidden=4, blocks=blocks)
    for net in (nets.encoder(), nets.decoder(4, 3)):
        gains = [m.gain for m in net.modules() if isinstance(m, BottleneckBlock)]
        assert gains == pytest.approx([1 / (4 * blocks) ** 2] * (4 * blocks))


def test_initial_weights_of_dalle_are_normal_over_the_fan_in():
    layers = [m for m in DallE(image_shape=(3, 32, 32)).encoder().modules() if isinstance(m, nn.Conv2d)]
    scaled = torch.cat([(m.weight * math.sqrt(m.weight[0].numel())).flatten() for m in layers])
    assert scaled.var().item() == pytest.approx(1, rel=0.01)
    assert scaled.abs().max() > 3  # not truncated
    assert not any(m.bias.any() for m in layers)


@pytest.mark.parametrize(
    ("layer", "theirs"),
    [
        (ToPixels(6, 2, 3), partial(F.conv2d, padding=1)),
        (ToPixels(6, 2, 5), partial(F.conv2d, padding=2)),
        (DoubleToPixels(6, 1), partial(F.conv_transpose2d, stride=2, padding=1)),
        (DoubleToPixels(6, 3), partial(F.conv_transpose2d, stride=2, padding=1)),
        (DoubleToPixels(6, 9), partial(F.conv_transpose2d, stride=2, padding=1)),
    ],
)
@pytest.mark.parametrize("batch", [3, 0])
def test_the_last_convolution_agrees_with_torch_and_so_do_its_gradients(layer, theirs, batch):
    layer = layer.double()
    x = torch.randn(batch, 6, 7, 4, dtype=torch.float64, requires_grad=True)
    weights = (x, layer.weight, layer.bias)
    outputs = layer(x), theirs(*weights)
    direction = torch.randn_like(outputs[0])
    for ours, expected in zip(*([y, *torch.autograd.grad(y, weights, direction)] for y in outputs), strict=True):
        assert ours.shape == expected.shape
        assert torch.allclose(ours, expected)


def test_the_last_convolution_follows_autocast_as_torch_does():
    layer, x = DoubleToPixels(8, 3), torch.randn(2, 8, 4, 4, requires_grad=True)
    plain = nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)
    plain.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), plain(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected.float(), atol=0.03)
    gradients = torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize(
    "block",
    [
        ResidualLayer(8, 4),
        ResidualLayer(8, 4, batch_norm=True),
        PostNormBlock(8),
        PostActivationBlock(8, 4),
        BottleneckBlock(8, 8, kernels=(3, 3, 3, 1), gain=0.5),
        BottleneckBlock(8, 16, kernels=(1, 3, 3, 3), gain=0.5, upsample=True),
    ],
)
def test_a_block_does_not_overwrite_its_input(block):
    x = torch.randn(2, 8, 4, 4)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 400, 4), nn.ConvTranspose2d(8, 400, 4), nn.Linear(128, 400)])
def test_initial_weights_are_a_truncated_normal_over_the_fan_in(layer):
    initialize_fan_in(nn.Sequential(layer))
    std = 1 / math.sqrt(128)
    assert layer.weight.abs().max() < 2.0001 * std
    assert layer.weight.std().item() == pytest.approx(0.88 * std, rel=0.02)  # 0.88 remains after the truncation
    assert not layer.bias.any()


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sonnet", 30, "does not divide by 4; try 28 or 32"),
        ("henrhoi", 30, "does not divide by 4; try 28 or 32"),
        ("deepmind", 2, "does not divide by 4; try 4 or 8"),
        ("mnist-conv", 30, "does not divide by 4; try 28 or 32"),
        ("dalle", 28, "does not divide by 8; try 24 or 32"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_ones_that_do(name, size, message):
    with pytest.raises(OptionError, match=f"image_size={size}: {message}"):
        NETS[name](image_shape=(3, size, size))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 30, 64), "image_size=30x64: does not divide by 16; try 16x64 or 32x64"),
        ((3, 96, 130), "image_size=96x130: does not divide by 16; try 96x128 or 96x144"),
        ((3, 8, 20), "image_size=8x20: does not divide by 16; try 16 or 16x32"),
    ],
)
def test_a_rectangle_that_does_not_divide_is_refused_with_ones_that_do(shape, message):
    with pytest.raises(OptionError, match=f"{message}$"):
        Sonnet(image_shape=shape, downsample=16)


@pytest.mark.parametrize("name", NETS)
def test_empty_widths_are_refused(name):
    with pytest.raises(OptionError, match="hidden=0: must be at least"):
        NETS[name](image_shape=(3, 32, 32), hidden=0)


@pytest.mark.parametrize("downsample", [8, 16])
def test_added_halvings_and_doublings_keep_the_scale_of_the_signal(downsample):
    torch.manual_seed(0)
    for build in (lambda nets: nets.encoder(), lambda nets: nets.decoder(128, 3)):
        scales = []
        for stride in (4, downsample):
            net = build(Sonnet(image_shape=(3, 64, 64), downsample=stride))
            size = (4, 3, 64, 64) if isinstance(net[0], nn.Conv2d) and net[0].in_channels == 3 else (4, 128, 4, 4)
            scales.append(net(torch.randn(size)).detach().square().mean().sqrt().item())
        assert 0.5 < scales[1] / scales[0] < 2  # a quarter or less without
