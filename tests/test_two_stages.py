"""Presets of two stages, and priors that train on data with other classes than the data of the autoencoder."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.helpers import run_train
from tests.test_stage_two import SMALL_PIXELCNN
from tests.test_tokens import write_images
from vqvae import load, presets, two_stages
from vqvae.config import Config
from vqvae.errors import OptionError, UserError
from vqvae.stage_one import AutoencoderTraining

LINE = "--preset vqvae-pixelcnn --dataset digits --limit 40 --batch-size 20 --image-size 8 --hidden 256"


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def train(line: str) -> int:
    return run_train(*shlex.split(line), small=False)


def test_a_preset_of_two_stages_runs_both(capsys):
    line = "--preset vqvae-pixelcnn --dataset digits --limit 40 --batch-size 20 --image-size 8 --hidden 256"
    assert train(f"{line} {' '.join(SMALL_PIXELCNN)} --max-steps 2 --name two") == 0
    config = json.loads(Path("logs/two-prior/config.json").read_text())
    assert config["prior"]["options"]["blocks"] == 1
    assert config["bottleneck"]["options"]["code_dim"] == 256
    assert (config["patience"], config["batch_size"]) == (5, 20)
    assert load("logs/two-prior").discrete is not None
    for more, message in (
        ("--name two", "--name two-prior: logs/two-prior already contains a run"),
        ("--name other --prior pixelcnn blocks=-1", "--prior pixelcnn blocks=-1: must be at least 1"),
        ("--name other --patience 0", "--patience 0: must be"),
    ):  # before the first stage
        shutil.rmtree("logs/two", ignore_errors=True)
        assert train(f"{line} --max-steps 2 {more}") == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in Path("logs").iterdir()] == ["two-prior"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--prior uniform", "--prior uniform: has no parameters to train"),
        ("--prior made-flow", "prior made-flow: needs latent_dim"),
        ("--batch-size 38 --validation 0.1", "--batch-size 38: larger than the 36 training examples"),
        ("--batch-size 39", "--batch-size 39: larger than the 36 training examples"),  # the first one trains on all 40
        ("--dataset photos --image-size 16 --conditional", "--conditional: the data set photos has no labels"),
        ("--prior unigram blocks=1", "--prior unigram blocks=1: unknown option"),
    ],
)
def test_what_the_second_stage_would_refuse_is_refused_before_the_first_one_trains(capsys, more, message):
    line = LINE if "--dataset" not in more else LINE.replace("--dataset digits", "").replace("--image-size 8", "")
    line = line if "--batch-size" not in more else line.replace("--batch-size 20", "")
    whole = "" if "--batch-size" in more else "--validation test"
    assert train(f"{line} --max-steps 2 {whole} {more}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [path for path in Path("logs").glob("*") if any(path.iterdir())]


def test_what_is_checked_for_the_second_stage_draws_no_random_numbers(monkeypatch):
    check, unchanged = two_stages.check, []

    def noted(*arguments) -> None:
        before = torch.get_rng_state()
        check(*arguments)
        unchanged.append(torch.equal(torch.get_rng_state(), before))
        raise UserError("this test trains nothing")

    monkeypatch.setattr(two_stages, "check", noted)
    line = LINE.replace("--batch-size 20", "--batch-size 36 --validation 0.1")  # all training images
    assert train(f"{line} {' '.join(SMALL_PIXELCNN)} --max-steps 2 --device cpu") == 2
    assert unchanged == [True]


def test_the_second_stage_has_the_folder_of_the_first():
    config = Config(preset="vqvae-pixelcnn")
    assert "--log-dir" not in two_stages.missing(config, Path("logs/two"))
    line = two_stages.missing(config, Path("runs/two"))
    assert "--log-dir runs" in line
    assert "--checkpoint runs/two/checkpoint.pt" in line
    given = {"name": "two", "log_dir": "runs"}
    settings = two_stages.second_stage(dict(given), presets.PRESETS[config.preset].prior)
    assert settings["log_dir"] == "runs"
    Path("runs/two-prior").mkdir(parents=True)
    Path("runs/two-prior/checkpoint.pt").touch()
    assert two_stages.missing(config, Path("runs/two")) is None
    with pytest.raises(OptionError, match="two-prior already contains a run"):
        two_stages.second_stage(given, settings)


def test_flags_of_memory_and_of_the_end_of_training_apply_to_both_stages():
    line = LINE.replace("--hidden 256", "--nets sonnet hidden=8 --bottleneck vq code_dim=8 projection=yes")
    flags = "--accumulate 2 --clip 1 --ema-weights 0.5 --shuffle blocks"
    assert train(f"{line} {' '.join(SMALL_PIXELCNN)} --max-steps 2 --epochs 3 --name two {flags}") == 0
    first, second = (json.loads(Path(f"logs/{name}/config.json").read_text()) for name in ("two", "two-prior"))
    for config in (first, second):
        assert [config[key] for key in ("accumulate", "clip", "ema_weights", "shuffle")] == [2, 1.0, 0.5, "blocks"]
    assert (first["epochs"], second["epochs"]) == (3, 30)
    assert "--prior, --conditional, --patience apply to the second one, --batch-size" in presets.describe()


def test_an_interrupted_first_stage_says_how_to_train_the_prior(monkeypatch, capsys):
    summary = AutoencoderTraining.summary

    def interrupted(self, means):
        monkeypatch.setattr(AutoencoderTraining, "summary", summary)
        os.kill(os.getpid(), signal.SIGTERM)
        return summary(self, means)

    words = f"{LINE} {' '.join(SMALL_PIXELCNN)} --log-every 1 --max-steps 3 --epochs 3 --device cpu --name two"
    monkeypatch.setattr(AutoencoderTraining, "summary", interrupted)
    assert train(words) == 143
    out = capsys.readouterr().out
    (resume,) = re.findall(r"Resume with: python train.py (.*)", out)
    (prior,) = re.findall(r"then its prior: python train.py (.*)", out)
    assert "--prior pixelcnn channels=8 blocks=1 head=8" in prior
    assert train(resume) == 0
    assert "then its prior: python train.py --name two-prior --checkpoint logs/two/checkpoint.pt --optimizer adamw" in (
        capsys.readouterr().out
    )
    assert train(prior) == 0
    assert load("logs/two-prior").prior is not None
    assert json.loads(Path("logs/two-prior/config.json").read_text())["prior"]["options"]["blocks"] == 1
    assert train("--resume logs/two --max-steps 4") == 0
    assert "its prior" not in capsys.readouterr().out


def test_a_default_name_whose_prior_exists_is_refused_before_the_first_stage(capsys):
    Path("logs/vqvae-pixelcnn-prior").mkdir(parents=True)
    Path("logs/vqvae-pixelcnn-prior/checkpoint.pt").touch()
    assert train(f"{LINE} --max-steps 2") == 2
    assert "--name vqvae-pixelcnn-prior: logs/vqvae-pixelcnn-prior already contains a run" in capsys.readouterr().err
    assert [path.name for path in Path("logs").iterdir()] == ["vqvae-pixelcnn-prior"]


@pytest.mark.parametrize("kinds", [("cat", "dog"), ("cat", "dog", "emu", "fox")])
@pytest.mark.parametrize("first", [("cat", "dog", "emu"), ()])
def test_a_conditional_prior_is_for_the_classes_of_its_own_data(kinds, first):
    for folder, names in (("one", first or [""]), ("two", kinds)):
        for name in names:
            write_images(*(f"{folder}/{name}/{i}.png" for i in range(30)), size=(16, 16))
    line = "--dataset folder --image-size 16 --hidden 8 --codes 16 --max-steps 2 --batch-size 10 --device cpu"
    assert train(f"{line} --data-dir one --name run") == 0
    line = f"{' '.join(SMALL_PIXELCNN)} --checkpoint logs/run --conditional --max-steps 2 --batch-size 10 --device cpu"
    assert train(f"{line} --data-dir two --name prior") == 0
    assert train("--resume logs/prior --max-steps 3 --data-dir two") == 0
    model = load("logs/prior")
    assert model.sample(len(kinds), labels=torch.arange(len(kinds))).shape == (len(kinds), 3, 16, 16)
