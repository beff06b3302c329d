"""Folders of image files: formats and colors, splits by path, the cache, unreadable files."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae.data import load
from vqvae.data.image_folder import cached_images, image_files
from vqvae.errors import OptionError, UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    """An empty folder for images."""
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


def write_flat(path: Path, color: tuple[int, int, int] = (9, 9, 9), side: int = 8) -> None:
    """An image of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), color).save(path)


def write_every_format(folder: Path) -> None:
    """11 images, most of one color, in every format and mode that is supported."""
    Image.new("RGB", (40, 20), (200, 100, 50)).save(folder / "color.png")
    Image.new("RGB", (20, 40), (200, 100, 50)).save(folder / "photo.JPG", quality=95)
    Image.new("RGB", (24, 24), (200, 100, 50)).save(folder / "web.webp", lossless=True)
    Image.new("L", (24, 24), 77).save(folder / "gray.png")
    Image.new("RGBA", (24, 24), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("RGBA", (24, 24), (255, 0, 0, 128)).save(folder / "half.png")
    Image.fromarray(np.full((24, 24), 257 * 128, np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.full((24, 24), 300, np.uint16)).save(folder / "dark.png")
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste((1, 2, 3), (20, 0, 40, 20))  # the center square
    wide.save(folder / "wide.png")
    palette = Image.new("P", (24, 24), 1)
    palette.putpalette([0, 0, 0, 10, 220, 30])
    palette.save(folder / "palette.png")
    halves = Image.new("RGB", (24, 24), "red")
    halves.paste((0, 0, 255), (0, 12, 24, 24))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: blue left, red right
    halves.save(folder / "rotated.png", exif=exif)


EXPECTED = {
    "color.png": (200, 100, 50),
    "photo.JPG": (200, 100, 50),
    "web.webp": (200, 100, 50),
    "gray.png": (77, 77, 77),
    "clear.png": (255, 255, 255),
    "half.png": (255, 127, 127),
    "dark.png": (1, 1, 1),  # 300 of 65,535
    "deep.png": (128, 128, 128),
    "palette.png": (10, 220, 30),
}


def test_every_format_keeps_its_colors(tree):
    write_every_format(tree)
    images, paths, note = cached_images(tree, 8, 3)
    assert images.shape == (11, 3, 8, 8)
    assert note == ""
    by_name = dict(zip(paths, images, strict=True))
    for name, color in EXPECTED.items():
        error = (by_name[name].float() - torch.tensor(color).view(3, 1, 1)).abs().max()
        assert error <= 3, name  # JPEG is not exact
    assert by_name["wide.png"][:, :, 2:6].max() <= 6  # the filter reaches a little beyond the square
    rotated = by_name["rotated.png"]
    assert rotated[:, 4, 0].tolist() == [0, 0, 255]
    assert rotated[:, 4, 7].tolist() == [255, 0, 0]
    gray, _, _ = cached_images(tree, 8, 1)
    assert gray.shape == (11, 1, 8, 8)


def test_a_folder_is_split_labeled_and_cached(tree, monkeypatch):
    for label, kind in enumerate(("cats", "dogs")):
        for i in range(20):
            write_flat(tree / kind / f"{i}.png", (i, 0, label))
    first = load("folder", data_dir=tree, image_size=8, holdout=0.25)
    assert first.classes == ("cats", "dogs")
    assert len(first.train.images) + len(first.test.images) == 40
    assert 3 <= len(first.test.images) <= 20
    for split in (first.train, first.test):
        assert torch.equal(split.labels, split.images[:, 2, 0, 0].long())
    monkeypatch.setattr("vqvae.data.image_folder.read_image", None)  # the second load must not open an image
    again = load("folder", data_dir=tree, image_size=8, holdout=0.25)
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(again.test.labels, first.test.labels)


def test_new_images_do_not_move_others_between_the_splits(tree):
    def test_split(count: int) -> set[int]:
        for i in range(count):
            write_flat(tree / f"{i}.png", (i, 0, 0))
        return {int(image[0, 0, 0]) for image in load("folder", data_dir=tree, image_size=8, holdout=0.3).test.images}

    assert test_split(30) == {i for i in test_split(60) if i < 30}


def test_the_order_does_not_depend_on_the_file_system(tree, monkeypatch):
    for name in ("b/1.png", "a/2.png", "a/1.png", "c.png"):
        write_flat(tree / name)
    names = ["a/1.png", "a/2.png", "b/1.png", "c.png"]
    _, paths, _ = cached_images(tree, 8, 3)
    listed = list(tree.rglob("*"))
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(Path, "rglob", lambda folder, pattern, order=order: iter(order))
        assert image_files(tree, "data_dir") == [tree / name for name in names]
        assert cached_images(tree, 8, 3)[1] == paths


def test_unreadable_images_are_counted_named_and_left_out(tree):
    write_every_format(tree)
    (tree / "broken.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="unreadable files left out: 1 .broken.png"):
        folder = load("folder", data_dir=tree, image_size=8)
    assert len(folder.train.images) + len(folder.test.images) == 11
    assert "unreadable files left out: 1" in folder.note


def test_a_decompression_bomb_is_an_unreadable_image(tree, monkeypatch):
    for name, side in (("a.png", 8), ("b.png", 8), ("bomb.png", 64)):
        write_flat(tree / name, side=side)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(UserWarning, match="unreadable files left out: 1 .bomb.png"):
        load("folder", data_dir=tree, image_size=8)


def test_a_changed_image_is_read_again(tree):
    for name in ("a.png", "b.png"):
        write_flat(tree / name, (1, 1, 1))
        os.utime(tree / name, (10**9, 10**9))
    load("folder", data_dir=tree, image_size=8)
    write_flat(tree / "b.png", (250, 1, 1))
    os.utime(tree / "b.png", (10**9 + 60, 10**9 + 60))  # seconds: some file systems store no fractions
    again = load("folder", data_dir=tree, image_size=8)
    assert torch.cat([again.train.images, again.test.images]).max() == 250


def test_writing_to_the_images_leaves_the_cache_unchanged(tree):
    for name in ("a.png", "b.png"):
        write_flat(tree / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("folder", data_dir=tree, image_size=8).train.images.zero_()
        assert load("folder", data_dir=tree, image_size=8).train.images.min() == 9


def test_file_names_need_not_be_utf8(tree):
    for name in (b"\xe9.png", b"\xff.png"):
        try:
            with open(os.path.join(os.fsencode(tree), name), "wb") as file:
                Image.new("RGB", (8, 8)).save(file, "PNG")
        except OSError:
            pytest.skip("this file system allows UTF-8 names only")
    both = load("folder", data_dir=tree, image_size=8)
    assert len(both.train.images) == len(both.test.images) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "has no image files"),
        ({"a.png": b"x"}, "none of its 1 image files can be read"),
        ({"a.png": None}, "has one readable image"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*unreadable files")
def test_a_folder_without_enough_images_is_refused(tree, files, message):
    for name, content in (files or {}).items():
        if content is None:
            write_flat(tree / name)
        else:
            (tree / name).write_bytes(content)
    if files is None:
        tree.rmdir()
    with pytest.raises(OptionError, match=message) as caught:
        load("folder", data_dir=tree, image_size=8)
    assert caught.value.flagged.startswith(f"--data-dir {tree}: ")


def test_an_error_names_the_option_that_chose_the_folder(tree):
    with pytest.raises(OptionError) as caught:
        image_files(tree / "absent", "input")
    assert caught.value.flagged.startswith("--input ")


def test_an_interrupted_conversion_leaves_no_files(tree, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    write_every_format(tree)
    with monkeypatch.context() as patch:
        patch.setattr("vqvae.data.image_folder.read_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("folder", data_dir=tree, image_size=8)
    assert list((tmp_path / "cache" / "vqvae").iterdir()) == []
    assert len(load("folder", data_dir=tree, image_size=8).train.images)


def test_a_cache_without_its_array_is_made_again(tree, tmp_path):
    write_every_format(tree)
    first = load("folder", data_dir=tree, image_size=8).train.images.clone()
    for array in (tmp_path / "cache" / "vqvae").glob("*.npy"):
        array.unlink()
    assert torch.equal(load("folder", data_dir=tree, image_size=8).train.images, first)


def test_a_cache_that_cannot_be_written_is_named(tree, tmp_path, monkeypatch):
    write_flat(tree / "a.png")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written .*XDG_CACHE_HOME"):
        load("folder", data_dir=tree, image_size=8)
