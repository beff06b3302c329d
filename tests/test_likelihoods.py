"""Likelihoods against torch.distributions, numerical integration and sums over all levels."""

import math

import pytest
import torch

from vqvae.errors import UserError
from vqvae.likelihoods import LIKELIHOODS, Bernoulli, LogitGaussian, LogitLaplace

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


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_prob_is_per_example(name):
    likelihood, x, p = make(name), pictures(name), params(name)
    torch.manual_seed(0)
    whole = likelihood.log_prob(p, x)
    if name != "logit-gaussian":  # which draws its noise for the batch
        alone = torch.cat([likelihood.log_prob(p[i : i + 1], x[i : i + 1]) for i in range(5)])
        assert torch.allclose(whole, alone, rtol=1e-5)


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
    assert not make("gaussian", (2, 1, 1)).clamps


def test_bernoulli_is_torchs_and_refuses_grey():
    likelihood, x, p = make("bernoulli"), pictures("bernoulli"), params("bernoulli")
    expected = torch.distributions.Bernoulli(logits=p).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(p, x), expected)
    Bernoulli.check(likelihood, torch.tensor([0, 255], dtype=torch.uint8))
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


def test_logit_gaussian_bounds_the_probability_of_a_level():
    likelihood = LogitGaussian(image_shape=(1, 1, 1), data_variance=0.06)
    mean = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    normal = torch.distributions.Normal(mean.flatten(), 1.0)
    total = 0.0
    for level in (0, 3, 100, 255):
        edges = torch.tensor([level, level + 1], dtype=torch.float64)
        exact = torch.diff(normal.cdf((0.05 + 0.9 * edges / 256).logit())).log().item()
        torch.manual_seed(0)
        x = torch.full((20_000, 1, 1, 1), level / 255, dtype=torch.float64)
        bound = likelihood.log_prob(mean.expand(20_000, 1, 1, 1), x).mean().item()
        assert bound <= exact + 1e-3
        assert bound == pytest.approx(exact, abs=0.01)  # the density hardly changes within a level
        total += exact
    assert total < 0


@pytest.mark.parametrize("name", ["mse", "logit-gaussian", "logit-laplace"])
def test_pixel_maps_come_back_for_every_level(name):
    likelihood = make(name, (1, 16, 16))
    x = (torch.arange(256.0) / 255).view(1, 1, 16, 16)
    seen = likelihood.network_input(x)
    p = seen.logit() if name == "logit-laplace" else seen
    p = torch.cat([p, torch.zeros_like(p)], 1) if name == "logit-laplace" else p
    assert torch.equal((likelihood.mean(p) * 255).round(), (x * 255).round())


@pytest.mark.parametrize("name", ["gaussian", "logit-laplace", "discretised-logistic", "softmax256", "mse"])
def test_samples_have_the_likelihoods_mean(name):
    likelihood = make(name, (1, 1, 1))
    p = params(name, 1, (1, 1, 1)) * (0.1 if name != "softmax256" else 1)
    torch.manual_seed(1)
    draws = likelihood.sample(p.expand(40_000, -1, 1, 1).contiguous())
    assert draws.mean().item() == pytest.approx(draws.median().item(), abs=0.1)
    error = 4 * draws.std().item() / 200
    if name in ("gaussian", "mse", "softmax256"):
        assert draws.mean().item() == pytest.approx(likelihood.mean(p).item(), abs=error)


@pytest.mark.parametrize(
    ("name", "options"),
    [("mse", {"variance": -1.0}), ("logit-gaussian", {"alpha": 0.0}), ("logit-laplace", {"eps": 0.5})],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        make(name, **options)
