"""The command line becomes one Config; presets lie under it; a resumed run keeps its settings."""

import dataclasses

import pytest

from vqvae.config import PRESETS, Config, configure, default_name, describe_presets, parser
from vqvae.errors import UserError
from vqvae.members import Choice


def typed(line: str, **earlier: Config) -> Config:
    return configure(vars(parser("", "").parse_args(line.split())), **earlier)


def test_defaults_train_a_vq_vae_on_digits():
    config = typed("")
    assert (config.dataset.name, config.bottleneck.name, config.nets.name) == ("digits", "vq", "sonnet")
    assert default_name(config) == "vqvae-digits"


def test_plain_flags_are_the_members_options():
    config = typed("--codes 32 --code-dim 8 --beta 0.1 --hidden 64 --bottleneck vq decay=0.9")
    assert config.bottleneck == Choice("vq", {"decay": "0.9", "num_codes": 32, "code_dim": 8, "beta": 0.1})
    assert config.nets == Choice("sonnet", {"hidden": 64})
    assert typed("--gradient rotation").bottleneck == Choice("vq", {"gradient": "rotation"})
    assert typed("--prior made-flow --prior-flows 3").prior == Choice("made-flow", {"flows": 3})


def test_flags_win_over_the_preset_option_by_option():
    config = typed("--preset henrhoi-vqvae --bottleneck vq beta=0.5 --epochs 3")
    assert config.bottleneck.options["beta"] == "0.5"
    assert config.bottleneck.options["num_codes"] == "128"
    assert (config.epochs, config.lr) == (3, "1e-3")
    assert typed("--preset henrhoi-vqvae --likelihood gaussian").likelihood == Choice("gaussian", {})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_well_formed_and_names_its_source(name):
    assert typed(f"--preset {name}").preset == name
    assert PRESETS[name].source in describe_presets()
    if PRESETS[name].prior:
        second = configure(PRESETS[name].prior, stage_one=typed(f"--preset {name}"))
        assert second.bottleneck == typed(f"--preset {name}").bottleneck


def test_settings_survive_a_round_trip_through_plain_values():
    config = typed("--codes 32 --lr cosine:1e-3:0 --compile")
    assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="flux"):
        Config.from_dict(config.to_dict() | {"flux": 3})


def test_compile_is_yes_no_or_left_to_the_machine():
    assert [typed(line).compile for line in ("", "--compile", "--no-compile")] == [None, True, False]
    assert typed("--compile", resumed=typed("--no-compile")).compile is True


def test_every_option_has_help_and_a_group():
    assert all(f.metadata["help"] and f.metadata["group"] for f in dataclasses.fields(Config))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset sonet-cifar10", "did you mean 'sonnet-cifar10'"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--batch-size x", "--batch-size x: must be a whole number"),
        ("--codes 0", "--codes 0"),
        ("--beta nan", "--beta nan"),
        ("--name a/b", "--name a/b"),
        ("--name ..", "--name"),
        ("--seed -1", "--seed -1"),
        ("--device tpu", "--device"),
        ("--checkpoint-every soon", "--checkpoint-every soon"),
        ("--checkpoint-every 0", "--checkpoint-every 0"),
        ("--epoch 3", "--epoch"),
        ("--bottleneck decay=3", "--bottleneck decay=3"),
    ],
)
def test_bad_values_name_the_flag_and_the_value(line, message):
    with pytest.raises(UserError, match=message) as caught:
        typed(line)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_may_go_on_longer_but_not_be_another():
    base = typed("--epochs 2 --lr 1e-3")
    assert typed("--epochs 4", resumed=base) == dataclasses.replace(base, epochs=4)
    assert typed("--lr 1e-3", resumed=base) == base
    with pytest.raises(UserError, match="--lr 1e-4: a resumed run keeps its settings"):
        typed("--lr 1e-4", resumed=base)


def test_a_prior_takes_model_and_data_from_stage_one():
    first = typed("--dataset mnist --codes 64 --lr 1e-3 --limit 50")
    second = typed("--prior pixelcnn blocks=3 --checkpoint logs/a/checkpoint.pt --epochs 9", stage_one=first)
    assert (second.dataset, second.bottleneck, second.limit) == (first.dataset, first.bottleneck, 50)
    assert second.prior == Choice("pixelcnn", {"blocks": "3"})
    assert (second.epochs, second.lr) == (
        9,
        Config.lr,
    )  # how long and how fast is the second stage's own affair
    assert default_name(second) == "a-pixelcnn"
    with pytest.raises(UserError, match="--codes 3: the model and data come from --checkpoint"):
        typed("--prior pixelcnn --codes 3", stage_one=first)
    with pytest.raises(UserError, match="--augment crop-flip: a prior trains on codes"):
        typed("--prior pixelcnn --augment crop-flip", stage_one=first)
    with pytest.raises(UserError, match="name the prior"):
        typed("--epochs 3", stage_one=first)
