"""Priors over codes: causality, normalisation by enumeration, and samplers that agree."""

import itertools
import math

import pytest
import torch

from vqvae.errors import UserError
from vqvae.latent import Latent
from vqvae.priors import PRIORS
from vqvae.priors.codes import CodePrior, draw

SIZES = {
    "unigram": {},
    "pixelcnn": {"channels": 8, "blocks": 2, "kernel": 5, "head": 8},
    "gated-pixelcnn": {"channels": 6, "layers": 3, "embedding": 4, "kernel": 3, "head": 8},
    "transformer": {"layers": 2, "width": 8, "heads": 2},
}
AUTOREGRESSIVE = ("pixelcnn", "gated-pixelcnn", "transformer")


def make(name: str, *, num_codes: int = 5, grid: tuple = (4, 5), num_classes: int = 0, **options) -> CodePrior:
    torch.manual_seed(0)
    prior = PRIORS[name](num_codes=num_codes, grid=grid, num_classes=num_classes, **(SIZES[name] | options))
    for p in prior.parameters():  # far from the symmetric start, so that nothing is zero by accident
        p.data.add_(0.3 * torch.randn_like(p))
    return prior.double().eval()


def influence(prior: CodePrior) -> torch.Tensor:
    """`[L, L]`: whether logits of position i change with the code at position j, by the gradient to its embedding."""
    h, w = prior.grid
    codes = torch.randint(prior.num_codes, (1, h, w))
    seen = {}
    hook = prior.embedding.register_forward_hook(lambda module, inputs, out: seen.update(x=out))
    logits = prior.logits(codes)
    hook.remove()
    rows = []
    for r, c in itertools.product(range(h), range(w)):
        (gradient,) = torch.autograd.grad(logits[0, :, r, c].square().sum(), seen["x"], retain_graph=True)
        rows.append(gradient.reshape(h * w, -1).abs().sum(1) > 1e-12)
    return torch.stack(rows)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_no_position_sees_itself_or_the_future(name):
    seen = influence(make(name))
    assert not torch.triu(seen).any()


@pytest.mark.parametrize("name", ["gated-pixelcnn", "transformer"])
def test_every_position_sees_all_that_came_before(name):
    deep = {"layers": 8} if name == "gated-pixelcnn" else {}
    seen = influence(make(name, **deep))
    assert torch.equal(seen, torch.tril(torch.ones_like(seen), diagonal=-1))


def test_plain_pixelcnn_has_the_blind_spot_it_is_said_to_have():
    seen = influence(make("pixelcnn", kernel=3, blocks=10, grid=(5, 5))).view(5, 5, 5, 5)
    assert seen[4, 0, 3, 0]
    assert not seen[4, 0, 3, 2]  # in the row above, but out of reach for ever
    assert seen[4, 0, 0, 4]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("num_classes", [0, 2])
def test_probabilities_of_all_codes_sum_to_one(name, num_classes):
    prior = make(name, num_codes=3, grid=(2, 2), num_classes=num_classes)
    codes = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    for label in range(max(num_classes, 1)):
        labels = torch.full((len(codes),), label)
        total = prior.log_prob(Latent.of_codes(codes), labels).double().exp().sum().item()
        assert total == pytest.approx(1, abs=1e-5)


def test_uniform_and_unigram_are_what_they_say():
    codes = torch.randint(5, (7, 4, 5))
    uniform = PRIORS["uniform"](num_codes=5, grid=(4, 5))
    assert uniform.log_prob(Latent.of_codes(codes)).tolist() == pytest.approx([-20 * math.log(5)] * 7)
    unigram = make("unigram")
    expected = torch.distributions.Categorical(logits=unigram.table[0]).log_prob(codes).flatten(1).sum(1)
    assert torch.allclose(unigram.log_prob(Latent.of_codes(codes)).double(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 2}, {"labels": torch.tensor([0, 1, 1, 0, 1, 0])}, {"given": 2}]
)
def test_the_fast_sampler_draws_the_naive_ones_codes(name, options):
    options = dict(options)
    prior = make(name, num_classes=2 if "labels" in options else 0)
    given = torch.randint(5, (6, 4, 5))
    if "given" in options:
        options["given"] = (given, options["given"])
    drawn = [
        prior.sample(6, generator=torch.Generator().manual_seed(3), naive=naive, **options) for naive in (True, False)
    ]
    assert torch.equal(*drawn)
    if "given" in options:
        assert torch.equal(drawn[0][:, :2], given[:, :2])
        assert not torch.equal(drawn[0][:, 2:], given[:, 2:])


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_the_steppers_logits_are_the_full_forward_passs(name):
    prior = make(name, num_classes=2)
    codes, labels = torch.randint(5, (3, 4, 5)), torch.tensor([0, 1, 1])
    whole = prior.logits(codes, labels)
    stepper = prior.stepper(3, labels)
    with torch.no_grad():
        for r, c in itertools.product(range(4), range(5)):
            assert torch.allclose(stepper.logits(r, c), whole[:, :, r, c], atol=1e-10)
            stepper.see(r, c, codes[:, r, c])


def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(200_000, 4)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2)):
        counts = torch.bincount(draw(logits, uniform, temperature, top_k), minlength=4) / 200_000
        expected = (logits[0] / temperature).softmax(0)
        if top_k:
            expected = torch.tensor([0.0, expected[1], expected[2], 0.0])
            expected /= expected.sum()
        assert torch.allclose(counts, expected, atol=0.005)
    edge = draw(logits[:2], torch.tensor([0.0, 1.0]), 1.0, 0)
    assert edge.tolist() == [0, 3]


@pytest.mark.parametrize("name", SIZES)
def test_training_lowers_the_cost_of_the_codes(name):
    prior = make(name).float().train()
    codes = torch.randint(2, (16, 4, 5))  # of five codes only two occur
    optimiser = torch.optim.Adam(prior.parameters(), 0.02)
    costs = []
    for _ in range(12):
        loss = -prior.log_prob(Latent.of_codes(codes)).mean()
        costs.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert costs[-1] < costs[0]


def test_sampling_restores_the_mode_and_reports_progress():
    prior, seen = make("pixelcnn").train(), []
    prior.sample(2, progress=lambda done, total: seen.append((done, total)))
    assert prior.training
    assert seen == [(i + 1, 20) for i in range(20)]


def test_a_conditional_prior_asks_for_labels():
    with pytest.raises(ValueError, match="labels from 0 to 1 are needed"):
        make("pixelcnn", num_classes=2).sample(1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pixelcnn", {"blocks": 0}),
        ("pixelcnn", {"kernel": 4}),
        ("gated-pixelcnn", {"layers": 0}),
        ("gated-pixelcnn", {"dropout": 1.0}),
        ("transformer", {"heads": 0}),
        ("transformer", {"width": 10, "heads": 4}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        make(name, **options)
