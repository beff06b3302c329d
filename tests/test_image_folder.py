"""Folders of image files: formats and colors, splits by path, the cache, unreadable files."""

import json
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import files_up_to
from vqvae import decoding
from vqvae.data import cache, image_folder, load
from vqvae.data.image_folder import cached_images
from vqvae.data.listing import Listing
from vqvae.decoding import read_image
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
    """Write 11 images, most of a single color, in every supported format and mode."""
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
    images, paths, unreadable, *_ = cached_images(tree, 8, 3)
    assert images.shape == (11, 3, 8, 8)
    assert unreadable == {}
    by_name = dict(zip(paths, images, strict=True))
    for name, color in EXPECTED.items():
        error = (by_name[name].float() - torch.tensor(color).view(3, 1, 1)).abs().max()
        assert error <= 3, name  # JPEG is not exact
    assert by_name["wide.png"][:, :, 2:6].max() <= 6  # the filter reaches a little beyond the square
    rotated = by_name["rotated.png"]
    assert rotated[:, 4, 0].tolist() == [0, 0, 255]
    assert rotated[:, 4, 7].tolist() == [255, 0, 0]
    gray, *_ = cached_images(tree, 8, 1)
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


def colors(split) -> list[int]:
    return sorted(split.images[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("held_out", ["test", "val", "Valid", "validation", "Testing"])
def test_folders_that_are_splits_are_no_classes(tree, held_out):
    for i, name in enumerate(("cats", "dogs", "cats", "dogs", "dogs")):
        write_flat(tree / ("train" if i < 3 else held_out) / name / f"{i}.png", (i, 0, 0))
    data = load("folder", data_dir=tree, image_size=8)
    assert data.classes == ("cats", "dogs")
    assert (colors(data.train), colors(data.test)) == ([0, 1, 2], [3, 4])
    assert data.test.labels.tolist() == [1, 1]
    assert data.note == f"split by the folders train and {held_out}"


def test_images_beside_train_and_test_are_left_out_with_a_note(tree):
    for name in ("train/1.png", "train/2.png", "test/3.png", "other/4.png", "5.png"):
        write_flat(tree / "set" / name)
    data = load("folder", data_dir=tree, image_size=8)
    assert (len(data.train.images), len(data.test.images)) == (2, 1)
    assert data.classes == ()
    assert data.note == (
        "split by the folders set/train and set/test; images outside of these left out: 2, such as set/5.png"
    )


def test_a_folder_of_validation_images_is_the_validation_split(tree):
    for i, split in enumerate(["train"] * 5 + ["val"] * 3 + ["test"] * 2):
        write_flat(tree / split / "ab"[i % 2] / f"{i}.png", (i, 0, 0))
    data = load("folder", data_dir=tree, image_size=8, validation=0.1)
    found = {name: colors(split) for name, split in data.splits.items()}
    assert found == {"train": [0, 1, 2, 3, 4], "validation": [5, 6, 7], "test": [8, 9]}
    assert data.note == "split by the folders train, val and test"
    for split in data.splits.values():
        assert torch.equal(split.labels, split.images[:, 0, 0, 0].long() % 2)
    without = load("folder", data_dir=tree, image_size=8)
    assert {name: colors(split) for name, split in without.splits.items()} == {"train": [0, 1, 2, 3, 4], "test": [8, 9]}
    assert without.note == "split by the folders train and test; images of val not used: 3"
    for path in (tree / "val").rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(OptionError, match="none of the images in val can be read"):
        load("folder", data_dir=tree, image_size=8, validation=0.1)


def test_a_split_without_a_readable_image_is_refused(tree):
    for name in ("train/1.png", "train/2.png"):
        write_flat(tree / name)
    (tree / "test").mkdir()
    (tree / "test" / "3.png").write_bytes(b"x")
    with pytest.raises(OptionError, match="none of the images in test can be read"):
        load("folder", data_dir=tree, image_size=8)


def test_a_split_folder_of_its_own_is_no_class(tree):
    for i in range(20):
        write_flat(tree / "train" / str(i % 2) / f"{i}.png", (i, 0, 0))
    data = load("folder", data_dir=tree, image_size=8, holdout=0.3)
    assert data.classes == ("0", "1")
    assert len(data.test.images) > 0


def test_classes_that_are_numbers_are_in_their_order(tree):
    for i, name in enumerate(("10", "9", "1", "02")):
        write_flat(tree / name / "a.png", (i, 0, 0))
    data = load("folder", data_dir=tree, image_size=8)
    assert data.classes == ("1", "02", "9", "10")
    label = {int(image[0, 0, 0]): int(label) for split in data[1:3] for image, label in zip(*split, strict=True)}
    assert label == {2: 0, 3: 1, 1: 2, 0: 3}


def test_images_outside_the_class_folders_mean_that_there_are_no_classes(tree):
    for name in ("cats/1.png", "dogs/2.png", "3.png"):
        write_flat(tree / name)
    data = load("folder", data_dir=tree, image_size=8)
    assert data.classes == ()
    assert {*data.train.labels.tolist(), *data.test.labels.tolist()} == {-1}
    assert data.note == "no classes, because of images without one: 1, such as 3.png"


def test_labels_of_a_single_class_are_left_out_with_a_note(tree):
    for i in range(12):
        write_flat(tree / ("train", "test")[i % 2] / "cats" / f"{i}.png")
    data = load("folder", data_dir=tree, image_size=8)
    assert data.classes == ()
    assert data.note.endswith("no classes, because all images are of one: cats")
    with pytest.raises(OptionError, match="has no labels .*all images are of one: cats"):
        data.need_classes("conditional")


def test_a_note_of_long_paths_is_short_enough_for_a_checkpoint(tree):
    deep = "/".join(["long" * 60] * 5)
    for name in ("train/1.png", "test/2.png", f"{deep}/3.png"):
        write_flat(tree / deep / name)
    note = load("folder", data_dir=tree, image_size=8).note
    assert "images outside of these left out: 1, such as long" in note
    assert len(note) < 1000


def test_an_image_that_moves_to_another_class_gets_its_label(tree, tmp_path):
    write_flat(tmp_path / "real.png")
    for name in ("cats", "dogs", "pigs"):
        write_flat(tree / name / "a.png")
    link = tree / "cats" / "link.png"
    link.symlink_to(tmp_path / "real.png")
    cached_images(tree, 8, 3)
    link.rename(tree / "dogs" / "link.png")
    assert "dogs/link.png" in cached_images(tree, 8, 3).paths


def test_new_images_do_not_move_others_between_the_splits(tree):
    def test_split(count: int) -> set[int]:
        for i in range(count):
            write_flat(tree / f"{i}.png", (i, 0, 0))
        return {int(image[0, 0, 0]) for image in load("folder", data_dir=tree, image_size=8, holdout=0.3).test.images}

    assert test_split(30) == {i for i in test_split(60) if i < 30}


def test_the_place_of_a_path_stays_as_it_is():
    """So that later versions hold out the same images."""
    assert cache.position("cats/1.png") == 0.011905832120586268


@pytest.mark.parametrize(("train", "count"), [([True, True], 1), ([False, False], 1), ([True, True, False], 2)])
def test_both_splits_have_an_image(train, count):
    assert cache.train_count(train) == count


def test_the_order_does_not_depend_on_the_file_system(tree, monkeypatch):
    for name in ("b/1.png", "a/2.png", "a/1.png", "c.png"):
        write_flat(tree / name)
    paths = cached_images(tree, 8, 3).paths
    listed = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.png"))
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(image_folder, "list_images", lambda *_, order=order: Listing(order, {}, order))
        assert cached_images(tree, 8, 3).paths == paths


def test_unreadable_images_are_counted_named_and_left_out(tree):
    write_every_format(tree)
    (tree / "broken.png").write_bytes(b"not an image")
    folder = load("folder", data_dir=tree, image_size=8)
    assert len(folder.train.images) + len(folder.test.images) == 11
    assert folder.note == "unreadable files left out: 1"
    assert folder.unreadable == {"broken.png": "no image in PNG, JPEG, WEBP, BMP, GIF, TIFF"}


def test_a_decompression_bomb_is_an_unreadable_image(tree, monkeypatch):
    for name, side in (("a.png", 8), ("b.png", 8), ("bomb.png", 64)):
        write_flat(tree / name, side=side)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    unreadable = load("folder", data_dir=tree, image_size=8).unreadable
    assert unreadable["bomb.png"].startswith("Image size (4096 pixels) exceeds")


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_an_image_that_would_take_more_than_500_mb_is_refused_before_it_is_decoded(tree, monkeypatch):
    header = struct.pack(">2I5B", 9000, 9000, 8, 2, 0, 0, 0)
    (tree / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") * 9)
    with pytest.raises(ValueError, match="9000x9000 pixels take more than 500 MB; save it at a smaller size"):
        read_image(tree / "bomb.png", 8, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000 * 8000)  # Pillow only warns
    with pytest.raises(ValueError, match="save it at a smaller size"):
        read_image(tree / "bomb.png", 8, 3)
    Image.new("RGB", (10, 11)).save(tree / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.open(tree / "small.png")  # no error in the rest of the program


def test_a_small_tiff_of_huge_tiles_is_refused_before_it_is_decoded(tree):
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<2H2L", tag, 4, 1, value) for tag, value in tags.items())
    (tree / "a.tif").write_bytes(b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4))
    with pytest.raises(ValueError, match="16x16 pixels take more than 500 MB"):
        read_image(tree / "a.tif", 8, 3)


def test_a_jpeg_of_thousands_of_scans_is_refused(tree):
    Image.new("RGB", (64, 64), "red").save(tree / "a.jpg", progressive=True)
    assert read_image(tree / "a.jpg", 8, 3).shape == (3, 8, 8)
    raw = (tree / "a.jpg").read_bytes()
    last = raw.rindex(b"\xff\xda")
    (tree / "a.jpg").write_bytes(raw[:-2] + raw[last:-2] * 3000 + raw[-2:])
    with pytest.raises(ValueError, match="a JPEG of 30.. scans"):
        read_image(tree / "a.jpg", 8, 3)


def test_a_file_of_hundreds_of_megabytes_is_no_image(tree):
    write_flat(tree / "a.png")
    os.truncate(tree / "a.png", decoding.LARGEST_FILE + 1)
    with pytest.raises(ValueError, match="a file of more than 240 MiB"):
        read_image(tree / "a.png", 8, 3)


def gray_levels(tree: Path, pixels: np.ndarray) -> list[int]:
    """The first row of an image of one pixel per value, after reading."""
    Image.fromarray(pixels.reshape(1, -1).repeat(pixels.size, axis=0)).save(tree / "a.tif")
    return read_image(tree / "a.tif", pixels.size, 1)[0, 0].tolist()


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([0, 300, 65535], np.uint16), [0, 1, 255]),
        (np.array([0, 0, 257], np.uint16), [0, 0, 1]),  # a dark image stays dark
        (np.array([0, 257, 25700], np.int32), [0, 1, 100]),
        (np.array([0, 0.2, 0.4], np.float32), [0, 51, 102]),
        (np.array([0, 0.2, 1.0005], np.float32), [0, 51, 255]),  # a filter that overshoots
        (np.array([0, 2, 3], np.float32), [0, 2, 3]),
        (np.array([0, 257, 25700], np.float32), [0, 1, 100]),
    ],
)
def test_pixels_of_16_and_32_bits_are_scaled_by_a_rule_and_not_by_their_maximum(tree, pixels, expected):
    assert gray_levels(tree, pixels) == expected


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            np.array([0, 65536], np.int32),
            "pixels from 0 to 65536; save it with 8 or 16 bits, or with floats from 0 to 1",
        ),
        (np.array([-1, 7], np.int32), "pixels from -1 to 7"),
        (np.array([-0.5, 0.5], np.float32), "pixels from -0.5 to 0.5"),
        (np.array([0, 1e6], np.float32), "pixels from 0 to 1e.06"),
        (np.array([0, np.nan], np.float32), "not finite"),
        (np.array([0, np.inf], np.float32), "not finite"),
        (np.array([0, -np.inf], np.float32), "not finite"),
    ],
)
def test_pixels_outside_of_these_rules_are_refused(tree, pixels, message):
    with pytest.raises(ValueError, match=message):
        gray_levels(tree, pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_tiff_in_lab_is_read_in_gray_and_in_color(tree, channels):
    Image.new("LAB", (8, 8), (138, 128, 128)).save(tree / "a.tif")  # L* = 54.1, which is 129 in sRGB
    assert abs(read_image(tree / "a.tif", 8, channels).astype(int) - 129).max() <= 3


def test_the_error_of_a_tiff_that_pillow_cannot_read_says_that_it_is_a_tiff(tree):
    (tree / "a.tif").write_bytes(b"II*\0" + bytes(40))
    with pytest.raises(ValueError, match="a TIFF of a kind that Pillow does not read, or damaged; save it as PNG"):
        read_image(tree / "a.tif", 8, 3)


@pytest.mark.parametrize(
    ("brand", "package"), [(b"heic", "pillow-heif"), (b"mif1", "pillow-heif"), (b"avif", "pillow-avif-plugin")]
)
def test_the_error_of_an_image_names_the_package_it_needs_whatever_the_file_name(tree, monkeypatch, brand, package):
    monkeypatch.setattr(decoding, "optional_formats", list)
    (tree / "a.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(12))
    with pytest.raises(ValueError, match=f"(HEIC|AVIF), which needs a package: pip install {package}"):
        read_image(tree / "a.jpg", 8, 3)


def test_an_installed_package_reads_what_was_unreadable_before(tree, monkeypatch):
    write_flat(tree / "a.png")
    (tree / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    monkeypatch.setattr(cache, "optional_formats", list)
    assert "pillow-heif" in cached_images(tree, 8, 3).unreadable["b.HEIC"]
    monkeypatch.setattr(cache, "optional_formats", lambda: ["HEIF"])
    monkeypatch.setattr(image_folder, "read_image", lambda *_: np.full((3, 8, 8), 5, np.uint8))
    assert sorted(cached_images(tree, 8, 3).paths) == ["a.png", "b.HEIC"]


@pytest.mark.skipif("AVIF" not in decoding.optional_formats(), reason="needs a Pillow with AVIF")
def test_avif_is_read(tree):
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tree / "a.avif", quality=100)
    assert abs(read_image(tree / "a.avif", 8, 3)[:, 4, 4].astype(int) - [200, 100, 50]).max() <= 3


def test_other_formats_with_the_name_of_an_image_are_not_decoded(tree, tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'executed'}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("a.png", "b.png"):
        write_flat(tree / name)
    (tree / "script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    Image.new("RGB", (8, 8)).save(tree / "map.png", "PPM")
    unreadable = load("folder", data_dir=tree, image_size=8).unreadable
    assert unreadable == dict.fromkeys(("map.png", "script.png"), "no image in PNG, JPEG, WEBP, BMP, GIF, TIFF")
    assert not (tmp_path / "executed").exists()


def test_named_pipes_devices_and_sockets_are_never_opened(tree):
    for name in ("a.png", "b.png"):
        write_flat(tree / name)
    os.mkfifo(tree / "pipe.png")
    os.symlink("/dev/zero", tree / "device.png")
    os.symlink(tree / "pipe.png", tree / "link.png")
    with socket.socket(socket.AF_UNIX) as listener, warnings.catch_warnings():
        here = Path.cwd()
        os.chdir(tree)  # names of sockets are short
        listener.bind("socket.png")
        os.chdir(here)
        warnings.simplefilter("error")
        _, paths, *_ = cached_images(tree, 8, 3)
    assert sorted(paths) == ["a.png", "b.png"]
    for name in ("pipe.png", "device.png", "link.png", "socket.png"):
        with pytest.raises(OSError, match="not a regular file"):
            read_image(tree / name, 8, 3)


def test_links_to_images_are_followed(tree, tmp_path):
    write_flat(tmp_path / "elsewhere" / "a.png", (7, 7, 7))
    write_flat(tree / "b.png")
    os.symlink(tmp_path / "elsewhere" / "a.png", tree / "a.png")
    images, paths, *_ = cached_images(tree, 8, 3)
    assert images[paths.index("a.png")].unique().tolist() == [7]


def test_file_names_that_a_terminal_would_obey_are_shown_escaped(tree):
    for kind in ("cats", "\x1b[31mdogs\n"):
        write_flat(tree / kind / "a.png")
    (tree / "cats" / "\x1b[2Jbad\n.png").write_bytes(b"x")
    folder = load("folder", data_dir=tree, image_size=8)
    shown = [*folder.classes, folder.note]
    assert all(text.isprintable() for text in shown)
    assert folder.classes == (r"\x1b[31mdogs\n", "cats")


def test_an_unreadable_image_is_read_when_its_permissions_change(tree, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        write_flat(tree / name)

    def as_user(path, *shape):  # root reads everything
        if not path.stat().st_mode & 0o444:
            raise PermissionError(13, "Permission denied", str(path))
        return read_image(path, *shape)

    monkeypatch.setattr("vqvae.data.image_folder.read_image", as_user)
    (tree / "b.png").chmod(0)
    for _ in range(2):
        found = cached_images(tree, 8, 3)
        assert len(found.paths) == 2
        assert found.unreadable == {"b.png": "Permission denied"}
    (tree / "b.png").chmod(0o644)
    assert len(cached_images(tree, 8, 3).paths) == 3


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
        ({"a.png": b"x"}, "none of its 1 images can be read .a.png: no image in PNG"),
        ({"a.png": None}, "has one readable image"),
    ],
)
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


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "vqvae").iterdir())  # the index, then the array


def described(index: bytes) -> dict:
    """The content of an index, without the time of its array."""
    return {key: value for key, value in json.loads(index).items() if key not in ("written", "checksum")}


def test_any_flipped_bit_in_the_cache_is_found_and_the_cache_made_again(tree, tmp_path):
    for name, red in (("cats/a.png", 1), ("cats/b.png", 2), ("dogs/c.png", 3)):
        write_flat(tree / name, (red, 0, 0), side=4)
    (tree / "dogs" / "bad.png").write_bytes(b"x")
    mapped, paths, *_ = cached_images(tree, 2, 3)
    images = mapped.clone()
    index, array = cache_files(tmp_path)
    contents = {file: file.read_bytes() for file in (index, array)}
    rng = np.random.default_rng(0)
    for file, whole in contents.items():
        for position in rng.integers(len(whole), size=30):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            again, same_paths, *_ = cached_images(tree, 2, 3)
            assert torch.equal(again, images)
            assert same_paths == paths
            assert array.read_bytes() == contents[array]
            assert described(index.read_bytes()) == described(contents[index])


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"7", b"[" * 100_000, b'{"paths": 1}', b"\xff"])
def test_an_index_of_something_else_is_made_again(tree, tmp_path, content):
    write_flat(tree / "a.png")
    cached_images(tree, 8, 3)
    index, array = cache_files(tmp_path)
    index.write_bytes(content)
    assert cached_images(tree, 8, 3).paths == ["a.png"]
    array.write_bytes(array.read_bytes()[:-1])
    assert len(cached_images(tree, 8, 3).images) == 1


@pytest.mark.parametrize("size", [0, 100, 3000])  # no byte; the header of the array; most of the array
def test_a_disk_that_is_full_leaves_no_cache_behind(tree, tmp_path, size):
    for i in range(20):
        write_flat(tree / f"{i}.png")
    with (
        files_up_to(size),
        pytest.raises(UserError, match="npy: cannot be written .File too large.*XDG_CACHE_HOME") as caught,
    ):
        cached_images(tree, 8, 3)
    assert "\n" not in str(caught.value)
    assert cache_files(tmp_path) == []


def test_an_index_that_cannot_be_written_leaves_no_array_behind(tree, tmp_path):
    (tree / f"{'long' * 50}.png").write_bytes(b"x")
    write_flat(tree / "a.png", side=2)
    with files_up_to(160), pytest.raises(UserError, match="json: cannot be written .File too large"):
        cached_images(tree, 1, 3)
    assert cache_files(tmp_path) == []


def test_a_cache_that_cannot_be_replaced_stays(tree, tmp_path):
    for name in ("a.png", "b.png"):
        write_flat(tree / name)
    (tree / "bad.png").write_bytes(b"x")
    cached_images(tree, 8, 3)
    before = {file: file.read_bytes() for file in cache_files(tmp_path)}
    (tree / "bad.png").chmod(0o600)
    with files_up_to(0), pytest.raises(UserError, match="cannot be written"):
        cached_images(tree, 8, 3)
    assert {file: file.read_bytes() for file in cache_files(tmp_path)} == before


def test_a_cache_that_cannot_be_written_is_named(tree, tmp_path, monkeypatch):
    write_flat(tree / "a.png")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written .*XDG_CACHE_HOME"):
        load("folder", data_dir=tree, image_size=8)
