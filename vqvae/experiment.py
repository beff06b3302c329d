"""A config becomes data, a model and a training run; a checkpoint becomes held-out metrics."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqvae import autoencoder, checkpoint, cli, data, distributed, objectives, plots
from vqvae.autoencoder import Autoencoder, build_autoencoder
from vqvae.config import Config, Fresh, Resumed, StageTwo, Start, configure, default_name, interval
from vqvae.data import Dataset
from vqvae.data.batches import augmentation, pixel_variance
from vqvae.devices import choose_compile, choose_device, choose_precision
from vqvae.errors import OptionError, near_misses
from vqvae.evaluation import evaluate
from vqvae.files import make_folder, write_json
from vqvae.presets import PRESETS
from vqvae.registry import build
from vqvae.runs import NullRun, Run, claim, free_name
from vqvae.schedules import Schedule
from vqvae.stage_one import AutoencoderTraining
from vqvae.stage_two import PriorTraining, extract_codes
from vqvae.training import Plan, Stage, fit

SLOTS = {"dataset": data.SLOT, **autoencoder.SLOTS, "objective": objectives.SLOT}
LISTINGS = {
    "data": "dataset", "nets": "nets", "bottlenecks": "bottleneck", "priors": "prior", "likelihoods": "likelihood",
    "objectives": "objective",
}  # fmt: skip
EXAMPLES_KEPT, POINTS_KEPT = 64, 2000  # held-out images or points in a checkpoint, so that plots need no data
SHARED_BY_STAGES = (
    "device", "precision", "seed", "log_dir", "plot_dir", "log_every", "max_steps", "max_minutes"
)  # fmt: skip


def run(given: dict[str, Any], resume: str | None = None) -> int:
    """Train what the settings describe, both stages of a preset that has two; returns the exit code."""
    preset = PRESETS.get(given.get("preset", ""))
    second = _second_stage(given, preset.prior) if preset and preset.prior and resume is None else None
    try:
        folder = train(given, resume)
        if folder and second:
            folder = train(second | {"name": f"{folder.name}-prior", "checkpoint": str(folder / "checkpoint.pt")})
    finally:
        distributed.stop()
    return 0 if folder else 130


def _second_stage(given: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a preset's second stage: its own, what was typed for the prior, and where and how long to run."""
    own: dict[str, Any] = {key: given.pop(key) for key in ("prior", "conditional", "patience") if key in given}
    return {**settings, **own, **{key: given[key] for key in SHARED_BY_STAGES if key in given}}


def train(given: Mapping[str, Any], resume: str | None = None) -> Path | None:
    """Train one stage from the settings given; returns its run folder, or None when interrupted."""
    start = how_it_starts(given, resume)
    config = configure(given, start, SLOTS)
    plan = plan_of(config)
    config.precision = plan.precision  # a resumed run keeps the precision chosen first, on any machine
    distributed.start(plan.device)
    folder = start.folder if isinstance(start, Resumed) else distributed.on_first(lambda: name_run(config))
    config.name = config.name or folder.name
    with distributed.first_goes_first():
        dataset = load_data(config)
    if config.conditional and not dataset.classes:
        raise OptionError("", "conditional", None, f"the data set {dataset.name} has no labels")

    plan = plan._replace(augment=augmentation(config.augment, dataset.train.images))
    torch.manual_seed(config.seed)
    build_stage = stage_two if config.checkpoint else stage_one
    stage, model = build_stage(config, dataset, plan, start)
    plan.check(len(stage.examples))
    resumed = start.content if isinstance(start, Resumed) else None
    # a resumed run goes on drawing where it drew before, whatever folder it is resumed from
    plot_folder = Path(resumed["plots"]) if resumed else Path(config.plot_dir).resolve() / config.name
    make_folder(plot_folder, "plot_dir")
    kept = EXAMPLES_KEPT if model.shows_images else POINTS_KEPT
    examples = dataset.test.images[:kept].clone()
    facts: dict[str, Any] = {
        "kind": "prior" if config.checkpoint else "autoencoder",
        "run": config.name,
        "config": config.to_dict(),
        "data": {
            "name": dataset.name,
            "shape": list(model.image_shape),
            "variance": model.data_variance,
            "classes": list(dataset.classes),
            "note": dataset.note,
        },
        "examples": {
            "images": examples,
            "labels": dataset.test.labels[:kept].clone(),
        },
        "plots": str(plot_folder),
    }
    first = distributed.rank() == 0
    run = Run(folder, facts, resume_at=resumed["step"] if resumed else None) if first else NullRun(folder)
    print(summary(config, plan, dataset, stage, folder, resumed))
    log_images = image_logger(stage, run, examples, plot_folder / "generated_samples")
    results = fit(stage, plan, run, after_epoch=log_images, resume=resumed)
    run.close(results)
    distributed.barrier()  # a second stage reads what the first process wrote
    if results is None:
        print(f"interrupted; saved {folder / 'checkpoint.pt'}. Resume with: {cli.program('train')} --resume {folder}")
        return None
    print(f"done. Look at it: {cli.program('visualize')} --checkpoint {folder / 'checkpoint.pt'}")
    return folder


def how_it_starts(given: Mapping[str, Any], resume: str | None) -> Start:
    """Read the checkpoint that a run resumes from or trains a prior for, if any."""
    if resume is not None:
        path = checkpoint.locate(resume)
        return Resumed(path.parent, checkpoint.read(path))
    if "checkpoint" not in given:
        return Fresh()
    content = checkpoint.read(given["checkpoint"])
    if content["kind"] != "autoencoder":
        problem = "is a prior's checkpoint; name the autoencoder's that it was trained on"
        raise OptionError("", "checkpoint", given["checkpoint"], problem)
    return StageTwo(given["checkpoint"], content)


def plan_of(config: Config) -> Plan:
    """How long, how fast and on what a run trains."""
    device = choose_device(config.device)
    return Plan(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=Schedule.parse(config.lr, "lr"),
        weight_decay=config.weight_decay,
        seed=config.seed,
        device=device,
        precision=choose_precision(config.precision, device),
        log_every=config.log_every,
        save_every=interval(config.checkpoint_every) or (None, 300.0),
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
        patience=config.patience,
    )


def name_run(config: Config) -> Path:
    """The folder of a new run. A name that was asked for must be free; a default one is numbered until it is."""
    logs, plot_dir = Path(config.log_dir), Path(config.plot_dir)
    config.name = config.name or free_name(default_name(config), logs, plot_dir)
    if (logs / config.name).exists():
        claim(logs / config.name)
    return logs / config.name


def load_data(config: Config) -> Dataset:
    return data.load(
        config.dataset.name,
        data_dir=config.data_dir,
        image_size=config.image_size,
        limit=config.limit,
        **config.dataset.options,
    )


def stage_one(config: Config, dataset: Dataset, plan: Plan, start: Start) -> tuple[Stage, Autoencoder]:
    """The whole autoencoder, trained on images."""
    images, test = dataset.train.images, dataset.test
    resumed = start.content if isinstance(start, Resumed) else None
    total_steps = plan.total_steps(len(images))
    model = build_autoencoder(
        {slot: getattr(config, slot) for slot in autoencoder.SLOTS},
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        data_variance=resumed["data"]["variance"] if resumed else pixel_variance(images),
        num_classes=len(dataset.classes) if config.conditional else 0,
        total_steps=total_steps,
    )
    model.likelihood.check(images)
    module = AutoencoderTraining(model, build(objectives.SLOT, config.objective, {"total_steps": total_steps}))
    if resumed:
        module.restore_state(resumed)
    module.to(plan.device)
    compiled = choose_compile(config.compile, plan.device, total_steps)
    if compiled:
        model.encoder.compile()
        model.decoder.compile()
    stage = Stage(
        module,
        images,
        dataset.train.labels,
        evaluate=lambda: evaluate(model, test.images, test.labels, seed=config.seed),
        draw=(lambda: model.reconstruct(test.images[:EXAMPLES_KEPT])) if model.shows_images else None,
        caption="reconstructions",
        compiled=compiled,
    )
    return stage, model


def stage_two(config: Config, dataset: Dataset, plan: Plan, start: Start) -> tuple[Stage, Autoencoder]:
    """A prior, trained on the codes of a frozen autoencoder."""
    path = str(config.checkpoint)
    if isinstance(start, Resumed):  # the checkpoint holds the new prior
        model = checkpoint.restore(start.content, path)
    elif isinstance(start, StageTwo):
        model = checkpoint.restore(start.content, path, new_prior=config)
    model.to(plan.device)
    if model.discrete is None:
        raise OptionError("", "checkpoint", path, "its latent is continuous; stage two trains priors over codes")
    if not any(True for _ in model.prior.parameters()):
        problem = "has no parameters to train; try unigram, pixelcnn or transformer"
        raise OptionError("", "prior", config.prior.name, problem)
    # next to the autoencoder, so that every prior trained on its codes finds them
    folder = checkpoint.locate(path).parent
    with distributed.first_goes_first():  # the others read what the first stores
        codes = extract_codes(model, dataset.train.images, folder / "codes-train.npz")
        held_out = extract_codes(model, dataset.test.images, folder / "codes-test.npz")
    module = PriorTraining(model, conditional=config.conditional)
    compiled = choose_compile(config.compile, plan.device, plan.total_steps(len(codes)))
    if compiled:
        module.compile()

    def sample() -> Tensor:
        labels = torch.arange(EXAMPLES_KEPT, device=plan.device) % max(len(dataset.classes), 1)
        generator = torch.Generator(plan.device).manual_seed(config.seed)
        return model.sample(EXAMPLES_KEPT, labels=labels if config.conditional else None, generator=generator)

    stage = Stage(
        module,
        codes,
        dataset.train.labels,
        evaluate=lambda: module.evaluate(held_out, dataset.test.labels),
        draw=sample,
        caption="samples",
        compiled=compiled,
    )
    return stage, model


def image_logger(stage: Stage, run: Run | NullRun, originals: Tensor, folder: Path) -> Callable[[int, int], None]:
    """Draw the held-out originals now; returns a function that draws the stage's images after an epoch."""
    draw = stage.draw
    if draw is None or distributed.rank() > 0:
        return lambda epoch, step: None
    name = run.folder.name
    plots.image_grid(originals, folder / "original.png", title=f"{name}: held-out originals")
    run.log_images("originals", plots.montage(originals), 0)

    def log_images(epoch: int, step: int) -> None:
        stage.module.eval()
        with torch.random.fork_rng():
            images = draw().cpu()
        stage.module.train()
        path = folder / f"epoch_{epoch:03d}.png"
        plots.image_grid(images, path, title=f"{name}: {stage.caption}, epoch {epoch}")
        run.log_images(stage.caption, plots.montage(images), step)

    return log_images


def summary(
    config: Config, plan: Plan, dataset: Dataset, stage: Stage, folder: Path, resumed: dict[str, Any] | None
) -> str:
    """The run in five lines."""
    shape = "x".join(map(str, dataset.train.images.shape[1:]))
    parameters = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    processes = f" over {distributed.world()} processes" if distributed.world() > 1 else ""
    return "\n".join([
        f"run    {folder}" + (f", resumed at step {resumed['step']}" if resumed else ""),
        f"data   {dataset.name}: {len(dataset.train.images):,} train, {len(dataset.test.images):,} held out, {shape}"
        + (f" ({dataset.note})" if dataset.note else ""),
        f"model  {config.nets.name} nets, {config.bottleneck}",
        f"       {config.likelihood.name} likelihood, {config.prior} prior; {parameters:,} parameters to train",
        f"on     {plan.device}, {plan.precision}{', compiled' if stage.compiled else ''}, "
        f"batch {config.batch_size}{processes}, seed {config.seed}",
    ])  # fmt: skip


def evaluate_checkpoint(given: dict[str, Any], iw_samples: int) -> int:
    """Print the held-out metrics of a checkpoint, and store them next to it as JSON; returns the exit code."""
    path = checkpoint.locate(given.pop("checkpoint"))
    content = checkpoint.read(path)
    config = configure(given, Resumed(path.parent, content), SLOTS)
    dataset = load_data(config)
    model = checkpoint.restore(content, str(path)).to(choose_device(config.device))
    results = evaluate(model, dataset.test.images, dataset.test.labels, iw_samples=iw_samples, seed=config.seed)
    results.pop("usage", None)
    if dataset.entropy is not None:
        results |= {"data_entropy": dataset.entropy, "gap": results["neg_elbo"] - dataset.entropy}
    table = {
        "run": content["run"],
        "data": dataset.name,
        "note": dataset.note,
        "likelihood": config.likelihood.name,
        "prior": config.prior.name,
        "images": len(dataset.test.images),
        "step": content["step"],
        "seed": config.seed,
        "iw_samples": iw_samples,
        **results,
    }
    out = path.with_name("evaluation.json")
    write_json(out, table)
    width = max(map(len, table))
    for key, value in table.items():
        print(f"{key:{width}}  {value:,.6g}" if isinstance(value, float) else f"{key:{width}}  {value}")
    print(f"stored in {out}")
    return 0


def listing(what: str) -> str:
    """The members of a slot with their options: what `--list` prints."""
    if what not in LISTINGS:
        problem = f"no such list{near_misses(what, LISTINGS)}; known: {', '.join(LISTINGS)}, presets"
        raise OptionError("", "list", what, problem)
    return cli.describe(SLOTS[LISTINGS[what]])
