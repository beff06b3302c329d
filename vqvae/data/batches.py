"""Batches: their order in each epoch, augmentation, and the variance by which errors are normalized.

N images, B batch, C channels, H W pixels.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vqvae import shares
from vqvae.errors import OptionError
from vqvae.randomness import generator

Shuffle = Literal["full", "blocks"]
BLOCK = 2**22  # bytes of neighboring examples, which a disk reads at its full speed
WINDOW = 64  # blocks among which examples are shuffled


def batch_indices(count: int, batch_size: int, *, seed: int, epoch: int, block: int | None = None) -> Tensor:
    """The shuffled indices of one epoch, `[steps, batch_size]` int64, a pure function of (seed, epoch).

    The last count % batch_size indices are dropped. With `block`, blocks of that many neighbors are shuffled, and then
    the indices within each group of `WINDOW` blocks.
    """
    steps = count // batch_size
    draws = generator(seed, "order", epoch)
    if block is None:
        order = torch.randperm(count, generator=draws)
    else:
        blocks = torch.arange(count).split(block)
        windows = torch.randperm(len(blocks), generator=draws).split(WINDOW)
        parts = [torch.cat([blocks[i] for i in window]) for window in windows]
        order = torch.cat([part[torch.randperm(len(part), generator=draws)] for part in parts])
    return order[: steps * batch_size].view(steps, batch_size)


def block_of(examples: Tensor, shuffle: Shuffle) -> int | None:
    """How many examples `[N, ...]` a block has: as many as fit into `BLOCK`, on every machine; None without blocks."""
    return None if shuffle == "full" else max(1, BLOCK * len(examples) // max(examples.nbytes, 1))


def read_ahead(order: Tensor, examples: Tensor, block: int | None) -> Iterator[Tensor]:
    """The batches of an order, `[steps, batch]`, while a thread reads the examples of this window and the next.

    It reads them in the order of the disk, so that they are in memory when they are needed. Without blocks, or with
    examples on an accelerator, nothing is read ahead.
    """
    if block is None or examples.device.type != "cpu" or not len(order):
        yield from order
        return
    windows = order.split(max(1, WINDOW * block // order.shape[1]))
    with ThreadPoolExecutor(1) as thread:
        try:
            ahead = thread.submit(_touch, examples, windows[0])
            for window, following in itertools.zip_longest(windows, windows[1:], fillvalue=order[:0]):
                late, ahead = ahead, thread.submit(_touch, examples, following)
                yield from window
                late.cancel()
        finally:
            thread.shutdown(cancel_futures=True)


def _touch(examples: Tensor, index: Tensor) -> None:
    """Read examples, with NumPy: torch would use the cores that train."""
    rows = examples.numpy()
    for part in index.flatten().sort().values.split(64):
        np.take(rows, part.numpy(), axis=0)


BORDER = 4  # pixels


def crop_flip(images: Tensor) -> Tensor:
    """Pad images `[B, C, H, W]` of any type by 4 reflected pixels, crop HxW at random, and flip half of them.

    Draws from the global generator of the images' device. Processes that share a batch take the
    draws of one. The padded images are never stored.
    """
    count, _, height, width = images.shape
    device = images.device
    offsets = shares.draw(partial(torch.randint, 2 * BORDER + 1), (2, count, 1), dim=1, device=device) - BORDER
    flipped = shares.draw(partial(torch.randint, 2), (count, 1), device=device).bool()
    rows = _reflect(offsets[0] + torch.arange(height, device=device), height)  # [B, H], the source of each row
    columns = _reflect(offsets[1] + torch.arange(width, device=device), width)  # [B, W]
    columns = torch.where(flipped, columns.flip(1), columns)
    example = torch.arange(count, device=device)[:, None, None]
    return images[example, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)  # from [B, H, W, C]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Map positions from -4 to size + 3 into the image, mirrored at the outermost pixels, which are not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None, "crop-flip": crop_flip}


def augmentation(name: str, images: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The function that augments batches of such images, None for "none". Raises `OptionError` for small images."""
    height, width = images.shape[-2:]
    if AUGMENTATIONS[name] and min(height, width) <= BORDER:
        raise OptionError(
            "augment", name,
            f"needs images of at least {BORDER + 1}x{BORDER + 1} pixels, these have {height}x{width}; use none",
        )  # fmt: skip
    return AUGMENTATIONS[name]


def pixel_variance(images: Tensor) -> float:
    """Variance of all pixels and channels in [0, 1], over the first 50,000 images `[N, C, H, W]` at most.

    At least 1e-6, because errors are divided by it.
    """
    if images.dtype == torch.uint8 and images[0].numel() > 3 * 32 * 32:  # smaller images: below, as earlier runs did
        return max(_counted_variance(images[:50_000]) / 255**2, 1e-6)
    tiles = images[:50_000].split(2048)
    count = sum(tile.numel() for tile in tiles)
    white = 255 if images.dtype == torch.uint8 else 1
    mean = sum(float(tile.double().sum()) for tile in tiles) / count
    squares = sum(float((tile.double() - mean).square().sum()) for tile in tiles) / count
    return max(squares / white**2, 1e-6)


def _counted_variance(images: Tensor) -> float:
    """The variance of uint8 pixels, exact: from the count of each value, by one core and in little memory."""
    tiles = images.split(64)
    counts = torch.stack([torch.bincount(tile.flatten(), minlength=256) for tile in tiles]).sum(0).tolist()
    total, first, second = (sum(count * value**power for value, count in enumerate(counts)) for power in range(3))
    return (total * second - first**2) / total**2
