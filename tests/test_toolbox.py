"""Quantisers beside plain VQ: each against an independent computation, in float64 or by another library."""

import itertools
import math

import pytest
import torch
import vector_quantize_pytorch as theirs
from torch.nn import functional as F
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to as their_rotation

from vqvae.bottlenecks import BOTTLENECKS
from vqvae.bottlenecks.codebook import Discrete, rotate_to
from vqvae.errors import UserError


def make(name: str, channels: int, **options) -> Discrete:
    """A bottleneck whose projection is the identity, so that features are what it quantises."""
    bottleneck = BOTTLENECKS[name](channels=channels, grid=(2, 3), **options)
    torch.nn.init.dirac_(bottleneck.projection.weight)
    torch.nn.init.zeros_(bottleneck.projection.bias)
    return bottleneck


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Of a sum of the value's entries with weights that differ."""
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weights).sum(), of, retain_graph=True)[0]


# rotation trick


def rotation_matrix(f: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The rotation of f's direction onto e's as the product of two Householder reflections, in float64."""
    u, q = F.normalize(f, dim=0), F.normalize(e, dim=0)
    w = F.normalize(u + q, dim=0)
    reflect = torch.eye(len(f), dtype=f.dtype) - 2 * torch.outer(w, w)  # takes u to -q
    return (torch.eye(len(f), dtype=f.dtype) - 2 * torch.outer(q, q)) @ reflect


def test_rotation_has_the_gradient_of_householders_matrices():
    f, e = torch.randn(20, 5).double().requires_grad_(), torch.randn(20, 5).double()
    z = rotate_to(f, e)
    assert torch.equal(z, e)
    passed = torch.randn(20, 5).double()
    (found,) = torch.autograd.grad(z, f, passed)
    for i in range(20):
        matrix, scale = rotation_matrix(f[i].detach(), e[i]), e[i].norm() / f[i].detach().norm()
        assert torch.allclose(matrix @ matrix.T, torch.eye(5).double())
        assert torch.allclose(scale * matrix @ f[i].detach(), e[i])
        assert torch.allclose(found[i], scale * matrix.T @ passed[i])


def test_rotation_equals_vector_quantize_pytorch():
    f, e = torch.randn(50, 8, requires_grad=True), torch.randn(50, 8)
    assert torch.allclose(rotate_to(f, e), their_rotation(f, e), atol=1e-5)
    assert torch.allclose(gradient(rotate_to(f, e), f), gradient(their_rotation(f, e), f), atol=1e-5)
    grid = f.detach().view(2, 5, 5, 8).movedim(-1, 1).requires_grad_()  # vectors along dimension 1 of a grid
    assert torch.equal(rotate_to(grid, e.view(2, 5, 5, 8).movedim(-1, 1)).movedim(1, -1).reshape(50, 8), e)


def test_rotation_of_vectors_without_a_direction():
    def passed(f: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        f = f.clone().requires_grad_()
        return torch.autograd.grad(rotate_to(f, e), f, torch.ones_like(f))[0]

    e = torch.randn(6, 4)
    assert torch.equal(passed(torch.zeros(6, 4), e), torch.ones(6, 4))  # straight through
    assert torch.equal(passed(e, torch.zeros(6, 4)), torch.zeros(6, 4))  # scaled to nothing
    u = F.normalize(e, dim=1)
    assert torch.allclose(passed(-e, e), 1 - 2 * u * u.sum(1, keepdim=True), atol=1e-5)  # a reflection
    assert passed(-e * (1 + 1e-7), e).norm(dim=1).max() < 3  # no blow-up beside it
    assert torch.allclose(passed(e, e), torch.ones(6, 4), atol=1e-5)


# FSQ


@pytest.mark.parametrize("levels", [[8, 8, 8], [8, 5, 5, 5], [3, 4], [7]])
def test_fsq_equals_vector_quantize_pytorch(levels):
    fsq, reference = make("fsq", len(levels), levels=",".join(map(str, levels))), theirs.FSQ(levels)
    features = (3 * torch.randn(50, len(levels), 2, 3)).requires_grad_()
    latent, (z, codes) = fsq(features, 0), reference(features)
    assert torch.allclose(latent.z, z, atol=1e-5)
    assert torch.equal(latent.codes, codes.long())
    assert torch.allclose(gradient(latent.z, features), gradient(z, features), atol=1e-5)
    assert torch.allclose(fsq.code_vectors(), reference.implicit_codebook, atol=1e-6)


@pytest.mark.parametrize("levels", ["8,6,5", "2,3", "2"])
def test_fsqs_codes_are_its_values_and_all_can_be_reached(levels):
    sizes = [int(size) for size in levels.split(",")]
    fsq = make("fsq", len(sizes), levels=levels)
    scan = fsq.bounded(torch.linspace(-9, 9, 10_001)[:, None].expand(-1, len(sizes))).round().long()
    for values, size in zip(scan.T, sizes, strict=True):
        assert values.unique().tolist() == list(range(-(size // 2), (size + 1) // 2))
    latent = fsq(2 * torch.randn(300, len(sizes), 2, 3), 0)
    assert len(latent.codes.unique()) == len(fsq.code_vectors().unique(dim=0)) == fsq.num_codes == math.prod(sizes)
    assert torch.allclose(latent.z, fsq.embed(latent.codes), atol=1e-6)
    assert latent.loss == 0


@pytest.mark.parametrize("levels", ["8,1", "8,,5", "8 5", "-3,3", "4.5", "", "99999,99999"])
def test_fsq_refuses_levels_that_are_none(levels):
    with pytest.raises(UserError, match=f"^--bottleneck fsq: levels={levels} .*$"):
        make("fsq", 1, levels=levels)


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_the_first_features_spread_over_fixed_codes(name):
    bottleneck = BOTTLENECKS[name](channels=30, grid=(2, 3))
    features = 0.1 + 0.01 * torch.randn(500, 30, 2, 3)
    assert (bottleneck.usage(bottleneck(features, 0).codes) > 0).sum() < 20
    bottleneck.initialise(features)
    f = bottleneck.projection(features).movedim(1, -1).flatten(0, 2)
    assert torch.allclose(f.mean(0), torch.zeros(f.shape[1]), atol=1e-3)
    assert torch.allclose(f.std(0), torch.ones(f.shape[1]), atol=1e-3)
    assert (bottleneck.usage(bottleneck(features, 0).codes) > 0).sum() > 200


# LFQ


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 10.0])
def test_lfqs_entropies_equal_those_of_all_its_codes(bits, temperature):
    lfq = make("lfq", bits, bits=bits, temperature=temperature)
    f = torch.randn(60, bits).double().requires_grad_()
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits))).double()
    assert torch.equal(lfq.code_vectors().double(), corners)
    log_p = (-(f[:, None] - corners).square().sum(-1) / temperature).log_softmax(-1)
    certain = -(log_p.exp() * log_p).sum(-1).mean()
    mean = log_p.exp().mean(0)
    varied = -(mean * mean.log()).sum()
    found = lfq.entropies(f)
    assert torch.allclose(found[0], certain)
    assert torch.allclose(found[1], varied)
    for mine, brute in zip(found, (certain, varied), strict=True):
        assert torch.allclose(gradient(mine, f), gradient(brute, f), atol=1e-9)


def test_lfqs_entropies_stay_finite_far_from_the_boundaries():
    f = (1000 * torch.randn(7, 6)).requires_grad_()
    lfq = make("lfq", 6, bits=6, temperature=0.01)
    for value in lfq.entropies(f):
        assert value.isfinite()
        assert gradient(value, f).isfinite().all()


def test_lfq_equals_vector_quantize_pytorch():
    options = {"entropy_weight": 0.1, "diversity": 0.7, "temperature": 1.0, "beta": 0.25}
    lfq = make("lfq", 5, bits=5, **options)
    reference = theirs.LFQ(dim=5, entropy_loss_weight=0.1, diversity_gamma=0.7, commitment_loss_weight=0.25)
    features = (0.5 * torch.randn(40, 5, 2, 3)).requires_grad_()
    latent = lfq(features, 0)
    z, codes, loss = reference(features, inv_temperature=1.0)
    assert torch.allclose(latent.z, z, atol=1e-5)
    assert torch.equal(latent.codes, codes)
    assert torch.allclose(gradient(latent.z, features), gradient(z, features), atol=1e-5)
    assert latent.loss.item() == pytest.approx(loss.item(), abs=1e-3)  # theirs bounds log p from below by log 1e-5
    assert torch.allclose(lfq.code_vectors(), reference.codebook)


def test_more_bits_than_a_table_of_codes_could_hold():
    lfq = make("lfq", 18, bits=18)
    latent = lfq(torch.randn(2, 18, 2, 3, requires_grad=True), 0)
    latent.loss.backward()
    assert torch.equal(lfq.embed(latent.codes), latent.z.detach())
    assert latent.stats["usage_entropy"] <= 18 * math.log(2)


@pytest.mark.parametrize(
    "options", [{"bits": 0}, {"bits": 25}, {"temperature": 0.0}, {"diversity": -1.0}, {"entropy_weight": -1.0}]
)
def test_lfq_refuses_options_out_of_range(options):
    with pytest.raises(UserError, match=f"^--bottleneck lfq: {next(iter(options))}=.*$"):
        make("lfq", 4, **options)
