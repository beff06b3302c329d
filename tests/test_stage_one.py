"""Training an autoencoder: every member of every slot takes steps, and the module reports what it computes."""

import math

import pytest
import torch

from tests.helpers import choose, fitting, images, make, objective, training
from vqvae import contracts
from vqvae.autoencoder import unit_range
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.evaluation import evaluate
from vqvae.likelihoods import LIKELIHOODS
from vqvae.metrics import METRICS, perplexity
from vqvae.nets import NETS
from vqvae.priors import PRIORS
from vqvae.registry import signature
from vqvae.stage_one import AutoencoderTraining

LABELS = torch.zeros(4, dtype=torch.int64)
ROWS = (
    [{"nets": name} for name in NETS]
    + [fitting(name) for name in BOTTLENECKS]
    + [fitting("gaussian") | {"prior": "made-flow", "nets": "mlp"}]
    + [{"likelihood": name} for name in LIKELIHOODS]
    + [{"prior": name} for name in PRIORS if "num_codes" in signature(PRIORS[name]).context]
    + [
        {"bottleneck": bottleneck, "prior": prior}
        for bottleneck in ("residual", "hierarchy", "gumbel")
        for prior in ("unigram", "pixelcnn", "gated-pixelcnn", "transformer")
    ]
)


@pytest.mark.parametrize("names", ROWS, ids=lambda names: "-".join(names.values()))
def test_every_row_of_every_table_trains_two_steps(names):
    module = training(**names)
    module.initialize(lambda n: images(8))
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    for step in range(2):
        out = module(images(4), LABELS, step)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert out.loss.isfinite()
        assert not any(value.requires_grad for value in out.metrics.values())
        numbers = module.summary(out.metrics)
        assert all(type(value) in (int, float) and math.isfinite(value) for value in numbers.values())
    moved = [name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("encoder") for name in moved)
    assert any(name.startswith("decoder") for name in moved)


def test_the_reconstruction_of_a_batch_is_its_mse_over_the_variance():
    module, batch = training().eval(), images(5)
    elbo = module.model.elbo(unit_range(batch))
    error = (elbo.params + 0.5 - unit_range(batch)).double().square().mean() / 0.06
    metrics = module(batch, None, 0).metrics
    assert metrics["reconstruction"].item() == pytest.approx(error.item(), rel=1e-4)


def test_the_metrics_of_a_batch_are_means_over_its_examples():
    module, batch = training(bottleneck=choose("bottleneck", "vq", init="normal"), prior="unigram").eval(), images(5)
    model, x = module.model, unit_range(batch)
    numbers = module.summary(module.of_batch(module(batch, None, 0).metrics))
    elbo = model.elbo(x)
    mse = (model.likelihood.center(elbo.params) - x).double().square().mean().item()
    usage = model.bottleneck.usage(elbo.latent.codes)
    expected = {
        "neg_elbo": -elbo.nats.double().mean().item(),
        "reconstruction_nats": -elbo.log_likelihood.double().mean().item(),
        "rate": (elbo.log_posterior - elbo.log_prior).double().mean().item(),
        "mse": mse,
        "nmse": mse / 0.06,
        "commitment": elbo.latent.stats["commitment"].item(),
        "batch_perplexity": float(perplexity(usage)),
        "perplexity": float(perplexity(usage)),
        "active_codes": int((usage > 0).sum()),
    }
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-4), name
    assert "usage" not in numbers
    assert all(METRICS[name].monitored for name in METRICS.keys() & numbers.keys() - elbo.latent.stats.keys())


def test_perplexity_is_that_of_the_usage_averaged_over_steps():
    numbers = training().summary({"loss": torch.tensor(1.0), "usage": torch.tensor([[1.0, 1.0, 0.5, 0.0]])})
    assert numbers["perplexity"] == pytest.approx(math.exp(-(0.8 * math.log(0.4) + 0.2 * math.log(0.2))), rel=1e-5)
    assert numbers["active_codes"] == 3


def test_the_bottleneck_is_fitted_to_the_features_of_enough_images():
    asked = []

    def batches(n: int) -> torch.Tensor:
        asked.append(n)
        return images(300)

    module = training()
    before = module.model.bottleneck.code_vectors().clone()
    module.initialize(batches)
    assert asked == [20_000 // 4]  # an image has 2x2 vectors
    vectors = module.model.bottleneck.code_vectors()
    assert not torch.equal(vectors, before)
    with torch.no_grad():
        projected = module.model.bottleneck.projection(module.model.features(unit_range(images(300))))
    rows = projected.movedim(1, -1).reshape(-1, 4)
    nearest = torch.cdist(rows.double(), vectors.double()).amin(1)
    assert nearest.square().mean() < rows.double().var(0).sum()
    continuous = training(**fitting("gaussian"))
    continuous.initialize(batches)
    assert len(asked) == 1  # nothing to fit


NEEDS_NOTHING = [
    choose("bottleneck", name, init="uniform") for name in ("vq", "residual", "grouped", "hierarchy", "multiscale")
]
NEEDS_NOTHING += [choose("bottleneck", "cosine", init="normal"), choose("bottleneck", "gumbel", posterior="linear")]


@pytest.mark.parametrize("bottleneck", NEEDS_NOTHING, ids=str)
def test_a_start_that_needs_no_data_encodes_nothing(bottleneck):
    module = training(bottleneck=bottleneck)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.initialize(lambda n: pytest.fail(f"asked for {n} images"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_start_leaves_the_statistics_of_batch_norm_alone():
    module = training(nets="henrhoi")
    before = {name: value.clone() for name, value in module.model.encoder.state_dict().items()}
    module.initialize(lambda n: images(30))
    assert module.training
    assert module.model.encoder.training
    assert all(torch.equal(value, before[name]) for name, value in module.model.encoder.state_dict().items())


def test_codes_that_are_too_many_to_count_are_counted_in_evaluation_only(monkeypatch):
    module, batch = training(bottleneck=choose("bottleneck", "fsq", levels="4,3,5")), images(9)
    module.initialize(lambda n: batch)
    model = module.model
    expected = evaluate(model, batch, torch.zeros(9, dtype=torch.int64), batch_size=4)
    assert expected["active_codes"] > 2
    monkeypatch.setattr(contracts, "MOST_COUNTED", 59)
    assert not model.discrete.counted
    assert not {"usage", "batch_perplexity"} & module.of_batch(module(batch, None, 0).metrics).keys()
    found = evaluate(model, batch, torch.zeros(9, dtype=torch.int64), batch_size=4)
    assert "usage" not in found
    for name in ("perplexity", "active_codes", "codebook_size"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    huge = make(bottleneck=choose("bottleneck", "fsq", levels="8,8,8,8,8,8,8,8"))
    assert evaluate(huge, batch, torch.zeros(9, dtype=torch.int64))["codebook_size"] == 8**8


def test_a_saved_state_restores_the_model():
    first, second = (training(prior="transformer") for _ in range(2))
    assert not torch.equal(first.model.encoder[0].weight, second.model.encoder[0].weight)
    second.restore_state(first.saved_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_an_objective_is_checked_against_the_model():
    with pytest.raises(ValueError, match="iaf_startup_steps=5"):
        AutoencoderTraining(make(), objective("probabilistic iaf_startup_steps=5"))


@pytest.mark.parametrize(
    ("words", "relaxed"),
    [
        ("gumbel", True),
        ("gumbel hard=yes", False),
        ("gumbel hard=yes iaf_flows=1", True),
        ("categorical", True),  # the mean of several one-hots
        ("categorical num_samples=1", False),
        ("categorical average_samples=no", False),
        ("categorical estimator=rloo", False),
        ("deterministic", False),
        ("vq", False),
    ],
)
def test_training_calls_only_a_bound_elbo(words, relaxed):
    name, *given = words.split()
    small = choose("bottleneck", name)
    module = training(bottleneck=small._replace(options=small.options | dict(word.split("=") for word in given)))
    batch, labels = images(6), torch.zeros(6, dtype=torch.int64)
    found = module.train()(batch, labels, 0).metrics
    assert ("relaxed_nats" in found, "neg_elbo" in found) == (relaxed, not relaxed)
    assert "neg_elbo" in module.eval()(batch, labels, 0).metrics  # evaluation draws codes
