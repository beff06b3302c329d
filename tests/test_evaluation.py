"""Held-out figures: per-example means over the whole split, whatever the batches."""

import math

import pytest
import torch

from tests.test_autoencoder import make, pictures
from vqvae.autoencoder import unit_range
from vqvae.evaluation import evaluate

LABELS = torch.zeros(10, dtype=torch.int64)


def test_figures_do_not_depend_on_the_batches():
    model, images = make(), pictures(10)
    whole = evaluate(model, images, LABELS, batch_size=10)
    ragged = evaluate(model, images, LABELS, batch_size=4)
    for name, value in whole.items():
        if name == "usage":
            assert torch.equal(value, ragged[name])
        else:
            assert value == pytest.approx(ragged[name], rel=1e-4), name


def test_figures_match_a_computation_by_hand():
    model, images = make().eval(), pictures(10)
    results = evaluate(model, images, LABELS)
    x = unit_range(images)
    errors = ((model.reconstruct(images) - x) ** 2).flatten(1).mean(1).double()
    assert results["mse"] == pytest.approx(errors.mean().item())
    assert results["mse_se"] == pytest.approx(errors.std().item() / math.sqrt(10))
    assert results["nmse"] == pytest.approx(errors.mean().item() / 0.06)
    assert results["psnr"] == pytest.approx((10 * torch.log10(1 / errors)).mean().item())
    assert results["rate"] == pytest.approx(4 * math.log(7), rel=1e-5)  # a 2x2 grid of 7 codes, uniform prior
    assert results["neg_elbo"] == pytest.approx(results["reconstruction_nats"] + results["rate"], rel=1e-6)
    assert results["bits_per_code"] == pytest.approx(results["uniform_bits_per_code"]) == pytest.approx(math.log2(7))
    codes = model.encode(images)
    assert results["usage"].sum() == 40
    assert results["active_codes"] == len(codes.unique())


def test_one_draw_of_a_point_posterior_is_the_importance_weighted_bound():
    model, images = make(), pictures(10)
    results = evaluate(model, images, LABELS, iw_samples=3)
    assert results["iw_bound"] == pytest.approx(results["neg_elbo"], rel=1e-6)


def test_evaluation_leaves_the_model_and_the_random_state_alone():
    model, images = make().train(), pictures(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(model, images, LABELS)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bits_per_dim_only_where_pixels_are_discrete():
    assert "bits_per_dim" not in evaluate(make(), pictures(10), LABELS)
    results = evaluate(make(likelihood="softmax256"), pictures(10), LABELS)
    assert results["bits_per_dim"] == pytest.approx(results["neg_elbo"] / (192 * math.log(2)))
    assert 7 < results["bits_per_dim"] < 10  # untrained: about 8 bits a pixel, and the codes


def test_a_collapsed_latent_is_counted_out():
    model = make(nets="conv-vae", bottleneck="gaussian", prior="normal")
    assert evaluate(model, pictures(10), LABELS)["active_units"] <= 16
    with torch.no_grad():
        model.bottleneck.head.weight[:16].mul_(100)  # the means' half
        model.bottleneck.head.weight[3:16] = 0  # all but three constant
    assert evaluate(model, pictures(10), LABELS)["active_units"] == 3


def test_the_importance_weighted_bound_lies_above_and_rises():
    model = make(nets="conv-vae", bottleneck="gaussian", prior="normal")
    images = pictures(10)
    bounds = [evaluate(model, images, LABELS, iw_samples=s)["iw_bound"] for s in (1, 5, 50)]
    assert bounds[0] > bounds[1] > bounds[2]  # as costs: lower is tighter


def test_the_rate_of_a_gaussian_is_its_divergence_on_average():
    model = make(nets="conv-vae", bottleneck="gaussian", prior="normal").eval()
    x = unit_range(pictures(3))
    with torch.no_grad():
        mean, log_std = model.bottleneck.posterior(model.features(x))
        posterior = torch.distributions.Normal(mean, log_std.exp())
        exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).flatten(1).sum(1)
        terms = [model.elbo(x) for _ in range(1500)]
        rates = torch.stack([t.log_posterior - t.log_prior for t in terms])
    assert torch.allclose(rates.mean(0), exact, atol=4 * float(rates.std(0).max()) / 1500**0.5)
