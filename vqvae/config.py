"""The settings of a run: one dataclass, filled from the command line, a preset, or an earlier run.

Nothing here imports torch, so that `--help` answers at once. Options of members (`--bottleneck vq decay=0.9`) are not
listed here: the registry reads them from the members.
"""

import argparse
import dataclasses
import os
import re
import tempfile
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from vqvae.errors import OptionError, UserError, near_misses, one_line, shown
from vqvae.presets import PRESETS
from vqvae.registry import Choice, Passes, Range, Sides, Size, Slot, fields_of, refuse_idle, resolve
from vqvae.schedules import RateText

Positive = Annotated[int, Range(1)]


@dataclass(frozen=True)
class Interval:
    """The rule of `checkpoint_every`: steps ("500") or seconds ("300s")."""

    def problem(self, text: str) -> str | None:
        return None if interval(text) else "must be steps such as 500, or seconds such as 300s"

    def __str__(self) -> str:
        return "(steps, or seconds with an s)"


def interval(text: str) -> tuple[int | None, float | None] | None:
    """`500` as (500, None), `300s` as (None, 300.0), anything else as None."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)(s?)", text)
    if not match or float(match[1]) == 0 or (not match[2] and "." in match[1]):
        return None
    return (None, float(match[1])) if match[2] else (int(match[1]), None)


@dataclass(frozen=True)
class Location:
    """The rule of a path. `write` says whether a file or a folder is to be written there."""

    write: Literal["", "file", "folder"] = ""

    def problem(self, text: str) -> str | None:
        try:
            path = Path(text).expanduser()
            path.stat()
        except FileNotFoundError:
            pass
        except RuntimeError:
            return f"no user is called {shown(text[1:].partition('/')[0])}; write the path without ~"
        except (OSError, ValueError) as problem:
            return f"cannot be used ({one_line(problem)}); name another place"
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
            return f"has a name of more than {LONGEST_NAME} bytes; shorten it"
        return self._unwritable(path) if self.write else None

    def _unwritable(self, path: Path) -> str | None:
        if self.write == "file" and path.is_dir():
            return "is a folder; name a file"
        folder = path.parent if self.write == "file" else path
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            return f"{'is' if folder == path else f'{folder} is'} a file and not a folder; name another place"
        try:
            with tempfile.TemporaryDirectory(prefix=".vqvae-", dir=folder):
                return None
        except OSError as problem:
            return f"{folder} cannot be written to ({one_line(problem)}); name another place"


TEST = "test"  # the value of `validation` that chooses models on the test split


def validation_share(text: str) -> float | None:
    """The value of `validation`: the share of the training images, or None for `test`. Raises ValueError."""
    if text == TEST:
        return None
    share = float(text)
    if not 0 < share < 1:
        raise ValueError
    return share


def _is_validation(text: str) -> bool:
    try:
        validation_share(text)
    except ValueError:
        return False
    return True


LONGEST_NAME = 255  # bytes, on the usual file systems
MOST_IN_RUN_NAME = 200  # bytes: a second stage adds -prior, and files add their endings


def _is_name(text: str) -> bool:
    fits = len(text.encode()) <= MOST_IN_RUN_NAME
    return fits and bool(re.fullmatch(r"[\w.+=-]+", text)) and text not in (".", "..") and text[0] != "-"


def _field(default: Any, group: str, *, metavar: str | None = None, on_resume: bool = False) -> Any:
    """A setting; `on_resume` marks those that a resumed run may change."""
    return dataclasses.field(default=default, metadata={"group": group, "metavar": metavar, "on_resume": on_resume})


def _slot(default: str) -> Any:
    return _field(Choice.parse("", default.split()), "model")


@dataclass
class Config:
    """The settings of one run."""

    dataset: Annotated[Choice, "what to learn from: digits, photos (built in), mnist, cifar10, svhn, folder ..."] = (
        _slot("digits")
    )
    bottleneck: Annotated[Choice, "features to latent, such as vq codebook=ema decay=0.99"] = _slot("vq")
    nets: Annotated[Choice, "encoder and decoder"] = _slot("sonnet")
    likelihood: Annotated[Choice, "what the decoder's output means: mse, bernoulli, discretized-logistic ..."] = _slot(
        "mse"
    )
    prior: Annotated[Choice, "distribution over the latent; with --checkpoint, the stage-two prior to train"] = _slot(
        "uniform"
    )
    objective: Annotated[Choice, "what training minimizes, such as elbo reduction=sum"] = _slot("elbo")
    preset: Annotated[str | None, "a published set-up, see --list presets; other flags override it"] = _field(
        None, "model"
    )
    checkpoint: Annotated[str | None, Location(), "train --prior on the codes of this trained model (stage two)"] = (
        _field(None, "model", metavar="PATH")
    )
    init_from: Annotated[
        str | None,
        Location(),
        "start from the nets and codes of this trained model: a run, an exported folder, or a VQModel of diffusers",
    ] = _field(None, "model", metavar="PATH")
    conditional: Annotated[bool, "condition the prior on the labels"] = _field(False, "model")

    data_dir: Annotated[
        str,
        Location(),
        "folder of the data's files; for folder, npz, parquet and webdataset: the images' folder or file",
    ] = _field("data", "data", metavar="DIR", on_resume=True)
    image_size: Annotated[
        Size | None, Sides(Range(1, 4096)), "scale images to this many pixels a side, or to a height and width: 96x128"
    ] = _field(None, "data", metavar="PIXELS")
    limit: Annotated[int | None, Range(1), "use at most this many images of each split, for quick looks"] = _field(
        None, "data", metavar="N"
    )

    shuffle: Annotated[
        Literal["full", "blocks"],
        "order of the training images: full, or blocks of 4 MB that a slow disk reads at once, 64 of them mixed",
    ] = _field("full", "data")
    data_shards: Annotated[
        Positive, "parts of the training images; each machine converts, stores and reads only its processes' parts"
    ] = _field(1, "data", metavar="N", on_resume=True)
    validation: Annotated[
        str,
        Passes(_is_validation, "a share above 0 and below 1, or test"),
        "share of the training images to hold out, unless the data have a validation split, such as a folder val: it "
        "is evaluated after each epoch and chooses best.pt, and the test split is evaluated at the end; test: choose "
        "on the test split, as some published protocols do",
    ] = _field("0.1", "data", metavar="SHARE")

    epochs: Annotated[Positive, "passes over the training data"] = _field(20, "training", metavar="N", on_resume=True)
    max_steps: Annotated[int | None, Range(1), "stop after this many updates, whatever --epochs says"] = _field(
        None, "training", metavar="N", on_resume=True
    )
    max_minutes: Annotated[float | None, Range(above=0), "stop after this many minutes, evaluation included"] = _field(
        None, "training", metavar="MINUTES", on_resume=True
    )
    batch_size: Annotated[Positive, "images per update, over all processes"] = _field(128, "training", metavar="N")
    accumulate: Annotated[
        Positive, "split each process's batch into this many parts, one after another: less memory, the same updates"
    ] = _field(1, "training", metavar="N", on_resume=True)
    lr: Annotated[
        str,
        RateText(low=0),
        "learning rate: a number, a schedule such as cosine:3e-4:1e-6 (to the end of the run) or "
        "linear:0:3e-4:500,cosine:3e-4:0:20000, or plateau:1e-3:0.5:3, which is halved after more than 3 epochs "
        "without a better held-out metric",
    ] = _field("cosine:1e-3:1e-5", "training", metavar="RATE")
    clip: Annotated[
        float | None, Range(above=0), "scale the gradient of an update down to this norm where it is larger"
    ] = _field(None, "training", metavar="NORM")
    ema_weights: Annotated[
        float,
        Range(0, below=1),
        "evaluate and save an average of the weights over updates, with this decay, such as 0.999; 0: the last weights",
    ] = _field(0.0, "training", metavar="DECAY")
    augment: Annotated[
        Literal["none", "crop-flip"],
        "crop-flip: random crops after 4 pixels of reflected border, every second one mirrored",
    ] = _field("none", "training")
    weight_decay: Annotated[float, Range(0), "decoupled weight decay (AdamW) on convolution and linear weights"] = (
        _field(0.0, "training", metavar="DECAY")
    )
    optimizer: Annotated[
        Literal["auto", "muon", "adamw"],
        "muon: Muon for hidden layers' weights, else AdamW; auto: muon, but adamw for PixelCNNs on stored codes",
    ] = _field("auto", "training")
    on_nan: Annotated[
        Literal["stop", "skip"], "where the loss or the gradient is not finite: stop, or skip up to 10 updates in a row"
    ] = _field("stop", "training", on_resume=True)
    patience: Annotated[
        int | None, Range(1), "stop after so many epochs without a better metric on the validation split"
    ] = _field(None, "training", metavar="EPOCHS", on_resume=True)
    seed: Annotated[
        int, Range(0, 2**63 - 1), "seed of weights, order and noise; one seed gives one run, bit for bit on a CPU"
    ] = _field(0, "training", metavar="N")

    name: Annotated[
        str | None,
        Passes(_is_name, "a name of letters, digits and . _ + = -, at most 200 bytes long and not beginning with -"),
        "name of the run; default: the model and data, such as vqvae-cifar10",
    ] = _field(None, "run")
    log_dir: Annotated[
        str, Location("folder"), "folder for logs/<run>: config, metrics, TensorBoard events, checkpoints"
    ] = _field("logs", "run", metavar="DIR")
    plot_dir: Annotated[str, Location("folder"), "folder for plots/<run>: images"] = _field(
        "plots", "run", metavar="DIR", on_resume=True
    )
    log_every: Annotated[Positive, "log training metrics every so many steps"] = _field(
        100, "run", metavar="STEPS", on_resume=True
    )
    checkpoint_every: Annotated[
        str, Interval(), "save within epochs too: every so many steps (500) or seconds (300s)"
    ] = _field("300s", "run", metavar="WHEN", on_resume=True)

    save_every: Annotated[
        float,
        Range(0),
        "after 20 epochs, draw and save only this many seconds after the last time, and at the end; 0: every epoch",
    ] = _field(1.0, "run", metavar="SECONDS", on_resume=True)

    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], "where to compute; auto: the first available of cuda, mps, cpu"
    ] = _field("auto", "machine", on_resume=True)
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        "bf16 trains the nets in bfloat16; distances, losses and held-out metrics stay fp32 (with PyTorch's TF32 "
        "convolutions on GPUs that have it); auto: bf16 on a GPU that computes in it, otherwise fp32",
    ] = _field("auto", "machine")
    compile: Annotated[
        bool | None,
        "torch.compile the nets: a slower start, then faster (default: on a GPU, in runs of 2,000 steps or more)",
    ] = _field(None, "machine", on_resume=True)

    @property
    def held_out(self) -> Literal["validation", "test"]:
        """The split that is evaluated after each epoch, and by which models are chosen."""
        return "test" if validation_share(self.validation) is None else "validation"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as config.json and checkpoints store them."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_dict`; raises `UserError` for settings of another version."""
        unknown = sorted(set(values) - set(FIELDS))
        if unknown:
            raise UserError(f"this version does not know the settings {', '.join(unknown)}")
        settings: dict[str, Any] = {
            k: Choice(v["name"], v["options"]) if isinstance(v, dict) else v for k, v in values.items()
        }
        settings = {"validation": TEST, "optimizer": "adamw"} | settings  # those of a run of an earlier version
        if settings.get("image_size") is not None:
            settings["image_size"] = Size(settings["image_size"])
        return cls(**settings)


def _plain(value: Any) -> Any:
    """A setting as files store it."""
    if isinstance(value, Choice):
        return {"name": value.name, "options": value.options}
    return value.plain() if isinstance(value, Size) else value


FIELDS = fields_of(Config)
SLOTS = tuple(name for name, option in FIELDS.items() if option.kind is Choice)
PATHS = tuple(name for name, option in FIELDS.items() if any(isinstance(rule, Location) for rule in option.rules))
ON_RESUME = tuple(f.name for f in dataclasses.fields(Config) if f.metadata["on_resume"])


class Shorthand(NamedTuple):
    """A flag that stands for an option of the chosen member."""

    slot: str
    option: str
    metavar: str
    help: str


SHORTHANDS = {
    "codes": Shorthand("bottleneck", "num_codes", "K", "codebook size K"),
    "code_dim": Shorthand("bottleneck", "code_dim", "D", "code dimension D"),
    "beta": Shorthand("bottleneck", "beta", "WEIGHT", "weight of the commitment loss"),
    "gradient": Shorthand("bottleneck", "gradient", "HOW", "straight-through or rotation"),
    "resize": Shorthand("dataset", "resize", "HOW", "images of another shape: crop, pad or stretch"),
    "temperature": Shorthand("bottleneck", "temperature", "T", "of relaxed codes, a number or a schedule as for --lr"),
    "hidden": Shorthand("nets", "hidden", "N", "width of the nets"),
    "prior_flows": Shorthand("prior", "flows", "N", "flows of an autoregressive-flow prior"),
    "kl_weight": Shorthand("objective", "kl_weight", "WEIGHT", "of log q(z|x) - log p(z), a number or a schedule"),
}


def as_typed(problem: OptionError, given: Mapping[str, Any]) -> OptionError:
    """The error, about the shorthand in `given` that stands for its option, if there is one."""
    for name, short in SHORTHANDS.items():
        if name in given and (short.slot, short.option) == (problem.slot, problem.option):
            renamed = OptionError(name, given[name], problem.problem)
            renamed.chosen = problem.chosen
            return renamed
    return problem


class Fresh(NamedTuple):
    """A run that starts from nothing."""


class Initialized(NamedTuple):
    """A run whose autoencoder starts from the weights of a trained one."""

    content: dict[str, Any]  # of its checkpoint or folder


class Resumed(NamedTuple):
    """A run that goes on from its checkpoint."""

    folder: Path
    content: dict[str, Any]  # of the checkpoint


class StageTwo(NamedTuple):
    """A run that trains a prior on the codes of a trained autoencoder."""

    path: str  # of its checkpoint
    content: dict[str, Any]


Start = Fresh | Initialized | Resumed | StageTwo


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser a flag for every setting and shorthand. Only flags that are typed appear in its result."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    groups = {g: parser.add_argument_group(g) for g in dict.fromkeys(f.metadata["group"] for f in fields.values())}
    for name, option in FIELDS.items():
        flag, meta = _flag(name), fields[name].metadata
        shown = "" if option.default is None or option.kind is bool else f" (default: {option.default})"
        keywords: dict[str, Any] = {"help": (option.help + shown).replace("%", "%%"), "default": argparse.SUPPRESS}
        if option.kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif option.kind is Choice:
            keywords |= {"nargs": "+", "metavar": ("NAME", "key=value")}
        elif typing.get_origin(option.kind) is Literal:
            keywords["metavar"] = f"{{{','.join(typing.get_args(option.kind))}}}"
        else:
            keywords["metavar"] = meta["metavar"]
        groups[meta["group"]].add_argument(flag, **keywords)
    group = parser.add_argument_group("shorthands for options of the chosen members")
    for name, short in SHORTHANDS.items():
        help = f"{short.help} (--{short.slot} ... {short.option}={short.metavar})"
        group.add_argument(_flag(name), metavar=short.metavar, help=help, default=argparse.SUPPRESS)


class Given(NamedTuple):
    """The settings that were typed for a run, and the tables of the slots' members."""

    settings: Mapping[str, Any]  # in their types
    short: Mapping[str, Any]  # values of shorthands, as they were typed
    slots: Mapping[str, Slot]

    def resolve(self, chosen: Mapping[str, Any]) -> dict[str, Choice]:
        """Every slot's choice with its shorthands folded in and all options checked; errors name what was typed."""
        choices = {}
        for slot in SLOTS:
            choice = chosen.get(slot, FIELDS[slot].default)
            typed = self.settings[slot].options if slot in self.settings else {}
            mine = {name: s for name, s in SHORTHANDS.items() if s.slot == slot and name in self.short}
            for name, s in mine.items():
                if s.option in typed:
                    other = f"--{slot} {choice.name} {s.option}={typed[s.option]}"
                    raise OptionError(name, self.short[name], f"is given twice, also as {other}; keep one")
            options = choice.options | {s.option: self.short[name] for name, s in mine.items()}
            given = [*typed, *(s.option for s in mine.values())]
            try:
                choices[slot] = resolve(self.slots[slot], Choice(choice.name, options), given)
                refuse_idle(self.slots[slot], choices[slot], given)
                drop = choices[slot].options["label_drop"] if "label_drop" in given else 0
                if drop and not chosen.get("conditional"):
                    problem = "has no effect without --conditional; leave it out"
                    raise OptionError("label_drop", drop, problem, owner=choice.name, slot=slot)
            except OptionError as problem:
                for name, s in mine.items():
                    if problem.option == s.option:
                        reason = problem.problem.replace("unknown option", f"--{slot} {choice.name} has no {s.option}")
                        raise OptionError(name, self.short[name], reason) from None
                raise
        return choices


def configure(given: Mapping[str, Any], start: Start, slots: Mapping[str, Slot]) -> Config:
    """The settings of a run: what was typed, over the preset's, over the defaults, each checked.

    `given` maps settings and shorthands to text, words (slots) or values. Members' options are resolved against the
    tables of `slots`. A resumed run may change only the settings marked `on_resume`. Stage two takes its model and data
    from stage one. Raises `OptionError` that names the setting.
    """
    settings = {key: value for key, value in typed(given).items() if key not in SHORTHANDS}
    all_given = Given(settings, {key: given[key] for key in SHORTHANDS if key in given}, slots)
    match start:
        case Resumed(content=content):
            config = _resumed(Config.from_dict(content["config"]), all_given)
        case StageTwo(content=content):
            config = _new(_stage_two(Config.from_dict(content["config"]), all_given))
        case Initialized(content=content):
            config = _new(_initialized(Config.from_dict(content["config"]), all_given))
        case Fresh():
            config = _new(_fresh(all_given))
    name = config.dataset.name
    if settings.get("data_dir", Config.data_dir) != Config.data_dir and name in slots["dataset"].built_in:
        raise OptionError("data_dir", config.data_dir, f"the data set {name} reads no files; leave it out")
    return config


def typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check each setting by itself and convert it to its type. Shorthands stay as they are."""
    return {key: value if key in SHORTHANDS else _typed(key, value) for key, value in given.items()}


def _new(config: Config) -> Config:
    """Check that the folders of a new run can be made, even the default ones; returns the settings."""
    for key in ("log_dir", "plot_dir"):
        FIELDS[key].check(getattr(config, key))
    return config


def _fresh(given: Given) -> Config:
    chosen = _over_preset(given.settings)
    return Config(**(chosen | given.resolve(chosen)))


def _over_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings over those of the preset that they name, if any."""
    preset = settings.get("preset")
    if preset is not None and preset not in PRESETS:
        problem = f"no such name{near_misses(preset, PRESETS)}; known: {', '.join(PRESETS)}"
        raise OptionError("preset", preset, problem)
    published = {key: _typed(key, value) for key, value in PRESETS[preset].settings.items()} if preset else {}
    return _merge(published, settings)


SIZES = ("num_codes", "code_dim")  # bottleneck options that must equal those of the model to start from


def _initialized(first: Config, given: Given) -> Config:
    """The nets, the likelihood and the sizes of the bottleneck are those of the model to start from."""
    kept = {key: resolve(given.slots[key], getattr(first, key)) for key in ("nets", "likelihood", "bottleneck")}
    chosen = _merge(kept, _over_preset(given.settings))
    chosen |= given.resolve(chosen)
    for key in ("init", "spread"):
        if "bottleneck" in given.settings and key in given.settings["bottleneck"].options:
            problem = "has no effect, because the codes of --init-from are the first ones; leave it out"
            name, options = chosen["bottleneck"]
            raise OptionError(key, options[key], problem, owner=name, slot="bottleneck")
    for slot, there in kept.items():
        here = chosen[slot]
        if here.name != there.name:
            problem = f"the model of --init-from has {there.name}; leave it out"
            raise OptionError(slot, here.name, problem)
        for key, value in there.options.items():
            if here.options[key] != value and (slot != "bottleneck" or key in SIZES):
                problem = f"the model of --init-from has {key}={value}; leave it out"
                raise OptionError(key, here.options[key], problem, owner=here.name, slot=slot)
    return Config(**chosen)


def _merge(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` override `base`. If both choose the same member of a slot, its options are merged."""
    merged = {**base, **settings}
    for key in SLOTS:
        if key in base and key in settings and base[key].name == settings[key].name:
            merged[key] = Choice(base[key].name, base[key].options | settings[key].options)
    return merged


def _resumed(base: Config, given: Given) -> Config:
    stored = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    wanted = _merge(stored, given.settings)
    wanted |= given.resolve(wanted)
    options = ((name, SHORTHANDS[name]) for name in given.short)
    changed = [name for name, s in options if wanted[s.slot].options[s.option] != stored[s.slot].options.get(s.option)]
    changed += [key for key in given.settings if key not in ON_RESUME and wanted[key] != stored[key]]
    if changed:
        problem = f"a resumed run keeps its settings; only these may change: {', '.join(map(_flag, ON_RESUME))}"
        raise OptionError(changed[0], {**given.settings, **given.short}[changed[0]], problem)
    return Config(**wanted)


FROM_STAGE_ONE = ("dataset", "nets", "bottleneck", "likelihood", "objective", "image_size")


def _stage_two(first: Config, given: Given) -> Config:
    settings = given.settings
    for key in (*FROM_STAGE_ONE, "preset", "init_from"):
        if key in settings:
            raise OptionError(key, settings[key], "the model and data come from --checkpoint; leave it out")
    for key, value in given.short.items():
        if SHORTHANDS[key].slot != "prior":
            raise OptionError(key, value, "the model and data come from --checkpoint; leave it out")
    if settings.get("augment", "none") != "none":
        raise OptionError("augment", settings["augment"], "a prior trains on codes, not images; leave it out")
    if "prior" not in settings:
        problem = "name the prior to train on its codes, such as --prior pixelcnn"
        raise OptionError("checkpoint", settings.get("checkpoint"), problem)
    stored = {key: getattr(first, key) for key in (*FROM_STAGE_ONE, "data_dir", "limit", "validation")}
    chosen = stored | dict(settings)
    return Config(**(chosen | given.resolve(chosen)))


def _typed(key: str, value: Any) -> Any:
    """A setting given as text, as words (slots) or as a value, in its declared type and checked."""
    if key not in FIELDS:
        raise OptionError(key, value, f"unknown setting{near_misses(key, FIELDS)}")
    if FIELDS[key].kind is not Choice:
        converted = FIELDS[key].convert(value)
        return os.path.expanduser(converted) if key in PATHS and converted else converted
    if isinstance(value, Choice):
        return value
    return Choice.parse(key, value.split() if isinstance(value, str) else value)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The words of a command line that gives these settings."""
    words = list[str]()
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(_flag(name) if value else f"--no-{name.replace('_', '-')}")
        else:
            words += [_flag(name), *(str(value).split() if isinstance(value, Choice) else [str(value)])]
    return words


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def default_name(config: Config) -> str:
    """`vqvae-cifar10`, `sonnet-mnist`, `gumbel-digits` ...: the preset, or the bottleneck and the data."""
    if config.preset:
        return config.preset
    if config.checkpoint:
        path = Path(config.checkpoint).resolve()
        first = re.sub(r"[^\w.+=-]", "-", (path if path.is_dir() else path.parent).name)[:40].lstrip("-")
        return f"{first or 'codes'}-{config.prior.name}"
    bottleneck = config.bottleneck.name
    return f"{bottleneck + 'vae' if bottleneck == 'vq' else bottleneck}-{config.dataset.name}"
