"""The entries of checkpoints and exported models: what each must be, so that a damaged or foreign one builds no model.

Each check raises `UserError`, which `prefixed` begins with the file's name.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqvae.config import FIELDS as SETTINGS
from vqvae.config import PATHS
from vqvae.errors import UserError, printable, shown
from vqvae.evaluation import MOST_POINTS
from vqvae.registry import Choice, Size

# settings that older checkpoints lack; `Config.from_dict` fills them in
ADDED = {
    "init_from", "validation", "accumulate", "clip", "ema_weights", "optimizer", "save_every", "shuffle", "data_shards"
}  # fmt: skip
SPLITS = ("train", "validation", "test")


@contextlib.contextmanager
def prefixed(path: Path) -> Iterator[None]:
    """Begin errors with the file's name."""
    try:
        yield
    except UserError as problem:
        raise UserError(f"{path}: {problem}; the file is not as vqvae wrote it") from None


def _need(good: bool, what: str) -> None:
    if not good:
        raise UserError(what)


def _count(value: Any, what: str) -> None:
    _need(type(value) is int and 0 <= value < 2**63, f"its {what} must be a whole number")


def _text(value: Any, what: str, longest: int = 1000) -> str:
    """The text, printable."""
    _need(type(value) is str and len(value) <= longest, f"its {what} must be a text of at most {longest:,} characters")
    return printable(value)


def _entries(value: Any, what: str) -> dict[str, Any]:
    named = type(value) is dict and all(type(key) is str and len(key) <= 500 for key in value)
    _need(named, f"its {what} must be a table of names and values")
    return value


def check_description(content: Mapping[str, Any]) -> dict[str, Any]:
    """Check the entries that describe a model; returns those that change: names become printable, the run's plain."""
    kind = _text(content["kind"], "kind")
    _need(kind in ("autoencoder", "prior"), "its kind must be autoencoder or prior")
    _count(content["step"], "step")
    config = _checked_config(content["config"])
    data = dict(_entries(content["data"], "data"))
    if missing := {"name", "shape", "variance", "classes", "note"} - set(data):
        raise UserError(f"its data lack {', '.join(sorted(missing))}")
    shape, variance, classes = data["shape"], data["variance"], data["classes"]
    _need(
        type(shape) in (list, tuple) and len(shape) == 3
        and all(type(size) is int and 1 <= size <= most for size, most in zip(shape, (256, 4096, 4096), strict=True)),
        "its data.shape must be the channels, rows and columns of an image of at most 4096x4096",
    )  # fmt: skip
    _need(type(variance) in (int, float) and 1e-30 <= variance <= 1e30, "its data.variance must be a positive number")
    _need(type(classes) is list and len(classes) <= 2**16, "its data.classes must be a list of names")
    _need(not config["conditional"] or bool(classes), "its prior is conditional, and its data have no classes")
    data |= {key: _text(data[key], f"data.{key}") for key in ("name", "note")}
    data |= {"shape": list(shape), "classes": [_text(name, "data.classes") for name in classes]}
    for key, check in (("examples", _count), ("fingerprint", _text)):
        for split, value in _entries(data.get(key, {}), f"data.{key}").items():
            _need(split in SPLITS, f"its data.{key} must be of the splits {', '.join(SPLITS)}")
            check(value, f"data.{key}")
    return {"kind": kind, "run": _plain_name(content["run"]), "config": config, "data": data}


def _plain_name(value: Any) -> str:
    """A name of a run that can name a folder, made of any text."""
    name = _text(value, "run")
    return re.sub(r"[^\w.+=-]", "-", name)[:50].strip(".-") or "run" if SETTINGS["name"].problem(name) else name


TYPES: dict[Any, tuple[type, ...]] = {
    int: (int,), float: (int, float), bool: (bool,), str: (str,), Size: (int, str),
}  # fmt: skip


def _checked_config(value: Any) -> dict[str, Any]:
    """The settings of a run, all present, in their types and ranges; members and their options are checked later."""
    config = dict(_entries(value, "config"))
    if missing := set(SETTINGS) - set(config) - ADDED:
        raise UserError(f"its config lacks {', '.join(sorted(missing))}")
    if unknown := sorted(set(config) - set(SETTINGS)):
        raise UserError(f"its config has {shown(', '.join(unknown))}, which this version does not know")
    for name, found in config.items():
        option = SETTINGS[name]
        if option.kind is Choice:
            _check_choice(found, name)
        elif not (found is None and option.optional):
            _need(type(found) in TYPES.get(option.kind, (str,)), f"its config.{name} has the wrong type")
            if type(found) is str:
                _text(found, f"config.{name}", 4096)
            if name == "name":
                config[name] = _plain_name(found)
            elif name not in PATHS:  # another machine's, which are not used
                problem = option.problem(found)
                _need(not problem, f"its config.{name}={shown(found)} {problem}")
    return config


def _check_choice(value: Any, slot: str) -> None:
    choice = _entries(value, f"config.{slot}")
    _need(set(choice) == {"name", "options"}, f"its config.{slot} must be a name and options")
    _text(choice["name"], f"config.{slot}")
    for found in _entries(choice["options"], f"config.{slot}").values():
        if type(found) is str:
            _text(found, f"config.{slot}")
        else:
            _need(found is None or type(found) in (bool, int, float), f"its config.{slot} has the wrong type")


def check_state(content: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the entries that only a checkpoint has are what `training` saves."""
    _check_tensors(content["model"], "model")
    _check_tensors(content["objective"], "objective")
    _count(content["epoch"], "epoch")
    _text(content["plots"], "plots", 4096)
    _check_examples(content)
    usage = content["usage"]
    if usage is not None:
        _need(isinstance(usage, Tensor) and usage.ndim == 2, "its usage must be the counts [levels, K] of codes")
        _need(bool((usage >= 0).all() and usage.isfinite().all()), "its usage must be counts")
    _check_posterior(content)
    # entries that a run needs to go on
    for key in ("best_epoch", "best_step", "reductions", "reduced_epoch"):
        if content.get(key) is not None:
            _count(content[key], key)
    best = content.get("best", 0.0)
    _need(type(best) in (int, float) and not math.isnan(best), "its best must be a number")
    for key in ("epoch_means", "window"):
        means = _entries(content.get(key, {"sums": {}, "count": 0}), key)
        _need(set(means) == {"sums", "count"}, f"its {key} must be sums and a count")
        _count(means["count"], key)
        _check_tensors(means["sums"], f"{key}.sums")
    if "trained" in content:
        _check_tensors(content["trained"], "trained")
    if "optimizer" in content:
        _check_optimizer(content["optimizer"], [*content["model"].values(), *content["objective"].values()])


def _check_tensors(value: Any, what: str) -> None:
    tensors = all(isinstance(weight, Tensor) for weight in _entries(value, what).values())
    _need(tensors, f"its {what} must be tensors")


def _check_examples(content: Mapping[str, Any]) -> None:
    examples, about, config = _entries(content["examples"], "examples"), content["data"], content["config"]
    _need(set(examples) == {"images", "labels"}, "its examples must be images and labels")
    images, labels = examples["images"], examples["labels"]
    _need(
        isinstance(images, Tensor) and images.dtype in (torch.uint8, torch.float32) and images.ndim == 4
        and list(images.shape[1:]) == about["shape"] and len(images) > 0 and bool(images.isfinite().all()),
        f"its examples.images must be [N, {', '.join(map(str, about['shape']))}]",
    )  # fmt: skip
    low, high = 0 if config["conditional"] else -1, max(len(about["classes"]), 1)
    _need(
        isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == images.shape[:1]
        and bool((labels >= low).all() and (labels < high).all()),
        f"its examples.labels must be {len(images)} integers from {low} to {high - 1}",
    )  # fmt: skip


def _check_posterior(content: Mapping[str, Any]) -> None:
    """The means of a latent plane, which checkpoints of other models and of earlier versions lack."""
    if content.get("posterior") is None:
        return
    posterior, classes = _entries(content["posterior"], "posterior"), max(len(content["data"]["classes"]), 1)
    _need(set(posterior) == {"means", "labels"}, "its posterior must be means and labels")
    means, labels = posterior["means"], posterior["labels"]
    known = isinstance(means, Tensor) and means.dtype == torch.float32 and means.ndim == 2 and means.shape[1] == 2
    _need(known and 0 < len(means) <= MOST_POINTS, f"its posterior.means must be [N, 2], N at most {MOST_POINTS:,}")
    _need(
        isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == means.shape[:1]
        and bool((labels >= -1).all() and (labels < classes).all()),
        f"its posterior.labels must be {len(means)} integers from -1 to {classes - 1}",
    )  # fmt: skip


def _check_optimizer(value: Any, weights: Iterable[Tensor]) -> None:
    shapes = {weight.shape for weight in weights}
    optimizer = _entries(value, "optimizer")
    _need(set(optimizer) == {"state", "param_groups"}, "its optimizer must be a state and groups")
    state, groups = optimizer["state"], optimizer["param_groups"]
    _need(type(state) is dict and all(type(key) is int for key in state), "its optimizer's state must be by number")
    for entry in state.values():
        for found in _entries(entry, "optimizer's state").values():
            known = isinstance(found, Tensor) and found.is_floating_point() and found.shape in {torch.Size(), *shapes}
            _need(known, "its optimizer's state must be tensors like its weights")
    _need(type(groups) is list, "its optimizer's groups must be a list")
    for group in groups:
        parameters = _entries(group, "optimizer's group").get("params")
        numbers = type(parameters) is list and all(type(number) is int for number in parameters)
        _need(numbers, "its optimizer's groups must be of numbers")
        for found in (found for key, found in group.items() if key != "params"):
            values = found if type(found) is tuple else (found,)
            plain = all(each is None or type(each) in (bool, int, float, str) for each in values)
            _need(plain, "its optimizer's groups have the wrong type")
