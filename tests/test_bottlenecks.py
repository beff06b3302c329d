"""Bottlenecks: codebook maths against brute force and float64, and properties of every row of the table."""

import math

import numpy as np
import pytest
import torch

from vqvae.bottlenecks import BOTTLENECKS
from vqvae.bottlenecks.codebook import (
    code_usage,
    first_codebook,
    kmeans_codebook,
    perplexity,
    straight_through,
)
from vqvae.bottlenecks.nearest import nearest_code
from vqvae.bottlenecks.vq import VQ
from vqvae.errors import UserError
from vqvae.members import signature


def make_vq(**options) -> VQ:
    defaults = {"num_codes": 8, "code_dim": 4, "projection": False, "init": "normal", "revive": 0.0}
    return VQ(channels=4, grid=(2, 2), **(defaults | options))


@pytest.mark.parametrize(("num_codes", "dim"), [(1, 5), (7, 5), (64, 5), (512, 64), (3000, 5), (8192, 64)])
def test_nearest_code_equals_brute_force_in_float64(num_codes, dim):
    z, codebook = torch.randn(700, dim), torch.randn(num_codes, dim)
    distances = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    best, found = distances.min(dim=1).values, distances[torch.arange(700), nearest_code(z, codebook)]
    # another code only where the two are equally near up to the rounding of numbers as large as squared norms
    assert (found - best).max() < 1e-6 * codebook.square().sum(dim=1).max()
    assert torch.equal(nearest_code(z.double(), codebook.double()), distances.argmin(dim=1))


def test_nearest_code_takes_the_first_of_equals_and_accepts_nothing():
    assert nearest_code(torch.zeros(3, 2), torch.ones(4, 2)).tolist() == [0, 0, 0]
    codebook = torch.zeros(5000, 2)
    codebook[[70, 90, 100, 4000]] = 1
    assert nearest_code(torch.ones(3, 2), codebook).tolist() == [70, 70, 70]
    assert nearest_code(torch.zeros(0, 2), torch.ones(4, 2)).shape == (0,)


def test_nearest_code_is_a_code_whatever_the_vectors_are():
    strange = torch.tensor([[math.inf, 0], [-math.inf, 1], [math.nan, 0], [3e38, 3e38]])
    assert (nearest_code(strange, torch.randn(70, 2)) < 70).all()


def test_straight_through_passes_the_value_of_one_and_the_gradient_of_the_other():
    z, quantised = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    out = straight_through(z, quantised)
    assert torch.allclose(out, quantised)
    (out * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert z.grad.tolist() == [1.0, 2.0, 3.0]
    assert quantised.grad is None


def test_perplexity_of_known_usages():
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 5.0])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([9.0, 0.0])).item() == pytest.approx(1)
    p = np.array([0.5, 0.25, 0.25])
    assert perplexity(torch.tensor(p * 40)).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_code_usage_counts():
    codes = torch.randint(9, (3, 4, 5))
    assert code_usage(codes, 11).tolist() == np.bincount(codes.flatten().numpy(), minlength=11).tolist()


@pytest.mark.parametrize(("init", "limit"), [("uniform", 1 / 50), ("fan-in", math.sqrt(3 / 6))])
def test_first_codebook_fills_its_interval(init, limit):
    values = first_codebook(init, 50, 6)
    assert values.shape == (50, 6)
    assert 0.9 * limit < values.abs().max() <= limit
    assert first_codebook("normal", 4000, 6).std().item() == pytest.approx(1, abs=0.02)


def test_kmeans_finds_separated_clusters_and_survives_few_vectors():
    centres = torch.eye(5, 3 * 5)[:, :15] * 10
    vectors = centres.repeat(40, 1) + 0.01 * torch.randn(200, 15)
    found = kmeans_codebook(vectors, 5)
    assert torch.cdist(centres, found).min(dim=1).values.max() < 0.05
    few = kmeans_codebook(torch.randn(3, 4), 10)
    assert few.shape == (10, 4)
    assert few.isfinite().all()


def test_commitment_moves_the_encoder_and_codebook_loss_moves_the_codes():
    vq = make_vq(codebook="gradient", beta=0.25)
    features = torch.randn(2, 4, 2, 2, requires_grad=True)
    latent = vq(features, 0)
    f = features.detach().permute(0, 2, 3, 1).reshape(-1, 4).double()
    e = vq.codebook.vectors.detach()[latent.codes.flatten()].double()
    assert latent.loss.item() == pytest.approx(1.25 * (f - e).square().mean().item(), rel=1e-5)
    latent.loss.backward()
    expected = 0.25 * 2 * (f - e) / f.numel()  # only beta's term reaches the encoder
    assert torch.allclose(features.grad.permute(0, 2, 3, 1).reshape(-1, 4).double(), expected, atol=1e-6)
    codes = torch.zeros(8, 4).double().index_add_(0, latent.codes.flatten(), 2 * (e - f) / f.numel())
    assert torch.allclose(vq.codebook.vectors.grad.double(), codes, atol=1e-6)  # and only the other reaches the codes


def test_ema_codebook_is_not_trained_by_gradient():
    vq = make_vq()
    assert not list(vq.parameters())
    assert make_vq(beta=0.5, weight=10.0)(torch.randn(2, 4, 2, 2), 0).loss.requires_grad is False


def test_ema_matches_a_run_by_hand():
    decay, eps = 0.9, 1e-3
    vq = make_vq(num_codes=3, decay=decay, epsilon=eps)
    count, total = np.zeros(3), np.zeros((3, 4))
    codebook = vq.codebook.vectors.double().numpy().copy()
    for t in range(1, 6):
        features = torch.randn(5, 4, 2, 2)
        vq(features, t)
        f = features.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
        # every code is chosen with the codebook from before the update
        codes = ((f[:, None] - codebook[None]) ** 2).sum(-1).argmin(1)
        one_hot = np.eye(3)[codes]
        count = decay * count + (1 - decay) * one_hot.sum(0)
        total = decay * total + (1 - decay) * one_hot.T @ f
        n, m = count / (1 - decay**t), total / (1 - decay**t)
        smoothed = (n + eps) / (n.sum() + 3 * eps) * n.sum()
        codebook = np.where(n[:, None] > 0, m / smoothed[:, None], codebook)
        assert np.allclose(vq.codebook.vectors.numpy(), codebook, atol=1e-5)


def test_a_code_never_used_keeps_its_value():
    vq = make_vq(num_codes=2)
    vq.codebook.vectors.copy_(torch.tensor([[0.0] * 4, [100.0] * 4]))
    vq(torch.randn(3, 4, 2, 2), 0)
    assert vq.codebook.vectors[1].tolist() == [100.0] * 4


def test_evaluation_changes_nothing():
    vq = make_vq(revive=0.5).eval()
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    for step in range(5):
        vq(torch.randn(3, 4, 2, 2), step)
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_revival_moves_dead_codes_onto_data_where_they_stay(codebook):
    def far_codes_after(revive: float, steps: int) -> int:
        vq = make_vq(codebook=codebook, revive=revive, decay=0.9)
        with torch.no_grad():
            vq.codebook.vectors[1:] = 1e3 + torch.arange(7.0)[:, None]  # seven codes that no vector will ever choose
        for step in range(steps):
            vq(torch.randn(16, 4, 2, 2), step)
        return int((vq.codebook.vectors.norm(dim=1) > 100).sum())

    assert far_codes_after(0.0, 40) == 7
    assert far_codes_after(0.1, 2) == 7  # the counts have yet to settle
    assert far_codes_after(0.1, 3) == 0
    assert far_codes_after(0.1, 40) == 0  # later updates do not undo it


def test_revived_codes_are_used():
    vq = make_vq(num_codes=32, revive=0.1, decay=0.9)
    vq.codebook.vectors[1:] += 1e3
    for step in range(60):
        codes = vq(torch.randn(64, 4, 2, 2), step).codes
    assert len(codes.unique()) > 24


@pytest.mark.parametrize(
    "options", [{"num_codes": 0}, {"code_dim": 0}, {"beta": -1.0}, {"decay": 1.0}, {"revive": 2.0}]
)
def test_vq_refuses_options_out_of_range(options):
    name = next(iter(options))
    with pytest.raises(UserError, match=name):
        make_vq(**options)


def test_vq_without_projection_needs_equal_widths():
    with pytest.raises(UserError, match="code_dim=3"):
        make_vq(code_dim=3)


def make(name: str, grid: tuple = (2, 4), channels: int = 6, **options):
    """A member of the table with the wiring that it asks for."""
    wiring = {"channels": channels, "grid": grid, "total_steps": 10}
    return BOTTLENECKS[name](**{key: wiring[key] for key in signature(BOTTLENECKS[name])[0]}, **options)


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_every_bottleneck_keeps_the_contract(name):
    grid = (1, 1) if name == "gaussian" else (2, 4)
    bottleneck = make(name, grid)
    features = torch.randn(4, 6, *grid, requires_grad=True)
    latent = bottleneck(features, 0)
    assert len(latent.z) % 4 == 0
    assert latent.z.shape[1] == bottleneck.code_dim
    assert latent.log_q.shape == (len(latent.z),)
    assert latent.loss.shape == ()
    if latent.assignments is not None:
        assert latent.assignments.shape == (len(latent.z), bottleneck.num_codes, *bottleneck.grid)
        assert torch.allclose(latent.assignments.sum(1), torch.ones(len(latent.z), *bottleneck.grid), atol=1e-3)
    (latent.z.square().mean() + latent.loss).backward()
    assert features.grad.abs().sum() > 0
    bottleneck.eval()
    again, mode = bottleneck(features.detach(), 1), bottleneck.mode(features.detach())
    assert torch.equal(mode.z, bottleneck.mode(features.detach()).z)
    if bottleneck.num_codes is not None:
        assert again.codes.dtype == torch.int64
        assert 0 <= again.codes.min() <= again.codes.max() < bottleneck.num_codes
        assert torch.allclose(bottleneck.embed(again.codes), again.z, atol=1e-6)
        assert again.codes.shape == (4, *bottleneck.grid)
        assert torch.allclose(bottleneck.embed(mode.codes), mode.z, atol=1e-6)
        assert bottleneck.usage(mode.codes).sum() == mode.codes.numel()
        assert bottleneck.code_vectors().shape[0] == bottleneck.num_codes
        if not bottleneck.stochastic:
            assert torch.equal(again.codes, mode.codes)


def test_gaussians_log_q_is_torchs_and_its_gradient_reaches_both_heads():
    gaussian = BOTTLENECKS["gaussian"](channels=5, grid=(1, 1), latents=3)
    features = torch.randn(7, 5, 1, 1)
    latent = gaussian(features, 0)
    mean, log_std = gaussian.posterior(features)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(latent.z).flatten(1).sum(1)
    assert torch.allclose(latent.log_q, expected, atol=1e-4)
    (latent.log_q.sum() + latent.z.square().sum()).backward()
    assert (gaussian.head.weight.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_gaussian_draws_have_its_moments():
    gaussian = BOTTLENECKS["gaussian"](channels=5, grid=(1, 1), latents=2)
    features = torch.randn(1, 5, 1, 1).expand(50_000, -1, -1, -1)
    mean, log_std = (t[0].flatten() for t in gaussian.posterior(features))
    z = gaussian(features, 0).z.flatten(1)
    assert torch.allclose(z.mean(0), mean, atol=0.05)
    assert torch.allclose(z.std(0), log_std.exp(), rtol=0.03)


@pytest.mark.parametrize(("options", "message"), [({"latents": 0}, "latents=0"), ({"grid": (2, 2)}, "--nets conv-vae")])
def test_gaussian_refuses_what_it_cannot_do(options, message):
    with pytest.raises(UserError, match=message):
        BOTTLENECKS["gaussian"](**({"channels": 3, "grid": (1, 1)} | options))
