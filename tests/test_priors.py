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
from vqvae.priors import PRIORS, masked
from vqvae.priors.autoregressive import AutoregressivePrior
from vqvae.priors.base import draw
from vqvae.priors.masked import Masked, masks, schedule
from vqvae.priors.transformer import Transformer, TransformerOptions, sources
from vqvae.registry import Choice, Slot, build, signature
from vqvae.sampling import Sampling

SIZES = {
    "unigram": {},
    "pixelcnn": {"channels": 8, "blocks": 2, "kernel": 5, "head": 8},
    "gated-pixelcnn": {"channels": 6, "layers": 3, "embedding": 4, "kernel": 3, "head": 8},
    "transformer": {"layers": 2, "width": 8, "heads": 2},
}
MASKED = {"layers": 2, "width": 8, "heads": 2}
SCALES = ((1, 1), (2, 2), (3, 4))
CAUSAL = ("pixelcnn", "gated-pixelcnn", "transformer")


def build_prior(name: str, context: dict, **options) -> Any:
    return build(Slot("prior", PRIORS), Choice(name, SIZES.get(name, MASKED) | options), context)


def make(
    name: str, *, num_codes: int = 5, grid: tuple = (4, 5), num_classes: int = 0, scales: tuple = (), **options
) -> Any:
    """A small prior in float64, whose samples do not depend on rounding."""
    torch.manual_seed(0)
    context = {"num_codes": num_codes, "grid": grid, "num_classes": num_classes, "scales": scales}
    prior = build_prior(name, context, **options)
    for p in prior.parameters():  # weights that start at zero would hide mistakes
        p.data.add_(0.3 * torch.randn_like(p))
    return prior.double().eval()


def dependencies(prior: AutoregressivePrior) -> torch.Tensor:
    """`[L, L]`: whether the logits of position i depend on the code at position j (the embedding has a gradient)."""
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


@pytest.mark.parametrize("name", ["masked", *SIZES])
@pytest.mark.parametrize("num_classes", [0, 2])
def test_an_untrained_prior_is_nearly_uniform(name, num_classes):
    prior = build_prior(name, {"num_codes": 64, "grid": (4, 5), "num_classes": num_classes, "scales": ()})
    nats = -prior.eval().log_prob(Latent.of_codes(torch.randint(64, (50, 4, 5))), torch.arange(50) % 2)
    assert nats.mean().item() == pytest.approx(20 * math.log(64), rel=0.05)


@pytest.mark.parametrize("name", [*CAUSAL, "masked", "made-flow"])
def test_every_size_of_a_net_is_an_option_that_changes_its_weights(name):
    def shapes(**changed: int) -> list:
        if name == "made-flow":
            prior = PRIORS[name](latent_dim=3, grid=(1, 1), **{"hidden": 6, "layers": 2, "flows": 1} | changed)
        else:
            context = {"num_codes": 5, "grid": (4, 5), "num_classes": 2, "scales": ()}
            prior = build_prior(name, context, **changed)
        return [(key, value.shape) for key, value in prior.state_dict().items()]

    options = {key: option.default for key, option in signature(PRIORS[name]).options.items()}
    sizes = {key for key, value in options.items() if type(value) is int} - {"heads", "draws"}
    assert len(sizes) >= 2
    for size in sizes:
        low, high = (3, 5) if size == "kernel" else (4, 6)
        assert shapes(**{size: low}) != shapes(**{size: high})


@pytest.mark.parametrize("name", [*CAUSAL, "masked"])
def test_dropout_draws_in_training_only(name):
    codes, known = torch.randint(5, (3, 4, 5)), torch.arange(60).view(3, 20) % 2 == 0
    for dropout, mode in itertools.product((0.0, 0.5), (True, False)):
        prior = make(name, dropout=dropout).train(mode)
        first, second = (prior.logits(codes, *([known] if name == "masked" else [])) for _ in range(2))
        assert torch.equal(first, second) is not (mode and dropout > 0)


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
        6, temperature=0.5, top_k=2, top_p=0.9, labels=None, given=(given, 3), progress=lambda *a: seen.append(a)
    )
    assert (codes[:, :3] == 3).all()
    assert codes[:, 3:].unique().tolist() == [0, 1, 2, 3, 4]
    assert seen[-1] == (20, 20)
    of_uniform, of_others = (set(inspect.signature(p.sample).parameters) for p in (uniform, AutoregressivePrior))
    assert of_uniform == of_others - {"self"}


def sample(prior, n: int, *, naive: bool, **options):
    """Samples of a prior's stepper, or those of a whole forward pass for each position."""
    prior.naive = naive
    return prior.sample(n, **options)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 2},
        {"top_p": 0.6},
        {"labels": torch.tensor([0, 1, 1, 0, 1, 0])},
        {"labels": torch.tensor([0, 1, 1, 0, 1, 0]), "guidance": 2.0},
        {"given": 2},
    ],
)
def test_the_fast_sampler_draws_the_codes_of_the_naive_one(name, options):
    options = dict(options)
    dropped = {"label_drop": 0.1} if "guidance" in options else {}
    prior = make(name, num_classes=2 if "labels" in options else 0, **dropped)
    given = torch.randint(5, (6, 4, 5))
    if "given" in options:
        options["given"] = (given, options["given"])
    # in float64 the two ways round within 1e-15, far closer than uniform numbers come to a boundary between codes
    naive, fast = (
        sample(prior, 6, generator=torch.Generator().manual_seed(3), naive=naive, **options) for naive in (True, False)
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


def share_of_codes(logits: list[float], **options) -> list[float]:
    """How often each code is drawn at evenly spread uniform numbers."""
    uniform = (torch.arange(1000) + 0.5) / 1000
    codes = draw(torch.tensor([logits]).expand(1000, -1), uniform, Sampling(**options))
    return (torch.bincount(codes, minlength=len(logits)) / 1000).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 0.75}, [0, 0.625, 0.375, 0]),  # 0.5 is less than 0.75, 0.5 + 0.3 is not
        ({"top_p": 0.45}, [0, 1, 0, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.85}, [0.15, 0.5, 0.3, 0.05]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # of the two that top_k leaves, the first has 0.625
        ({"temperature": 0.5, "top_p": 0.6}, [0, 1, 0, 0]),  # which the temperature makes 0.68
    ],
)
def test_top_p_keeps_the_fewest_likeliest_codes_of_that_probability(options, expected):
    p = torch.tensor([0.15, 0.5, 0.3, 0.05])
    if options == {"top_p": 0.85}:
        expected = (torch.tensor([0.15, 0.5, 0.3, 0.0]) / 0.95).tolist()
    assert share_of_codes(p.log().tolist(), **options) == pytest.approx(expected, abs=0.0011)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.4}])
def test_equally_likely_codes_are_no_more_than_asked_for(options):
    assert share_of_codes([0.0] * 5, **options) == pytest.approx([0.5, 0.5, 0, 0, 0], abs=0.0011)
    assert share_of_codes([0.0, 1.0, 1.0, 1.0, 0.0], top_k=1) == [0, 1, 0, 0, 0]
    assert draw(torch.zeros(1, 5), torch.tensor([0.99]), Sampling(**options)).item() == 1  # of one image


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-9])  # logits divided by the second are infinite
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_a_draw_at_temperature_0_is_the_likeliest_code(temperature, top_k):
    logits = torch.randn(50, 6)
    assert torch.equal(draw(logits, torch.rand(50), Sampling(temperature, top_k)), logits.argmax(1))


@pytest.mark.parametrize("name", SIZES)
def test_samples_at_temperature_0_are_the_likeliest_code_after_code(name):
    prior, labels = make(name, num_classes=2), torch.tensor([0, 1])
    codes = prior.sample(2, temperature=0, labels=labels)
    assert torch.equal(codes, sample(prior, 2, temperature=0, labels=labels, naive=True))
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
    ({"temperature": -1}, "temperature=-1: must be from 0 to below 1000"),
    ({"temperature": math.nan}, "temperature=nan: must be a finite number, from 0 to below 1000"),
    ({"temperature": math.inf}, "temperature=inf: must be a finite number, from 0 to below 1000"),
    ({"temperature": "hot"}, "temperature=hot: must be a number"),
    ({"top_k": -1}, "top_k=-1: must be from 0 to 5"),
    ({"top_k": 6}, "top_k=6: must be from 0 to 5"),
    ({"top_k": 1.5}, "top_k=1.5: must be a whole number"),
    ({"top_p": 0}, "top_p=0: must be above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
    ({"guidance": -1}, "guidance=-1: must be from 0 to below 1000"),
    ({"guidance": 2}, "guidance=2: needs a prior of classes that was trained with label_drop above 0; leave it out"),
    ({"n": -2}, "n=-2: must be at least 0"),
    ({"given": (GIVEN + 5, 2)}, "codes must be from 0 to 4, not 5 to 5"),
    ({"given": (GIVEN[:1], 2)}, "given codes must be those of 2 images, not of 1"),
    ({"given": (GIVEN[:, :3], 2)}, r"codes must have shape [B, 4, 5], not [2, 3, 5]"),
    ({"given": (GIVEN, 5)}, "rows=5: must be from 0 to 4"),
    ({"given": GIVEN}, "given must be codes and the number of their rows to keep, not torch.int64"),
]
LABELS_OUT_OF_RANGE = [
    (torch.tensor([0, 3]), "labels must be from 0 to 2, not 0 to 3"),
    (torch.tensor([-1, 0]), "labels must be from 0 to 2, not -1 to 0"),
    (torch.tensor([0]), "labels must have shape [2], not [1]"),
    (torch.tensor([0.0, 1.0]), "labels must be a tensor of integers, not torch.float32"),
    ([0, 1], "labels must be a tensor of integers, not list"),
    (None, "this prior is conditional and needs labels from 0 to 2"),
]


@pytest.mark.parametrize("name", ["uniform", "masked", *SIZES])
@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE)
def test_options_of_samples_out_of_range_are_refused(name, options, message):
    prior = PRIORS["uniform"](num_codes=5, grid=(4, 5)) if name == "uniform" else make(name)
    with pytest.raises(ValueError, match=re.escape(message)):
        prior.sample(**({"n": 2} | options))


@pytest.mark.parametrize("name", ["masked", *SIZES])
@pytest.mark.parametrize(("labels", "message"), LABELS_OUT_OF_RANGE)
def test_labels_out_of_range_are_refused(name, labels, message):
    prior = make(name, num_classes=3)
    for use in (lambda: prior.sample(2, labels=labels), lambda: prior.log_prob(Latent.of_codes(GIVEN), labels)):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()


@pytest.mark.parametrize("name", ["uniform", "masked", *SIZES])
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


@pytest.mark.parametrize("name", ["masked", *SIZES])
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


@pytest.mark.parametrize("name", ["pixelcnn", "masked"])
def test_an_interrupted_draw_leaves_every_mode_as_it_was(name):
    prior = make(name).train()
    first = next(iter(prior.children())).eval()

    def stop(done: int, total: int) -> None:
        assert not prior.training
        assert not torch.is_grad_enabled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prior.sample(2, progress=stop)
    assert prior.training
    assert not first.training


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
        ("transformer", {"label_drop": 1.0}, "label_drop=1.0: must be from 0 to below 1"),
        ("masked", {"draws": 0}, "draws=0: must be from 1 to 10000"),
        ("masked", {"width": 10, "heads": 4}, "width=10: must be a multiple of heads=4"),
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


# guidance


@pytest.mark.parametrize("name", ["masked", *SIZES])
def test_only_priors_that_drop_labels_have_a_class_for_no_label(name):
    with_it, without = make(name, num_classes=2, label_drop=0.1), make(name, num_classes=2, label_drop=0.0)
    sizes = [sum(p.numel() for p in prior.parameters()) for prior in (with_it, without)]
    assert sizes[0] > sizes[1]
    unconditional = make(name, label_drop=0.1)
    assert sum(p.numel() for p in unconditional.parameters()) == sum(p.numel() for p in make(name).parameters())


@pytest.mark.parametrize("name", ["masked", *SIZES])
def test_labels_are_dropped_in_training_only(name):
    prior, labels = make(name, num_classes=2, label_drop=0.25), torch.arange(20_000) % 2
    assert torch.equal(prior.without_some(labels), labels)
    seen = prior.train().without_some(labels)
    dropped = seen == 2
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(seen[~dropped], labels[~dropped])
    untouched = make(name, num_classes=2, label_drop=0.0).train()
    state = torch.get_rng_state()
    assert untouched.without_some(labels) is labels
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["masked", *SIZES])
def test_guidance_of_0_ignores_the_label_and_of_1_changes_nothing(name):
    prior, labels = make(name, num_classes=2, label_drop=0.1), torch.tensor([0, 1] * 4)

    def sample(**options) -> torch.Tensor:
        return prior.sample(8, generator=torch.Generator().manual_seed(0), **options)

    assert torch.equal(sample(labels=labels, guidance=0), sample(labels=1 - labels, guidance=0))
    assert torch.equal(sample(labels=labels, guidance=1), sample(labels=labels))
    assert not torch.equal(sample(labels=labels, guidance=0), sample(labels=labels))


def test_guidance_scales_the_difference_that_the_label_makes():
    prior = make("unigram", num_classes=2, label_drop=0.1, num_codes=3, grid=(40, 50))
    codes = prior.sample(10, labels=torch.ones(10, dtype=torch.int64), guidance=2.5)
    unconditional, conditional = prior.table[2], prior.table[1]
    expected = (unconditional + 2.5 * (conditional - unconditional)).softmax(0)
    assert torch.bincount(codes.flatten(), minlength=3) / 20_000 == pytest.approx(expected.tolist(), abs=0.02)


# scale after scale


def test_multi_scale_codes_depend_on_all_coarser_ones_and_on_no_others():
    seen = dependencies(make("transformer", grid=(17, 1), scales=SCALES))
    scale = torch.tensor([0] * 1 + [1] * 4 + [2] * 12)
    assert torch.equal(seen, scale[:, None] > scale)


def test_the_input_of_a_position_is_the_code_that_covers_it_one_scale_before():
    assert sources(SCALES).tolist() == [0, 1, 1, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3, 4, 4, 5, 5]


def test_probabilities_of_all_multi_scale_codes_sum_to_one():
    prior = make("transformer", num_codes=3, grid=(5, 1), scales=((1, 1), (2, 2)))
    codes = torch.tensor(list(itertools.product(range(3), repeat=5))).view(-1, 5, 1)
    assert prior.log_prob(Latent.of_codes(codes)).double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_multi_scale_codes_are_drawn_in_one_pass_per_scale(monkeypatch):
    prior = make("transformer", grid=(17, 1), scales=SCALES)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    naive = sample(prior, 6, generator=generators[0], naive=True)
    passes = []
    monkeypatch.setattr(type(prior), "output", lambda self, x: [passes.append(x.shape[1]), output(self, x)][1])
    assert torch.equal(sample(prior, 6, generator=generators[1], naive=False), naive)
    assert passes == [1, 4, 12]


output = Transformer.output


# the masked prior, against all orders and all masks of a small grid


@pytest.fixture(scope="module")
def small() -> tuple[Masked, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A masked prior over a 2x2 grid of 3 codes, all 81 codes, log p of its chain, and the chain's bound."""
    prior = make("masked", num_codes=3, grid=(2, 2))
    codes = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    by_order = []
    with torch.no_grad():
        for order in itertools.permutations(range(4)):
            known, log_p = torch.zeros(81, 4, dtype=torch.bool), torch.zeros(81, dtype=torch.float64)
            for i in order:
                given = prior.logits(codes, known).log_softmax(-1)
                log_p += given[torch.arange(81), i, codes.flatten(1)[:, i]]
                known[:, i] = True
            by_order.append(log_p)
    orders = torch.stack(by_order)  # [24, 81]
    return prior, codes, orders.logsumexp(0) - math.log(24), orders.mean(0)


def test_the_chain_is_a_distribution_and_its_bound_lies_below(small):
    _, _, chain, bound = small
    assert chain.exp().sum().item() == pytest.approx(1, abs=1e-9)
    assert (bound <= chain + 1e-12).all()
    assert (bound < chain - 1e-3).any()


def test_the_mean_over_all_masks_is_the_bound_over_all_orders(small):
    prior, codes, _, bound = small
    total = torch.zeros(81)
    for size in range(1, 5):
        sets = list(itertools.combinations(range(4), size))
        for positions in sets:
            masked = torch.zeros(81, 4, dtype=torch.bool)
            masked[:, list(positions)] = True
            with torch.no_grad():
                total = total + prior.log_prob_of(codes, masked) / len(sets) / 4
    assert torch.allclose(total.double(), bound, atol=1e-5)


@pytest.mark.parametrize("draws", [1, 3])
def test_estimates_of_the_bound_have_it_as_their_mean(small, draws):
    prior, codes, _, bound = small
    many = codes[:3].repeat_interleave(3_000, dim=0)
    sets = masks(len(many), 4, draws, many.device)
    with torch.no_grad():
        found = torch.stack([prior.log_prob_of(many, masked) for masked in sets]).mean(0).view(3, -1).double()
    error = found.std(1) / found.shape[1] ** 0.5
    assert ((found.mean(1) - bound[:3]).abs() < 4.5 * error).all()


def test_masks_are_of_all_sizes_equally_often_and_of_all_positions():
    sets = torch.stack(masks(6_000, 6, 3, torch.device("cpu")))  # [3, 6000, 6]
    sizes = sets.sum(-1)
    assert (torch.bincount(sizes.flatten(), minlength=7)[1:] - 3_000).abs().max() <= 3
    for i, found in enumerate(sizes):  # each example has a small, a middle and a large set
        assert found.unique().tolist() == [2 * i + 1, 2 * i + 2]
    pairs = (sets[sizes == 2].long() * 2 ** torch.arange(6)).sum(-1)
    counts = torch.bincount(pairs)
    counts = counts[counts > 0]
    assert len(counts) == 15
    assert (counts / counts.sum() - 1 / 15).abs().max() < 0.025  # 5.5 standard errors


def test_evaluation_averages_as_many_draws_as_asked_for_and_repeats_them():
    codes = Latent.of_codes(torch.randint(5, (100, 4, 5)))
    spread = {}
    for draws in (1, 12):
        prior, found = make("masked", draws=draws), []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            with torch.no_grad():
                found.append(prior.log_prob(codes))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        spread[draws] = (found[0] - found[2]).std().item()
    assert spread[12] < 0.5 * spread[1]


def test_unknown_codes_have_no_influence(small):
    prior, _, _, _ = small
    codes, known = torch.randint(3, (6, 2, 2)), torch.tensor([[True, False, True, False]]).expand(6, -1)
    other = torch.where(known.view(6, 2, 2), codes, 2 - codes)
    assert torch.equal(prior.logits(codes, known), prior.logits(other, known))
    assert not torch.equal(prior.logits(codes, known)[:, 1], prior.logits((codes + 1) % 3, known)[:, 1])


def test_a_residual_block_starts_as_the_identity_and_then_adds_to_its_input():
    block, x = masked.Block(8), torch.randn(2, 8, 4, 5)
    assert torch.equal(block(x), x)
    torch.nn.init.constant_(block.branch[-1].bias, 3.0)
    assert torch.allclose(block(x), x + 3)


def test_one_hot_assignments_cost_the_masked_prior_as_much_as_their_codes(small):
    prior, codes, _, _ = small
    one_hot = torch.nn.functional.one_hot(codes, 3).movedim(-1, 1).double()
    (masked,) = masks(81, 4, 1, codes.device)
    assert torch.allclose(prior.log_prob_of(one_hot, masked).float(), prior.log_prob_of(codes, masked), atol=1e-5)


def test_as_many_steps_as_codes_in_random_order_draw_from_the_chain(small):
    prior, _, chain, _ = small
    n = 15_000
    drawn = prior.sample(n, steps=4, choice_temperature=1e9, generator=torch.Generator().manual_seed(0))
    found = torch.bincount((drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81) / n
    expected = chain.exp()
    chi_square = (n * (found - expected).square() / expected).sum().item()
    assert chi_square < 140  # 80 degrees of freedom: exceeded once in 25,000 seeds


def test_one_step_draws_every_code_by_itself(small):
    prior, _, _, _ = small
    with torch.no_grad():
        alone = prior.logits(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool)).softmax(-1)[
            0
        ]
    drawn = prior.sample(5_000, steps=1, generator=torch.Generator().manual_seed(0)).flatten(1)
    found = torch.stack([torch.bincount(column, minlength=3) for column in drawn.unbind(1)]) / 5_000
    assert torch.allclose(found.double(), alone, atol=0.035)


@pytest.mark.parametrize(("length", "steps"), [(49, 8), (4, 4), (4, 100), (1, 1), (256, 12), (10, 9), (0, 8), (7, 1)])
def test_every_step_of_sampling_adds_codes_until_none_is_unknown(length, steps):
    left = [length, *schedule(length, steps)]
    assert all(later < earlier for earlier, later in itertools.pairwise(left))
    assert len(left) == 1 + min(steps, length)
    assert left[-1] == 0


def test_the_number_of_unknown_codes_falls_as_a_cosine():
    assert schedule(256, 8) == [251, 236, 212, 181, 142, 97, 49, 0]


def test_masked_samples_keep_given_rows_and_restore_the_mode():
    prior, given, seen = make("masked").train(), torch.randint(5, (3, 4, 5)), []
    before = given.clone()
    codes = prior.sample(3, given=(given, 2), steps=3, progress=lambda *a: seen.append(a))
    assert torch.equal(codes[:, :2], given[:, :2])
    assert torch.equal(given, before)
    assert prior.training
    assert seen == [(20 - left, 20) for left in schedule(10, 3)]
    assert torch.equal(prior.sample(3, given=(given, 4)), given)
    assert prior.sample(0).shape == (0, 4, 5)


def test_masked_samples_at_temperature_0_and_without_noise_are_the_likeliest():
    prior = make("masked")
    drawn = [prior.sample(2, temperature=0, choice_temperature=0) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0][0], drawn[0][1])


@torch.no_grad()
def test_the_noise_of_the_choice_falls_linearly_with_the_steps():
    prior, steps = make("masked").eval(), 5
    generator = torch.Generator().manual_seed(0)
    found = prior.sample(1, temperature=0, steps=steps, choice_temperature=2.0, generator=generator)

    generator.manual_seed(0)
    codes, known, unknown = torch.zeros(20, dtype=torch.int64), torch.zeros(20, dtype=torch.bool), torch.arange(20)
    for step, left in enumerate(schedule(20, steps), 1):
        best = prior.logits(codes.view(1, 4, 5), known.view(1, 20))[0].log_softmax(-1).max(-1)
        torch.rand(1, len(unknown), generator=generator)  # the numbers of the codes, which temperature 0 ignores
        gumbel = -(-torch.rand(1, len(unknown), generator=generator)[0].log()).log()
        score = best.values[unknown] + 2.0 * (1 - step / steps) * gumbel
        chosen, unknown = unknown[score.argsort(descending=True)].split([len(unknown) - left, left])
        codes[chosen], known[chosen] = best.indices[chosen], True
    assert torch.equal(found.flatten(), codes)


@pytest.mark.parametrize(
    ("limit", "value", "most"), [("AT_ONCE", 1, 1), ("AT_ONCE", 40, 2), ("LOGITS_AT_ONCE", 200, 2)]
)
def test_masked_samples_of_a_few_images_at_a_time_are_those_of_all_at_once(limit, value, most, monkeypatch):
    prior, sizes = make("masked", num_classes=3), []
    prior.blocks.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0]) // 2))  # guidance: twice

    def sample() -> torch.Tensor:
        return prior.sample(
            5, labels=torch.arange(5) % 3, guidance=2.0, steps=4, generator=torch.Generator().manual_seed(1)
        )

    together = sample()
    monkeypatch.setattr(masked, limit, value)
    assert max(sizes) == 5
    sizes.clear()
    assert torch.equal(sample(), together)
    assert max(sizes) == most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"steps": 1.5}, "steps=1.5: must be a whole number"),
        ({"choice_temperature": -1}, "choice_temperature=-1: must be at least 0"),
        ({"choice_temperature": math.nan}, "choice_temperature=nan: must be a finite number, at least 0"),
    ],
)
def test_options_of_few_step_samples_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        make("masked").sample(2, **options)


def test_options_of_samples_may_be_text():
    options = {"temperature": 0.9, "top_k": 3, "steps": 4, "choice_temperature": 2.5}
    prior = make("masked")
    drawn = [
        prior.sample(8, generator=torch.Generator().manual_seed(0), **{k: kind(v) for k, v in options.items()})
        for kind in (lambda value: value, str)
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("name", "option"), [("pixelcnn", "steps"), ("unigram", "steps"), ("uniform", "hot")])
def test_a_sampler_takes_no_options_of_others(name, option):
    prior = PRIORS["uniform"](num_codes=5, grid=(4, 5)) if name == "uniform" else make(name)
    with pytest.raises(TypeError, match=f"takes no {option} with this prior; its options are"):
        prior.sample(2, **{option: 1})


def test_priors_over_vectors_take_no_labels():
    with pytest.raises(TypeError, match="takes no labels with this prior; its options are temperature"):
        PRIORS["normal"](latent_dim=2, grid=(1, 1)).sample(2, labels=torch.tensor([0, 1]))
