"""The loop, on a module of four numbers: what it logs, saves, and how it goes on after a stop."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from vqvae import checkpoint
from vqvae.errors import UserError
from vqvae.runs import Run, free_name
from vqvae.schedules import Schedule
from vqvae.training import Means, Plan, fit, optimiser, seed_step

EXAMPLES = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(20, dtype=torch.int64)


class Toy(nn.Module):
    """Fits a point to noisy examples; the noise comes from the global generator, as a real model's does."""

    headline = {"loss": "loss {:.3f}"}
    monitor = "loss"

    def __init__(self):
        super().__init__()
        self.point = nn.Parameter(torch.zeros(4))
        self.initialised_with = None
        self.at = lambda step: None  # called at each step, for tests that interrupt

    def initialise(self, batches):
        self.initialised_with = batches(7)

    def forward(self, batch, labels, step):
        self.at(step)
        loss = (batch + torch.randn_like(batch) - self.point).square().mean()
        return loss, {"loss": loss.detach()}

    def summary(self, means):
        return {name: float(value) for name, value in means.items()}


def plan(**changes) -> Plan:
    settings = {
        "epochs": 4,
        "batch_size": 6,  # three steps an epoch, two examples left over
        "lr": Schedule.parse("--lr", "0.1"),
        "weight_decay": 0.0,
        "seed": 0,
        "device": torch.device("cpu"),
        "precision": "fp32",
        "log_every": 2,
        "save_every": (1000, None),
    }
    return Plan(**(settings | changes))


def train(folder, the_plan, *, resume=False, at=None, evaluate=None):
    """Train a toy in a folder; its weights, and what `fit` returned."""
    torch.manual_seed(0)
    toy, stopped = Toy(), None
    if at:
        toy.at = at
    if resume:
        stopped = checkpoint.read(folder / "checkpoint.pt")
        toy.load_state_dict(stopped["model"])
    facts = {
        "kind": "toy", "run": folder.name, "config": {}, "data": {}, "examples": {}, "plots": "",
    }  # fmt: skip
    run = Run(folder, facts, resume_at=stopped["step"] if stopped else None)
    figures = fit(
        toy, EXAMPLES, LABELS, the_plan, run,
        evaluate=evaluate or (lambda: {"loss": float(toy.point.detach().square().sum())}),
        after_epoch=lambda epoch, step, figures: None,
        resume=stopped,
    )  # fmt: skip
    run.close(figures)
    return toy, figures


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def test_a_run_logs_every_window_and_every_epoch(tmp_path):
    train(tmp_path / "run", plan())
    logged = rows(tmp_path / "run")
    assert [r["step"] for r in logged if r["kind"] == "epoch"] == [3, 6, 9, 12]
    assert [r["epoch"] for r in logged if r["kind"] == "epoch"] == [1, 2, 3, 4]
    assert [r["step"] for r in logged if r["kind"] == "train"] == [2, 3, 4, 6, 8, 9, 10, 12]
    content = checkpoint.read(tmp_path / "run" / "checkpoint.pt")
    assert (content["step"], content["epoch"]) == (12, 4)


def test_initialise_is_given_training_examples_once(tmp_path):
    toy, _ = train(tmp_path / "run", plan())
    assert toy.initialised_with.shape == (7, 4)
    assert all(any(torch.equal(x, e) for e in EXAMPLES) for x in toy.initialised_with)
    toy, _ = train(tmp_path / "run", plan(epochs=5), resume=True)
    assert toy.initialised_with is None


def test_two_epochs_and_two_more_are_bitwise_four(tmp_path):
    straight, _ = train(tmp_path / "straight", plan())
    train(tmp_path / "run", plan(epochs=2))
    resumed, _ = train(tmp_path / "run", plan(), resume=True)
    assert torch.equal(straight.point, resumed.point)
    assert without_speed(rows(tmp_path / "run")) == without_speed(rows(tmp_path / "straight"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", [1, 4, 5, 7])
def test_a_run_killed_in_mid_epoch_goes_on_bitwise(tmp_path, kill_at):
    straight, _ = train(tmp_path / "straight", plan())

    def kill(step):
        if step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "run", plan(save_every=(1, None)), at=kill)
    resumed, _ = train(tmp_path / "run", plan(), resume=True)
    assert torch.equal(straight.point, resumed.point)
    assert without_speed(rows(tmp_path / "run")) == without_speed(rows(tmp_path / "straight"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_at", [4, 5])  # within an epoch, and at its last step
def test_signals_save_and_stop_between_two_steps(tmp_path, number, stop_at):
    straight, _ = train(tmp_path / "straight", plan())
    stop = lambda step: os.kill(os.getpid(), number) if step == stop_at else None  # noqa: E731
    _, figures = train(tmp_path / "run", plan(), at=stop)
    assert figures is None
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == stop_at + 1
    resumed, _ = train(tmp_path / "run", plan(), resume=True)
    assert torch.equal(straight.point, resumed.point)


def shaken(batch):
    return batch + torch.randn_like(batch)


def test_augmentation_changes_training_alone_and_goes_on_bitwise(tmp_path):
    plain, _ = train(tmp_path / "plain", plan())
    straight, _ = train(tmp_path / "straight", plan(augment=shaken))
    train(tmp_path / "run", plan(epochs=2, augment=shaken))
    resumed, _ = train(tmp_path / "run", plan(augment=shaken), resume=True)
    assert torch.equal(straight.point, resumed.point)
    assert not torch.equal(straight.point, plain.point)


def test_a_finished_run_says_how_to_go_on(tmp_path):
    train(tmp_path / "run", plan())
    with pytest.raises(UserError, match="has done all of its 12 steps; raise --epochs"):
        train(tmp_path / "run", plan(), resume=True)


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    figures = iter([3.0, 1.0, 2.0, 2.0, 0.5])
    train(tmp_path / "run", plan(epochs=9, patience=2), evaluate=lambda: {"loss": next(figures)})
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["epoch"] == 4


def test_checkpoints_by_seconds(tmp_path):
    saved = []

    def look(step):
        path = tmp_path / "run" / "checkpoint.pt"
        saved.append(checkpoint.read(path)["step"] if path.exists() else 0)

    train(tmp_path / "run", plan(epochs=1, save_every=(None, 1e-9)), at=look)
    assert saved == [0, 1, 2]


def test_max_steps_ends_within_an_epoch(tmp_path):
    train(tmp_path / "run", plan(max_steps=4))
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    assert rows(tmp_path / "run")[-1]["kind"] == "epoch"


def test_max_minutes_ends_the_run_with_an_evaluation(tmp_path):
    train(tmp_path / "run", plan(epochs=1000, max_minutes=1e-6))
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == 1
    assert rows(tmp_path / "run")[-1]["kind"] == "epoch"


def test_best_keeps_the_lowest_held_out_figure(tmp_path):
    figures = iter([3.0, 1.0, 2.0, 5.0])
    train(tmp_path / "run", plan(), evaluate=lambda: {"loss": next(figures)})
    assert checkpoint.read(tmp_path / "run" / "best.pt")["epoch"] == 2


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="loss is (nan|inf) at step .* --lr"):
        train(
            tmp_path / "run",
            plan(lr=Schedule.parse("--lr", "linear:0.1:1e38:4"), epochs=40, save_every=(1, None)),
        )
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["model"]["point"].isfinite().all()


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="--batch-size 21: larger than the 20"):
        train(tmp_path / "run", plan(batch_size=21))


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    train(tmp_path / "run", plan(epochs=1))
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="already holds a run; --resume"):
        train(tmp_path / "run", plan(epochs=1))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert free_name("run", tmp_path) == "run-2"
    assert free_name("walk", tmp_path) == "walk"


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--log-dir .*file: cannot write"):
        train(tmp_path / "file" / "run", plan())


def test_weight_decay_touches_weights_alone():
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Linear(1, 1), nn.Embedding(2, 2))
    groups = optimiser(module, plan(weight_decay=0.1)).param_groups
    decayed = [p for g in groups if g["weight_decay"] == 0.1 for p in g["params"]]
    assert {id(p) for p in decayed} == {id(module[0].weight), id(module[2].weight)}
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))


def test_the_noise_of_a_step_depends_on_seed_and_step():
    draws = {}
    for seed, step in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        seed_step(seed, step)
        draws.setdefault((seed, step), []).append(torch.randn(3))
    assert torch.equal(*draws[0, 0])
    assert not torch.equal(draws[0, 0][0], draws[0, 1][0])
    assert not torch.equal(draws[0, 0][0], draws[1, 0][0])


def test_means_survive_a_round_trip():
    means = Means()
    means.add({"a": torch.tensor(1.0), "usage": torch.tensor([1.0, 0.0])})
    means = Means(means.state())
    means.add({"a": torch.tensor(4.0), "usage": torch.tensor([0.0, 1.0])})
    assert means.values()["a"] == 2.5
    assert means.values()["usage"].tolist() == [0.5, 0.5]
