"""A config becomes data, a model and a training run; a checkpoint becomes held-out metrics."""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqvae import (
    autoencoder,
    checkpoint,
    cli,
    data,
    distributed,
    interrupts,
    metrics,
    objectives,
    plots,
    report,
    run_data,
    summary,
    two_stages,
)
from vqvae.assessment import Asked, assess, assess_end, with_earlier
from vqvae.autoencoder import Autoencoder, build_autoencoder, unit_range
from vqvae.config import (
    FIELDS,
    TEST,
    Config,
    Fresh,
    Initialized,
    Resumed,
    StageTwo,
    Start,
    as_typed,
    configure,
    default_name,
    interval,
)
from vqvae.contracts import OptimizerName, evaluating
from vqvae.data import Dataset
from vqvae.data.batches import augmentation, pixel_variance
from vqvae.devices import choose_compile, choose_device, choose_precision
from vqvae.errors import OptionError, UserError, naming, near_misses, printable
from vqvae.evaluation import evaluate
from vqvae.features import load_nets
from vqvae.files import make_folder, remove_parts, write_json
from vqvae.presets import PRESETS
from vqvae.priors import PRIORS
from vqvae.randomness import forked, generator, stream
from vqvae.registry import brief, build
from vqvae.runs import LAST, Lock, NullRun, Run, claim, claim_free, list_unreadable, refuse_saved
from vqvae.schedules import Schedule, parse_rate
from vqvae.stage_one import AutoencoderTraining
from vqvae.stage_two import PriorTraining, extract_codes
from vqvae.training import AfterEpoch, Plan, Stage, fit
from vqvae.two_stages import second_stage

SLOTS = {"dataset": data.SLOT, **autoencoder.SLOTS, "objective": objectives.SLOT}
LISTINGS = {
    "data": "dataset", "nets": "nets", "bottlenecks": "bottleneck", "priors": "prior", "likelihoods": "likelihood",
    "objectives": "objective",
}  # fmt: skip
EXAMPLES_KEPT, POINTS_KEPT = 64, 2000  # held-out images or points in a checkpoint, so that plots need no data
MAPS_SHOWN = 16  # held-out images whose codes TensorBoard shows


def run(given: dict[str, Any], resume: str | None = None) -> int:
    """Train what the settings describe, both stages of a preset that has two; returns the exit code."""
    rescan = given.pop("rescan", False)
    preset = PRESETS.get(given.get("preset", ""))
    second = second_stage(given, preset.prior) if preset and preset.prior and resume is None else None
    try:
        folder = train(given, resume, rescan=rescan, second=second)
        if folder and second:
            if interrupts.received is None:
                folder = train(second | two_stages.start_of(folder))
            else:
                print(two_stages.how_to_go_on(second, folder))
    finally:
        distributed.stop()
    return 0 if folder else 130


def train(
    given: Mapping[str, Any],
    resume: str | None = None,
    *,
    rescan: bool = False,
    second: Mapping[str, Any] | None = None,
) -> Path | None:
    """Train one stage from the settings given; returns its run folder, or None when interrupted.

    `rescan` converts all images of the data again. `second` are the settings of a stage that is to follow.
    """
    with Lock() as lock:
        try:
            return _train(given, resume, lock, rescan, second)
        except OptionError as problem:
            raise as_typed(problem, given) from None


def _train(
    given: Mapping[str, Any], resume: str | None, lock: Lock, rescan: bool, second: Mapping[str, Any] | None
) -> Path | None:
    start = how_it_starts(given, resume, lock)
    resumed = start.content if isinstance(start, Resumed) else None
    config = configure(given, start, SLOTS)
    plan = plan_of(config)
    following = None
    if second:  # checked before the data are read
        following = configure({**second, "checkpoint": LAST}, StageTwo(LAST, {"config": config.to_dict()}), SLOTS)
    # a resumed run keeps what was chosen first, on any machine and in any version
    config.precision, config.optimizer = plan.precision, plan.optimizer
    distributed.start(plan.device)
    if config.name and not resumed:
        wanted = Path(config.log_dir, config.name)
        distributed.on_first(lambda: refuse_saved(wanted))  # before the data are read
    dataset = run_data.load_shared(config, rescan=rescan)
    if config.conditional:
        dataset.need_classes("conditional")

    plan = plan._replace(augment=augmentation(config.augment, dataset.train.images))
    if config.checkpoint:
        plan = plan._replace(data_shards=1)  # every process gets the codes of all parts of the data
    plan.check(len(dataset.train.images) * config.data_shards)
    torch.manual_seed(stream(config.seed, "weights"))
    build_stage = stage_two if config.checkpoint else stage_one
    stage, model, drawing = build_stage(config, dataset, plan, start)
    about = run_data.describe(dataset, model)
    if resumed:
        run_data.compare(resumed["data"], about, config)
    else:
        refuse_idle_weights(given, config, model)
    folder, plot_folder = choose_folders(given, config, start, lock)
    if following:
        two_stages.check(following, plan_of(following), dataset, model, folder)
    shown_plots = Path(config.plot_dir) / plot_folder.name  # as it was typed
    distributed.on_lost_process(lambda: summary.how_to_go_on(folder, shown_plots))
    facts = describe_run(config, about, dataset, model, plot_folder)
    run = Run(folder, facts, lock, compared(config)) if distributed.rank() == 0 else NullRun(folder)
    images_folder = plot_folder / "generated_samples"

    def on_start() -> None:
        print(summary.opening(config, plan, dataset, stage, model, folder, resumed["step"] if resumed else 0))
        if distributed.rank() == 0:
            if resumed:
                summary.warn_of_new_length(resumed, plan, stage)
            else:
                summary.warn_of_few_updates(config, plan, len(stage.examples))
                if isinstance(start, Initialized):
                    summary.warn_of_seen_images(start.content["data"], about)
            list_unreadable(folder, dataset.unreadable)
            make_folder(Path(config.plot_dir), "plot_dir")  # first, so that an error shows the folder as it was typed
            make_folder(plot_folder, "plot_dir")
            remove_parts(images_folder)
            if drawing:
                title = f"{printable(folder.name)}: held-out originals"
                plots.image_grid(facts["examples"]["images"], images_folder / "original.png", title=title)

    with contextlib.closing(run):
        log_images = image_logger(stage, drawing, run, images_folder, plan.device)
        if resumed and distributed.on_first(lambda: lacks_evaluation(resumed, folder, plan, stage)):
            run.start(resumed, at_end=True)
            on_start()
            results: dict[str, float] | None = {}
        else:
            with explaining(lambda: summary.how_to_go_on(folder, shown_plots)):
                results = fit(stage, plan, run, on_start=on_start, after_epoch=log_images, resume=resumed)
        if results is not None:
            with explaining(lambda: f"the run is complete; {summary.how_to_evaluate(folder)}"):
                results = assess_end(run, dataset, stage.module.headline, plan.device)
        run.close(results)
    distributed.barrier()  # a second stage reads what the first process wrote
    if results is None:
        print(f"interrupted; {summary.how_to_go_on(folder, shown_plots)}")
        if second and (folder / LAST).exists():
            print(two_stages.how_to_go_on(second, folder))
        return None
    print(summary.closing(folder, shown_plots))
    if resumed and (line := two_stages.missing(config, folder)):
        print(line)
    return folder


def lacks_evaluation(resumed: dict[str, Any], folder: Path, plan: Plan, stage: Stage) -> bool:
    """Whether a run has taken all of its steps, and was killed before the test split was evaluated."""
    if resumed["step"] < plan.total_steps(len(stage.examples)):
        return False
    with contextlib.suppress(UserError):  # a damaged evaluation is none
        return checkpoint.read_evaluation(folder / LAST, resumed) is None
    return True


@contextlib.contextmanager
def explaining(line: Callable[[], str]) -> Iterator[None]:
    """Add how to go on to the message of a Ctrl-C before the first step, or of a second Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        stopped.args = (line(),)
        raise


def compared(config: Config) -> dict[str, str | float]:
    """The settings in which runs differ most, for TensorBoard's table: choices with the options that were chosen."""
    slots: dict[str, str | float] = {slot: str(brief(SLOTS[slot], getattr(config, slot))) for slot in SLOTS}
    return slots | {"lr": config.lr, "batch_size": config.batch_size, "epochs": config.epochs, "seed": config.seed}


def choose_folders(given: Mapping[str, Any], config: Config, start: Start, lock: Lock) -> tuple[Path, Path]:
    """The run's folder, taken for this process, and its folder of plots.

    Names and places inside a checkpoint choose neither: it may come from anywhere.
    """
    folder = start.folder if isinstance(start, Resumed) else distributed.on_first(lambda: name_run(config, lock))
    config.name = printable(Path(os.path.abspath(folder)).name)  # of a folder that was renamed to anything
    if "plot_dir" not in given:
        config.plot_dir = Config.plot_dir
        FIELDS["plot_dir"].check(config.plot_dir)
    return folder, Path(config.plot_dir).resolve() / config.name


def refuse_idle_weights(given: Mapping[str, Any], config: Config, model: Autoencoder) -> None:
    """Raise `OptionError` for a typed weight, other than 0, of terms that are constant for this model."""
    if model.bottleneck.stochastic or config.checkpoint:
        return
    reasons = {"entropy_scale": "the posterior is one code, so that log q is 0"}
    if not model.prior.has_parameters:
        constant = f"with one code and the prior {config.prior.name}, log q(z|x) - log p(z) is constant"
        reasons |= dict.fromkeys(("kl_weight", "free_bits"), constant)
    typed = {*given, *(given["objective"].options if "objective" in given else ())}
    for key, reason in reasons.items():
        if key in typed and any(Schedule.parse(str(value := config.objective.options[key])).values()):
            problem = f"has no effect, because {reason}; leave it out"
            raise OptionError(key, value, problem, owner=config.objective.name, slot="objective")


def describe_run(
    config: Config, about: dict[str, Any], dataset: Dataset, model: Autoencoder, plots: Path
) -> dict[str, Any]:
    """The description of a run in all of its checkpoints."""
    kept = EXAMPLES_KEPT if model.shows_images else POINTS_KEPT
    return {
        "kind": "prior" if config.checkpoint else "autoencoder",
        "run": config.name,
        "config": config.to_dict(),
        "data": about,
        "examples": {
            "images": dataset.held_out.images[:kept].clone(),
            "labels": dataset.held_out.labels[:kept].clone(),
        },
        "plots": str(plots),
    }


def how_it_starts(given: Mapping[str, Any], resume: str | None, lock: Lock) -> Start:
    """How a run starts: reads the checkpoint that it resumes (and locks the run), starts from or trains a prior for."""
    if resume is not None:
        path = checkpoint.locate(resume)
        folder = path.parent
        if not os.path.lexists(resume):
            runs = [file.parent.name for file in Path(resume).parent.glob(f"*/{LAST}")]
            near = near_misses(Path(resume).name, runs)
            raise OptionError("resume", resume, f"no such run{near}; name its folder, or its checkpoint.pt")
        if path.name not in ("checkpoint.pt", "best.pt"):
            raise OptionError("resume", resume, "name the run's folder, or its checkpoint.pt")
        with naming("resume", resume):
            if not path.exists() and any(folder.glob("*.safetensors")):
                raise UserError("an exported model, which has no training to resume; --init-from trains on from it")
            if (folder / "config.json").exists() and os.environ.get("RANK", "0") == "0":
                lock.take(folder)
            if Path(resume).is_dir() and lock.path and not path.exists():
                problem = "was stopped before its first checkpoint; start it again, with the flags it had and"
                name = shlex.quote(Path(os.path.abspath(folder)).name)
                raise OptionError("resume", resume, f"{problem} --name {name}")
            content = checkpoint.read(path)
            checkpoint.verify(content, str(path))
            return Resumed(folder, content)
    if "checkpoint" not in given and "init_from" in given:
        with naming("init_from", given["init_from"]):
            content = checkpoint.read_model(given["init_from"])
            checkpoint.verify(content, given["init_from"])
        return Initialized(content)
    if "checkpoint" not in given:
        return Fresh()
    with naming("checkpoint", given["checkpoint"]):
        content = checkpoint.read(given["checkpoint"])
    if content["kind"] != "autoencoder":
        problem = "is a prior's checkpoint; name the autoencoder's that it was trained on"
        raise OptionError("checkpoint", given["checkpoint"], problem)
    return StageTwo(given["checkpoint"], content)


def choose_optimizer(config: Config) -> OptimizerName:
    if config.optimizer != "auto":
        return config.optimizer
    return PRIORS[config.prior.name].optimizer if config.checkpoint else "muon"


def plan_of(config: Config) -> Plan:
    """How long, how fast and on what a run trains."""
    device = choose_device(config.device)
    lr, plateau = parse_rate(config.lr)
    return Plan(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=lr,
        weight_decay=config.weight_decay,
        optimizer=choose_optimizer(config),
        seed=config.seed,
        device=device,
        precision=choose_precision(config.precision, device),
        log_every=config.log_every,
        checkpoint_every=interval(config.checkpoint_every) or (None, 300.0),
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
        patience=config.patience,
        held_out=config.held_out,
        accumulate=config.accumulate,
        on_nan=config.on_nan,
        plateau=plateau,
        clip=config.clip,
        ema_weights=config.ema_weights,
        save_every=config.save_every,
        shuffle=config.shuffle,
        data_shards=config.data_shards,
    )


def name_run(config: Config, lock: Lock) -> Path:
    """Take the folder of a new run. A name that was asked for must be free; a default one is numbered until it is."""
    logs = Path(config.log_dir)
    if config.name is None:
        return claim_free(default_name(config), logs, Path(config.plot_dir), lock)
    claim(logs / config.name, lock)
    return logs / config.name


class Drawing(NamedTuple):
    """The images that a stage shows after an epoch."""

    draw: Callable[[], Tensor]  # images [N, C, H, W] in [0, 1]
    caption: str  # what they are
    originals: Tensor | None = None  # [N, C, H, W] in [0, 1], what they reconstruct
    code_maps: Callable[[], Tensor] | None = None  # images [N, 3, H, W] uint8: originals and their codes as colors


Built = tuple[Stage, Autoencoder, Drawing | None]  # None of points, which are no images


def stage_one(config: Config, dataset: Dataset, plan: Plan, start: Start) -> Built:
    """The whole autoencoder, trained on images."""
    images, held_out = dataset.train.images, dataset.held_out
    resumed = start.content if isinstance(start, Resumed) else None
    total_steps = plan.total_steps(len(images))
    model = build_autoencoder(
        {slot: getattr(config, slot) for slot in autoencoder.SLOTS},
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        data_variance=resumed["data"]["variance"] if resumed else distributed.on_first(lambda: pixel_variance(images)),
        num_classes=len(dataset.classes) if config.conditional else 0,
        total_steps=total_steps,
    )
    model.likelihood.check(images)
    objective = build(objectives.SLOT, config.objective, {"total_steps": total_steps})
    module = AutoencoderTraining(model, objective, fitted=isinstance(start, Initialized))
    if resumed:
        module.restore_state(resumed)
    if isinstance(start, Initialized):
        path, there, here = config.init_from, start.content["data"]["shape"][0], images.shape[1]
        if there != here:
            problem = f"its images have {there} channels, and those of the data {here}; name data with {there}"
            raise OptionError("init_from", path, problem)
        with naming("init_from", path):
            checkpoint.transfer(start.content, model, str(path))
    module.to(plan.device)
    compiled = choose_compile(config.compile, plan.device, total_steps)
    if compiled:
        model.encoder.compile()
        model.decoder.compile()
    stage = Stage(
        module,
        images,
        dataset.train.labels,
        evaluate=lambda: evaluate(model, *held_out, seed=config.seed),
        redraw=None if dataset.probabilities is None else lambda epoch: dataset.training_images(config.seed, epoch),
        compiled=compiled,
    )
    if not model.shows_images:
        return stage, model, None
    codes, shown, mapped = model.discrete, held_out.images[:EXAMPLES_KEPT], held_out.images[:MAPS_SHOWN]
    drawing = Drawing(
        lambda: model.reconstruct(shown),
        "reconstructions",
        originals=unit_range(shown),
        code_maps=(lambda: report.code_maps(model, codes, mapped)) if codes else None,
    )
    return stage, model, drawing


def stage_two(config: Config, dataset: Dataset, plan: Plan, start: Start) -> Built:
    """A prior, trained on the codes of a frozen autoencoder."""
    path = str(config.checkpoint)
    if isinstance(start, Resumed):  # its checkpoint has the new prior
        model = checkpoint.restore(start.content, path)
    elif isinstance(start, StageTwo):
        with torch.random.fork_rng(devices=[]):  # this model must not change the draws of the new prior's weights
            if checkpoint.restore(start.content, path).discrete is None:
                problem = "its latent is continuous; name a model with codes, on which stage two trains a prior"
                raise OptionError("checkpoint", path, problem)
        model = checkpoint.with_new_prior(start.content, path, config, len(dataset.classes))
    model.to(plan.device)
    two_stages.need_parameters(model.prior, config.prior.name)
    # next to the autoencoder, so that every prior trained on its codes finds them; paths in a checkpoint are not used
    folder = start.folder if isinstance(start, Resumed) else checkpoint.locate(path).parent
    codes = extract_codes(model, dataset.train.images, folder / "codes-train.npz", parts=config.data_shards)
    held_out = extract_codes(model, dataset.held_out.images, folder / f"codes-{plan.held_out}.npz")
    module = PriorTraining(model, conditional=config.conditional)
    compiled = choose_compile(config.compile, plan.device, plan.total_steps(len(codes)))
    if compiled:
        module.compile()

    def sample() -> Tensor:
        labels = torch.arange(EXAMPLES_KEPT, device=plan.device) % max(len(dataset.classes), 1)
        draws = generator(config.seed, "samples", device=plan.device)
        return model.sample(EXAMPLES_KEPT, labels=labels if config.conditional else None, generator=draws)

    stage = Stage(
        module,
        codes,
        distributed.rows_of_parts(dataset.train.labels, config.data_shards),
        evaluate=lambda: module.evaluate(held_out, dataset.held_out.labels, config.seed),
        compiled=compiled,
    )
    return stage, model, Drawing(sample, "samples") if model.shows_images else None


def image_logger(stage: Stage, drawing: Drawing | None, run: Run, folder: Path, device: torch.device) -> AfterEpoch:
    """A function that draws the stage's images after an epoch, and the code usage for TensorBoard."""

    def log_images(epoch: int, step: int, usage: Tensor | None) -> None:
        if distributed.rank() > 0:
            return
        if usage is not None:
            run.log_images("code_usage", plots.usage_bars(usage), step)
        if drawing is None:
            return
        with evaluating(stage.module), forked(device):
            images = drawing.draw().cpu()
            if drawing.code_maps is not None:
                run.log_images("code_maps", plots.montage(drawing.code_maps()), step)
        path = folder / f"epoch_{epoch:03d}.png"
        plots.image_grid(images, path, title=f"{printable(run.folder.name)}: {drawing.caption}, epoch {epoch}")
        if drawing.originals is not None:  # next to each other, in TensorBoard
            images = torch.stack([drawing.originals, images], dim=1).flatten(0, 1)
        run.log_images(drawing.caption, plots.montage(images), step)

    return log_images


def evaluate_checkpoint(
    given: dict[str, Any],
    asked: Asked,
    output: str | None,
    *,
    words: Sequence[str] = (),
    weights: Sequence[str] = (),
) -> int:
    """Print the metrics of a checkpoint on the test split, and store them as JSON in `output`, or next to it.

    `words` asks for metrics in the features of nets whose `weights` are files. Several processes share the images.
    Returns the exit code.
    """
    named = given.pop("checkpoint")
    path = checkpoint.locate(named)
    with naming("checkpoint", named):
        content = checkpoint.read(path)
    config = configure(given, Resumed(path.parent, content), SLOTS)
    device = choose_device(config.device)
    asked = asked._replace(nets=load_nets(words, weights, device))
    distributed.start(device)
    try:
        return _evaluate(content, path, config, device, asked, output)
    finally:
        distributed.stop()


def _evaluate(
    content: dict[str, Any], path: Path, config: Config, device: torch.device, asked: Asked, output: str | None
) -> int:
    if config.data_shards == 1 or asked.probed:
        config = replace(config, validation=TEST, data_shards=1)  # nothing is chosen any more
    with distributed.first_goes_first(min(config.data_shards, distributed.world())):
        dataset = run_data.load(config)
    run_data.compare_classes(content["data"]["classes"], dataset.classes, config)
    run_data.compare_test(content["data"], dataset)
    about, results = assess(path, content, dataset, device, asked)
    table = about | results
    width = max(map(len, table))
    for key, value in table.items():
        print(f"{key:{width}}  {value:,.6g}" if isinstance(value, float) else f"{key:{width}}  {value}")
    out = checkpoint.evaluation_of(path) if output is None else Path(output)
    if output is None:
        earlier: dict[str, Any] | None = None
        with contextlib.suppress(UserError):  # a damaged file is replaced
            earlier = distributed.on_first(lambda: checkpoint.read_evaluation(path, content))
        table = with_earlier(table, earlier)
    try:
        distributed.on_first(lambda: write_json(out, metrics.for_json(table)))
        print(f"stored in {out}")
    except UserError as problem:
        if output is not None:
            raise
        print(f"not stored: {problem}; choose a file with --output")  # a folder that may only be read
    return 0


def listing(what: str) -> str:
    """The members of a slot with their options: what `--list` prints."""
    if what not in LISTINGS:
        problem = f"no such list{near_misses(what, LISTINGS)}; known: {', '.join(LISTINGS)}, presets"
        raise OptionError("list", what, problem)
    return cli.describe(SLOTS[LISTINGS[what]])
