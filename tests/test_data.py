"""Data sets: readers on small files in the published formats, splits that stay apart, order by the seed."""

import gzip
import http.client
import io
import math
import os
import pickle
import socket
import struct
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from vqvae import data
from vqvae.data import batch_indices, load, pixel_variance
from vqvae.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_network(monkeypatch):
    import torchvision

    def refuse(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    for name in ("MNIST", "CIFAR10", "SVHN"):
        monkeypatch.setattr(torchvision.datasets, name, refuse)


def quietly(name: str, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the checksums of made-up files
        return load(name, **options)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">4B{values.ndim}i", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(folder: Path, zipped: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    held = {
        "train-images-idx3-ubyte": rng.integers(256, size=(6, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": rng.integers(10, size=6, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(256, size=(3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(10, size=3, dtype=np.uint8),
    }
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, values in held.items():
        content = idx(values)
        (raw / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return held


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, which is how the published batches hold their keys and pixels."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_old_string(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch[str] = dispatch[bytes] = save_old_string


def cifar_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    out = io.BytesIO()
    content = {"batch_label": "a batch", "data": pixels, "labels": labels, "filenames": ["x.png"] * len(labels)}
    Python2Pickler(out, protocol=2).dump(content)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batches = {}
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for i, name in enumerate(data.CIFAR_MD5):
        batches[name] = rng.integers(256, size=(2, 3072), dtype=np.uint8)
        (folder / "cifar-10-batches-py" / name).write_bytes(cifar_batch(batches[name], [i, 9 - i]))
    return batches


def test_digits_are_split_once_and_for_all():
    digits = load("digits")
    assert digits.train.images.shape == (1500, 1, 32, 32)
    assert digits.test.images.shape == (297, 1, 32, 32)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() > 250
    assert torch.equal(load("digits").test.images, digits.test.images)
    train = {x.numpy().tobytes() for x in digits.train.images}
    assert not any(x.numpy().tobytes() in train for x in digits.test.images)
    assert sorted(digits.test.labels.unique().tolist()) == list(range(10))


def test_photos_hold_out_a_region_of_their_own():
    from sklearn.datasets import load_sample_images

    photos = load("photos", crops=40, test_crops=20)
    assert photos.train.images.shape == (40, 3, 32, 32)
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


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_read_from_idx_files(tmp_path, zipped):
    held = write_mnist(tmp_path, zipped)
    mnist = quietly("mnist", data_dir=tmp_path)
    assert np.array_equal(mnist.train.images[:, 0], held["train-images-idx3-ubyte"])
    assert mnist.test.labels.tolist() == held["t10k-labels-idx1-ubyte"].tolist()
    assert "published" in mnist.note


def test_other_checksums_are_said_and_the_files_read_all_the_same(tmp_path):
    write_mnist(tmp_path)
    with pytest.warns(UserWarning, match="not the published ones") as caught:
        load("mnist", data_dir=tmp_path)
    assert len(caught) == 1


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"\x00\x00\x0d" + raw[3:], lambda raw: b""])
def test_a_damaged_idx_file_is_named(tmp_path, damage):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte"):
        quietly("mnist", data_dir=tmp_path)


def test_a_damaged_gzip_file_is_named(tmp_path):
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-12], whole[:10] + b"\xff" * 4 + whole[14:], b"junk"):  # cut, no deflate stream, no gzip
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="train-labels-idx1-ubyte.gz"):
            quietly("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("train-images-idx3-ubyte", np.zeros(6, np.uint8)),  # labels in the place of pictures
        ("train-images-idx3-ubyte", np.zeros((6, 8, 8), np.uint8)),
        ("train-images-idx3-ubyte", np.zeros((0, 28, 28), np.uint8)),
        ("train-labels-idx1-ubyte", np.zeros(5, np.uint8)),
        ("t10k-labels-idx1-ubyte", np.array([0, 1, 10], np.uint8)),
        ("t10k-labels-idx1-ubyte", np.zeros((3, 1), np.uint8)),
    ],
)
def test_an_idx_file_of_something_else_is_named(tmp_path, name, values):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / name).write_bytes(idx(values))
    with pytest.raises(UserError, match=f"{name}: "):
        quietly("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("binarisation", ["threshold", "bernoulli"])
def test_binary_mnist_is_binary_at_every_size(tmp_path, binarisation):
    write_mnist(tmp_path)
    scaled = quietly("mnist-binary", data_dir=tmp_path, image_size=16, binarisation=binarisation)
    assert scaled.train.images.shape == (6, 1, 16, 16)
    assert sorted(scaled.train.images.unique().tolist()) == [0, 255]


def test_binary_mnist_is_cut_or_drawn(tmp_path):
    held = write_mnist(tmp_path)["train-images-idx3-ubyte"]
    cut = quietly("mnist-binary", data_dir=tmp_path)
    assert np.array_equal(cut.train.images[:, 0], np.where(held > 127, 255, 0))
    drawn = quietly("mnist-binary", data_dir=tmp_path, binarisation="bernoulli").train.images
    assert sorted(drawn.unique().tolist()) == [0, 255]
    assert torch.equal(drawn, quietly("mnist-binary", data_dir=tmp_path, binarisation="bernoulli").train.images)
    for low, high in ((0, 85), (85, 170), (170, 256)):  # a pixel's share of draws is its brightness
        pixels = (held >= low) & (held < high)
        share = drawn[:, 0].numpy()[pixels].mean() / 255
        error = 3 * 0.5 / math.sqrt(pixels.sum())
        assert share == pytest.approx(held[pixels].mean() / 255, abs=error)


def test_cifar_is_read_from_its_pickles(tmp_path):
    batches = write_cifar(tmp_path)
    cifar = quietly("cifar10", data_dir=tmp_path)
    assert cifar.train.images.shape == (10, 3, 32, 32)
    assert np.array_equal(cifar.train.images[2:4].flatten(1), batches["data_batch_2"])
    assert cifar.test.labels.tolist() == [5, 4]
    assert cifar.classes[:2] == ("airplane", "automobile")


class Payload:
    """Unpickles by calling a function of any module: as an attack would, or as a harmless stand-in."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": Payload(open, "executed", "w")}, 2),
        cifar_batch(PIXELS, [1, Payload(os.mkdir, "executed")]),  # beside pixels that are as they should be
        pickle.dumps({"data": Payload(eval, "open('executed', 'w')"), "labels": [1]}, 4),
        pickle.dumps({"data": Payload(np.load, "executed"), "labels": [1]}, 2),  # of NumPy's own, yet not an array
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",  # a dotted name, which protocol 4 would follow
    ],
)
def test_a_pickle_with_code_is_refused_unexecuted(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3: not a CIFAR-10 batch .it asks for"):
        quietly("cifar10", data_dir=tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        pickle.dumps([1], 2),
        cifar_batch(PIXELS, [1, 2])[:-40],
        cifar_batch(PIXELS[:, :100], [1, 2]),
        cifar_batch(PIXELS + 0.5, [1, 2]),
        cifar_batch(PIXELS.astype(np.int64) + 300, [1, 2]),
        cifar_batch(PIXELS, [1]),
        cifar_batch(PIXELS, [1, 10]),
        cifar_batch(PIXELS, [1, -1]),
        cifar_batch(PIXELS, [1, 2.5]),
    ],
)
def test_a_garbled_cifar_batch_is_named(tmp_path, content):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3: ") as caught:
        quietly("cifar10", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_old_and_recent_numpy_are_rebuilt(module, protocol):
    content = pickle.dumps(PIXELS + 7, protocol)
    for known in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        if protocol == 2:  # names as lines of text; with their lengths before them in later protocols
            content = content.replace(b"c" + known + b"\n", b"c" + module.encode() + b"\n")
        else:
            old, new = (b"\x8c" + bytes([len(name)]) + name for name in (known, module.encode()))
            body = content[11:].replace(old, new)
            content = content[:3] + struct.pack("<Q", len(body)) + body
    assert np.array_equal(data.ArraysOnly(io.BytesIO(content), encoding="latin1").load(), PIXELS + 7)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    read = Path.read_bytes

    def refuse(path):
        if path.name == "data_batch_2":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="data_batch_2: cannot be read .*Permission denied"):
        quietly("cifar10", data_dir=tmp_path)


def test_svhn_is_read_from_its_mat_files(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3, 4), dtype=np.uint8)
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [9], [10]])})
    svhn = quietly("svhn", data_dir=tmp_path)
    assert svhn.train.labels.tolist() == [0, 1, 9, 0]
    assert svhn.train.images[2, 1, 5, 7] == pixels[5, 7, 1, 2]
    (tmp_path / "test_32x32.mat").write_bytes(b"junk")
    with pytest.raises(UserError, match="test_32x32.mat: not an SVHN file"):
        quietly("svhn", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (np.zeros((32, 32, 3, 2), np.uint8), [[57], [1]]),
        (np.zeros((32, 32, 3, 2), np.uint8), [[1]]),
        (np.zeros((32, 32, 3, 2)), [[1], [2]]),
        (np.zeros((16, 32, 3, 2), np.uint8), [[1], [2]]),
    ],
)
def test_an_svhn_file_of_something_else_is_named(tmp_path, pixels, labels):
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.array(labels)})
    with pytest.raises(UserError, match="train_32x32.mat: "):
        quietly("svhn", data_dir=tmp_path)


@pytest.mark.parametrize("before", [None, 99.0])
def test_a_download_waits_for_a_silent_network_only_so_long(tmp_path, monkeypatch, before):
    import torchvision

    seen = []

    def silent(*args, **options):
        seen.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(torchvision.datasets, "SVHN", silent)
    usual = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before)
    try:
        with pytest.raises(UserError, match="cannot be downloaded .timed out"):
            load("svhn", data_dir=tmp_path)
        assert socket.getdefaulttimeout() == before  # as it was for everybody else
    finally:
        socket.setdefaulttimeout(usual)
    assert seen == [pytest.approx(20, abs=15)]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (RuntimeError("Error downloading a file:\nTried https://a.b/, got:\nno such host\n"), "no such host"),
        (RuntimeError("File not found or corrupted."), "File not found or corrupted."),
        (http.client.BadStatusLine("<html>"), "<html>"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_why_a_download_failed_is_said_in_one_line(tmp_path, monkeypatch, problem, reason):
    import torchvision

    def refuse(*args, **options):
        raise problem

    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    with pytest.raises(UserError) as caught:
        load("mnist", data_dir=tmp_path)
    assert f"cannot be downloaded ({reason}); try --data-dir" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_without_files_or_network_the_alternatives_are_named(tmp_path, no_network, name):
    with pytest.raises(UserError, match="--data-dir .*--dataset digits or photos") as caught:
        load(name, data_dir=tmp_path / "empty")
    assert "\n" not in str(caught.value)


def picture_tree(folder: Path) -> None:
    """Pictures of one flat colour each, in every form that is promised."""
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 20), (200, 100, 50)).save(folder / "colour.png")
    Image.new("RGB", (20, 40), (200, 100, 50)).save(folder / "photo.JPG", quality=95)
    Image.new("RGB", (24, 24), (200, 100, 50)).save(folder / "web.webp", lossless=True)
    Image.new("L", (24, 24), 77).save(folder / "grey.png")
    Image.new("RGBA", (24, 24), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("RGBA", (24, 24), (255, 0, 0, 128)).save(folder / "half.png")
    Image.fromarray(np.full((24, 24), 257 * 128, np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.full((24, 24), 300, np.uint16)).save(folder / "dark.png")
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste((1, 2, 3), (20, 0, 40, 20))  # only the middle square is kept
    wide.save(folder / "wide.png")
    palette = Image.new("P", (24, 24), 1)
    palette.putpalette([0, 0, 0, 10, 220, 30])
    palette.save(folder / "palette.png")
    halves = Image.new("RGB", (24, 24), "red")
    halves.paste((0, 0, 255), (0, 12, 24, 24))  # red above blue
    turn = Image.Exif()
    turn[0x0112] = 6  # to be shown turned by 90 degrees clockwise: blue left, red right
    halves.save(folder / "turned.png", exif=turn)


EXPECTED = {
    "colour.png": (200, 100, 50),
    "photo.JPG": (200, 100, 50),
    "web.webp": (200, 100, 50),
    "grey.png": (77, 77, 77),
    "clear.png": (255, 255, 255),
    "half.png": (255, 127, 127),
    "dark.png": (1, 1, 1),  # 300 of 65,535
    "deep.png": (128, 128, 128),
    "palette.png": (10, 220, 30),
}


def test_pictures_of_every_kind_come_out_in_their_colours(tmp_path):
    from vqvae.pictures import read_tree

    picture_tree(tmp_path / "tree")
    images, paths, note = read_tree(tmp_path / "tree", 8, 3, order=lambda path: 0)
    assert images.shape == (11, 3, 8, 8)
    assert note == ""
    by_name = dict(zip(paths, images, strict=True))
    for name, colour in EXPECTED.items():
        error = (by_name[name].float() - torch.tensor(colour).view(3, 1, 1)).abs().max()
        assert error <= 3, name  # JPEG is not exact
    assert by_name["wide.png"][:, :, 2:6].max() <= 6  # the filter's lobes reach past the cut
    turned = by_name["turned.png"]
    assert turned[:, 4, 0].tolist() == [0, 0, 255]
    assert turned[:, 4, 7].tolist() == [255, 0, 0]
    grey, _, _ = read_tree(tmp_path / "tree", 8, 1, order=lambda path: 0)
    assert grey.shape == (11, 1, 8, 8)


def test_a_folder_is_split_classed_and_cached(tmp_path, monkeypatch):
    for label, kind in enumerate(("cats", "dogs")):
        (tmp_path / "tree" / kind).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (9, 9), (i, 0, label)).save(tmp_path / "tree" / kind / f"{i}.png")
    first = load("folder", data_dir=tmp_path / "tree", image_size=8, holdout=0.25)
    assert first.classes == ("cats", "dogs")
    assert len(first.train.images) + len(first.test.images) == 40
    assert 3 <= len(first.test.images) <= 20
    for split in (first.train, first.test):
        assert torch.equal(split.labels, split.images[:, 2, 0, 0].long())
    monkeypatch.setattr("vqvae.pictures.read_picture", None)  # a second run opens no picture
    again = load("folder", data_dir=tmp_path / "tree", image_size=8, holdout=0.25)
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(again.test.labels, first.test.labels)


def test_adding_pictures_moves_none_between_the_splits(tmp_path):
    (tmp_path / "tree").mkdir()

    def held_out(count: int) -> set[int]:
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "tree" / f"{i}.png")
        return {
            int(x[0, 0, 0]) for x in load("folder", data_dir=tmp_path / "tree", image_size=8, holdout=0.3).test.images
        }

    assert held_out(30) == {i for i in held_out(60) if i < 30}


def test_unreadable_pictures_are_counted_named_and_left_out(tmp_path):
    picture_tree(tmp_path / "tree")
    (tmp_path / "tree" / "broken.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="1 unreadable files left out: broken.png"):
        folder = load("folder", data_dir=tmp_path / "tree", image_size=8)
    assert len(folder.train.images) + len(folder.test.images) == 11
    assert "1 unreadable" in folder.note


def test_a_decompression_bomb_is_an_unreadable_picture(tmp_path, monkeypatch):
    for name, side in (("a.png", 8), ("b.png", 8), ("bomb.png", 64)):
        (tmp_path / "tree").mkdir(exist_ok=True)
        Image.new("RGB", (side, side)).save(tmp_path / "tree" / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(UserWarning, match="1 unreadable files left out: bomb.png"):
        load("folder", data_dir=tmp_path / "tree", image_size=8)


def test_a_picture_that_was_changed_is_read_again(tmp_path):
    (tmp_path / "tree").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), (1, 1, 1)).save(tmp_path / "tree" / f"{name}.png")
    load("folder", data_dir=tmp_path / "tree", image_size=8)
    Image.new("RGB", (8, 8), (250, 1, 1)).save(tmp_path / "tree" / "b.png")
    again = load("folder", data_dir=tmp_path / "tree", image_size=8)
    assert torch.cat([again.train.images, again.test.images]).max() == 250


def test_reading_a_folder_warns_of_nothing_and_leaves_its_cache_alone(tmp_path):
    (tmp_path / "tree").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "tree" / f"{name}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("folder", data_dir=tmp_path / "tree", image_size=8).train.images.zero_()
        assert load("folder", data_dir=tmp_path / "tree", image_size=8).train.images.min() == 9


def test_names_that_are_not_utf8_are_read_like_any(tmp_path):
    (tmp_path / "tree").mkdir()
    for name in (b"\xe9.png", b"\xff.png"):
        try:
            with open(os.path.join(os.fsencode(tmp_path / "tree"), name), "wb") as file:
                Image.new("RGB", (8, 8)).save(file, "PNG")
        except OSError:
            pytest.skip("this file system knows only UTF-8")
    both = load("folder", data_dir=tmp_path / "tree", image_size=8)
    assert len(both.train.images) == len(both.test.images) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "holds no pictures"),
        ({"a.png": b"x"}, "none of its 1 pictures"),
        ({"a.png": None}, "one readable picture"),
    ],
)
def test_a_folder_without_enough_pictures_is_refused(tmp_path, files, message):
    tree = tmp_path / "tree"
    for name, content in (files or {}).items():
        tree.mkdir(exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8)).save(tree / name)
        else:
            (tree / name).write_bytes(content)
    if files == {}:
        tree.mkdir()
    with pytest.raises(UserError, match=message):
        quietly("folder", data_dir=tree, image_size=8)


@pytest.mark.parametrize("options", [{"holdout": 0.0}, {"holdout": 1.0}, {"channels": 2}])
def test_folder_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(UserError, match=next(iter(options))):
        load("folder", data_dir=tmp_path, **options)


@pytest.mark.parametrize(("which", "mean", "covariance"), [(1, (1, 2), (13, 12)), (2, (-1, 2), (13, -12))])
def test_gauss2d_has_its_moments_and_separate_test_points(which, mean, covariance):
    points = load("gauss2d", set=which, train_points=200_000, test_points=500)
    x = points.train.images.flatten(1)
    assert torch.allclose(x.mean(0), torch.tensor(mean).float(), atol=0.05)
    expected = torch.tensor([[covariance[0], covariance[1]], [covariance[1], covariance[0]]]).float()
    assert torch.allclose(torch.cov(x.T), expected, atol=0.2)
    assert points.entropy == pytest.approx(
        float(torch.distributions.MultivariateNormal(torch.zeros(2), expected).entropy()), abs=1e-5
    )
    train = {tuple(p) for p in x.tolist()}
    assert not any(tuple(p) in train for p in points.test.images.flatten(1).tolist())


def test_limit_and_size_apply_to_both_splits():
    small = load("digits", image_size=16, limit=50)
    assert small.train.images.shape == small.test.images.shape == (50, 1, 16, 16)
    assert small.train.images.dtype == torch.uint8
    whole = load("digits", limit=50)
    means = [s.train.images.float().mean((1, 2, 3)) for s in (small, whole)]
    assert torch.allclose(*means, atol=2)  # the same pictures, averaged


def test_unknown_names_and_options_are_refused():
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        load("mnits")
    with pytest.raises(UserError, match="set=3"):
        load("gauss2d", set=3)
    with pytest.raises(UserError, match="--image-size: points"):
        load("gauss2d", image_size=8)
    with pytest.raises(UserError, match="unknown option 'crop'.*did you mean 'crops'"):
        load("photos", crop=3)
    with pytest.raises(UserError, match="did you mean 'threshold'"):
        load("mnist-binary", binarisation="treshold")


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -5}, {"image_size": 0}, {"image_size": -3}])
def test_sizes_and_limits_are_from_one_up(options):
    with pytest.raises(UserError, match="must be at least 1"):
        load("digits", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("photos", {"crops": 0}),
        ("photos", {"test_crops": 0}),
        ("gauss2d", {"train_points": 0}),
        ("gauss2d", {"test_points": -1}),
    ],
)
def test_counts_are_from_one_up(name, options):
    with pytest.raises(UserError, match="must be at least 1"):
        load(name, **options)


def test_an_epochs_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = batch_indices(103, 10, seed=1, epoch=2)
    assert order.shape == (10, 10)
    assert len(order.unique()) == 100
    assert torch.equal(order, batch_indices(103, 10, seed=1, epoch=2))
    assert not torch.equal(order, batch_indices(103, 10, seed=1, epoch=3))
    assert not torch.equal(order, batch_indices(103, 10, seed=2, epoch=2))


def test_pixel_variance_is_numpys():
    images = torch.randint(256, (3000, 1, 4, 4), dtype=torch.uint8)
    assert pixel_variance(images) == pytest.approx((images.numpy() / 255).var(), rel=1e-9)
    assert pixel_variance(torch.zeros(3, 1, 2, 2, dtype=torch.uint8)) > 0


def test_a_cache_that_lost_its_array_is_made_anew(tmp_path):
    picture_tree(tmp_path / "tree")
    first = load("folder", data_dir=tmp_path / "tree", image_size=8).train.images.clone()
    for array in (tmp_path / "cache" / "vqvae").glob("*.npy"):
        array.unlink()
    assert torch.equal(load("folder", data_dir=tmp_path / "tree", image_size=8).train.images, first)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    picture_tree(tmp_path / "tree")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot cache pictures there .*XDG_CACHE_HOME"):
        load("folder", data_dir=tmp_path / "tree", image_size=8)


def padded_crops(picture: torch.Tensor) -> list[torch.Tensor]:
    """All crops of a picture `[C, H, W]` after 4 pixels of reflected border, as numpy pads it, then the mirrored."""
    _, height, width = picture.shape
    padded = torch.from_numpy(np.pad(picture.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect"))
    crops = [padded[:, top : top + height, left : left + width] for top in range(9) for left in range(9)]
    return crops + [crop.flip(2) for crop in crops]


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 8, 8)])
def test_augmented_pictures_are_crops_of_the_padded_ones(shape):
    images = torch.randint(256, (40, *shape), dtype=torch.uint8)
    augmented = data.crop_flip(images)
    assert (augmented.dtype, augmented.shape) == (torch.uint8, images.shape)
    for before, after in zip(images, augmented, strict=True):
        assert any(torch.equal(after, crop) for crop in padded_crops(before))


def test_augmentation_draws_every_crop_and_mirrors_half():
    picture = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    crops = {crop.numpy().tobytes(): place for place, crop in enumerate(padded_crops(picture))}
    augmented = data.crop_flip(picture.expand(4000, -1, -1, -1))
    places = torch.tensor([crops[one.contiguous().numpy().tobytes()] for one in augmented])
    assert places.unique().tolist() == list(range(162))
    assert (places >= 81).float().mean().item() == pytest.approx(0.5, abs=0.04)  # five standard errors


def test_pictures_too_small_to_crop_are_refused():
    with pytest.raises(UserError, match="--augment crop-flip: needs .* 5 pixels a side, these have 4x8"):
        data.augmentation("crop-flip", torch.zeros(2, 1, 4, 8))
    assert data.augmentation("none", torch.zeros(2, 2, 1, 1)) is None
