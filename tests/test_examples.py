"""The scripts in examples/."""

import runpy

import numpy as np
import pytest

from tests.helpers import ROOT, run_train
from vqvae import cli
from vqvae.commands import encode


def test_a_gpt_of_transformers_trains_on_codes_and_its_samples_are_decoded(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    assert run_train("--dataset", "digits", "--name", "run", "--epochs", "1") == 0
    words = "--checkpoint logs/run --dataset digits --limit 60 --output codes.npz --device cpu"
    assert cli.run(encode.main, words.split()) == 0
    gpt = runpy.run_path(str(ROOT / "examples/gpt.py"))
    sequences, num_codes, grid = gpt["read_sequences"](tmp_path / "codes.npz")
    with np.load("codes.npz") as file:
        assert (sequences[:, 0].numpy() - num_codes == file["labels"]).all()
        assert (sequences[:, 1:].view(-1, *grid).numpy() == file["codes"]).all()
    few = words.replace("--limit 60 --output codes.npz", "--limit 2 --output few.npz --shards 2")
    assert cli.run(encode.main, few.split()) == 0
    gpt["main"](["few.npz", "--checkpoint", "logs/run", "--steps", "1"])  # one to train on, one held out
    capsys.readouterr()
    gpt["main"](["codes.npz", "--checkpoint", "logs/run", "--steps", "3", "--output", "samples.png"])
    assert capsys.readouterr().out.startswith("step 3: ")
    assert Image.open("samples.png").width > 400


def test_the_example_is_short():
    assert len((ROOT / "examples/gpt.py").read_text().splitlines()) <= 80
