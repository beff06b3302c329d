"""Batches: their order is a function of the seed, augmented images are crops, the variance is NumPy's."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from vqvae.data import batches
from vqvae.data.batches import augmentation, batch_indices, block_of, crop_flip, pixel_variance, read_ahead
from vqvae.errors import OptionError


def test_the_order_of_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = batch_indices(103, 10, seed=1, epoch=2)
    assert order.shape == (10, 10)
    assert len(order.unique()) == 100
    assert torch.equal(order, batch_indices(103, 10, seed=1, epoch=2))
    assert not torch.equal(order, batch_indices(103, 10, seed=1, epoch=3))
    assert not torch.equal(order, batch_indices(103, 10, seed=2, epoch=2))


def test_an_order_in_blocks_mixes_only_the_blocks_of_a_window(monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", 3)
    order = batch_indices(100, 1, seed=1, epoch=2, block=8).flatten()  # 12 blocks and a half, in windows of 3
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, batch_indices(100, 1, seed=1, epoch=2, block=8).flatten())
    assert not torch.equal(order, batch_indices(100, 1, seed=1, epoch=3, block=8).flatten())
    blocks, seen = (order // 8).tolist(), set()
    while blocks:
        window = set(blocks[:16])  # of 24 images, 20 with the last block, all blocks appear among the first ones
        size = sum(blocks.count(block) for block in window)
        assert len(window) <= 3
        assert set(blocks[:size]) == window
        assert not window & seen
        seen |= window
        blocks = blocks[size:]


def test_a_block_has_the_same_bytes_on_every_machine():
    images = torch.zeros(10, 3, 64, 64, dtype=torch.uint8)
    assert block_of(images, "full") is None
    assert block_of(images, "blocks") == 341
    assert block_of(torch.zeros(2, 3, 2000, 2000, dtype=torch.uint8), "blocks") == 1


class AtOnce(ThreadPoolExecutor):
    """Does what it is given before it returns, so that no test depends on the speed of threads."""

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done


def test_the_next_window_is_read_while_the_batches_of_one_are_used(monkeypatch):
    read = []
    monkeypatch.setattr(batches, "WINDOW", 2)
    monkeypatch.setattr(batches, "_touch", lambda rows, index: read.append(index))
    monkeypatch.setattr(batches, "ThreadPoolExecutor", AtOnce)
    order = batch_indices(60, 5, seed=0, epoch=0, block=6)
    windows = order.split(2)  # of 12 examples, two batches and a bit
    for step, _ in enumerate(read_ahead(order, torch.zeros(60, 1, 1, 1), 6)):
        expected = windows[: step // 2 + 2]
        assert all(torch.equal(*pair) for pair in zip(read, expected, strict=False))
        assert len(read) >= len(expected)


def test_reading_ahead_changes_no_batch(monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", 2)
    read, touch = [], batches._touch
    monkeypatch.setattr(batches, "_touch", lambda rows, index: read.append(index) or touch(rows, index))
    images = torch.arange(60).view(60, 1, 1, 1)
    order = batch_indices(60, 5, seed=0, epoch=0, block=6)
    assert torch.equal(torch.stack(list(read_ahead(order, images, 6))), order)
    assert all(any(torch.equal(index, window) for window in order.split(2)) for index in [*read, order[:2]])
    assert torch.equal(torch.stack(list(read_ahead(order, images, None))), order)
    assert list(read_ahead(order[:0], images, 6)) == []


@pytest.mark.parametrize("shape", [(3000, 1, 4, 4), (100, 3, 40, 50)])
def test_pixel_variance_agrees_with_numpy(shape):
    images = torch.randint(256, shape, dtype=torch.uint8)
    assert pixel_variance(images) == pytest.approx((images.numpy() / 255).var(), rel=1e-9)
    assert pixel_variance(torch.zeros(3, 1, 2, 2, dtype=torch.uint8)) > 0


def padded_crops(image: torch.Tensor) -> list[torch.Tensor]:
    """All 81 crops of an image `[C, H, W]` that NumPy padded by 4 reflected pixels, then all of them flipped."""
    _, height, width = image.shape
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect"))
    crops = [padded[:, top : top + height, left : left + width] for top in range(9) for left in range(9)]
    return crops + [crop.flip(2) for crop in crops]


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 8, 8)])
def test_augmented_images_are_crops_of_the_padded_ones(shape):
    images = torch.randint(256, (40, *shape), dtype=torch.uint8)
    augmented = crop_flip(images)
    assert (augmented.dtype, augmented.shape) == (torch.uint8, images.shape)
    for before, after in zip(images, augmented, strict=True):
        assert any(torch.equal(after, crop) for crop in padded_crops(before))


def test_augmentation_draws_every_crop_and_flips_half():
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    crops = {crop.numpy().tobytes(): place for place, crop in enumerate(padded_crops(image))}
    augmented = crop_flip(image.expand(4000, -1, -1, -1))
    places = torch.tensor([crops[one.contiguous().numpy().tobytes()] for one in augmented])
    assert places.unique().tolist() == list(range(162))
    assert (places >= 81).float().mean().item() == pytest.approx(0.5, abs=0.04)  # five standard errors


def test_images_too_small_to_crop_are_refused():
    with pytest.raises(OptionError, match="needs images of at least 5x5 pixels, these have 4x8") as caught:
        augmentation("crop-flip", torch.zeros(2, 1, 4, 8))
    assert caught.value.flagged.startswith("--augment crop-flip: ")
    assert augmentation("none", torch.zeros(2, 2, 1, 1)) is None
