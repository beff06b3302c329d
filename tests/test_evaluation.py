"""Held-out metrics: means over the examples of a split, however it is batched."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from tests.checkpoints import unambiguous
from tests.helpers import choose, fitting, images, make
from vqvae.autoencoder import Autoencoder, unit_range
from vqvae.contracts import evaluating
from vqvae.evaluation import evaluate

LABELS = torch.zeros(10, dtype=torch.int64)
PLANE = choose("bottleneck", "gaussian", latents=2)


@torch.no_grad()
def fitted(**names) -> Autoencoder:
    """A model whose codebook fits its features, so that it uses several codes."""
    model = make(**names)
    model.bottleneck.initialize(model.features(unit_range(images(500))))
    return model


def test_metrics_do_not_depend_on_the_batches():
    model = fitted()
    batch = unambiguous(model, images(100), 10)  # rounding cannot change their codes
    whole = evaluate(model, batch, LABELS, batch_size=10)
    ragged = evaluate(model, batch, LABELS, batch_size=4)
    assert whole.pop("usage").tolist() == ragged.pop("usage").tolist()
    assert whole.keys() == ragged.keys()
    for name, value in whole.items():
        assert value == pytest.approx(ragged[name], rel=1e-4, abs=1e-9), name


def test_metrics_match_a_computation_by_hand():
    model = fitted().eval()
    batch = unambiguous(model, images(100), 10)
    results = evaluate(model, batch, LABELS)
    x = unit_range(batch)
    errors = (model.reconstruct(batch) - x).double().square().flatten(1).mean(1)
    assert results["mse"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert results["mse_se"] == pytest.approx(errors.std().item() / math.sqrt(10), rel=1e-4)
    assert results["nmse"] == pytest.approx(errors.mean().item() / 0.06, rel=1e-4)
    assert results["psnr"] == pytest.approx((10 * torch.log10(1 / errors)).mean().item(), rel=1e-4)
    assert results["rate"] == pytest.approx(4 * math.log(7), rel=1e-5)  # a 2x2 grid of 7 codes, uniform prior
    assert results["neg_elbo"] == pytest.approx(results["reconstruction_nats"] + results["rate"], rel=1e-5)
    assert results["rate"] == pytest.approx(results["prior_nats"] - results["entropy"], rel=1e-5)
    assert results["bits_per_code"] == pytest.approx(results["uniform_bits_per_code"]) == pytest.approx(math.log2(7))
    codes = model.encode(batch)
    assert results["usage"].tolist() == [codes.flatten().bincount(minlength=7).tolist()]
    assert results["active_codes"] == len(codes.unique()) > 1


def test_one_draw_of_a_point_posterior_is_the_importance_weighted_bound():
    results = evaluate(make(), images(10), LABELS, iw_samples=3)
    assert results["iw_bound"] == pytest.approx(results["neg_elbo"], rel=1e-6)
    assert "iw_bound" not in evaluate(make(), images(10), LABELS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "names", [fitting("vq"), fitting("gaussian"), fitting("gumbel")], ids=lambda n: n["bottleneck"]
)
def test_evaluation_changes_neither_the_model_nor_the_random_state(names, training):
    model, batch = make(**names).train(training), images(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = evaluate(model, batch, LABELS, iw_samples=2)
    assert model.training == training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.randn(3)
    second = evaluate(model, batch, LABELS, iw_samples=2)  # the draws are those of its own seed
    assert str(first) == str(second)


def test_the_mode_is_restored_after_an_error():
    model = make().train()

    def fail() -> None:
        with evaluating(model):
            assert not model.bottleneck.training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.bottleneck.training


def test_another_seed_draws_other_latents():
    model, batch = make(**fitting("gaussian")), images(10)
    rates = [evaluate(model, batch, LABELS, seed=seed)["rate"] for seed in (0, 1)]
    assert rates[0] != rates[1]


def test_only_eight_bit_likelihoods_have_bits_per_dim():
    assert "bits_per_dim" not in evaluate(make(), images(10), LABELS)
    results = evaluate(make(likelihood="softmax256"), images(10), LABELS)
    assert results["bits_per_dim"] == pytest.approx(results["neg_elbo"] / (192 * math.log(2)))
    assert 7 < results["bits_per_dim"] < 10  # untrained: about 8 bits a pixel, and the codes


def test_a_collapsed_dimension_is_not_an_active_unit():
    model = make(**fitting("gaussian"))
    assert evaluate(model, images(10), LABELS)["active_units"] <= 16
    with torch.no_grad():
        model.bottleneck.head.weight[:16].mul_(100)  # the rows of the means
        model.bottleneck.head.weight[3:16] = 0  # all but three are constant
    assert evaluate(model, images(10), LABELS)["active_units"] == 3


def test_one_example_has_no_standard_errors_and_no_active_units_and_two_have_both():
    one, two = (evaluate(make(**fitting("gaussian")), images(n), LABELS[:n]) for n in (1, 2))
    assert all(math.isfinite(value) for value in [*one.values(), *two.values()])
    assert one["neg_elbo"] > 0
    spread = {"active_units", *(f"{name}_se" for name in ("neg_elbo", "reconstruction_nats", "rate", "mse", "psnr"))}
    assert not spread & one.keys()
    assert spread <= two.keys()


def test_posterior_means_of_the_whole_split_are_kept_where_the_latent_is_a_plane(monkeypatch):
    model, batch, labels = make(**fitting("gaussian") | {"bottleneck": PLANE}), images(10), torch.arange(10)
    kept = evaluate(model, batch, labels, batch_size=4)["posterior"]
    assert torch.allclose(kept["means"], model.posterior_mean(batch).flatten(1), atol=1e-5)
    assert torch.equal(kept["labels"], labels)
    assert "posterior" not in evaluate(make(**fitting("gaussian")), batch, labels)
    monkeypatch.setattr("vqvae.evaluation.MOST_POINTS", 5)
    assert evaluate(model, batch, labels)["posterior"]["labels"].tolist() == [0, 2, 4, 6, 8]


def test_more_samples_tighten_the_importance_weighted_bound():
    model, batch = make(**fitting("gaussian")), images(300)
    with torch.no_grad():
        model.bottleneck.head.weight.mul_(10)  # a posterior that is far from the model's
    labels = torch.zeros(300, dtype=torch.int64)
    bounds = [evaluate(model, batch, labels, iw_samples=s)["iw_bound"] for s in (1, 5, 50)]
    assert bounds[0] > bounds[1] > bounds[2]  # bounds on -log p(x)


def test_the_bound_of_a_likelihood_with_noise_is_tightened_where_z_is_a_point(monkeypatch):
    model, batch, labels = make((1, 8, 8), likelihood="logit-gaussian").eval(), images(100, (1, 8, 8)), torch.zeros(100)
    log_prob = model.likelihood.log_prob
    monkeypatch.setattr(model.likelihood, "log_prob", lambda params, x: log_prob(params + 8, x))  # whose noise is large
    results = evaluate(model, batch, labels.long(), iw_samples=400)
    x, alpha = batch.double() / 255, model.likelihood.alpha
    with torch.no_grad():
        mean = model.elbo(x.float()).params.double() + 8
    edges = [(alpha / 2 + (1 - alpha) * (x * 255 + u) / 256).logit() for u in (0, 1)]
    lower, upper = (ndtr((edge - mean).numpy()) for edge in edges)
    exact = -np.log(upper - lower).sum((1, 2, 3)).mean() + results["rate"]  # P of 8-bit pixels
    assert results["iw_bound"] == pytest.approx(exact, abs=0.03)
    draws = [evaluate(model, batch, labels.long(), seed=seed)["neg_elbo"] for seed in range(10)]
    assert sum(draws) / 10 > exact + 0.03
    masked = evaluate(make((1, 8, 8), likelihood="logit-gaussian", prior="masked"), batch, labels.long(), iw_samples=2)
    assert math.isfinite(masked["iw_bound"])  # the prior's estimate is one draw


def test_the_rate_of_a_gaussian_is_its_divergence_on_average():
    model = make(**fitting("gaussian")).eval()
    x, draws = unit_range(images(3)), 1500
    with torch.no_grad():
        mean, log_std = model.bottleneck.posterior(model.features(x))
        posterior = torch.distributions.Normal(mean, log_std.exp())
        exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).flatten(1).sum(1)
        elbo = model.elbo(x.repeat(draws, 1, 1, 1))
        rates = (elbo.log_posterior - elbo.log_prior).view(draws, 3).double()
    standard_error = rates.std(0) / math.sqrt(draws)
    assert ((rates.mean(0) - exact).abs() < 5 * standard_error + 1e-4).all()


def test_statistics_of_the_bottleneck_are_averaged_over_images():
    model = make(bottleneck=choose("bottleneck", "vq", init="normal")).eval()
    batch = images(10)
    parts = [model.elbo(unit_range(part)).latent.stats["commitment"].item() for part in (batch[:6], batch[6:])]
    found = evaluate(model, batch, LABELS, batch_size=6)["commitment"]
    assert found == pytest.approx(0.6 * parts[0] + 0.4 * parts[1], rel=1e-4)
