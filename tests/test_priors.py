"""Priors over codes: causality, probabilities that sum to one, and samplers that agree."""

import inspect
import itertools
import math
import re
from typing import Any

import pytest
import torch

from vqvae.contracts import Latent
from vqvae.errors import OptionError
from vqvae.priors import PRIORS
from vqvae.priors.autoregressive import AutoregressivePrior
from vqvae.priors.base import Sampling, draw
from vqvae.priors.transformer import Transformer, TransformerOptions
from vqvae.registry import Choice, Slot, build

SIZES = {
    "unigram": {},
    "pixelcnn": {"channels": 8, "blocks": 2, "kernel": 5, "head": 8},
    "gated-pixelcnn": {"channels": 6, "layers": 3, "embedding": 4, "kernel": 3, "head": 8},
    "transformer": {"layers": 2, "width": 8, "heads": 2},
}
CAUSAL = ("pixelcnn", "gated-pixelcnn", "transformer")


def make(
    name: str, *, num_codes: int = 5, grid: tuple = (4, 5), num_classes: int = 0, scales: tuple = (), **options
) -> Any:
    """A small prior in float64, whose samples do not depend on rounding."""
    torch.manual_seed(0)
    context = {"num_codes": num_codes, "grid": grid, "num_classes": num_classes, "scales": scales}
    prior = build(Slot("prior", PRIORS), Choice(name, SIZES[name] | options), context)
    for p in prior.parameters():  # weights that start at zero would hide mistakes
        p.data.add_(0.3 * torch.randn_like(p))
    return prior.double().eval()


def dependencies(prior: AutoregressivePrior) -> torch.Tensor:
    """`[L, L]`: whether the logits of position i depend on the code at position j, by the embedding's gradient."""
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


@pytest.mark.parametrize("name", CAUSAL)
def test_no_position_depends_on_itself_or_a_later_one(name):
    assert not torch.triu(dependencies(make(name))).any()


@pytest.mark.parametrize("name", ["gated-pixelcnn", "transformer"])
def test_every_position_depends_on_all_earlier_ones(name):
    deep = {"layers": 8} if name == "gated-pixelcnn" else {}
    seen = dependencies(make(name, **deep))
    assert torch.equal(seen, torch.tril(torch.ones_like(seen), diagonal=-1))


def test_pixelcnn_has_its_documented_blind_spot():
    seen = dependencies(make("pixelcnn", kernel=3, blocks=10, grid=(5, 5))).view(5, 5, 5, 5)
    assert seen[4, 0, 3, 0]
    assert not seen[4, 0, 3, 2]  # in the row above, two columns to the right
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


@pytest.mark.parametrize("name", SIZES)
def test_one_hot_assignments_cost_as_much_as_their_codes(name):
    prior = make(name)
    latent = Latent.of_codes(torch.randint(5, (3, 4, 5)))
    one_hot = torch.nn.functional.one_hot(latent.codes, 5).movedim(-1, 1).double()
    relaxed = prior.log_prob(latent._replace(assignments=one_hot))
    assert torch.allclose(relaxed, prior.log_prob(latent).double(), rtol=1e-4)


def test_uniform_and_unigram_have_their_distributions():
    codes = torch.randint(5, (7, 4, 5))
    uniform = PRIORS["uniform"](num_codes=5, grid=(4, 5))
    assert uniform.log_prob(Latent.of_codes(codes)).tolist() == pytest.approx([-20 * math.log(5)] * 7)
    unigram = make("unigram")
    expected = torch.distributions.Categorical(logits=unigram.table[0]).log_prob(codes).flatten(1).sum(1)
    assert torch.allclose(unigram.log_prob(Latent.of_codes(codes)).double(), expected, rtol=1e-5)


def test_uniform_takes_the_sampling_options_of_other_priors_over_codes():
    uniform, given, seen = PRIORS["uniform"](num_codes=5, grid=(4, 5)), torch.full((6, 4, 5), 3), []
    codes = uniform.sample(
        6, temperature=0.5, top_k=2, labels=None, given=(given, 3), progress=lambda *a: seen.append(a)
    )
    assert (codes[:, :3] == 3).all()
    assert codes[:, 3:].unique().tolist() == [0, 1, 2, 3, 4]
    assert seen[-1] == (20, 20)
    of_uniform, of_others = (set(inspect.signature(p.sample).parameters) for p in (uniform, AutoregressivePrior))
    assert of_uniform == of_others - {"self"}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 2}, {"labels": torch.tensor([0, 1, 1, 0, 1, 0])}, {"given": 2}]
)
def test_the_fast_sampler_draws_the_codes_of_the_naive_one(name, options):
    options = dict(options)
    prior = make(name, num_classes=2 if "labels" in options else 0)
    given = torch.randint(5, (6, 4, 5))
    if "given" in options:
        options["given"] = (given, options["given"])
    # in float64 the two ways round within 1e-15, far closer than uniform numbers come to a boundary between codes
    naive, fast = (
        prior.sample(6, generator=torch.Generator().manual_seed(3), naive=naive, **options) for naive in (True, False)
    )
    assert torch.equal(naive, fast)
    if "given" in options:
        assert torch.equal(fast[:, :2], given[:, :2])
        assert not torch.equal(fast[:, 2:], given[:, 2:])


@pytest.mark.parametrize("name", SIZES)
def test_a_steppers_logits_equal_those_of_the_full_forward_pass(name):
    prior = make(name, num_classes=2)
    codes, labels = torch.randint(5, (3, 4, 5)), torch.tensor([0, 1, 1])
    whole = prior.logits(codes, labels)
    stepper = prior.stepper(3, labels)
    with torch.no_grad():
        for r, c in itertools.product(range(4), range(5)):
            assert torch.allclose(stepper.logits(r, c), whole[:, :, r, c], atol=1e-10)
            stepper.append(r, c, codes[:, r, c])


def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(200_000, 4)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2)):
        counts = torch.bincount(draw(logits, uniform, Sampling(temperature, top_k)), minlength=4) / 200_000
        expected = (logits[0] / temperature).softmax(0)
        if top_k:
            expected = torch.tensor([0.0, expected[1], expected[2], 0.0])
            expected /= expected.sum()
        assert torch.allclose(counts, expected, atol=0.005)
    ends = draw(logits[:2], torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0, 3]


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-9])  # logits divided by the second are infinite
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_a_draw_at_temperature_0_is_the_likeliest_code(temperature, top_k):
    logits = torch.randn(50, 6)
    assert torch.equal(draw(logits, torch.rand(50), Sampling(temperature, top_k)), logits.argmax(1))


@pytest.mark.parametrize("name", SIZES)
def test_samples_at_temperature_0_are_the_likeliest_code_after_code(name):
    prior, labels = make(name, num_classes=2), torch.tensor([0, 1])
    codes = prior.sample(2, temperature=0, labels=labels)
    assert torch.equal(codes, prior.sample(2, temperature=0, labels=labels, naive=True))
    with torch.no_grad():
        assert torch.equal(codes, prior.logits(codes, labels).argmax(1))


def test_samples_of_continuous_priors_at_temperature_0_are_the_likeliest_vector():
    context = {"latent_dim": 3, "grid": (1, 1)}
    assert (PRIORS["normal"](**context).sample(4, temperature=0) == 0).all()
    flow = PRIORS["made-flow"](**context, hidden=8)
    z = flow.sample(4, temperature=0)
    eps, _ = flow.flow(z.flatten(1))
    assert torch.allclose(eps, torch.zeros(4, 3), atol=1e-5)


GIVEN = torch.zeros(2, 4, 5, dtype=torch.int64)
OUT_OF_RANGE = [
    ({"temperature": -1}, "temperature=-1: must be at least 0"),
    ({"temperature": math.nan}, "temperature=nan: must be a finite number, at least 0"),
    ({"temperature": math.inf}, "temperature=inf: must be a finite number, at least 0"),
    ({"temperature": "hot"}, "temperature=hot: must be a number"),
    ({"top_k": -1}, "top_k=-1: must be from 0 to 5"),
    ({"top_k": 6}, "top_k=6: must be from 0 to 5"),
    ({"top_k": 1.5}, "top_k=1.5: must be a whole number"),
    ({"n": -2}, "n=-2: must be at least 0"),
    ({"given": (GIVEN + 5, 2)}, "codes must be from 0 to 4, not 5 to 5"),
    ({"given": (GIVEN[:1], 2)}, "given codes must be those of 2 images, not of 1"),
    ({"given": (GIVEN[:, :3], 2)}, r"codes must have shape [B, 4, 5], not [2, 3, 5]"),
    ({"given": (GIVEN, 5)}, "rows=5: must be from 0 to 4"),
]
LABELS_OUT_OF_RANGE = [
    (torch.tensor([0, 3]), "labels must be from 0 to 2, not 0 to 3"),
    (torch.tensor([-1, 0]), "labels must be from 0 to 2, not -1 to 0"),
    (torch.tensor([0]), "labels must have shape [2], not [1]"),
    (torch.tensor([0.0, 1.0]), "labels must be a tensor of integers, not torch.float32"),
    ([0, 1], "labels must be a tensor of integers, not list"),
    (None, "this prior is conditional and needs labels from 0 to 2"),
]


@pytest.mark.parametrize("name", ["uniform", *SIZES])
@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE)
def test_options_of_samples_out_of_range_are_refused(name, options, message):
    prior = PRIORS["uniform"](num_codes=5, grid=(4, 5)) if name == "uniform" else make(name)
    with pytest.raises(ValueError, match=re.escape(message)):
        prior.sample(**({"n": 2} | options))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("labels", "message"), LABELS_OUT_OF_RANGE)
def test_labels_out_of_range_are_refused(name, labels, message):
    prior = make(name, num_classes=3)
    for use in (lambda: prior.sample(2, labels=labels), lambda: prior.log_prob(Latent.of_codes(GIVEN), labels)):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()


@pytest.mark.parametrize("name", ["uniform", *SIZES])
def test_a_prior_without_classes_takes_no_labels(name):
    prior = PRIORS["uniform"](num_codes=5, grid=(4, 5)) if name == "uniform" else make(name)
    with pytest.raises(ValueError, match="not conditional and takes no labels"):
        prior.sample(2, labels=torch.tensor([0, 1]))


def test_labels_and_given_codes_may_have_any_integer_type():
    prior = make("pixelcnn", num_classes=2)
    labels, given = torch.tensor([0, 1]), torch.randint(5, (2, 4, 5))
    drawn = [
        prior.sample(2, labels=labels.to(kind), given=(given.to(kind), 2), generator=torch.Generator().manual_seed(0))
        for kind in (torch.int64, torch.uint8, torch.int32, torch.uint16)
    ]
    assert all(torch.equal(codes, drawn[0]) for codes in drawn)


@pytest.mark.parametrize("name", SIZES)
def test_training_lowers_the_cost_of_the_codes(name):
    prior = make(name).float().train()
    codes = torch.randint(2, (16, 4, 5))  # only two of the five codes
    optimizer = torch.optim.Adam(prior.parameters(), 0.02)
    costs = []
    for _ in range(12):
        loss = -prior.log_prob(Latent.of_codes(codes)).mean()
        costs.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert costs[-1] < costs[0]


def test_sampling_restores_the_mode_and_reports_progress():
    prior, seen = make("pixelcnn").train(), []
    prior.sample(2, progress=lambda done, total: seen.append((done, total)))
    assert prior.training
    assert seen == [(i + 1, 20) for i in range(20)]


def test_a_conditional_prior_requires_labels():
    prior = make("pixelcnn", num_classes=2)
    with pytest.raises(ValueError, match="needs labels from 0 to 1"):
        prior.sample(1)
    with pytest.raises(ValueError, match="needs labels from 0 to 1"):
        prior.log_prob(Latent.of_codes(torch.zeros(1, 4, 5, dtype=torch.int64)))


def test_latents_of_the_wrong_kind_are_refused():
    nothing = Latent.of_codes(torch.zeros(1, 4, 5, dtype=torch.int64))._replace(codes=None)
    with pytest.raises(ValueError, match="codes are needed"):
        make("unigram").log_prob(nothing)
    with pytest.raises(ValueError, match="z is needed"):
        PRIORS["normal"](latent_dim=2, grid=(1, 1)).log_prob(nothing)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pixelcnn", {"blocks": 0}, "blocks=0: must be at least 1"),
        ("pixelcnn", {"kernel": 4}, "kernel=4: must be odd"),
        ("pixelcnn", {"kernel": 1}, "kernel=1: must be at least 3"),
        ("gated-pixelcnn", {"layers": 0}, "layers=0: must be at least 1"),
        ("gated-pixelcnn", {"dropout": 1.0}, "dropout=1.0: must be from 0 to below 1"),
        ("transformer", {"heads": 0}, "heads=0: must be at least 1"),
        ("transformer", {"width": 10, "heads": 4}, "width=10: must be a multiple of heads=4"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(OptionError, match=f"{name} {message}"):
        make(name, **options)


def test_options_are_checked_in_python_too():
    context = {"num_codes": 5, "grid": (4, 5), "num_classes": 0}
    with pytest.raises(OptionError, match="blocks=0: must be at least 1"):
        PRIORS["pixelcnn"](**context, blocks=0)
    with pytest.raises(OptionError, match="width=10: must be a multiple of heads=4"):
        Transformer(**context, scales=(), options=TransformerOptions(width=10))
