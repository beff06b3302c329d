"""Flows and the priors made of them: inverses, Jacobians by autograd, densities by integration."""

import math

import pytest
import torch

from vqvae.contracts import Latent
from vqvae.errors import OptionError
from vqvae.flows import MADE, AutoregressiveFlow, Stack
from vqvae.priors import PRIORS


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64, with weights that make it differ from the identity, with which a flow starts."""
    torch.manual_seed(0)
    for p in module.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return module.double()


def as_latent(z: torch.Tensor) -> Latent:
    return Latent(z[:, :, None, None], None, torch.zeros(len(z)), torch.zeros(()), {})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_made_depends_on_all_earlier_inputs_and_no_others(dimensions, reverse):
    made = perturbed(MADE(dimensions, 32, reverse=reverse))
    x = torch.randn(dimensions, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x[None])[0], x)  # [2, d, d]
    before = torch.tril(torch.ones(dimensions, dimensions), -1).bool()
    before = before.T if reverse else before
    for output in jacobian:
        assert torch.equal(output.abs() > 1e-12, before)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_flows_jacobian_is_triangular_with_the_log_determinant_of_autograd(reverse):
    flow = perturbed(AutoregressiveFlow(5, 32, reverse=reverse))
    z = torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z[None])[0][0], z)
    other_half = torch.tril(jacobian, -1) if reverse else torch.triu(jacobian, 1)
    assert other_half.abs().max() < 1e-12
    assert flow(z[None])[1].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-10)


@pytest.mark.parametrize("flows", [1, 2, 3])
def test_inverse_undoes_forward(flows):
    stack = perturbed(Stack(6, 32, flows=flows))
    z = torch.randn(20, 6, dtype=torch.float64)
    eps, log_det = stack(z)
    assert not torch.allclose(eps, z, atol=0.1)
    assert torch.allclose(stack.inverse(eps), z, atol=1e-9)
    one = torch.autograd.functional.jacobian(lambda z: stack(z[None])[0][0], z[0])
    assert log_det[0].item() == pytest.approx(torch.linalg.slogdet(one).logabsdet.item(), abs=1e-9)


def test_a_stack_reverses_every_second_flow():
    stack = Stack(3, 8, flows=3)
    assert [list(flow.order) for flow in stack.flows] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize("name", ["normal", "made-flow"])
def test_the_density_integrates_to_one(name):
    options = {"hidden": 16, "flows": 2} if name == "made-flow" else {}
    prior = perturbed(PRIORS[name](latent_dim=2, grid=(1, 1), **options))
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    total = prior.log_prob(as_latent(points)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_normal_agrees_with_torch_distributions():
    z = torch.randn(7, 3)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    assert torch.allclose(PRIORS["normal"](latent_dim=3, grid=(1, 1)).log_prob(as_latent(z)), expected)


def test_samples_of_the_flow_have_its_density():
    prior = perturbed(PRIORS["made-flow"](latent_dim=2, grid=(1, 1), hidden=16))
    z = prior.sample(20_000, generator=torch.Generator().manual_seed(0)).flatten(1)
    # the mean of p(z) over samples estimates the integral of p^2, here computed on a grid
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    density = prior.log_prob(as_latent(torch.cartesian_prod(axis, axis))).exp()
    expected = (density**2).sum().item() * (axis[1] - axis[0]).item() ** 2
    drawn = prior.log_prob(as_latent(z)).exp()
    assert drawn.mean().item() == pytest.approx(expected, abs=4 * drawn.std().item() / math.sqrt(20_000))


@pytest.mark.parametrize("name", ["normal", "made-flow"])
def test_temperature_scales_the_noise_of_the_given_generator(name):
    options = {"hidden": 8} if name == "made-flow" else {}
    prior = perturbed(PRIORS[name](latent_dim=3, grid=(1, 1), **options))
    before = torch.get_rng_state()
    warm, cool = (
        prior.sample(4, temperature=t, generator=torch.Generator().manual_seed(1)).flatten(1) for t in (1.0, 0.5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    if name == "made-flow":
        warm, cool = prior.flow(warm)[0], prior.flow(cool)[0]
    assert torch.allclose(cool, 0.5 * warm, atol=1e-9)
    assert not prior.sample(2, temperature=0.0).requires_grad


def test_scales_are_bounded_for_all_weights():
    flow = AutoregressiveFlow(4, 16).double()
    for p in flow.parameters():
        p.data.normal_(std=100)
    z = torch.randn(9, 4, dtype=torch.float64)
    eps, log_det = flow(z)
    assert log_det.abs().max() < 4 * 4 + 1e-9
    assert eps.isfinite().all()


def test_a_new_flow_is_near_the_identity():
    prior = PRIORS["made-flow"](latent_dim=4, grid=(1, 1))
    z = torch.randn(5, 4)
    assert torch.allclose(prior.flow(z)[0], z, atol=0.02)


@pytest.mark.parametrize("name", ["flows", "hidden", "layers"])
def test_options_out_of_range_are_refused(name):
    with pytest.raises(OptionError, match=f"{name}=0: must be at least 1"):
        PRIORS["made-flow"](latent_dim=2, grid=(1, 1), **{name: 0})
