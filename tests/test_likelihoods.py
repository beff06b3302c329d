"""Likelihoods agree with torch.distributions, numerical integration and sums over all levels."""

import math

import pytest
import torch

from tests.helpers import most_allocated
from vqvae import likelihoods
from vqvae.contracts import Likelihood
from vqvae.errors import OptionError
from vqvae.likelihoods import LIKELIHOODS, LogitGaussian, LogitLaplace
from vqvae.registry import Choice, Slot, build

SHAPE = (2, 3, 4)
LEVELS = torch.arange(256, dtype=torch.float64) / 255


def make(name: str, shape: tuple = SHAPE, **options) -> Likelihood:
    context = {"image_shape": shape, "data_variance": 0.06}
    return build(Slot("likelihood", LIKELIHOODS), Choice(name, options), context).double()


def pixels(name: str, n: int = 5) -> torch.Tensor:
    """Random 8-bit pixels in [0, 1], in float64."""
    levels = torch.randint(2, (n, *SHAPE)) * 255 if name == "bernoulli" else torch.randint(256, (n, *SHAPE))
    return levels.double() / 255


def params(name: str, n: int = 5, shape: tuple = SHAPE) -> torch.Tensor:
    count = LIKELIHOODS[name].params_per_channel
    return 0.3 * torch.randn(n, count * shape[0], *shape[1:], dtype=torch.float64)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_likelihood_keeps_the_contract(name, dtype):
    likelihood, x, p = make(name).to(dtype), pixels(name).to(dtype), params(name).to(dtype)
    nats = likelihood.log_prob(p, x)
    assert nats.shape == (5,)
    assert nats.isfinite().all()
    assert likelihood.network_input(x).shape == x.shape
    for image in (likelihood.center(p), likelihood.sample(p)):
        assert image.shape == x.shape
    assert -1e-5 < likelihood.center(p).min() <= likelihood.center(p).max() < 1 + 1e-5
    extreme = likelihood.log_prob(p * 1000, x)
    assert extreme.isfinite().all()


@pytest.fixture
def half_noise(monkeypatch):
    """Dequantization noise of 1/2 everywhere."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 0.5, **options))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_prob_is_per_example(name, half_noise):
    likelihood, x, p = make(name), pixels(name), params(name)
    whole = likelihood.log_prob(p, x)
    one_by_one = torch.cat([likelihood.log_prob(p[i : i + 1], x[i : i + 1]) for i in range(5)])
    assert torch.allclose(whole, one_by_one)
    twice = likelihood.log_prob(torch.cat([p, p]), torch.cat([x, x]))
    assert torch.allclose(twice, torch.cat([whole, whole]))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_parameters_are_parameter_major(name, half_noise):
    x, p = pixels(name), params(name)
    by_channel = p.view(5, -1, *SHAPE)  # [B, P, C, H, W]
    one = make(name, (1, *SHAPE[1:]))
    nats = sum(one.log_prob(by_channel[:, :, c], x[:, c : c + 1]) for c in range(SHAPE[0]))
    assert torch.allclose(make(name).log_prob(p, x), nats)
    means = torch.cat([one.center(by_channel[:, :, c]) for c in range(SHAPE[0])], 1)
    assert torch.allclose(make(name).center(p), means)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_empty_batch_is_no_error(name):
    likelihood, x, p = make(name), pixels(name, 0), params(name, 0)
    assert likelihood.log_prob(p, x).shape == (0,)
    assert likelihood.center(p).shape == x.shape


def test_bits_are_defined_for_likelihoods_of_8_bit_pixels_only():
    discrete = {name for name, cls in LIKELIHOODS.items() if cls.discrete}
    assert discrete == {"logit-gaussian", "bernoulli", "discretized-logistic", "softmax256"}


def test_mse_with_sigmoid_pixels_takes_pixels_and_gives_their_logits():
    likelihood, x, p = make("mse", variance=0.07, pixels="sigmoid"), pixels("mse"), params("mse")
    normal = torch.distributions.Normal(p.sigmoid(), 0.07**0.5)
    assert torch.allclose(likelihood.log_prob(p, x), normal.log_prob(x).flatten(1).sum(1))
    assert torch.equal(likelihood.network_input(x), x)
    assert torch.equal(likelihood.center(p), p.sigmoid())


def test_a_learned_variance_is_that_of_the_highest_likelihood_in_training():
    likelihood, x, p = make("mse", variance="learned").train(), pixels("mse"), params("mse").requires_grad_()
    nats = -likelihood.log_prob(p, x).mean()
    dimensions = math.prod(SHAPE)
    squares = (p + 0.5 - x).square().flatten(1).sum(1).mean()
    published = dimensions / 2 * squares.log()  # SQ-VAE's loss
    assert (nats - likelihood.log_normalizer).item() == pytest.approx(published.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(nats, p)
    assert torch.allclose(gradient, torch.autograd.grad(published, p)[0])
    for factor in (0.9, 1.1):  # of the variance
        other = make("mse", variance=factor * squares.item() / dimensions)
        assert -other.log_prob(p, x).mean() > nats


def test_evaluation_has_the_running_mean_of_the_learned_variances():
    likelihood, x, p = make("mse", variance="learned").train(), pixels("mse"), params("mse")
    expected = 0.06  # the data's, before any batch
    for scale in (1.0, 2.0, 0.5):
        likelihood.log_prob(scale * p, x)
        expected += 0.01 * ((scale * p + 0.5 - x).square().mean().item() - expected)
    likelihood.eval()
    assert likelihood.running_variance.item() == pytest.approx(expected, rel=1e-5)
    normal = torch.distributions.Normal(p + 0.5, expected**0.5)
    assert torch.allclose(likelihood.log_prob(p, x), normal.log_prob(x).flatten(1).sum(1), rtol=1e-4)
    draws = likelihood.sample(torch.zeros(400, *SHAPE).double())
    assert draws.std().item() == pytest.approx(expected**0.5, rel=0.1)
    assert "running_variance" in likelihood.state_dict()
    assert not make("mse").state_dict()


@pytest.mark.parametrize(("range_of_pixels", "scale"), [("centered", 1), ("symmetric", 2)])
def test_mse_is_a_gaussian_density_on_pixels_from_0_to_1(range_of_pixels, scale):
    likelihood, x, p = make("mse", variance=0.07, pixels=range_of_pixels), pixels("mse"), params("mse")
    normal = torch.distributions.Normal(p / scale + 0.5, 0.07**0.5)
    assert torch.allclose(likelihood.log_prob(p, x), normal.log_prob(x).flatten(1).sum(1))
    assert torch.allclose(likelihood.network_input(x), (x - 0.5) * scale)


def test_mse_by_default_is_mse_over_data_variance_per_dimension():
    likelihood, x, p = make("mse"), pixels("mse"), params("mse")
    nats = (-likelihood.log_prob(p, x) - likelihood.log_normalizer) / math.prod(SHAPE)
    assert torch.allclose(nats, (p + 0.5 - x).square().flatten(1).mean(1) / 0.06)


def test_gaussian_agrees_with_torch_distributions():
    likelihood, x, p = make("gaussian"), torch.randn(5, *SHAPE, dtype=torch.float64), params("gaussian")
    mean, log_std = p.chunk(2, 1)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(p, x), expected)
    assert torch.equal(likelihood.center(5 * p), (5 * mean).clamp(0, 1))
    point = torch.tensor([-3.0, 4.0, 0.0, 0.0]).view(1, 4, 1, 1)
    assert make("gaussian", (2, 1, 1)).center(point).flatten().tolist() == [
        -3,
        4,
    ]  # a point of the plane is not clamped


def test_bernoulli_agrees_with_torch_distributions_and_refuses_gray():
    likelihood, x, p = make("bernoulli"), pixels("bernoulli"), params("bernoulli")
    bernoulli = torch.distributions.Bernoulli(logits=p)
    assert torch.allclose(likelihood.log_prob(p, x), bernoulli.log_prob(x).flatten(1).sum(1))
    assert torch.allclose(likelihood.center(p), bernoulli.mean)
    assert likelihood.network_input(x).unique().tolist() == [-1, 1]
    likelihood.check(torch.tensor([0, 255], dtype=torch.uint8))
    with pytest.raises(OptionError, match="likelihood=bernoulli: .* mnist-binary"):
        likelihood.check(torch.tensor([0, 3], dtype=torch.uint8))


@pytest.mark.parametrize("name", sorted(set(LIKELIHOODS) - {"bernoulli"}))
def test_all_other_likelihoods_accept_gray(name):
    make(name).check(torch.tensor([0, 3], dtype=torch.uint8))


@pytest.mark.parametrize("name", ["discretized-logistic", "softmax256"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_discrete_likelihoods_sum_to_one_over_the_levels(name, spread):
    p = spread * torch.randn(1, LIKELIHOODS[name].params_per_channel, 1, 1, dtype=torch.float64)
    log_p = make(name, (1, 1, 1)).log_prob(p.expand(256, -1, 1, 1), LEVELS.view(256, 1, 1, 1))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_discretized_logistic_is_the_mass_of_a_logistic():
    p = torch.tensor([[0.1, -1.0]]).double().view(1, 2, 1, 1)
    log_p = make("discretized-logistic", (1, 1, 1)).log_prob(p.expand(256, -1, 1, 1), LEVELS.view(256, 1, 1, 1))
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 255
    edges[0], edges[-1] = -torch.inf, torch.inf
    cumulative = ((edges - 0.5 - p[0, 0]) / math.exp(-3)).sigmoid().flatten()
    assert torch.allclose(log_p.exp(), cumulative.diff(), atol=1e-9)


def test_logit_laplace_integrates_to_one_over_the_pixels_it_can_reach():
    # pixels map to [eps, 1 - eps]: the mass on [0, 1] is that between the logits of these two
    likelihood = LogitLaplace()
    p = torch.tensor([0.4, -0.5], dtype=torch.float64).view(1, 2, 1, 1)
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = likelihood.log_prob(p.expand(len(x), -1, 1, 1), x.view(-1, 1, 1, 1)).exp()
    laplace = torch.distributions.Laplace(torch.tensor(0.4).double(), math.exp(-0.5))
    ends = torch.tensor([0.1, 0.9], dtype=torch.float64).logit()
    mass = laplace.cdf(ends[1]) - laplace.cdf(ends[0])
    assert torch.trapezoid(density, x).item() == pytest.approx(mass.item(), abs=1e-6)


@pytest.mark.parametrize("level", [0, 3, 100, 255])
def test_logit_gaussian_bounds_the_probability_of_a_level(level, monkeypatch):
    points = 4000
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    monkeypatch.setattr(torch, "rand", lambda *_, **__: u.view(-1, 1, 1, 1))  # a quadrature instead of draws
    p = torch.full((points, 1, 1, 1), 0.75, dtype=torch.float64)
    x = torch.full_like(p, level / 255)
    log_density = LogitGaussian().log_prob(p, x)
    edges = torch.tensor([level, level + 1], dtype=torch.float64)
    exact = torch.diff(torch.distributions.Normal(0.75, 1.0).cdf((0.05 + 0.9 * edges / 256).logit())).item()
    assert log_density.exp().mean().item() == pytest.approx(exact, rel=1e-9)
    assert math.log(exact) - 0.01 < log_density.mean().item() < math.log(exact)


@pytest.mark.parametrize("name", ["mse", "logit-gaussian", "logit-laplace", "discretized-logistic"])
def test_pixels_survive_the_map_to_the_nets_and_back(name, monkeypatch):
    likelihood = make(name, (1, 16, 16))
    x = LEVELS.view(1, 1, 16, 16)
    seen = likelihood.network_input(x)
    p = seen.logit() if name == "logit-laplace" else seen
    if likelihood.params_per_channel == 2:
        p = torch.cat([p, torch.full_like(p, -20)], 1)  # the smallest scale, so that the mean is the location
    assert torch.allclose(likelihood.center(p), x, atol=1e-3 if name == "discretized-logistic" else 1e-8)
    if name == "logit-gaussian":
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        assert torch.allclose(likelihood.sample(p), x)


@pytest.mark.parametrize("log_scale", [-7.0, -5.5, -4.0, -2.0, -1.0, 1.0, 4.0])
def test_discretized_logistic_shows_the_mean_of_its_levels(log_scale):
    location = torch.linspace(-0.3, 1.3, 41, dtype=torch.float64)
    p = torch.stack([location - 0.5, torch.full_like(location, log_scale + 2)], 1).view(-1, 2, 1, 1)
    likelihood = make("discretized-logistic", (1, 1, 1))
    log_p = torch.stack([likelihood.log_prob(p, level.expand(41, 1, 1, 1)) for level in LEVELS])
    mean = (log_p.exp() * LEVELS[:, None]).sum(0)
    assert torch.allclose(likelihood.center(p).flatten(), mean, atol=2e-4, rtol=0)
    assert torch.allclose(likelihood.center(p.float()).flatten().double(), mean, atol=3e-4, rtol=0)


def test_discretized_logistic_far_from_the_middle_does_not_show_its_location():
    p = torch.tensor([0.45, 1.0]).double().view(1, 2, 1, 1)  # location 0.95, scale 1/e
    assert make("discretized-logistic", (1, 1, 1)).center(p).item() == pytest.approx(0.746, abs=5e-4)


@pytest.mark.parametrize("name", ["logit-gaussian", "logit-laplace"])
@pytest.mark.parametrize("location", [-4.0, -2.5, -0.3, 0.0, 1.0, 2.7])
def test_logit_likelihoods_show_the_median(name, location):
    count = LIKELIHOODS[name].params_per_channel
    p = torch.tensor([location, -0.5][:count], dtype=torch.float64).view(1, count, 1, 1)
    likelihood = make(name, (1, 1, 1))
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    if name == "logit-gaussian":  # the density of the level, dequantized
        y = (0.05 + 0.9 * (x * 255 + 0.5) / 256).logit()
        below = torch.distributions.Normal(location, 1.0).cdf(y)
    else:
        below = torch.distributions.Laplace(location, math.exp(-0.5)).cdf((0.8 * x + 0.1).logit())
    median = x[int((below < 0.5).sum().clamp(max=len(x) - 1))]
    assert likelihood.center(p).item() == pytest.approx(median.item(), abs=2e-5)


@pytest.mark.parametrize("tile", [2**20, 1])
def test_softmax_is_the_cross_entropy_and_has_its_gradient(tile, monkeypatch):
    monkeypatch.setattr(likelihoods, "TILE", tile)
    likelihood, x = make("softmax256"), pixels("softmax256")
    p = params("softmax256").contiguous(memory_format=torch.channels_last).requires_grad_()
    nats, weights = likelihood.log_prob(p, x), torch.randn(5, dtype=torch.float64)
    logits, levels = p.view(5, 256, *SHAPE), (x * 255).round().long()
    expected = -torch.nn.functional.cross_entropy(logits, levels, reduction="none").flatten(1).sum(1)
    assert torch.allclose(nats, expected, rtol=1e-12)
    (gradient,), (by_torch,) = (torch.autograd.grad(weights @ value, p) for value in (nats, expected))
    assert torch.allclose(gradient, by_torch, rtol=1e-12, atol=1e-15)
    assert gradient.stride() == p.stride()
    few, at = torch.randn(3, 4, 2, 1, 1, dtype=torch.float64, requires_grad=True), torch.randint(4, (3, 2, 1, 1))
    assert torch.autograd.gradcheck(likelihoods.LogSoftmaxAt.apply, (few, at))
    assert torch.allclose(likelihood.center(p), (logits.softmax(1) * LEVELS.view(-1, 1, 1, 1)).sum(1))


def test_softmax_needs_no_copy_of_its_logits_but_the_gradient(monkeypatch):
    monkeypatch.setattr(likelihoods, "TILE", 1)
    likelihood, x = make("softmax256").float(), pixels("softmax256", 200).float()
    p = params("softmax256", 200).float().requires_grad_()

    def step() -> None:
        likelihood.center(p.detach())
        likelihood.log_prob(p, x).sum().backward()

    assert 0.9 < most_allocated(step) / p.nbytes < 1.2


def test_softmax_shows_the_expected_level():
    p = torch.zeros(1, 256, 1, 1, dtype=torch.float64)
    assert make("softmax256", (1, 1, 1)).center(p).item() == pytest.approx(0.5)


def distribution_function(name: str, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """P(X <= x) of one pixel, for x half-way between levels, by hand."""
    normal = torch.distributions.Normal
    if name == "mse":
        return normal(p[0] + 0.5, 0.03**0.5).cdf(x)
    if name == "gaussian":
        return normal(p[0], p[1].exp()).cdf(x)
    if name == "logit-gaussian":
        return normal(p[0], 1.0).cdf((0.05 + 0.9 * (x * 255 + 0.5) / 256).logit())
    if name == "bernoulli":
        return (1 - p[0].sigmoid()).expand(len(x))
    if name == "logit-laplace":
        return torch.distributions.Laplace(p[0], p[1].exp()).cdf((0.8 * x + 0.1).logit())
    if name == "discretized-logistic":
        return torch.sigmoid((x - 0.5 - p[0]) / (p[1] - 2).exp())
    return p.softmax(0).cumsum(0)[:-1]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_follow_the_distribution(name):
    likelihood, n = make(name, (1, 1, 1)), 40_000
    p = params(name, 1, (1, 1, 1)) - 0.3
    draws = likelihood.sample(p.expand(n, -1, 1, 1)).flatten().double()
    if likelihood.discrete:
        assert torch.allclose((draws * 255).round() / 255, draws, atol=1e-6)
    x = (torch.arange(255.0, dtype=torch.float64) + 0.5) / 255
    seen = torch.searchsorted(draws.sort().values, x) / n
    expected = distribution_function(name, p.flatten(), x)
    # Kolmogorov-Smirnov, p < 0.00001: random numbers differ between builds of torch
    assert (seen - expected).abs().max() < 2.5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mse", {"variance": -1.0}, "variance=-1.0: must be 0, or from 1e-9 to 1e9"),
        ("mse", {"variance": math.inf}, "variance=inf: must be 0, or from 1e-9 to 1e9"),
        ("mse", {"variance": "much"}, "variance=much: must be 0, or from 1e-9 to 1e9, or learned"),
        ("mse", {"pixels": "middle"}, "pixels=middle: must be one of centered, symmetric"),
        ("logit-gaussian", {"alpha": 0.0}, "alpha=0.0: must be from 1e-06 to below 1"),
        ("logit-laplace", {"eps": 0.5}, "eps=0.5: must be from 1e-06 to below 0.5"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(OptionError, match=f"{name} {message}"):
        make(name, **options)
