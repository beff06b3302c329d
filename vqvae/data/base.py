"""Types and image operations that all data sets share.

N images, C channels, H W pixels.
"""

import hashlib
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.errors import OptionError
from vqvae.randomness import generator

DIGITS = tuple("0123456789")


class Images(NamedTuple):
    """One split of a data set."""

    images: Tensor  # [N, C, H, W] uint8; points of the plane are [N, 2, 1, 1] float32
    labels: Tensor  # [N] int64; -1 for an example without a label

    @classmethod
    def unlabeled(cls, images: Tensor) -> "Images":
        """A split without labels."""
        return cls(images, torch.full((len(images),), -1))

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any pixel or label."""
        return fingerprint(self.images, self.labels)


class Dataset(NamedTuple):
    """A training split, a test split, perhaps a validation split, and what is known about them."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...] = ()  # names of the labels 0, 1, ...; empty for a data set without labels
    note: str = ""  # shown next to the metrics: how the data differ from what the name promises
    entropy: float | None = None  # nats per example, where the generating density is known
    unreadable: Mapping[str, str] = {}  # names of files that were left out, and why they cannot be read
    # [N, C, H, W] uint8: 255 times the probabilities of white pixels, where training images are drawn anew every epoch
    probabilities: Tensor | None = None
    shuffled: bool = False  # whether the training images are in random order, so that a slice of them is a sample
    validation: Images | None = None  # images taken from the training split, or a split of the source

    @property
    def held_out(self) -> Images:
        """The split that is evaluated after each epoch, and by which models are chosen."""
        return self.test if self.validation is None else self.validation

    @property
    def splits(self) -> dict[str, Images]:
        """The splits by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def need_classes(self, option: str) -> None:
        """Raise `OptionError` for an option that needs labels, if the data have none."""
        if not self.classes:
            why = f" ({self.note})" if self.note else ""
            raise OptionError(option, None, f"the data set {self.name} has no labels{why}; leave it out")

    def with_validation(self, share: float) -> "Dataset":
        """Move a share of the training images, at least one, to a validation split.

        The choice does not depend on a run's seed. Images that are mapped from a cache stay mapped: they are already
        shuffled, so a slice of them is enough.
        """
        images, labels = self.train
        count = validation_count(share, len(images))
        if count == len(images):
            smaller = "" if count == 1 else "a smaller share, or "
            problem = f"leaves no training image of {count:,}; use {smaller}test"
            raise OptionError("validation", share, problem)
        last = len(images) - count
        kept: slice | Tensor = slice(last)
        held: slice | Tensor = slice(last, None)
        if not self.shuffled:
            order = torch.randperm(len(images), generator=generator(0, "validation"))
            kept, held = order[:last].sort().values, order[last:].sort().values
        train, validation = (Images(images[index], labels[index]) for index in (kept, held))
        probabilities = None if self.probabilities is None else self.probabilities[kept]
        return self._replace(train=train, validation=validation, probabilities=probabilities)

    def training_images(self, seed: int, epoch: int) -> Tensor:
        """The training images `[N, C, H, W]` of an epoch, a pure function of (seed, epoch) where they are drawn."""
        if self.probabilities is None:
            return self.train.images
        return bernoulli(self.probabilities, generator(seed, "binarization", epoch))


def validation_count(share: float, count: int) -> int:
    """How many of `count` training images a validation split has: a share of them, at least one."""
    return max(1, round(share * count))


def bernoulli(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels 0 or 255, of the same shape, white with a probability of probabilities / 255 (uint8)."""
    return (probabilities > torch.rand(probabilities.shape, generator=generator) * 255).to(torch.uint8) * 255


def fingerprint(*tensors: Tensor) -> str:
    """32 hexadecimal digits that change with any value, shape or type; reads about 1 GB/s."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        for block in tensor.split(1024):
            digest.update(zlib.crc32(block.cpu().contiguous().numpy()).to_bytes(4, "little"))
    return digest.hexdigest()[:32]


def interpolate(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale images `[N, C, H, W]` float to `[N, C, *size]`, antialiased."""
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def to_bytes(images: Tensor) -> Tensor:
    """Round float pixels in [0, 255] to uint8."""
    return images.round().clamp(0, 255).to(torch.uint8)


def scale(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Scale images `[N, C, H, W]` uint8 to `[N, C, *size]`; None returns them unchanged."""
    if size is None or images.shape[-2:] == size:
        return images
    tiles = images.split(4096)  # keeps the float copies small
    return torch.cat([to_bytes(interpolate(tile.float(), size)) for tile in tiles])
