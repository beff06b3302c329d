"""Each row of the table of metrics agrees with an independent computation, and a new row appears everywhere."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from tests.helpers import images, run_train, training
from vqvae import metrics
from vqvae.evaluation import Totals, evaluate
from vqvae.features import frechet
from vqvae.metrics import METRICS, TABLE, Examples, Facts, Metric, Split, perplexity
from vqvae.ssim import ssim

FACTS = Facts(dimensions=12, data_variance=0.05, eight_bit=True, num_codes=5, codes_per_image=4)
POINTS = Facts(dimensions=2, data_variance=0.05, eight_bit=False, num_codes=None, codes_per_image=1)
FROM_ELSEWHERE = {"commitment", "iw_bound"}  # the bottleneck's statistic, and `evaluate`'s own bound
ASKED = {metric.name for metric in TABLE if metric.asked}


def examples(n: int = 6) -> Examples:
    """Random values of n examples, in float64."""
    log_prior, log_likelihood, log_posterior = torch.randn(3, n, dtype=torch.float64)
    pixels, shown = torch.rand(2, n, 3, 12, 14, dtype=torch.float64)
    return Examples(log_prior, log_likelihood, log_posterior, pixels, shown)


def by_hand(e: Examples, usage: Tensor, latents: Tensor) -> dict[str, float]:
    """Every metric of a split, computed by numpy from the definitions."""
    log_prior, log_likelihood, log_posterior, pixels, shown = (value.numpy() for value in e[:5])
    squares = [((a - b) ** 2).mean() for a, b in zip(shown, pixels, strict=True)]
    neg_elbo = np.mean(log_posterior - log_prior - log_likelihood)
    bits = -log_prior.mean() / math.log(2)
    shares = [level / level.sum() for level in usage.numpy()]
    return {
        "mse": np.mean(squares),
        "nmse": np.mean(squares) / 0.05,
        "psnr_of_mse": 10 * math.log10(1 / np.mean(squares)),
        "psnr": np.mean([10 * math.log10(1 / square) for square in squares]),
        "ssim": np.mean([similarity(a, b) for a, b in zip(shown, pixels, strict=True)]),
        "neg_elbo": neg_elbo,
        "bits_per_dim": neg_elbo / math.log(2) / 12,
        "reconstruction_nats": -log_likelihood.mean(),
        "rate": (log_posterior - log_prior).mean(),
        "prior_nats": -log_prior.mean(),
        "entropy": -log_posterior.mean(),
        "perplexity": np.mean([np.prod([p**-p for p in level if p]) for level in shares]),
        "active_codes": np.count_nonzero(usage.numpy()),
        "codebook_size": 10,
        "codes_per_image": 4,
        "active_units": sum(np.var(column, ddof=1) > 0.01 for column in latents.numpy().T),
        "bits_per_code": bits / 4,
        "uniform_bits_per_code": math.log2(5),
        "code_bits_per_dim": bits / 12,
        "code_perplexity": math.exp(-log_prior.mean() / 4),
    }


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two images `[C, H, W]` as scikit-image computes it: scipy's Gaussian filter, and a border cut off."""

    def average(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, sigma=(0, 1.5, 1.5), truncate=3.5, mode="reflect")

    mean_a, mean_b = average(a), average(b)
    var_a, var_b, both = average(a * a) - mean_a**2, average(b * b) - mean_b**2, average(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return found[:, 5:-5, 5:-5].mean()


@pytest.mark.parametrize("shape", [(1, 11, 11), (3, 11, 40), (3, 32, 32)])
def test_ssim_is_that_of_scipys_filter(shape):
    images = torch.rand(5, *shape, dtype=torch.float64)
    for other in (images + 0.05 * torch.randn_like(images), torch.rand_like(images), 0.9 * images, 1 - images):
        expected = [similarity(a.numpy(), b.numpy()) for a, b in zip(images, other, strict=True)]
        assert ssim(images, other).tolist() == pytest.approx(expected, rel=1e-9)
        assert ssim(images.float(), other.float()).tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_is_1_for_equal_images_and_less_for_others():
    images = torch.rand(4, 3, 20, 20)
    assert ssim(images, images).tolist() == pytest.approx([1] * 4)
    flat = torch.full((1, 1, 16, 16), 0.5)
    assert ssim(flat, flat).item() == pytest.approx(1)
    assert ssim(flat, flat / 2).item() == pytest.approx((2 * 0.125 + 1e-4) / (0.3125 + 1e-4), rel=1e-3)


def test_images_smaller_than_the_window_and_points_have_no_ssim():
    e = examples()
    assert ssim(torch.rand(2, 3, 10, 32), torch.rand(2, 3, 10, 32)) is None
    assert "ssim" not in metrics.of_examples(e._replace(images=e.images[..., :10], shown=e.shown[..., :10]))
    assert "ssim" not in metrics.of_examples(e._replace(are_images=False))
    assert "ssim" not in metrics.of_examples(e, monitored=True)


def test_every_row_is_its_definition():
    e = examples()
    usage = torch.tensor([[3.0, 0, 1, 4, 2], [0, 0, 7, 0, 3]])
    latents = torch.randn(6, 4, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 0.5, 0.0])
    totals = Totals()
    for rows in (slice(0, 4), slice(4, 6)):  # a ragged last batch
        totals.add(metrics.of_examples(Examples(*(value[rows] for value in e[:5]))))
        totals.add_latents(latents[rows].view(-1, 4, 1, 1))
    for counts in (usage - 1, torch.ones(2, 5)):
        totals.add_usage(counts)
    found, expected = totals.results(FACTS), by_hand(e, usage, latents)
    assert set(expected) | FROM_ELSEWHERE | ASKED | {"relaxed_nats"} == set(METRICS)
    assert found["psnr_of_mse"] < found["psnr"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["usage"].tolist() == usage.tolist()
    assert found["usage"].dtype == torch.int64


def test_a_mean_has_its_standard_error():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    totals = Totals()
    totals.add({"mse": values[:3]}, {"commitment": torch.tensor(1.0)})
    totals.add({"mse": values[3:]}, {"commitment": torch.tensor(5.0)})
    found = totals.results(POINTS)
    assert found["mse"] == pytest.approx(4)
    assert found["mse_se"] == pytest.approx(np.std([1, 2, 4, 9], ddof=1) / 2)
    assert found["commitment"] == pytest.approx(2)  # a batch of 3 and one of 1


def test_one_example_has_no_standard_error_and_no_active_units():
    totals = Totals()
    totals.add({"mse": torch.ones(1)})
    totals.add_latents(torch.randn(1, 3, 1, 1))
    found = totals.results(POINTS)
    assert found["mse"] == 1
    assert not {"mse_se", "active_units"} & set(found)


def test_numbers_that_are_not_finite_are_null_in_json():
    numbers = {"mse": 0.5, "rate": math.nan, "code_perplexity": math.inf, "active_codes": 3, "data": "digits"}
    kept = metrics.for_json(numbers)
    assert kept == {"mse": 0.5, "rate": None, "code_perplexity": None, "active_codes": 3, "data": "digits"}
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept


def test_metrics_that_do_not_apply_are_absent():
    e = examples()
    assert "psnr" not in metrics.of_examples(e._replace(are_images=False))
    assert set(metrics.of_examples(Examples(e.log_prior))) == {"prior_nats"}
    assert metrics.of_split(Split({}, POINTS)) == {}
    continuous = metrics.of_split(Split({"mse": 0.1, "neg_elbo": 3.0, "prior_nats": 2.0}, POINTS))
    assert continuous == {"nmse": pytest.approx(2)}
    second_stage = metrics.of_split(Split({"prior_nats": 2.0}, FACTS), monitored=True)
    assert set(second_stage) == {"bits_per_code", "code_perplexity"}


def test_the_terms_of_relaxed_draws_are_not_called_elbo():
    e = examples()
    bound, relaxed = metrics.of_examples(e), metrics.of_examples(e._replace(relaxed=True))
    assert torch.equal(relaxed["relaxed_nats"], bound["neg_elbo"])
    assert set(bound) - set(relaxed) == {"neg_elbo"}
    assert set(relaxed) - set(bound) == {"relaxed_nats"}
    assert "bits_per_dim" not in metrics.of_split(Split({"relaxed_nats": 3.0, "mse": 0.1}, FACTS))


def test_metrics_in_features_compare_reconstructions_and_samples_with_the_images():
    totals = Totals()
    for size in (30, 10):
        f = torch.randn(size, 3)
        totals.add({"mse": torch.ones(size)})
        totals.add_features("images", {"lite0": f})
        totals.add_features("reconstructions", {"lite0": f + 2})
    totals.add_features("samples", {"lite0": f - 1})
    found = totals.results(POINTS)
    images = torch.cat(totals.features["lite0"]["images"])
    assert found["rfd_lite0"] == pytest.approx(12, rel=1e-4)  # 3 features, each 2 away
    assert found["gfd_lite0"] == pytest.approx(frechet(f - 1, images), rel=1e-6)
    assert not {"rfid", "gfid", "lpips"} & set(found)
    del totals.features["lite0"]["samples"]
    assert "gfd_lite0" not in totals.results(POINTS)


def test_training_computes_the_monitored_metrics_only():
    e, split = examples(), Split({"mse": 0.1, "neg_elbo": 3.0}, FACTS, torch.ones(1, 5))
    for whole, monitored in (
        (metrics.of_examples(e), metrics.of_examples(e, monitored=True)),
        (metrics.of_split(split), metrics.of_split(split, monitored=True)),
    ):
        assert set(monitored) == {name for name in whole if METRICS[name].monitored}
        assert 0 < len(monitored) < len(whole)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ([[5, 5, 5, 5]], 4),
        ([[0, 9, 0, 0]], 1),
        ([[0.25, 0.25, 0.5, 0]], 2**1.5),
        ([[5, 5, 5, 5], [0, 9, 0, 0]], 2.5),  # the mean over levels
        ([[0, 0, 0, 0]], 1),  # nothing was counted
    ],
)
def test_perplexity_is_the_effective_number_of_codes(usage, expected):
    assert float(perplexity(torch.tensor(usage))) == pytest.approx(expected, rel=1e-5)


def test_a_code_perplexity_too_large_for_a_float_is_infinite():
    def found(bits: float) -> float:
        nats = bits * FACTS.codes_per_image * math.log(2)
        return metrics.of_split(Split({"prior_nats": nats}, FACTS))["code_perplexity"]

    assert found(3) == pytest.approx(8)
    assert found(900) == pytest.approx(2.0**900, rel=1e-6)
    assert found(2000) == math.inf
    assert found(1e300) == math.inf


def test_the_line_prints_the_numbers_there_are_in_the_order_of_the_names():
    numbers = {"active_codes": 7, "mse": 0.012345, "neg_elbo": 1234.5, "rate": 3.0}
    assert metrics.line(("neg_elbo", "mse", "psnr", "active_codes"), numbers) == ("-ELBO 1234.5, MSE 0.01235, active 7")
    assert metrics.line(("mse",), {}) == ""


def test_what_modules_show_on_the_terminal_has_a_label():
    headline = training().headline
    assert {"mse", "neg_elbo", "perplexity"} <= set(headline)
    assert all(METRICS[name].label for name in headline)


def test_names_are_unique_and_every_row_is_explained():
    assert len(METRICS) == len(TABLE)
    for metric in TABLE:
        assert metric.explanation
        assert (metric.per_example or metric.whole_set) or metric.name in FROM_ELSEWHERE or metric.asked == "probe"


def test_help_explains_every_metric_that_is_shown_or_asked_for(capsys):
    with pytest.raises(SystemExit) as ended:
        run_train("--help")
    assert ended.value.code == 0
    text = metrics.explanations()
    assert text in capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    words = " ".join(text.split())
    for metric in TABLE:
        assert (f"{metric.name} {metric.explanation}" in words) == bool(metric.label or metric.asked), metric.name


def test_a_new_row_appears_in_evaluation_training_terminal_and_help(monkeypatch):
    def largest(e: Examples) -> Tensor | None:
        return None if e.images is None or e.shown is None else (e.images - e.shown).abs().flatten(1).amax(1)

    row = Metric(
        "largest_error", "largest absolute error of a pixel", largest, monitored=True, label="largest", form="{:.3f}"
    )
    monkeypatch.setattr(metrics, "TABLE", (*TABLE, row))
    monkeypatch.setitem(METRICS, row.name, row)
    module, batch, labels = training(), images(10), torch.zeros(10, dtype=torch.int64)
    model = module.model.eval()
    errors = (model.reconstruct(batch) - batch / 255).abs().flatten(1).amax(1).double()
    held_out = evaluate(model, batch, labels)
    assert held_out["largest_error"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert held_out["largest_error_se"] == pytest.approx(errors.std().item() / 10**0.5, rel=1e-4)
    trained = module.summary(module.eval()(batch, labels, 0).metrics)
    assert trained["largest_error"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert metrics.line(("mse", "largest_error"), held_out).endswith(f", largest {held_out['largest_error']:.3f}")
    assert "largest_error largest absolute error of a pixel" in " ".join(metrics.explanations().split())
