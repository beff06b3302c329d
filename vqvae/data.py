"""Data sets: a name becomes uint8 pictures held whole (or mapped from a cache), and batches are indices into them.

Each set is a function whose options have defaults; `data_dir` and `image_size` are given by the program. Files are
read here, from the published formats, so that nothing in them is ever executed.

N pictures, C channels, H W pixels.
"""

import gzip
import hashlib
import http.client
import io
import math
import os
import pickle
import socket
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.errors import UserError
from vqvae.members import Choice, Slot, resolve


class Images(NamedTuple):
    """One split of a data set."""

    images: Tensor  # [N, C, H, W] uint8; points of the plane are [N, 2, 1, 1] float32
    labels: Tensor  # [N] int64, -1 where there is none


class Dataset(NamedTuple):
    name: str
    train: Images
    test: Images
    classes: tuple[str, ...] = ()
    note: str = ""  # what a reader of figures must know about the data
    entropy: float | None = None  # nats, where the generating density is known


NO_DOWNLOAD = (
    "--data-dir for files you have in torchvision's layout, or --dataset digits or photos, which need no download"
)
DIGITS = tuple("0123456789")


def digits(*, data_dir: Path, image_size: int | None) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits, scaled from 8x8 to 32x32: 1,500 to train, 297 held out."""
    from sklearn.datasets import load_digits

    held = load_digits()
    small = torch.from_numpy(held.images).float()[:, None] * (255 / 16)
    images = _resized(small, 32).round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(held.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    return Dataset("digits", Images(images[train], labels[train]), Images(images[test], labels[test]), DIGITS)


def photos(*, data_dir: Path, image_size: int | None, crops: int = 10_000, test_crops: int = 2_000) -> Dataset:
    """32x32 crops of scikit-learn's two sample photographs; the held-out ones from the right fifth of each.

    crops, test_crops   how many of each split.
    """
    from sklearn.datasets import load_sample_images

    if min(crops, test_crops) < 1:
        raise UserError("--dataset photos: crops and test_crops must be at least 1")
    rng = np.random.default_rng(0)
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for photo in load_sample_images().images:  # [H, W, 3] uint8
        edge = photo.shape[1] * 4 // 5
        for split, region in (("train", photo[:, :edge]), ("test", photo[:, edge:])):
            count = -(-(crops if split == "train" else test_crops) // 2)
            tops = rng.integers(region.shape[0] - 31, size=count)
            lefts = rng.integers(region.shape[1] - 31, size=count)
            windows = np.lib.stride_tricks.sliding_window_view(region, (32, 32), axis=(0, 1))  # [., ., 3, 32, 32]
            parts[split].append(windows[tops, lefts])
    splits = {}
    for split, count in (("train", crops), ("test", test_crops)):
        stacked = np.stack(parts[split], axis=1).reshape(-1, 3, 32, 32)[:count]  # the photographs take turns
        splits[split] = _unlabelled(torch.from_numpy(np.ascontiguousarray(stacked)))
    return Dataset("photos", splits["train"], splits["test"])


def mnist(*, data_dir: Path, image_size: int | None) -> Dataset:
    """MNIST, 28x28 grey, 60,000 / 10,000 (IDX files in DATA_DIR/MNIST/raw; downloaded when absent)."""
    folder = data_dir / "MNIST" / "raw"
    if not all(_idx_path(folder / name) for name in MNIST_MD5):
        _download("mnist", "MNIST", data_dir, train=True)
    paths, values, strange = {}, {}, False
    for name, md5 in MNIST_MD5.items():
        paths[name] = _idx_path(folder / name)
        raw = _contents(paths[name])
        strange |= hashlib.md5(raw).hexdigest() != md5
        values[name] = _idx(raw, paths[name])

    def split(images: str, labels: str) -> Images:
        return _ten_classes(values[images].unsqueeze(1), values[labels], (1, 28, 28), paths[images], paths[labels])

    train = split("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test = split("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    return Dataset("mnist", train, test, DIGITS, _note("mnist", folder, strange))


def mnist_binary(
    *, data_dir: Path, image_size: int | None, binarisation: Literal["threshold", "bernoulli"] = "threshold"
) -> Dataset:
    """MNIST with pixels 0 or 255, scaled to --image-size before they are made so.

    binarisation   threshold: white above one half; bernoulli: drawn once with the pixel as its probability, fixed seed.
    """
    grey = mnist(data_dir=data_dir, image_size=image_size)

    def binary(split: Images, seed: int) -> Images:
        images = _scaled(split.images, image_size)
        cut = torch.full((), 127.5)
        if binarisation == "bernoulli":
            cut = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 255
        return Images((images > cut).to(torch.uint8) * 255, split.labels)

    return grey._replace(name="mnist-binary", train=binary(grey.train, 0), test=binary(grey.test, 1))


def cifar10(*, data_dir: Path, image_size: int | None) -> Dataset:
    """CIFAR-10, 32x32 RGB, 50,000 / 10,000 (python version in DATA_DIR/cifar-10-batches-py; downloaded when absent)."""
    folder = data_dir / "cifar-10-batches-py"
    if not all((folder / name).is_file() for name in CIFAR_MD5):
        _download("cifar10", "CIFAR10", data_dir, train=True)
    batches, strange = {}, False
    for name, md5 in CIFAR_MD5.items():
        raw = _contents(folder / name)
        strange |= hashlib.md5(raw).hexdigest() != md5
        batches[name] = _cifar_batch(raw, folder / name)
    train = [batches[name] for name in CIFAR_MD5 if name != "test_batch"]
    joined = Images(torch.cat([b.images for b in train]), torch.cat([b.labels for b in train]))
    return Dataset("cifar10", joined, batches["test_batch"], CIFAR_CLASSES, _note("cifar10", folder, strange))


def svhn(*, data_dir: Path, image_size: int | None) -> Dataset:
    """Street view house numbers, 32x32 RGB, 73,257 / 26,032 (train_ and test_32x32.mat; downloaded when absent)."""
    splits, strange = {}, False
    for split, md5 in SVHN_MD5.items():
        path = data_dir / f"{split}_32x32.mat"
        if not path.is_file():
            _download("svhn", "SVHN", data_dir, split=split)
        raw = _contents(path)
        strange |= hashlib.md5(raw).hexdigest() != md5
        splits[split] = _svhn_split(raw, path)
    return Dataset("svhn", splits["train"], splits["test"], DIGITS, _note("svhn", data_dir, strange))


def gauss2d(
    *,
    data_dir: Path,
    image_size: int | None,
    set: int = 1,
    train_points: int = 10_000,
    test_points: int = 2_500,
) -> Dataset:
    """Points of a tilted Gaussian in the plane: x = mean + (eps * s) R, R a rotation by 45 degrees, eps ~ N(0, I).

    set   1: mean (1, 2), s = (5, 1); 2: mean (-1, 2), s = (1, 5). Entropy log(2 pi e) + log 5 = 4.4473 nats.
    """
    if set not in GAUSSIANS:
        raise UserError(f"--dataset gauss2d: set={set} must be 1 or 2")
    if min(train_points, test_points) < 1:
        raise UserError("--dataset gauss2d: train_points and test_points must be at least 1")
    mean, scale = (torch.tensor(v) for v in GAUSSIANS[set])
    root = math.sqrt(0.5)
    rotation = torch.tensor([[root, root], [-root, root]])

    def points(count: int, seed: int) -> Images:
        noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
        return _unlabelled((mean + (noise * scale) @ rotation).view(count, 2, 1, 1))

    entropy = math.log(2 * math.pi * math.e) + math.log(5)
    return Dataset(f"gauss2d-{set}", points(train_points, 0), points(test_points, 1), entropy=entropy)


GAUSSIANS = {1: ((1.0, 2.0), (5.0, 1.0)), 2: ((-1.0, 2.0), (1.0, 5.0))}


def folder(*, data_dir: Path, image_size: int | None, holdout: float = 0.1, channels: int = 3) -> Dataset:
    """Your own pictures: every PNG, JPEG, WebP, BMP, GIF or TIFF below DATA_DIR, cropped square and scaled.

    The shorter side is scaled to --image-size (64), the centre kept. Sub-folders of DATA_DIR are classes, when every
    picture lies in one. Converted once into a cache (~/.cache/vqvae) that later runs map into memory.

    holdout    share held out, chosen by a hash of each path, so that adding pictures moves none between the splits.
    channels   3 for colour, 1 for grey.
    """
    if not 0 < holdout < 1:
        raise UserError(f"--dataset folder: holdout={holdout} must be between 0 and 1")
    if channels not in (1, 3):
        raise UserError(f"--dataset folder: channels={channels} must be 1 or 3")
    from vqvae.pictures import read_tree

    # the cache holds pictures in the order of their shares, so that both splits are slices of one mapped array
    images, paths, note = read_tree(data_dir, image_size or 64, channels, order=lambda path: -_share(path))
    if len(paths) < 2:
        raise UserError(f"--data-dir {data_dir}: holds one readable picture; to train and to hold out takes two")
    train = min(max(sum(_share(path) >= holdout for path in paths), 1), len(paths) - 1)
    names = sorted({path.split("/")[0] for path in paths if "/" in path})
    classes = tuple(names) if len(names) > 1 and all("/" in path for path in paths) else ()
    index = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([index.get(path.split("/")[0], -1) for path in paths])
    return Dataset(
        "folder",
        Images(images[:train], labels[:train]),
        Images(images[train:], labels[train:]),
        classes,
        note,
    )


DATASETS = {
    "digits": digits,
    "photos": photos,
    "mnist": mnist,
    "mnist-binary": mnist_binary,
    "cifar10": cifar10,
    "svhn": svhn,
    "folder": folder,
    "gauss2d": gauss2d,
}
SLOT = Slot("--dataset", DATASETS)


def load(
    name: str,
    *,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    limit: int | None = None,
    **options: Any,
) -> Dataset:
    """A data set by name, scaled to `image_size` and cut to at most `limit` pictures in each split.

    Raises `UserError` for an unknown name or option, a value out of range, and files that are absent, garbled, or
    cannot be downloaded.
    """
    choice = resolve(SLOT, Choice(name, options))
    for key, value in (("--image-size", image_size), ("--limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{key} {value}: must be at least 1")
    if name == "gauss2d" and image_size:
        raise UserError("--image-size: points of gauss2d have no size")
    data = DATASETS[name](data_dir=Path(data_dir).expanduser(), image_size=image_size, **choice.options)
    train, test = (
        Images(_scaled(split.images[:limit], image_size), split.labels[:limit]) for split in (data.train, data.test)
    )
    return data._replace(train=train, test=test)


def batch_indices(count: int, batch_size: int, *, seed: int, epoch: int) -> Tensor:
    """The shuffled order of an epoch, `[steps, batch_size]`, a pure function of (seed, epoch); the rest is dropped."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    steps = count // batch_size
    return torch.randperm(count, generator=generator)[: steps * batch_size].view(steps, batch_size)


BORDER = 4  # pixels


def crop_flip(images: Tensor) -> Tensor:
    """Pictures `[B, C, H, W]` of any type, each a random HxW crop after 4 pixels of reflected border, half mirrored.

    Drawn from the global generator on the pictures' own device, with no copy of the padded pictures.
    """
    count, _, height, width = images.shape
    device = images.device
    offsets = torch.randint(2 * BORDER + 1, (2, count, 1), device=device) - BORDER
    mirrored = torch.randint(2, (count, 1), device=device).bool()
    rows = _reflected(offsets[0] + torch.arange(height, device=device), height)  # [B, H], where each row comes from
    columns = _reflected(offsets[1] + torch.arange(width, device=device), width)  # [B, W]
    columns = torch.where(mirrored, columns.flip(1), columns)
    picture = torch.arange(count, device=device)[:, None, None]
    return images[picture, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)  # indexing gives [B, H, W, C]


def _reflected(index: Tensor, size: int) -> Tensor:
    """Positions -4 .. size + 3 as those within, mirrored at the outermost pixels, which are not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


AUGMENTATIONS = {"none": None, "crop-flip": crop_flip}


def augmentation(name: str, images: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What --augment does to a batch of such images, None for nothing; `UserError` where they are too small."""
    height, width = images.shape[-2:]
    if AUGMENTATIONS[name] and min(height, width) <= BORDER:
        raise UserError(
            f"--augment {name}: needs pictures of at least {BORDER + 1} pixels a side, these have {height}x{width}; "
            "use --augment none"
        )
    return AUGMENTATIONS[name]


def pixel_variance(images: Tensor) -> float:
    """The variance of all pixels and channels in [0, 1] (of at most 50,000 pictures), by which MSEs are normalised."""
    tiles = images[:50_000].split(2048)
    count, mean = sum(t.numel() for t in tiles), 0.0
    scale = 255 if images.dtype == torch.uint8 else 1
    mean = sum(float(t.double().sum()) for t in tiles) / count
    squares = sum(float((t.double() - mean).square().sum()) for t in tiles) / count
    # pictures of one flat colour would divide by nothing
    return max(squares / scale**2, 1e-6)


# the published formats

MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
SVHN_MD5 = {"train": "e26dedcc434d2e4c54c9b2d4a06d8373", "test": "eb5a983be6a315427106f1b164d9cef3"}
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _idx_path(path: Path) -> Path | None:
    """The IDX file as it is or gzipped, whichever is there."""
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _contents(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as problem:
        raise UserError(f"{path}: cannot be read ({_reason(problem)}); delete it to download it again") from None


def _idx(raw: bytes, path: Path) -> Tensor:
    """An IDX file of unsigned bytes: magic 0 0 8 rank, sizes as big-endian int32, then the values."""
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\x00\x00\x08" or not rank or len(raw) < 4 + 4 * rank:
        raise UserError(f"{path}: not an IDX file of bytes; delete it to download it again")
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if len(values) != math.prod(int(n) for n in shape):
        raise UserError(f"{path}: truncated; delete it to download it again")
    return torch.from_numpy(values.copy()).view(*map(int, shape))


class ArraysOnly(pickle.Unpickler):
    """An unpickler that can rebuild NumPy arrays, and looks up nothing else."""

    ALLOWED = {
        *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an array never needs")
        # NumPy 2 keeps the old module's name only as a warning
        module = "numpy._core.multiarray" if module == "numpy.core.multiarray" and _NUMPY_2 else module
        return super().find_class(module, name)


_NUMPY_2 = int(np.__version__.split(".")[0]) >= 2


def _cifar_batch(raw: bytes, path: Path) -> Images:
    try:
        content = ArraysOnly(io.BytesIO(raw), encoding="latin1").load()
        images = torch.from_numpy(np.array(content["data"])).reshape(-1, 3, 32, 32)
        labels = torch.tensor(content["labels"])
    except Exception as problem:  # a garbled pickle can raise anything
        raise UserError(f"{path}: not a CIFAR-10 batch ({_reason(problem)})") from None
    return _ten_classes(images, labels, (3, 32, 32), path)


def _svhn_split(raw: bytes, path: Path) -> Images:
    import scipy.io

    try:
        content = scipy.io.loadmat(io.BytesIO(raw))
        images = torch.from_numpy(np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)))  # from [H, W, C, N]
        labels = torch.from_numpy(content["y"].astype(np.int64).flatten())
    except Exception as problem:  # as above
        raise UserError(f"{path}: not an SVHN file ({_reason(problem)})") from None
    return _ten_classes(images, labels.where(labels != 10, 0), (3, 32, 32), path)  # the digit 0 is written 10


def _ten_classes(
    images: Tensor, labels: Tensor, shape: tuple[int, int, int], path: Path, labels_path: Path | None = None
) -> Images:
    """The pictures and labels of a file, or a `UserError` where they are not bytes of that shape and labels 0..9."""
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape or not len(images):
        kind = str(images.dtype).removeprefix("torch.")
        raise UserError(
            f"{path}: pictures should be uint8 [N, {', '.join(map(str, shape))}], and are {kind} {list(images.shape)}"
        )
    whole = labels.long()
    if whole.shape != images.shape[:1] or not (whole == labels).all() or whole.min() < 0 or whole.max() > 9:
        raise UserError(f"{labels_path or path}: should hold {len(images)} labels from 0 to 9, one for each picture")
    return Images(images, whole)


def _download(name: str, reader: str, data_dir: Path, **options: Any) -> None:
    import torchvision

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and would wait minutes for a network that never answers
    try:
        getattr(torchvision.datasets, reader)(data_dir, download=True, **options)
    except (OSError, http.client.HTTPException, RuntimeError) as problem:  # RuntimeError: bytes of another checksum
        raise UserError(
            f"--dataset {name}: not in {data_dir}, and cannot be downloaded ({_reason(problem)}); try {NO_DOWNLOAD}"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


def _reason(problem: Exception) -> str:
    """The last line of an exception's message, where the cause is."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[-1][:120]


def _note(name: str, where: Path, strange: bool) -> str:
    if not strange:
        return ""
    warnings.warn(
        f"--dataset {name}: files in {where} are not the published ones (checksum); reading them anyway",
        stacklevel=3,
    )
    return "files differ from the published ones"


def _resized(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def _scaled(images: Tensor, size: int | None) -> Tensor:
    """Pictures [N, C, H, W] uint8 at `size` pixels a side; as they are where that is None or theirs."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    tiles = images.split(4096)  # float copies of one tile at a time
    return torch.cat([_resized(tile.float(), size).round().clamp(0, 255).to(torch.uint8) for tile in tiles])


def _unlabelled(images: Tensor) -> Images:
    return Images(images, torch.full((len(images),), -1))


def _share(path: str) -> float:
    """A number in [0, 1) that depends on a path alone."""
    return int(hashlib.sha256(os.fsencode(path)).hexdigest()[:12], 16) / 16**12
