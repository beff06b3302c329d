"""Nets: shapes of every row of the table, and the published sizes."""

import math

import pytest
import torch
from torch import nn

from vqvae.errors import UserError
from vqvae.nets import NETS, Sonnet, initialise_fan_in


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shape", [(3, 16, 24), (1, 28, 28)])
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


def test_residual_layer_skips_the_input_itself():
    layer = Sonnet(image_shape=(3, 8, 8), hidden=4)._residual_stack()[0]
    nn.init.zeros_(layer.residual[-1].weight)
    nn.init.zeros_(layer.residual[-1].bias)
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(layer(x.clone()), x)  # not ReLU(x), as an in-place ReLU would make it


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 400, 4), nn.ConvTranspose2d(8, 400, 4), nn.Linear(128, 400)])
def test_initial_weights_are_a_truncated_normal_over_the_fan_in(layer):
    initialise_fan_in(layer)
    std = 1 / math.sqrt(128)
    assert layer.weight.abs().max() <= 2 * std
    assert layer.weight.std().item() == pytest.approx(0.88 * std, rel=0.02)  # cut at two std, a normal keeps 0.88
    assert not layer.bias.any()


@pytest.mark.parametrize("name", ["sonnet", "henrhoi"])
def test_sizes_that_do_not_divide_are_refused_with_ones_that_do(name):
    with pytest.raises(UserError, match="30x30.*--image-size 28 or 32"):
        NETS[name](image_shape=(3, 30, 30))


@pytest.mark.parametrize("name", NETS)
def test_empty_widths_are_refused(name):
    with pytest.raises(UserError, match="hidden=0"):
        NETS[name](image_shape=(3, 32, 32), hidden=0)
