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
    """A training split, a test split, and what is known about both."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...] = ()  # names of the labels 0, 1, ...; empty for a data set without labels
    note: str = ""  # shown next to the metrics: how the data differ from what the name promises
    entropy: float | None = None  # nats per example, where the generating density is known
    unreadable: Mapping[str, str] = {}  # names of files that were left out, and why they cannot be read
    # [N, C, H, W] uint8: 255 times the probabilities of white pixels, where training images are drawn anew every epoch
    probabilities: Tensor | None = None

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any pixel or label of either split."""
        return fingerprint(*self.train, *self.test)

    def training_images(self, seed: int, epoch: int) -> Tensor:
        """The training images `[N, C, H, W]` of an epoch, a pure function of (seed, epoch) where they are drawn."""
        if self.probabilities is None:
            return self.train.images
        if self.probabilities.shape != self.train.images.shape:
            raise ValueError(f"probabilities {self.probabilities.shape} of images {self.train.images.shape}")
        return bernoulli(self.probabilities, zlib.crc32(f"binarization {seed} {epoch}".encode()))


def bernoulli(probabilities: Tensor, seed: int) -> Tensor:
    """Pixels 0 or 255, of the same shape, drawn with probabilities / 255 (uint8), a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed)
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
