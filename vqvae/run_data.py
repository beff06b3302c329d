"""The data of a run: loaded, described in its checkpoints, and compared with those of before."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from vqvae import data, distributed
from vqvae.autoencoder import Autoencoder
from vqvae.config import Config, validation_share
from vqvae.data import Dataset, Images
from vqvae.errors import OptionError
from vqvae.summary import listed


def load_shared(config: Config, *, rescan: bool = False) -> Dataset:
    """The data on which several processes train, with training splits of equal size if each has a part of them.

    Raises `OptionError` for parts that the processes cannot share.
    """
    parts, world = config.data_shards, distributed.world()
    if world % parts:
        problem = f"must divide the number of processes, which is {world}; start more of them with torchrun"
        raise OptionError("data_shards", parts, problem)
    with distributed.first_goes_first(parts) as first:
        dataset = load(config, rescan=rescan and first)
    if parts == 1:
        return dataset
    count = min(distributed.gather_objects(len(dataset.train.images)))
    return dataset._replace(train=Images(*(rows[:count] for rows in dataset.train)))


def load(config: Config, *, rescan: bool = False) -> Dataset:
    parts = config.data_shards
    return data.load(
        config.dataset.name,
        data_dir=config.data_dir,
        image_size=config.image_size,
        limit=config.limit,
        validation=validation_share(config.validation),
        rescan=rescan,
        part=(distributed.part_of(parts), parts),
        **config.dataset.options,
    )


def describe(dataset: Dataset, model: Autoencoder) -> dict[str, Any]:
    """The description of the data in a checkpoint."""
    return {
        "name": dataset.name,
        "shape": list(model.image_shape),
        "variance": model.data_variance,
        "classes": list(dataset.classes),
        "note": dataset.note,
        **identity(dataset),
    }


def identity(dataset: Dataset) -> dict[str, Any]:
    """The number of examples of each split, and their hash: a resumed run compares them."""
    return {
        "examples": {name: len(split.images) for name, split in dataset.splits.items()},
        "fingerprint": {name: split.fingerprint() for name, split in dataset.splits.items()},
    }


def compare(before: Mapping[str, Any], now: Mapping[str, Any], config: Config) -> None:
    """Warn in one line if a resumed run's data changed; raise `OptionError` if its model cannot be trained on them."""
    if list(before["shape"]) != now["shape"]:
        sizes = ["x".join(map(str, about["shape"])) for about in (now, before)]
        problem = f"the images are {sizes[0]}, and those of this run were {sizes[1]}; name the folder with its data"
        raise OptionError("data_dir", config.data_dir, problem)
    compare_classes(before["classes"], now["classes"], config)
    changes = [
        f"{old:,} {split} images then, {now['examples'][split]:,} now"
        for split, old in before.get("examples", now["examples"]).items()
        if old != now["examples"][split]
    ]
    prints = before.get("fingerprint", now["fingerprint"])
    if not changes and prints != now["fingerprint"]:
        changes = [f"other {' and '.join(s for s in prints if prints[s] != now['fingerprint'][s])} images"]
    if changes and distributed.rank() == 0:
        warnings.warn(
            f"the data changed since this run was saved ({'; '.join(changes)}); it does not take the steps that it "
            "would have taken",
            stacklevel=2,
        )


def compare_test(before: Mapping[str, Any], dataset: Dataset) -> None:
    """Warn if a model is evaluated on another test split than that of its run."""
    there = before.get("fingerprint", {}).get("test")
    if there not in (None, dataset.test.fingerprint()) and distributed.rank() == 0:
        warnings.warn("the test images are not those of the run: the data are others, or they changed", stacklevel=2)


def compare_classes(before: Sequence[str], now: Sequence[str], config: Config) -> None:
    """Raise `OptionError` if a conditional prior would take the data's labels for those of other classes."""
    if config.conditional and list(before) != list(now):
        problem = f"the classes are {listed(now) or 'unknown'}, and those of this run were {listed(before)}"
        raise OptionError("data_dir", config.data_dir, f"{problem}; name the folder with its data")
