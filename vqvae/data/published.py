"""Published data sets, read from the files that torchvision downloads.

N images, C channels, H W pixels.
"""

import hashlib
import socket
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vqvae.data import formats
from vqvae.data.base import DIGITS, Dataset, Images, bernoulli, scale
from vqvae.errors import OptionError, UserError, one_line
from vqvae.registry import Size, checked

T = TypeVar("T")


class Published(NamedTuple):
    """A data set and its files, in torchvision's layout."""

    name: str
    downloader: str  # class in torchvision.datasets
    folder: str  # folder of the files, relative to data_dir
    shape: tuple[int, int, int]  # (C, H, W) of an image
    classes: tuple[str, ...]  # names of the labels 0, 1, ...
    md5: dict[str, str]  # checksums of the published files, uncompressed, by file name


MNIST = Published(
    name="mnist",
    downloader="MNIST",
    folder="MNIST/raw",
    shape=(1, 28, 28),
    classes=DIGITS,
    md5={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
)
FASHION_MNIST = Published(
    name="fashion-mnist",
    downloader="FashionMNIST",
    folder="FashionMNIST/raw",
    shape=(1, 28, 28),
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    md5={
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
)


@checked
def mnist(*, data_dir: Path, image_size: Size | None) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images, 28x28 gray.

    Read from the IDX files in data_dir/MNIST/raw, which are downloaded if absent.
    """
    return _mnist_family(MNIST, data_dir)


@checked
def fashion_mnist(*, data_dir: Path, image_size: Size | None) -> Dataset:
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28x28 gray.

    Read from the IDX files in data_dir/FashionMNIST/raw, which are downloaded if absent.
    """
    return _mnist_family(FASHION_MNIST, data_dir)


@checked
def mnist_binary(
    *,
    data_dir: Path,
    image_size: Size | None,
    binarization: Annotated[
        Literal["threshold", "bernoulli", "per-draw"],
        "white above 1/2 (not comparable with published figures), or drawn with the pixel as the probability: once, or "
        "anew in every epoch of training",
    ] = "threshold",
) -> Dataset:
    """MNIST with pixels 0 or 255. Images are scaled to image_size first. Random draws have a fixed seed.

    Published figures use random draws, which differ from threshold in gray pixels. Threshold has less noise to model,
    so its nats are not comparable with them. With per-draw, training images are drawn anew in every epoch, from the
    run's seed. Test images are those of bernoulli, and so are training images outside the loop, such as for the codes
    of a prior. The draws are not the published fixed ones (Larochelle's), so figures are of another sample.
    """
    gray = mnist(data_dir=data_dir, image_size=image_size)

    def binary(split: Images, seed: int) -> Images:
        images = scale(split.images, image_size)
        if binarization == "threshold":
            return Images((images > 127.5).to(torch.uint8) * 255, split.labels)
        return Images(bernoulli(images, torch.Generator().manual_seed(seed)), split.labels)

    probabilities = scale(gray.train.images, image_size) if binarization == "per-draw" else None
    return gray._replace(
        name="mnist-binary", train=binary(gray.train, 0), test=binary(gray.test, 1), probabilities=probabilities
    )


def _mnist_family(source: Published, data_dir: Path) -> Dataset:
    _download_absent(source, data_dir, source.md5)
    files, note = _read(source, data_dir, lambda raw, path: (formats.idx(raw), path))

    def split(prefix: str) -> Images:
        images, path = files[f"{prefix}-images-idx3-ubyte"]
        labels, labels_path = files[f"{prefix}-labels-idx1-ubyte"]
        return _labeled(source, images.unsqueeze(1), labels, path, labels_path)

    return Dataset(source.name, split("train"), split("t10k"), source.classes, note)


CIFAR10 = Published(
    name="cifar10",
    downloader="CIFAR10",
    folder="cifar-10-batches-py",
    shape=(3, 32, 32),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)


@checked
def cifar10(*, data_dir: Path, image_size: Size | None) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images, 32x32 RGB.

    Read from the "python version" in data_dir/cifar-10-batches-py, which is downloaded if absent.
    """
    _download_absent(CIFAR10, data_dir, CIFAR10.md5)

    def parse(raw: bytes, path: Path) -> Images:
        pixels, labels = formats.cifar_batch(raw)
        images = torch.from_numpy(np.array(pixels)).reshape(-1, 3, 32, 32)
        return _labeled(CIFAR10, images, torch.from_numpy(labels), path)

    batches, note = _read(CIFAR10, data_dir, parse)
    test = batches.pop("test_batch")
    train = Images(*(torch.cat(parts) for parts in zip(*batches.values(), strict=True)))
    return Dataset("cifar10", train, test, CIFAR10.classes, note)


SVHN = Published(
    name="svhn",
    downloader="SVHN",
    folder="",
    shape=(3, 32, 32),
    classes=DIGITS,
    md5={
        "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
        "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    },
)


@checked
def svhn(*, data_dir: Path, image_size: Size | None) -> Dataset:
    """Street View House Numbers: 73,257 training and 26,032 test images, 32x32 RGB.

    Read from train_32x32.mat and test_32x32.mat in data_dir, which are downloaded if absent.
    """
    for split in ("train", "test"):
        _download_absent(SVHN, data_dir, [f"{split}_32x32.mat"], split=split)

    def parse(raw: bytes, path: Path) -> Images:
        content = formats.mat(raw, ("X", "y"))
        images = torch.from_numpy(np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)))  # from [H, W, C, N]
        labels = torch.from_numpy(content["y"].astype(np.float64).flatten())
        return _labeled(SVHN, images, labels.where(labels != 10, 0), path)  # the digit 0 has the label 10

    splits, note = _read(SVHN, data_dir, parse)
    return Dataset("svhn", splits["train_32x32.mat"], splits["test_32x32.mat"], SVHN.classes, note)


def _stored(source: Published, data_dir: Path, name: str) -> Path:
    """The path of a file, or of its gzipped version if only that exists."""
    path = data_dir / source.folder / name
    zipped = path.with_name(f"{name}.gz")
    return zipped if zipped.is_file() and not path.is_file() else path


def _download_absent(source: Published, data_dir: Path, names: Iterable[str], **options: Any) -> None:
    """Let torchvision download the data set, unless all the named files exist. `options` go to its class."""
    try:
        paths = [_stored(source, data_dir, name) for name in names]
        if all(path.is_file() for path in paths):
            return
        for path in paths:  # torchvision would write into a named pipe, and wait for a reader
            if path.exists() and not path.is_file():
                raise _damaged(source, path, "not a regular file")
    except OSError as problem:
        raise OptionError("data_dir", data_dir, f"cannot be entered ({one_line(problem)})") from None
    import torchvision

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none and would wait minutes for a silent network
    try:
        getattr(torchvision.datasets, source.downloader)(data_dir, download=True, **options)
    except Exception as problem:  # of the network, a wrong checksum, or a damaged file next to the absent one
        raise OptionError(
            "dataset", source.name,
            f"not in {data_dir}, and the download failed ({one_line(problem)}); set data_dir to a folder that has the "
            "files in torchvision's layout, or use digits or photos, which need no download",
        ) from None  # fmt: skip
    finally:
        socket.setdefaulttimeout(timeout)


def _read(source: Published, data_dir: Path, parse: Callable[[bytes, Path], T]) -> tuple[dict[str, T], str]:
    """Parse every file of a data set. Returns the results by file name, and a note if a checksum differs.

    Raises `UserError` for a file that cannot be read or parsed.
    """
    parsed, exact = {}, True
    for name, md5 in source.md5.items():
        path = _stored(source, data_dir, name)
        raw = formats.contents(path)
        exact &= hashlib.md5(raw, usedforsecurity=False).hexdigest() == md5
        try:
            parsed[name] = parse(raw, path)
        except UserError:
            raise
        except Exception as problem:  # damaged files raise anything
            raise _damaged(source, path, one_line(problem)) from None
    if exact:
        return parsed, ""
    warnings.warn(
        f"{source.name}: the files in {data_dir / source.folder} differ from the published ones (MD5); "
        "they are used as they are",
        stacklevel=2,
    )
    return parsed, "files differ from the published ones"


def _labeled(source: Published, images: Tensor, labels: Tensor, path: Path, labels_path: Path | None = None) -> Images:
    """Images `[N, C, H, W]` uint8 and labels `[N]`, checked; raises `UserError` that names the file."""
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != source.shape or not len(images):
        kind = str(images.dtype).removeprefix("torch.")
        shape = ", ".join(map(str, source.shape))
        raise _damaged(source, path, f"images must be uint8 [N, {shape}], found {kind} {list(images.shape)}")
    whole = labels.long()  # MATLAB stores float64
    last = len(source.classes) - 1
    if whole.shape != images.shape[:1] or not (whole == labels).all() or whole.min() < 0 or whole.max() > last:
        raise _damaged(source, labels_path or path, f"expected {len(images)} labels from 0 to {last}")
    return Images(images, whole)


def _damaged(source: Published, path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a file of {source.name} ({reason}); delete it to download it again")
