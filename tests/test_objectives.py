"""Objectives: their arithmetic, what they freeze, and an objective with a net of its own."""

import itertools
import math
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import choose, images, objective, run_train, training
from vqvae import checkpoint, experiment, load
from vqvae.autoencoder import SLOTS, Elbo, unit_range
from vqvae.config import Fresh, configure
from vqvae.contracts import Latent
from vqvae.errors import OptionError
from vqvae.evaluation import evaluate
from vqvae.objectives import OBJECTIVES, ElboObjective, ElboOptions
from vqvae.optimizer import adamw
from vqvae.presets import PRESETS
from vqvae.registry import Choice, Count
from vqvae.training import seed_step

SAMPLED = {"num_samples": 3, "average_samples": False}  # each of S draws is decoded


def with_codes_drawn(words: str, **options: Any):
    """A module with a stochastic bottleneck and a learned prior; the same weights at every call."""
    torch.manual_seed(0)
    bottleneck = choose("bottleneck", "categorical", **SAMPLED | options)
    return training(words, bottleneck=bottleneck, prior="transformer")


def test_the_loss_is_sonnets():
    out = training(bottleneck=choose("bottleneck", "vq", beta=0.25)).eval()(images(5), None, 0)
    expected = out.metrics["reconstruction"] + 0.25 * out.metrics["commitment"]
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_duplicating_the_batch_leaves_the_loss_unchanged():
    module, batch = training().eval(), images(3)
    once, twice = module(batch, None, 0), module(torch.cat([batch, batch]), None, 0)
    assert once.loss.item() == pytest.approx(twice.loss.item(), rel=1e-4)


def test_sum_and_mean_reductions_differ_by_the_dimensions():
    batch, losses = images(3), {}
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        module = training(f"elbo reduction={reduction}", bottleneck=choose("bottleneck", "vq", beta=0.5)).eval()
        out = module(batch, None, 0)
        losses[reduction] = (out.loss - 0.5 * out.metrics["commitment"]).item()
    assert losses["sum"] == pytest.approx(losses["mean"] * 3 * 8 * 8, rel=1e-4)


def test_kl_weight_follows_its_schedule():
    module = training("elbo reduction=sum kl_weight=linear:0:1:10", total_steps=100, prior="unigram").eval()
    batch = images(3)
    at = [module(batch, None, step) for step in (0, 5, 10)]
    rate = at[0].metrics["rate"].item()
    assert rate == pytest.approx(4 * math.log(7), rel=0.2)
    assert at[1].loss.item() - at[0].loss.item() == pytest.approx(0.5 * rate, rel=1e-3)
    assert at[2].loss.item() - at[0].loss.item() == pytest.approx(rate, rel=1e-3)


def test_a_kl_weight_without_steps_lasts_to_the_end_of_the_run():
    module = training("elbo reduction=sum kl_weight=linear:0:1", total_steps=100, prior="unigram").eval()
    batch = images(3)
    start, middle = (module(batch, None, step) for step in (0, 50))
    rate = start.metrics["rate"].item()
    assert middle.loss.item() - start.loss.item() == pytest.approx(0.5 * rate, rel=1e-3)


def test_below_the_free_bits_the_rate_has_no_gradient():
    def encoder_gradient(free_bits: float) -> float:
        torch.manual_seed(0)
        words = f"elbo reduction=sum free_bits={free_bits}"
        module = training(words, nets="conv-vae", bottleneck="gaussian", prior="normal")
        for p in module.model.decoder.parameters():
            p.data.zero_()  # the reconstruction then has no gradient for the encoder
        module(images(4), None, 0).loss.backward()
        return float(module.model.bottleneck.head.weight.grad.abs().sum())

    assert encoder_gradient(0) > 0
    assert encoder_gradient(1e4) == 0


def test_free_bits_that_are_not_used_up_cost_their_nats():
    module = training("elbo reduction=sum free_bits=1000", nets="conv-vae", bottleneck="gaussian", prior="normal")
    out = module(images(4), None, 0)
    assert out.metrics["rate"] < 1000 * math.log(2)
    reconstruction = out.metrics["reconstruction"] * 3 * 8 * 8  # without the likelihood's constant
    assert (out.loss - reconstruction).item() == pytest.approx(1000 * math.log(2), rel=1e-4)


def test_deep_vector_quantizations_loss_by_hand():
    """Mean square / (2 variance) + 5e-4 * the mean KL of a position, from the weights of --preset dvq-gumbel."""
    gumbel = Choice("gumbel", {"posterior": "linear", "entropy": "exact", "num_codes": 16, "code_dim": 4})
    mse = Choice("mse", {"variance": 0.0632704})
    objective = PRESETS["dvq-gumbel"].settings["objective"]
    module = training(objective, shape=(3, 32, 32), nets="deepmind", bottleneck=gumbel, likelihood=mse)
    model, batch = module.model, images(5, (3, 32, 32))
    torch.manual_seed(1)
    loss = module(batch, None, 5000).loss
    torch.manual_seed(1)
    elbo = model.elbo(unit_range(batch), None, 5000)
    reconstruction = (elbo.params + 0.5 - elbo.x).double().square().mean() / (2 * 0.0632704)
    q = model.bottleneck.projection(model.features(unit_range(batch))).double().softmax(1)
    kl = (q * (16 * q).log()).sum(1).mean()
    assert loss.item() == pytest.approx((reconstruction + 5e-4 * kl).item(), rel=1e-4)


def test_the_options_of_probabilistic_weight_the_terms():
    batch = images(4)

    def loss(options: str = "") -> tuple[float, dict[str, float]]:
        out = with_codes_drawn(f"probabilistic reduction=sum {options}")(batch, None, 0)
        numbers = {name: value.mean().item() for name, value in out.metrics.items()}
        return out.loss.item() - 0.25 * numbers["commitment"], numbers

    full, nats = loss()
    reconstruction = nats["reconstruction"] * 3 * 8 * 8  # without the likelihood's constant
    assert full == pytest.approx(reconstruction + nats["rate"], rel=1e-4)
    averaged, _ = loss("sum_over_latents=no")
    assert averaged == pytest.approx(reconstruction + nats["rate"] / 4, rel=1e-4)
    bare, _ = loss("entropy_scale=0")
    model = with_codes_drawn("elbo").model
    prior_nats = -model.elbo(unit_range(batch)).log_prior.mean().item()
    assert bare == pytest.approx(reconstruction + prior_nats, rel=1e-4)


def test_without_its_gradient_the_prior_does_not_pull_the_encoder():
    def pull(stop: str) -> float:
        words = f"probabilistic reduction=sum entropy_scale=0 stop_gradient_for_prior={stop}"
        module = with_codes_drawn(words, beta=0.0)
        for p in module.model.decoder.parameters():
            p.data.zero_()  # the reconstruction then has no gradient for the encoder
        module(images(4), None, 0).loss.backward()
        assert module.model.prior.embedding.weight.grad.abs().sum() > 0
        return sum(float(p.grad.abs().sum()) for p in module.model.encoder.parameters() if p.grad is not None)

    assert pull("no") > 0
    assert pull("yes") == 0


def enumerated(words: str, *, samples: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the posterior's logits `[B, L, K]` and of the decoder: exact, and RLOO's mean over all draws.

    Two images of two positions with four codes, in float64; K^L = 16 codes, 256 pairs of draws.
    """
    torch.manual_seed(0)
    positions, codes = 2, 4
    grid = torch.tensor(list(itertools.product(range(codes), repeat=positions)))  # [16, L]
    logits = torch.randn(2, positions, codes, dtype=torch.float64, requires_grad=True)
    decoder = torch.randn(len(grid), 2, dtype=torch.float64, requires_grad=True)  # log p(x|z) of each code and image
    log_prior = torch.randn(len(grid), dtype=torch.float64).log_softmax(0)
    chosen = objective(f"{words} reduction=sum", total_steps=1)
    model: Any = SimpleNamespace(likelihood=SimpleNamespace(log_normalizer=0.0), dimensions=1)
    model.bottleneck = SimpleNamespace(grid=(positions, 1))
    options = {"entropy_scale": 1.0, "sum_over_latents": True, "stop_gradient_for_prior": False}
    options |= {name: getattr(chosen.options, name) for name in options if hasattr(chosen.options, name)}

    def log_posterior() -> Tensor:
        """log q of every code for each image, `[16, B]`."""
        log_p = logits.log_softmax(-1)
        return torch.stack([log_p[:, range(positions), code].sum(1) for code in grid])

    log_q = log_posterior()
    scale = 1 if options["sum_over_latents"] else positions
    cost = (options["entropy_scale"] * log_q - log_prior[:, None]) / scale - decoder
    if options["stop_gradient_for_prior"]:
        cost = cost + log_prior[:, None] / scale
    exact = torch.autograd.grad((log_q.exp() * cost).sum(0).mean(), (logits, decoder))

    total = torch.zeros((), dtype=torch.float64)
    for draws in itertools.product(range(len(grid)), repeat=samples):  # the same for both images, which are independent
        log_q = log_posterior()[list(draws)]  # [S, B]
        share = log_q.sum(0).exp().detach()  # [B], the probability of these draws
        for image in range(2):
            score = log_q[:, image : image + 1]
            latent = Latent.of_codes(grid[list(draws)])._replace(score=score)
            likelihood = decoder[list(draws), image]
            elbo: Any = Elbo(likelihood, score.flatten(), log_prior[list(draws)], latent, likelihood, likelihood)
            total = total + share[image] * chosen(elbo, model, 0) / 2
    return list(exact), list(torch.autograd.grad(total, (logits, decoder)))


@pytest.mark.parametrize(
    "words",
    [
        "elbo",
        "probabilistic",
        "probabilistic stop_gradient_for_prior=yes",
        "probabilistic stop_gradient_for_prior=yes entropy_scale=0",
        "probabilistic sum_over_latents=no entropy_scale=0.5",
    ],
)
def test_leave_one_outs_mean_over_all_draws_is_the_exact_gradient(words):
    for exact, found in zip(*enumerated(words), strict=True):
        assert exact.abs().max() > 1e-2
        assert torch.allclose(found, exact, rtol=1e-9, atol=1e-12)


def test_the_value_of_a_loss_with_leave_one_out_is_that_without():
    values = []
    for estimator in ("straight-through", "rloo"):
        module = with_codes_drawn("elbo reduction=sum", estimator=estimator)
        torch.manual_seed(1)
        values.append(module(images(4), None, 0).loss.item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("freeze_encoder", ["no", "yes"])
def test_what_a_stage_freezes_does_not_move_by_one_bit(freeze_encoder):
    words = f"probabilistic reduction=sum iaf_startup_steps=3 stop_training_encoder_after_startup={freeze_encoder}"
    module = training(words, bottleneck=choose("bottleneck", "gumbel", iaf_flows=1), prior="transformer").train()
    optimizer = adamw(module.parameter_groups(weight_decay=0.1), torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2

    def parts_that_move(steps: range) -> set[str]:
        before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        for step in steps:
            seed_step(0, step)
            module(images(4), None, step).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = [name for name, p in module.model.named_parameters() if not torch.equal(p, before[name])]
        return {"flows" if "flows" in name else name.split(".")[0] for name in moved}

    assert parts_that_move(range(3)) == {"encoder", "bottleneck", "decoder", "prior"}
    frozen = {"encoder", "bottleneck"} if freeze_encoder == "yes" else set()
    assert parts_that_move(range(3, 6)) == {"encoder", "bottleneck", "decoder", "prior", "flows"} - frozen


def test_options_that_have_nothing_to_act_on_are_refused():
    with pytest.raises(OptionError, match="iaf_flows=1") as caught:
        training("probabilistic iaf_startup_steps=5", bottleneck="gumbel")
    assert caught.value.flagged.startswith("--objective probabilistic iaf_startup_steps=5: ")
    with pytest.raises(OptionError, match="needs iaf_startup_steps above 0"):
        training("probabilistic stop_training_encoder_after_startup=yes")
    with pytest.raises(OptionError, match="elbo entropy_scale=0: unknown option"):
        training("elbo entropy_scale=0")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objectives_defaults_are_the_bound(name):
    losses = []
    for words in ("elbo", name):
        module = with_codes_drawn(words)
        torch.manual_seed(1)
        losses.append(module(images(4), None, 0).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_evaluation_does_not_depend_on_the_objective():
    batch, labels, found = images(10), torch.zeros(10, dtype=torch.int64), []
    for words in (
        "elbo",
        "elbo reduction=sum kl_weight=0 free_bits=100",
        "probabilistic entropy_scale=0 sum_over_latents=no stop_gradient_for_prior=yes",
    ):
        module = with_codes_drawn(words)
        found.append(evaluate(module.model, batch, labels, iw_samples=2))
        assert found[-1].pop("usage").sum() == 40
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("probabilistic-")])
def test_every_probabilistic_experiment_trains_and_is_evaluated(name):
    config = configure({"preset": name}, Fresh(), experiment.SLOTS)
    chosen = {slot: getattr(config, slot) for slot in SLOTS}
    module = training(str(config.objective), shape=(1, 28, 28), total_steps=10_000, **chosen)
    batch = torch.randint(2, (2, 1, 28, 28), dtype=torch.uint8) * 255
    for step in (0, 5_000):  # before and after the flows start to train
        out = module(batch, None, step)
        out.loss.backward()
        assert out.loss.isfinite()
    found = evaluate(module.model, batch, torch.zeros(2), iw_samples=2)
    terms = found["reconstruction_nats"] + found["prior_nats"] - found["entropy"]
    assert found["neg_elbo"] == pytest.approx(terms, rel=1e-5)


class Perceptual(ElboObjective):
    """The -ELBO plus the squared error of features that a net of its own computes."""

    def __init__(
        self,
        *,
        total_steps: int,
        options: ElboOptions = ElboOptions(),
        width: Annotated[Count, "channels of its net"] = 4,
    ):
        super().__init__(total_steps=total_steps, options=options)
        self.net = nn.Conv2d(1, width, 3)

    def forward(self, elbo, model, step) -> Tensor:
        error = self.net(model.likelihood.center(elbo.params)) - self.net(elbo.x)
        return super().forward(elbo, model, step) + error.square().mean()

    def parameter_groups(self, model, weight_decay):
        own = {"params": list(self.net.parameters()), "lr_scale": 2.0}
        return [*super().parameter_groups(model, weight_decay), own]


def test_an_objective_with_a_net_of_its_own_trains_is_saved_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(OBJECTIVES, "perceptual", Perceptual)

    def train(*words: str, small: bool = True) -> dict[str, Any]:
        assert run_train(*words, small=small) == 0
        return checkpoint.read(f"logs/{words[-1]}" if small else words[1])

    chosen = ("--objective", "perceptual", "reduction=sum", "width=3", "--epochs")
    straight = train(*chosen, "2", "--name", "straight")
    half = train(*chosen, "1", "--name", "run")
    resumed = train("--resume", "logs/run", "--epochs", "2", small=False)

    assert set(resumed["objective"]) == {"net.weight", "net.bias"}
    assert resumed["objective"]["net.weight"].shape == (3, 1, 3, 3)
    for part in ("objective", "model"):
        for name, value in straight[part].items():
            assert torch.equal(value, resumed[part][name]), name
    assert all(not torch.equal(value, half["objective"][name]) for name, value in resumed["objective"].items())
    groups = resumed["optimizer"]["param_groups"]
    assert [group["lr_scale"] for group in groups] == [1.0] * (len(groups) - 1) + [2.0]
    assert groups[-1]["lr"] == 2 * groups[0]["lr"]
    assert len(groups[-1]["params"]) == 2
    assert resumed["config"]["objective"]["options"]["width"] == 3

    monkeypatch.delitem(OBJECTIVES, "perceptual")  # a model loads without the objective that trained it
    assert load("logs/run").encode(images(2, (1, 16, 16))).shape == (2, 4, 4)
