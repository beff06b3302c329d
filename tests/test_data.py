"""Loading by name: options, sizes and limits, the same for every data set."""

import pytest
import torch

from vqvae.data import DATASETS, Images, fingerprint, load
from vqvae.errors import OptionError, UserError
from vqvae.registry import signature


def test_every_data_set_takes_a_folder_and_a_size():
    for name, member in DATASETS.items():
        assert signature(member).context[:2] == ("data_dir", "image_size"), name


def test_limit_and_size_apply_to_both_splits():
    small = load("digits", image_size=16, limit=50)
    assert small.train.images.shape == small.test.images.shape == (50, 1, 16, 16)
    assert small.train.labels.shape == small.test.labels.shape == (50,)
    assert small.train.images.dtype == torch.uint8
    original = load("digits", limit=50)
    means = [split.train.images.float().mean((1, 2, 3)) for split in (small, original)]
    assert torch.allclose(*means, atol=2)  # the same images, averaged


def test_a_misspelled_name_or_option_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        load("mnits")
    with pytest.raises(UserError, match="crop=3: unknown option.*did you mean 'crops'"):
        load("photos", crop=3)
    with pytest.raises(UserError, match="did you mean 'threshold'"):
        load("mnist-binary", binarization="thresh")


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -5}, {"image_size": 0}, {"image_size": -3}])
def test_sizes_and_limits_below_one_are_refused(options):
    with pytest.raises(OptionError, match="must be (at least|from) 1") as caught:
        load("digits", **options)
    assert {caught.value.option: caught.value.value} == options


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("photos", {"crops": 0}),
        ("photos", {"test_crops": 0}),
        ("gauss2d", {"train_points": 0}),
        ("gauss2d", {"test_points": -1}),
        ("gauss2d", {"set": 3}),
        ("folder", {"holdout": 0.0}),
        ("folder", {"holdout": 1.0}),
        ("folder", {"channels": 2}),
    ],
)
def test_options_out_of_range_are_refused_before_any_file_is_read(name, options, tmp_path):
    with pytest.raises(OptionError, match="must be") as caught:
        load(name, data_dir=tmp_path / "absent", **options)
    assert (caught.value.owner, {caught.value.option: caught.value.value}) == (name, options)


def test_a_fingerprint_changes_with_any_pixel_label_or_shape():
    data = load("digits", limit=1500)
    images, labels = data.train
    seen = {data.train.fingerprint(), data.test.fingerprint(), fingerprint(images)}
    for position in (0, images.numel() // 2, images.numel() - 1):
        changed = images.clone()
        changed.view(-1)[position] ^= 1
        seen.add(Images(changed, labels).fingerprint())
    seen.add(Images(images, labels.flip(0)).fingerprint())
    seen.add(Images(images[:-1], labels[:-1]).fingerprint())
    seen.add(Images(images.view(-1, 1, 16, 64), labels).fingerprint())
    assert len(seen) == 9
    assert all(len(text) == 32 for text in seen)


def test_a_fingerprint_does_not_depend_on_strides():
    images = load("digits", limit=50).train.images
    assert fingerprint(images.mT.contiguous().mT) == fingerprint(images) == fingerprint(images.clone())


@pytest.mark.parametrize("folder", ["~nosuchuser/data", ""])
def test_a_folder_that_cannot_exist_is_refused(folder):
    with pytest.raises(OptionError, match="data_dir="):
        load("folder", data_dir=folder)


def test_images_that_do_not_fit_into_memory_are_refused(monkeypatch):
    def too_large(images, size):
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("vqvae.data.scale", too_large)
    with pytest.raises(OptionError, match="does not fit into memory; use smaller or fewer images"):
        load("digits", image_size=64)
