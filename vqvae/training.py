"""The training loop. It knows a module that maps a batch to a loss and metrics (contracts.Trainable), never a model.

Everything random is a function of (seed, epoch) or (seed, step), so a run that is killed and resumed from its last
checkpoint takes the same steps as one that never stopped. With several processes (distributed.py) each takes its share
of every batch, whose size does not depend on their number, and the steps are the same up to rounding (shares.py).
"""

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, autocast, nn

from vqvae import distributed, shares
from vqvae.averaging import AveragedWeights
from vqvae.batch_norm import BatchNorm
from vqvae.contracts import OptimizerName, Trainable, TrainOutput
from vqvae.data.batches import Shuffle, batch_indices, block_of, read_ahead
from vqvae.devices import keep_memory, widest_float
from vqvae.errors import OptionError, UserError, counted
from vqvae.interrupts import Interrupt
from vqvae.optimizer import OPTIMIZERS
from vqvae.progress import Progress
from vqvae.randomness import Purpose, seed_globally, stream
from vqvae.runs import Run
from vqvae.schedules import Plateau, Schedule

MOST_SKIPPED = 10  # updates in a row, with on_nan=skip
ALWAYS_SAVED = 20  # epochs
KEPT = ("usage", "posterior")  # tensors among the held-out metrics, which plots show


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
    checkpoint_every: tuple[int | None, float | None]  # steps, seconds; within epochs
    save_every: float = 0.0  # seconds between epochs that are drawn and saved, after the first `ALWAYS_SAVED`
    max_steps: int | None = None
    max_minutes: float | None = None  # of this process, evaluation included
    patience: int | None = None  # epochs without a better held-out metric before stopping
    plateau: Plateau | None = None  # when to reduce the rate that `lr` gives
    clip: float | None = None  # largest norm of the gradient
    ema_weights: float = 0.0  # decay of averaged weights; 0: none
    optimizer: OptimizerName = "adamw"
    held_out: str = "validation"  # the split that `Stage.evaluate` evaluates
    augment: Callable[[Tensor], Tensor] | None = None  # applied to every training batch
    accumulate: int = 1  # shares of a batch that each process computes one after another
    on_nan: Literal["stop", "skip"] = "stop"  # what to do where the loss or the gradient is not finite
    shuffle: Shuffle = "full"
    data_shards: int = 1  # parts of the data, of equal size, of which each process has one

    def steps_per_epoch(self, examples: int) -> int:
        return examples * self.data_shards // self.batch_size

    def total_steps(self, examples: int) -> int:
        steps = self.epochs * self.steps_per_epoch(examples)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def check(self, examples: int) -> None:
        """Raise `OptionError` if a batch is larger than `examples` (all parts) or if the processes cannot share it."""
        if self.batch_size > examples:
            raise OptionError(
                "batch_size", self.batch_size, f"larger than the {examples} training examples; use a smaller one"
            )
        shared = distributed.world() * self.accumulate
        if self.data_shards > 1 and self.batch_size % shared:
            problem = f"must be a multiple of {shared}: with data_shards, the processes have equal shares of a batch"
            raise OptionError("batch_size", self.batch_size, problem)
        if self.batch_size < shared:
            problem = f"smaller than the {shared} shares that it is to have; use a larger one"
            raise OptionError("batch_size", self.batch_size, problem)


class Means:
    """Running sums of named tensors on the device. The loop synchronizes with the device only to read them."""

    def __init__(self, state: dict[str, Any] | None = None):
        self.sums: dict[str, Tensor] = dict(state["sums"]) if state else {}
        self.count: int = state["count"] if state else 0

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            total, precise = self.sums.get(name), widest_float(value.device)
            # sums of a checkpoint are on the CPU, and may be more precise than this device allows
            self.sums[name] = value.to(precise) if total is None else total.to(precise).to(value.device) + value
        self.count += 1

    def values(self) -> dict[str, Tensor]:
        return {name: total.cpu() / self.count for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, "count": self.count}


class Health:
    """Remembers the first step whose loss or gradient was not finite, on the device: reading it synchronizes."""

    QUANTITIES = ("training loss", "gradient")
    GOOD = 2**62

    def __init__(self) -> None:
        self.first: Tensor | None = None  # [2] int64, the steps; GOOD where there is none

    def watch(self, loss: Tensor, gradient: Tensor, step: int) -> None:
        """Note a step's loss and gradient norm, both scalars."""
        bad = ~torch.stack([loss, gradient.to(loss)]).isfinite()
        steps = torch.where(bad, step, self.GOOD)
        self.first = steps if self.first is None else torch.minimum(self.first, steps)

    def problem(self) -> str | None:
        """`the gradient was not finite at step 7`, or None."""
        if self.first is None:
            return None
        step, quantity = min(zip(self.first.tolist(), self.QUANTITIES, strict=True), key=lambda pair: pair[0])
        return None if step == self.GOOD else f"the {quantity} was not finite at step {step}"


def seed_step(seed: int, step: int, device: str = "cpu", purpose: Purpose = "noise") -> None:
    """Make the noise of a step a function of (seed, step).

    Noise that a share of the batch draws by itself, such as dropout's, differs between the shares.
    """
    shares.seed(stream(seed, purpose, step))
    seed_globally(seed, purpose, step, process=shares.number(), device=device)


class Stage(NamedTuple):
    """The parts of one stage of training."""

    module: Trainable
    examples: Tensor  # [N, ...], images or codes
    labels: Tensor  # [N] int64
    evaluate: Callable[[], dict[str, Any]]  # held-out metrics; entries of KEPT go into the checkpoint
    redraw: Callable[[int], Tensor] | None = None  # the examples of an epoch, where every epoch has its own
    compiled: bool = False


AfterEpoch = Callable[[int, int, Tensor | None], None]  # gets the epoch, the step, and code usage [levels, K]


def nothing(epoch: int, step: int, usage: Tensor | None) -> None:
    pass


def fit(
    stage: Stage,
    plan: Plan,
    run: Run,
    *,
    on_start: Callable[[], None] = lambda: None,
    after_epoch: AfterEpoch = nothing,
    resume: dict[str, Any] | None = None,
) -> dict[str, float] | None:
    """Train to the end of the plan; returns the last held-out metrics, or None when interrupted.

    `resume` is the content of the checkpoint to resume from. `on_start()` is called after every check, when the run's
    files are open. `after_epoch(epoch, step, usage)` draws.
    """
    plan.check(len(stage.examples) * plan.data_shards)
    stage.module.train()
    if plan.accumulate > 1 and any(isinstance(m, BatchNorm) and m.training for m in stage.module.modules()):
        problem = "must be 1 with batch norm, which needs the whole batch at once; use other nets, or several processes"
        raise OptionError("accumulate", plan.accumulate, problem)
    resident = _resident(stage.examples, stage.labels, plan.device)
    loop = Loop(stage.module, *resident, plan, run, resume or {}, redraw=stage.redraw, after_epoch=after_epoch)
    if resume and loop.step >= loop.end:
        distributed.on_first(lambda: run.repair_best(resume))  # it may have been killed just before its end
        problem = f"has taken all of its {counted(loop.step, 'step')}; raise epochs or max_steps"
        raise OptionError("resume", run.folder, problem)
    if not distributed.on_first(lambda: run.start(resume)):
        loop.best, loop.best_step, loop.best_epoch = math.inf, None, loop.epoch
    on_start()
    results = None
    if loop.step == 0:
        with loop.progress.working("start"):
            loop.start()
    with Interrupt() as interrupt, contextlib.closing(loop.progress):
        while loop.step < loop.end:
            if loop.train_epoch(interrupt):
                with loop.progress.working("evaluation"), loop.averaged.in_use():
                    results = loop.close_epoch(stage.evaluate())
            interrupted = any(distributed.any_of(interrupt.wanted)) and loop.step < loop.end
            ends = bool(plan.patience) and loop.epoch - loop.best_epoch >= plan.patience
            if (interrupted or ends) and loop.saved_step < loop.step:
                with loop.averaged.in_use():
                    loop.publish()
            if interrupted:
                return None
            if ends:
                loop.progress.write(f"no better epoch for {counted(loop.epoch - loop.best_epoch, 'epoch')}")
                break
        loop.progress.finish(loop.best_epoch if loop.best_step else None, stage.module.monitor)
    return results


class Loop:
    """A training run between two steps: all that a checkpoint must contain, and the steps themselves."""

    def __init__(
        self,
        module: Trainable,
        examples: Tensor,
        labels: Tensor,
        plan: Plan,
        run: Run,
        state: dict[str, Any],
        *,
        redraw: Callable[[int], Tensor] | None = None,
        after_epoch: AfterEpoch = nothing,
    ):
        if plan.device.type == "cpu":
            keep_memory()
        self.module, self.examples, self.labels, self.plan, self.run = module, examples, labels, plan, run
        self.redraw, self.after_epoch = redraw, after_epoch
        self.optimizer = OPTIMIZERS[plan.optimizer](module.parameter_groups(plan.weight_decay), plan.device)
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.averaged = AveragedWeights(module, plan.ema_weights, state.get("trained"))
        self.step, self.epoch = state.get("step", 0), state.get("epoch", 0)  # epoch: those evaluated so far
        self.reductions, self.reduced_epoch = state.get("reductions", 0), state.get("reduced_epoch", 0)
        self.best, self.best_epoch = state.get("best", math.inf), state.get("best_epoch", 0)
        self.kept = {name: state.get(name) for name in KEPT}
        self.epoch_means, self.window = Means(state.get("epoch_means")), Means(state.get("window"))
        self.per_epoch, self.total = plan.steps_per_epoch(len(examples)), plan.total_steps(len(examples))
        self.end = self.total  # earlier if the minutes are over; schedules go by `total`
        # checkpoints of an earlier version have no best_step
        self.best_step = state.get("best_step", min(self.best_epoch * self.per_epoch, self.step) or None)
        self.deadline = time.perf_counter() + 60 * plan.max_minutes if plan.max_minutes else math.inf
        self.speed = 0.0  # images/s since the epoch began
        self.health, self.skipped, self.saved_step = Health(), 0, self.step
        self.published = time.perf_counter()
        self.unsaved_best: dict[str, Any] | None = None  # the state of the best epoch
        quiet = distributed.rank() > 0
        self.progress = Progress(self.total, self.step, module.headline, split=plan.held_out, quiet=quiet)

    def start(self) -> None:
        """Fit the module to the first examples, before the first step."""
        plan = self.plan
        seed_step(plan.seed, 0, plan.device.type, "start")
        order = self.order(batch_size=plan.data_shards, epoch=0)[:, 0]
        self.module.initialize(lambda n: take(self.examples, order[:n], plan.device))

    def train_epoch(self, interrupt: Interrupt) -> bool:
        """Train to the end of the epoch or of the run; False if interrupted before that, with everything saved."""
        plan, epoch = self.plan, self.step // self.per_epoch
        self.progress.epoch(epoch + 1, math.ceil(self.total / self.per_epoch))
        order = self.order(plan.batch_size, epoch)
        if self.redraw:
            self.examples = self.redraw(epoch).to(self.examples.device)
        first, started = self.step, time.perf_counter()
        saved = started
        rest = order[self.step - epoch * self.per_epoch :]
        for index in read_ahead(rest, self.examples, block_of(self.examples, plan.shuffle)):
            self.train_step(index)
            now = time.perf_counter()
            late, wanted = distributed.any_of(now > self.deadline, interrupt.wanted)
            if late:
                self.end = self.step
            if self.step % plan.log_every == 0:
                self.log_window()
            if self.step == self.end:
                break
            steps, seconds = plan.checkpoint_every
            due = self.step % steps == 0 if steps else seconds is not None and now - saved > seconds
            if (due or wanted) and self.step % self.per_epoch:
                self.save()
                saved = now
                if wanted:
                    return False
        if plan.device.type == "cuda":
            torch.cuda.synchronize()
        self.speed = (self.step - first) * plan.batch_size / (time.perf_counter() - started)
        return True

    def rate(self, step: int) -> float:
        """The learning rate at a step of this epoch."""
        factor = self.plan.plateau.factor if self.plan.plateau else 1.0
        return self.plan.lr(step, self.total) * factor**self.reductions

    def order(self, batch_size: int, epoch: int) -> Tensor:
        """The epoch's batches `[steps, batch_size]`, copied once to the examples' device.

        With several parts of the data, indices into this process's part are repeated, so that its share of a batch has
        them.
        """
        plan, examples = self.plan, self.examples
        mine, block = batch_size // plan.data_shards, block_of(examples, plan.shuffle)
        order = batch_indices(len(examples), mine, seed=plan.seed, epoch=epoch, block=block)
        return order.repeat(1, plan.data_shards).to(examples.device)

    def train_step(self, index: Tensor) -> None:
        """One update on the examples of an index. Does not synchronize with a GPU, except with on_nan=skip."""
        plan = self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step) * group["lr_scale"]
        skips = plan.on_nan == "skip"
        before = [tensor.detach().clone() for tensor in self._changed_by_forward()] if skips else []
        monitored = shares.descend(lambda rows: self.forward(index[rows]), len(index), plan.accumulate)
        monitored = self.module.of_batch(distributed.sum_step(self.module.parameters(), monitored))
        norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        if plan.clip:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), plan.clip, norm)
        if skips and not (monitored["loss"].isfinite() and norm.isfinite()):
            self._skip(before)
        else:
            self.skipped = 0
            self.health.watch(monitored["loss"], norm, self.step)
            self.optimizer.step()
            self.averaged.update(self.step)
            monitored["grad_norm"] = norm
            self.epoch_means.add(monitored)
            self.window.add(monitored)
        self.optimizer.zero_grad()
        self.step += 1
        self.progress.step(self.step)

    def forward(self, index: Tensor) -> TrainOutput:
        """The loss and the metrics of the examples that `index` selects: a batch, or a share of one."""
        plan, device = self.plan, self.plan.device
        seed_step(plan.seed, self.step, device.type)
        batch, labels = take(self.examples, index, device), take(self.labels, index, device)
        batch = plan.augment(batch) if plan.augment else batch
        with autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            return TrainOutput(*self.module(batch, labels, self.step))

    def _changed_by_forward(self) -> Iterator[Tensor]:
        """The tensors that a forward pass may change: codebooks (EMA, revival) and statistics of batch norm."""
        return itertools.chain(self.module.buffers(), self.module.parameters())

    @torch.no_grad()
    def _skip(self, before: list[Tensor]) -> None:
        """Undo what the forward pass changed, and take no update."""
        self.skipped += 1
        if self.skipped > MOST_SKIPPED:
            raise UserError(f"{MOST_SKIPPED} steps in a row up to step {self.step} were not finite; {self._kept()}")
        for tensor, value in zip(self._changed_by_forward(), before, strict=True):
            tensor.copy_(value)
        self.progress.write(f"step {self.step}: the loss or the gradient is not finite; the update is skipped")

    def need_finite(self) -> None:
        """Raise `UserError` if anything that a checkpoint would contain is not finite. Synchronizes with the device."""
        problem = self.health.problem()
        if problem is None:
            state = {**self.module.saved_state(), "optimizer": self.optimizer.state_dict()}
            if name := not_finite(state):
                problem = f"{name} was not finite after step {self.step}"
        if problem:
            raise UserError(f"{problem}; {self._kept()}")

    def _kept(self) -> str:
        kept = f"checkpoint.pt of step {self.saved_step} is kept" if self.saved_step else "no checkpoint was saved yet"
        return f"{kept}. Try a lower lr" + (", or on_nan=skip" if self.plan.on_nan == "stop" else "")

    def log_window(self) -> None:
        """Log the metrics' means since the last time. Within an epoch, only this and saving wait for the device."""
        if self.window.count:
            if problem := self.health.problem():
                raise UserError(f"{problem}; {self._kept()}")
            means = self.module.summary(self.window.values())
            settings = {
                "lr": self.rate(self.step - 1),
                **scheduled(self.module, self.step - 1, self.total),
            }
            self.run.log("train", self.step, self.epoch, means, settings)
            self.progress.show(means)
            self.window = Means()

    def close_epoch(self, results: dict[str, Any]) -> dict[str, float]:
        """Log the epoch's training and held-out metrics, draw and save if it is time; returns the held-out metrics.

        Averaged weights must be in use.
        """
        self.log_window()
        self.need_finite()
        if self.skipped and not math.isfinite(results[self.module.monitor]):  # the last good update spoiled the weights
            raise UserError(f"the updates before step {self.step} and the evaluation were not finite; {self._kept()}")
        if self.step == self.end and self.skipped == self.end:
            raise UserError(f"none of the {self.end} updates was finite; {self._kept()}")
        self.epoch = math.ceil(self.step / self.per_epoch)
        trained = self.module.summary(self.epoch_means.values())
        self.epoch_means = Means()
        self.kept = {name: results.pop(name, None) for name in KEPT}
        numbers = {f"train_{name}": value for name, value in trained.items()}
        numbers |= {f"held_out_{name}": value for name, value in results.items()}
        numbers["images_per_s"] = self.speed
        self.run.log("epoch", self.step, self.epoch, numbers, held_out=self.plan.held_out)
        better = results[self.module.monitor] < self.best
        if better:
            self.best, self.best_epoch, self.best_step = results[self.module.monitor], self.epoch, self.step
        plan, plateau = self.plan, self.plan.plateau
        if plateau and self.epoch - max(self.best_epoch, self.reduced_epoch) > plateau.patience:
            self.reductions, self.reduced_epoch = self.reductions + 1, self.epoch
            self.progress.write(f"the learning rate falls to {self.rate(self.step):.3g}")
        rested = time.perf_counter() - self.published > plan.save_every
        if self.epoch <= ALWAYS_SAVED or rested or self.step == self.end:
            self.publish(best=better)
        elif better:
            self.unsaved_best = copy.deepcopy(self._state())
        self.progress.row(self.epoch, trained, results, self.speed)
        return results

    def publish(self, *, best: bool = False) -> None:
        """Draw and save a closed epoch, which may be the best so far. Averaged weights must be in use."""
        self.after_epoch(self.epoch, self.step, self.kept.get("usage"))
        self._write(best=best)
        self.published = time.perf_counter()

    def save(self) -> None:
        """Write a checkpoint; raises `UserError` instead of writing one that is not finite."""
        self.need_finite()
        with self.averaged.in_use():
            self._write()

    def _write(self, *, best: bool = False) -> None:
        """Write checkpoint.pt, and best.pt if it is the best or the best was not saved yet."""
        self.run.save(self._state())
        self.saved_step = self.step
        if best or self.unsaved_best:  # last, so that best.pt never has steps that a resumed run repeats
            self.run.save_best(None if best else self.unsaved_best)
        self.unsaved_best = None

    def _state(self) -> dict[str, Any]:
        return {
            **self.module.saved_state(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_step": self.best_step,
            "reductions": self.reductions,
            "reduced_epoch": self.reduced_epoch,
            **({"trained": self.averaged.other} if self.averaged.other else {}),
            **self.kept,
            "epoch_means": self.epoch_means.state(),
            "window": self.window.state(),
        }


def _resident(examples: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole data set on an accelerator if it is under 4 GiB, so that a batch is only an index."""
    fits = device.type != "cpu" and examples.nbytes < 4 << 30
    return (examples.to(device), labels.to(device)) if fits else (examples, labels)


def scheduled(module: nn.Module, step: int, total: int) -> dict[str, float]:
    """The values at a step of all options of a module that change during training."""
    options = ((name, value) for part in module.modules() for name, value in vars(part).items())
    changing = {name: value for name, value in options if isinstance(value, Schedule) and len(set(value.values())) > 1}
    return {name: schedule(step, total) for name, schedule in changing.items()}


def take(tensor: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """The examples of an index. (`tensor[index]` would copy them element by element.)"""
    batch = tensor.index_select(0, index.to(tensor.device))
    if device.type == "cuda" and not batch.is_cuda:
        batch = batch.pin_memory()  # a GPU's copy from other memory blocks
    return batch.to(device, non_blocking=True)


def not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor of floats in nested tables with NaN or infinity, or None."""
    if isinstance(state, Tensor):
        return name if state.is_floating_point() and not state.isfinite().all() else None
    items = state.items() if isinstance(state, dict) else ()  # lists have only the optimizer's plain settings
    found = (not_finite(value, f"{name}.{key}" if name else str(key)) for key, value in items)
    return next(filter(None, found), None)
