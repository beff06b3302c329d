"""Presets of two stages: an autoencoder, and then a prior on its codes."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vqvae import cli
from vqvae.autoencoder import Autoencoder, build_prior
from vqvae.config import Config, as_flags, typed, validation_share
from vqvae.contracts import Prior
from vqvae.data import Dataset
from vqvae.data.base import validation_count
from vqvae.errors import OptionError
from vqvae.presets import OF_BOTH_STAGES, OF_THE_PRIOR, PRESETS
from vqvae.runs import LAST, refuse_saved
from vqvae.training import Plan


def second_stage(given: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset's second stage, overridden by `given`, which loses those of the second stage only.

    Raises `OptionError` for a name that is taken.
    """
    own: dict[str, Any] = {key: given.pop(key) for key in OF_THE_PRIOR if key in given}
    second = typed({**settings, **own, **{key: given[key] for key in OF_BOTH_STAGES if key in given}})
    if name := given.get("name"):
        refuse_saved(Path(second.get("log_dir", Config.log_dir), name_of(name)))
    return second


def name_of(first: str) -> str:
    """The name of the second stage's run."""
    return f"{first}-prior"


def start_of(folder: Path) -> dict[str, str]:
    """The settings that make a run the second stage of the run in `folder`."""
    return {"name": name_of(folder.name), "checkpoint": str(folder / LAST)}


def check(config: Config, plan: Plan, dataset: Dataset, model: Autoencoder, folder: Path) -> None:
    """Raise `OptionError` for what a second stage would refuse, before the first one trains `model` in `folder`.

    `config` and `plan` are those of the second stage.
    """
    refuse_saved(folder.with_name(name_of(folder.name)))
    if config.conditional:
        dataset.need_classes("conditional")
    with torch.random.fork_rng(devices=[]):
        prior = build_prior(config.prior, model.bottleneck, len(dataset.classes) if config.conditional else 0)
    need_parameters(prior, config.prior.name)
    images = len(dataset.train.images) * config.data_shards
    share = validation_share(config.validation)
    if share is not None and dataset.validation is None:  # the first stage trains on all of them
        images -= validation_count(share, images)
    plan.check(images)


def need_parameters(prior: Prior, name: str) -> None:
    """Raise `OptionError` for a prior that cannot be trained."""
    if not prior.has_parameters:
        raise OptionError("prior", name, "has no parameters to train; try unigram, pixelcnn, transformer or masked")


def how_to_go_on(settings: Mapping[str, Any], folder: Path) -> str:
    """The line about a second stage that was not begun."""
    return f"then its prior: {cli.program('train')} {shlex.join(as_flags({**start_of(folder), **settings}))}"


def missing(config: Config, folder: Path) -> str | None:
    """The line about the second stage of a resumed run, where its preset has one and it was not begun."""
    preset = PRESETS.get(config.preset or "")  # a second stage has none
    if not preset or not preset.prior or folder.with_name(name_of(folder.name)).exists():
        return None
    logs = {} if folder.parent == Path(Config.log_dir) else {"log_dir": str(folder.parent)}
    return how_to_go_on(second_stage({}, preset.prior) | logs, folder)
