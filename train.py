#!/usr/bin/env python3
"""Train a vector-quantised or variational autoencoder on images: parse the command line, build, fit."""

import sys
from pathlib import Path

from vqvae.config import (
    LISTINGS,
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
  python train.py --list bottlenecks                    members, options, defaults and sources

what the numbers mean
  MSE         of pictures in [0, 1]; nmse is MSE over the data's variance, as Sonnet prints it
  PSNR        peak signal to noise ratio in dB; higher is better
  commitment  mean squared distance of the encoder's vectors to their codes
  perplexity  how many codes, used equally often, would be as varied as the use of the codebook: K at best; a low
              one means that the codebook has collapsed. Over the whole split, unless named batch_perplexity
  active      codes used at least once on the held-out split

Watch a run with `tensorboard --logdir logs`, look at it with `python visualize_codes.py --checkpoint
logs/<run>/checkpoint.pt`. Ctrl-C saves, and prints the command that goes on.
"""

EXAMPLES_KEPT = {"image": 64, "point": 2000}  # held-out examples stored in a checkpoint, so that figures need no data


def main(argv: list[str] | None = None) -> int:
    try:
        cli = parser(__doc__, EXAMPLES)
        other = cli.add_argument_group("other")
        other.add_argument("--resume", metavar="RUN", help="go on with logs/<run> exactly where it stopped")
        other.add_argument("--list", metavar="WHAT", help=f"print members with options and sources: {', '.join(LISTINGS)}")
        given = vars(cli.parse_args(argv))
        if "list" in given:
            return print_list(given["list"])
        return train(given, given.pop("resume", None))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


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


def train(given: dict, resume: str | None) -> int:
    import torch

    from vqvae import checkpoint, data, figures
    from vqvae.autoencoder import SLOTS, Objective, build_autoencoder
    from vqvae.evaluation import evaluate
    from vqvae.members import resolve
    from vqvae.runs import Run, claim, free_name
    from vqvae.schedules import Schedule
    from vqvae.training import Plan, fit

    stopped = checkpoint.read(Path(resume) / "checkpoint.pt") if resume else None
    config = configure(given, Config.from_dict(stopped["config"]) if stopped else None)
    for key, slot in {"dataset": data.SLOT, **SLOTS}.items():
        setattr(config, key, resolve(slot, getattr(config, key)))
    lr, kl_weight = Schedule.parse("--lr", config.lr), Schedule.parse("--kl-weight", config.kl_weight)
    device = choose_device(config.device)

    if stopped:
        folder = Path(resume)
        config.name = folder.resolve().name
    else:
        logs, plots = Path(config.log_dir), Path(config.plot_dir)
        config.name = config.name or free_name(default_name(config), logs, plots)
        folder = logs / config.name
        if (folder / "config.json").exists():
            claim(folder)
    dataset = data.load(
        config.dataset.name,
        data_dir=Path(config.data_dir).expanduser(),
        image_size=config.image_size,
        limit=config.limit,
        **config.dataset.options,
    )
    train_set, test_set = dataset.train, dataset.test
    shape = tuple(train_set.images.shape[1:])
    variance = stopped["data"]["variance"] if stopped else data.variance(train_set.images)
    plan = Plan(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=lr,
        weight_decay=config.weight_decay,
        seed=config.seed,
        device=device,
        precision=config.precision,
        log_every=config.log_every,
        save_every=checkpoint_interval(config.checkpoint_every),
        max_steps=config.max_steps,
    )
    torch.manual_seed(config.seed)
    model = build_autoencoder(
        {slot: getattr(config, slot) for slot in SLOTS},
        image_shape=shape,
        data_variance=variance,
        objective=Objective(config.reduction, kl_weight, plan.total_steps(len(train_set.images))),
    )
    if stopped:
        model.load_state_dict(stopped["model"])
    model.to(device)
    if config.compile:
        model.encoder.compile()
        model.decoder.compile()

    kept = EXAMPLES_KEPT["point" if shape == (2, 1, 1) else "image"]
    shown = test_set.images[:kept].clone()
    plot_folder = Path(config.plot_dir).resolve() / config.name
    facts = {
        "kind": "autoencoder",
        "run": config.name,
        "config": config.to_dict(),
        "data": {
            "name": dataset.name,
            "shape": list(shape),
            "variance": variance,
            "classes": list(dataset.classes),
            "note": dataset.note,
        },
        "examples": {"images": shown, "labels": test_set.labels[:kept].clone()},
        "plots": str(plot_folder),
    }
    if plan.batch_size > len(train_set.images):
        raise UserError(f"--batch-size {plan.batch_size}: larger than the {len(train_set.images)} training examples")
    claim_pictures(plot_folder)
    run = Run(folder, facts, resume_at=stopped["step"] if stopped else None)
    print(introduce(config, dataset, model, device, folder, stopped))

    def draw(epoch: int, step: int, results: dict) -> None:
        if shape == (2, 1, 1):
            return
        pictures = model.eval().reconstruct(shown).cpu()
        model.train()
        path = plot_folder / "generated_samples" / f"epoch_{epoch:03d}.png"
        figures.image_grid(pictures, path, title=f"{config.name}: reconstructions, epoch {epoch}")
        run.pictures("reconstructions", figures.montage(pictures), step)

    if shape != (2, 1, 1):
        original = plot_folder / "generated_samples" / "original.png"
        figures.image_grid(shown, original, title=f"{config.name}: held-out originals")
        run.pictures("originals", figures.montage(shown), 0)
    results = fit(
        model,
        train_set.images,
        train_set.labels,
        plan,
        run,
        evaluate=lambda: evaluate(model, test_set.images, test_set.labels, seed=config.seed),
        after_epoch=draw,
        resume=stopped,
    )
    run.close(results)
    if results is None:
        print(f"interrupted; saved {folder / 'checkpoint.pt'}. Go on with: python train.py --resume {folder}")
    else:
        print(f"done. Look at it: python visualize_codes.py --checkpoint {folder / 'checkpoint.pt'}")
    return 0


def choose_device(name: str):
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise UserError(f"--device {name}: not available here; there is {', '.join(k for k, v in there.items() if v)}")
    return torch.device(name)


def claim_pictures(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--plot-dir {folder.parent}: cannot write there ({problem.strerror})") from None


def introduce(config, dataset, model, device, folder, stopped) -> str:
    """What is about to happen, in four lines."""
    shape = "x".join(map(str, dataset.train.images.shape[1:]))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"run        {folder}" + (f", resumed at step {stopped['step']}" if stopped else ""),
        f"data       {dataset.name}: {len(dataset.train.images):,} train, {len(dataset.test.images):,} held out, {shape}"
        + (f" ({dataset.note})" if dataset.note else ""),
        f"model      {config.nets.name} nets, {config.bottleneck}, {config.likelihood.name} likelihood, "
        f"{config.prior.name} prior; {parameters:,} parameters",
        f"on         {device}, {config.precision}, batch {config.batch_size}, seed {config.seed}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
