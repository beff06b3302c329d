"""The loop, on a module of four numbers: what it logs and saves, and how it resumes after a stop."""

import copy
import io
import json
import math
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tests.checkpoints import content
from tests.helpers import choose, training
from vqvae import checkpoint, distributed, shares
from vqvae.contracts import Trainable, TrainOutput
from vqvae.errors import OptionError, UserError
from vqvae.optimizer import Muon, decay_groups
from vqvae.runs import NullRun, Run
from vqvae.schedules import Plateau, Schedule
from vqvae.training import MOST_SKIPPED, AfterEpoch, Health, Loop, Means, Plan, Stage, fit, seed_step, take

EXAMPLES = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20)
FACTS = {
    key: value for key, value in content().items() if key in ("kind", "run", "config", "data", "examples", "plots")
}


class Toy(Trainable):
    """Fits a point to noisy examples; the noise comes from the global generator, as a real model's does."""

    monitor = "loss"
    headline = ("commitment",)

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(4))
        self.initialized_with: Tensor | None = None
        self.labels: list[Tensor] = []
        self.at: Callable[[int], None] = lambda step: None  # called at each step, for tests that interrupt

    def forward(self, batch: Tensor, labels: Tensor, step: int) -> TrainOutput:
        self.at(step)
        self.labels.append(labels)
        loss = (batch + torch.randn_like(batch) - self.point).square().mean()
        return TrainOutput(loss, {"loss": loss.detach(), "commitment": 2 * loss.detach()})

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        return {name: float(value) for name, value in means.items()}

    def initialize(self, batches: Callable[[int], Tensor]) -> None:
        self.initialized_with = batches(7)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def saved_state(self) -> dict[str, Any]:
        return {"model": self.state_dict(), "objective": {}}


def plan(**changes: Any) -> Plan:
    settings = {
        "epochs": 4,
        "batch_size": 6,  # three steps an epoch; two examples are left over
        "lr": Schedule.parse("0.1"),
        "weight_decay": 0.0,
        "seed": 0,
        "device": torch.device("cpu"),
        "precision": "fp32",
        "log_every": 2,
        "checkpoint_every": (1000, None),
    }
    return Plan(**(settings | changes))


def train(
    folder: Path,
    the_plan: Plan,
    *,
    resume: bool = False,
    at: Callable[[int], None] | None = None,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    after_epoch: AfterEpoch = lambda epoch, step, usage: None,
) -> tuple[Toy, dict[str, float] | None]:
    """Train a toy in a folder; returns it, and the result of `fit`."""
    torch.manual_seed(0)
    toy, saved = Toy(), None
    toy.at = at or toy.at
    if resume:
        saved = checkpoint.read(folder / "checkpoint.pt")
        toy.load_state_dict(saved["model"])
    run = Run(folder, FACTS)
    held_out = evaluate or (lambda: {"loss": float(toy.point.detach().square().sum())})
    stage = Stage(toy, EXAMPLES, LABELS, evaluate=held_out)
    with closing(run):
        results = fit(stage, the_plan, run, after_epoch=after_epoch, resume=saved)
        run.close(results)
    return toy, results


@pytest.fixture
def slowly(monkeypatch):
    """A callback for `train`, `at`: each step takes ten seconds of the loop's clock, and nothing else takes any."""
    seconds = 0.0

    def pass_time(step: int) -> None:
        nonlocal seconds
        seconds += 10

    monkeypatch.setattr("vqvae.training.time", SimpleNamespace(perf_counter=lambda: seconds))
    return pass_time


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the speed."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("images_per_s") > 0 for row in logged if row["kind"] == "epoch")
    return logged


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and the same metrics at every step, bit for bit."""
    first, second = (checkpoint.read(folder / "checkpoint.pt") for folder in (one, other))
    assert torch.equal(first["model"]["point"], second["model"]["point"])
    for key in ("step", "epoch", "best", "best_epoch"):
        assert first[key] == second[key]
    assert rows(one) == rows(other)


def test_a_run_logs_every_window_and_every_epoch(tmp_path):
    train(tmp_path / "run", plan())
    logged = rows(tmp_path / "run")
    epochs = [row for row in logged if row["kind"] == "epoch"]
    assert [row["step"] for row in epochs] == [3, 6, 9, 12]
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    assert {"train_loss", "held_out_loss"} <= set(epochs[-1])
    assert [row["step"] for row in logged if row["kind"] == "train"] == [2, 3, 4, 6, 8, 9, 10, 12]
    content = checkpoint.read(tmp_path / "run" / "checkpoint.pt")
    assert (content["step"], content["epoch"]) == (12, 4)


def test_logged_metrics_are_means_over_steps(tmp_path):
    train(tmp_path / "one", plan(log_every=1))
    steps = {row["step"]: row["loss"] for row in rows(tmp_path / "one") if row["kind"] == "train"}
    train(tmp_path / "run", plan())
    logged = rows(tmp_path / "run")
    spans = [(row["step"] - 2, row["step"], row["train_loss"]) for row in logged if row["kind"] == "epoch"]
    first = 1
    for row in logged:
        if row["kind"] == "train":
            spans.append((first, row["step"], row["loss"]))
            first = row["step"] + 1
    for first, last, mean in spans:
        over = [steps[step] for step in range(first, last + 1)]
        assert mean == pytest.approx(sum(over) / len(over), rel=1e-6)


def test_an_epoch_trains_on_every_example_once_with_its_label(tmp_path):
    toy, _ = train(tmp_path / "run", plan(batch_size=5, epochs=2))
    for epoch in (toy.labels[:4], toy.labels[4:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(20))
    assert not torch.equal(torch.cat(toy.labels[:4]), torch.cat(toy.labels[4:]))
    examples = take(EXAMPLES, toy.labels[0], torch.device("cpu"))
    assert torch.equal(examples, EXAMPLES[toy.labels[0]])


def test_an_epoch_takes_each_example_of_a_part_of_the_data_once_and_has_the_steps_of_all_parts(tmp_path):
    the_plan = plan(batch_size=8, data_shards=2)  # of two parts, of 20 examples each
    loop = Loop(Toy(), EXAMPLES, LABELS, the_plan, NullRun(tmp_path), {})
    order = loop.order(the_plan.batch_size, epoch=0)
    assert order.shape == (loop.per_epoch, 8) == (5, 8)
    for share in order.split(4, dim=1):
        assert share.flatten().sort().values.tolist() == list(range(20))
    train(tmp_path / "run", plan(batch_size=30, data_shards=2, epochs=1))  # larger than one part only


def test_every_epoch_may_have_examples_of_its_own_also_after_a_resume(tmp_path):
    seen = []

    class Seeing(Toy):
        def forward(self, batch: Tensor, labels: Tensor, step: int) -> TrainOutput:
            seen.append(batch.unique().tolist() if self.training else "not in training mode")
            return super().forward(batch, labels, step)

    stage = Stage(
        Seeing().eval(), EXAMPLES, LABELS, lambda: {"loss": 0.0}, redraw=lambda epoch: torch.full((20, 4), 1.0 + epoch)
    )
    for epochs in (2, 3):
        run = Run(tmp_path / "run", FACTS)
        with closing(run):
            fit(stage, plan(epochs=epochs), run, resume=checkpoint.read(tmp_path / "run") if epochs > 2 else None)
    assert seen == 3 * [[1.0]] + 3 * [[2.0]] + 3 * [[3.0]]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_multiplies_matrices_in_the_plans_precision(tmp_path, precision, dtype):
    found = []
    train(tmp_path / "run", plan(max_steps=1, precision=precision), at=lambda step: found.append(EXAMPLES @ EXAMPLES.T))
    assert [product.dtype for product in found] == [dtype]


def test_the_plan_sets_the_optimizer_and_how_weights_decay(tmp_path):
    for name, muon in (("adamw", False), ("muon", True)):
        the_plan = plan(optimizer=name, weight_decay=0.1)
        optimizer = Loop(training(), EXAMPLES, LABELS, the_plan, NullRun(tmp_path), {}).optimizer
        assert isinstance(optimizer, Muon) == muon
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_the_module_is_initialized_once_with_training_examples(tmp_path):
    toy, _ = train(tmp_path / "run", plan())
    assert toy.initialized_with is not None
    assert toy.initialized_with.shape == (7, 4)
    assert all(any(torch.equal(x, e) for e in EXAMPLES) for x in toy.initialized_with)
    assert len(toy.initialized_with.unique(dim=0)) == 7
    toy, _ = train(tmp_path / "run", plan(epochs=5), resume=True)
    assert toy.initialized_with is None


def test_two_epochs_and_two_more_are_bitwise_four(tmp_path):
    train(tmp_path / "straight", plan())
    train(tmp_path / "run", plan(epochs=2))
    train(tmp_path / "run", plan(), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", [1, 4, 5, 7])
def test_a_run_killed_within_an_epoch_resumes_bitwise(tmp_path, kill_at):
    train(tmp_path / "straight", plan())

    def kill(step: int) -> None:
        if step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "run", plan(checkpoint_every=(1, None)), at=kill)
    train(tmp_path / "run", plan(), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_at", [4, 5])  # within an epoch, and at its last step
def test_signals_save_and_stop_between_two_steps(tmp_path, number, stop_at):
    train(tmp_path / "straight", plan())
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stop = lambda step: os.kill(os.getpid(), number) if step == stop_at else None  # noqa: E731
    _, results = train(tmp_path / "run", plan(), at=stop)
    assert results is None
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == stop_at + 1
    train(tmp_path / "run", plan(), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_second_signal_stops_at_once(tmp_path):
    def insist(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", plan(), at=insist)
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == 3  # of the epoch before


def shaken(batch: Tensor) -> Tensor:
    return batch + torch.randn_like(batch)


def test_augmentation_changes_training_and_resumes_bitwise(tmp_path):
    plain, _ = train(tmp_path / "plain", plan())
    straight, _ = train(tmp_path / "straight", plan(augment=shaken))
    train(tmp_path / "run", plan(epochs=2, augment=shaken))
    train(tmp_path / "run", plan(augment=shaken), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert not torch.equal(straight.point, plain.point)


def test_seeds_give_different_runs(tmp_path):
    points = [train(tmp_path / str(seed), plan(seed=seed))[0].point for seed in (0, 1)]
    assert not torch.equal(*points)


def test_the_rate_follows_its_schedule_and_each_groups_scale(tmp_path):
    class Scaled(Toy):
        def parameter_groups(self, weight_decay):
            return [{"params": [self.point], "lr_scale": 3.0}]

    toy = Scaled()
    before: list[Tensor] = []
    toy.at = lambda step: before.append(toy.point.detach().clone())
    stage = Stage(toy, EXAMPLES, LABELS, evaluate=lambda: {"loss": 0.0})
    the_plan = plan(epochs=1, lr=Schedule.parse("linear:0.1:0"))
    fit(stage, the_plan, Run(tmp_path / "run", FACTS))
    # AdamW's first step has the length of the rate, in every coordinate
    assert torch.allclose((before[1] - before[0]).abs(), torch.tensor(0.3), rtol=1e-3)
    group = checkpoint.read(tmp_path / "run")["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(3 * 0.1 / 3)  # at the third of three steps


def test_schedules_of_a_module_are_logged_as_they_were_at_the_step(tmp_path):
    class Scheduled(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.pull, self.rest = Schedule.parse("linear:3:0"), Schedule.parse("0.5")

    stage = Stage(Scheduled(), EXAMPLES, LABELS, evaluate=lambda: {"loss": 0.0})
    fit(stage, plan(epochs=1, log_every=1), Run(tmp_path / "run", FACTS))
    logged = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row["pull"] for row in logged] == pytest.approx([3, 2, 1])
    assert not any("rest" in row for row in logged)  # it does not change


def test_a_finished_run_says_how_to_go_on(tmp_path):
    train(tmp_path / "run", plan())
    with pytest.raises(OptionError, match="has taken all of its 12 steps; raise epochs or max_steps") as caught:
        train(tmp_path / "run", plan(), resume=True)
    assert caught.value.flagged.startswith(f"--resume {tmp_path / 'run'}: ")


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.5])
    train(tmp_path / "run", plan(epochs=9, patience=2), evaluate=lambda: {"loss": next(losses)})
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["epoch"] == 4


def test_a_plateau_reduces_the_rate_when_pytorch_would_and_resumes_bitwise(tmp_path):
    losses = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.6, 0.6, 0.6]
    point = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([point], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, factor=0.5, patience=1, threshold=0)
    expected = []
    for loss in losses:
        expected.append(reference.param_groups[0]["lr"])
        theirs.step(loss)
    settings = {"plateau": Plateau(0.5, 1), "log_every": 3}
    whole, parts = iter(losses), iter(losses)
    train(tmp_path / "whole", plan(epochs=10, **settings), evaluate=lambda: {"loss": next(whole)})
    train(tmp_path / "run", plan(epochs=4, **settings), evaluate=lambda: {"loss": next(parts)})
    train(tmp_path / "run", plan(epochs=10, **settings), evaluate=lambda: {"loss": next(parts)}, resume=True)
    rates = [row["lr"] for row in rows(tmp_path / "whole") if row["kind"] == "train"]
    assert rates == pytest.approx(expected)
    assert len(set(rates)) == 4
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_clipping_bounds_the_gradient_and_logs_its_norm_before(tmp_path):
    free, _ = train(tmp_path / "free", plan(epochs=1, log_every=1))
    bound, _ = train(tmp_path / "bound", plan(epochs=1, log_every=1, clip=1e-12))
    first, second = (
        [row["grad_norm"] for row in rows(tmp_path / name) if row["kind"] == "train"] for name in ("free", "bound")
    )
    assert first[0] == second[0] > 1e-3
    # a gradient far below Adam's epsilon of 1e-8 moves nothing
    assert bound.point.abs().max() < 1e-3 < free.point.abs().max()


def test_averaged_weights_are_evaluated_and_saved_and_training_goes_on_from_its_own(tmp_path):
    averaged, last = plan(ema_weights=0.9), plan()
    toy, _ = train(tmp_path / "last", last)
    same, results = train(tmp_path / "whole", averaged)
    assert torch.equal(toy.point, same.point)  # averaging does not change training
    saved = checkpoint.read(tmp_path / "whole" / "checkpoint.pt")
    assert torch.equal(saved["trained"]["point"], toy.point)
    assert not torch.equal(saved["model"]["point"], toy.point)
    assert results["loss"] == pytest.approx(float(saved["model"]["point"].square().sum()))


@pytest.mark.parametrize("kill_at", [2, 7, 9])
def test_averaged_weights_resume_bitwise(tmp_path, kill_at):
    def kill(step: int) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGINT)

    train(tmp_path / "whole", plan(ema_weights=0.9))
    train(tmp_path / "run", plan(ema_weights=0.9), at=kill)
    train(tmp_path / "run", plan(ema_weights=0.9), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    one, other = (checkpoint.read(tmp_path / name / "checkpoint.pt") for name in ("whole", "run"))
    assert torch.equal(one["trained"]["point"], other["trained"]["point"])


def test_of_many_short_epochs_only_some_are_drawn_and_saved_and_the_last_always(tmp_path):
    drawn = []

    def draw(epoch: int, step: int, usage: Tensor | None) -> None:
        drawn.append(epoch)

    losses = iter([9.0 - abs(epoch - 24) / 10 if epoch != 23 else 1.0 for epoch in range(1, 31)])
    lasting = plan(epochs=30, save_every=1e9)
    train(tmp_path / "run", lasting, evaluate=lambda: {"loss": next(losses)}, after_epoch=draw)
    assert drawn == [*range(1, 21), 30]
    last, best = (checkpoint.read(tmp_path / "run" / name) for name in ("checkpoint.pt", "best.pt"))
    assert (last["epoch"], last["best_epoch"], best["epoch"], best["best"]) == (30, 23, 23, 1.0)
    train(tmp_path / "all", plan(epochs=30))
    assert torch.equal(last["model"]["point"], checkpoint.read(tmp_path / "all" / "checkpoint.pt")["model"]["point"])


@pytest.mark.parametrize("end", ["interrupt", "patience"])
def test_an_epoch_that_ends_a_run_is_saved_however_short(tmp_path, end):
    def kill(step: int) -> None:
        if step == 3 * 24 + 2 and end == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)

    patience = 10 if end == "patience" else None
    losses = iter([5.0 if epoch < 15 else 6.0 for epoch in range(40)])
    short = plan(epochs=40, save_every=1e9, patience=patience)
    train(tmp_path / "run", short, at=kill, evaluate=lambda: {"loss": next(losses)})
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == 3 * (11 if patience else 25)


def test_of_many_short_epochs_one_is_drawn_and_saved_every_so_many_seconds(tmp_path, slowly):
    drawn = []
    draw = lambda epoch, step, usage: drawn.append(epoch)  # noqa: E731
    train(tmp_path / "run", plan(epochs=30, save_every=70), at=slowly, after_epoch=draw)
    assert drawn == [*range(1, 21), 23, 26, 29, 30]  # an epoch takes 30 seconds


def test_checkpoints_by_seconds(tmp_path, slowly):
    saved = []

    def look(step: int) -> None:
        path = tmp_path / "run" / "checkpoint.pt"
        saved.append(checkpoint.read(path)["step"] if path.exists() else 0)
        slowly(step)

    train(tmp_path / "run", plan(epochs=1, batch_size=3, checkpoint_every=(None, 15)), at=look)
    assert saved == [0, 0, 2, 2, 4, 4]


def test_the_speed_is_that_of_an_epochs_training(tmp_path, slowly):
    train(tmp_path / "run", plan(epochs=2), at=slowly)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["images_per_s"] for row in logged if row["kind"] == "epoch"] == [0.6, 0.6]


def test_max_steps_ends_within_an_epoch(tmp_path):
    train(tmp_path / "run", plan(max_steps=4))
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    assert rows(tmp_path / "run")[-1]["kind"] == "epoch"


def test_max_minutes_ends_the_run_with_an_evaluation(tmp_path, slowly):
    train(tmp_path / "run", plan(epochs=1000, max_minutes=1, lr=Schedule.parse("linear:0.1:0"), log_every=1), at=slowly)
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == 7
    *_, logged, last = rows(tmp_path / "run")
    assert last["kind"] == "epoch"
    assert logged["lr"] == pytest.approx(0.1 * (1 - 6 / 3000))  # of the seventh of 3,000 steps, not of the last one


def test_best_keeps_the_lowest_held_out_loss(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 5.0])
    train(tmp_path / "run", plan(), evaluate=lambda: {"loss": next(losses)})
    best, last = (checkpoint.read(tmp_path / "run" / name) for name in ("best.pt", "checkpoint.pt"))
    assert (best["epoch"], last["epoch"]) == (2, 4)
    assert (last["best"], last["best_epoch"]) == (1.0, 2)


def test_a_resumed_run_whose_best_model_is_lost_finds_its_best_among_the_next(tmp_path, capsys):
    losses = iter([1.0, 2.0, math.inf, 6.0, 5.0])
    train(tmp_path / "run", plan(epochs=2), evaluate=lambda: {"loss": next(losses)})
    (tmp_path / "run" / "best.pt").unlink()
    capsys.readouterr()
    with pytest.warns(UserWarning, match=r"best\.pt: is not of step 3, the best so far"):
        train(tmp_path / "run", plan(epochs=3), evaluate=lambda: {"loss": next(losses)}, resume=True)
    assert "best.pt is" not in capsys.readouterr().out
    train(tmp_path / "run", plan(epochs=5, patience=3), evaluate=lambda: {"loss": next(losses)}, resume=True)
    assert checkpoint.read(tmp_path / "run" / "best.pt")["step"] == 15


def test_after_each_epoch_it_draws_stores_usage_and_prints_a_row(tmp_path, capsys):
    drawn = []
    train(
        tmp_path / "run",
        plan(epochs=2),
        evaluate=lambda: {"loss": 1.0, "commitment": 7.0, "usage": torch.tensor([[3, 0]])},
        after_epoch=lambda epoch, step, usage: drawn.append((epoch, step, usage.tolist())),
    )
    assert drawn == [(1, 3, [[3, 0]]), (2, 6, [[3, 0]])]
    assert checkpoint.read(tmp_path / "run")["usage"].tolist() == [[3, 0]]
    assert "held_out_usage" not in rows(tmp_path / "run")[-1]
    header, *printed, last = capsys.readouterr().out.splitlines()
    assert header == "epoch  train commitment  validation commitment  images/s"
    assert [row.split()[0::2] for row in printed] == [["1", "7.0000"], ["2", "7.0000"]]
    assert last.endswith("best.pt is epoch 1, of the lowest validation loss")


def test_a_held_out_loss_that_is_not_finite_is_never_the_best_and_ends_no_run(tmp_path, capsys):
    train(tmp_path / "run", plan(epochs=2), evaluate=lambda: {"loss": math.inf})
    assert checkpoint.read(tmp_path / "run")["step"] == 6
    assert not (tmp_path / "run" / "best.pt").exists()
    assert "best.pt" not in capsys.readouterr().out


def test_the_bar_names_the_epoch_the_part_that_is_done_and_the_metrics_of_the_window(tmp_path, monkeypatch):
    out = io.StringIO()
    drawn = {"disable": False, "delay": 0, "mininterval": 0, "dynamic_ncols": False, "ncols": 80, "ascii": True}
    monkeypatch.setattr("vqvae.progress.tqdm", lambda **options: tqdm(**options | drawn, file=out))
    train(tmp_path / "run", plan())
    assert "epoch 2/4  50% #" in out.getvalue()
    assert "epoch 4/4 100% #" in out.getvalue()
    assert "commitment " in out.getvalue()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="the training loss (is|was) .* at step .* lower lr"):
        train(tmp_path / "run", plan(lr=Schedule.parse("linear:0.1:1e38:4"), epochs=40, checkpoint_every=(1, None)))
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["model"]["point"].isfinite().all()


def test_a_loss_that_is_not_finite_ends_the_run_when_it_would_be_logged(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_training.EXAMPLES", EXAMPLES * math.nan)
    taken: list[int] = []
    with pytest.raises(UserError, match="the training loss was not finite at step 0; no checkpoint was saved yet"):
        train(tmp_path / "run", plan(batch_size=4, log_every=2), at=taken.append)
    assert taken == [0, 1]  # of five steps of the epoch


def test_the_first_step_that_was_not_finite_is_named(tmp_path):
    health, good, bad = Health(), torch.tensor(1.0), torch.tensor(math.inf)
    for step, (loss, gradient) in enumerate([(good, good), (good, bad), (bad, bad), (good, good)], start=5):
        assert (health.problem() is None) == (step < 7)
        health.watch(loss, gradient, step)
    assert health.problem() == "the gradient was not finite at step 6"
    loop = Loop(Toy(), EXAMPLES * math.inf, LABELS, plan(), NullRun(tmp_path), {})
    loop.step = 3
    loop.train_step(torch.arange(6))
    assert loop.health.problem() == "the training loss was not finite at step 3"


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_skipped_update_leaves_no_trace(codebook, tmp_path):
    options = {"codebook": codebook, "revive": 0.9, "decay": 0.5, "warmup": False, "init": "normal"}
    module = training(bottleneck=choose("bottleneck", "vq", **options), nets="henrhoi")  # with batch norm
    examples = torch.rand(20, 3, 8, 8)
    loop = Loop(module, examples, LABELS, plan(on_nan="skip"), NullRun(tmp_path), {})
    for _ in range(4):
        loop.train_step(torch.arange(6))
    before = copy.deepcopy([module.state_dict(), loop.optimizer.state_dict()])
    examples[7] = math.nan
    loop.train_step(torch.arange(4, 10))
    assert loop.skipped == 1
    after = [module.state_dict(), loop.optimizer.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    loop.train_step(torch.arange(6))
    assert loop.skipped == 0
    loop.need_finite()


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda point: point.square().sum().sqrt(),  # at 0, its gradient is 0 / 0
        lambda point: point.sum() + math.inf,
    ],
    ids=["gradient", "loss"],
)
def test_an_update_is_skipped_if_only_its_gradient_or_only_its_loss_is_not_finite(tmp_path, loss_of):
    class Cornered(Toy):
        def forward(self, batch: Tensor, labels: Tensor, step: int) -> TrainOutput:
            loss = loss_of(self.point)
            return TrainOutput(loss, {"loss": loss.detach()})

    toy = Cornered()
    loop = Loop(toy, EXAMPLES, LABELS, plan(on_nan="skip"), NullRun(tmp_path), {})
    loop.train_step(torch.arange(6))
    assert loop.skipped == 1
    assert toy.point.tolist() == [0, 0, 0, 0]


def test_only_a_limited_number_of_updates_in_a_row_is_skipped(tmp_path):
    loop = Loop(Toy(), EXAMPLES * math.nan, LABELS, plan(on_nan="skip"), NullRun(tmp_path), {})
    for _ in range(MOST_SKIPPED):
        loop.train_step(torch.arange(6))
    with pytest.raises(UserError, match=f"{MOST_SKIPPED} steps in a row .* not finite; .* Try a lower lr$"):
        loop.train_step(torch.arange(6))


def test_a_run_all_of_whose_updates_were_skipped_has_failed(tmp_path):
    settings = plan(on_nan="skip", epochs=1)
    with pytest.raises(UserError, match=r"none of the \d updates was finite; no checkpoint was saved yet"):
        fit(Stage(Toy(), EXAMPLES * math.nan, LABELS, evaluate=lambda: {"loss": 1.0}), settings, NullRun(tmp_path))


def test_weights_that_a_finite_update_spoiled_replace_no_checkpoint(tmp_path, monkeypatch):
    class Spoiled(Toy):
        """Its loss and gradient are finite up to the update of step 3, from which on no output is."""

        def forward(self, batch: Tensor, labels: Tensor, step: int) -> TrainOutput:
            loss, metrics = super().forward(batch, labels, step)
            factor = math.nan if step > 3 else 1
            return TrainOutput(loss * factor, {name: value * factor for name, value in metrics.items()})

    monkeypatch.setattr("tests.test_training.Toy", Spoiled)
    held_out = iter([1.0, math.nan])
    with pytest.raises(UserError, match=r"the updates before step 6 .* checkpoint\.pt of step 3 is kept"):
        train(tmp_path / "run", plan(on_nan="skip"), evaluate=lambda: {"loss": next(held_out)})
    assert checkpoint.read(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    plan(batch_size=20).check(20)
    with pytest.raises(OptionError, match="batch_size=21: larger than the 20 training examples"):
        train(tmp_path / "run", plan(batch_size=21))


def test_a_batch_that_its_shares_cannot_divide_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    for fits in (plan(batch_size=7), plan(batch_size=8, data_shards=2, accumulate=2), plan(batch_size=2)):
        fits.check(20)
    with pytest.raises(OptionError, match="batch_size=6: must be a multiple of 4"):
        plan(data_shards=2, accumulate=2).check(20)
    with pytest.raises(OptionError, match="batch_size=3: smaller than the 4 shares"):
        plan(batch_size=3, accumulate=2).check(20)


def test_the_noise_of_a_step_depends_on_seed_and_step():
    draws: dict[tuple[int, int], list[Tensor]] = {}
    for seed, step in [(0, 0), (0, 1), (1, 0), (0, 0), (2**63 - 1, 0)]:
        seed_step(seed, step)
        draws.setdefault((seed, step), []).append(torch.randn(3))
    assert torch.equal(*draws[0, 0])
    assert not torch.equal(draws[0, 0][0], draws[0, 1][0])
    assert not torch.equal(draws[0, 0][0], draws[1, 0][0])
    with shares.sharing(6, parts=2) as batch:
        of_shares = [(seed_step(0, 0), torch.randn(3))[1] for _ in batch.each()]
    assert torch.equal(of_shares[0], draws[0, 0][0])
    assert not torch.equal(*of_shares)


def test_the_start_has_noise_of_its_own_which_depends_on_the_seed(tmp_path):
    class Starting(Toy):
        def initialize(self, batches: Callable[[int], Tensor]) -> None:
            noise.append(torch.randn(3))

    noise: list[Tensor] = []
    for seed in (0, 0, 1):
        toy = Starting()
        toy.at = lambda step: noise.append(torch.randn(3))
        loop = Loop(toy, EXAMPLES, LABELS, plan(seed=seed), NullRun(tmp_path), {})
        loop.start()
        loop.train_step(torch.arange(6))
    assert torch.equal(noise[0], noise[2])
    assert len(torch.stack(noise).unique(dim=0)) == 4  # start and first step, for two seeds


def test_means_survive_a_round_trip():
    means = Means()
    means.add({"a": torch.tensor(1.0), "usage": torch.tensor([1.0, 0.0])})
    means = Means(means.state())
    means.add({"a": torch.tensor(4.0), "usage": torch.tensor([0.0, 1.0])})
    assert means.values()["a"] == 2.5
    assert means.values()["usage"].tolist() == [0.5, 0.5]


def test_means_are_exact_over_many_steps():
    means = Means()
    for _ in range(1000):
        means.add({"a": torch.tensor(0.1)})
    assert float(means.values()["a"]) == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_a_run_killed_between_its_two_checkpoints_has_the_same_best_in_the_end(tmp_path, monkeypatch):
    train(tmp_path / "straight", plan())

    def kill(run: Run, state: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_best", kill)
        with pytest.raises(Killed):
            train(tmp_path / "run", plan())
    assert checkpoint.read(tmp_path / "run")["best_step"] == 3
    assert not (tmp_path / "run" / "best.pt").exists()
    train(tmp_path / "run", plan(epochs=2), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_best", kill)
        with pytest.raises(Killed):
            train(tmp_path / "run", plan(epochs=3), resume=True, evaluate=lambda: {"loss": -1.0})
    with pytest.raises(OptionError, match="has taken all of its 9 steps"):  # it repairs best.pt
        train(tmp_path / "run", plan(epochs=3), resume=True)
    assert checkpoint.read(tmp_path / "run" / "best.pt")["step"] == 9


@pytest.mark.parametrize(("end", "losses", "best"), [({"epochs": 3}, [3, 1, 2], 6), ({"max_steps": 4}, [3, 1], 4)])
def test_checkpoints_of_the_earlier_version_keep_their_best(tmp_path, end, losses, best):
    held_out = iter(losses)
    train(tmp_path / "run", plan(**end), evaluate=lambda: {"loss": float(next(held_out))})
    saved = checkpoint.read(tmp_path / "run")
    assert saved.pop("best_step") == best
    checkpoint.write(tmp_path / "run" / "checkpoint.pt", saved)
    train(tmp_path / "run", plan(), resume=True, evaluate=lambda: {"loss": 2.0})
    assert checkpoint.read(tmp_path / "run")["best_step"] == best
    assert checkpoint.read(tmp_path / "run" / "best.pt")["step"] == best


def test_a_refused_resume_changes_nothing(tmp_path):
    train(tmp_path / "run", plan())
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()}
    with pytest.raises(OptionError, match="has taken all of its 12 steps"):
        train(tmp_path / "run", plan(), resume=True)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()} == before
