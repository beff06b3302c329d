"""The training loop. It knows a module that maps a batch to a loss and monitors, never a particular model.

Such a module has

    forward(batch, labels, step) -> (loss, metrics)    metrics: detached tensors, averaged over steps
    summary(means) -> {name: number}                   those averages as plain numbers
    headline: {name: format}                           the numbers worth a line on the terminal, in order
    monitor: str                                       the held-out number whose lowest value makes best.pt
    initialise(batches)                                optional; before the first step, batches(n) gives n examples

Everything random is a function of (seed, epoch) or (seed, step), so a run killed anywhere and resumed from its last
checkpoint takes the same steps as one that never stopped. Of several processes (ranks.py) each takes its share of
every batch, whose size does not change with their number, and draws its own noise.
"""

import math
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvae import ranks
from vqvae.data import batch_indices
from vqvae.devices import keep_memory
from vqvae.errors import UserError
from vqvae.runs import Run
from vqvae.schedules import Schedule


class Plan(NamedTuple):
    """How long, how fast, on what."""

    epochs: int
    batch_size: int
    lr: Schedule
    weight_decay: float
    seed: int
    device: torch.device
    precision: str  # fp32 or bf16
    log_every: int  # steps
    save_every: tuple[int | None, float | None]  # steps, seconds
    max_steps: int | None = None
    max_minutes: float | None = None  # of this process, evaluation included
    patience: int | None = None  # epochs without a better held-out figure before stopping
    augment: Callable[[Tensor], Tensor] | None = None  # what happens to every training batch before the module sees it

    def steps_per_epoch(self, examples: int) -> int:
        return examples // self.batch_size

    def total_steps(self, examples: int) -> int:
        steps = self.epochs * self.steps_per_epoch(examples)
        return steps if self.max_steps is None else min(steps, self.max_steps)


class Means:
    """Running sums of named tensors on the device; reading them off is the only time the loop waits for it."""

    def __init__(self, state: dict[str, Any] | None = None):
        self.sums: dict[str, Tensor] = dict(state["sums"]) if state else {}
        self.count: int = state["count"] if state else 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            total = self.sums.get(name)
            precise = torch.float32 if value.device.type == "mps" else torch.float64  # which MPS does not have
            self.sums[name] = value.to(precise) if total is None else total.to(value.device) + value
        self.count += 1

    def values(self) -> dict[str, Tensor]:
        return {name: total.cpu() / self.count for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, "count": self.count}


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a wish that the loop heeds between two steps; a second one stops at once."""

    def __enter__(self) -> "Interrupt":
        self.wanted = False
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def seed_step(seed: int, step: int, device: str = "cpu") -> None:
    """Make the noise of a step a function of (seed, step), another in every process."""
    apart = 999_999_937 * ranks.rank()  # less than 2**32, of which a CPU's generator sees no more
    number = (seed * 1_000_003 + step + 1 + apart) % 2**63
    # not torch.manual_seed: for kinds of device that are not in use it formats a stack trace, at every step
    torch.default_generator.manual_seed(number)
    if device in ("cuda", "mps"):
        getattr(torch, device).manual_seed(number)


def optimiser(module: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.999) over what trains; weight decay touches convolution and linear weights alone."""
    decayed = {id(m.weight) for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": plan.weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3, fused=plan.device.type in ("cpu", "cuda"))


def fit(
    module: nn.Module,
    examples: Tensor,
    labels: Tensor,
    plan: Plan,
    run: Run,
    *,
    evaluate: Callable[[], dict[str, Any]],
    after_epoch: Callable[[int, int, dict[str, Any]], None],
    resume: dict[str, Any] | None = None,
) -> dict[str, float] | None:
    """Train to the end of the plan and return the last held-out figures, or None when interrupted.

    `evaluate()` gives held-out figures (numbers are logged; a tensor `usage` goes into the checkpoint);
    `after_epoch(epoch, step, figures)` draws. `resume` is the content of the checkpoint to go on from.
    """
    if plan.batch_size > len(examples):
        raise UserError(f"--batch-size {plan.batch_size}: larger than the {len(examples)} training examples")
    if plan.batch_size < ranks.world():
        raise UserError(f"--batch-size {plan.batch_size}: smaller than the {ranks.world()} processes that share it")
    loop = Loop(module, *_resident(examples, labels, plan.device), plan, run, resume or {})
    if loop.step >= loop.total:
        raise UserError(f"--resume {run.folder}: has done all of its {loop.step} steps; raise --epochs or --max-steps")
    figures = None
    module.train()
    if loop.step == 0 and hasattr(module, "initialise"):
        seed_step(plan.seed, -1, plan.device.type)
        order = loop.order(batch_size=1, epoch=0).flatten()
        module.initialise(lambda n: take(loop.examples, ranks.share(order[:n]), plan.device))
    with Interrupt() as interrupt, loop.bar:
        while loop.step < loop.total:
            whole = loop.train_epoch(interrupt)
            if whole:
                figures = loop.close_epoch(ranks.on_first(evaluate), after_epoch)
            if any(ranks.any_of(interrupt.wanted)) and loop.step < loop.total:
                return None
            if plan.patience and loop.epoch - loop.best_epoch >= plan.patience:
                loop.bar.write(f"no better held-out figure for {plan.patience} epochs: best.pt is of {loop.best_epoch}")
                break
    return figures


class Loop:
    """A training run between two steps: all that a checkpoint must hold, and the steps themselves."""

    def __init__(
        self, module: nn.Module, examples: Tensor, labels: Tensor, plan: Plan, run: Run, state: dict[str, Any]
    ):
        if plan.device.type == "cpu":
            keep_memory()
        self.module, self.examples, self.labels, self.plan, self.run = module, examples, labels, plan, run
        self.optimiser = optimiser(module, plan)
        if state:
            self.optimiser.load_state_dict(state["optimizer"])
        self.step, self.epoch = state.get("step", 0), state.get("epoch", 0)  # epoch: those evaluated so far
        self.best, self.best_epoch = state.get("best", math.inf), state.get("best_epoch", 0)
        self.usage = state.get("usage")
        self.epoch_means, self.window = Means(state.get("epoch_means")), Means(state.get("window"))
        self.per_epoch, self.total = plan.steps_per_epoch(len(examples)), plan.total_steps(len(examples))
        self.deadline = time.perf_counter() + 60 * plan.max_minutes if plan.max_minutes else math.inf
        self.speed = 0.0  # images/s of the last stretch of training
        self.bar = tqdm(total=self.total, initial=self.step, unit="step", disable=ranks.rank() > 0 or None)

    def train_epoch(self, interrupt: Interrupt) -> bool:
        """Train to the end of the epoch or of the run; False if interrupted before, with everything saved."""
        plan, epoch = self.plan, self.step // self.per_epoch
        self.bar.set_description(f"epoch {epoch + 1}/{math.ceil(self.total / self.per_epoch)}", refresh=False)
        order = self.order(plan.batch_size, epoch)
        first, started = self.step, time.perf_counter()
        saved = started
        for index in order[self.step - epoch * self.per_epoch :]:
            loss = self.train_step(index)
            now = time.perf_counter()
            late, wanted = ranks.any_of(now > self.deadline, interrupt.wanted)
            if late:
                self.total = self.step
            if self.step % plan.log_every == 0:
                self.log_window()
            if self.step == self.total:
                break
            steps, seconds = plan.save_every
            due = self.step % steps == 0 if steps else now - saved > seconds
            if (due or wanted) and self.step % self.per_epoch:
                _need_finite(float(loss), self.step)
                self.save()
                saved = now
                if wanted:
                    return False
        _synchronise(plan.device)
        self.speed = (self.step - first) * plan.batch_size / (time.perf_counter() - started)
        return True

    def order(self, batch_size: int, epoch: int) -> Tensor:
        """The epoch's batches `[steps, batch_size]`, beside the examples: copied once, not waited for in every step."""
        return batch_indices(len(self.examples), batch_size, seed=self.plan.seed, epoch=epoch).to(self.examples.device)

    def train_step(self, index: Tensor) -> Tensor:
        """One update on the examples of an index; its loss. Nothing here waits for a GPU."""
        plan, device = self.plan, self.plan.device
        for group in self.optimiser.param_groups:
            group["lr"] = plan.lr(self.step, self.total)
        seed_step(plan.seed, self.step, device.type)
        mine = ranks.share(index)
        batch, labels = take(self.examples, mine, device), take(self.labels, mine, device)
        batch = plan.augment(batch) if plan.augment else batch
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            loss, metrics = self.module(batch, labels, self.step)
        loss.backward()
        metrics = ranks.average(self.module, {**metrics, "loss": loss.detach()}, len(mine) / len(index))
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.epoch_means.add(metrics)
        self.window.add(metrics)
        self.step += 1
        self.bar.update()
        return metrics["loss"]

    def log_window(self) -> None:
        """Log the monitors' means since the last time; here alone, within an epoch, the loop waits for the device."""
        if self.window.count:
            means = self.module.summary(self.window.values())
            _need_finite(means["loss"], self.step)
            self.run.log("train", self.step, self.epoch, means)
            self.bar.set_postfix_str(_line(self.module.headline, means), refresh=False)
            self.window = Means()

    def close_epoch(self, figures: dict[str, Any], after_epoch: Callable) -> dict[str, float]:
        """Log the epoch's training and held-out figures, draw, and save; the held-out figures that are numbers."""
        self.log_window()
        self.epoch = math.ceil(self.step / self.per_epoch)
        trained = self.module.summary(self.epoch_means.values())
        self.epoch_means = Means()
        self.usage = figures.pop("usage", None)
        numbers = {f"train_{name}": value for name, value in trained.items()}
        numbers |= {f"held_out_{name}": value for name, value in figures.items()}
        self.run.log("epoch", self.step, self.epoch, numbers | {"images_per_s": self.speed})
        if self.usage is not None:
            self.run.histogram("held_out_usage", self.usage, self.step)
        after_epoch(self.epoch, self.step, figures)
        if figures[self.module.monitor] < self.best:
            self.best, self.best_epoch = figures[self.module.monitor], self.epoch
            self.save("best.pt")
        self.save()
        self.bar.write(
            f"epoch {self.epoch:3d} | train {_line(self.module.headline, trained)} | "
            f"held-out {_line(self.module.headline, figures)} | {self.speed:,.0f} images/s"
        )
        return figures

    def save(self, name: str = "checkpoint.pt") -> None:
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.optimiser.state_dict(),
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
    """The whole data set on an accelerator when it is small beside its memory, so that a batch is only an index."""
    there = device.type != "cpu" and examples.nbytes < 4 << 30
    return (examples.to(device), labels.to(device)) if there else (examples, labels)


def take(tensor: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """The examples of an index; `tensor[index]` would copy them number by number."""
    batch = tensor.index_select(0, index.to(tensor.device))
    if device.type == "cuda" and not batch.is_cuda:
        batch = batch.pin_memory()  # from other memory a GPU's copy is waited for
    return batch.to(device, non_blocking=True)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _line(headline: dict[str, str], numbers: dict[str, float]) -> str:
    return ", ".join(form.format(numbers[name]) for name, form in headline.items() if name in numbers)


def _need_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the training loss is {loss} at step {step}; the last checkpoint is kept. Try a lower --lr")
