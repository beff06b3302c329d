"""Checkpoints load what was saved, and refuse everything else in one line."""

import hashlib
import io
import math
import os
import pickle
import random
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.checkpoints import CHOICES, Payload, choices, content, unambiguous
from tests.helpers import images, make, training
from vqvae import archives, checkpoint, data, load
from vqvae.autoencoder import SLOTS, Autoencoder
from vqvae.checkpoint import weights_checksum
from vqvae.config import FIELDS, Config
from vqvae.errors import OptionError, UserError, printable
from vqvae.files import open_file

FORMAT_2 = Path(__file__).parent / "data" / "format2.pt"


def write_format_2(path: Path = FORMAT_2) -> None:
    """Train the small model that every later version must read. It was written once, with version 0.2.0, by

        python -m tests.test_checkpoint

    and must not be written again. The checkpoint also contains the codes and reconstructions of its examples.
    """
    assert not path.exists(), f"{path} exists; delete it only if no version with this format was released"
    torch.manual_seed(0)
    digits = data.load("digits", image_size=16)
    chosen = choices(prior="transformer")
    module = training(shape=(1, 16, 16), **chosen)
    module.initialize(lambda n: digits.train.images[:n])
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for step in range(300):
        batch = torch.randint(len(digits.train.images), (64,))
        module(digits.train.images[batch], digits.train.labels[batch], step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = module.eval().model
    examples = unambiguous(model, digits.test.images, 16)
    codes = model.encode(examples)
    assert len(codes.unique()) == 7
    stored = content(model, chosen, examples={"images": examples, "labels": torch.zeros(16, dtype=torch.int64)})
    checkpoint.write(path, stored | {"expected": {"codes": codes, "images": model.decode(codes)}})
    assert path.stat().st_size < 200_000


def test_a_checkpoint_of_format_2_loads_encodes_and_decodes():
    stored, model = checkpoint.read(FORMAT_2), load(FORMAT_2)
    assert stored["format"] == 2
    # the examples are far from ties between codes, so rounding cannot change the codes
    assert torch.equal(model.encode(stored["examples"]["images"]), stored["expected"]["codes"])
    decoded = model.decode(stored["expected"]["codes"])
    assert torch.allclose(decoded, stored["expected"]["images"], rtol=0, atol=1e-4)


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


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content(step=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))  # fails like a full disk
    try:
        with pytest.raises(UserError, match="checkpoint.pt: cannot be written"):
            checkpoint.write(path, content(step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.read(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda c, p: checkpoint.write(p, c), "not a vqvae checkpoint: it contains objects"),
        (lambda c, p: torch.save(c, p), "not a vqvae checkpoint: it contains objects"),
        (lambda c, p: p.write_bytes(pickle.dumps(c)), "not a checkpoint"),
    ],
)
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, monkeypatch, save, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    save(content(usage=Payload()), path)
    with pytest.raises(UserError, match=f"evil.pt: .*{message}"):
        checkpoint.read(path)
    assert not (tmp_path / "executed").exists()


def test_a_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content())
    raw, draw = path.read_bytes(), random.Random(0)
    tail = range(len(raw) - 100, len(raw))  # the end of the archive and the checksum
    for at in [*(draw.randrange(len(raw)) for _ in range(200)), *tail]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :])
        with pytest.raises(UserError, match=r"checkpoint.pt: (damaged|truncated)") as caught:
            checkpoint.read(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(raw + b"x")
    with pytest.raises(UserError, match=r"checkpoint.pt: (damaged|truncated)"):
        checkpoint.read(path)


def test_others_can_read_a_checkpoint(tmp_path):
    """torch.load reads it, and both readers give the same values, shapes, strides and types."""
    expected = content(optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]})
    expected["optimizer"]["param_groups"][0]["params"] = [0]
    checkpoint.write(tmp_path / "checkpoint.pt", expected)
    theirs = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    ours = checkpoint.read(tmp_path)
    assert theirs.keys() == ours.keys() == {"format", *expected}
    assert {key: ours[key] for key in ("config", "data", "run")} == {
        key: theirs[key] for key in ("config", "data", "run")
    }
    assert ours["optimizer"] == theirs["optimizer"]
    assert ours["model"].keys() == theirs["model"].keys()
    for key, value in theirs["model"].items():
        assert torch.equal(ours["model"][key], value)
        assert (ours["model"][key].dtype, ours["model"][key].stride()) == (value.dtype, value.stride())
    with zipfile.ZipFile(tmp_path / "checkpoint.pt") as archive:
        assert archive.testzip() is None


def test_tensors_that_share_memory_and_odd_types_come_back(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    values = {
        "base": base,
        "view": base[1:, ::2],
        "turned": base.T,
        "empty": torch.zeros(0, 3),
        "scalar": torch.ones(()),
    }
    values |= {str(kind): torch.ones(3, dtype=kind) for kind in archives.STORAGES.values()}
    checkpoint.write(tmp_path / "x.pt", values)
    with open_file(tmp_path / "x.pt") as file:
        found = archives.read_torch(file)
    for key, value in values.items():
        assert torch.equal(found[key], value)
        assert found[key].dtype == value.dtype
    assert found["turned"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()


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


def test_a_checkpoint_without_a_checksum_is_refused(tmp_path):
    torch.save({"format": 2, **content()}, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="plain.pt: damaged, or not written by vqvae: it does not end in its checksum"):
        checkpoint.read(tmp_path / "plain.pt")


@pytest.mark.skipif(os.name == "nt", reason="named pipes")
def test_pipes_devices_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pt")
    for path in (tmp_path, tmp_path / "checkpoint.pt", Path("/dev/zero")):
        with pytest.raises(UserError, match="cannot be read .not a regular file"):
            load(path)
    (tmp_path / "folder" / "checkpoint.pt").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read .not a regular file"):
        load(tmp_path / "folder")


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
        (True, "True is not a format of vqvae"),
        ([2], "a list is not a format of vqvae"),
        ("x" * 100, f"'{'x' * 39} is not a format of vqvae"),
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


CONFIG, ABOUT = content()["config"], content()["data"]
IMAGES, LABELS, MEANS = images(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2)


def with_option(slot: str, **options):
    return {"config": CONFIG | {slot: {"name": CONFIG[slot]["name"], "options": CONFIG[slot]["options"] | options}}}


def with_optimizer(**changes):
    return {"optimizer": {"state": {}, "param_groups": []} | changes}


WRONG = [
    ({"config": None}, "its config must be a table"),
    ({"config": {}}, "its config lacks augment, batch_size"),
    ({"config": {key: value for key, value in CONFIG.items() if key != "lr"}}, "its config lacks lr"),
    ({"config": CONFIG | {"flux": 1}}, "its config has flux, which this version does not know"),
    ({"config": CONFIG | {"nets": 3}}, "its config.nets must be a table"),
    ({"config": CONFIG | {"nets": {"name": "sonnet"}}}, "its config.nets must be a name and options"),
    ({"config": CONFIG | {"nets": {"name": ["sonnet"], "options": {}}}}, "its config.nets must be a text"),
    ({"config": CONFIG | {"nets": {"name": "sonett", "options": {}}}}, "nets=sonett: no such name"),
    ({"config": CONFIG | {"epochs": 0}}, "its config.epochs=0 must be at least 1"),
    ({"config": CONFIG | {"epochs": True}}, "its config.epochs has the wrong type"),
    ({"config": CONFIG | {"epochs": "3"}}, "its config.epochs has the wrong type"),
    ({"config": CONFIG | {"epochs": None}}, "its config.epochs has the wrong type"),
    ({"config": CONFIG | {"seed": "x"}}, "its config.seed has the wrong type"),
    ({"config": CONFIG | {"weight_decay": float("nan")}}, "its config.weight_decay=nan must be a finite number"),
    ({"config": CONFIG | {"seed": 2**64 - 1}}, "its config.seed=18446744073709551615 must be"),
    ({"config": CONFIG | {"precision": "fp8"}}, "its config.precision=fp8 must be one of"),
    ({"config": CONFIG | {"lr": "cosine:1"}}, "its config.lr=cosine:1 must be a number, or"),
    ({"config": CONFIG | {"data_dir": "x" * 5000}}, "its config.data_dir must be a text of at most 4,096 characters"),
    ({"config": CONFIG | {"conditional": True}}, "its prior is conditional, and its data have no classes"),
    (with_option("bottleneck", flux=3), "unknown option"),
    (with_option("bottleneck", flux="x" * 1001), "its config.bottleneck must be a text of at most 1,000 characters"),
    (with_option("bottleneck", **{"x" * 501: 1}), "its config.bottleneck must be a table of names and values"),
    (with_option("bottleneck", num_codes=[7]), "its config.bottleneck has the wrong type"),
    (with_option("bottleneck", num_codes=-7), "num_codes=-7: must be from 1"),
    (with_option("bottleneck", num_codes=2**31 - 1), "num_codes=2147483647: must be from 1 to"),
    (with_option("bottleneck", num_codes=2**24), "describe a larger model than its weights"),
    (with_option("nets", hidden=10**9), "hidden=1000000000 describe a larger model than its weights"),
    (with_option("nets", hidden=2**24), "describe a larger model than its weights"),
    (with_option("nets", hidden=2**21), "its settings describe a larger model than its weights"),  # no option alone
    (with_option("nets", residual_layers=2**24), "describe a larger model than its weights"),
    (with_option("nets", residual_layers=10**9), "describe a larger model than its weights"),
    (with_option("nets", hidden=16), "its weights do not fit the model of its settings"),
    ({"config": CONFIG | {"nets": {"name": "mlp", "options": {"layers": 2**24}}}}, "describe a larger model"),
    ({"config": CONFIG | {"prior": {"name": "transformer", "options": {"layers": 2**24}}}}, "describe a larger model"),
    ({"config": CONFIG | {"prior": {"name": "normal", "options": {}}}}, "needs latent_dim"),
    ({"config": CONFIG | {"bottleneck": {"name": "fsq", "options": {"levels": "9" * 900}}}}, "levels="),
    ({"config": CONFIG | {"objective": {"name": "none", "options": {}}}}, "objective=none: no such name"),
    ({"data": None}, "its data must be a table"),
    ({"data": {}}, "its data lack classes, name, note, shape, variance"),
    ({"data": ABOUT | {"shape": [3, 8]}}, "its data.shape must be"),
    ({"data": ABOUT | {"shape": [3, 8, 2**30]}}, "its data.shape must be"),
    ({"data": ABOUT | {"shape": [257, 8, 8]}}, "its data.shape must be"),
    ({"data": ABOUT | {"shape": [3, 4097, 8]}}, "its data.shape must be"),
    ({"data": ABOUT | {"shape": [3, 8, 0]}}, "its data.shape must be"),
    ({"data": ABOUT | {"shape": [3, -8, 8]}}, "its data.shape must be"),
    ({"data": ABOUT | {"shape": (3.0, 8, 8)}}, "its data.shape must be"),
    ({"data": ABOUT | {"shape": [3, 4096, 4096]}}, "its examples.images must be .N, 3, 4096, 4096"),
    ({"data": ABOUT | {"variance": 0}}, "its data.variance must be a positive number"),
    ({"data": ABOUT | {"variance": float("inf")}}, "its data.variance must be a positive number"),
    ({"data": ABOUT | {"variance": "1"}}, "its data.variance must be a positive number"),
    ({"data": ABOUT | {"classes": 10**9}}, "its data.classes must be a list of names"),
    ({"data": ABOUT | {"classes": [1, 2]}}, "its data.classes must be a text"),
    ({"data": ABOUT | {"classes": ["x"] * (2**16 + 1)}}, "its data.classes must be a list of names"),
    ({"data": ABOUT | {"note": "x" * 10**6}}, "its data.note must be a text of at most 1,000 characters"),
    ({"data": ABOUT | {"name": "x" * 1001}}, "its data.name must be a text of at most 1,000 characters"),
    ({"data": ABOUT | {"examples": {"train": "many"}}}, "its data.examples must be a whole number"),
    (
        {"data": ABOUT | {"fingerprint": {"other": "0"}}},
        "its data.fingerprint must be of the splits train, validation, test",
    ),
    ({"kind": "decoder"}, "its kind must be autoencoder or prior"),
    ({"kind": IMAGES}, "its kind must be a text"),
    ({"run": None}, "its run must be a text"),
    ({"plots": 3}, "its plots must be a text"),
    ({"plots": "x" * 4097}, "its plots must be a text of at most 4,096 characters"),
    ({"step": -1}, "its step must be a whole number"),
    ({"step": 2**63}, "its step must be a whole number"),
    ({"step": 1.5}, "its step must be a whole number"),
    ({"epoch": None}, "its epoch must be a whole number"),
    ({"best": float("nan")}, "its best must be a number"),
    ({"best_step": "3"}, "its best_step must be a whole number"),
    ({"reductions": -1}, "its reductions must be a whole number"),
    ({"window": {"sums": {"loss": 1.0}, "count": 1}}, "its window.sums must be tensors"),
    ({"window": {"count": 1}}, "its window must be sums and a count"),
    ({"epoch_means": {"sums": {}, "count": -1}}, "its epoch_means must be a whole number"),
    ({"model": []}, "its model must be a table"),
    ({"model": {"x": 1}}, "its model must be tensors"),
    ({"model": {1: IMAGES}}, "its model must be a table"),
    ({"model": {"x" * 501: IMAGES}}, "its model must be a table"),
    ({"model": {}}, "its weights do not fit the model"),
    ({"objective": {"x": torch.zeros(1)}}, "its weights do not fit .*x should be absent"),
    ({"usage": torch.zeros(3)}, "its usage must be the counts"),
    ({"usage": [[1] * 7]}, "its usage must be the counts"),
    ({"usage": torch.arange(7)[None] - 1}, "its usage must be counts"),
    ({"usage": 1 / torch.arange(7)[None]}, "its usage must be counts"),
    ({"usage": torch.zeros(1, 8)}, "its usage does not count the model's codes"),
    ({"usage": torch.zeros(2, 7)}, "its usage does not count the model's codes"),
    ({"posterior": {"means": MEANS}}, "its posterior must be means and labels"),
    ({"posterior": {"means": [[0.0, 0.0]], "labels": LABELS[:1]}}, "its posterior.means must be .N, 2."),
    ({"posterior": {"means": MEANS, "labels": [0, 0]}}, "its posterior.labels must be 2 integers from -1 to 0"),
    ({"posterior": {"means": MEANS[:, :1], "labels": LABELS}}, "its posterior.means must be .N, 2."),
    ({"posterior": {"means": MEANS[:0], "labels": LABELS[:0]}}, "its posterior.means must be .N, 2."),
    ({"posterior": {"means": MEANS.double(), "labels": LABELS}}, "its posterior.means must be .N, 2."),
    (
        {"posterior": {"means": MEANS[:1].repeat(2**16 + 1, 1), "labels": LABELS[:1].repeat(2**16 + 1)}},
        "its posterior.means must be .N, 2., N at most 65,536",
    ),
    ({"posterior": {"means": MEANS, "labels": LABELS[:1]}}, "its posterior.labels must be 2 integers from -1 to 0"),
    ({"posterior": {"means": MEANS, "labels": LABELS.int()}}, "its posterior.labels must be 2 integers from -1 to 0"),
    (
        {"posterior": {"means": MEANS, "labels": torch.arange(2) - 2}},
        "its posterior.labels must be 2 integers from -1 to 0",
    ),
    (
        {"posterior": {"means": MEANS, "labels": torch.arange(2)}},
        "its posterior.labels must be 2 integers from -1 to 0",
    ),
    ({"examples": {}}, "its examples must be images and labels"),
    ({"examples": {"images": [], "labels": LABELS}}, "its examples.images must be"),
    ({"examples": {"images": IMAGES, "labels": [0, 0]}}, "its examples.labels must be 2 integers"),
    ({"examples": {"images": IMAGES[:0], "labels": LABELS[:0]}}, "its examples.images must be"),
    ({"examples": {"images": IMAGES.double(), "labels": LABELS}}, "its examples.images must be"),
    ({"examples": {"images": IMAGES / torch.arange(8), "labels": LABELS}}, "its examples.images must be"),
    ({"examples": {"images": IMAGES, "labels": LABELS[:1]}}, "its examples.labels must be 2 integers"),
    ({"examples": {"images": IMAGES, "labels": LABELS.float()}}, "its examples.labels must be 2 integers"),
    (
        {"examples": {"images": IMAGES, "labels": torch.arange(2) - 2}},
        "its examples.labels must be 2 integers from -1 to 0",
    ),
    (
        {
            "config": CONFIG | {"conditional": True},
            "data": ABOUT | {"classes": ["a"]},
            "examples": {"images": IMAGES, "labels": torch.arange(2) - 1},
        },
        "its examples.labels must be 2 integers from 0 to 0",
    ),
    (
        {"examples": {"images": IMAGES, "labels": torch.arange(2)}},
        "its examples.labels must be 2 integers from -1 to 0",
    ),
    (
        {"examples": {"images": IMAGES[:1].clone().expand(2, -1, -1, -1), "labels": LABELS}},
        "a tensor larger than its storage",
    ),
    (with_optimizer(state=[]), "its optimizer's state must be by number"),
    (with_optimizer(extra={}), "its optimizer must be a state and groups"),
    (with_optimizer(state={"0": {}}), "its optimizer's state must be by number"),
    (with_optimizer(state={0: {"step": 3}}), "its optimizer's state must be tensors like its weights"),
    (with_optimizer(state={0: {"step": torch.tensor(3)}}), "its optimizer's state must be tensors like its weights"),
    (with_optimizer(state={0: {"exp_avg": torch.zeros(99)}}), "its optimizer's state must be tensors like its weights"),
    (with_optimizer(param_groups=[{"params": "all"}]), "its optimizer's groups must be of numbers"),
    (with_optimizer(param_groups=[{"params": [0, "1"]}]), "its optimizer's groups must be of numbers"),
    (with_optimizer(param_groups={}), "its optimizer's groups must be a list"),
    (with_optimizer(param_groups=[{"params": [0], "lr": [1]}]), "its optimizer's groups have the wrong type"),
    (with_optimizer(param_groups=[{"params": [0], "betas": (0.9, [])}]), "its optimizer's groups have the wrong type"),
    ({"trained": {"x": 1}}, "its trained must be tensors"),
    ({"trained": {}}, "its weights do not fit .*model.* should be .* and is absent"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_an_entry_that_vqvae_would_not_write_is_refused(tmp_path, changes, message):
    """Some describe models that it would take years to build."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content() | changes)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.verify(checkpoint.read(path), str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(path))


def test_a_model_of_many_more_tensors_than_its_weights_is_refused(monkeypatch):
    monkeypatch.setattr(checkpoint._Budget, "SLACK", 2**40)  # however small they are
    with pytest.raises(UserError, match="its settings describe a larger model than its weights"):
        checkpoint.restore(content() | with_option("nets", residual_layers=200))


LARGE = {
    "sizes": lambda: torch.empty(2**12, 2**12),
    "a tuple": lambda: torch.zeros((2**12, 2**12)),
    "a keyword": lambda: torch.ones(size=(2**12, 2**12)),
    "numbers": lambda: torch.arange(2**23),
    "several": lambda: [torch.full((2**21,), 0.0) for _ in range(3)],
    "a sum": lambda: torch.rand(2**12, 1) + torch.rand(2**12),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_tensor_that_is_larger_than_all_weights_is_not_made(what):
    with pytest.raises(UserError, match="describe a larger model"), checkpoint._Budget([torch.zeros(3)]):
        LARGE[what]()


def test_tensors_that_are_not_stored_may_be_as_large_as_the_budget():
    weights = [torch.zeros(2**12)]
    with checkpoint._Budget(weights):
        assert torch.empty(2**11, 2**11).numel() == 2**22
        assert len(torch.arange(0.0, 1.0, 0.5)) == 2
    with checkpoint._Budget(weights):
        assert (torch.rand(2**11, 1) + torch.rand(2**11)).numel() == 2**22


LIMITS = [
    {"step": 2**63 - 1, "best": math.inf, "best_step": None, "plots": "x" * 4096},
    {"config": CONFIG | {"weight_decay": 0, "data_dir": "x" * 4096, "limit": None}},
    {"data": ABOUT | {"note": "x" * 1000, "classes": ["x"] * 2**16, "examples": {"train": 0}, "variance": 1e30}},
    {"data": ABOUT | {"shape": (256, 1, 2)}, "examples": {"images": torch.zeros(1, 256, 1, 2), "labels": LABELS[:1]}},
    {
        "data": ABOUT | {"shape": [1, 4096, 1]},
        "examples": {"images": IMAGES.new_zeros(1, 1, 4096, 1), "labels": -LABELS[:1]},
    },
    {"model": {"x" * 500: IMAGES}, "usage": torch.zeros(1, 7)},
    {
        "examples": {"images": IMAGES, "labels": LABELS - 1},
        "data": ABOUT | {"fingerprint": {"test": "0"}, "variance": 1e-30},
    },
    {"posterior": {"means": MEANS[:1].repeat(2**16, 1), "labels": LABELS[:1].repeat(2**16) - 1}},
    with_optimizer(param_groups=[{"params": [0, 1], "betas": (0.9, 1), "fused": None, "amsgrad": False, "name": "x"}]),
]


@pytest.mark.parametrize("changes", LIMITS, ids=[str(i) for i in range(len(LIMITS))])
def test_an_entry_at_its_limit_is_read(tmp_path, changes):
    checkpoint.write(tmp_path / "checkpoint.pt", content() | changes)
    found = checkpoint.read(tmp_path)
    for name in changes.keys() & {"step", "best", "plots", "optimizer"}:
        assert found[name] == changes[name]


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "a b", "a\nb", "\x1b[31mred", "", "..", "-x", "é" * 150, "\ud800"]
)
def test_a_run_gets_a_plain_name(tmp_path, name):
    named = content(run=name, data=ABOUT | {"note": f"<{name}>", "classes": [name]})
    checkpoint.write(tmp_path / "checkpoint.pt", named | {"config": CONFIG | {"name": name}})
    found = checkpoint.read(tmp_path)
    assert FIELDS["name"].problem(found["run"]) is None
    assert FIELDS["name"].problem(found["config"]["name"]) is None
    assert all(printable(text) == text for text in (found["data"]["note"], *found["data"]["classes"]))


def test_a_plain_name_stays(tmp_path):
    checkpoint.write(tmp_path / "checkpoint.pt", content(run="vqvae-cifar10_2.b"))
    assert checkpoint.read(tmp_path)["run"] == "vqvae-cifar10_2.b"


@pytest.mark.parametrize(
    ("slot", "name"),
    [(slot, name) for slot, (_, table, _) in SLOTS.items() for name in table if (slot, name) != ("prior", "made-flow")],
)
def test_every_member_is_saved_and_loaded(tmp_path, slot, name):
    chosen = CHOICES | ({"likelihood": "bernoulli"} if slot != "likelihood" else {}) | {slot: name}
    if name in ("gaussian", "normal") and slot != "likelihood":
        chosen |= {"bottleneck": "gaussian", "prior": "made-flow", "nets": "conv-vae"}
    chosen = choices(**chosen)
    model = make(**chosen)
    checkpoint.write(tmp_path / "checkpoint.pt", content(model, chosen))
    checkpoint.verify(checkpoint.read(tmp_path), "checkpoint")
    back = load(tmp_path).state_dict()
    assert all(torch.equal(value, back[key]) for key, value in model.state_dict().items())


def test_a_check_draws_no_random_numbers(tmp_path):
    stored, new_prior = content(), Config(**choices(prior="transformer"))
    torch.manual_seed(0)
    expected = make(**choices(prior="transformer")).prior.state_dict()
    torch.manual_seed(0)
    model = checkpoint.with_new_prior(stored, "checkpoint", new_prior, 0)
    assert not model.training
    found = model.prior.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_an_error_of_a_new_prior_names_its_option():
    with pytest.raises(OptionError, match="prior=normal: needs latent_dim"):
        checkpoint.with_new_prior(content(), "checkpoint", Config(**choices(prior="normal")), 0)


def archive_of(path: Path, *instructions: bytes, records: dict[str, bytes] | None = None, **options) -> None:
    """A sealed checkpoint whose pickle consists of these instructions."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for key, record in {"data.pkl": b"".join(instructions), **(records or {})}.items():
            archive.writestr(f"archive/{key}", record)
        archive.comment = bytes(71)
    raw = buffer.getvalue()[:-71]
    path.write_bytes(raw + b"sha256:" + hashlib.sha256(raw).hexdigest().encode())


def text(word: str) -> bytes:
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(count: int, size: int, stride: int = 1, offset: int = 0, record: str = "0") -> bytes:
    """Instructions that rebuild a tensor of a storage of `count` floats."""
    storage = b"((" + text("storage") + b"ctorch\nFloatStorage\n" + text(record) + text("cpu") + number(count) + b"tQ"
    shape = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + shape + b"\x89ccollections\nOrderedDict\n)RtR"


HASH_FOR_AGES = b"}(" + number(1) + b"\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60 + number(1) + b"u."
CODE = "not a vqvae checkpoint: it contains objects other than plain values and tensors"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = text("storage"), text("0") + text("cpu")  # before and after the type
CRAFTED = {
    "no pickle at all": ([b""], "pickle exhausted"),
    "an unfinished pickle": ([b"}"], "pickle exhausted"),
    "an empty stack": ([b"u."], "pop from empty list"),
    "a call of a table": ([b"})R."], "it calls something that is not a function"),
    "a module": ([b"cos\nsystem\n(", text("touch executed"), b"tR."], CODE),
    "bytes without end": ([b"cbuiltins\nbytearray\n(", number(2**40), b"tR."], CODE),
    "a discarded value": ([b"N0N."], CODE),
    "a key that takes ages to hash": ([HASH_FOR_AGES], "a str expected, found a tuple"),
    "a key without a value": ([b"}(" + text("a") + b"u."], r"zip\(\) argument 2 is shorter"),
    "a number without end": ([b"\x8b\xff\xff\xff\x00", b"\x7f" * 2**24, b"."], "a number of more than 64 bits"),
    "a number of 65 bits": ([number(2**64) + b"."], "a number of more than 64 bits"),
    "a tensor beyond its record": ([tensor(2**30, 2**30), b"."], "a tensor of 1,073,741,824 values in 16 bytes"),
    "a record beyond its tensor": ([tensor(3, 3), b"."], "a tensor of 3 values in 16 bytes"),
    "a tensor beyond its storage": ([tensor(4, 5), b"."], "a tensor larger than its storage"),
    "an offset beyond its storage": ([tensor(4, 4, offset=1), b"."], "out of bounds for storage of size 16"),
    "a negative size": ([tensor(4, -4), b"."], "a tensor without values or shape"),
    "a negative offset": ([tensor(4, 4, offset=-1), b"."], "a tensor without values or shape"),
    "a negative stride": ([tensor(4, 4, stride=-1), b"."], "a tensor without values or shape"),
    "a stride beyond its storage": ([tensor(4, 4, stride=2**40), b"."], "out of bounds for storage of size 16"),
    "a tensor of nothing": ([REBUILD, b"(]" + number(0) + b"))tR."], "a tensor without values or shape"),
    "a tensor without a record": ([tensor(4, 4, record="1"), b"."], "archive/data/1"),
    "a record elsewhere": ([tensor(4, 4, record="../data.pkl"), b"."], r"archive/data/\.\./data.pkl"),
    "a negative storage": ([tensor(-4, 4), b"."], "a storage without type and size"),
    "a storage of no type": ([b"(" + text("float").join(STORAGE) + number(4) + b"tQ."], "a storage without type"),
    "a storage of another kind": ([b"NQ."], "a tuple expected, found a NoneType"),
    "a table made of something": ([b"ccollections\nOrderedDict\n(]tR."], "an ordered dictionary made of something"),
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_archive_is_refused_in_one_line(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    instructions, message = CRAFTED[what]
    archive_of(path, *instructions, records={"data/0": bytes(16)})
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.read(path)
    assert re.match(
        "truncated, or not a checkpoint|not a vqvae checkpoint", str(caught.value).removeprefix(f"{path}: ")
    )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_of_too_many_instructions_is_refused(monkeypatch):
    monkeypatch.setattr(archives, "MOST_INSTRUCTIONS", 3)
    assert archives.unpickle(b"]N.", {}) is None
    with pytest.raises(ValueError, match="more than 3 instructions"):
        archives.unpickle(b"]]N.", {})


def test_an_archive_made_by_hand_is_read(tmp_path):
    """So that the cases above fail for the reason in their names."""
    archive_of(tmp_path / "x.pt", tensor(4, 2, stride=2, offset=1), b".", records={"data/0": bytes(12) + b"\0\0\x80?"})
    with open_file(tmp_path / "x.pt") as file:
        assert archives.read_torch(file).tolist() == [0, 1]


def test_a_compressed_archive_is_refused(tmp_path):
    archive_of(tmp_path / "x.pt", b"}.", records={"data/0": bytes(2**24)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="not a checkpoint .compressed members"):
        checkpoint.read(tmp_path / "x.pt")


def test_an_archive_of_which_one_member_is_compressed_is_refused(tmp_path):
    archive_of(tmp_path / "x.pt", b"}.")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.writestr("archive/data/0", bytes(2**24), zipfile.ZIP_DEFLATED)
    with open_file(tmp_path / "x.pt") as file, pytest.raises(ValueError, match="compressed members"):
        archives.read_torch(file)


def test_an_archive_of_another_program_is_refused_with_the_reason(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8)))
    with pytest.raises(UserError, match="not a checkpoint .a ZIP archive of something else"):
        checkpoint.read(tmp_path / "x.npz")


def test_a_member_that_occurs_twice_is_refused(tmp_path):
    archive_of(tmp_path / "x.pt", b"}.", records={"data.pkm": b"]."})
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes().replace(b"data.pkm", b"data.pkl")[:-71])
    with pytest.raises(UserError, match="not a checkpoint .several members of one name"):
        checkpoint.read(tmp_path / "x.pt")


def test_an_archive_of_two_pickles_is_refused(tmp_path):
    archive_of(tmp_path / "x.pt", b"}.", records={"other/data.pkl": b"]."})
    with pytest.raises(UserError, match="not a checkpoint .a ZIP archive of something else"):
        checkpoint.read(tmp_path / "x.pt")


def test_tensors_of_another_byte_order_are_refused(tmp_path):
    other = {"little": "big", "big": "little"}[sys.byteorder]
    archive_of(tmp_path / "x.pt", b"}.", records={"byteorder": other.encode()})
    with pytest.raises(UserError, match="not a checkpoint .written on a machine with another byte order"):
        checkpoint.read(tmp_path / "x.pt")
    archive_of(tmp_path / "x.pt", b"}.", records={"byteorder": sys.byteorder.encode()})
    with open_file(tmp_path / "x.pt") as file:
        assert archives.read_torch(file) == {}


def test_members_that_are_not_where_the_archive_says_are_refused(tmp_path):
    """The central directory at the end of the archive has sizes and places of its own."""
    path = tmp_path / "x.pt"
    archive_of(path, b"}.")
    raw = path.read_bytes()[:-71]
    entry = raw.index(b"PK\1\2")

    def read(changed: bytes) -> None:
        path.write_bytes(changed)
        with open_file(path) as file:
            archives.read_torch(file)

    def sized(count: int) -> bytes:
        return raw[: entry + 20] + count.to_bytes(4, "little") * 2 + raw[entry + 28 :]

    read(sized(2))
    with pytest.raises(ValueError, match="members that share bytes"):
        read(sized(len(raw) + 1))
    with pytest.raises(EOFError, match="cut short"):
        read(sized(len(raw)))
    with pytest.raises(ValueError, match="a member without its header"):
        read(b"PK\1\1" + raw[4:])


def test_checksums_stay_as_they_are():
    """Files of codes and evaluations store them, to be found again by later versions."""
    assert weights_checksum(load(FORMAT_2)) == "195ed5bf4f115dec"
    assert checkpoint.identity_of(checkpoint.read(FORMAT_2)) == {
        "run": "test",
        "step": 3,
        "weights": "b2a7515b22c3e824",
    }


def test_the_checksum_does_not_depend_on_strides_and_knows_every_type():
    values = torch.arange(6.0).view(2, 3)
    layer = nn.Linear(3, 2, bias=False)
    found = set()
    for weight in (values, values.T.contiguous().T):
        layer.weight = nn.Parameter(weight)
        found.add(weights_checksum(layer))
    assert len(found) == 1
    layer.weight = nn.Parameter(values.bfloat16())
    assert weights_checksum(layer) not in found


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
