"""A run's folder contains what was logged, once, and is never overwritten by another run."""

import errno
import inspect
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.checkpoints import content
from vqvae import checkpoint, runs
from vqvae.errors import OptionError
from vqvae.runs import Busy, Lock, NullRun, Run, claim, claim_free, read_metrics

ENTRIES = content(step=2, best=0.5, best_step=2, best_epoch=1)
FACTS = {key: ENTRIES[key] for key in ("kind", "run", "config", "data", "examples", "plots")}
STATE = {key: value for key, value in ENTRIES.items() if key not in FACTS}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def start(folder) -> Run:
    """A run that logged steps 1 to 3 and saved a checkpoint."""
    run = Run(folder, FACTS)
    run.start()
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
    saved = checkpoint.read(tmp_path / "logs" / "run")
    assert saved["format"] == checkpoint.FORMAT
    for name, value in ENTRIES.items():
        assert_equal(saved[name], value)


def test_tensorboard_reads_scalars_images_and_hparams(tmp_path):
    run = start(tmp_path / "run")
    run.log_images("samples", torch.rand(3, 4, 4), 2)
    run.close({"loss": 0.5})
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3]  # the result adds no point
    assert [event.value for event in events.Scalars("result/loss")] == [0.5]
    assert events.Tags()["images"] == ["samples"]
    assert "config/text_summary" in events.Tags()["tensors"]
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    start(tmp_path / "run").close()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut off by a kill
    run = Run(tmp_path / "run", FACTS)
    run.start(checkpoint.read(tmp_path / "run"))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    run.log("train", 3, 1, {"loss": 7.0})
    run.close()
    assert [row["loss"] for row in rows(tmp_path / "run")] == [1.0, 0.5, 7.0]
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3]


@pytest.mark.parametrize("evaluated", [[], [("test", 1)], [("test", 1), ("test", 2)]])
@pytest.mark.parametrize("at_end", [True, False])
def test_a_run_killed_at_its_end_drops_the_evaluations_that_it_repeats(tmp_path, evaluated, at_end):
    start(tmp_path / "run").close()
    before = [("test", 1), ("epoch", 2)]
    lines = (f'{{"kind": "{kind}", "step": {step}}}\n' for kind, step in before + evaluated)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    run = Run(tmp_path / "run", FACTS)
    run.start(checkpoint.read(tmp_path / "run"), at_end=at_end)
    run.close()
    kept = before if at_end else before + evaluated
    assert [(row["kind"], row["step"]) for row in rows(tmp_path / "run")] == kept


def test_a_folder_that_contains_a_run_is_refused_and_unchanged(tmp_path):
    start(tmp_path / "run").close()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(OptionError, match="already contains a run; resume that run, or choose another name") as caught:
        Run(tmp_path / "run", FACTS).start()
    assert caught.value.flagged.startswith("--name run: ")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_an_unwritable_log_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write there") as caught:
        Run(tmp_path / "file" / "run", FACTS).start()
    assert caught.value.flagged.startswith(f"--log-dir {tmp_path / 'file'}: ")


def test_a_free_name_exists_in_no_folder(tmp_path):
    for taken in ("logs/run", "plots/run-2", "logs/walk"):
        (tmp_path / taken).mkdir(parents=True)
    with Lock() as lock:
        for name, free in (("run", "run-3"), ("walk", "walk-2"), ("new", "new")):
            assert claim_free(name, tmp_path / "logs", tmp_path / "plots", lock) == tmp_path / "logs" / free
            lock.release()


def test_runs_and_plots_may_have_one_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "all", target_is_directory=True)
    with Lock() as one, Lock() as other:
        for lock, plots, free in ((one, "all", "run"), (other, "link", "run-2")):
            assert claim_free("run", tmp_path / "all", tmp_path / plots, lock) == tmp_path / "all" / free


def test_a_null_run_takes_every_call_of_a_run_and_writes_nothing(tmp_path):
    run = NullRun(tmp_path / "run")
    run.log("train", 1, 0, {"loss": 1.0})
    run.log_images("samples", torch.rand(3, 4, 4), 2)
    run.save(STATE)
    run.close({"loss": 0.5})
    assert not list(tmp_path.iterdir())
    for name, method in inspect.getmembers(Run, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(NullRun, name)) == inspect.signature(method)
            assert getattr(NullRun, name) is not method, f"{name} would write"


def test_a_resumed_run_leaves_out_damaged_lines_with_a_warning(tmp_path):
    start(tmp_path / "run").close()
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("\n".join(["[[[", '{"step": "2"}', *log.read_text().splitlines(), '{"step": 2']))
    run = Run(tmp_path / "run", FACTS)
    with pytest.warns(UserWarning, match="metrics.jsonl: 3 lines, the first of them line 1, are damaged, and left out"):
        run.start(checkpoint.read(tmp_path / "run"))
    run.close()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


ODD_LINES = (
    b'{"kind": "train", "step": 7, "los', b"5", b"[]", b"null", b"\xff\x00", b'{"step": 7}', b'{"kind": "train"}',
    b'{"kind": "epoch", "step": "x"}', b'{"kind": "epoch", "step": 1, "loss": [1]}', b"[" * 100_000,
    b'{"kind": "epoch", "step": NaN}', b'{"kind": "epoch", "step": 1, "loss": 1' + b"0" * 400 + b"}", b"",
)  # fmt: skip
LINE = b'{"kind": "train", "step": 1, "epoch": 0, "loss": 0.5}'


@pytest.mark.parametrize("odd", ODD_LINES, ids=range(len(ODD_LINES)))
def test_a_damaged_line_is_left_out_with_a_warning(tmp_path, odd):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(odd + b"\n" + LINE + b"\n")
    with pytest.warns(UserWarning, match=r"metrics.jsonl: line 1 is damaged, and left out$"):
        assert read_metrics(log) == [json.loads(LINE)]


def test_an_unfinished_last_line_is_left_out_in_silence(tmp_path, recwarn):
    (tmp_path / "metrics.jsonl").write_bytes(LINE + b"\n" + LINE[:20])
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(LINE)]
    assert read_metrics(tmp_path / "of a run that logged nothing") == []
    assert not recwarn


def test_values_that_are_not_finite_are_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"kind": "train", "step": 1, "loss": NaN, "mse": null, "nmse": 2, "x": 1e999}\n')
    assert read_metrics(log) == [{"kind": "train", "step": 1, "nmse": 2}]


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file below a folder, with its content and time of modification, and every folder."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {name: (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None for name, p in files.items()}


def points(folder: Path, tag: str = "loss/train") -> list[tuple[int, float]]:
    """The points that TensorBoard reads."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_points_logged_before_a_checkpoint_are_on_disk_with_it(tmp_path):
    run = start(tmp_path / "run")
    assert [step for step, _ in points(tmp_path / "run")] == [1, 2, 3]  # the run may be killed here
    run.close()


@pytest.mark.parametrize("clock", [0, 3600])  # of the machine that logged before: as ours, and an hour ahead
def test_a_resumed_run_replaces_exactly_the_points_after_its_step(tmp_path, monkeypatch, clock):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + clock)
    for _ in range(3):  # all within one second
        if not (tmp_path / "run").exists():
            run = start(tmp_path / "run")
        else:
            run = Run(tmp_path / "run", FACTS)
            run.start(checkpoint.read(tmp_path / "run"))
            for step in (3, 4):
                run.log("train", step, 1, {"loss": 0.25})
        run.close()
    monkeypatch.setattr(time, "time", lambda: now)
    run = Run(tmp_path / "run", FACTS)
    run.start(checkpoint.read(tmp_path / "run"))
    assert points(tmp_path / "run") == [(1, 1.0), (2, 0.5)]
    run.log("train", 3, 1, {"loss": 7.0})
    run.close({"loss": 7.0})
    assert points(tmp_path / "run") == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert points(tmp_path / "run", "result/loss") == [(3, 7.0)]


def test_event_files_of_now_or_later_get_earlier_names_in_the_same_order(tmp_path, monkeypatch):
    now = 1_700_000_000
    monkeypatch.setattr(time, "time", lambda: now + 0.5)
    for second, host in ((now - 100, "a"), (now, "b"), (now + 1, "c"), (now + 3600, "d")):
        (tmp_path / f"events.out.tfevents.{second}.{host}").touch()
    runs.order_events(tmp_path)
    found = [path.name.split(".")[-2:] for path in sorted(tmp_path.iterdir())]
    assert [host for _, host in found] == ["a", "b", "c", "d"]
    assert [int(second) < now for second, _ in found] == [True] * 4
    assert int(found[0][0]) == now - 100


def test_a_run_that_never_saved_is_started_anew(tmp_path):
    run = Run(tmp_path / "run", FACTS)
    run.start()
    run.log("train", 1, 0, {"loss": 9.0})
    run.close()
    for name in ("best.pt", "checkpoint.pt.1234.partial", "notes.txt"):
        (tmp_path / "run" / name).write_text("of the run before")
    start(tmp_path / "run").close()
    assert [row["loss"] for row in rows(tmp_path / "run")] == [1.0, 0.5, 1 / 3]
    assert [value for _, value in points(tmp_path / "run")] == pytest.approx([1.0, 0.5, 1 / 3])
    found = {path.name.split(".")[0] for path in (tmp_path / "run").iterdir()}
    assert found == {"", "config", "metrics", "events", "checkpoint", "notes"}
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_run_has_one_writer_and_the_second_changes_nothing(tmp_path):
    run = start(tmp_path / "run")
    saved, before = checkpoint.read(tmp_path / "run"), snapshot(tmp_path)
    with pytest.raises(
        Busy, match=rf"run: another process \({os.getpid()} on .*\) writes this run; wait until it ends"
    ):
        Run(tmp_path / "run", FACTS).start(saved)
    with pytest.raises(OptionError, match="already contains a run"):
        Run(tmp_path / "run", FACTS).start()
    assert snapshot(tmp_path) == before
    run.close()
    run = Run(tmp_path / "run", FACTS)
    run.start(saved)
    run.close()


def test_a_new_run_in_a_folder_that_another_begins_is_refused(tmp_path):
    run = Run(tmp_path / "run", FACTS)
    run.start()
    with pytest.raises(OptionError, match="another process") as caught:
        Run(tmp_path / "run", FACTS).start()
    assert caught.value.flagged.startswith("--name run: ")
    run.close()


def test_a_lock_dies_with_its_process(tmp_path):
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        lock = Lock()
        lock.take(tmp_path)
        lock.keep()
        os.write(go, b".")
        time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    with Lock() as lock, pytest.raises(Busy, match=f"another process \\({child} on "):
        lock.take(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Lock() as lock:
        lock.take(tmp_path)


@pytest.mark.skipif(runs.fcntl is None, reason="nobody can remove a file that is open")
def test_a_lock_that_its_last_holder_removes_meanwhile_is_taken_again(tmp_path, monkeypatch):
    lock_file = runs._lock_file

    def remove_first(file: int) -> None:
        monkeypatch.setattr(runs, "_lock_file", lock_file)
        (tmp_path / ".lock").unlink()
        lock_file(file)

    monkeypatch.setattr(runs, "_lock_file", remove_first)
    with Lock() as lock, Lock() as other:
        lock.take(tmp_path)
        with pytest.raises(Busy):
            other.take(tmp_path)


def test_what_a_lock_made_is_removed_unless_the_run_began(tmp_path):
    with Lock() as lock:
        claim(tmp_path / "logs" / "run", lock)
        assert (tmp_path / "logs" / "run" / ".lock").exists()
    assert not list((tmp_path / "logs").iterdir())
    with Lock() as lock:
        claim_free("run", tmp_path / "logs", tmp_path / "plots", lock)
        lock.keep()
    assert (tmp_path / "logs" / "run").exists()
    before = snapshot(tmp_path)
    with Lock() as lock:
        lock.take(tmp_path / "logs" / "run")
    assert snapshot(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("reason", ["file system", "system"])
def test_without_locks_a_run_warns_and_goes_on(tmp_path, monkeypatch, reason):
    def refuse(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if reason == "system":
        monkeypatch.setattr(runs, "fcntl", None)
    else:
        monkeypatch.setattr(runs.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=f"{reason}.* has no locks; make sure that no other process writes this run"):
        start(tmp_path / "run").close()
    assert len(rows(tmp_path / "run")) == 3


def test_runs_started_at_once_get_different_names(tmp_path):
    names, name = os.pipe()
    children = []
    for _ in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            folder = claim_free("run", tmp_path / "logs", tmp_path / "plots", Lock())
            os.write(name, f"{folder.name}\n".encode())
            time.sleep(60)
            os._exit(1)
    os.close(name)
    with os.fdopen(names) as file:
        found = {file.readline().strip() for _ in children}
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert found == {"run", *(f"run-{number}" for number in range(2, 9))}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == found


@pytest.mark.parametrize(
    ("best_pt", "step", "best_step", "kept", "step_of_best_pt"),
    [
        (2, 2, 2, True, 2),  # all is well
        (2, 4, 2, True, 2),
        (None, 2, 2, True, 2),  # killed between the two checkpoints
        (2, 4, 4, True, 4),
        (6, 4, 2, False, None),  # resumed from an earlier checkpoint: the best model of its past is lost
        (None, 4, 2, False, None),
        (6, 1, None, False, None),  # from one before the first evaluation
    ],
)
@pytest.mark.filterwarnings("ignore:.*best.pt")
def test_best_pt_belongs_to_the_steps_before_the_resume(tmp_path, best_pt, step, best_step, kept, step_of_best_pt):
    def saved(step: int, best_step: int | None) -> dict[str, Any]:
        best = float("inf") if best_step is None else 1 / best_step
        return ENTRIES | {"step": step, "best_step": best_step, "best": best}

    start(tmp_path / "run").close()
    if best_pt:
        checkpoint.write(tmp_path / "run" / "best.pt", saved(best_pt, best_pt))
    checkpoint.write(tmp_path / "run" / "checkpoint.pt", saved(step, best_step))
    run = Run(tmp_path / "run", FACTS)
    assert run.start(checkpoint.read(tmp_path / "run")) == kept
    run.close()
    best = tmp_path / "run" / "best.pt"
    assert (checkpoint.read(best)["step"] if best.exists() else None) == step_of_best_pt


def test_best_pt_is_the_last_checkpoint(tmp_path):
    run = start(tmp_path / "run")
    run.save_best()
    run.close()
    assert (tmp_path / "run" / "best.pt").read_bytes() == (tmp_path / "run" / "checkpoint.pt").read_bytes()
