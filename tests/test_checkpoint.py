"""Checkpoints load what was saved, and refuse everything else in one line."""

import pickle
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Payload, choices, content, stored, unambiguous
from tests.helpers import images, make
from vqvae import checkpoint, load
from vqvae.autoencoder import Autoencoder
from vqvae.checkpoint import weights_checksum
from vqvae.errors import UserError

FORMAT_2 = Path(__file__).parent / "data" / "format2.pt"


def write_format_2(path: Path = FORMAT_2) -> None:
    """Make the checkpoint that every later version must read. Run `python -m tests.test_checkpoint`, once per format.

    It also stores what the model computes: the codes and reconstructions of its own examples.
    """
    torch.manual_seed(0)
    small = choices(nets="sonnet", prior="transformer")
    stored(path.parent, **small).state_dict()
    (path.parent / "checkpoint.pt").replace(path)
    saved, model = checkpoint.read(path), load(path)
    examples = unambiguous(model, images(64), 16)
    codes = model.encode(examples)
    assert len(codes.unique()) > 3
    saved["examples"] = {"images": examples, "labels": torch.zeros(16, dtype=torch.int64)}
    saved["expected"] = {"codes": codes, "images": model.decode(codes)}
    checkpoint.write(path, saved)
    assert path.stat().st_size < 200_000


def test_a_checkpoint_of_format_2_loads_encodes_and_decodes():
    saved, model = checkpoint.read(FORMAT_2), load(FORMAT_2)
    assert saved["format"] == 2
    # its examples are far from ties between codes, so that rounding cannot change the codes
    assert torch.equal(model.encode(saved["examples"]["images"]), saved["expected"]["codes"])
    decoded = model.decode(saved["expected"]["codes"])
    assert torch.allclose(decoded, saved["expected"]["images"], rtol=0, atol=1e-4)


def test_a_saved_model_is_the_same_model(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content())
    examples = images(4)
    torch.manual_seed(0)
    expected = make(**choices()).eval()
    model = load(path)
    assert isinstance(model, Autoencoder)
    assert not model.training
    assert torch.equal(model.encode(examples), expected.encode(examples))
    assert torch.equal(load(tmp_path).reconstruct(examples), expected.reconstruct(examples))  # a folder works too
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content(step=1))
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.write(path, content(step=2, usage=lambda: None))
    assert checkpoint.read(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("save", [lambda c, p: torch.save(c, p), lambda c, p: p.write_bytes(pickle.dumps(c))])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    save(content(usage=Payload()), path)
    with pytest.raises(UserError, match="evil.pt: not a vqvae checkpoint: it contains objects"):
        checkpoint.read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 5000])
def test_a_truncated_checkpoint_is_named_in_one_line(tmp_path, keep):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="checkpoint.pt: (truncated|not a vqvae checkpoint)") as caught:
        checkpoint.read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_foreign_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.read(tmp_path / "none.pt")
    for value in ({"model": {}}, [1, 2], torch.zeros(3)):
        torch.save(value, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match="foreign.pt: not a vqvae checkpoint"):
            checkpoint.read(tmp_path / "foreign.pt")


def test_a_checkpoint_without_an_entry_is_refused(tmp_path):
    incomplete = content()
    del incomplete["objective"], incomplete["usage"]
    checkpoint.write(tmp_path / "checkpoint.pt", incomplete)
    with pytest.raises(UserError, match="lacks objective, usage"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (1, "written by vqvae 0.1 .format 1., .* install vqvae 0.1 to read it"),
        (99, "written by a later version of vqvae .format 99., .* update vqvae"),
        (0, "0 is not a format of vqvae; this version reads format 2"),
        ("two", "'two' is not a format of vqvae"),
    ],
)
def test_another_format_is_refused_with_the_version_that_reads_it(tmp_path, found, message):
    old = content(format=found)
    del old["objective"]  # which format 1 did not have
    torch.save(old, tmp_path / "old.pt")
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.read(tmp_path / "old.pt")
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    other = content()
    other["model"].popitem()
    checkpoint.write(tmp_path / "checkpoint.pt", other)
    with pytest.raises(UserError, match="checkpoint.pt: its weights do not fit the model"):
        load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("changes", [{"config": {}}, {"config": {"nets": 3}}, {"data": {}}, {"data": None}])
def test_settings_of_something_else_are_refused(tmp_path, changes):
    checkpoint.write(tmp_path / "checkpoint.pt", content(**changes))
    with pytest.raises(UserError, match="checkpoint.pt: its settings do not describe a model"):
        load(tmp_path / "checkpoint.pt")


def test_the_checksum_covers_all_weights_except_the_priors():
    model = make(**choices(prior="transformer"))
    before = weights_checksum(model)
    with torch.no_grad():
        next(model.prior.parameters()).add_(1)
    assert weights_checksum(model) == before
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    assert weights_checksum(model) != before


if __name__ == "__main__":
    write_format_2()
