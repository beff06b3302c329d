"""The training loop. It knows a module that maps a batch to a loss and monitors, never a particular model.

Such a module has

    forward(batch, labels, step) -> (loss, metrics)    metrics: detached tensors, averaged over steps
    summary(means) -> {name: number}                   those averages as plain numbers
    headline: {name: format}                           the numbers worth a line on the terminal, in order
    monitor: str                                       the held-out number whose lowest value makes best.pt
    initialise(batches)                                optional; before the first step, batches(n) gives n examples

Everything random is a function of (seed, epoch) or (seed, step), so a run killed anywhere and resumed from its last
checkpoint takes the same steps as one that never stopped.
"""

import math
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvae.data import batch_indices
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
            self.sums[name] = value.double() if total is None else total.to(value.device) + value
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


def seed_step(seed: int, step: int) -> None:
    """Make the noise of a step a function of (seed, step)."""
    torch.manual_seed((seed * 1_000_003 + step + 1) % 2**63)


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
    examples, labels = _resident(examples, plan.device), _resident(labels, plan.device)
    optim = optimiser(module, plan)
    state = resume or {}
    if resume:
        optim.load_state_dict(state["optimizer"])
    step, best, best_epoch = state.get("step", 0), state.get("best", math.inf), state.get("best_epoch", 0)
    usage, figures = state.get("usage"), None
    epoch_means, window = Means(state.get("epoch_means")), Means(state.get("window"))
    per_epoch, total = plan.steps_per_epoch(len(examples)), plan.total_steps(len(examples))
    deadline = time.perf_counter() + 60 * plan.max_minutes if plan.max_minutes else math.inf

    def content(epoch: int) -> dict[str, Any]:
        return {
            "model": module.state_dict(),
            "optimizer": optim.state_dict(),
            "step": step,
            "epoch": epoch,
            "best": best,
            "best_epoch": best_epoch,
            "usage": usage,
            "epoch_means": epoch_means.state(),
            "window": window.state(),
        }

    def log_window() -> None:
        nonlocal window
        if window.count:
            means = module.summary(window.values())
            _need_finite(means["loss"], step)
            run.log("train", step, epoch, means)
            bar.set_postfix_str(_line(module.headline, means), refresh=False)
            window = Means()

    module.train()
    if step == 0 and hasattr(module, "initialise"):
        seed_step(plan.seed, -1)
        order = batch_indices(len(examples), 1, seed=plan.seed, epoch=0).flatten()
        module.initialise(lambda n: _take(examples, order[:n], plan.device))

    with Interrupt() as interrupt, tqdm(total=total, initial=step, unit="step", disable=None) as bar:
        while step < total:
            epoch = step // per_epoch  # epochs completed before this one
            bar.set_description(f"epoch {epoch + 1}/{math.ceil(total / per_epoch)}", refresh=False)
            order = batch_indices(len(examples), plan.batch_size, seed=plan.seed, epoch=epoch)
            started, first, saved = time.perf_counter(), step, time.perf_counter()
            for index in order[step - epoch * per_epoch :]:
                for group in optim.param_groups:
                    group["lr"] = plan.lr(step, total)
                seed_step(plan.seed, step)
                batch, batch_labels = _take(examples, index, plan.device), _take(labels, index, plan.device)
                with torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
                    loss, metrics = module(batch, batch_labels, step)
                loss.backward()
                optim.step()
                optim.zero_grad()
                epoch_means.add(metrics)
                window.add(metrics)
                step += 1
                bar.update()
                if time.perf_counter() > deadline:
                    total = step
                if step % plan.log_every == 0:
                    log_window()
                steps, seconds = plan.save_every
                due = step % steps == 0 if steps else time.perf_counter() - saved > seconds
                ends = step % per_epoch == 0 or step == total
                if (due or interrupt.wanted) and not ends:
                    _need_finite(float(loss.detach()), step)
                    run.save(content(epoch))
                    saved = time.perf_counter()
                if interrupt.wanted or step == total:
                    break
            if interrupt.wanted and step % per_epoch and step < total:
                return None
            _synchronise(plan.device)
            speed = (step - first) * plan.batch_size / (time.perf_counter() - started)
            log_window()
            trained = module.summary(epoch_means.values())
            epoch_means = Means()
            figures = evaluate()
            usage = figures.pop("usage", None)
            run.log("epoch", step, epoch + 1, {
                **{f"train_{name}": value for name, value in trained.items()},
                **{f"held_out_{name}": value for name, value in figures.items()},
                "images_per_s": speed,
            })  # fmt: skip
            if usage is not None:
                run.histogram("held_out_usage", usage, step)
            after_epoch(epoch + 1, step, figures)
            if figures[module.monitor] < best:
                best, best_epoch = figures[module.monitor], epoch + 1
                run.save(content(epoch + 1), "best.pt")
            run.save(content(epoch + 1))
            bar.write(
                f"epoch {epoch + 1:3d} | train {_line(module.headline, trained)} | "
                f"held-out {_line(module.headline, figures)} | {speed:,.0f} images/s"
            )
            if interrupt.wanted and step < total:
                return None
            if plan.patience and epoch + 1 - best_epoch >= plan.patience:
                bar.write(f"no better held-out figure for {plan.patience} epochs: best.pt is of epoch {best_epoch}")
                break
    return figures


def _resident(tensor: Tensor, device: torch.device) -> Tensor:
    """The whole data set on an accelerator when it is small beside its memory, so that a batch is only an index."""
    return tensor.to(device) if device.type != "cpu" and tensor.nbytes < 4 << 30 else tensor


def _take(tensor: Tensor, index: Tensor, device: torch.device) -> Tensor:
    return tensor[index.to(tensor.device)].to(device, non_blocking=True)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _line(headline: dict[str, str], numbers: dict[str, float]) -> str:
    return ", ".join(form.format(numbers[name]) for name, form in headline.items() if name in numbers)


def _need_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the training loss is {loss} at step {step}; the last checkpoint is kept. Try a lower --lr")
