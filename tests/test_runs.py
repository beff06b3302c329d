"""A run's folder contains what was logged, once, and is never overwritten by another run."""

import inspect
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqvae import checkpoint
from vqvae.errors import OptionError
from vqvae.runs import NullRun, Run, free_name

FACTS = {
    "kind": "toy",
    "run": "run",
    "config": {"nets": {"name": "sonnet", "options": {"hidden": 8}}, "epochs": 3, "limit": None},
    "data": {},
    "examples": {},
    "plots": "",
}
STATE = {"model": {}, "objective": {}, "step": 2, "epoch": 1, "usage": None}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start(folder) -> Run:
    """A run that logged steps 1 to 3 and saved a checkpoint."""
    run = Run(folder, FACTS)
    for step in (1, 2, 3):
        run.log("train", step, 0, {"loss": 1 / step})
    run.save(STATE)
    return run


def test_a_run_logs_lines_of_json_and_saves_its_facts(tmp_path):
    start(tmp_path / "logs" / "run").close()
    assert json.loads((tmp_path / "logs" / "run" / "config.json").read_text()) == FACTS["config"]
    assert [(row["kind"], row["step"], row["loss"]) for row in rows(tmp_path / "logs" / "run")] == [
        ("train", 1, 1.0),
        ("train", 2, 0.5),
        ("train", 3, 1 / 3),
    ]
    assert checkpoint.read(tmp_path / "logs" / "run") == {"format": checkpoint.FORMAT, **FACTS, **STATE}


def test_tensorboard_reads_scalars_images_histograms_and_hparams(tmp_path):
    run = start(tmp_path / "run")
    run.log_images("samples", torch.rand(3, 4, 4), 2)
    run.histogram("usage", torch.arange(5.0), 2)
    run.close({"loss": 0.5})
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]  # the result adds no point
    assert [event.value for event in events.Scalars("result/loss")] == [0.5]
    assert events.Tags()["images"] == ["samples"]
    assert events.Tags()["histograms"] == ["usage"]
    assert "config/text_summary" in events.Tags()["tensors"]
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    start(tmp_path / "run").close()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut off by a kill
    run = Run(tmp_path / "run", FACTS, resume_at=2)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    run.log("train", 3, 1, {"loss": 7.0})
    run.close()
    assert [row["loss"] for row in rows(tmp_path / "run")] == [1.0, 0.5, 7.0]
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_a_folder_that_contains_a_run_is_refused_and_unchanged(tmp_path):
    start(tmp_path / "run").close()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(OptionError, match="already contains a run; resume that run, or choose another name") as caught:
        Run(tmp_path / "run", FACTS)
    assert caught.value.flagged.startswith("--name run: ")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_an_unwritable_log_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write there") as caught:
        Run(tmp_path / "file" / "run", FACTS)
    assert caught.value.flagged.startswith(f"--log-dir {tmp_path / 'file'}: ")


def test_a_free_name_exists_in_no_folder(tmp_path):
    for taken in ("logs/run", "plots/run-2", "logs/walk"):
        (tmp_path / taken).mkdir(parents=True)
    folders = tmp_path / "logs", tmp_path / "plots"
    assert free_name("run", *folders) == "run-3"
    assert free_name("walk", *folders) == "walk-2"
    assert free_name("new", *folders) == "new"


def test_a_null_run_takes_every_call_of_a_run_and_writes_nothing(tmp_path):
    run = NullRun(tmp_path / "run")
    run.log("train", 1, 0, {"loss": 1.0})
    run.log_images("samples", torch.rand(3, 4, 4), 2)
    run.histogram("usage", torch.arange(5.0), 2)
    run.save(STATE)
    run.close({"loss": 0.5})
    assert not list(tmp_path.iterdir())
    for name, method in inspect.getmembers(Run, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(NullRun, name)) == inspect.signature(method)
            assert getattr(NullRun, name) is not method, f"{name} would write"
