"""The data sets without a download: fixed splits, crops of separate regions, points of a known density."""

import numpy as np
import pytest
import torch

from vqvae.data import load
from vqvae.errors import OptionError


def test_digits_have_one_fixed_split():
    digits = load("digits")
    assert digits.train.images.shape == (1500, 1, 32, 32)
    assert digits.test.images.shape == (297, 1, 32, 32)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() > 250
    assert torch.equal(load("digits").test.images, digits.test.images)
    train = {x.numpy().tobytes() for x in digits.train.images}
    assert not any(x.numpy().tobytes() in train for x in digits.test.images)
    assert sorted(digits.test.labels.unique().tolist()) == list(range(10))


def test_test_photos_are_crops_of_a_separate_region():
    from sklearn.datasets import load_sample_images

    photos = load("photos", crops=40, test_crops=20)
    assert photos.train.images.shape == (40, 3, 32, 32)
    assert photos.test.images.shape == (20, 3, 32, 32)
    assert photos.train.labels.tolist() == [-1] * 40
    left, right = [], []
    for photo in load_sample_images().images:
        edge = photo.shape[1] * 4 // 5
        left.append(photo[:, :edge])
        right.append(photo[:, edge:])

    def found(crop: torch.Tensor, regions: list[np.ndarray]) -> bool:
        wanted = crop.permute(1, 2, 0).numpy()
        for region in regions:
            corners = np.argwhere((region[:-31, :-31] == wanted[0, 0]).all(-1))
            if any((region[y : y + 32, x : x + 32] == wanted).all() for y, x in corners):
                return True
        return False

    assert all(found(crop, left) and not found(crop, right) for crop in photos.train.images[:10])
    assert all(found(crop, right) and not found(crop, left) for crop in photos.test.images[:10])
    assert torch.equal(load("photos", crops=40, test_crops=20).train.images, photos.train.images)


@pytest.mark.parametrize(("number", "mean", "covariance"), [(1, (1, 2), (13, 12)), (2, (-1, 2), (13, -12))])
def test_gauss2d_has_its_moments_its_entropy_and_separate_test_points(number, mean, covariance):
    points = load("gauss2d", set=number, train_points=200_000, test_points=500)
    x = points.train.images.flatten(1)
    assert torch.allclose(x.mean(0), torch.tensor(mean).float(), atol=0.05)
    variance, between = covariance
    expected = torch.tensor([[variance, between], [between, variance]]).float()
    assert torch.allclose(torch.cov(x.T), expected, atol=0.2)
    density = torch.distributions.MultivariateNormal(torch.zeros(2), expected)
    assert points.entropy == pytest.approx(float(density.entropy()), abs=1e-5)
    train = {tuple(point) for point in x.tolist()}
    assert not any(tuple(point) in train for point in points.test.images.flatten(1).tolist())


def test_points_have_no_image_size():
    with pytest.raises(OptionError, match="points of gauss2d have no size") as caught:
        load("gauss2d", image_size=8)
    assert caught.value.flagged.startswith("--image-size 8: ")
