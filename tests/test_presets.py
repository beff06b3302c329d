"""Presets are the published set-ups, written as flags."""

import re
from typing import Any

import pytest

from vqvae import cli
from vqvae.config import Config, Fresh, StageTwo, Start, add_flags, configure
from vqvae.experiment import SLOTS, choose_optimizer
from vqvae.presets import PRESETS, describe
from vqvae.registry import build

parser = cli.parser("", "")
add_flags(parser)


def typed(line: str, start: Start = Fresh()) -> Config:
    """The settings that a command line gives."""
    return configure(vars(parser.parse_args(line.split())), start, SLOTS)


def second_stage(name: str, first: Config) -> Config:
    settings = (PRESETS[name].prior or {}) | {"checkpoint": "logs/a"}
    return configure(settings, StageTwo("logs/a", {"config": first.to_dict()}), SLOTS)


def options(name: str) -> dict[str, Any]:
    """Every option of a preset's bottleneck and objective."""
    config = typed(f"--preset {name}")
    return config.bottleneck.options | config.objective.options


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_well_formed_and_names_its_source(name):
    first = typed(f"--preset {name}")
    assert first.preset == name
    assert PRESETS[name].source
    assert f"--preset {name}\n    {PRESETS[name].source}\n" in describe()
    if PRESETS[name].prior:
        second = second_stage(name, first)
        assert second.bottleneck == first.bottleneck
        assert second.prior != first.prior
        assert choose_optimizer(second) == "adamw"
    assert choose_optimizer(first) == "adamw"  # as published


def test_autoencoders_and_transformers_get_muon_unless_told_otherwise():
    assert choose_optimizer(typed("--dataset digits")) == "muon"
    assert choose_optimizer(typed("--optimizer adamw")) == "adamw"
    prior = StageTwo("logs/a", {"config": typed("--dataset digits --optimizer muon").to_dict()})
    defaults = {"pixelcnn": "adamw", "gated-pixelcnn": "adamw", "transformer": "muon", "masked": "muon"}
    for name, default in defaults.items():
        assert choose_optimizer(typed(f"--prior {name} --checkpoint logs/a", prior)) == default
        for asked in ("muon", "adamw"):
            assert choose_optimizer(typed(f"--prior {name} --checkpoint logs/a --optimizer {asked}", prior)) == asked


def test_what_differs_from_the_source_is_listed_with_the_preset():
    blocks = {block.split()[1]: block for block in describe().split("\n\n")}
    for name, preset in PRESETS.items():
        assert [line[len("    differs: ") :] for line in re.findall(r"^    differs: .*$", blocks[name], re.M)] == list(
            preset.differs
        )
        on_test = typed(f"--preset {name}").validation == "test"
        assert ("test split: evaluated after each epoch and chooses best.pt" in blocks[name]) == on_test
    for name, words in {
        "probabilistic-2.3": ("count as much as an average batch", "Laplace", "SAME"),
        "vlae-svhn": ("u = 0.5", "tanh"),
        "vae-cifar10": ("u = 0.5", "32 and 5e-4"),
        "vqvae-gated-pixelcnn": ("first layer", "head", "5 epochs without a better validation metric"),
        "dvq-dalle": ("projection to K logits",),
    }.items():
        assert all(word in blocks[name] for word in words), name


def test_no_prior_of_two_stages_is_chosen_on_the_test_split():
    for name, preset in PRESETS.items():
        if preset.prior and "patience" in preset.prior:
            assert second_stage(name, typed(f"--preset {name}")).validation != "test"


def test_sonnets_preset_trains_on_as_many_images_and_steps_as_sonnet():
    config = typed("--preset sonnet-cifar10")
    assert (float(config.validation) * 50_000, config.max_steps) == (10_000, 10_000)
    assert config.epochs * (40_000 // config.batch_size) >= config.max_steps


@pytest.mark.parametrize("name", PRESETS)
def test_the_listed_flags_give_the_same_run(name):
    listed = next(block for block in describe().split("\n\n") if block.startswith(f"--preset {name}\n"))
    flags, *then = re.findall(r"^    (?:then )?(--\w.*)$", listed, re.M)
    first = typed(flags)
    first.preset = name
    assert first == typed(f"--preset {name}")
    assert len(then) == bool(PRESETS[name].prior)
    for line in then:
        second = typed(f"{line} --checkpoint logs/a", StageTwo("logs/a", {"config": first.to_dict()}))
        assert second == second_stage(name, first)


# experiments on probabilistic VQ-VAEs

DEFAULTS = {"beta": 0.25, "num_samples": 1, "iaf_flows": 0, "iaf_startup_steps": 0} | {
    "stop_training_encoder_after_startup": False, "stop_gradient_for_prior": False
}  # fmt: skip
ROY = {"num_samples": 10, "average_samples": True, "stop_gradient_for_prior": True}
LATE = {"iaf_flows": 1, "iaf_startup_steps": 5000}
FROZEN = LATE | {"stop_training_encoder_after_startup": True}
TEN = {"num_samples": 10, "beta": 0.05}
EXPERIMENTS: dict[str, tuple[str, bool, float, dict[str, Any]]] = {
    # bottleneck, sum_over_latents, entropy_scale, and what differs from DEFAULTS
    "1": ("deterministic", True, 0.0, {}),
    "2.1": ("categorical", False, 0.0, ROY),
    "2.2": ("categorical", False, 1.0, ROY | TEN),
    "2.3": ("categorical", True, 1.0, ROY | TEN),
    "2.4": ("categorical", True, 1.0, ROY | TEN | {"stop_gradient_for_prior": False}),
    "2.5": ("categorical", False, 1.0, ROY | TEN | FROZEN),
    "3": ("gumbel", True, 1.0, TEN),
    "4.1": ("gumbel", True, 1.0, TEN | {"iaf_flows": 1}),
    "4.2.1": ("gumbel", True, 1.0, TEN | LATE),
    "4.2.2": ("gumbel", True, 1.0, TEN | FROZEN),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_experiment_differs_from_the_others_as_published(experiment):
    bottleneck, sum_over_latents, entropy_scale, differs = EXPERIMENTS[experiment]
    assert typed(f"--preset probabilistic-{experiment}").bottleneck.name == bottleneck
    # the nearest code has neither samples nor flows
    found = {"num_samples": 1, "iaf_flows": 0} | options(f"probabilistic-{experiment}")
    expected = DEFAULTS | {"sum_over_latents": sum_over_latents, "entropy_scale": entropy_scale} | differs
    assert {key: found[key] for key in expected} == expected
    assert found.get("temperature", "0.5") == "0.5"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_all_experiments_share_data_nets_prior_and_length(experiment):
    config = typed(f"--preset probabilistic-{experiment}")
    assert config.dataset.name == "mnist-binary"
    assert config.dataset.options["binarization"] == "threshold"
    assert (config.nets.name, config.nets.options["latents"], config.nets.options["hidden"]) == ("mnist-conv", 10, 32)
    assert config.likelihood.name == "bernoulli"
    assert config.prior.name == "transformer"
    assert (config.prior.options["layers"], config.prior.options["width"]) == (6, 16)
    assert (config.lr, config.batch_size, config.max_steps) == ("1e-3", 128, 10_000)
    assert config.epochs * 60_000 // config.batch_size >= 10_000
    assert config.objective.name == "probabilistic"
    shared = {"num_codes": 64, "code_dim": 16, "decay": 0.99, "init": "normal"} | {"reduction": "sum", "kl_weight": "1"}
    found = options(f"probabilistic-{experiment}")
    assert {key: found[key] for key in shared} == shared


def test_the_table_names_all_experiments():
    assert {f"probabilistic-{name}" for name in EXPERIMENTS} == {n for n in PRESETS if n.startswith("probabilistic")}


# other published sizes


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("sonnet-cifar10", {"num_codes": 512, "code_dim": 64, "beta": 0.25, "decay": 0.99, "codebook": "ema"}),
        ("sonnet-cifar10", {"warmup": False, "spread": 0.0}),
        ("sonnet-mnist", {"beta": 0.25, "warmup": False, "spread": 0.0}),
        (
            "henrhoi-vqvae",
            {"num_codes": 128, "code_dim": 256, "codebook": "gradient", "init": "uniform", "beta": 1.0, "revive": 0.0},
        ),
        (
            "dvq-vqvae",
            {"num_codes": 512, "code_dim": 64, "codebook": "gradient", "init": "kmeans", "spread": 0.0, "beta": 0.25}
            | {"weight": 10.0},
        ),
        ("dvq-gumbel", {"num_codes": 512, "posterior": "linear", "temperature": "quarter-cosine:1:0.0625:150000"}),
        ("dvq-dalle", {"entropy": "exact", "kl_weight": "quarter-cosine:0:6.6:5000", "reduction": "mean"}),
        ("vae-2d-1", {"latents": 2, "reduction": "sum"}),
        ("vae-cifar10", {"latents": 16, "reduction": "sum", "kl_weight": "1"}),
    ],
)
def test_presets_have_the_published_sizes(name, published):
    found = options(name)
    assert {key: found[key] for key in published} == published


@pytest.mark.parametrize(
    ("data", "codes", "variance", "middle"),
    [("mnist", 128, 11.0, False), ("fashion-mnist", 256, 11.0, False), ("cifar10", 512, 21.0, True)],
)
def test_presets_of_sqvae_share_the_published_protocol(data, codes, variance, middle):
    ours, plain = typed(f"--preset sqvae-{data}"), typed(f"--preset sqvae-{data}-vq")
    for config in (ours, plain):
        assert config.dataset.name == data
        assert (config.batch_size, config.epochs, config.lr) == (32, 100, "plateau:1e-3:0.5:3")
        assert (config.weight_decay, config.augment, config.image_size) == (0.0, "none", None)
        assert round(float(config.validation) * (50_000 if data == "cifar10" else 60_000)) == 10_000
        assert (config.bottleneck.options["num_codes"], config.bottleneck.options["code_dim"]) == (codes, 64)
        assert config.nets.name == "sqvae"
        assert (config.nets.options["hidden"], config.nets.options["residual_layers"]) == (64, 2)
        assert config.nets.options["middle"] is middle
        assert config.likelihood.options["pixels"] == "sigmoid"
    assert (ours.bottleneck.name, plain.bottleneck.name) == ("stochastic", "vq")
    assert (ours.bottleneck.options["variance"], ours.bottleneck.options["anneal"]) == (variance, 1e-5)
    assert ours.likelihood.options["variance"] == "learned"
    assert ours.objective.options["reduction"] == "sum"
    assert ours.prior.name == "uniform"


def test_the_preset_of_raq_has_the_published_steps_and_size():
    config = typed("--preset raq-cifar10")
    assert config.epochs * (50_000 // config.batch_size) == config.max_steps == 195_000
    assert (config.batch_size, config.lr, config.augment) == (128, "5e-4", "crop-flip")
    nets = build(SLOTS["nets"], config.nets, {"image_shape": (3, 32, 32)})
    projection = (nets.channels + 1) * 64
    parts = (nets.encoder(), nets.decoder(64, 3))
    count = projection + sum(p.numel() for part in parts for p in part.parameters())
    assert round(count / 1e6, 2) == 0.49
    assert typed("--preset raq-cifar10 --codes 1024").bottleneck.options["num_codes"] == 1024


def test_svhn_has_the_published_codebook():
    config, cifar = typed("--preset henrhoi-vqvae-svhn"), typed("--preset henrhoi-vqvae")
    assert (config.dataset.name, config.epochs, cifar.epochs) == ("svhn", 20, 40)
    assert (config.bottleneck, config.likelihood, config.nets) == (cifar.bottleneck, cifar.likelihood, cifar.nets)


@pytest.mark.parametrize("name", ["dvq-vqvae", "dvq-gumbel", "dvq-dalle"])
def test_presets_of_deep_vector_quantization_share_the_published_optimizer(name):
    config = typed(f"--preset {name}")
    assert (config.lr, config.weight_decay) == ("quarter-cosine:3e-4:1.25e-6:1200000", 1e-4)
    assert (config.augment, config.batch_size) == ("crop-flip", 128)


@pytest.mark.parametrize("name", ["vqvae-pixelcnn", "vqvae-gated-pixelcnn"])
def test_presets_of_two_stages_train_the_published_prior(name):
    second = second_stage(name, typed(f"--preset {name}"))
    gated = name == "vqvae-gated-pixelcnn"
    assert second.prior.name == name.removeprefix("vqvae-")
    assert (second.lr, second.batch_size, second.epochs) == (("8e-4", 64, 30) if gated else ("1e-3", 128, 30))
    assert second.prior.options["layers" if gated else "blocks"] == (13 if gated else 10)
