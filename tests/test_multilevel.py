"""Several codes per position: residual, grouped and two-level quantization."""

import itertools

import pytest
import torch

from tests.bottleneck_helpers import assert_nearest, clearly_nearest, make, rows
from vqvae.bottlenecks.multiscale import halves
from vqvae.errors import OptionError

SMALL = {"num_codes": 9, "code_dim": 4, "init": "normal", "revive": 0.0, "beta": 1.0}


@pytest.mark.parametrize("levels", [1, 3])
def test_residual_quantization_agrees_with_vector_quantize_pytorch(levels):
    library = pytest.importorskip("vector_quantize_pytorch")
    ours = make("residual", quantizers=levels, **SMALL).eval()
    theirs = library.ResidualVQ(dim=4, num_quantizers=levels, codebook_size=9, rotation_trick=False).eval()
    for book, layer in zip(ours.codebooks, theirs.layers, strict=True):
        layer._codebook.embed.data.copy_(book.vectors[None])
    features = torch.randn(5, 6, 2, 4)
    latent = ours(features, 0)
    f = ours.projection(features).flatten(2).transpose(1, 2)  # [B, h w, D]
    quantized, indices, _ = theirs(f)
    assert torch.allclose(latent.z.flatten(2).transpose(1, 2), quantized, atol=1e-5)
    rest = f.flatten(0, 1)
    for i, (book, codes) in enumerate(zip(ours.codebooks, ours.maps(latent.codes).values(), strict=True)):
        expected = clearly_nearest(rest, book.vectors)
        assert torch.equal(codes.flatten(), expected)
        assert torch.equal(indices[..., i].flatten(), expected)
        rest = rest - book.vectors[expected]
    theirs.train()
    losses = theirs(f, freeze_codebook=True)[2]
    assert latent.loss.item() == pytest.approx(losses.mean().item(), abs=1e-5)


def test_each_residual_level_quantizes_the_error_of_those_before():
    vq = make("residual", quantizers=3, **SMALL).eval()
    features = torch.randn(5, 6, 2, 4)
    latent = vq(features, 0)
    maps = [codes.flatten() for codes in vq.maps(latent.codes).values()]
    rest, total = rows(vq.projection(features)), torch.zeros(40, 4)
    for book, codes in zip(vq.codebooks, maps, strict=True):
        assert_nearest(codes, rest, book.vectors)
        total, rest = total + book.vectors[codes], rest - book.vectors[codes]
    assert torch.allclose(rows(latent.z), total, atol=1e-5)
    assert torch.allclose(rows(vq.embed(latent.codes, levels=1)), vq.codebooks[0].vectors[maps[0]])


def test_more_residual_levels_leave_a_smaller_error_after_k_means():
    features = torch.randn(300, 6, 2, 4)
    errors = []
    for levels in (1, 2, 4):
        torch.manual_seed(0)
        vq = make("residual", quantizers=levels, **SMALL | {"init": "kmeans", "num_codes": 16})
        vq.initialize(features)
        f = vq.projection(features)
        errors.append((vq.eval()(features, 0).z - f).square().mean().item() / f.var().item())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_dropout_trains_the_first_levels_and_updates_only_their_codebooks():
    vq = make("residual", quantizers=4, dropout=1.0, **SMALL)
    features = torch.randn(5, 6, 2, 4)
    depths = set()
    for step in range(40):
        before = [book.vectors.clone() for book in vq.codebooks]
        latent = vq(features, step)
        moved = [not torch.equal(book.vectors, b) for book, b in zip(vq.codebooks, before, strict=True)]
        depth = sum(moved)
        assert moved == [i < depth for i in range(4)]
        depths.add(depth)
        maps = vq.maps(latent.codes).values()
        used = itertools.islice(zip(before, maps, strict=True), depth)
        assert torch.allclose(rows(latent.z), sum(b[codes.flatten()] for b, codes in used), atol=1e-5)
    assert depths == {1, 2, 3, 4}


def test_each_group_is_quantized_separately():
    vq = make("grouped", groups=2, **SMALL).eval()
    features = torch.randn(5, 6, 2, 4)
    latent = vq(features, 0)
    parts, vectors = rows(vq.projection(features)).chunk(2, 1), rows(latent.z).chunk(2, 1)
    for i, codes in enumerate(vq.maps(latent.codes).values()):
        assert_nearest(codes.flatten(), parts[i], vq.codebooks[i].vectors)
        assert torch.allclose(vectors[i], vq.codebooks[i].vectors[codes.flatten()], atol=1e-6)
    first_only = rows(vq.embed(latent.codes, levels=1)).chunk(2, 1)
    assert torch.allclose(first_only[0], vectors[0], atol=1e-6)
    assert first_only[1].abs().max() == 0


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_only_the_commitment_loss_has_a_gradient_to_the_encoder(name):
    vq = make(name, codebook="gradient", **SMALL)
    f = torch.randn(3, 6, 2, 4, requires_grad=True)
    vq(f, 0).loss.backward()
    assert all(book.vectors.grad.abs().sum() > 0 for book in vq.codebooks)
    gradient = torch.autograd.grad(vq(f, 0).loss, f)[0]
    doubled = make(name, codebook="gradient", **SMALL | {"beta": 2.0})
    doubled.load_state_dict(vq.state_dict())
    assert torch.allclose(torch.autograd.grad(doubled(f, 0).loss, f)[0], 2 * gradient, atol=1e-7)


def test_the_grid_of_a_hierarchy_splits_into_its_levels():
    vq = make("hierarchy", grid=(4, 6), hidden=5, **SMALL).eval()
    assert (vq.grid, vq.top.grid, vq.bottom.grid) == ((2 + 8, 3), (2, 3), (4, 6))
    for level in (vq.top, vq.bottom):
        assert {name: getattr(level.options, name) for name in SMALL} == SMALL
    features = torch.randn(3, 6, 4, 6)
    latent = vq(features, 0)
    top = vq.top(vq.down(features), 0)
    bottom = vq.bottom(torch.cat([features, vq.decode_top(top.z)], 1), 0)
    maps = vq.maps(latent.codes)
    assert torch.equal(maps["top"], top.codes)
    assert torch.equal(maps["bottom"], bottom.codes)
    # codes of one place are in one column: the bottom's column 2 c + parity in column c
    assert torch.equal(latent.codes[:, 2 + 2 * 1 + 1, 2], bottom.codes[:, 1, 5])
    assert torch.allclose(vq.embed(latent.codes), latent.z, atol=1e-6)
    assert vq.embed(latent.codes, levels=1)[:, 4:].abs().max() == 0


def test_the_bottom_level_depends_on_the_top():
    vq = make("hierarchy", grid=(4, 4), hidden=5, **SMALL).eval()
    features = torch.randn(6, 6, 4, 4)
    before = vq.maps(vq(features, 0).codes)["bottom"]
    for p in vq.decode_top.parameters():
        torch.nn.init.normal_(p, std=2.0)
    assert not torch.equal(vq.maps(vq(features, 0).codes)["bottom"], before)


# scales


@pytest.mark.parametrize("options", [{}, {"codebook": "gradient"}, {"init": "normal", "revive": 0.5, "decay": 0.5}])
def test_one_scale_is_vq(options):
    features = torch.randn(5, 6, 4, 3)
    pair = []
    for name, scales in (("vq", {}), ("multiscale", {"scales": 1})):
        torch.manual_seed(0)
        bottleneck = make(name, (4, 3), num_codes=9, code_dim=4, **options, **scales)
        bottleneck.initialize(features)
        pair.append(bottleneck)
    vq, one = pair
    assert (one.grid, one.scales) == (vq.grid, ())
    for step in range(40):  # enough that codes are revived
        latents, states = [], []
        for bottleneck in pair:
            torch.manual_seed(step)
            found = bottleneck(features, step)
            (found.loss + found.z.square().mean()).backward()
            latents.append(found)
            states.append([*bottleneck.state_dict().values(), *(p.grad for p in bottleneck.parameters())])
        assert torch.equal(latents[0].z, latents[1].z)
        assert torch.equal(latents[0].codes, latents[1].codes)
        assert torch.equal(latents[0].loss, latents[1].loss)
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert torch.equal(one.embed(latents[1].codes), vq.embed(latents[0].codes))


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        ((8, 8), ((1, 1), (2, 2), (4, 4), (8, 8))),
        ((7, 7), ((1, 1), (2, 2), (4, 4), (7, 7))),
        ((4, 6), ((1, 2), (2, 3), (4, 6))),
        ((10, 1), ((1, 1), (2, 1), (3, 1), (5, 1), (10, 1))),
    ],
)
def test_every_scale_is_half_as_large_as_the_next(grid, sizes):
    assert halves(grid)[-len(sizes) :] == sizes
    assert halves(grid)[0] == (1, 1)
    few = make("multiscale", grid, scales=2)
    assert few.scales == sizes[-2:]
    assert few.tokens == sum(h * w for h, w in sizes[-2:])


@pytest.mark.parametrize("shared", [False, True])
def test_every_scale_quantizes_the_error_of_the_coarser_ones(shared):
    torch.manual_seed(0)
    vq = make("multiscale", (4, 4), phi=0.3, shared=shared, **SMALL).eval()
    for convolution in vq.convolutions:
        torch.nn.init.normal_(convolution.weight, std=0.2)
    features = torch.randn(5, 6, 4, 4)
    latent = vq(features, 0)
    rest = vq.projection(features)
    total = torch.zeros_like(rest)
    losses = []
    for i, (codes, size) in enumerate(zip(vq.maps(latent.codes).values(), (1, 2, 4), strict=True)):
        blocks = rest.unflatten(3, (size, -1)).unflatten(2, (size, -1)).mean((3, 5))  # the mean of each position's area
        table = vq.codebooks[0 if shared else i].vectors
        assert_nearest(codes.flatten(), rows(blocks), table)
        part = table[codes].movedim(3, 1)
        if size < 4:
            part = torch.nn.functional.interpolate(part, scale_factor=4 / size, mode="bicubic")
            part = 0.7 * part + 0.3 * vq.convolutions[i](part)
        total, rest = total + part, rest - part
        losses.append(rest.square().mean())
        assert torch.allclose(vq.embed(latent.codes, levels=i + 1), total, atol=1e-5)
    assert torch.allclose(latent.z, total, atol=1e-5)
    assert latent.loss.item() == pytest.approx(2 * torch.stack(losses).mean().item(), rel=1e-4)
    assert latent.codes.shape == (5, 21, 1)


@pytest.mark.parametrize(("shared", "counts"), [(False, [30, 120, 480]), (True, [630])])
def test_every_codebook_learns_from_the_codes_of_its_scales(shared, counts):
    vq = make("multiscale", (4, 4), num_codes=9, code_dim=4, revive=0.0, shared=shared)
    features = torch.randn(30, 6, 4, 4)
    vq.initialize(features)
    vq(features, 0)
    assert [book.counts.sum().item() for book in vq.codebooks] == pytest.approx([0.9 * n for n in counts], rel=1e-4)


def test_the_convolutions_learn_from_the_error_of_each_scale_and_start_as_the_identity():
    vq, plain = (make("multiscale", (4, 4), phi=phi, **SMALL) for phi in (0.5, 0.0))
    plain.load_state_dict({k: v for k, v in vq.state_dict().items() if "convolutions" not in k})
    features = torch.randn(5, 6, 4, 4)
    latent = vq.eval()(features, 0)
    assert torch.allclose(latent.z, plain.eval()(features, 0).z, atol=1e-5)
    latent.loss.backward()
    assert all(convolution.weight.grad.abs().sum() > 0 for convolution in vq.convolutions)
    assert not list(plain.parameters())[2:]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multiscale", {"scales": 4}, "multiscale scales=4: must be at most 3, the halves of the nets' 4x4 grid"),
        ("multiscale", {"phi": 1.5}, "multiscale phi=1.5: must be from 0 to 1"),
        ("residual", {"quantizers": 0}, "residual quantizers=0: must be from 1 to 1024"),
        ("residual", {"dropout": 2.0}, "residual dropout=2.0: must be from 0 to 1"),
        ("grouped", {"groups": 3}, "grouped code_dim=4: must be a multiple of groups=3"),
        ("hierarchy", {"grid": (7, 8)}, "bottleneck=hierarchy: halves the nets' grid, which is 7x8"),
        ("hierarchy", {"grid": (8, 7)}, "bottleneck=hierarchy: halves the nets' grid, which is 8x7"),
        ("hierarchy", {"hidden": 0}, "hierarchy hidden=0: must be from 1 to"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        make(name, **{"grid": (4, 4)} | SMALL | options)
