"""The lines that a run prints about itself."""

import warnings
from pathlib import Path

import pytest

from vqvae import experiment, summary
from vqvae.config import Config


def config(**options) -> Config:
    return Config.from_dict({**Config().to_dict(), **options})


def test_many_classes_are_cut_to_a_line():
    names = [f"class {i}" for i in range(99)]
    assert summary.listed(names[:3]) == "class 0, class 1, class 2"
    assert summary.listed(names) == "class 0, class 1, class 2, class 3, class 4, class 5, ..."


def test_a_run_too_short_to_learn_says_which_length_is_enough():
    short = config(epochs=3, batch_size=128)
    message = "too few updates to learn much: 69; try --batch-size 16 --epochs 11"  # 2,000 / (3,000 // 16)
    with pytest.warns(UserWarning, match=message):
        summary.warn_of_few_updates(short, experiment.plan_of(short), examples=3000)


@pytest.mark.parametrize("length", [{"epochs": 3, "max_steps": 10}, {"epochs": 3, "max_minutes": 1.0}, {"epochs": 99}])
def test_a_length_that_was_asked_for_or_is_enough_gives_no_warning(length):
    asked = config(batch_size=128, **length)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary.warn_of_few_updates(asked, experiment.plan_of(asked), examples=3000)


def test_the_last_lines_can_be_pasted(tmp_path):
    lines = summary.closing(tmp_path / "my run", tmp_path / "plots" / "my run").splitlines()
    assert lines[0] == f"done: {tmp_path}/my run, {tmp_path}/plots/my run"
    assert lines[1].endswith(f" --checkpoint '{tmp_path}/my run/checkpoint.pt' --plot-dir {tmp_path}/plots")
    default = summary.closing(tmp_path / "run", Path("plots/run")).splitlines()
    assert default[1].endswith("/run/checkpoint.pt")
    assert lines[2].split() == ["tensorboard", "--logdir", str(tmp_path)]


def test_an_interrupted_run_names_the_way_to_go_on(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    assert summary.how_to_go_on(folder, Path("plots/run")) == "nothing was saved yet; start it again as before"
    (folder / "checkpoint.pt").touch()
    assert summary.how_to_go_on(folder, Path("plots/run")).endswith(f" --resume '{folder}'")
    assert summary.how_to_go_on(folder, Path("my plots/run")).endswith(" --plot-dir 'my plots'")
