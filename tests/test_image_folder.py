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
from vqvae.data import decoding, load
from vqvae.data.image_folder import cached_images, image_files, read_image
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
    with pytest.warns(UserWarning, match="unreadable files left out: 1 .bomb.png: Image size .4096 pixels. exceeds"):
        load("folder", data_dir=tree, image_size=8)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_an_image_that_would_take_more_than_500_mb_is_refused_before_it_is_decoded(tree, monkeypatch):
    header = struct.pack(">2I5B", 9000, 9000, 8, 2, 0, 0, 0)
    (tree / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") * 9)
    with pytest.raises(ValueError, match="9000x9000 pixels take more than 500 MB; save it at a smaller size"):
        read_image(tree / "bomb.png", 8, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000 * 8000)  # Pillow only warns
    with pytest.raises(Image.DecompressionBombWarning, match="exceeds limit"):
        read_image(tree / "bomb.png", 8, 3)


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


def test_pixels_that_are_no_numbers_are_refused(tree):
    for value in (np.nan, np.inf):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(tree / "a.tif")
        with pytest.raises(ValueError, match="not finite"):
            read_image(tree / "a.tif", 8, 3)


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
    with pytest.warns(UserWarning, match="left out: 2 .*script.png: no image in PNG, JPEG, WEBP, BMP, GIF, TIFF"):
        load("folder", data_dir=tree, image_size=8)
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
        _, paths, _ = cached_images(tree, 8, 3)
    assert sorted(paths) == ["a.png", "b.png"]
    for name in ("pipe.png", "device.png", "link.png", "socket.png"):
        with pytest.raises(OSError, match="not a regular file"):
            read_image(tree / name, 8, 3)


def test_links_to_images_are_followed(tree, tmp_path):
    write_flat(tmp_path / "elsewhere" / "a.png", (7, 7, 7))
    write_flat(tree / "b.png")
    os.symlink(tmp_path / "elsewhere" / "a.png", tree / "a.png")
    images, paths, _ = cached_images(tree, 8, 3)
    assert images[paths.index("a.png")].unique().tolist() == [7]


def test_file_names_that_a_terminal_would_obey_are_shown_escaped(tree):
    for kind in ("cats", "\x1b[31mdogs\n"):
        write_flat(tree / kind / "a.png")
    (tree / "cats" / "\x1b[2Jbad\n.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="left out: 1") as caught:
        folder = load("folder", data_dir=tree, image_size=8)
    shown = [*folder.classes, *(str(warning.message) for warning in caught)]
    assert all(text.isprintable() for text in shown)
    assert folder.classes == (r"'\x1b[31mdogs\n'", "cats")


def test_an_unreadable_image_is_read_when_its_permissions_change(tree, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        write_flat(tree / name)

    def as_user(path, size, channels):  # root reads everything
        if not path.stat().st_mode & 0o444:
            raise PermissionError(13, "Permission denied", str(path))
        return read_image(path, size, channels)

    monkeypatch.setattr("vqvae.data.image_folder.read_image", as_user)
    (tree / "b.png").chmod(0)
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out: 1 .b.png: Permission denied"):
            assert len(cached_images(tree, 8, 3)[1]) == 2
    (tree / "b.png").chmod(0o644)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cached_images(tree, 8, 3)[1]) == 3


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


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "vqvae").iterdir())  # the index, then the array


def test_any_flipped_bit_in_the_cache_is_found_and_the_cache_made_again(tree, tmp_path):
    for name, red in (("cats/a.png", 1), ("cats/b.png", 2), ("dogs/c.png", 3)):
        write_flat(tree / name, (red, 0, 0), side=4)
    (tree / "dogs" / "bad.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="left out: 1"):
        mapped, paths, _ = cached_images(tree, 2, 3)
    images = mapped.clone()
    index, array = cache_files(tmp_path)
    contents = {file: file.read_bytes() for file in (index, array)}
    rng = np.random.default_rng(0)
    for file, whole in contents.items():
        for position in rng.integers(len(whole), size=30):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            with pytest.warns(UserWarning, match="left out: 1"):
                again, same_paths, _ = cached_images(tree, 2, 3)
            assert torch.equal(again, images)
            assert same_paths == paths
            assert array.read_bytes() == contents[array]
            assert json.loads(index.read_bytes()) == json.loads(contents[index])


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"7", b"[" * 100_000, b'{"paths": 1}', b"\xff"])
def test_an_index_of_something_else_is_made_again(tree, tmp_path, content):
    write_flat(tree / "a.png")
    cached_images(tree, 8, 3)
    index, array = cache_files(tmp_path)
    index.write_bytes(content)
    assert cached_images(tree, 8, 3)[1] == ["a.png"]
    array.write_bytes(array.read_bytes()[:-1])
    assert len(cached_images(tree, 8, 3)[0]) == 1


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
    with pytest.warns(UserWarning, match="left out: 1"):
        cached_images(tree, 8, 3)
    before = {file: file.read_bytes() for file in cache_files(tmp_path)}
    (tree / "bad.png").chmod(0o600)
    with files_up_to(0), pytest.raises(UserError, match="cannot be written"):
        cached_images(tree, 8, 3)
    assert {file: file.read_bytes() for file in cache_files(tmp_path)} == before


def test_a_folder_that_cannot_be_listed_is_named(tree, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OptionError, match="cannot be listed .Permission denied"):
        image_files(tree, "data_dir")
    with pytest.raises(OptionError, match="cannot be listed .File name too long"):
        image_files(tree / ("x" * 300), "data_dir")


def test_a_cache_that_cannot_be_written_is_named(tree, tmp_path, monkeypatch):
    write_flat(tree / "a.png")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written .*XDG_CACHE_HOME"):
        load("folder", data_dir=tree, image_size=8)
