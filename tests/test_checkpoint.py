"""Checkpoints load what they saved, and nothing else."""

import pickle

import pytest
import torch

from tests.test_autoencoder import choose, make, pictures
from vqvae import checkpoint, load
from vqvae.config import Config
from vqvae.errors import UserError


def content(**changes) -> dict:
    torch.manual_seed(0)
    model = make()
    config = Config(
        dataset=choose("nets", "mlp"),
        bottleneck=choose("bottleneck", "vq"),
        nets=choose("nets", "sonnet"),
        likelihood=choose("likelihood", "mse"),
        prior=choose("prior", "uniform"),
    )
    return {
        "kind": "autoencoder",
        "run": "test",
        "config": config.to_dict(),
        "data": {"name": "none", "shape": [3, 8, 8], "variance": 0.06, "classes": [], "note": ""},
        "model": model.state_dict(),
        "step": 3,
        "epoch": 1,
        "examples": {"images": pictures(2), "labels": torch.zeros(2, dtype=torch.int64)},
        "usage": None,
        "plots": "plots/test",
    } | changes


def test_a_saved_model_is_the_same_model(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content())
    images = pictures(4)
    torch.manual_seed(0)
    expected = make().eval()
    model = load(path)
    assert not model.training
    assert torch.equal(model.encode(images), expected.encode(images))
    assert torch.equal(load(tmp_path).reconstruct(images), expected.reconstruct(images))  # the folder will do
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content(step=1))
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.write(path, content(step=2, usage=lambda: None))
    assert checkpoint.read(path)["step"] == 1


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("save", [lambda c, p: torch.save(c, p), lambda c, p: p.write_bytes(pickle.dumps(c))])
def test_a_pickle_with_code_is_refused_unexecuted(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    save(content(usage=Payload()), path)
    with pytest.raises(UserError, match="evil.pt"):
        checkpoint.read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 5000])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="checkpoint.pt: (truncated|not a checkpoint)") as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.read(tmp_path / "none.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="foreign.pt: not a checkpoint of this program"):
        checkpoint.read(tmp_path / "foreign.pt")
    torch.save(content(format=99), tmp_path / "later.pt")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read(tmp_path / "later.pt")


def test_weights_of_another_model_are_refused(tmp_path):
    other = content()
    other["model"].popitem()
    checkpoint.write(tmp_path / "checkpoint.pt", other)
    with pytest.raises(UserError, match="another model"):
        load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("changes", [{"config": {}}, {"config": {"nets": 3}}, {"data": {}}, {"data": None}])
def test_settings_of_something_else_are_refused(tmp_path, changes):
    checkpoint.write(tmp_path / "checkpoint.pt", content(**changes))
    with pytest.raises(UserError, match="checkpoint.pt: its settings"):
        load(tmp_path / "checkpoint.pt")
