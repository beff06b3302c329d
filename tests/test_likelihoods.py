"""Likelihoods against torch.distributions, numerical integration and sums over all levels."""

import math

import pytest
import torch

from vqvae.errors import UserError
from vqvae.likelihoods import LIKELIHOODS, LogitGaussian, LogitLaplace

SHAPE = (2, 3, 4)
LEVELS = torch.arange(256, dtype=torch.float64) / 255


def make(name: str, shape: tuple = SHAPE, **options):
    return LIKELIHOODS[name](image_shape=shape, data_variance=0.06, **options)


def pictures(name: str, n: int = 5) -> torch.Tensor:
    levels = torch.randint(2, (n, *SHAPE)) * 255 if name == "bernoulli" else torch.randint(256, (n, *SHAPE))
    return levels.float() / 255


def params(name: str, n: int = 5, shape: tuple = SHAPE) -> torch.Tensor:
    count = LIKELIHOODS[name].params_per_channel
    return 0.3 * torch.randn(n, count * shape[0], *shape[1:])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_keeps_the_contract(name):
    likelihood, x, p = make(name), pictures(name), params(name)
    torch.manual_seed(0)
    nats = likelihood.log_prob(p, x)
    assert nats.shape == (5,)
    assert nats.isfinite().all()
    assert likelihood.network_input(x).shape == x.shape
    for picture in (likelihood.mean(p), likelihood.sample(p)):
        assert picture.shape == x.shape
    assert 0 <= likelihood.mean(p).min() <= likelihood.mean(p).max() <= 1
    extreme = likelihood.log_prob(p * 1000, x)
    assert extreme.isfinite().all()


@pytest.fixture
def half_noise(monkeypatch):
    """Dequantisation noise of 1/2 everywhere."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_prob_is_per_example(name, half_noise):
    likelihood, x, p = make(name), pictures(name), params(name)
    whole = likelihood.log_prob(p, x)
    alone = torch.cat([likelihood.log_prob(p[i : i + 1], x[i : i + 1]) for i in range(5)])
    assert torch.allclose(whole, alone, rtol=1e-5)
    twice = likelihood.log_prob(torch.cat([p, p]), torch.cat([x, x]))
    assert torch.allclose(twice, torch.cat([whole, whole]), rtol=1e-5)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_parameters_are_parameter_major(name, half_noise):
    x, p = pictures(name), params(name)
    by_channel = p.view(5, -1, *SHAPE)  # [B, P, C, H, W]
    one = make(name, (1, *SHAPE[1:]))
    nats = sum(one.log_prob(by_channel[:, :, c], x[:, c : c + 1]) for c in range(SHAPE[0]))
    assert torch.allclose(make(name).log_prob(p, x), nats, rtol=1e-5)
    means = torch.cat([one.mean(by_channel[:, :, c]) for c in range(SHAPE[0])], 1)
    assert torch.allclose(make(name).mean(p), means, atol=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_empty_batch_is_no_error(name):
    likelihood, x, p = make(name), pictures(name, 0), params(name, 0)
    assert likelihood.log_prob(p, x).shape == (0,)
    assert likelihood.mean(p).shape == x.shape


def test_bits_are_defined_for_8_bit_pixels_alone():
    discrete = {name for name, cls in LIKELIHOODS.items() if cls.discrete}
    assert discrete == {"logit-gaussian", "bernoulli", "discretised-logistic", "softmax256"}


@pytest.mark.parametrize(("pixels", "scale"), [("centred", 1), ("symmetric", 2)])
def test_mse_is_a_gaussian_density_on_unit_pixels(pixels, scale):
    likelihood, x, p = make("mse", variance=0.07, pixels=pixels), pictures("mse"), params("mse")
    normal = torch.distributions.Normal(p.double() / scale + 0.5, 0.07**0.5)
    assert torch.allclose(likelihood.log_prob(p, x).double(), normal.log_prob(x.double()).flatten(1).sum(1), rtol=1e-5)
    assert torch.allclose(likelihood.network_input(x), (x - 0.5) * scale)


def test_mse_by_default_is_mse_over_variance_per_dimension():
    likelihood, x, p = make("mse"), pictures("mse"), params("mse")
    nats = (-likelihood.log_prob(p, x) - likelihood.floor) / math.prod(SHAPE)
    assert torch.allclose(nats, (p + 0.5 - x).square().flatten(1).mean(1) / 0.06, rtol=1e-4)


def test_gaussian_is_torchs():
    likelihood, x, p = make("gaussian"), torch.randn(5, *SHAPE), params("gaussian")
    mean, log_std = p.double().chunk(2, 1)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(x.double()).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(p, x).double(), expected, rtol=1e-5)
    point = torch.tensor([-3.0, 4.0, 0.0, 0.0]).view(1, 4, 1, 1)
    assert make("gaussian", (2, 1, 1)).mean(point).flatten().tolist() == [-3, 4]  # no pixel, so not clamped


def test_bernoulli_is_torchs_and_refuses_grey():
    likelihood, x, p = make("bernoulli"), pictures("bernoulli"), params("bernoulli")
    expected = torch.distributions.Bernoulli(logits=p).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(p, x), expected)
    assert torch.equal(likelihood.network_input(x).unique(), torch.tensor([-1.0, 1.0]))
    likelihood.check(torch.tensor([0, 255], dtype=torch.uint8))
    with pytest.raises(UserError, match="mnist-binary"):
        likelihood.check(torch.tensor([0, 3], dtype=torch.uint8))


@pytest.mark.parametrize("name", ["discretised-logistic", "softmax256"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_discrete_likelihoods_sum_to_one_over_the_levels(name, spread):
    p = spread * torch.randn(1, LIKELIHOODS[name].params_per_channel, 1, 1, dtype=torch.float64)
    likelihood = make(name, (1, 1, 1)).double()
    log_p = likelihood.log_prob(p.expand(256, -1, 1, 1), LEVELS.view(256, 1, 1, 1))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_discretised_logistic_is_the_logistics_mass():
    p = torch.tensor([[0.1, -1.0]]).double().view(1, 2, 1, 1)
    log_p = make("discretised-logistic", (1, 1, 1)).log_prob(p.expand(256, -1, 1, 1), LEVELS.view(256, 1, 1, 1))
    cdf = lambda t: 1 / (1 + torch.exp(-(t - 0.6) / math.exp(-3)))  # noqa: E731
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 255
    edges[0], edges[-1] = -torch.inf, torch.inf
    assert torch.allclose(log_p.exp(), cdf(edges[1:]) - cdf(edges[:-1]), atol=1e-9)


def test_logit_laplace_integrates_to_one_over_the_pixels_it_can_reach():
    # the map leaves tails below eps and above 1 - eps: the mass on [0, 1] is that between the two logits
    likelihood = LogitLaplace(image_shape=(1, 1, 1), data_variance=0.06)
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
    monkeypatch.setattr(torch, "rand_like", lambda x: u.view(-1, 1, 1, 1))  # a quadrature in place of draws
    p = torch.full((points, 1, 1, 1), 0.75, dtype=torch.float64)
    x = torch.full_like(p, level / 255)
    log_density = LogitGaussian(image_shape=(1, 1, 1), data_variance=0.06).log_prob(p, x)
    edges = torch.tensor([level, level + 1], dtype=torch.float64)
    exact = torch.diff(torch.distributions.Normal(0.75, 1.0).cdf((0.05 + 0.9 * edges / 256).logit())).item()
    assert log_density.exp().mean().item() == pytest.approx(exact, rel=1e-9)
    assert math.log(exact) - 0.01 < log_density.mean().item() < math.log(exact)


@pytest.mark.parametrize("name", ["mse", "logit-gaussian", "logit-laplace", "discretised-logistic"])
def test_pixel_maps_come_back_for_every_level(name, monkeypatch):
    likelihood = make(name, (1, 16, 16))
    x = (torch.arange(256.0) / 255).view(1, 1, 16, 16)
    seen = likelihood.network_input(x)
    p = seen.logit() if name == "logit-laplace" else seen
    if likelihood.params_per_channel == 2:
        p = torch.cat([p, torch.zeros_like(p)], 1)
    assert torch.equal((likelihood.mean(p) * 255).round(), (x * 255).round())
    if name == "logit-gaussian":
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        assert torch.equal((likelihood.sample(p) * 255).round(), (x * 255).round())


def test_softmax_shows_the_expected_level():
    p = torch.zeros(1, 256, 1, 1, dtype=torch.float64)
    assert make("softmax256", (1, 1, 1)).double().mean(p).item() == pytest.approx(0.5)


def below(name: str, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
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
    if name == "discretised-logistic":
        return torch.sigmoid((x - 0.5 - p[0]) / (p[1] - 2).exp())
    return p.softmax(0).cumsum(0)[:-1]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_are_distributed_as_the_likelihood_says(name):
    likelihood, n = make(name, (1, 1, 1)), 20_000
    p = params(name, 1, (1, 1, 1)) - 0.3
    draws = likelihood.sample(p.expand(n, -1, 1, 1)).flatten()
    if likelihood.discrete:
        assert torch.equal((draws * 255).round() / 255, draws)
    x = (torch.arange(255.0) + 0.5) / 255
    seen = torch.searchsorted(draws.sort().values, x) / n
    assert (seen - below(name, p.flatten(), x)).abs().max() < 2 / math.sqrt(n)  # Kolmogorov-Smirnov, p < 0.001


@pytest.mark.parametrize(
    ("name", "options"),
    [("mse", {"variance": -1.0}), ("logit-gaussian", {"alpha": 0.0}), ("logit-laplace", {"eps": 0.5})],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        make(name, **options)
