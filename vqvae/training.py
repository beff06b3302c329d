"""The training loop. It knows a module that maps a batch to a loss and metrics (contracts.Trainable), never a model.

Everything random is a function of (seed, epoch) or (seed, step), so a run that is killed and resumed from its last
checkpoint takes the same steps as one that never stopped. With several processes (distributed.py) each takes its share
of every batch, whose size does not depend on their number, and draws its own noise.
"""

import math
import signal
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from vqvae import distributed, metrics
from vqvae.contracts import TrainOutput
from vqvae.data.batches import batch_indices
from vqvae.devices import keep_memory
from vqvae.errors import OptionError, UserError
from vqvae.optimizer import adamw
from vqvae.runs import NullRun, Run
from vqvae.schedules import Schedule


class Plan(NamedTuple):
    """How long, how fast, and on what to train."""

    epochs: int
    batch_size: int
    lr: Schedule
    weight_decay: float
    seed: int
    device: torch.device
    precision: Literal["fp32", "bf16"]
    log_every: int  # steps
    save_every: tuple[int | None, float | None]  # steps, seconds
    max_steps: int | None = None
    max_minutes: float | None = None  # of this process, evaluation included
    patience: int | None = None  # epochs without a better held-out metric before stopping
    augment: Callable[[Tensor], Tensor] | None = None  # applied to every training batch

    def steps_per_epoch(self, examples: int) -> int:
        return examples // self.batch_size

    def total_steps(self, examples: int) -> int:
        steps = self.epochs * self.steps_per_epoch(examples)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def check(self, examples: int) -> None:
        """Raise `OptionError` for a batch that the examples or the processes cannot share."""
        if self.batch_size > examples:
            raise OptionError("", "batch_size", self.batch_size, f"larger than the {examples} training examples")
        if self.batch_size < distributed.world():
            problem = f"smaller than the {distributed.world()} processes that share it"
            raise OptionError("", "batch_size", self.batch_size, problem)


class Means:
    """Running sums of named tensors on the device. The loop synchronizes with the device only to read them."""

    def __init__(self, state: dict[str, Any] | None = None):
        self.sums: dict[str, Tensor] = dict(state["sums"]) if state else {}
        self.count: int = state["count"] if state else 0

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            total = self.sums.get(name)
            precise = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has no float64
            self.sums[name] = value.to(precise) if total is None else total.to(value.device) + value
        self.count += 1

    def values(self) -> dict[str, Tensor]:
        return {name: total.cpu() / self.count for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, "count": self.count}


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a request that the loop obeys between two steps; a second one stops at once."""

    def __enter__(self) -> "Interrupt":
        self.wanted = False
        self.previous = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, frame: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def seed_step(seed: int, step: int, device: str = "cpu") -> None:
    """Make the noise of a step a function of (seed, step), different in every process."""
    apart = 999_999_937 * distributed.rank()  # below 2**32: a CPU's generator uses only so many bits
    number = (seed * 1_000_003 + step + 1 + apart) % 2**63
    # torch.manual_seed formats a stack trace at every step, for devices that are not in use
    torch.default_generator.manual_seed(number)
    if device in ("cuda", "mps"):
        getattr(torch, device).manual_seed(number)


class Stage(NamedTuple):
    """What one stage of training consists of."""

    module: Any  # an nn.Module that keeps contracts.Trainable
    examples: Tensor  # [N, ...], images or codes
    labels: Tensor  # [N] int64
    evaluate: Callable[[], dict[str, Any]]  # held-out metrics; a tensor `usage` goes into the checkpoint
    draw: Callable[[], Tensor] | None  # images [N, C, H, W] in [0, 1] to show after each epoch
    caption: str  # what those images are
    compiled: bool = False


def fit(
    stage: Stage,
    plan: Plan,
    run: Run | NullRun,
    *,
    after_epoch: Callable[[int, int], None] = lambda epoch, step: None,
    resume: dict[str, Any] | None = None,
) -> dict[str, float] | None:
    """Train to the end of the plan; returns the last held-out metrics, or None when interrupted.

    `after_epoch(epoch, step)` draws. `resume` is the content of the checkpoint to resume from.
    """
    plan.check(len(stage.examples))
    loop = Loop(stage.module, *_resident(stage.examples, stage.labels, plan.device), plan, run, resume or {})
    if loop.step >= loop.total:
        problem = f"has taken all of its {loop.step} steps; raise epochs or max_steps"
        raise OptionError("", "resume", run.folder, problem)
    results = None
    stage.module.train()
    if loop.step == 0:
        seed_step(plan.seed, -1, plan.device.type)
        order = loop.order(batch_size=1, epoch=0).flatten()
        stage.module.initialize(lambda n: take(loop.examples, distributed.share(order[:n]), plan.device))
    with Interrupt() as interrupt, loop.bar:
        while loop.step < loop.total:
            if loop.train_epoch(interrupt):
                results = loop.close_epoch(distributed.on_first(stage.evaluate), after_epoch)
            if any(distributed.any_of(interrupt.wanted)) and loop.step < loop.total:
                return None
            if plan.patience and loop.epoch - loop.best_epoch >= plan.patience:
                loop.bar.write(f"no better held-out metric for {plan.patience} epochs: best.pt is of {loop.best_epoch}")
                break
    return results


class Loop:
    """A training run between two steps: all that a checkpoint must hold, and the steps themselves."""

    def __init__(
        self, module: Any, examples: Tensor, labels: Tensor, plan: Plan, run: Run | NullRun, state: dict[str, Any]
    ):
        if plan.device.type == "cpu":
            keep_memory()
        self.module, self.examples, self.labels, self.plan, self.run = module, examples, labels, plan, run
        self.optimizer = adamw(module.parameter_groups(plan.weight_decay), plan.device)
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch = state.get("step", 0), state.get("epoch", 0)  # epoch: those evaluated so far
        self.best, self.best_epoch = state.get("best", math.inf), state.get("best_epoch", 0)
        self.usage = state.get("usage")
        self.epoch_means, self.window = Means(state.get("epoch_means")), Means(state.get("window"))
        self.per_epoch, self.total = plan.steps_per_epoch(len(examples)), plan.total_steps(len(examples))
        self.deadline = time.perf_counter() + 60 * plan.max_minutes if plan.max_minutes else math.inf
        self.speed = 0.0  # images/s since the epoch began
        self.bar = tqdm(total=self.total, initial=self.step, unit="step", disable=distributed.rank() > 0 or None)

    def train_epoch(self, interrupt: Interrupt) -> bool:
        """Train to the end of the epoch or of the run; False if interrupted before that, with everything saved."""
        plan, epoch = self.plan, self.step // self.per_epoch
        self.bar.set_description(f"epoch {epoch + 1}/{math.ceil(self.total / self.per_epoch)}", refresh=False)
        order = self.order(plan.batch_size, epoch)
        first, started = self.step, time.perf_counter()
        saved = started
        for index in order[self.step - epoch * self.per_epoch :]:
            loss = self.train_step(index)
            now = time.perf_counter()
            late, wanted = distributed.any_of(now > self.deadline, interrupt.wanted)
            if late:
                self.total = self.step
            if self.step % plan.log_every == 0:
                self.log_window()
            if self.step == self.total:
                break
            steps, seconds = plan.save_every
            due = self.step % steps == 0 if steps else seconds is not None and now - saved > seconds
            if (due or wanted) and self.step % self.per_epoch:
                _need_finite(float(loss), self.step)
                self.save()
                saved = now
                if wanted:
                    return False
        if plan.device.type == "cuda":
            torch.cuda.synchronize()
        self.speed = (self.step - first) * plan.batch_size / (time.perf_counter() - started)
        return True

    def order(self, batch_size: int, epoch: int) -> Tensor:
        """The epoch's batches `[steps, batch_size]`, copied once to the examples' device."""
        return batch_indices(len(self.examples), batch_size, seed=self.plan.seed, epoch=epoch).to(self.examples.device)

    def train_step(self, index: Tensor) -> Tensor:
        """One update on the examples of an index; returns its loss. Does not synchronize with a GPU."""
        plan, device = self.plan, self.plan.device
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr(self.step, self.total) * group["lr_scale"]
        seed_step(plan.seed, self.step, device.type)
        mine = distributed.share(index)
        batch, labels = take(self.examples, mine, device), take(self.labels, mine, device)
        batch = plan.augment(batch) if plan.augment else batch
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            loss, monitored = TrainOutput(*self.module(batch, labels, self.step))
        loss.backward()
        monitored = {**monitored, "loss": loss.detach()}
        monitored = distributed.average(self.module.parameters(), monitored, len(mine) / len(index))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.epoch_means.add(monitored)
        self.window.add(monitored)
        self.step += 1
        self.bar.update()
        return monitored["loss"]

    def log_window(self) -> None:
        """Log the metrics' means since the last time. Within an epoch, only this waits for the device."""
        if self.window.count:
            means = self.module.summary(self.window.values())
            _need_finite(means["loss"], self.step)
            self.run.log("train", self.step, self.epoch, means)
            self.bar.set_postfix_str(metrics.line(self.module.headline, means), refresh=False)
            self.window = Means()

    def close_epoch(self, results: dict[str, Any], after_epoch: Callable[[int, int], None]) -> dict[str, float]:
        """Log the epoch's training and held-out metrics, draw, and save; returns the held-out metrics."""
        self.log_window()
        self.epoch = math.ceil(self.step / self.per_epoch)
        trained = self.module.summary(self.epoch_means.values())
        self.epoch_means = Means()
        self.usage = results.pop("usage", None)
        numbers = {f"train_{name}": value for name, value in trained.items()}
        numbers |= {f"held_out_{name}": value for name, value in results.items()}
        self.run.log("epoch", self.step, self.epoch, numbers | {"images_per_s": self.speed})
        if self.usage is not None:
            self.run.histogram("held_out_usage", self.usage, self.step)
        after_epoch(self.epoch, self.step)
        if results[self.module.monitor] < self.best:
            self.best, self.best_epoch = results[self.module.monitor], self.epoch
            self.save("best.pt")
        self.save()
        self.bar.write(
            f"epoch {self.epoch:3d} | train {metrics.line(self.module.headline, trained)} | "
            f"held-out {metrics.line(self.module.headline, results)} | {self.speed:,.0f} images/s"
        )
        return results

    def save(self, name: str = "checkpoint.pt") -> None:
        state = {
            **self.module.saved_state(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "usage": self.usage,
            "epoch_means": self.epoch_means.state(),
            "window": self.window.state(),
        }
        self.run.save(state, name)


def _resident(examples: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole data set on an accelerator if it is under 4 GiB, so that a batch is only an index."""
    fits = device.type != "cpu" and examples.nbytes < 4 << 30
    return (examples.to(device), labels.to(device)) if fits else (examples, labels)


def take(tensor: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """The examples of an index. (`tensor[index]` would copy them element by element.)"""
    batch = tensor.index_select(0, index.to(tensor.device))
    if device.type == "cuda" and not batch.is_cuda:
        batch = batch.pin_memory()  # a GPU's copy from other memory blocks
    return batch.to(device, non_blocking=True)


def _need_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the training loss is {loss} at step {step}; the last checkpoint is kept. Try a lower lr")
