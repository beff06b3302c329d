"""The terminal during training."""

import io

import pytest
from tqdm import tqdm

from vqvae import progress
from vqvae.metrics import METRICS
from vqvae.progress import WIDTH, Progress, columns, duration
from vqvae.stage_one import AutoencoderTraining
from vqvae.stage_two import PriorTraining

NUMBERS = dict.fromkeys(METRICS, 4.5678) | {
    "mse": 0.01234, "psnr": 25.123, "perplexity": 8123.0, "active_codes": 8192, "active_units": 16, "neg_elbo": -1908.14
}  # fmt: skip
HEADLINES = [AutoencoderTraining.headline, PriorTraining.headline]


@pytest.mark.parametrize("names", HEADLINES)
def test_the_table_fits_80_columns_and_its_cells_stand_below_their_titles(capsys, names):
    shown = Progress(100, 0, names, quiet=True)
    for epoch in (1, 10_000):
        shown.row(epoch, NUMBERS, NUMBERS, 123_456.0)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("epoch  train ")
    assert header.endswith("  images/s")
    assert {len(line) for line in (header, *rows)} == {len(header)}
    assert len(header) < WIDTH


def test_columns_are_the_most_important_metrics_that_there_are():
    names = AutoencoderTraining.headline
    assert columns(names, {"mse": 0.1, "psnr": 1, "perplexity": 2, "active_codes": 3, "neg_elbo": 4}) == [
        "mse", "psnr", "perplexity", "active_codes", "neg_elbo"
    ]  # fmt: skip
    assert columns(names, {"neg_elbo": 4, "mse": 0.1}) == ["mse", "neg_elbo"]
    assert columns(names, {}) == []


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("names", HEADLINES)
def test_the_bar_fits_the_terminal_and_keeps_its_length(monkeypatch, names, width):
    out = io.StringIO()
    monkeypatch.setattr(
        progress,
        "tqdm",
        lambda **options: tqdm(
            **options | {"disable": False, "dynamic_ncols": False}, ncols=width, file=out, ascii=True
        ),
    )
    shown = Progress(2_000_000, 1_999_990, names, quiet=False)
    shown.epoch(9999, 10_000)
    shown.show(NUMBERS)
    shown.step(1_999_991)
    shown.bar.refresh()
    line = out.getvalue().split("\r")[-1].replace("\x1b[A", "").strip("\n")  # tqdm moves up from later lines
    assert len(line) == width
    assert line.count("#") >= 10


def test_work_that_is_no_step_is_named_and_does_not_count_into_the_estimate(monkeypatch):
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "tqdm", lambda **options: tqdm(**options | {"disable": False}, file=out))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    shown = Progress(10, 0, (), quiet=False)
    started = shown.bar.start_t
    with shown.working("evaluation"):
        clock[0] += 1000
    assert "evaluation" in out.getvalue()
    assert shown.bar.start_t == started + 1000


def test_the_time_to_go_is_printed_once_after_the_first_steps(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    shown = Progress(1025, 0, (), quiet=True)
    for step in range(1, 100):
        clock[0] += 600 if step < 5 else 6  # the first steps are slow
        shown.step(step)
    assert capsys.readouterr().out == "time   about 100 min, and the evaluation after each epoch\n".replace(
        "100 min", "1 h 40 min"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59.6, "60 s"), (89, "89 s"), (91, "2 min"), (5000, "83 min"), (12_000, "3 h 20 min")],
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def test_the_end_names_the_best_epoch(capsys):
    Progress(10, 0, (), quiet=True).finish(3, "neg_elbo")
    assert capsys.readouterr().out.endswith("; best.pt is epoch 3, of the lowest held-out -ELBO\n")
