"""SQ-VAE against a reference written from its formulas, enumeration of all codes, and torch.distributions."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from tests.bottleneck_helpers import assert_nearest, make, rows
from vqvae.autoencoder import SLOTS, Autoencoder
from vqvae.bottlenecks import categorical
from vqvae.contracts import Latent
from vqvae.errors import OptionError
from vqvae.evaluation import evaluate
from vqvae.objectives import ElboObjective, ElboOptions
from vqvae.registry import Choice, build
from vqvae.stage_one import AutoencoderTraining

L, K, D = 2, 3, 4


def tiny(prior: str = "uniform") -> Autoencoder:
    """Two positions of three codes and images of four pixels: few enough to enumerate."""
    images = {"image_shape": (1, 2, 2), "data_variance": 0.25}
    codes = {"num_codes": K, "grid": (L, 1), "num_classes": 0, "scales": ()}
    options = {"width": 8, "heads": 2, "layers": 1} if prior == "transformer" else {}
    model = Autoencoder(
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(4, L * D), nn.Unflatten(1, (D, L, 1))),
        bottleneck=make("stochastic", (L, 1), D, num_codes=K, code_dim=D, variance=1.5, anneal=0.01),
        decoder=nn.Sequential(nn.Flatten(), nn.Linear(L * D, 4), nn.Unflatten(1, (1, 2, 2))),
        likelihood=build(SLOTS["likelihood"], Choice("mse", {"variance": "learned", "pixels": "sigmoid"}), images),
        prior=build(SLOTS["prior"], Choice(prior, options), codes),
        **images,
    )
    for p in [*model.encoder.parameters(), *model.decoder.parameters()]:
        nn.init.normal_(p, std=1.0)
    return model.double()


def gray(n: int) -> Tensor:
    return torch.rand(n, 1, 2, 2).double()


def published_loss(model: Autoencoder, x: Tensor, uniform: Tensor, step: int) -> Tensor:
    """The loss of 2205.07547 as its code computes it, vector by vector, with uniform numbers `[B, L, K]`."""
    codes, s = model.bottleneck.vectors, 1 + model.bottleneck.log_variance.exp()
    f = model.encoder(x)[..., 0].transpose(1, 2)  # [B, L, D]
    temperature = math.exp(-0.01 * step)
    z, latent_loss = [], torch.zeros(()).double()
    for image, noise in zip(f, uniform, strict=True):
        for vector, u in zip(image, noise, strict=True):
            logits = torch.stack([-((vector - code) ** 2).sum() / (2 * s) for code in codes])
            weights = ((logits - (-u.log()).log()) / temperature).softmax(0)
            z.append(sum(w * code for w, code in zip(weights, codes, strict=True)))
            q = logits.softmax(0)
            latent_loss = latent_loss + (q * q.log()).sum() + ((vector - z[-1]) ** 2).sum() / (2 * s)
    shown = model.decoder(torch.stack(z).view(len(x), L, D).transpose(1, 2)[..., None]).sigmoid()
    squares = ((shown - x) ** 2).sum() / len(x)
    return 4 / 2 * squares.log() + latent_loss / len(x)


@pytest.mark.parametrize("step", [0, 80])
def test_the_loss_and_its_gradient_are_those_of_the_reference(step, monkeypatch):
    model, x, uniform = tiny().train(), gray(5), torch.rand(5, L, K).double()
    objective = ElboObjective(total_steps=100, options=ElboOptions(reduction="sum"))
    monkeypatch.setattr(torch, "rand", lambda shape, **_: uniform.clone().view(shape))
    module = AutoencoderTraining(model, objective)
    loss = module(x, None, step).loss
    expected = published_loss(model, x, uniform, step)
    assert loss.item() == pytest.approx(expected.item() + L * math.log(K), rel=1e-6)  # it omits the uniform prior
    parameters = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(*(torch.autograd.grad(value, parameters) for value in (loss, expected)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(parameters) == 6  # codes and variance among them


def all_codes() -> Tensor:
    return torch.tensor(list(itertools.product(range(K), repeat=L))).view(-1, L, 1)


@pytest.mark.parametrize("prior", ["uniform", "transformer"])
def test_the_bound_is_exact_for_every_draw_and_below_the_likelihood(prior, monkeypatch):
    model, x, codes = tiny(prior).eval(), gray(1), all_codes()
    with torch.no_grad():
        f = model.features(x)[..., 0].transpose(1, 2)
        squares = torch.cdist(f, model.bottleneck.code_vectors()).square()  # [1, L, K]
        q = (-squares / (2 * model.bottleneck.variance())).softmax(-1)[0]
        log_q = sum(q[position, codes[:, position, 0]].log() for position in range(L))
        params = model.decoder(model.bottleneck.embed(codes))
        joint = model.likelihood.log_prob(params, x.expand(len(codes), -1, -1, -1))
        joint = joint + model.prior.log_prob(Latent.of_codes(codes))
        monkeypatch.setattr(categorical, "_draw", lambda log_p, samples: codes[None])
        elbo = model.elbo(x.expand(len(codes), -1, -1, -1).float())
    assert log_q.exp().sum().item() == pytest.approx(1)
    assert torch.allclose(elbo.log_posterior, log_q, rtol=1e-5)
    assert torch.allclose(elbo.nats, joint - log_q, rtol=1e-4, atol=1e-5)
    bound = (log_q.exp() * (joint - log_q)).sum()
    assert bound < joint.logsumexp(0)


def test_evaluation_averages_to_the_enumerated_bound():
    model, codes = tiny().eval().float(), all_codes()
    x = torch.randint(256, (1, 1, 2, 2), dtype=torch.uint8)
    with torch.no_grad():
        log_p = model.bottleneck.log_posterior(model.features(x / 255).movedim(1, -1))[0, :, 0]
        log_q = sum(log_p[position, codes[:, position, 0]] for position in range(L))
        repeated = (x / 255).expand(len(codes), -1, -1, -1)
        joint = model.likelihood.log_prob(model.decoder(model.bottleneck.embed(codes)), repeated) - L * math.log(K)
    found = evaluate(model, x.expand(4000, -1, -1, -1), torch.zeros(4000))
    expected = -(log_q.exp() * (joint - log_q)).sum().item()
    assert found["neg_elbo"] == pytest.approx(expected, abs=5 * found["neg_elbo_se"] + 1e-4)
    nearest = model.bottleneck.quantize(model.features(x / 255)).codes
    assert found["active_codes"] == len(nearest.unique())  # of the most likely codes, not of draws


def test_the_posterior_is_bayes_rule_and_the_rate_a_divergence():
    bottleneck = make("stochastic", (2, 2), D, num_codes=5, code_dim=D, variance=3.0).double().train()
    features = torch.randn(3, D, 2, 2).double()
    log_p = bottleneck.log_posterior(features.movedim(1, -1))
    normal = torch.distributions.Normal(bottleneck.code_vectors(), 3**0.5)
    density = normal.log_prob(rows(features)[:, None]).sum(-1).softmax(-1)  # of equally likely codes
    assert torch.allclose(log_p.exp().view(-1, 5), density)
    latent = bottleneck(features, 0)
    encoded, generated = (torch.distributions.Normal(mean, 3**0.5) for mean in (features, latent.z))
    divergence = torch.distributions.kl_divergence(encoded, generated).flatten(1).sum(1)
    uncertainty = torch.distributions.Categorical(logits=log_p).entropy().flatten(1).sum(1)
    assert torch.allclose(latent.log_q, divergence - uncertainty)
    assert latent.stats["posterior_entropy"].item() == pytest.approx(uncertainty.mean().item())
    assert latent.loss == 0
    assert latent.stats["variance"].item() == pytest.approx(3)


def test_draws_harden_as_the_temperature_falls():
    bottleneck = make("stochastic", (8, 8), D, num_codes=5, code_dim=D, anneal=1e-3).train()
    features = torch.randn(3, D, 8, 8)
    sharpness = [bottleneck(features, step).assignments.amax(1).mean().item() for step in (0, 1000, 5000)]
    assert sharpness[0] < sharpness[1] < sharpness[2]
    assert sharpness[2] > 0.95


def test_the_most_likely_code_is_the_nearest():
    bottleneck, features = make("stochastic", num_codes=9, code_dim=4).eval(), torch.randn(4, 6, 2, 4)
    bottleneck.initialize(features)
    f = bottleneck.projection(features)
    assert_nearest(bottleneck.quantize(features).codes.flatten(), rows(f), bottleneck.code_vectors())
    assert torch.allclose(rows(f).std(0), torch.ones(4), rtol=1e-3)
    likeliest = bottleneck.log_posterior(f.movedim(1, -1)).argmax(-1)
    assert_nearest(likeliest.flatten(), rows(f), bottleneck.code_vectors(), tolerance=1e-5)


def test_features_far_from_the_origin_have_the_same_posterior():
    bottleneck = make("stochastic", (2, 2), D, num_codes=5, code_dim=D)
    f = torch.randn(6, D)
    near = bottleneck.log_posterior(f)
    with torch.no_grad():
        bottleneck.vectors.add_(1000)
        assert torch.allclose(bottleneck.log_posterior(f + 1000), near, atol=1e-2)


def test_options_out_of_range_are_refused():
    with pytest.raises(OptionError, match="variance=1.0: must be above 1 and at most 1000000"):
        make("stochastic", variance=1.0)
    with pytest.raises(OptionError, match="anneal=-1.0: must be from 0 to 1"):
        make("stochastic", anneal=-1.0)
