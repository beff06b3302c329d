"""Combinations of members, data and options that once ended in a traceback: they work to the end, or are refused.

benchmarks/faults/combinations.py draws more of them.
"""

import json
from pathlib import Path

import pytest

from tests.helpers import run_train
from vqvae import cli
from vqvae.commands import visualize

POINTS = "--dataset gauss2d train_points=40 test_points=10 --nets mlp hidden=4 --likelihood gaussian"
PHOTOS = "--dataset photos crops=20 test_crops=6 --image-size 8"
CODES = f"{POINTS} --bottleneck vq num_codes=4 code_dim=2"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(line: str, name: str = "run") -> int:
    words = f"{line} --batch-size {1 if '--limit 1 ' in line else 5} --epochs 9 --max-steps 2 --device cpu"
    words += " --validation test" if "--limit 1 " in line else ""  # a single image cannot be split
    return run_train(*words.split(), "--name", name, small=False)


def draw(run: str, *names: str) -> set[str]:
    """Draw the named plots; returns those that apply."""
    line = ["--checkpoint", f"logs/{run}", "--samples", "3", "--device", "cpu", "--only", *names]
    assert cli.run(visualize.main, line) == 0
    return {path.name for path in Path("plots", run).glob("*.*")}


def done(capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> str:
    """The printed lines; nothing on stderr, and no warning."""
    out, err = capsys.readouterr()
    assert err == ""
    assert not [str(w.message) for w in recwarn]
    assert "nan" not in out
    return out


def refuse(token: str) -> None:
    raise AssertionError(f"JSON has no {token}")


@pytest.mark.parametrize(
    "line",
    [
        f"{PHOTOS} --nets sonnet hidden=4 --bottleneck simvq num_codes=4 code_dim=1 init=normal",
        f"{PHOTOS} --limit 1 --nets mlp hidden=4 --bottleneck simvq num_codes=4 code_dim=1 init=kmeans",
        f"{PHOTOS} --limit 1 --nets mlp hidden=4 --bottleneck simvq num_codes=4 code_dim=2 init=normal",
        f"{PHOTOS} --limit 1 --nets conv-vae hidden=1 --bottleneck lfq bits=3 --likelihood gaussian",
        f"{PHOTOS} --limit 1 --nets mlp hidden=4 --bottleneck vq num_codes=9 code_dim=1",
        f"{PHOTOS} --limit 1 --nets mlp hidden=4 --bottleneck gaussian latents=2 --prior normal",
        f"{PHOTOS} --nets mnist-conv hidden=2 latents=3 features=4 --bottleneck cosine num_codes=300 code_dim=1",
        CODES,
    ],
)
def test_it_works_to_the_end(capsys, recwarn, line):
    assert trained(line) == 0
    assert run_train("--evaluate", "--checkpoint", "logs/run", "--iw-samples", "2", small=False) == 0
    assert draw("run", "scatter_2d.png" if line == CODES else "samples.png")
    done(capsys, recwarn)
    for row in Path("logs/run/metrics.jsonl").read_text().splitlines():
        json.loads(row, parse_constant=refuse)
    json.loads(Path("logs/run/evaluation.json").read_text(), parse_constant=refuse)


def test_a_prior_is_trained_on_codes_of_points():
    assert trained(CODES) == 0
    assert trained("--checkpoint logs/run --prior unigram", "second") == 0
    assert draw("second", "original.png", "samples.png", "scatter_2d.png") == {"scatter_2d.png"}


def test_a_prior_on_codes_of_one_row_completes_none(capsys):
    assert trained(f"{PHOTOS} --nets mlp hidden=4 --bottleneck vq num_codes=4 code_dim=2") == 0
    assert trained("--checkpoint logs/run --prior transformer layers=1 width=4 heads=1", "second") == 0
    assert draw("second", "samples.png", "completions.png") == {"samples.png"}
    assert "completions.png: not drawn: the codes of an image have a single row" in capsys.readouterr().err


def test_metrics_are_printed_where_they_cannot_be_stored(capsys):
    assert trained(CODES) == 0
    Path("logs/run/evaluation.json").unlink()
    Path("logs/run/evaluation.json").mkdir()  # as in a folder that may only be read
    capsys.readouterr()
    assert run_train("--evaluate", "--checkpoint", "logs/run", "--iw-samples", "2", small=False) == 0
    out, err = capsys.readouterr()
    assert "neg_elbo " in out
    assert out.splitlines()[-1].startswith("not stored: logs/run/evaluation.json: cannot be written (")
    assert out.splitlines()[-1].endswith("choose a file with --output")
    assert err == ""
    line = ["--evaluate", "--checkpoint", "logs/run", "--iw-samples", "2", "--output"]
    assert run_train(*line, "metrics/run.json", small=False) == 0
    assert json.loads(Path("metrics/run.json").read_text())["run"] == "run"
    capsys.readouterr()
    assert run_train(*line, "logs", small=False) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: --output logs: ")
    assert not out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{CODES} --likelihood bernoulli", "--likelihood bernoulli: is a likelihood of pixels, and the data are"),
        (f"{CODES} --likelihood softmax256", "--likelihood softmax256: is a likelihood of pixels"),
        (f"{CODES} --nets sonnet", "--nets: must be mlp or conv-vae, because the data are points of the plane"),
        (f"{PHOTOS} --bottleneck gaussian --prior normal", "--bottleneck gaussian: takes one vector per image, and"),
        (f"{PHOTOS} --nets mlp --bottleneck hierarchy", "--bottleneck hierarchy: halves the nets' grid, which is 1x1"),
        ("--dataset photos --image-size 1 --nets mlp", "--image-size 1: leaves one pixel of an image; try 4 or 8"),
        ("--dataset photos --image-size 4 --nets henrhoi", "--image-size 4: gives the batch norm of henrhoi a single"),
        (f"{PHOTOS} --likelihood mse variance=1e-300", "--likelihood mse variance=1e-300: must be 0, or from 1e-9"),
        (f"{PHOTOS} --likelihood logit-laplace eps=1e-300", "--likelihood logit-laplace eps=1e-300: must be from"),
    ],
)
def test_it_is_refused_before_training_in_one_line(folder, capsys, line, message):
    given = dict.fromkeys(f"--{words}" for words in f" {line}".split(" --")[1:])
    last = {words.split()[0]: words for words in given}  # of a flag given twice, the last
    assert trained(" ".join(last.values())) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not list(folder.iterdir())
