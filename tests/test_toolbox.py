"""Gradient estimators, and quantizers other than plain VQ, agree with an independent computation or library."""

import itertools
import math
import re

import pytest
import torch
import vector_quantize_pytorch as theirs
from torch.nn import functional as F
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to as their_rotation

from tests.bottleneck_helpers import assert_nearest, clearly_nearest, make, rows, with_identity
from tests.helpers import most_allocated
from vqvae.bottlenecks.base import entropy, vectors_of
from vqvae.bottlenecks.gradients import rotate_to
from vqvae.bottlenecks.nearest import nearest_code
from vqvae.bottlenecks.vq import soft_usage
from vqvae.errors import OptionError


def gradient(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The gradient to `source` of a weighted sum of the value's entries."""
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weights).sum(), source, retain_graph=True)[0]


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
    assert torch.allclose(z, e)
    passed = torch.randn(20, 5).double()
    (found,) = torch.autograd.grad(z, f, passed)
    for i in range(20):
        matrix, scale = rotation_matrix(f[i].detach(), e[i]), e[i].norm() / f[i].detach().norm()
        assert torch.allclose(matrix @ matrix.T, torch.eye(5).double())
        assert torch.allclose(scale * matrix @ f[i].detach(), e[i])
        assert torch.allclose(found[i], scale * matrix.T @ passed[i])


def test_rotation_agrees_with_vector_quantize_pytorch():
    f, e = torch.randn(50, 8, requires_grad=True), torch.randn(50, 8)
    assert torch.allclose(rotate_to(f, e), their_rotation(f, e), atol=1e-5)
    assert torch.allclose(gradient(rotate_to(f, e), f), gradient(their_rotation(f, e), f), atol=1e-5)
    grid = f.detach().view(2, 5, 5, 8).movedim(-1, 1).requires_grad_()  # vectors along dimension 1 of a grid
    assert torch.allclose(rows(rotate_to(grid, e.view(2, 5, 5, 8).movedim(-1, 1))), e)


def test_rotation_of_vectors_without_a_direction():
    def passed(f: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        f = f.clone().requires_grad_()
        return torch.autograd.grad(rotate_to(f, e), f, torch.ones_like(f))[0]

    e = torch.randn(6, 4)
    assert torch.equal(passed(torch.zeros(6, 4), e), torch.ones(6, 4))  # straight through
    assert torch.equal(passed(e, torch.zeros(6, 4)), torch.zeros(6, 4))  # scaled to nothing
    u = F.normalize(e, dim=1)
    assert torch.allclose(passed(-e, e), 1 - 2 * u * u.sum(1, keepdim=True), atol=1e-5)  # a reflection
    assert passed(-e * (1 + 1e-7), e).norm(dim=1).max() < 3  # finite next to it
    assert torch.allclose(passed(e, e), torch.ones(6, 4), atol=1e-5)


# FSQ


@pytest.mark.parametrize("levels", [[8, 8, 8], [8, 5, 5, 5], [3, 4], [7]])
def test_fsq_agrees_with_vector_quantize_pytorch(levels):
    fsq, reference = with_identity("fsq", len(levels), levels=",".join(map(str, levels))), theirs.FSQ(levels)
    features = (3 * torch.randn(50, len(levels), 2, 3)).requires_grad_()
    bounded = fsq.bounded(features.movedim(1, -1))
    assert (bounded - bounded.floor() - 0.5).abs().min() > 1e-5  # no value so close to a half that rounding decides
    latent, (z, codes) = fsq(features, 0), reference(features)
    assert torch.allclose(latent.z, z, atol=1e-5)
    assert torch.equal(latent.codes, codes.long())
    assert torch.allclose(gradient(latent.z, features), gradient(z, features), atol=1e-5)
    assert torch.allclose(fsq.code_vectors(), reference.implicit_codebook, atol=1e-6)


@pytest.mark.parametrize("levels", ["8,6,5", "2,3", "2"])
def test_fsqs_codes_are_its_values_and_all_can_be_reached(levels):
    sizes = [int(size) for size in levels.split(",")]
    fsq = with_identity("fsq", len(sizes), levels=levels)
    scan = fsq.bounded(torch.linspace(-9, 9, 10_001)[:, None].expand(-1, len(sizes))).round().long()
    for values, size in zip(scan.T, sizes, strict=True):
        assert values.unique().tolist() == list(range(-(size // 2), (size + 1) // 2))
    latent = fsq(2 * torch.randn(3000, len(sizes), 2, 3), 0)
    assert len(latent.codes.unique()) == len(fsq.code_vectors().unique(dim=0)) == fsq.num_codes == math.prod(sizes)
    assert torch.allclose(latent.z, fsq.embed(latent.codes), atol=1e-6)
    assert latent.loss == 0


@pytest.mark.parametrize("levels", ["8,1", "8,,5", "8 5", "-3,3", "4.5", "", "99999,99999"])
def test_fsq_refuses_other_words_than_levels(levels):
    shown = re.escape(levels) if levels else "''"
    with pytest.raises(OptionError, match=f"^fsq levels={shown}: must be whole numbers from 2 up, .*$"):
        make("fsq", levels=levels)


def test_fsq_refuses_a_number_that_python_does_not_read():
    with pytest.raises(OptionError, match="must be whole numbers from 2 up"):
        make("fsq", levels="9" * 5000)


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_the_first_features_spread_over_fixed_codes(name):
    bottleneck = make(name, (2, 3), 30)
    features = 0.1 + 0.01 * torch.randn(500, 30, 2, 3)
    assert (bottleneck.usage(bottleneck(features, 0).codes) > 0).sum() < 20
    bottleneck.initialize(features)
    f = rows(bottleneck.projection(features))
    assert torch.allclose(f.mean(0), torch.zeros(f.shape[1]), atol=1e-3)
    assert torch.allclose(f.std(0), torch.ones(f.shape[1]), atol=1e-3)
    assert (bottleneck.usage(bottleneck(features, 0).codes) > 0).sum() > 200


# LFQ


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 10.0])
def test_lfqs_entropies_are_those_of_all_its_codes(bits, temperature):
    lfq = with_identity("lfq", bits, bits=bits, temperature=temperature)
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
    for ours, brute in zip(found, (certain, varied), strict=True):
        assert torch.allclose(gradient(ours, f), gradient(brute, f), atol=1e-9)


def test_lfqs_entropies_stay_finite_far_from_the_boundaries():
    f = (1000 * torch.randn(7, 6)).requires_grad_()
    lfq = with_identity("lfq", 6, bits=6, temperature=0.01)
    for value in lfq.entropies(f):
        assert value.isfinite()
        assert gradient(value, f).isfinite().all()


def test_lfq_agrees_with_vector_quantize_pytorch():
    options = {"entropy_weight": 0.1, "diversity": 0.7, "temperature": 1.0, "beta": 0.25}
    lfq = with_identity("lfq", 5, bits=5, **options)
    reference = theirs.LFQ(dim=5, entropy_loss_weight=0.1, diversity_gamma=0.7, commitment_loss_weight=0.25)
    features = (0.5 * torch.randn(40, 5, 2, 3)).requires_grad_()
    latent = lfq(features, 0)
    z, codes, loss = reference(features, inv_temperature=1.0)
    assert torch.allclose(latent.z, z, atol=1e-5)
    assert torch.equal(latent.codes, codes)
    assert torch.allclose(gradient(latent.z, features), gradient(z, features), atol=1e-5)
    assert latent.loss.item() == pytest.approx(loss.item(), abs=1e-3)  # theirs bounds log p from below by log 1e-5
    assert torch.allclose(lfq.code_vectors(), reference.codebook)
    assert lfq.eval()(features, 0).stats.keys() == {"commitment"}  # the entropies cost time, and only train


def test_lfq_needs_no_table_of_its_codes():
    lfq, features = with_identity("lfq", 18, bits=18), torch.randn(2, 18, 10, 10, requires_grad=True)
    assert most_allocated(lambda: lfq(features, 0).loss.backward()) < 200 * 2**18 * 4 / 10
    latent = lfq(features, 0)
    assert torch.allclose(lfq.embed(latent.codes), latent.z.detach())
    assert latent.stats["usage_entropy"] <= 18 * math.log(2)


@pytest.mark.parametrize(
    "options", [{"bits": 0}, {"bits": 25}, {"temperature": 0.0}, {"diversity": -1.0}, {"entropy_weight": -1.0}]
)
def test_lfq_refuses_options_out_of_range(options):
    with pytest.raises(OptionError, match=f"^lfq {next(iter(options))}=.*: must be .*$"):
        make("lfq", **options)


# SimVQ


@pytest.mark.parametrize("estimator", ["straight-through", "rotation"])
def test_simvq_agrees_with_vector_quantize_pytorch(estimator):
    simvq = with_identity("simvq", 6, num_codes=40, code_dim=6, gradient=estimator)
    reference = theirs.SimVQ(6, 40, channel_first=True, rotation_trick=estimator == "rotation")
    reference.frozen_codebook.copy_(simvq.frozen)
    reference.code_transform.load_state_dict(simvq.mapping.state_dict())
    features = torch.randn(20, 6, 2, 3, requires_grad=True)
    latent, (z, codes, loss) = simvq(features, 0), reference(features)
    expected = clearly_nearest(rows(features), simvq.code_vectors())
    assert torch.equal(latent.codes.flatten(), expected)
    assert torch.equal(codes.flatten(), expected)
    assert torch.allclose(latent.z, z, atol=1e-5)
    assert latent.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(gradient(latent.z, features), gradient(z, features), atol=1e-5)
    assert torch.allclose(gradient(latent.loss, features), gradient(loss, features), atol=1e-5)
    ours, other = gradient(latent.loss, simvq.mapping.weight), gradient(loss, reference.code_transform.weight)
    assert ours.abs().sum() > 0
    assert torch.allclose(ours, other, atol=1e-5)


def test_simvq_moves_codes_that_no_vector_chose():
    simvq = with_identity("simvq", 6, num_codes=40, code_dim=6)
    before, frozen = simvq.code_vectors().detach(), simvq.frozen.clone()
    latent = simvq(torch.randn(1, 6, 1, 3), 0)
    latent.loss.backward()
    torch.optim.SGD(simvq.parameters(), 0.1).step()
    assert torch.equal(simvq.frozen, frozen)
    assert ((simvq.code_vectors() - before).norm(dim=1) > 0).all()


def test_simvqs_table_starts_at_the_centers_of_the_features():
    simvq = with_identity("simvq", 6, num_codes=12, code_dim=6)
    centers = 3 * torch.randn(12, 6)
    features = centers[torch.randint(12, (40, 2, 3))].movedim(-1, 1)
    simvq.initialize(features)
    latent = simvq(features, 0)
    assert len(latent.codes.unique()) == 12
    assert latent.stats["commitment"] < 1e-8


def test_simvqs_random_table_starts_where_the_features_are():
    simvq = make("simvq", (2, 3), 5, num_codes=20_000, code_dim=7, init="normal")
    features = 0.1 + 0.01 * torch.randn(500, 5, 2, 3)
    before = len(simvq(features, 0).codes.unique())
    simvq.initialize(features)
    f, table = vectors_of(simvq.projection(features)), simvq.code_vectors()
    assert torch.allclose(table.mean(0), f.mean(0), atol=0.05)
    assert torch.allclose(torch.cov(table.T), torch.cov(f.T), atol=0.05)
    assert len(simvq(features, 0).codes.unique()) > 10 * before


# cosine


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_cosine_takes_the_code_with_the_smallest_angle(codebook):
    options = {"num_codes": 9, "code_dim": 5, "codebook": codebook, "init": "normal", "revive": 0.0}
    cosine = with_identity("cosine", 5, **options).eval()
    features = torch.randn(4, 5, 2, 3)
    unit = F.normalize(rows(features).double(), dim=1)
    expected = clearly_nearest(unit, F.normalize(cosine.codebook.vectors.double(), dim=1))
    latent = cosine(features, 0)
    assert torch.equal(latent.codes.flatten(), expected)
    assert torch.equal(cosine(7 * features, 0).codes.flatten(), expected)
    assert torch.allclose(latent.z.norm(dim=1), torch.ones(4, 2, 3))
    similarity = F.cosine_similarity(unit[:, None], cosine.codebook.vectors.double(), dim=2)
    assert torch.equal(similarity.argmax(1), expected)
    best = similarity.amax(1)
    assert latent.stats["commitment"].item() == pytest.approx((2 - 2 * best).mean().item() / 5, rel=1e-5)


@pytest.mark.parametrize("init", ["kmeans", "normal"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_cosines_codes_keep_their_length_while_they_learn_and_revive(codebook, init):
    options = {"num_codes": 16, "code_dim": 4, "codebook": codebook, "init": init, "revive": 0.5, "decay": 0.9}
    cosine = with_identity("cosine", 4, **options)
    cosine.initialize(3 * torch.randn(20, 4, 2, 3))
    optimizer = torch.optim.SGD(cosine.parameters(), 0.1)
    first = cosine.code_vectors().detach().clone()
    for step in range(20):
        features = torch.randn(8, 4, 2, 3)
        features[:, 0] = features[:, 0].abs() + 2  # on one side of the sphere: codes on the other die
        cosine(features, step).loss.backward()
        optimizer.step()
    table = cosine.code_vectors()
    assert torch.allclose(table.norm(dim=1), torch.ones(16), atol=1e-5)
    assert not torch.allclose(table, first, atol=0.1)
    assert (table[:, 0] > 0).all()


def test_cosines_updates_are_those_of_a_run_by_hand():
    options = {"num_codes": 3, "code_dim": 4, "init": "normal", "revive": 0.0, "decay": 0.9, "epsilon": 0.0}
    options["warmup"] = False
    cosine, total = with_identity("cosine", 4, **options), torch.zeros(3, 4).double()
    for step in range(5):
        features, before = torch.randn(8, 4, 2, 3), cosine.code_vectors().clone()
        codes = cosine(features, step).codes.flatten()
        f = F.normalize(rows(features).double(), dim=1)
        assert_nearest(codes, f, before)
        total = 0.9 * total + 0.1 * F.one_hot(codes, 3).double().T @ f
        assert torch.allclose(cosine.code_vectors().double(), F.normalize(total, dim=1), atol=1e-5)


# options that vq, cosine and simvq share

SMALL = {"vq": {"init": "normal"}, "cosine": {"init": "normal"}, "simvq": {}}


@pytest.mark.parametrize("name", SMALL)
def test_rotation_gives_the_same_values_with_other_gradients(name):
    options = {"num_codes": 9, "code_dim": 4, **SMALL[name]}
    straight, rotated = with_identity(name, 4, **options), with_identity(name, 4, gradient="rotation", **options)
    rotated.load_state_dict(straight.state_dict())
    features = torch.randn(3, 4, 2, 3, requires_grad=True)
    a, b = straight.eval()(features, 0), rotated.eval()(features, 0)
    assert torch.allclose(a.z, b.z, atol=1e-6)
    assert torch.allclose(a.loss, b.loss)
    expected = gradient(rotate_to(rotated.project(features), b.z.detach()), features)
    assert torch.allclose(gradient(b.z, features), expected, atol=1e-5)
    assert not torch.allclose(gradient(a.z, features), gradient(b.z, features), atol=1e-3)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_soft_usage_and_its_entropy_agree_with_brute_force_and_finite_differences(temperature):
    f, table = torch.randn(12, 3).double().requires_grad_(), torch.randn(7, 3).double().requires_grad_()
    squares = torch.stack([(v - table).square().sum(1) for v in f])
    p = torch.stack([torch.exp(-d / temperature) / torch.exp(-d / temperature).sum() for d in squares]).mean(0)
    assert torch.allclose(soft_usage(f, table, temperature), p)
    assert torch.allclose(entropy(p), torch.distributions.Categorical(p).entropy())
    assert torch.autograd.gradcheck(lambda f, e: entropy(soft_usage(f, e, temperature)), (f, table))


def test_entropy_has_a_gradient_where_a_probability_is_0():
    logits = torch.tensor([0.0, 1.0, -1e4], requires_grad=True)
    assert gradient(entropy(logits.softmax(0)), logits).isfinite().all()


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("name", ["vq", "cosine"])
def test_diversity_is_subtracted_from_the_loss(name, codebook):
    options = {"num_codes": 9, "code_dim": 4, "codebook": codebook, "init": "normal", "temperature": 0.5}
    plain, diverse = with_identity(name, 4, **options), with_identity(name, 4, diversity=0.3, **options)
    diverse.load_state_dict(plain.state_dict())
    features = torch.randn(3, 4, 2, 3, requires_grad=True)
    f = vectors_of(diverse.project(features))
    varied = entropy(soft_usage(f, diverse.code_vectors().detach().clone(), 0.5))
    expected = plain(features, 0).loss - 0.3 * varied
    latent = diverse(features, 0)
    assert torch.allclose(latent.loss, expected)
    assert torch.allclose(gradient(latent.loss, features), gradient(expected, features), atol=1e-6)
    assert latent.stats["usage_entropy"].item() == pytest.approx(varied.item())


def test_diversity_spreads_usage():
    table = torch.randn(9, 4)
    f = table[0] + 0.1 * torch.randn(60, 4)  # all next to one code
    assert len(nearest_code(f, table).unique()) == 1
    for _ in range(200):
        f.requires_grad_()
        f = (f + 30 * torch.autograd.grad(entropy(soft_usage(f, table, 4.0)), f)[0]).detach()
    assert len(nearest_code(f, table).unique()) > 5


@pytest.mark.parametrize("name", ["vq", "cosine"])
def test_diversity_costs_nothing_where_it_is_0_or_nothing_trains(name, monkeypatch):
    monkeypatch.delattr("vqvae.bottlenecks.vq.soft_usage")
    features = torch.randn(3, 4, 2, 3)
    with_identity(name, 4, num_codes=9, code_dim=4)(features, 0)
    diverse = with_identity(name, 4, num_codes=9, code_dim=4, diversity=0.1)
    diverse.quantize(features)
    diverse.eval()(features, 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vq", {"diversity": -0.1}),
        ("vq", {"temperature": 0.0}),
        ("cosine", {"diversity": float("nan")}),
        ("cosine", {"code_dim": 0}),
        ("cosine", {"revive": 2.0}),
        ("simvq", {"num_codes": 0}),
        ("simvq", {"beta": -1.0}),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, options):
    with pytest.raises(OptionError, match=f"^{name} {next(iter(options))}=.*: must be .*$"):
        make(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vq", {"gradient": "rotation", "diversity": 0.1}),
        ("vq", {"codebook": "gradient", "diversity": 0.1}),
        ("cosine", {"gradient": "rotation", "diversity": 0.1}),
        ("simvq", {"gradient": "rotation"}),
        ("fsq", {}),
        ("lfq", {}),
        ("residual", {}),
        ("grouped", {"codebook": "gradient"}),
    ],
)
def test_nothing_is_decided_by_values_on_the_device(name, options):
    bottleneck = make(name, (2, 3), **options).to("meta")  # tensors on it have no values
    features = torch.randn(4, 6, 2, 3, device="meta", requires_grad=True)
    latent = bottleneck(features, 0)
    (latent.z.sum() + latent.loss).backward()
    assert features.grad.shape == features.shape
    assert bottleneck.embed(latent.codes).shape == latent.z.shape
    assert bottleneck.quantize(features).codes.shape == latent.codes.shape
