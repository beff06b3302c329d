"""The nets of image tokenizers: layers by their formulas, published sizes, and diffusers' own computation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqvae.errors import OptionError
from vqvae.nets import VQGAN
from vqvae.vqgan import EPSILON, Attention, Double, Halve, ResidualBlock

PUBLISHED = {
    "hidden": 128, "ch_mult": "1,1,2,2,4", "num_res_blocks": 2, "features": 256, "groups": 32, "attention": "16",
}  # fmt: skip


def swish(x):
    return x * torch.sigmoid(x)


def normalized(norm, x):
    """Group norm, one group of channels after another."""
    groups = []
    for group in x.chunk(norm.num_groups, dim=1):
        variance, mean = torch.var_mean(group, dim=(1, 2, 3), keepdim=True, correction=0)
        groups.append((group - mean) / (variance + EPSILON).sqrt())
    return torch.cat(groups, dim=1) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


@torch.no_grad()
def drawn(layer: nn.Module) -> nn.Module:
    """The layer in float64, with random norms too."""
    for parameter in layer.double().parameters():
        parameter.normal_()
    return layer


@pytest.mark.parametrize("channels", [4, 8])
def test_a_residual_block_agrees_with_its_formula(channels):
    block = drawn(ResidualBlock(channels, 8, groups=2))
    h = torch.randn(2, channels, 5, 3, dtype=torch.float64)
    r = F.conv2d(swish(normalized(block.norm1, h)), block.conv1.weight, block.conv1.bias, padding=1)
    r = F.conv2d(swish(normalized(block.norm2, r)), block.conv2.weight, block.conv2.bias, padding=1)
    identity = h if channels == 8 else F.conv2d(h, block.conv_shortcut.weight, block.conv_shortcut.bias)
    assert torch.allclose(block(h), identity + r)


def test_attention_agrees_with_its_formula():
    layer = drawn(Attention(6, groups=3))
    h = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    x = normalized(layer.group_norm, h).flatten(2).transpose(1, 2)  # [B, h*w, channels]
    q, k, v = (x @ linear.weight.T + linear.bias for linear in (layer.to_q, layer.to_k, layer.to_v))
    attended = (q @ k.transpose(1, 2) / 6**0.5).softmax(dim=2) @ v
    out = attended @ layer.to_out[0].weight.T + layer.to_out[0].bias
    assert torch.allclose(layer(h), h + out.transpose(1, 2).reshape(h.shape))


def test_halving_pads_on_the_right_and_below_and_doubling_repeats_pixels():
    halve, double = drawn(Halve(2)), drawn(Double(2))
    h = torch.randn(1, 2, 4, 6, dtype=torch.float64)
    padded = torch.zeros(1, 2, 5, 7, dtype=torch.float64)
    padded[..., :4, :6] = h
    assert torch.allclose(halve(h), F.conv2d(padded, halve.conv.weight, halve.conv.bias, stride=2))
    repeated = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(double(h), F.conv2d(repeated, double.conv.weight, double.conv.bias, padding=1))


def test_the_published_nets_have_the_published_parameters():
    with torch.device("meta"):
        nets = VQGAN(image_shape=(3, 256, 256), **PUBLISHED)
        sizes = [sum(p.numel() for p in net.parameters()) for net in (nets.encoder(), nets.decoder(256, 3))]
    assert nets.grid == (16, 16)
    assert sizes == [29_298_176, 42_515_587]


@pytest.mark.parametrize(("ch_mult", "stride"), [("1", 1), ("1,2", 2), ("1,2,2", 4), ("1,1,2,2", 8), ("1,1,1,1,2", 16)])
def test_the_stride_is_two_to_the_number_of_further_levels(ch_mult, stride):
    nets = VQGAN(image_shape=(3, 32, 48), hidden=4, ch_mult=ch_mult)
    assert nets.grid == (32 // stride, 48 // stride)
    features = nets.encoder()(torch.randn(2, 3, 32, 48))
    assert features.shape == (2, 64, *nets.grid)
    assert nets.decoder(5, 7)(torch.randn(2, 5, *nets.grid)).shape == (2, 7, 32, 48)


@pytest.mark.parametrize(
    ("groups", "hidden", "ch_mult", "used"), [(8, 32, "1,2", 8), (8, 6, "1,2", 6), (32, 9, "2,3", 9)]
)
def test_groups_divide_every_width(groups, hidden, ch_mult, used):
    nets = VQGAN(image_shape=(3, 16, 16), hidden=hidden, ch_mult=ch_mult, groups=groups)
    assert nets.groups == used
    nets.encoder()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ch_mult": "1,x"}, "ch_mult=1,x: must be 1 to 8 whole numbers from 1 to 64, separated by commas"),
        ({"ch_mult": "1,0"}, "ch_mult=1,0: must be"),
        ({"ch_mult": ",".join("1" * 9)}, "must be 1 to 8 whole numbers"),
        ({"attention": "16"}, "attention=16: has 16, and the levels of ch_mult=1,2,2 have 1, 2, 4"),
        ({"attention": "all"}, "attention=all: must be none, or strides separated by commas"),
        ({"groups": 0}, "groups=0: must be at least 1"),
        ({"ch_mult": "1,1,1,1"}, "image_size=12: does not divide by 8; try 8 or 16"),
        ({"ch_mult": "1,1,1", "hidden": 8, "image_shape": (3, 4, 4)}, "image_size=4: leaves group norm one value per"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        VQGAN(**({"image_shape": (3, 12, 12)} | options))


def test_a_single_image_of_the_smallest_size_trains():
    nets = VQGAN(image_shape=(1, 4, 4), hidden=16, groups=8)
    out = nets.decoder(3, 1)(torch.randn(1, 3, *nets.grid)) + nets.encoder()(torch.randn(1, 1, 4, 4)).mean()
    assert out.isfinite().all()


def blocks(kind: str, levels: list[bool]) -> tuple[str, ...]:
    return tuple(f"{'Attn' if attends else ''}{kind}Block2D" for attends in levels)


@pytest.mark.parametrize(
    ("options", "attending", "sizes"),
    [
        ({"ch_mult": "1,2,2"}, [False, False, False], {"block_out_channels": (8, 16, 16)}),
        (
            {"ch_mult": "2,1,3,1", "num_res_blocks": 2, "attention": "2,8", "middle_attention": False, "groups": 4},
            [False, True, False, True],
            {"block_out_channels": (16, 8, 24, 8), "layers_per_block": 2, "norm_num_groups": 4,
             "mid_block_add_attention": False},
        ),
    ],
)  # fmt: skip
def test_with_the_same_weights_diffusers_computes_the_same(options, attending, sizes):
    diffusers = pytest.importorskip("diffusers")
    nets = VQGAN(image_shape=(3, 16, 24), hidden=8, features=6, **options)
    encoder, decoder = nets.encoder(), nets.decoder(5, 3)
    theirs = diffusers.VQModel(
        down_block_types=blocks("DownEncoder", attending), up_block_types=blocks("UpDecoder", attending[::-1]),
        latent_channels=6, vq_embed_dim=5, **({"norm_num_groups": 8} | sizes),
    )  # fmt: skip
    theirs.encoder.load_state_dict(encoder.state_dict())
    post = {name: value for name, value in decoder.state_dict().items() if name.startswith("post_quant_conv.")}
    rest = {name: value for name, value in decoder.state_dict().items() if name not in post}
    theirs.decoder.load_state_dict(rest)
    theirs.load_state_dict(post, strict=False)
    x, z = torch.randn(2, 3, 16, 24), torch.randn(2, 5, *nets.grid)
    with torch.no_grad():
        assert torch.allclose(encoder(x), theirs.encoder(x), atol=1e-5)
        assert torch.allclose(decoder(z), theirs.decoder(theirs.post_quant_conv(z)), atol=1e-5)
