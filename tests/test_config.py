"""Flags, shorthands, presets and earlier runs become the settings of a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vqvae import cli
from vqvae.config import (
    FIELDS,
    ON_RESUME,
    SHORTHANDS,
    Config,
    Fresh,
    Initialized,
    Resumed,
    StageTwo,
    Start,
    add_flags,
    configure,
    default_name,
    interval,
)
from vqvae.errors import OptionError, UserError
from vqvae.experiment import SLOTS
from vqvae.registry import Choice, resolve, signature

parser = cli.parser("", "")
add_flags(parser)


def typed(line: str, start: Start = Fresh()) -> Config:
    """The settings that a command line gives."""
    return configure(vars(parser.parse_args(line.split())), start, SLOTS)


def refusal(line: str, start: Start = Fresh()) -> str:
    """The error's message, as the command line prints it."""
    with pytest.raises(UserError) as caught:
        typed(line, start)
    return caught.value.flagged if isinstance(caught.value, OptionError) else str(caught.value)


def options(slot: str, words: str) -> dict[str, Any]:
    """All options of a choice."""
    return resolve(SLOTS[slot], Choice.parse(slot, words.split())).options


def test_defaults_train_a_vq_vae_on_digits():
    config = typed("")
    assert [getattr(config, slot).name for slot in SLOTS] == ["digits", "sonnet", "vq", "uniform", "mse", "elbo"]
    assert default_name(config) == "vqvae-digits"
    assert typed("") == typed("")


def test_every_choice_has_all_its_options_in_their_types():
    config = typed("--bottleneck vq decay=0.9 projection=no --prior pixelcnn blocks=3")
    assert config.bottleneck == Choice("vq", options("bottleneck", "vq decay=0.9 projection=no"))
    assert (config.bottleneck.options["decay"], config.bottleneck.options["projection"]) == (0.9, False)
    assert config.prior == Choice("pixelcnn", options("prior", "pixelcnn blocks=3"))


def test_settings_come_as_text_as_words_or_as_values():
    flags = typed("--epochs 3 --bottleneck vq decay=0.9 --max-minutes 1.5")
    values = {"epochs": 3, "bottleneck": Choice("vq", {"decay": 0.9}), "max_minutes": 1.5}
    text = {"epochs": "3", "bottleneck": "vq decay=0.9", "max_minutes": "1.5"}
    assert flags == configure(values, Fresh(), SLOTS) == configure(text, Fresh(), SLOTS)


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("--codes 32", "--bottleneck vq num_codes=32"),
        ("--code-dim 8", "--bottleneck vq code_dim=8"),
        ("--beta 0.1", "--bottleneck vq beta=0.1"),
        ("--gradient rotation", "--bottleneck vq gradient=rotation"),
        ("--bottleneck gumbel --temperature cosine:1:0.1", "--bottleneck gumbel temperature=cosine:1:0.1"),
        ("--hidden 64", "--nets sonnet hidden=64"),
        ("--prior made-flow --prior-flows 3", "--prior made-flow flows=3"),
        ("--kl-weight 0.5", "--objective elbo kl_weight=0.5"),
        ("--codes 32 --beta 1 --bottleneck vq decay=0.9", "--bottleneck vq num_codes=32 beta=1 decay=0.9"),
        ("--codes 32 --bottleneck cosine", "--bottleneck cosine num_codes=32"),
        ("--preset henrhoi-vqvae --codes 32", "--preset henrhoi-vqvae --bottleneck vq num_codes=32"),
    ],
)
def test_a_shorthand_is_an_option_of_the_chosen_member(line, same):
    assert typed(line) == typed(same)


def test_every_shorthand_names_an_option_that_exists():
    assert set(SHORTHANDS) == {
        "resize", "codes", "code_dim", "beta", "gradient", "temperature", "hidden", "prior_flows", "kl_weight"
    }  # fmt: skip
    for short in SHORTHANDS.values():
        assert any(short.option in signature(member).options for member in SLOTS[short.slot].table.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--codes 0", "--codes 0: must be from 1 to 16777216"),
        ("--beta nan", "--beta nan: must be a finite number, at least 0"),
        (
            "--gradient rotate",
            "--gradient rotate: must be one of straight-through, rotation (did you mean 'rotation'?)",
        ),
        ("--kl-weight fast", "--kl-weight fast: must be a number, or shape:start:end"),
        ("--kl-weight -1", "--kl-weight -1: must be at least 0"),
        ("--bottleneck gumbel --temperature 0", "--temperature 0: must be above 0"),
        ("--bottleneck gaussian --codes 8", "--codes 8: --bottleneck gaussian has no num_codes; it takes latents=16"),
        ("--prior uniform --prior-flows 2", "--prior-flows 2: --prior uniform has no flows; it takes no options"),
        ("--bottleneck grouped groups=3 --code-dim 8", "--code-dim 8: must be a multiple of groups=3"),
        # what was typed for the slot is still named as the slot's
        ("--codes 8 --bottleneck vq decay=2", "--bottleneck vq decay=2: must be from 0 to below 1"),
        ("--codes 8 --bottleneck cosin", "--bottleneck cosin: no such name (did you mean 'cosine'?)"),
    ],
)
def test_a_bad_shorthand_is_named_by_its_own_flag(line, message):
    assert refusal(line).startswith(message)


@pytest.mark.parametrize("value", ["8", "16"])
def test_an_option_given_twice_is_refused(value):
    message = f"--codes 8: is given twice, also as --bottleneck vq num_codes={value}; keep one"
    assert refusal(f"--codes 8 --bottleneck vq num_codes={value}") == message


def test_flags_override_the_preset_option_by_option():
    config = typed("--preset henrhoi-vqvae --bottleneck vq beta=0.5 --epochs 3")
    assert (config.bottleneck.options["beta"], config.bottleneck.options["num_codes"]) == (0.5, 128)
    assert (config.epochs, config.lr) == (3, "1e-3")
    other = typed("--preset henrhoi-vqvae --bottleneck cosine")
    assert other.bottleneck == Choice("cosine", options("bottleneck", "cosine"))  # nothing of the preset's vq


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset sonet-cifar10", "--preset sonet-cifar10: no such name (did you mean 'sonnet-cifar10'"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--epochs 1.5", "--epochs 1.5: must be a whole number"),
        ("--batch-size x", "--batch-size x: must be a whole number"),
        ("--image-size 0", "--image-size 0: must be from 1 to 4096"),
        ("--limit -1", "--limit -1: must be at least 1"),
        ("--max-steps 0", "--max-steps 0: must be at least 1"),
        ("--max-minutes 0", "--max-minutes 0: must be above 0"),
        ("--max-minutes inf", "--max-minutes inf: must be a finite number, above 0"),
        ("--max-minutes 1e400", "--max-minutes 1e400: must be a finite number, above 0"),
        ("--weight-decay 1e39", "--weight-decay 1e39: must be at most 3.4e+38"),
        ("--epochs 1e400", "--epochs 1e400: must be at most 2147483647"),
        ("--limit " + "9" * 5000, "--limit " + "9" * 80 + "... (5,000 characters): must be at most 2147483647"),
        ("--patience 0", "--patience 0: must be at least 1"),
        ("--log-every 0", "--log-every 0: must be at least 1"),
        ("--weight-decay -1", "--weight-decay -1: must be at least 0"),
        ("--lr fast", "--lr fast: must be a number, or shape:start:end"),
        ("--lr -1", "--lr -1: must be at least 0"),
        ("--lr -1e-3", "--lr -1e-3: must be at least 0"),
        ("--lr cosine:1e-3:-1", "--lr cosine:1e-3:-1: must be at least 0 at every step"),
        ("--lr 1e39", "--lr 1e39: must be a finite number of at most 3.4e+38"),
        ("--name a/b", "--name a/b: must be a name of letters, digits"),
        ("--name ..", "--name ..: must be a name of letters, digits"),
        ("--seed -1", "--seed -1: must be from 0 to 9223372036854775807"),
        ("--seed 9223372036854775808", "--seed 9223372036854775808: must be from 0 to"),
        ("--device tpu", "--device tpu: must be one of auto, cpu, cuda, mps"),
        ("--augment crop", "--augment crop: must be one of none, crop-flip (did you mean 'crop-flip'?)"),
        ("--checkpoint-every soon", "--checkpoint-every soon: must be steps such as 500, or seconds such as 300s"),
        ("--checkpoint-every 0", "--checkpoint-every 0: must be steps"),
        ("--epochs", "--epochs: expected one argument"),
        ("--epoch 3", "--epoch: no such flag (did you mean '--epochs'?); see --help"),
        ("--bottleneck decay=3", "--bottleneck decay=3: must be a name, followed by its key=value options"),
        ("--bottleneck vq decay", "--bottleneck vq: 'decay' must be of the form key=value"),
        ("--bottleneck vq decai=3", "--bottleneck vq decai=3: unknown option (did you mean 'decay'?)"),
    ],
)
def test_a_bad_value_is_named_with_its_flag_in_one_line(line, message):
    assert refusal(line).startswith(message)
    assert "\n" not in refusal(line)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--bottleneck vq temperature=0.5", "--bottleneck vq temperature=0.5: has no effect without diversity above 0"),
        ("--temperature 2", "--temperature 2: has no effect without diversity above 0"),
        ("--bottleneck vq codebook=gradient epsilon=1e-3", "epsilon=0.001: has no effect without codebook=ema"),
        ("--bottleneck residual codebook=gradient revive=0 decay=0.9", "decay=0.9: has no effect without codebook="),
        ("--bottleneck cosine init=normal spread=1", "spread=1.0: has no effect without init=kmeans"),
        ("--bottleneck gumbel iaf_parameters=triangular", "has no effect without iaf_flows above 0"),
        ("--bottleneck categorical posterior=linear --beta 0.5", "--beta 0.5: has no effect without posterior="),
        ("--prior masked label_drop=0.2", "--prior masked label_drop=0.2: has no effect without --conditional"),
        ("--prior pixelcnn label_drop=0.2 --preset sonnet-mnist", "has no effect without --conditional"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused(line, named):
    assert named in refusal(line)


@pytest.mark.parametrize(
    "line",
    [
        "--bottleneck vq temperature=0.5 diversity=0.1",
        "--bottleneck vq codebook=gradient decay=0.9",  # revival counts with it
        "--bottleneck vq codebook=gradient init=uniform spread=0 revive=0 warmup=no",  # nothing is switched on
        "--bottleneck gumbel posterior=linear revive=0",
        "--prior pixelcnn label_drop=0.2 --conditional",
        "--prior pixelcnn label_drop=0",
    ],
)
def test_an_option_that_has_an_effect_or_switches_one_off_is_accepted(line):
    typed(line)


def test_an_unknown_setting_is_refused():
    with pytest.raises(OptionError, match="epoch=3: unknown setting .did you mean 'epochs'"):
        configure({"epoch": 3}, Fresh(), SLOTS)


def test_every_setting_has_help_a_group_and_a_default_that_passes():
    groups = {f.name: f.metadata["group"] for f in dataclasses.fields(Config)}
    for name, option in FIELDS.items():
        assert option.help, name
        assert groups[name], name
        if option.kind is not Choice:
            assert option.convert(option.default) == option.default
            assert option.rules or option.kind not in (int, float), name


def test_compile_is_yes_no_or_left_to_the_machine():
    assert [typed(line).compile for line in ("", "--compile", "--no-compile")] == [None, True, False]


def test_checkpoints_come_every_so_many_steps_or_seconds():
    assert [interval(text) for text in ("500", "300s", "0.5s")] == [(500, None), (None, 300.0), (None, 0.5)]
    assert [interval(text) for text in ("0", "0s", "1.5", "-1", "s", "", "5m")] == [None] * 7


def test_settings_survive_a_round_trip_through_plain_values():
    config = typed("--codes 32 --lr cosine:1e-3:0 --compile --prior made-flow --bottleneck gumbel --max-minutes 2")
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain == config.to_dict()
    assert Config.from_dict(plain) == config
    earlier = {name: value for name, value in plain.items() if name != "optimizer"}
    assert Config.from_dict(earlier).optimizer == "adamw"  # before muon there was nothing else
    with pytest.raises(UserError, match="does not know the settings flux, verve"):
        Config.from_dict(plain | {"verve": 1, "flux": 3})


# resumed runs

BASE = "--dataset mnist --epochs 2 --lr 1e-3 --codes 32 --bottleneck vq decay=0.9 --hidden 64 --conditional"
RESUMED = Resumed(Path("logs/run"), {"config": typed(BASE).to_dict()})


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("", {}),
        ("--epochs 4", {"epochs": 4}),
        ("--max-steps 9 --max-minutes 3 --patience 2", {"max_steps": 9, "max_minutes": 3.0, "patience": 2}),
        ("--data-dir elsewhere --device cpu", {"data_dir": "elsewhere", "device": "cpu"}),
        (
            "--log-every 5 --checkpoint-every 9s --no-compile",
            {"log_every": 5, "checkpoint_every": "9s", "compile": False},
        ),
    ],
)
def test_a_resumed_run_may_go_on_longer_and_elsewhere(line, changes):
    assert set(changes) <= set(ON_RESUME)
    assert typed(line, RESUMED) == dataclasses.replace(typed(BASE), **changes)


@pytest.mark.parametrize(
    "line",
    [
        BASE,
        "--lr 1e-3 --conditional",
        "--codes 32 --code-dim 64 --kl-weight 1",
        "--bottleneck vq num_codes=32",
        "--bottleneck vq",
        "--bottleneck vq decay=0.9 --codes 32 --hidden 64",
        "--nets sonnet hidden=64 --objective elbo",
    ],
)
def test_a_resumed_run_may_repeat_its_own_settings(line):
    assert typed(line, RESUMED) == typed(BASE)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--lr 1e-4", "--lr 1e-4"),
        ("--batch-size 64", "--batch-size 64"),
        ("--no-conditional", "--no-conditional"),
        ("--seed 1", "--seed 1"),
        ("--preset sonnet-mnist", "--preset sonnet-mnist"),
        ("--dataset svhn", "--dataset svhn"),
        ("--bottleneck vq decay=0.99", "--bottleneck vq decay=0.99"),
        ("--bottleneck cosine", "--bottleneck cosine"),
        ("--codes 64", "--codes 64"),
        ("--codes 64 --bottleneck vq", "--codes 64"),
        ("--codes 32 --bottleneck vq decay=0.99", "--bottleneck vq decay=0.99"),
        ("--kl-weight 2", "--kl-weight 2"),
        ("--epochs 4 --hidden 32", "--hidden 32"),
    ],
)
def test_a_resumed_run_keeps_its_other_settings(line, named):
    assert refusal(line, RESUMED).startswith(f"{named}: a resumed run keeps its settings; only these may change: --")


def test_a_resumed_run_checks_what_it_may_change():
    assert refusal("--epochs 0", RESUMED) == "--epochs 0: must be at least 1"
    assert refusal("--codes 0", RESUMED).startswith("--codes 0: must be from 1")
    assert refusal("--codes 32 --bottleneck cosine code_dim=0", RESUMED).startswith("--bottleneck cosine code_dim=0: ")


# stage two

FIRST = typed("--dataset mnist --codes 64 --lr 1e-3 --limit 50 --image-size 16 --objective elbo reduction=sum")
SECOND = StageTwo("logs/a/checkpoint.pt", {"config": FIRST.to_dict()})


def test_a_prior_takes_model_and_data_from_stage_one():
    second = typed("--prior pixelcnn blocks=3 --checkpoint logs/a/checkpoint.pt --epochs 9 --conditional", SECOND)
    for key in ("dataset", "nets", "bottleneck", "likelihood", "objective", "image_size", "limit", "data_dir"):
        assert getattr(second, key) == getattr(FIRST, key), key
    assert second.prior == Choice("pixelcnn", options("prior", "pixelcnn blocks=3"))
    assert (second.epochs, second.conditional, second.checkpoint) == (9, True, "logs/a/checkpoint.pt")
    assert second.lr == Config.lr != FIRST.lr  # the second stage has a rate and a length of its own
    assert default_name(second) == "a-pixelcnn"


@pytest.mark.parametrize(
    "line",
    [
        "--objective elbo", "--bottleneck vq", "--nets sonnet", "--likelihood mse", "--dataset mnist",
        "--preset sonnet-mnist", "--codes 64", "--code-dim 8", "--beta 1", "--gradient rotation", "--temperature 1",
        "--image-size 16", "--hidden 8", "--kl-weight 0.5",
    ],
)  # fmt: skip
def test_a_prior_may_not_change_model_or_data(line):
    message = f"{line}: the model and data come from --checkpoint; leave it out"
    assert refusal(f"--prior pixelcnn {line}", SECOND) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--epochs 3 --checkpoint logs/a",
            "--checkpoint logs/a: name the prior to train on its codes, such as --prior",
        ),
        ("--prior pixelcnn --augment crop-flip", "--augment crop-flip: a prior trains on codes, not images"),
        ("--prior pixelcnn kernel=4", "--prior pixelcnn kernel=4: must be odd"),
        ("--prior pixelcnn --prior-flows 2", "--prior-flows 2: --prior pixelcnn has no flows"),
    ],
)
def test_a_prior_that_cannot_train_is_refused(line, message):
    assert refusal(line, SECOND).startswith(message)


TRAINED = Config(
    dataset=Choice("folder", {}),
    nets=Choice("vqgan", {"hidden": 16}),
    bottleneck=Choice("vq", {"num_codes": 64, "code_dim": 8}),
    likelihood=Choice("mse", {"pixels": "symmetric"}),
    epochs=7,
)
FROM = Initialized({"config": TRAINED.to_dict()})


def test_a_run_takes_nets_likelihood_and_sizes_from_the_model_that_it_starts_from():
    line = "--init-from m --dataset mnist --bottleneck vq decay=0.9 codebook=gradient --nets vqgan hidden=16 --codes 64"
    config = typed(line, FROM)
    assert config.nets == Choice("vqgan", options("nets", "vqgan hidden=16"))
    assert config.likelihood.options["pixels"] == "symmetric"
    words = "vq num_codes=64 code_dim=8 decay=0.9 codebook=gradient"
    assert config.bottleneck == Choice("vq", options("bottleneck", words))
    assert (config.dataset.name, config.epochs, config.init_from) == ("mnist", Config.epochs, "m")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--hidden 32", "--nets vqgan hidden=32: the model of --init-from has hidden=16; leave it out"),
        ("--nets sonnet", "--nets sonnet: the model of --init-from has vqgan; leave it out"),
        ("--codes 32", "--bottleneck vq num_codes=32: the model of --init-from has num_codes=64; leave it out"),
        ("--bottleneck fsq", "--bottleneck fsq: the model of --init-from has vq; leave it out"),
        ("--likelihood mse pixels=centered", "--likelihood mse pixels=centered: the model of --init-from has pixels="),
        ("--preset dvq-dalle", "--nets dalle: the model of --init-from has vqgan; leave it out"),
    ],
)
def test_what_differs_from_the_model_to_start_from_is_refused(line, message):
    assert refusal(f"--init-from m {line}", FROM).startswith(message)


def test_a_prior_of_a_second_stage_starts_from_no_other_model():
    message = "--init-from m: the model and data come from --checkpoint; leave it out"
    assert refusal("--prior pixelcnn --checkpoint logs/a --init-from m", SECOND) == message


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("--dataset mnist", "vqvae-mnist"),
        ("--bottleneck gumbel", "gumbel-digits"),
        ("--preset sonnet-mnist --dataset digits", "sonnet-mnist"),
    ],
)
def test_a_run_is_named_after_its_preset_or_its_bottleneck_and_data(line, name):
    assert default_name(typed(line)) == name
