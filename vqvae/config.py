"""Every option of a run in one dataclass: defaults, help, command line and named presets.

Nothing here imports torch, so that `--help` answers at once. Members' own options (`--bottleneck vq decay=0.9`) are
not listed here: they are read off the members' constructors (`members.py`).
"""

import argparse
import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vqvae.errors import UserError, near_misses
from vqvae.members import Choice, convert

DEVICES = ("auto", "cpu", "cuda", "mps")
GROUPS = ("model", "data", "training", "run", "machine")
LISTINGS = ("data", "nets", "bottlenecks", "priors", "likelihoods", "presets")


def option(default: Any, help: str, *, group: str, metavar: str | None = None, choices=None, on_resume=False):
    """A field of `Config`; `on_resume` marks what a resumed run may change."""
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "metavar": metavar,
            "choices": choices,
            "on_resume": on_resume,
        },
    )


def slot(default: str, help: str):
    return option(default, help, group="model", metavar=("NAME", "key=value"))


@dataclass
class Config:
    """The settings of one run; the slots hold `Choice`s (a member's name and options)."""

    dataset: Choice | str = slot(
        "digits", "what to learn from: digits, photos (built in), mnist, cifar10, svhn, folder ..."
    )
    bottleneck: Choice | str = slot("vq", "features to latent: vq codebook=ema decay=0.99 revive=0.03 ...")
    nets: Choice | str = slot("sonnet", "encoder and decoder")
    likelihood: Choice | str = slot("mse", "what the decoder's output means: mse, bernoulli, discretised-logistic ...")
    prior: Choice | str = slot(
        "uniform", "distribution over the latent; with --checkpoint, the stage-two prior to train"
    )
    preset: str | None = option(None, "a published set-up, see --list presets; flags beside it win", group="model")
    checkpoint: str | None = option(
        None, "train --prior on the codes of this trained model (stage two)", group="model", metavar="PATH"
    )
    conditional: bool = option(False, "let the prior know the labels", group="model")
    codes: int | None = option(None, "codebook size K (the bottleneck's num_codes)", group="model", metavar="K")
    code_dim: int | None = option(None, "code dimension D (the bottleneck's code_dim)", group="model", metavar="D")
    beta: float | None = option(None, "commitment weight (the bottleneck's beta)", group="model")
    gradient: str | None = option(
        None,
        "how gradients pass the codes: copied or turned along (the bottleneck's gradient)",
        group="model",
        choices=("straight-through", "rotation"),
    )
    temperature: str | None = option(
        None,
        "of relaxed codes, a number or a schedule as for --lr (the bottleneck's temperature)",
        group="model",
        metavar="T",
    )
    hidden: int | None = option(None, "width of the nets (their hidden)", group="model", metavar="N")

    prior_flows: int | None = option(
        None,
        "flows of an autoregressive-flow prior, every second one reversed (the prior's flows)",
        group="model",
        metavar="N",
    )

    data_dir: str = option(
        "data",
        "folder with the data's files, or the pictures of --dataset folder",
        group="data",
        on_resume=True,
    )
    image_size: int | None = option(None, "scale pictures to this many pixels a side", group="data", metavar="PIXELS")
    limit: int | None = option(
        None, "use at most this many images of each split, for quick looks", group="data", metavar="N"
    )

    epochs: int = option(20, "passes over the training data", group="training", on_resume=True)
    max_steps: int | None = option(
        None,
        "stop after this many updates, whatever --epochs says",
        group="training",
        metavar="N",
        on_resume=True,
    )
    max_minutes: float | None = option(
        None, "stop after so many minutes, evaluation included", group="training", metavar="MINUTES", on_resume=True
    )
    batch_size: int = option(128, "images per update, of all processes together", group="training", metavar="N")
    lr: str = option("3e-4", "learning rate: a number, or a schedule such as cosine:3e-4:1e-6 (to the end of the run), "
                     "linear:0:3e-4:500,cosine:3e-4:0:20000", group="training", metavar="RATE")  # fmt: skip
    augment: str = option(
        "none",
        "crop-flip trains on random crops after 4 pixels of reflected border, every second one mirrored",
        group="training",
        choices=("none", "crop-flip"),
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay (AdamW) on convolution and linear weights", group="training"
    )
    reduction: str = option(
        "mean",
        "train on nats per dimension (mean: with mse, Sonnet's MSE / variance) or per image (sum)",
        group="training",
        choices=("mean", "sum"),
    )
    kl_weight: str = option(
        "1",
        "weight of log q(z|x) - log p(z) in training, a number or a schedule as for --lr",
        group="training",
        metavar="WEIGHT",
    )
    free_bits: float = option(
        0.0,
        "bits per image of log q(z|x) - log p(z) that training does not charge for",
        group="training",
        metavar="BITS",
    )
    entropy_scale: float = option(
        1.0, "weight of log q(z|x) alone in training, 0 for no entropy bonus", group="training", metavar="WEIGHT"
    )
    sum_over_latents: bool = option(
        True, "sum prior and entropy over the code positions, as the bound does; without, their mean", group="training"
    )
    stop_gradient_for_prior: bool = option(
        False, "a jointly trained prior does not pull the encoder towards itself", group="training"
    )
    iaf_startup_steps: int = option(
        0, "flows of the bottleneck (iaf_flows) stay as they are for so many steps", group="training", metavar="STEPS"
    )
    stop_training_encoder_after_startup: bool = option(
        False, "then freeze the encoder, the rest trains on", group="training"
    )
    patience: int | None = option(
        None,
        "stop when so many epochs brought no better held-out figure",
        group="training",
        metavar="EPOCHS",
        on_resume=True,
    )
    seed: int = option(
        0,
        "seed of weights, order and noise; the same seed gives the same run, bit for bit on a CPU",
        group="training",
    )

    name: str | None = option(None, "name of the run; default: the model and data, such as vqvae-cifar10", group="run")
    log_dir: str = option(
        "logs", "where logs/<run> goes: config, metrics, TensorBoard events, checkpoints", group="run"
    )
    plot_dir: str = option("plots", "where plots/<run> goes: pictures", group="run")
    log_every: int = option(
        100, "write training metrics every so many steps", group="run", metavar="STEPS", on_resume=True
    )
    checkpoint_every: str = option(
        "300s",
        "save within epochs too: every so many steps (500) or seconds (300s)",
        group="run",
        metavar="WHEN",
        on_resume=True,
    )

    device: str = option(
        "auto",
        "where to compute; auto takes the first there is of cuda, mps, cpu",
        group="machine",
        choices=DEVICES,
        on_resume=True,
    )
    precision: str = option(
        "auto",
        "bf16 trains the nets in bfloat16; distances, losses and held-out figures stay fp32 (convolutions in TF32 on "
        "GPUs that have it, as is PyTorch's way); auto is bf16 on a GPU that computes in it, else fp32",
        group="machine",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool | None = option(
        None,
        "torch.compile the nets: slower to start, faster after (default: on a GPU, in runs of 2,000 steps or more)",
        group="machine",
        on_resume=True,
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as config.json and checkpoints hold them."""
        return {
            key: {"name": value.name, "options": value.options} if isinstance(value, Choice) else value
            for key, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`; raises `UserError` when it holds settings of another version."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"settings {', '.join(unknown)} are unknown to this version of the program")
        return cls(**{
            key: Choice(value["name"], value["options"]) if isinstance(value, dict) else value
            for key, value in values.items()
        })  # fmt: skip


SLOT_FIELDS = tuple(f.name for f in dataclasses.fields(Config) if f.metadata["metavar"] == ("NAME", "key=value"))
SHORTHANDS = {  # plain flag -> (slot, the member's option it stands for)
    "codes": ("bottleneck", "num_codes"),
    "code_dim": ("bottleneck", "code_dim"),
    "beta": ("bottleneck", "beta"),
    "gradient": ("bottleneck", "gradient"),
    "temperature": ("bottleneck", "temperature"),
    "hidden": ("nets", "hidden"),
    "prior_flows": ("prior", "flows"),
}


class Preset(NamedTuple):
    """Settings that differ from the defaults, written as on the command line, and where they are published."""

    source: str
    settings: dict[str, Any]
    prior: dict[str, Any] | None = None  # settings of the second stage, where there is one


VAE_2D = {
    "nets": "mlp",
    "bottleneck": "gaussian latents=2",
    "likelihood": "gaussian",
    "prior": "normal",
    "reduction": "sum",
    # after the published 10 epochs at 1e-3 some seeds still sit on the saddle where the latent is not used
    "lr": "cosine:2e-3:0",
    "batch_size": 64,
    "epochs": 60,
    "precision": "fp32",  # points need more digits than bfloat16 has, and nets as small gain nothing
}
IMAGE_VAE = {
    "nets": "conv-vae",
    "bottleneck": "gaussian latents=16",
    "likelihood": "logit-gaussian",
    "prior": "normal",
    "reduction": "sum",
    "lr": "1e-3",
}

HENRHOI_VQVAE = {
    "dataset": "cifar10",
    "nets": "henrhoi",
    "likelihood": "mse pixels=symmetric variance=0.125",
    "bottleneck": "vq num_codes=128 code_dim=256 codebook=gradient init=uniform revive=0 beta=1 weight=5.3333 "
    "projection=no",
    "lr": "1e-3",
    "epochs": 40,
}

PROBABILISTIC = {
    "dataset": "mnist-binary",
    "nets": "mnist-conv",
    "likelihood": "bernoulli",
    "prior": "transformer layers=6 width=16",
    "reduction": "sum",
    "lr": "1e-3",
    "epochs": 22,
    "max_steps": 10_000,
}
ROY = PROBABILISTIC | {
    "bottleneck": "categorical init=normal num_samples=10 average_samples=yes beta=0.05",
    "stop_gradient_for_prior": True,
}
GUMBEL = PROBABILISTIC | {"bottleneck": "gumbel init=normal num_samples=10 temperature=0.5 beta=0.05"}
GUMBEL_IAF = PROBABILISTIC | {"bottleneck": "gumbel init=normal num_samples=10 temperature=0.5 beta=0.05 iaf_flows=1"}
DVQ = {
    "dataset": "cifar10",
    "nets": "deepmind",
    "likelihood": "mse variance=0.0632704",
    "augment": "crop-flip",
    "lr": "quarter-cosine:3e-4:1.25e-6:1200000",
    "weight_decay": 1e-4,
    "epochs": 98,
}
DVQ_GUMBEL = DVQ | {
    "bottleneck": "gumbel posterior=linear num_codes=512 code_dim=64 entropy=exact "
    "temperature=quarter-cosine:1:0.0625:150000",
}
DVQ_SOURCE = "github.com/karpathy/deep-vector-quantization"
DVQ_LENGTH = (
    "98 epochs, those of its picture, end early in its schedules: shorten these with them. Unlike it, we take the "
    "likeliest code in evaluation, without noise"
)
EXPERIMENT = "probabilistic VQ-VAEs on binarised MNIST, experiment "

PRESETS = {
    "sonnet-cifar10": Preset(
        "github.com/google-deepmind/sonnet, VQ-VAE example: EMA codebook, batch 32, 10,000 steps; with our "
        "k-means start and revival (the original's own: --bottleneck vq init=fan-in revive=0)",
        {
            "dataset": "cifar10",
            "batch_size": 32,
            "epochs": 7,
            "max_steps": 10_000,
        },
    ),
    "sonnet-mnist": Preset(
        "the same nets and codebook on MNIST, 20 epochs at batch 128",
        {"dataset": "mnist", "epochs": 20},
    ),
    "henrhoi-vqvae": Preset(
        "github.com/henrhoi/vae-pytorch: K = 128, D = 256, gradient codebook from ±1/K, pixels in [-1, 1]; its loss "
        "divides both codebook terms by the number of pixels, which weighs their means 64 * 256 / 3072",
        HENRHOI_VQVAE,
    ),
    "vqvae-pixelcnn": Preset(
        "github.com/henrhoi/vae-pytorch: its VQ-VAE, then a PixelCNN on the codes",
        HENRHOI_VQVAE,
        {"prior": "pixelcnn", "lr": "1e-3", "epochs": 30, "patience": 5},
    ),
    "vqvae-gated-pixelcnn": Preset(
        "github.com/henrhoi/vae-pytorch: its VQ-VAE, then a Gated PixelCNN on the codes",
        HENRHOI_VQVAE | {"lr": "8e-4", "batch_size": 64, "epochs": 30},
        {"prior": "gated-pixelcnn", "lr": "8e-4", "batch_size": 64, "epochs": 30, "patience": 5},
    ),
    "vae-2d-1": Preset("github.com/henrhoi/vae-pytorch, 2-D VAE, data set 1", VAE_2D | {"dataset": "gauss2d set=1"}),
    "vae-2d-2": Preset("github.com/henrhoi/vae-pytorch, 2-D VAE, data set 2", VAE_2D | {"dataset": "gauss2d set=2"}),
    "vae-cifar10": Preset(
        "github.com/henrhoi/vae-pytorch, image VAE, 16 latents", IMAGE_VAE | {"dataset": "cifar10", "epochs": 50}
    ),
    "vae-svhn": Preset(
        "github.com/henrhoi/vae-pytorch, image VAE, 16 latents", IMAGE_VAE | {"dataset": "svhn", "epochs": 20}
    ),
    "vlae-cifar10": Preset(
        "github.com/henrhoi/vae-pytorch, VAE with an autoregressive-flow prior (the prior half of 1611.02731)",
        IMAGE_VAE | {"dataset": "cifar10", "prior": "made-flow", "epochs": 30},
    ),
    "vlae-svhn": Preset(
        "github.com/henrhoi/vae-pytorch, VAE with an autoregressive-flow prior (the prior half of 1611.02731)",
        IMAGE_VAE | {"dataset": "svhn", "prior": "made-flow", "epochs": 30},
    ),
    "dvq-vqvae": Preset(
        f"{DVQ_SOURCE}: K = 512, D = 64, gradient codebook after k-means, its loss times 10, half of Sonnet's MSE / "
        "variance; ours stops at 98 of its epochs, those of its picture, early in its rate's 1.2 million steps",
        DVQ | {"bottleneck": "vq num_codes=512 code_dim=64 codebook=gradient init=kmeans revive=0 beta=0.25 weight=10"},
    ),
    "dvq-gumbel": Preset(
        f"{DVQ_SOURCE}: Gumbel-Softmax on the same nets; its KL weight, 5e-4 on the mean over the 8x8 codes beside a "
        f"mean over 3,072 dimensions, is 0.024 on their sum (the bound's is 1). {DVQ_LENGTH}",
        DVQ_GUMBEL | {"kl_weight": "quarter-cosine:0:0.024:5000"},
    ),
    "dvq-dalle": Preset(
        f"{DVQ_SOURCE} with DALL-E's objective (2102.12092): dVAE nets of 64, 4x4 codes, logit-Laplace pixels, and the "
        "KL, summed over codes, weighed up to 6.6 before all is divided by the dimensions, as reduction=mean does "
        "(192 to a code here as there); DALL-E has nets of 256, K = 8,192, a rate from 1e-4, averaged weights, no "
        f"mirroring. {DVQ_LENGTH}",
        DVQ_GUMBEL | {"nets": "dalle", "likelihood": "logit-laplace", "kl_weight": "quarter-cosine:0:6.6:5000"},
    ),
    "probabilistic-1": Preset(
        EXPERIMENT + "1, baseline: the nearest code",
        PROBABILISTIC | {"bottleneck": "deterministic init=normal", "entropy_scale": 0.0},
    ),
    "probabilistic-2.1": Preset(
        EXPERIMENT + "2.1: ten categorical samples averaged (1805.11063), prior and entropy as means over latents",
        ROY
        | {"bottleneck": "categorical init=normal num_samples=10 average_samples=yes", "entropy_scale": 0.0}
        | {"sum_over_latents": False},
    ),
    "probabilistic-2.2": Preset(EXPERIMENT + "2.2: 2.1 with the entropy term", ROY | {"sum_over_latents": False}),
    "probabilistic-2.3": Preset(EXPERIMENT + "2.3: 2.2 summed over latents, the bound's own scale", ROY),
    "probabilistic-2.4": Preset(
        EXPERIMENT + "2.4: 2.3 with the prior's gradient to the encoder", ROY | {"stop_gradient_for_prior": False}
    ),
    "probabilistic-2.5": Preset(
        EXPERIMENT + "2.5: 2.2 with a flow on the simplex, trained from step 5,000 with the encoder frozen",
        ROY
        | {
            "bottleneck": "categorical init=normal num_samples=10 average_samples=yes beta=0.05 iaf_flows=1",
            "sum_over_latents": False,
            "iaf_startup_steps": 5_000,
            "stop_training_encoder_after_startup": True,
        },
    ),
    "probabilistic-3": Preset(EXPERIMENT + "3: Gumbel-Softmax, ten samples each decoded", GUMBEL),
    "probabilistic-4.1": Preset(EXPERIMENT + "4.1: 3 with a flow on the simplex, all trained together", GUMBEL_IAF),
    "probabilistic-4.2.1": Preset(
        EXPERIMENT + "4.2.1: the flow trains from step 5,000, the encoder too",
        GUMBEL_IAF | {"iaf_startup_steps": 5_000},
    ),
    "probabilistic-4.2.2": Preset(
        EXPERIMENT + "4.2.2: the flow trains from step 5,000, the encoder no longer",
        GUMBEL_IAF | {"iaf_startup_steps": 5_000, "stop_training_encoder_after_startup": True},
    ),
}


class OneLineErrors(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, as every other error does, instead of its usage."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """The command line, made from the fields of `Config`. Only what is typed appears in its result."""
    cli = OneLineErrors(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {name: cli.add_argument_group(name) for name in GROUPS}
    for f in dataclasses.fields(Config):
        meta = f.metadata
        flag = "--" + f.name.replace("_", "-")
        shown = "" if f.default is None or isinstance(f.default, bool) else f" (default: {f.default})"
        keywords: dict[str, Any] = {"help": (meta["help"] + shown).replace("%", "%%")}
        if f.type in (bool, bool | None):
            keywords["action"] = argparse.BooleanOptionalAction
        elif f.name in SLOT_FIELDS:
            keywords |= {"nargs": "+", "metavar": meta["metavar"]}
        else:
            keywords |= {"metavar": meta["metavar"], "choices": meta["choices"]}
        groups[meta["group"]].add_argument(flag, **keywords)
    return cli


def configure(given: dict[str, Any], *, resumed: Config | None = None, stage_one: Config | None = None) -> Config:
    """The run's settings: defaults, then the preset's, then what was typed; each checked, with its flag's name.

    Of the settings of a run that is `resumed`, only those marked `on_resume` may change. A prior for the codes of
    `stage_one` takes its model and data from there.
    """
    settings = {key: _value(key, value) for key, value in given.items()}
    if resumed is not None:
        return _resumed(resumed, settings)
    if stage_one is not None:
        return _stage_two(stage_one, settings)
    preset = settings.get("preset")
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset {preset}: no such name{near_misses(preset, PRESETS)}; known: {', '.join(PRESETS)}")
    published = {key: _value(key, value) for key, value in PRESETS[preset].settings.items()} if preset else {}
    for key in SLOT_FIELDS:  # options beside the preset's member add to those of the preset
        if key in settings and key in published and settings[key].name == published[key].name:
            settings[key] = Choice(settings[key].name, published[key].options | settings[key].options)
    defaults = {key: _value(key, Config.__dataclass_fields__[key].default) for key in SLOT_FIELDS}
    config = Config(**(defaults | published | settings))
    for key, (slot_name, name) in SHORTHANDS.items():
        value = getattr(config, key)
        if value is not None:
            choice = getattr(config, slot_name)
            setattr(config, slot_name, Choice(choice.name, choice.options | {name: value}))
    _check(config)
    return config


def _resumed(base: Config, settings: dict[str, Any]) -> Config:
    for key, value in settings.items():
        field = Config.__dataclass_fields__[key]
        if not field.metadata["on_resume"] and value != getattr(base, key):
            flag = "--" + key.replace("_", "-")
            may = ", ".join(
                "--" + f.name.replace("_", "-") for f in dataclasses.fields(Config) if f.metadata["on_resume"]
            )
            raise UserError(f"{flag} {value}: a resumed run keeps its settings; only these may change: {may}")
    config = dataclasses.replace(base, **settings)
    _check(config)
    return config


FROM_STAGE_ONE = (
    "dataset",
    "nets",
    "bottleneck",
    "likelihood",
    "image_size",
    "codes",
    "code_dim",
    "beta",
    "gradient",
    "temperature",
    "hidden",
)


def _stage_two(stage_one: Config, settings: dict[str, Any]) -> Config:
    for key in FROM_STAGE_ONE:
        if key in settings:
            raise UserError(f"--{key.replace('_', '-')} {settings[key]}: the model and data come from --checkpoint")
    if settings.get("augment", "none") != "none":
        raise UserError(f"--augment {settings['augment']}: a prior trains on codes, not pictures; use --augment none")
    if "prior" not in settings:
        raise UserError("--checkpoint: name the prior to train on its codes, such as --prior pixelcnn")
    kept = {key: getattr(stage_one, key) for key in (*FROM_STAGE_ONE, "data_dir", "limit")}
    config = Config(**(kept | settings))
    _check(config)
    return config


def _value(key: str, value: Any) -> Any:
    """A setting given as text, as words (slots) or already as a value, in its declared type."""
    if key not in Config.__dataclass_fields__:
        raise UserError(f"unknown setting '{key}'{near_misses(key, Config.__dataclass_fields__)}")
    flag = "--" + key.replace("_", "-")
    if key in SLOT_FIELDS:
        return (
            value
            if isinstance(value, Choice)
            else Choice.parse(flag, value.split() if isinstance(value, str) else value)
        )
    declared = Config.__dataclass_fields__[key].type
    kind = next((t for t in typing.get_args(declared) if t is not type(None)), declared)  # int of int | None
    return value if value is None else convert(value, kind, f"{flag} {value}")


def _check(config: Config) -> None:
    for key in (
        "codes",
        "code_dim",
        "hidden",
        "prior_flows",
        "image_size",
        "limit",
        "epochs",
        "max_steps",
        "batch_size",
        "log_every",
        "patience",
    ):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"--{key.replace('_', '-')} {value}: must be at least 1")
    for key in ("beta", "weight_decay", "free_bits", "max_minutes", "entropy_scale", "iaf_startup_steps"):
        value = getattr(config, key)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{key.replace('_', '-')} {value}: must be a number from 0 up")
    if config.name is not None and not re.fullmatch(r"[\w.+=-]+", config.name):
        raise UserError(f"--name {config.name}: may hold letters, digits and . _ + = - only")
    if config.name in (".", ".."):
        raise UserError(f"--name {config.name}: must be the name of a folder")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must be from 0 to {2**63 - 1}")
    checkpoint_interval(config.checkpoint_every)


def checkpoint_interval(text: str) -> tuple[int | None, float | None]:
    """`--checkpoint-every` as (steps, None) or (None, seconds)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s?)", text)
    if not match or float(match[1]) == 0 or (not match[2] and "." in match[1]):
        raise UserError(f"--checkpoint-every {text}: must be steps such as 500, or seconds such as 300s")
    return (None, float(match[1])) if match[2] else (int(match[1]), None)


def default_name(config: Config) -> str:
    """`vqvae-cifar10`, `sonnet-mnist`, `gumbel-digits` ...: the preset, or the bottleneck and the data."""
    if config.preset:
        return config.preset
    if config.checkpoint:
        return f"{Path(config.checkpoint).resolve().parent.name}-{config.prior.name}"
    bottleneck = config.bottleneck.name
    return f"{bottleneck + 'vae' if bottleneck == 'vq' else bottleneck}-{config.dataset.name}"


def describe_presets() -> str:
    """What `--list presets` prints: each preset as the flags it stands for, and its source."""
    blocks = []
    for name, preset in PRESETS.items():
        stages = [settings for settings in (preset.settings, preset.prior) if settings]
        flags = [" ".join(_flag(key, value) for key, value in stage.items()) for stage in stages]
        blocks.append("\n    then ".join([f"--preset {name}\n    {preset.source}\n    {flags[0]}", *flags[1:]]))
    return "\n\n".join(blocks)


def _flag(key: str, value: Any) -> str:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"
