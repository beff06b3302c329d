"""Data sets that need no download: two come with scikit-learn, one is drawn from a known density."""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from vqvae.data.base import DIGITS, Dataset, Images, interpolate, to_bytes
from vqvae.errors import OptionError
from vqvae.registry import Passes, Range, Size, checked

MOST_CROPS, MOST_POINTS = 1_000_000, 100_000_000  # 3 GB, 800 MB


@checked
def digits(*, data_dir: Path, image_size: Size | None) -> Dataset:
    """Handwritten digits of scikit-learn: 1,500 training and 297 test images, 32x32 gray, scaled from 8x8."""
    from sklearn.datasets import load_digits

    source = load_digits()
    small = torch.from_numpy(source.images).float()[:, None] * (255 / 16)
    images = to_bytes(interpolate(small, (32, 32)))
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    return Dataset("digits", Images(images[train], labels[train]), Images(images[test], labels[test]), DIGITS)


@checked
def photos(
    *,
    data_dir: Path,
    image_size: Size | None,
    crops: Annotated[int, Range(1, MOST_CROPS), "number of training images"] = 10_000,
    test_crops: Annotated[int, Range(1, MOST_CROPS), "number of test images"] = 2_000,
) -> Dataset:
    """Random crops of two photographs of scikit-learn, 32x32 RGB.

    Test crops come from the right fifth of each photograph, training crops from the rest. Crops overlap: those of a
    validation split show parts of training crops.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for photo in map(torch.tensor, load_sample_images().images):  # [H, W, 3] uint8
        edge = photo.shape[1] * 4 // 5
        for split, region in (("train", photo[:, :edge]), ("test", photo[:, edge:])):
            count = -(-(crops if split == "train" else test_crops) // 2)
            tops = rng.integers(region.shape[0] - 31, size=count)
            lefts = rng.integers(region.shape[1] - 31, size=count)
            windows = region.unfold(0, 32, 1).unfold(1, 32, 1)  # [., ., 3, 32, 32]
            parts[split].append(windows[torch.from_numpy(tops), torch.from_numpy(lefts)])
    splits = {}
    for split, count in (("train", crops), ("test", test_crops)):
        stacked = torch.stack(parts[split], dim=1).reshape(-1, 3, 32, 32)[:count]  # the photographs alternate
        splits[split] = Images.unlabeled(stacked)
    return Dataset("photos", splits["train"], splits["test"])


GAUSSIANS = {1: ((1.0, 2.0), (5.0, 1.0)), 2: ((-1.0, 2.0), (1.0, 5.0))}  # mean, s


@checked
def gauss2d(
    *,
    data_dir: Path,
    image_size: Size | None,
    set: Annotated[int, Passes(lambda k: k in GAUSSIANS, "1 or 2"), "mean and scales, see below"] = 1,
    train_points: Annotated[int, Range(1, MOST_POINTS), "number of training points"] = 10_000,
    test_points: Annotated[int, Range(1, MOST_POINTS), "number of test points"] = 2_500,
) -> Dataset:
    """Points of a tilted Gaussian in the plane, `[N, 2, 1, 1]` float32.

    x = mean + (eps * s) R, with eps ~ N(0, I) and R a rotation by 45 degrees. The entropy is
    log(2 pi e) + log 5 = 4.4473 nats.

    set=1   mean (1, 2), s = (5, 1)
    set=2   mean (-1, 2), s = (1, 5)
    """
    if image_size is not None:
        raise OptionError("image_size", image_size, "the points of gauss2d have no size; leave it out")
    mean, scale = (torch.tensor(values) for values in GAUSSIANS[set])
    root = math.sqrt(0.5)
    rotation = torch.tensor([[root, root], [-root, root]])

    def points(count: int, seed: int) -> Images:
        noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
        return Images.unlabeled((mean + (noise * scale) @ rotation).view(count, 2, 1, 1))

    entropy = math.log(2 * math.pi * math.e) + math.log(5)
    return Dataset(f"gauss2d-{set}", points(train_points, 0), points(test_points, 1), entropy=entropy)
