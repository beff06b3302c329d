"""Several codes per position: residual, grouped and two-level quantisation."""

import pytest
import torch

from vqvae.bottlenecks.multilevel import GroupedVQ, Hierarchy, ResidualVQ
from vqvae.errors import UserError

SMALL = {"channels": 6, "num_codes": 9, "code_dim": 4, "init": "normal", "revive": 0.0}


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).flatten(0, 2)


@pytest.mark.parametrize("levels", [1, 3])
def test_residual_quantisation_agrees_with_vector_quantize_pytorch(levels):
    library = pytest.importorskip("vector_quantize_pytorch")
    ours = ResidualVQ(grid=(2, 4), quantisers=levels, **SMALL).eval()
    theirs = library.ResidualVQ(dim=4, num_quantizers=levels, codebook_size=9, rotation_trick=False).eval()
    for book, layer in zip(ours.codebooks, theirs.layers, strict=True):
        layer._codebook.embed.data.copy_(book.vectors[None])
    features = torch.randn(5, 6, 2, 4)
    latent = ours(features, 0)
    f = ours.projection(features).flatten(2).transpose(1, 2)  # [B, h w, D]
    quantised, indices, _ = theirs(f)
    assert torch.allclose(latent.z.flatten(2).transpose(1, 2), quantised, atol=1e-5)
    for i, codes in enumerate(ours.maps(latent.codes).values()):
        assert torch.equal(codes.flatten(1), indices[..., i])
    theirs.train()
    losses = theirs(f, freeze_codebook=True)[2]
    assert latent.loss.item() == pytest.approx(0.25 * losses.mean().item(), abs=1e-5)


def test_residual_levels_each_quantise_what_is_left():
    vq = ResidualVQ(grid=(2, 4), quantisers=3, **SMALL).eval()
    features = torch.randn(5, 6, 2, 4)
    latent = vq(features, 0)
    rest, total = rows(vq.projection(features)).double(), 0
    for book, codes in zip(vq.codebooks, vq.maps(latent.codes).values(), strict=True):
        expected = torch.cdist(rest, book.vectors.double()).argmin(1)
        assert torch.equal(codes.flatten(), expected)
        total, rest = total + book.vectors[expected].double(), rest - book.vectors[expected].double()
    assert torch.allclose(rows(latent.z).double(), total, atol=1e-5)
    assert torch.allclose(rows(vq.embed(latent.codes, levels=1)), vq.codebooks[0].vectors[rows_of(vq, latent)])


def rows_of(vq, latent) -> torch.Tensor:
    return vq.maps(latent.codes)["level 1"].flatten()


def test_more_residual_levels_leave_less_after_k_means():
    features = torch.randn(300, 6, 2, 4)
    errors = []
    for levels in (1, 2, 4):
        torch.manual_seed(0)
        vq = ResidualVQ(grid=(2, 4), quantisers=levels, **SMALL | {"init": "kmeans", "num_codes": 16})
        vq.initialise(features)
        f = vq.projection(features)
        errors.append((vq.eval()(features, 0).z - f).square().mean().item() / f.var().item())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_quantiser_dropout_trains_prefixes_and_moves_only_their_codebooks():
    vq = ResidualVQ(grid=(2, 4), quantisers=4, dropout=1.0, **SMALL)
    features = torch.randn(5, 6, 2, 4)
    depths = set()
    for step in range(40):
        torch.manual_seed(step)
        before = [book.vectors.clone() for book in vq.codebooks]
        latent = vq(features, step)
        moved = [not torch.equal(book.vectors, b) for book, b in zip(vq.codebooks, before, strict=True)]
        depth = sum(moved)
        assert moved == [i < depth for i in range(4)]
        depths.add(depth)
        after = [book.vectors.clone() for book in vq.codebooks]
        for book, b in zip(vq.codebooks, before, strict=True):
            book.vectors.copy_(b)
        assert torch.allclose(latent.z, vq.embed(latent.codes, levels=depth), atol=1e-5)
        for book, a in zip(vq.codebooks, after, strict=True):
            book.vectors.copy_(a)
    assert depths == {1, 2, 3, 4}


def test_groups_are_quantised_by_themselves():
    vq = GroupedVQ(grid=(2, 4), groups=2, **SMALL).eval()
    features = torch.randn(5, 6, 2, 4)
    latent = vq(features, 0)
    f = rows(vq.projection(features)).double()
    maps = list(vq.maps(latent.codes).values())
    for i, part in enumerate(f.chunk(2, 1)):
        expected = torch.cdist(part, vq.codebooks[i].vectors.double()).argmin(1)
        assert torch.equal(maps[i].flatten(), expected)
        assert torch.allclose(rows(latent.z).chunk(2, 1)[i], vq.codebooks[i].vectors[expected], atol=1e-6)


@pytest.mark.parametrize("kind", [ResidualVQ, GroupedVQ])
def test_commitment_alone_reaches_the_encoder(kind):
    vq = kind(grid=(2, 4), codebook="gradient", **SMALL)
    f = torch.randn(3, 6, 2, 4, requires_grad=True)
    vq(f, 0).loss.backward()
    assert all(book.vectors.grad.abs().sum() > 0 for book in vq.codebooks)
    doubled = torch.autograd.grad(kind.forward(vq, f, 0).loss, f)[0]
    vq.beta *= 2
    assert torch.allclose(torch.autograd.grad(vq(f, 0).loss, f)[0], 2 * doubled, atol=1e-7)


def test_the_hierarchys_grid_comes_apart_into_its_levels():
    vq = Hierarchy(grid=(4, 6), hidden=5, **SMALL).eval()
    assert vq.grid == (2 + 8, 3)
    features = torch.randn(3, 6, 4, 6)
    latent = vq(features, 0)
    coarse = vq.down(features)
    top = vq.top(coarse, 0)
    bottom = vq.bottom(torch.cat([features, vq.decode_top(top.z)], 1), 0)
    maps = vq.maps(latent.codes)
    assert torch.equal(maps["top"], top.codes)
    assert torch.equal(maps["bottom"], bottom.codes)
    # codes of one place stand in one column: the bottom's column 2 c + parity in column c
    assert torch.equal(latent.codes[:, 2 + 2 * 1 + 1, 2], bottom.codes[:, 1, 5])
    assert torch.allclose(vq.embed(latent.codes), latent.z, atol=1e-6)
    assert vq.embed(latent.codes, levels=1)[:, 4:].abs().max() == 0


def test_the_bottom_sees_the_top():
    vq = Hierarchy(grid=(4, 4), hidden=5, **SMALL).eval()
    features = torch.randn(6, 6, 4, 4)
    before = vq.maps(vq(features, 0).codes)["bottom"]
    for p in vq.decode_top.parameters():
        torch.nn.init.normal_(p, std=2.0)
    assert not torch.equal(vq.maps(vq(features, 0).codes)["bottom"], before)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ResidualVQ, {"quantisers": 0}, "quantisers=0"),
        (ResidualVQ, {"dropout": 2.0}, "dropout=2"),
        (GroupedVQ, {"groups": 3}, "multiple of groups=3"),
        (Hierarchy, {"grid": (7, 7)}, "7x7 cannot be halved"),
        (Hierarchy, {"hidden": 0}, "hidden=0"),
    ],
)
def test_options_that_cannot_be_are_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind(**({"grid": (4, 4)} | SMALL | options))
