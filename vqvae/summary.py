"""The lines that a run prints about itself: its plan, warnings about its settings, and how to go on."""

import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqvae import cli, distributed
from vqvae.autoencoder import SLOTS, Autoencoder
from vqvae.config import Config
from vqvae.data import Dataset
from vqvae.errors import counted, printable
from vqvae.registry import brief
from vqvae.runs import LAST
from vqvae.training import Plan, Stage, scheduled

FEW_UPDATES, ENOUGH_UPDATES = 200, 2000


def opening(
    config: Config, plan: Plan, dataset: Dataset, stage: Stage, model: Autoencoder, folder: Path, step: int
) -> str:
    """The run in a few lines; `step` is that of the checkpoint from which it is resumed, or 0."""
    shape = "x".join(map(str, dataset.train.images.shape[1:]))
    parameters = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    processes = f" over {distributed.world()} processes" if distributed.world() > 1 else ""
    processes += f" in {config.accumulate} shares each" if config.accumulate > 1 else ""
    uncounted = "" if model.discrete is None or model.discrete.counted else "; their use is counted in evaluation only"
    chosen = {slot: str(brief(SLOTS[slot], getattr(config, slot))) for slot in SLOTS}
    total, per_epoch = plan.total_steps(len(stage.examples)), plan.steps_per_epoch(len(stage.examples))
    return "\n".join([
        f"run    {folder}" + (f", resumed at step {step:,}" if step else ""),
        f"data   {dataset.name}: {describe_splits(dataset)}, {shape}" + (f" ({dataset.note})" if dataset.note else ""),
        *([f"       {len(dataset.classes):,} classes: {listed(dataset.classes)}"] if dataset.classes else []),
        f"model  {chosen['nets']} nets, {chosen['bottleneck']}; {parameters:,} parameters to train",
        f"       {chosen['likelihood']} likelihood, {chosen['prior']} prior",
        *([f"start  the weights of {printable(config.init_from)}"] if config.init_from else []),
        f"latent {model.bottleneck.describe()}{uncounted}",
        f"plan   {counted(total, 'step')}, {per_epoch:,} an epoch; batch {config.batch_size}{processes}, "
        f"seed {config.seed}, {plan.device}, {plan.precision}{', compiled' if stage.compiled else ''}",
    ])  # fmt: skip


def describe_splits(dataset: Dataset) -> str:
    """The number of images of each split, and which split chooses best.pt, if it is the test split."""
    sizes = ", ".join(f"{len(split.images):,} {name}" for name, split in dataset.splits.items())
    return sizes if dataset.validation else f"{sizes} (by which best.pt is chosen)"


def warn_of_few_updates(config: Config, plan: Plan, examples: int) -> None:
    """Warn of a plan that is too short to learn much, unless its length was asked for."""
    total = plan.total_steps(examples)
    if total < FEW_UPDATES and config.max_steps is None and config.max_minutes is None:
        batch = min(16, config.batch_size)
        epochs = -(-ENOUGH_UPDATES // max(examples // batch, 1))
        warnings.warn(
            f"too few updates to learn much: {total}; try --batch-size {batch} --epochs {epochs}", stacklevel=2
        )


def warn_of_seen_images(first: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Warn if the model that a run starts from may have been trained on the run's validation split."""
    # The number of images determines the split. Fingerprints also change with the size of the images.
    of = "fingerprint" if first["shape"] == about["shape"] else "examples"
    mine, its = (data.get(of, {}).get("validation") for data in (about, first))
    if mine and mine != its and first["name"] == about["name"]:
        problem = "may have been trained on images of the validation split, because it held out others"
        warnings.warn(f"the model of --init-from {problem}; hold out the same with --validation", stacklevel=2)


def warn_of_new_length(saved: Mapping[str, Any], plan: Plan, stage: Stage) -> None:
    """Warn of what jumps when a run is resumed for another length: the rate if it rises, other schedules either way."""
    lengths = {name: saved["config"][name] for name in ("epochs", "max_steps")}
    step, examples = saved["step"], len(stage.examples)
    before, now = (p.total_steps(examples) for p in (plan._replace(**lengths), plan))
    values = {"learning rate": (plan.lr(step, before), plan.lr(step, now))}
    for name, old in scheduled(stage.module, step, before).items():
        values[name.replace("_", " ")] = old, scheduled(stage.module, step, now)[name]
    for name, (old, new) in values.items():
        if new > 1.01 * old or (new < 0.99 * old and name != "learning rate"):
            verb, than = "rises" if new > old else "falls", "longer" if now > before else "shorter"
            warnings.warn(
                f"the {name} {verb} from {old:.3g} to {new:.3g}: its schedule ends with the run, which is {than} than "
                "before; a run of this length from the start would end elsewhere",
                stacklevel=2,
            )


def closing(folder: Path, plots: Path) -> str:
    """The lines at the end of a run: where it is, and how to look at it."""
    return "\n".join([
        f"done: {folder}, {plots}",
        f"look   {cli.program('visualize')} --checkpoint {shlex.quote(str(folder / LAST))}{_flag_of(plots.parent)}",
        f"       tensorboard --logdir {shlex.quote(str(folder.parent))}",
    ])  # fmt: skip


def how_to_go_on(folder: Path, plots: Path) -> str:
    """The rest of the line about an interrupted run; `plots` is its folder of plots."""
    path = folder / LAST
    if not path.exists():
        return "nothing was saved yet; start it again as before"
    command = f"{cli.program('train')} --resume {shlex.quote(str(folder))}{_flag_of(plots.parent)}"
    return f"saved {path}. Resume with: {command}"


def _flag_of(plot_dir: Path) -> str:
    """The flag for a folder of plots other than the default: a resumed run does not take it from its checkpoint."""
    return "" if plot_dir == Path(Config.plot_dir) else f" --plot-dir {shlex.quote(str(plot_dir))}"


def how_to_evaluate(folder: Path) -> str:
    """The rest of the line about a run that was not evaluated on the test split."""
    path = shlex.quote(str(folder / LAST))
    return f"its test metrics: {cli.program('train')} --evaluate --checkpoint {path}"


def listed(names: Sequence[str], width: int = 60) -> str:
    """Names, separated by commas; those that exceed the width are left out."""
    text = ", ".join(names)
    return text if len(text) <= width else f"{text[: width - 5].rpartition(', ')[0] or text[: width - 5]}, ..."
