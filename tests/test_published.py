"""Published data sets: small files in their formats, checksums, damaged and hostile files, downloads."""

import gzip
import hashlib
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

from tests.helpers import run_train
from vqvae.data import formats, load, published
from vqvae.errors import UserError
from vqvae.runs import LOG, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*differ from the published ones")  # the small files do

FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
DOWNLOADERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}


@pytest.fixture
def downloads(monkeypatch):
    """Replace a data set's download by a function of no arguments."""
    import torchvision

    def replace(name, function):
        monkeypatch.setattr(torchvision.datasets, DOWNLOADERS[name], lambda *args, **options: function())

    return replace


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">4B{values.ndim}i", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(data_dir: Path, name: str = "mnist", zipped: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    content = {
        "train-images-idx3-ubyte": rng.integers(256, size=(6, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": rng.integers(10, size=6, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(256, size=(3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(10, size=3, dtype=np.uint8),
    }
    folder = data_dir / FOLDERS[name]
    folder.mkdir(parents=True)
    for file, values in content.items():
        raw = idx(values)
        (folder / (file + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return content


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did: the published batches have their keys and pixels in this form."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_python2_string(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch[str] = dispatch[bytes] = save_python2_string


def cifar_batch(pixels: np.ndarray, labels: list) -> bytes:
    out = io.BytesIO()
    content = {"batch_label": "a batch", "data": pixels, "labels": labels, "filenames": ["x.png"] * len(labels)}
    Python2Pickler(out, protocol=2).dump(content)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar(data_dir: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batches = {}
    (data_dir / "cifar-10-batches-py").mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        batches[name] = rng.integers(256, size=(2, 3072), dtype=np.uint8)
        (data_dir / "cifar-10-batches-py" / name).write_bytes(cifar_batch(batches[name], [i, 9 - i]))
    return batches


def write_svhn(data_dir: Path, pixels: np.ndarray, labels: list) -> None:
    for split in ("train", "test"):
        scipy.io.savemat(data_dir / f"{split}_32x32.mat", {"X": pixels, "y": np.array(labels)})


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("name", "first"), [("mnist", "0"), ("fashion-mnist", "T-shirt/top")])
def test_the_mnist_family_is_read_from_idx_files(tmp_path, name, first, zipped):
    content = write_mnist(tmp_path, name, zipped)
    data = load(name, data_dir=tmp_path)
    assert np.array_equal(data.train.images[:, 0], content["train-images-idx3-ubyte"])
    assert data.test.labels.tolist() == content["t10k-labels-idx1-ubyte"].tolist()
    assert (data.name, data.classes[0], len(data.classes)) == (name, first, 10)
    assert "published" in data.note


def test_files_with_other_checksums_are_read_with_a_warning(tmp_path):
    write_mnist(tmp_path)
    with pytest.warns(UserWarning, match="differ from the published ones") as caught:
        load("mnist", data_dir=tmp_path)
    assert len(caught) == 1


@pytest.mark.parametrize("zipped", [False, True])
def test_files_with_the_published_checksums_have_no_note(tmp_path, monkeypatch, zipped):
    content = write_mnist(tmp_path, zipped=zipped)
    md5 = {file: hashlib.md5(idx(values)).hexdigest() for file, values in content.items()}
    monkeypatch.setattr(published, "MNIST", published.MNIST._replace(md5=md5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("mnist", data_dir=tmp_path).note == ""


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"\x00\x00\x0d" + raw[3:], lambda raw: b""])
def test_a_damaged_idx_file_is_named(tmp_path, damage):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte: .*delete it to download it again"):
        load("mnist", data_dir=tmp_path)


def test_a_damaged_gzip_file_is_named(tmp_path):
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-12], whole[:10] + b"\xff" * 4 + whole[14:], b"junk"):  # cut, no deflate stream, no gzip
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="train-labels-idx1-ubyte.gz: "):
            load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("train-images-idx3-ubyte", np.zeros(6, np.uint8)),  # labels instead of images
        ("train-images-idx3-ubyte", np.zeros((6, 8, 8), np.uint8)),
        ("train-images-idx3-ubyte", np.zeros((0, 28, 28), np.uint8)),
        ("train-labels-idx1-ubyte", np.zeros(5, np.uint8)),
        ("t10k-labels-idx1-ubyte", np.array([0, 1, 10], np.uint8)),
        ("t10k-labels-idx1-ubyte", np.zeros((3, 1), np.uint8)),
    ],
)
def test_an_idx_file_of_something_else_is_named(tmp_path, file, values):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / file).write_bytes(idx(values))
    with pytest.raises(UserError, match=f"{file}: "):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("binarization", ["threshold", "bernoulli", "per-draw"])
def test_binary_mnist_is_binary_at_every_size(tmp_path, binarization):
    write_mnist(tmp_path)
    scaled = load("mnist-binary", data_dir=tmp_path, image_size=16, binarization=binarization)
    assert scaled.train.images.shape == (6, 1, 16, 16)
    assert sorted(scaled.train.images.unique().tolist()) == [0, 255]


def test_binary_mnist_is_thresholded_or_drawn(tmp_path):
    gray = write_mnist(tmp_path)["train-images-idx3-ubyte"]
    thresholded = load("mnist-binary", data_dir=tmp_path)
    assert np.array_equal(thresholded.train.images[:, 0], np.where(gray > 127, 255, 0))
    drawn, again = (load("mnist-binary", data_dir=tmp_path, binarization="bernoulli").train.images for _ in range(2))
    assert sorted(drawn.unique().tolist()) == [0, 255]
    assert torch.equal(drawn, again)
    for low, high in ((0, 85), (85, 170), (170, 256)):  # a pixel is white with a probability equal to its brightness
        pixels = (gray >= low) & (gray < high)
        share = drawn[:, 0].numpy()[pixels].mean() / 255
        error = 3 * 0.5 / math.sqrt(pixels.sum())
        assert share == pytest.approx(gray[pixels].mean() / 255, abs=error)


def test_pixels_drawn_anew_are_a_function_of_seed_and_epoch_and_have_their_probabilities(tmp_path):
    gray = write_mnist(tmp_path)["train-images-idx3-ubyte"]
    data = load("mnist-binary", data_dir=tmp_path, binarization="per-draw")
    epochs = torch.stack([data.training_images(0, epoch) for epoch in range(400)])
    assert epochs.unique().tolist() == [0, 255]
    assert torch.equal(epochs[3], data.training_images(0, 3))
    assert not torch.equal(epochs[3], data.training_images(1, 3))
    share = (epochs[:, :, 0] / 255).mean(0) - torch.from_numpy(gray) / 255
    assert share.abs().max() < 5.5 * 0.5 / math.sqrt(400)
    assert abs(share.mean()) < 5 * 0.5 / math.sqrt(400 * gray.size)
    once = load("mnist-binary", data_dir=tmp_path, binarization="bernoulli")
    assert torch.equal(data.test.images, once.test.images)
    assert torch.equal(data.train.images, once.train.images)  # what prior and k-means see
    assert torch.equal(once.training_images(0, 3), once.train.images)
    few = load("mnist-binary", data_dir=tmp_path, binarization="per-draw", limit=2, image_size=8)
    assert few.training_images(0, 0).shape == few.train.images.shape == (2, 1, 8, 8)
    split = load("mnist-binary", data_dir=tmp_path, binarization="per-draw", validation=0.3)
    assert split.training_images(0, 0).shape == split.train.images.shape == (4, 1, 28, 28)
    black = split.probabilities == 0
    assert black.any()
    assert not split.train.images[black].any()  # the same images, in the same order
    assert split.validation.images.unique().tolist() == [0, 255]


def test_training_on_pixels_drawn_anew_resumes_bitwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path)
    flags = "--data-dir . --likelihood bernoulli --hidden 8 --codes 4 --code-dim 4 --batch-size 2 --image-size 8"
    flags += " --lr 3e-4 --device cpu --dataset mnist-binary binarization="

    def losses(name: str) -> list[float]:
        rows = [row for row in read_metrics(Path("logs", name, LOG)) if "train_loss" in row]
        return [row["train_loss"] for row in rows]

    assert run_train(*f"{flags}per-draw --epochs 4 --name straight".split(), small=False) == 0
    assert run_train(*f"{flags}per-draw --epochs 2 --name run".split(), small=False) == 0
    assert run_train("--resume", "logs/run", "--epochs", "4", small=False) == 0
    assert losses("run") == losses("straight")
    assert run_train(*f"{flags}bernoulli --epochs 4 --name once".split(), small=False) == 0
    assert losses("once") != losses("straight")


def test_cifar_is_read_from_its_pickles(tmp_path):
    batches = write_cifar(tmp_path)
    cifar = load("cifar10", data_dir=tmp_path)
    assert cifar.train.images.shape == (10, 3, 32, 32)
    assert np.array_equal(cifar.train.images[2:4].flatten(1), batches["data_batch_2"])
    assert cifar.train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert np.array_equal(cifar.test.images.flatten(1), batches["test_batch"])
    assert cifar.test.labels.tolist() == [5, 4]
    assert cifar.classes[:2] == ("airplane", "automobile")


class Payload:
    """Unpickling calls a function of any module, as an attack would."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": Payload(open, "executed", "w")}, 2),
        cifar_batch(PIXELS, [1, Payload(os.mkdir, "executed")]),  # after valid pixels
        pickle.dumps({"data": Payload(eval, "open('executed', 'w')"), "labels": [1]}, 4),
        pickle.dumps({"data": Payload(np.load, "executed"), "labels": [1]}, 2),  # a NumPy function, but no array
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",  # a dotted name, which protocol 4 would follow
    ],
)
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3: not a file of cifar10 .it asks for"):
        load("cifar10", data_dir=tmp_path)
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
def test_a_damaged_cifar_batch_is_named(tmp_path, content):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3: ") as caught:
        load("cifar10", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_without_read_permission_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    open_file = formats.open_file

    def refuse(path):
        if path.name == "data_batch_2":
            raise PermissionError(13, "Permission denied")
        return open_file(path)

    monkeypatch.setattr(formats, "open_file", refuse)
    with pytest.raises(UserError, match="data_batch_2: cannot be read .*Permission denied"):
        load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["data_batch_4", "MNIST/raw/train-images-idx3-ubyte", "train_32x32.mat"])
@pytest.mark.parametrize("others", [False, True])
def test_a_named_pipe_in_the_place_of_a_file_is_never_opened(tmp_path, downloads, name, others):
    dataset = {"d": "cifar10", "M": "mnist", "t": "svhn"}[name[0]]
    downloads(dataset, lambda: pytest.fail("torchvision would wait for a reader of the pipe"))
    if others:
        write_mnist(tmp_path)
        write_cifar(tmp_path)
        write_svhn(tmp_path, np.zeros((32, 32, 3, 2), np.uint8), [[1], [2]])
    path = tmp_path / ("cifar-10-batches-py" if dataset == "cifar10" else "") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{path.name}: not a file of {dataset} .not a regular file"):
        load(dataset, data_dir=tmp_path)


def test_a_damaged_file_next_to_an_absent_one_is_explained(tmp_path, downloads):
    def refuse():
        raise AssertionError  # what torchvision raises for a damaged IDX file

    downloads("mnist", refuse)
    with pytest.raises(UserError, match="the download failed .AssertionError"):
        load("mnist", data_dir=tmp_path)


def test_a_data_dir_that_cannot_be_entered_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be entered .File name too long") as caught:
        load("mnist", data_dir=tmp_path / ("x" * 300))
    assert caught.value.flagged.startswith("--data-dir ")


def test_svhn_is_read_from_its_mat_files(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3, 4), dtype=np.uint8)
    write_svhn(tmp_path, pixels, [[10], [1], [9], [10]])
    svhn = load("svhn", data_dir=tmp_path)
    assert svhn.train.labels.tolist() == [0, 1, 9, 0]
    assert svhn.train.images[2, 1, 5, 7] == pixels[5, 7, 1, 2]
    (tmp_path / "test_32x32.mat").write_bytes(b"junk")
    with pytest.raises(UserError, match="test_32x32.mat: not a file of svhn"):
        load("svhn", data_dir=tmp_path)


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
    write_svhn(tmp_path, pixels, labels)
    with pytest.raises(UserError, match="train_32x32.mat: "):
        load("svhn", data_dir=tmp_path)


@pytest.mark.parametrize("name", DOWNLOADERS)
def test_absent_files_are_downloaded(tmp_path, downloads, name):
    def download():
        if name in FOLDERS:
            write_mnist(tmp_path, name)
        elif name == "cifar10":
            write_cifar(tmp_path)
        else:
            write_svhn(tmp_path, np.zeros((32, 32, 3, 2), np.uint8), [[1], [2]])

    downloads(name, download)
    assert len(load(name, data_dir=tmp_path).train.images)
    downloads(name, None)  # a second load does not download
    load(name, data_dir=tmp_path)


@pytest.mark.parametrize("before", [None, 99.0])
def test_a_download_has_a_timeout_of_its_own(tmp_path, downloads, before):
    seen = []

    def silent():
        seen.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    downloads("svhn", silent)
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before)
    try:
        with pytest.raises(UserError, match="the download failed .timed out"):
            load("svhn", data_dir=tmp_path)
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(default)
    assert seen == [pytest.approx(20, abs=15)]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (RuntimeError("Error downloading a file:\nTried https://a.b/, got:\nno such host\n"), "got: no such host"),
        (RuntimeError("File not found or corrupted."), "File not found or corrupted."),
        (http.client.BadStatusLine("<html>"), "<html>"),
        (urllib.error.URLError("Name or service not known"), "<urlopen error Name or service not known>"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_a_failed_download_is_explained_in_one_line(tmp_path, downloads, problem, reason):
    def refuse():
        raise problem

    downloads("mnist", refuse)
    with pytest.raises(UserError) as caught:
        load("mnist", data_dir=tmp_path)
    assert f"{reason}); set data_dir" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DOWNLOADERS)
def test_without_files_or_network_the_alternatives_are_named(tmp_path, downloads, name):
    def refuse():
        raise urllib.error.URLError("Name or service not known")

    downloads(name, refuse)
    with pytest.raises(UserError, match="set data_dir .* or use digits or photos") as caught:
        load(name, data_dir=tmp_path / "empty")
    assert caught.value.flagged.startswith(f"--dataset {name}: ")
