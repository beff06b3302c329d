#!/usr/bin/env python3
"""Train a vector-quantised or variational autoencoder on images, or a prior on the codes of a trained one."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vqvae.config import (
    LISTINGS,
    PRESETS,
    Config,
    checkpoint_interval,
    configure,
    default_name,
    describe_presets,
    parser,
)
from vqvae.errors import UserError, near_misses

EXAMPLES = """
examples
  python train.py                                       a VQ-VAE on scikit-learn's digits, no download
  python train.py --dataset cifar10 --epochs 50         Sonnet's VQ-VAE on CIFAR-10
  python train.py --dataset mnist --codes 128 --code-dim 32
  python train.py --preset sonnet-cifar10 --name paper  a published set-up; flags beside it win
  python train.py --dataset folder --data-dir ~/Pictures --image-size 64
  python train.py --bottleneck vq codebook=gradient init=uniform revive=0
  python train.py --lr linear:0:3e-4:500,cosine:3e-4:1e-6
  python train.py --resume logs/vqvae-cifar10 --epochs 80
  python train.py --prior pixelcnn --checkpoint logs/vqvae-cifar10/checkpoint.pt
  python train.py --evaluate --checkpoint logs/vqvae-cifar10/checkpoint.pt
  torchrun --nproc-per-node 2 train.py --dataset cifar10   the same batches, shared by two GPUs or processes
  python train.py --list bottlenecks                    members, options, defaults and sources

what the numbers mean
  MSE         of pictures in [0, 1]; nmse is MSE over the data's variance, as Sonnet prints it
  PSNR        peak signal to noise ratio in dB; higher is better
  -ELBO       -log p(x|z) + log q(z|x) - log p(z), nats per image; lower is better, comparable between models of the
              same likelihood
  commitment  mean squared distance of the encoder's vectors to their codes
  perplexity  how many codes, used equally often, would be as varied as the use of the codebook: K at best; a low
              one means that the codebook has collapsed. Over the whole split, unless named batch_perplexity
  active      codes used at least once on the held-out split
  bits/code   what the prior pays for a code; log2 K is what knowing nothing costs

Watch a run with `tensorboard --logdir logs`, look at it with `python visualize_codes.py --checkpoint
logs/<run>/checkpoint.pt`. Ctrl-C saves, and prints the command that goes on.
"""

EXAMPLES_KEPT, POINTS_KEPT = 64, 2000  # held-out pictures or points in a checkpoint, so that figures need no data


class Job(NamedTuple):
    """What one stage gives the loop: a module, its examples, held-out figures, and a picture after each epoch."""

    module: Any
    examples: Any  # images, or codes
    labels: Any
    evaluate: Callable[[], dict]
    picture: Callable[[], Any] | None  # [N, C, H, W] in [0, 1]
    caption: str
    compiled: bool = False


def main(argv: list[str] | None = None) -> int:
    try:
        cli = parser(__doc__, EXAMPLES)
        other = cli.add_argument_group("other")
        other.add_argument("--resume", metavar="RUN", help="go on with logs/<run> exactly where it stopped")
        other.add_argument("--list", metavar="WHAT", help=f"print members, options, sources: {', '.join(LISTINGS)}")
        other.add_argument("--evaluate", action="store_true", help="print the held-out figures of --checkpoint")
        other.add_argument("--iw-samples", metavar="S", help="draws for the importance-weighted bound of --evaluate")
        given = vars(cli.parse_args(argv))
        if "list" in given:
            return print_list(given["list"])
        if given.pop("evaluate", False):
            return evaluate_checkpoint(given)
        if "iw_samples" in given:
            raise UserError(f"--iw-samples {given['iw_samples']}: goes with --evaluate")
        resume = given.pop("resume", None)
        preset = PRESETS.get(given.get("preset", ""))
        second = second_stage(given, preset.prior) if preset and preset.prior else None
        from vqvae import ranks

        folder = train(given, resume)
        if folder and second:
            train(second | {"name": f"{folder.name}-prior", "checkpoint": str(folder / "checkpoint.pt")}, None)
        ranks.stop()
        return 0
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def second_stage(given: dict, settings: dict) -> dict:
    """The settings of a preset's second stage: its own, what was typed for the prior, and where and how long to run."""
    own = {key: given.pop(key) for key in ("prior", "conditional", "patience") if key in given}
    shared = ("device", "precision", "seed", "log_dir", "plot_dir", "log_every", "max_steps", "max_minutes")
    return settings | own | {key: given[key] for key in shared if key in given}


def print_list(what: str) -> int:
    if what not in LISTINGS:
        raise UserError(f"--list {what}: no such list{near_misses(what, LISTINGS)}; known: {', '.join(LISTINGS)}")
    if what == "presets":
        print(describe_presets())
        return 0
    from vqvae.autoencoder import SLOTS
    from vqvae.data import SLOT as DATA
    from vqvae.members import describe

    print(describe({"data": DATA, **SLOTS}[what if what in ("data", "nets") else what.removesuffix("s")]))
    return 0


def train(given: dict, resume: str | None) -> Path | None:
    """Train one stage from the settings given; its run folder, or None when interrupted."""
    import torch

    from vqvae import checkpoint, ranks
    from vqvae.data import augmentation
    from vqvae.runs import Bystander, Run
    from vqvae.training import fit

    stopped = checkpoint.read(Path(resume) / "checkpoint.pt") if resume else None
    stage_one = checkpoint.read(given["checkpoint"]) if "checkpoint" in given and not resume else None
    config = settle(given, stopped, stage_one)
    plan = plan_of(config)
    config.precision = plan.precision  # a resumed run keeps what was chosen, wherever it goes on
    ranks.start(plan.device)
    folder = Path(resume) if resume else ranks.on_first(lambda: name_run(config))
    config.name = config.name or folder.name
    with ranks.first_goes_first():
        dataset = load_data(config)
    if config.conditional and not dataset.classes:
        raise UserError(f"--conditional: --dataset {dataset.name} has no labels")

    plan = plan._replace(augment=augmentation(config.augment, dataset.train.images))
    torch.manual_seed(config.seed)
    if config.checkpoint:
        job, model = prior_job(config, dataset, plan, stopped or stage_one)
    else:
        job, model = autoencoder_job(config, dataset, plan, stopped)
    if plan.batch_size > len(job.examples):
        raise UserError(f"--batch-size {plan.batch_size}: larger than the {len(job.examples)} training examples")
    # a resumed run goes on drawing where it drew, from whichever folder it is resumed
    plot_folder = claim_pictures(Path(stopped["plots"]) if stopped else Path(config.plot_dir).resolve() / config.name)
    kept = EXAMPLES_KEPT if job.picture else POINTS_KEPT
    facts = {
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
            "images": dataset.test.images[:kept].clone(),
            "labels": dataset.test.labels[:kept].clone(),
        },
        "plots": str(plot_folder),
    }
    first = ranks.rank() == 0
    run = Run(folder, facts, resume_at=stopped["step"] if stopped else None) if first else Bystander(folder)
    print(introduce(config, plan, dataset, job, folder, stopped))
    results = fit(
        job.module,
        job.examples,
        job.labels,
        plan,
        run,
        evaluate=job.evaluate,
        after_epoch=painter(job, run, facts["examples"]["images"], plot_folder / "generated_samples"),
        resume=stopped,
    )
    run.close(results)
    ranks.barrier()  # a second stage finds what the first wrote
    if results is None:
        print(f"interrupted; saved {folder / 'checkpoint.pt'}. Go on with: python train.py --resume {folder}")
        return None
    print(f"done. Look at it: python visualize_codes.py --checkpoint {folder / 'checkpoint.pt'}")
    return folder


def settle(given: dict, stopped: dict | None, stage_one: dict | None) -> Config:
    """The run's settings with every member's options checked and spelt out, before any data is read."""
    from vqvae.autoencoder import SLOTS
    from vqvae.data import SLOT as DATA
    from vqvae.members import resolve

    if stage_one and stage_one["kind"] != "autoencoder":
        raise UserError(
            f"--checkpoint {given['checkpoint']}: is a prior's; name the autoencoder's that it was trained on"
        )
    config = configure(
        given,
        resumed=Config.from_dict(stopped["config"]) if stopped else None,
        stage_one=Config.from_dict(stage_one["config"]) if stage_one else None,
    )
    for key, slot in {"dataset": DATA, **SLOTS}.items():
        setattr(config, key, resolve(slot, getattr(config, key)))
    return config


def plan_of(config: Config):
    from vqvae.devices import choose_device, choose_precision
    from vqvae.schedules import Schedule
    from vqvae.training import Plan

    device = choose_device(config.device)
    return Plan(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=Schedule.parse("--lr", config.lr),
        weight_decay=config.weight_decay,
        seed=config.seed,
        device=device,
        precision=choose_precision(config.precision, device),
        log_every=config.log_every,
        save_every=checkpoint_interval(config.checkpoint_every),
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
        patience=config.patience,
    )


def name_run(config: Config) -> Path:
    """The folder of a fresh run; a name that was asked for must be free, a default one is numbered until it is."""
    from vqvae.runs import claim, free_name

    logs, plots = Path(config.log_dir), Path(config.plot_dir)
    config.name = config.name or free_name(default_name(config), logs, plots)
    if (logs / config.name).exists():
        claim(logs / config.name)
    return logs / config.name


def load_data(config: Config):
    from vqvae import data

    return data.load(
        config.dataset.name,
        data_dir=Path(config.data_dir).expanduser(),
        image_size=config.image_size,
        limit=config.limit,
        **config.dataset.options,
    )


def autoencoder_job(config: Config, dataset, plan, stopped: dict | None) -> tuple[Job, Any]:
    """Stage one: the whole autoencoder, on images."""
    from vqvae.autoencoder import SLOTS, Objective, build_autoencoder
    from vqvae.data import pixel_variance
    from vqvae.devices import choose_compile
    from vqvae.evaluation import evaluate
    from vqvae.schedules import Schedule

    train, test = dataset.train, dataset.test
    model = build_autoencoder(
        {slot: getattr(config, slot) for slot in SLOTS},
        image_shape=tuple(train.images.shape[1:]),
        data_variance=stopped["data"]["variance"] if stopped else pixel_variance(train.images),
        num_classes=len(dataset.classes) if config.conditional else 0,
        objective=Objective(
            reduction=config.reduction,
            kl_weight=Schedule.parse("--kl-weight", config.kl_weight),
            free_bits=config.free_bits,
            total_steps=plan.total_steps(len(train.images)),
            entropy_scale=config.entropy_scale,
            sum_over_latents=config.sum_over_latents,
            stop_gradient_for_prior=config.stop_gradient_for_prior,
            iaf_startup_steps=config.iaf_startup_steps,
            stop_training_encoder_after_startup=config.stop_training_encoder_after_startup,
        ),
    )
    if hasattr(model.likelihood, "check"):
        model.likelihood.check(train.images)
    if stopped:
        model.load_state_dict(stopped["model"])
    model.to(plan.device)
    compiled = choose_compile(config.compile, plan.device, model.objective.total_steps)
    if compiled:
        model.encoder.compile()
        model.decoder.compile()
    job = Job(
        model,
        train.images,
        train.labels,
        evaluate=lambda: evaluate(model, test.images, test.labels, seed=config.seed),
        picture=(lambda: model.reconstruct(test.images[:EXAMPLES_KEPT])) if model.shows_pictures else None,
        caption="reconstructions",
        compiled=compiled,
    )
    return job, model


def prior_job(config: Config, dataset, plan, start: dict) -> tuple[Job, Any]:
    """Stage two: a prior, on the codes of a frozen autoencoder."""
    import torch

    from vqvae import ranks
    from vqvae.checkpoint import restore
    from vqvae.devices import choose_compile
    from vqvae.stage_two import PriorTraining, extract_codes

    # beside the autoencoder, so that every prior trained on its codes finds them
    beside = Path(config.checkpoint)
    beside = beside if beside.is_dir() else beside.parent
    if start["kind"] == "prior":  # resumed: the checkpoint holds the new prior
        model = restore(start, config.checkpoint)
    else:
        model = restore(start, config.checkpoint, new_prior=config)
    model.to(plan.device)
    if model.bottleneck.num_codes is None:
        raise UserError(f"--checkpoint {config.checkpoint}: its latent is continuous; a prior is learnt over codes")
    if not any(True for _ in model.prior.parameters()):
        raise UserError(f"--prior {config.prior.name}: has nothing to learn; try unigram, pixelcnn or transformer")
    train, test = dataset.train, dataset.test
    with ranks.first_goes_first():  # the others read what it stores
        codes = {
            name: extract_codes(model, split.images, beside / f"codes-{name}.npz")
            for name, split in (("train", train), ("test", test))
        }
    module = PriorTraining(model, conditional=config.conditional)
    compiled = choose_compile(config.compile, plan.device, plan.total_steps(len(codes["train"])))
    if compiled:
        module.compile()

    def sampled() -> Any:
        labels = torch.arange(EXAMPLES_KEPT, device=plan.device) % max(len(dataset.classes), 1)
        generator = torch.Generator(plan.device).manual_seed(config.seed)
        return model.sample(EXAMPLES_KEPT, labels=labels if config.conditional else None, generator=generator)

    job = Job(
        module,
        codes["train"],
        train.labels,
        evaluate=lambda: module.evaluate(codes["test"], test.labels),
        picture=sampled,
        caption="samples",
        compiled=compiled,
    )
    return job, model


def painter(job: Job, run, originals, folder: Path) -> Callable[[int, int, dict], None]:
    """What to draw: the held-out originals now, the job's picture after every epoch."""
    from vqvae import ranks

    if job.picture is None or ranks.rank() > 0:
        return lambda epoch, step, results: None
    import torch

    from vqvae import figures

    figures.image_grid(originals, folder / "original.png", title=f"{run.folder.name}: held-out originals")
    run.pictures("originals", figures.montage(originals), 0)

    def paint(epoch: int, step: int, results: dict) -> None:
        job.module.eval()
        with torch.random.fork_rng():
            pictures = job.picture().cpu()
        job.module.train()
        path = folder / f"epoch_{epoch:03d}.png"
        figures.image_grid(pictures, path, title=f"{run.folder.name}: {job.caption}, epoch {epoch}")
        run.pictures(job.caption, figures.montage(pictures), step)

    return paint


def evaluate_checkpoint(given: dict) -> int:
    """Print the held-out figures of a checkpoint, and store them beside it as JSON."""
    from vqvae import checkpoint
    from vqvae.devices import choose_device
    from vqvae.evaluation import evaluate
    from vqvae.members import convert

    if "checkpoint" not in given:
        raise UserError("--evaluate: name the model with --checkpoint logs/<run>/checkpoint.pt")
    samples = convert(given.pop("iw_samples", 100), int, "--iw-samples")
    if samples < 1:
        raise UserError(f"--iw-samples {samples}: must be at least 1")
    path = checkpoint.locate(given.pop("checkpoint"))
    content = checkpoint.read(path)
    config = configure(given, resumed=Config.from_dict(content["config"]))
    dataset = load_data(config)
    model = checkpoint.restore(content, str(path)).to(choose_device(config.device))
    results = evaluate(model, dataset.test.images, dataset.test.labels, iw_samples=samples, seed=config.seed)
    results.pop("usage", None)
    if dataset.entropy is not None:
        results |= {"data_entropy": dataset.entropy, "gap": results["neg_elbo"] - dataset.entropy}
    held = {
        "run": content["run"],
        "data": dataset.name,
        "note": dataset.note,
        "likelihood": config.likelihood.name,
        "prior": config.prior.name,
        "images": len(dataset.test.images),
        "step": content["step"],
        "seed": config.seed,
        "iw_samples": samples,
        **results,
    }
    out = path.with_name("evaluation.json")
    out.write_text(json.dumps(held, indent=2) + "\n")
    width = max(map(len, held))
    print("\n".join(f"{key:{width}}  {value:,.6g}" if isinstance(value, float) else f"{key:{width}}  {value}"
                    for key, value in held.items()))  # fmt: skip
    print(f"stored in {out}")
    return 0


def claim_pictures(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--plot-dir {folder.parent}: cannot write there ({problem.strerror})") from None
    return folder


def introduce(config: Config, plan, dataset, job: Job, folder: Path, stopped: dict | None) -> str:
    """What is about to happen, in four lines."""
    from vqvae import ranks

    shape = "x".join(map(str, dataset.train.images.shape[1:]))
    parameters = sum(p.numel() for p in job.module.parameters() if p.requires_grad)
    lines = [
        f"run    {folder}" + (f", resumed at step {stopped['step']}" if stopped else ""),
        f"data   {dataset.name}: {len(dataset.train.images):,} train, {len(dataset.test.images):,} held out, {shape}"
        + (f" ({dataset.note})" if dataset.note else ""),
        f"model  {config.nets.name} nets, {config.bottleneck}",
        f"       {config.likelihood.name} likelihood, {config.prior} prior; {parameters:,} parameters to train",
        f"on     {plan.device}, {plan.precision}{', compiled' if job.compiled else ''}, batch {config.batch_size}"
        + (f" over {ranks.world()} processes" if ranks.world() > 1 else "")
        + f", seed {config.seed}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # for people, not for debuggers
    sys.exit(main())
