"""The linear probe and the mutual information of codes and labels, on cases with known values."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import choose, fitting, make
from vqvae.autoencoder import unit_range
from vqvae.data.base import Images
from vqvae.errors import OptionError
from vqvae.probe import MOST_VALUES, Latents, latents, linear_probe, mutual_information, pooled, probe


def test_mutual_information_of_known_tables():
    def bits(*rows: list[float]) -> float:
        return mutual_information(torch.tensor(rows)[:, None])

    assert bits([5, 0, 0], [0, 5, 0], [0, 0, 5]) == pytest.approx(math.log2(3))  # the code is the label
    assert bits([2, 4, 6], [1, 2, 3]) == pytest.approx(0, abs=1e-9)  # independent
    assert bits([3, 1], [1, 3]) == pytest.approx(1 - (-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)))
    assert bits([0, 7]) == pytest.approx(0, abs=1e-9)  # one label
    both = torch.tensor([[[5.0, 0], [5, 5]], [[0, 5], [5, 5]]])  # [Y, levels, K]: one level knows, the other does not
    assert mutual_information(both) == pytest.approx(0.5)


def test_a_linear_probe_separates_what_is_separable_and_is_at_chance_on_noise():
    y = torch.arange(600) % 3
    centers = torch.eye(3)[y]
    fitted, held_out = (Latents(4 * centers + torch.randn(600, 3), None, y) for _ in range(2))
    assert linear_probe(fitted, held_out).mean() > 0.95
    noise = linear_probe(*(found._replace(z=torch.randn(600, 3)) for found in (fitted, held_out)))
    assert float(noise.mean()) == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 9 / 600))


def test_large_grids_are_averaged_over_blocks():
    assert pooled(torch.rand(2, 64, 8, 8)).shape == (2, 4096)
    assert pooled(torch.rand(2, 4, 2, 2)).shape == (2, 16)
    z = torch.rand(2, 256, 16, 16)
    assert pooled(z).shape == (2, MOST_VALUES)
    assert torch.allclose(pooled(z).view(2, 256, 4, 4)[0, 0, 0, 0], z[0, 0, :4, :4].mean())
    assert pooled(torch.rand(2, 5000, 2, 2)).shape == (2, 5000)


def dark_and_bright(n: int) -> Images:
    """Images of two classes that differ in brightness."""
    labels = torch.arange(n) % 2
    pixels = torch.randint(50, (n, 3, 8, 8)) + 205 * labels.view(-1, 1, 1, 1)
    return Images(pixels.to(torch.uint8), labels)


@torch.no_grad()
def test_a_probe_on_codes_finds_a_label_that_they_contain_and_its_control_is_at_chance():
    model, train, test = make(), dark_and_bright(300), dark_and_bright(400)
    model.bottleneck.initialize(model.features(unit_range(train.images)))
    numbers, protocol = probe(model, train, test)
    assert numbers["probe_accuracy"] > 0.95
    assert numbers["probe_accuracy_se"] < 0.02
    assert numbers["probe_chance"] == 0.5
    assert numbers["probe_control"] == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(400))
    assert 0.2 < numbers["label_bits"] < 1.0001
    assert 0 <= numbers["label_bits_control"] < 0.05
    codes, y = model.encode(test.images), test.labels
    counts = torch.stack([codes[y == label].flatten().bincount(minlength=7) for label in (0, 1)])
    assert numbers["label_bits"] == pytest.approx(mutual_information(counts[:, None]))
    assert "16 latent values of 300 training images, scikit-learn" in protocol
    assert probe(model, train, test)[0] == numbers


def test_a_continuous_latent_has_a_probe_and_no_codes():
    model = make(**fitting("gaussian") | {"bottleneck": choose("bottleneck", "gaussian", latents=3)})
    numbers, _ = probe(model, dark_and_bright(40), dark_and_bright(40))
    assert "probe_accuracy" in numbers
    assert "label_bits" not in numbers


def test_images_without_a_label_are_left_out_and_one_class_is_refused():
    images, labels = dark_and_bright(20)
    some = labels.clone()
    some[:6] = -1
    found = latents(make().eval(), images, some, batch_size=4)
    assert len(found.z) == len(found.codes) == len(found.labels) == 14
    for bad in (torch.zeros_like(labels), torch.full_like(labels, -1)):
        with pytest.raises(OptionError, match="needs images with labels, of two classes or more"):
            probe(make(), Images(images, bad), Images(images, labels))


def test_every_level_of_several_codebooks_counts():
    model = make(bottleneck=choose("bottleneck", "residual", quantizers=2))
    train = dark_and_bright(100)
    with torch.no_grad():
        model.bottleneck.initialize(model.features(unit_range(train.images)))
    numbers, _ = probe(model, train, dark_and_bright(100))
    maps: dict[str, Tensor] = model.discrete.maps(model.encode(train.images))
    assert len(maps) == 2
    assert 0 < numbers["label_bits"] < 1.0001
