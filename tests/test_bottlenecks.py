"""Codebooks agree with computations by hand in float64, and every bottleneck keeps the contract."""

import math

import numpy as np
import pytest
import torch

from tests.bottleneck_helpers import assert_nearest, make, rows
from tests.helpers import most_allocated
from vqvae import devices
from vqvae.bottlenecks import BOTTLENECKS, codebook, nearest
from vqvae.bottlenecks.categorical import Deterministic
from vqvae.bottlenecks.codebook import first_codebook, kmeans_codebook
from vqvae.bottlenecks.gradients import straight_through
from vqvae.bottlenecks.nearest import nearest_code
from vqvae.bottlenecks.vq import VQ, VQOptions, soft_usage
from vqvae.contracts import Continuous, Discrete, count_codes
from vqvae.errors import OptionError


def make_vq(*, projection: bool = False, **options) -> VQ:
    """A small VQ without projection, k-means and revival."""
    values = {"num_codes": 8, "code_dim": 4, "init": "normal", "revive": 0.0} | options
    return VQ(channels=4, grid=(2, 2), options=VQOptions(**values), projection=projection)


# the search for the nearest code


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("vectors", [300, 307])  # as images, or as a matrix product
@pytest.mark.parametrize(("num_codes", "dim"), [(1, 5), (7, 5), (64, 1), (64, 5), (512, 64), (3000, 5), (8192, 64)])
def test_no_code_is_nearer_than_the_one_found(num_codes, dim, vectors, avx512, monkeypatch):
    monkeypatch.setattr(devices, "AVX512", avx512)
    z, codebook = torch.randn(vectors, dim), torch.randn(num_codes, dim)
    assert_nearest(nearest_code(z, codebook), z, codebook)
    assert_nearest(nearest_code(z.double(), codebook.double()), z, codebook, tolerance=1e-12)


@pytest.mark.parametrize("avx512", [False, True])
def test_autocast_does_not_change_the_codes(avx512, monkeypatch):
    monkeypatch.setattr(devices, "AVX512", avx512)
    z, codebook = torch.randn(320, 16), torch.randn(200, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_nearest(nearest_code(z, codebook), z, codebook)


@pytest.fixture
def small_tiles(monkeypatch):
    """A search on the CPU whose tiles have 32 vectors and whose blocks have 128 codes."""
    monkeypatch.setattr(nearest, "TILE_SCORES", {"cpu": 32 * 128})
    monkeypatch.setattr(nearest, "BLOCK", 128)


@pytest.mark.parametrize("num_codes", [127, 128, 129, 1000])
def test_tiles_of_vectors_and_blocks_of_codes_miss_no_code(small_tiles, num_codes):
    z, codebook = torch.randn(100, 5), torch.randn(num_codes, 5)
    assert_nearest(nearest_code(z, codebook), z, codebook)
    assert nearest_code(codebook, codebook).tolist() == list(range(num_codes))


def test_the_search_needs_little_more_memory_than_its_input(small_tiles):
    z, codebook = torch.randn(1000, 5), torch.randn(1000, 5)
    assert most_allocated(lambda: nearest_code(z, codebook)) < 1000 * 1000 * 4 / 20


def test_of_equally_near_codes_one_is_chosen():
    assert set(nearest_code(torch.zeros(3, 2), torch.ones(4, 2)).tolist()) <= {0, 1, 2, 3}
    codebook = torch.zeros(5000, 2)
    equal = [70, 90, 100, 4000]
    codebook[equal] = 1
    assert set(nearest_code(torch.ones(3, 2), codebook).tolist()) <= set(equal)


@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_an_offset_that_all_vectors_share_changes_no_code(offset):
    # multiples of 1/4: the shifted vectors are exact, so that every change would be one of the search
    z, codebook = (torch.randn(n, 16).mul(4).round() / 4 for n in (300, 256))
    assert_nearest(nearest_code(z + offset, codebook + offset), z, codebook)


def test_soft_usage_and_the_posterior_do_not_depend_on_an_offset_either():
    z, codebook = (torch.randn(n, 16).mul(4).round() / 4 for n in (300, 256))
    assert torch.allclose(soft_usage(z + 1000, codebook + 1000, 1.0), soft_usage(z, codebook, 1.0), atol=1e-6)
    posterior = make("categorical", num_codes=256, code_dim=16, channels=16, init="normal")
    features = z.T.reshape(1, 16, 15, 20)
    centered, shifted = (posterior.logits(features + offset, codebook + offset)[0] for offset in (0, 1000))
    assert torch.allclose(centered, shifted, atol=1e-4)


def test_without_vectors_there_are_no_codes():
    assert nearest_code(torch.zeros(0, 2), torch.ones(4, 2)).shape == (0,)


def test_the_nearest_code_exists_whatever_the_vectors_are():
    strange = torch.tensor([[math.inf, 0], [-math.inf, 1], [math.nan, 0], [3e38, 3e38]])
    codes = nearest_code(strange, torch.randn(70, 2))
    assert ((codes >= 0) & (codes < 70)).all()


# the parts of a codebook


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    z, quantized = (1000 * torch.randn(3)).requires_grad_(), torch.randn(3, requires_grad=True)
    out = straight_through(z, quantized)
    assert torch.equal(out, quantized)
    (out * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert z.grad.tolist() == [1.0, 2.0, 3.0]
    assert quantized.grad is None


def test_codes_are_counted():
    codes = torch.randint(9, (3, 4, 5))
    assert count_codes(codes, 11).tolist() == np.bincount(codes.flatten().numpy(), minlength=11).tolist()


@pytest.mark.parametrize(("init", "limit"), [("uniform", 1 / 50), ("fan-in", math.sqrt(3 / 6))])
def test_the_first_codebook_fills_its_interval(init, limit):
    values = first_codebook(init, 50, 6)
    assert values.shape == (50, 6)
    assert 0.9 < values.abs().max().item() / limit < 1 + 1e-6
    assert first_codebook("normal", 4000, 6).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["vq", "residual", "multiscale"])
@pytest.mark.parametrize(("init", "sonnets"), [("fan-in", True), ("uniform", False)])
def test_the_start_of_sonnet_includes_the_projection(name, init, sonnets):
    projection = make(name, channels=100, init=init).projection
    weights = 10 * projection.weight
    assert (abs(weights.std().item() - 0.88) < 0.05) == sonnets  # of a normal, truncated at two deviations
    assert (weights.abs().max().item() <= 2 and not projection.bias.any()) == sonnets


def test_kmeans_finds_separated_clusters_and_works_with_few_vectors():
    centers = torch.eye(5, 15) * 10
    vectors = centers.repeat(40, 1) + 0.01 * torch.randn(200, 15)
    found = kmeans_codebook(vectors, 5)
    assert torch.cdist(centers, found).min(dim=1).values.max() < 0.05


@pytest.mark.parametrize(
    "rows", [torch.randn(3, 4), torch.randn(3, 4).repeat(20, 1), torch.ones(50, 4), torch.ones(1, 1)]
)
@pytest.mark.parametrize("many", [8, 10_000])  # from which mini-batches are used
def test_centers_of_few_different_vectors_differ(rows, many, monkeypatch):
    monkeypatch.setattr(codebook, "MANY_CODES", many)
    centers = kmeans_codebook(rows, 10)
    assert centers.isfinite().all()
    assert len(centers.unique(dim=0)) == len(centers) == 10
    assert torch.cdist(rows, centers).min(dim=1).values.max() < 0.5


def test_kmeans_gives_the_same_centers_each_time_with_many_threads(monkeypatch):
    vectors, before = torch.randn(20_000, 64), torch.get_num_threads()
    found = []
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # scikit-learn takes no more threads than there are cores otherwise
    torch.set_num_threads(4)
    try:
        for _ in range(4):
            torch.manual_seed(1)
            found.append(kmeans_codebook(vectors, 64))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(centers, found[0]) for centers in found)


def test_mini_batches_find_separated_clusters(monkeypatch):
    monkeypatch.setattr(codebook, "MANY_CODES", 8)
    centers = torch.eye(8, 15) * 10
    vectors = centers.repeat(40, 1) + 0.01 * torch.randn(320, 15)
    error = torch.cdist(vectors, kmeans_codebook(vectors, 60)).min(dim=1).values  # random starts hit every cluster
    assert error.max() < 0.1
    monkeypatch.setattr(codebook, "MOST_DISTANCES", 60)  # vectors themselves
    found = kmeans_codebook(vectors, 60)
    assert torch.cdist(found.double(), vectors.double()).min(dim=1).values.max() < 1e-5


# vq


@pytest.mark.parametrize("name", ["vq", "residual", "grouped"])
def test_spread_standardizes_the_projected_features_before_kmeans(name):
    features = 0.01 * torch.randn(20, 6, 4, 4) + 3
    options = {"num_codes": 16, "code_dim": 4, "spread": 0.5}
    bottleneck = make(name, grid=(4, 4), **options)
    bottleneck.initialize(features)
    vectors = bottleneck.projection(features).movedim(1, -1).flatten(0, 2)
    assert torch.allclose(vectors.mean(0), torch.zeros(4), atol=1e-3)
    assert torch.allclose(vectors.std(0), torch.full((4,), 0.5), rtol=1e-3)
    assert bottleneck.quantize(features).need_z().var() > 0.1  # the codes were fitted to these vectors


@pytest.mark.parametrize("options", [{"spread": 0.5, "init": "uniform"}, {"spread": 0.0}])
def test_without_kmeans_or_spread_the_projection_stays(options):
    bottleneck = make("vq", grid=(4, 4), **options)
    before = bottleneck.projection.weight.clone()
    bottleneck.initialize(torch.randn(5, 6, 4, 4))
    assert torch.equal(bottleneck.projection.weight, before)


def test_commitment_moves_the_encoder_and_codebook_loss_moves_the_codes():
    vq = make_vq(codebook="gradient", beta=0.25)
    features = torch.randn(2, 4, 2, 2, requires_grad=True)
    latent = vq(features, 0)
    f = rows(features.detach()).double()
    e = vq.codebook.vectors.detach()[latent.codes.flatten()].double()
    assert latent.loss.item() == pytest.approx(1.25 * (f - e).square().mean().item(), rel=1e-5)
    latent.loss.backward()
    expected = 0.25 * 2 * (f - e) / f.numel()  # only beta's term has a gradient to the encoder
    assert torch.allclose(rows(features.grad).double(), expected, atol=1e-6)
    codes = torch.zeros(8, 4).double().index_add_(0, latent.codes.flatten(), 2 * (e - f) / f.numel())
    assert torch.allclose(vq.codebook.vectors.grad.double(), codes, atol=1e-6)  # and only the other to the codes


def test_an_ema_codebook_is_not_trained_by_gradient():
    vq = make_vq()
    assert not list(vq.parameters())
    assert make_vq(beta=0.5, weight=10.0)(torch.randn(2, 4, 2, 2), 0).loss.requires_grad is False


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_updates_are_those_of_a_run_by_hand(warmup):
    last, eps = 0.25, 1e-3
    vq = make_vq(num_codes=3, decay=last, epsilon=eps, warmup=warmup)
    count, total, start = np.zeros(3), np.zeros((3, 4)), 1.0
    for t in range(6):
        decay = min(last, (1 + t) / (10 + t)) if warmup else last  # 0.1, 0.18, 0.25, 0.25, ...
        features, before = torch.randn(5, 4, 2, 2), vq.codebook.vectors.clone()
        codes = vq(features, t).codes.flatten()
        assert_nearest(codes, rows(features), before)  # all codes are those of the codebook before the update
        f, one_hot = rows(features).double().numpy(), np.eye(3)[codes]
        count = decay * count + (1 - decay) * one_hot.sum(0)
        total = decay * total + (1 - decay) * one_hot.T @ f
        start *= decay
        n, m = count / (1 - start), total / (1 - start)
        smoothed = (n + eps) / (n.sum() + 3 * eps) * n.sum()
        expected = np.where(n[:, None] > 0, m / smoothed[:, None], before.numpy())
        assert np.allclose(vq.codebook.vectors.numpy(), expected, atol=1e-5)


def test_a_code_never_used_keeps_its_value():
    vq = make_vq(num_codes=2)
    vq.codebook.vectors.copy_(torch.tensor([[0.0] * 4, [100.0] * 4]))
    vq(torch.randn(3, 4, 2, 2), 0)
    assert vq.codebook.vectors[1].tolist() == [100.0] * 4


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_revival_moves_dead_codes_onto_data_where_they_stay(codebook):
    def far_codes_after(revive: float, steps: int) -> int:
        vq = make_vq(codebook=codebook, revive=revive, decay=0.9, warmup=False)
        with torch.no_grad():
            vq.codebook.vectors[1:] = 1e3 + torch.arange(7.0)[:, None]  # seven codes too far for any vector
        for step in range(steps):
            vq(torch.randn(16, 4, 2, 2), step)
        return int((vq.codebook.vectors.norm(dim=1) > 100).sum())

    assert far_codes_after(0.0, 40) == 7
    assert far_codes_after(0.1, 2) == 7  # too few batches to judge the counts
    assert far_codes_after(0.1, 3) == 0
    assert far_codes_after(0.1, 40) == 0  # later updates do not undo it


def test_codes_keep_up_with_features_that_move_in_the_first_steps():
    def fewest_codes(warmup: bool) -> int:
        torch.manual_seed(0)
        vq = make_vq(num_codes=64, init="kmeans", revive=0.03, warmup=warmup)
        features = torch.randn(64, 4, 4, 4)
        vq.initialize(features)
        used = []
        for step in range(20):
            features = 1.3 * features + 0.5  # every channel grows and shifts
            used.append(len(vq(features, step).codes.unique()))
        return min(used[10:])

    assert fewest_codes(warmup=True) > 21
    assert fewest_codes(warmup=False) < 16


@pytest.mark.parametrize(("vectors", "moved"), [(3, False), (5, True)])
def test_no_code_is_dead_before_half_of_the_codes_could_be_used(vectors, moved):
    vq = make_vq(num_codes=8, revive=0.03)
    vq.codebook.vectors[7] = 1e3
    vq(torch.randn(vectors, 4, 1, 1), 0)
    assert bool(vq.codebook.vectors[7].norm() < 100) == moved


def test_a_revived_code_counts_twice_as_much_as_one_that_is_about_to_die():
    vq = make_vq(num_codes=8, revive=0.1)
    vq.codebook.vectors[7] = 1e3
    vq(torch.randn(64, 4, 1, 1), 0)
    threshold = 0.1 * 0.9 * 64 / 8  # of the average count, after a step with a decay of 0.1
    assert vq.codebook.counts[7].item() == pytest.approx(2 * threshold)
    assert torch.allclose(vq.codebook.totals[7], 2 * threshold * vq.codebook.vectors[7], rtol=1e-4)


def test_revived_codes_are_used():
    vq = make_vq(num_codes=32, revive=0.1, decay=0.9)
    vq.codebook.vectors[1:] += 1e3
    for step in range(60):
        codes = vq(torch.randn(64, 4, 2, 2), step).codes
    assert len(codes.unique()) > 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes=0: must be from 1 to"),
        ({"code_dim": 0}, "code_dim=0: must be from 1 to"),
        ({"beta": -1.0}, "beta=-1.0: must be at least 0"),
        ({"decay": 1.0}, "decay=1.0: must be from 0 to below 1"),
        ({"revive": 2.0}, "revive=2.0: must be from 0 to 1"),
        ({"code_dim": 3}, "code_dim=3: must equal the nets' 4 feature channels with projection=no"),
    ],
)
def test_vq_refuses_what_it_cannot_do(options, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        make_vq(**options)


# the contract

VARIANTS = [
    *((name, {}) for name in BOTTLENECKS),
    ("vq", {"init": "normal", "revive": 0.5, "decay": 0.5}),
    ("vq", {"codebook": "gradient", "revive": 0.5, "decay": 0.5, "gradient": "rotation"}),
    ("vq", {"diversity": 0.1}),
    ("cosine", {"codebook": "gradient", "diversity": 0.1}),
    ("residual", {"dropout": 1.0}),
    ("residual", {"codebook": "gradient", "revive": 0.5, "decay": 0.5, "dropout": 0.5}),
    ("grouped", {"revive": 0.5, "decay": 0.5}),
    ("hierarchy", {"revive": 0.5, "decay": 0.5}),
    ("hierarchy", {"codebook": "gradient"}),
    ("multiscale", {"revive": 0.5, "decay": 0.5, "phi": 0.0}),
    ("multiscale", {"codebook": "gradient", "scales": 2}),
    ("categorical", {"posterior": "linear"}),
    ("categorical", {"iaf_flows": 1, "average_samples": False}),
    ("gumbel", {"hard": True, "num_samples": 2}),
    ("gumbel", {"iaf_flows": 2, "iaf_parameters": "triangular"}),
]
NAMES = [" ".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in VARIANTS]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)


def one_of(name: str, options: dict, **others):
    """A small bottleneck of the variant and features for it."""
    grid = (1, 1) if name == "gaussian" else (2, 4)
    return make(name, grid, **options, **others), torch.randn(4, 6, *grid)


@every_variant
def test_every_bottleneck_keeps_the_contract(name, options):
    bottleneck, features = one_of(name, options)
    latent = bottleneck(features.requires_grad_(), 0)
    assert len(latent.z) % 4 == 0
    assert latent.z.shape[1:] == (bottleneck.code_dim, *features.shape[2:])
    assert latent.log_q.shape == (len(latent.z),)
    assert latent.loss.shape == ()
    if latent.assignments is not None:
        assert latent.assignments.shape == (len(latent.z), bottleneck.num_codes, *bottleneck.grid)
        assert torch.allclose(latent.assignments.sum(1), torch.ones(len(latent.z), *bottleneck.grid), atol=1e-3)
    (latent.z.square().mean() + latent.loss).backward()
    assert features.grad.abs().sum() > 0
    assert (bottleneck.startup_flows() is None) is ("iaf_flows" not in options)
    assert isinstance(bottleneck, Continuous) is (name == "gaussian")
    assert set(bottleneck.prior_context()) == {"grid", "latent_dim" if name == "gaussian" else "num_codes"}


@pytest.mark.parametrize("name", [name for name in BOTTLENECKS if name != "gaussian"])
def test_codes_are_embedded_as_they_were_quantized(name):
    bottleneck, features = one_of(name, {})
    assert isinstance(bottleneck, Discrete)
    bottleneck.eval()
    for latent in (bottleneck(features, 1), bottleneck.quantize(features)):
        assert latent.codes.dtype == torch.int64
        assert 0 <= latent.codes.min() <= latent.codes.max() < bottleneck.num_codes
        assert latent.codes.shape == (4, *bottleneck.grid)
        assert torch.allclose(bottleneck.embed(latent.codes), latent.z, atol=1e-6)
        assert bottleneck.usage(latent.codes).sum() == latent.codes.numel()
        assert tuple(bottleneck.maps(latent.codes)) == bottleneck.level_names
    assert bottleneck.code_vectors().shape[0] == bottleneck.num_codes
    if not bottleneck.stochastic and not isinstance(bottleneck, Deterministic):  # it computes distances in two ways
        assert torch.equal(bottleneck(features, 1).codes, bottleneck.quantize(features).codes)


@every_variant
def test_quantize_changes_nothing_draws_nothing_and_is_the_same_in_training_and_evaluation(name, options):
    bottleneck, features = one_of(name, options)
    for step in range(4):  # enough steps for revival
        bottleneck(features, step)
    before = {key: value.clone() for key, value in bottleneck.state_dict().items()}
    state = torch.get_rng_state()
    in_training = bottleneck.train().quantize(features)
    in_evaluation = bottleneck.eval().quantize(features)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in bottleneck.state_dict().items())
    assert in_training.stats.keys() == in_evaluation.stats.keys()
    for a, b in zip(in_training[:4], in_evaluation[:4], strict=True):  # z, codes, log_q, loss
        assert (a is None and b is None) or torch.equal(a, b)


@every_variant
def test_evaluation_changes_nothing(name, options):
    bottleneck, features = one_of(name, options)
    bottleneck.eval()
    before = {key: value.clone() for key, value in bottleneck.state_dict().items()}
    for step in range(5):
        bottleneck(features, step)
    assert all(torch.equal(value, before[key]) for key, value in bottleneck.state_dict().items())


# gaussian


def test_gaussians_log_q_is_torchs_and_its_gradient_reaches_both_heads():
    gaussian, features = make("gaussian", (1, 1), 5, latents=3), torch.randn(7, 5, 1, 1)
    latent = gaussian(features, 0)
    mean, log_std = gaussian.posterior(features)
    posterior = torch.distributions.Normal(mean, log_std.exp())
    assert torch.allclose(latent.log_q, posterior.log_prob(latent.z).flatten(1).sum(1), atol=1e-4)
    (latent.log_q.sum() + latent.z.square().sum()).backward()
    assert (gaussian.head.weight.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    likeliest = gaussian.quantize(features)
    assert torch.allclose(likeliest.z, mean)
    assert torch.allclose(likeliest.log_q, posterior.log_prob(mean).flatten(1).sum(1), atol=1e-4)


def test_gaussian_draws_have_its_moments():
    gaussian = make("gaussian", (1, 1), 5, latents=2)
    features = torch.randn(1, 5, 1, 1).expand(50_000, -1, -1, -1)
    mean, log_std = (t[0].flatten() for t in gaussian.posterior(features))
    z = gaussian(features, 0).z.flatten(1)
    assert torch.allclose(z.mean(0), mean, atol=0.05)
    assert torch.allclose(z.std(0), log_std.exp(), rtol=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": 0}, "gaussian latents=0: must be"),
        ({"grid": (2, 2)}, "bottleneck=gaussian: takes one vector per image, and these nets give 2x2; use conv-vae"),
    ],
)
def test_gaussian_refuses_what_it_cannot_do(options, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        make("gaussian", **{"grid": (1, 1)} | options)


def test_a_latents_size_in_words_has_its_singulars():
    one, two = (VQ(channels=4, grid=grid, options=VQOptions(num_codes=1024, code_dim=4)) for grid in ((1, 1), (2, 3)))
    assert (one.describe(), two.describe()) == (
        "1x1 codes of 1,024: 1 token, 10 bits",
        "2x3 codes of 1,024: 6 tokens, 60 bits",
    )
    assert VQ(channels=4, grid=(1, 1), options=VQOptions(num_codes=2, code_dim=4)).describe().endswith("1 token, 1 bit")
    gaussians = [BOTTLENECKS["gaussian"](channels=4, grid=(1, 1), latents=latents) for latents in (1, 16)]
    assert [gaussian.describe() for gaussian in gaussians] == ["1 dimension", "16 dimensions"]
