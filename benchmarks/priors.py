#!/usr/bin/env python3
"""Compare priors over the codes of trained autoencoders at equal training time: bits per code, and quality of samples.

Trains each prior with train.py: for the same number of minutes, for --epochs, or with --patience until its validation
loss no longer falls. The last two keep the epoch of the lowest validation loss. Then it measures the held-out cost of
the codes. On digits, a classifier trained on real digits also judges samples. It reports the share of samples for which
one class has a probability above 0.9, and the perplexity of the predicted classes (10 is balanced). For comparison, the
classifier also judges held-out digits, their reconstructions, and images of codes drawn uniformly. With --conditional,
priors know the class, and samples are of all classes in turn. The table then has the share of samples that the
classifier assigns to the class asked for. Prints a Markdown table; --output also writes it. Priors that were trained on
the same codes with the same settings are not trained again.

  python benchmarks/priors.py --checkpoint logs/mnist logs/cifar10 --minutes 5 3 --data-dir data
"""

import argparse
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import ROOT, commit, describe
from runs import key_of, table, write
from torch import Tensor, nn

from vqvae import checkpoint, load, run_data
from vqvae.checkpoint import weights_checksum
from vqvae.config import Config
from vqvae.data import Dataset
from vqvae.data.batches import batch_indices
from vqvae.files import write_json
from vqvae.priors import PRIORS as MEMBERS
from vqvae.priors.masked import Masked
from vqvae.runs import BEST, LAST
from vqvae.stage_two import PriorTraining, extract_codes

PRIORS = {
    "unigram": "unigram",
    "pixelcnn": "pixelcnn",
    "gated-pixelcnn": "gated-pixelcnn channels=64 layers=5 kernel=5",
    "transformer": "transformer",
    "transformer-dropout": "transformer dropout=0.1",  # for longer runs, which overfit without
    # on small grids convolutions learn faster without attention; the loop evaluates often with one draw, the table
    # averages DRAWS
    "masked": "masked layers=0 draws=1",
}
DRAWS = 8
VALIDATION = "0.05"  # of the training images, where the best epoch is kept
SAMPLES = 1000
FINISHED = "finished.json"  # in the folder of a run that was trained to its end
LABEL_DROP = "label_drop=0.1"  # of conditional priors: guidance needs it
COLUMNS = (
    "prior", "bits/code", "± s.e.", "code bits/dim", "parameters", "steps", "sure of samples", "classes",
    "of the class asked for",
)  # fmt: skip


def train(*flags: str) -> None:
    """Run train.py in a process of its own."""
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True, stdout=subprocess.DEVNULL)


def train_prior(name: str, first: Path, minutes: float, source: dict, args: argparse.Namespace) -> Path:
    """Train a prior on the codes of the run `first`, unless it is trained already; returns the prior's folder.

    `source` identifies the autoencoder and its data; the folder's name has a hash of it and of all settings.
    """
    minutes = min(minutes, 0.5) if name == "unigram" else minutes
    if chooses(args):
        given = {"patience": args.patience, "epochs": args.epochs}
        how = {name: value for name, value in given.items() if value} | {"validation": VALIDATION}
    else:
        how = {"minutes": minutes}
    how |= {"ema_weights": args.ema_weights} if args.ema_weights else {}
    how |= {"precision": args.precision} if args.precision != "fp32" else {}
    words = words_of(name, args)
    how |= {"conditional": True} if args.conditional else {}
    optimizer = MEMBERS[words.split()[0]].optimizer
    settings = {"prior": words, "lr": args.lr, "optimizer": optimizer, "batch_size": 64, "seed": args.seed} | how
    run = first.parent / f"{first.name}-{name}-{key_of(settings | source)}"
    if chooses(args) and (run / LAST).exists() and not (run / FINISHED).exists():
        train("--resume", str(run))
    elif not finished(run):
        train(
            "--prior", *words.split(), "--checkpoint", str(first), "--lr", args.lr, "--batch-size", "64",
            "--epochs", str(args.epochs or 10_000), "--seed", str(args.seed), "--data-dir", args.data_dir,
            "--ema-weights", str(args.ema_weights), "--precision", args.precision,
            *(["--validation", VALIDATION] if chooses(args) else ["--max-minutes", str(minutes)]),
            *(["--patience", str(args.patience)] if args.patience else []),
            *(["--conditional"] if args.conditional else []),
            "--name", run.name, "--log-dir", str(run.parent),
        )  # fmt: skip
    if not (run / FINISHED).exists():
        write_json(run / FINISHED, settings | source)
    return run


def words_of(name: str, args: argparse.Namespace) -> str:
    """A prior as train.py's `--prior` takes it."""
    return f"{PRIORS[name]} {LABEL_DROP}" if args.conditional else PRIORS[name]


def chooses(args: argparse.Namespace) -> bool:
    """Whether the epoch of the lowest validation loss is kept."""
    return bool(args.patience or args.epochs)


def train_longer(run: Path, minutes: float) -> Path:
    """Copy a run and train the copy for more minutes, unless that is done already; returns its folder."""
    longer = run.with_name(f"{run.name}-{minutes:g}-more")
    if not finished(longer):
        shutil.copytree(run, longer, ignore=shutil.ignore_patterns(FINISHED))
        train("--resume", str(longer), "--max-minutes", str(minutes))
        write_json(longer / FINISHED, {"run": run.name, "more_minutes": minutes})
    return longer


def finished(run: Path) -> bool:
    """Whether a run was trained to its end. Exits if it was interrupted: it would get more minutes if resumed."""
    if (run / LAST).exists() and not (run / FINISHED).exists():
        sys.exit(f"error: {run}: was interrupted; delete it, so that it is trained for all of its minutes")
    return (run / FINISHED).exists()


class Classifier(nn.Module):
    """Two convolutions and two linear layers; about 99% of held-out digits are correct after two epochs."""

    def __init__(self, classes: int, size: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def train_classifier(digits: Dataset, seed: int) -> tuple[Classifier, float]:
    """A classifier of the data set's training split, and its accuracy on the held-out split."""
    torch.manual_seed(seed)
    classifier = Classifier(len(digits.classes), digits.train.images.shape[-1])
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for epoch in range(2):
        for index in batch_indices(len(digits.train.images), 128, seed=seed, epoch=epoch):
            loss = F.cross_entropy(classifier(digits.train.images[index].float() / 255), digits.train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    classifier.eval()
    with torch.no_grad():
        predicted = torch.cat([classifier(x.float() / 255).argmax(1) for x in digits.test.images.split(1000)])
    return classifier, float((predicted == digits.test.labels).float().mean())


@torch.no_grad()
def judge(classifier: Classifier | None, images: Tensor, labels: Tensor | None = None) -> tuple[str, str, str]:
    """The last three table cells for images `[N, 1, H, W]`: the share of sure predictions, the class perplexity, and,
    given labels `[N]`, the share of images whose predicted class is their label.
    """
    if classifier is None:
        return "", "", ""
    p = classifier(images).softmax(1)
    sure = float((p.max(1).values > 0.9).float().mean())
    share = torch.bincount(p.argmax(1), minlength=p.shape[1]).double() / len(p)
    right = "" if labels is None else f"{float((p.argmax(1) == labels).float().mean()):.1%}"
    return f"{sure:.1%}", f"{float(torch.special.entr(share).sum().exp()):.2f}", right


def compare(first: Path, minutes: float, args: argparse.Namespace) -> list[str]:
    """Train all priors on the codes of one autoencoder; returns the lines of its section."""
    content, model = checkpoint.read(first), load(first)
    config = Config.from_dict(content["config"])
    dataset = run_data.load(replace(config, data_dir=args.data_dir))
    classifier, accuracy = None, 0.0
    if dataset.train.images.shape[1] == 1 and len(dataset.classes) == 10:
        classifier, accuracy = train_classifier(dataset, args.seed)
    K, grid = model.bottleneck.num_codes, model.bottleneck.grid
    source = {"autoencoder": weights_checksum(model), "data": run_data.identity(dataset)}

    def rows_of(run: Path, label: str) -> tuple[float, list[tuple[str, ...]]]:
        """Held-out nats per image of a trained prior, and its table rows, one for each guidance."""
        path = run / (BEST if chooses(args) else LAST)
        trained = load(path)
        codes = extract_codes(trained, dataset.test.images, first / "codes-test.npz")
        if isinstance(trained.prior, Masked):
            trained.prior.draws = DRAWS
        cost = PriorTraining(trained, conditional=args.conditional).evaluate(codes, dataset.test.labels)
        error = cost["prior_nats_se"] / math.prod(grid) / math.log(2)
        count = sum(p.numel() for p in trained.prior.parameters())
        steps = checkpoint.read(path)["step"]
        numbers = (f"{cost['bits_per_code']:.3f}", f"{error:.3f}", f"{cost['code_bits_per_dim']:.4f}")
        labels = torch.arange(SAMPLES) % len(dataset.classes) if args.conditional else None
        found = []
        for guidance in args.guidance:
            draws = torch.Generator().manual_seed(args.seed)
            start = time.perf_counter()
            images = trained.sample(SAMPLES, labels=labels, guidance=guidance, generator=draws)
            print(f"{run.name}: {SAMPLES} samples in {time.perf_counter() - start:.1f} s", file=sys.stderr)
            how = f", guidance {guidance:g}" if guidance != 1 else ""
            found.append((label + how, *numbers, f"{count:,}", f"{steps:,}", *judge(classifier, images, labels)))
        return cost["prior_nats"], found

    uniform = math.log2(K)
    torch.manual_seed(args.seed)
    verdict = judge(classifier, model.sample(SAMPLES)) if config.prior.name == "uniform" else ("", "", "")
    bits_per_dim = uniform * math.prod(grid) / model.dimensions
    rows = [("uniform", f"{uniform:.3f}", "0", f"{bits_per_dim:.4f}", "0", "0", *verdict)]
    costs = {}
    for name in args.only:
        costs[name], found = rows_of(train_prior(name, first, minutes, source, args), words_of(name, args))
        rows += found
    if classifier and args.more_minutes:
        best = min(costs, key=lambda name: costs[name])
        longer = train_longer(train_prior(best, first, minutes, source, args), args.more_minutes)
        rows += rows_of(longer, f"{words_of(best, args)}, {minutes + args.more_minutes:g} minutes")[1]
    if classifier:
        real, labels, empty = dataset.test.images[:SAMPLES], dataset.test.labels[:SAMPLES], ("",) * 5
        rows.append(("*held-out digits*", *empty, *judge(classifier, real.float() / 255, labels)))
        rows.append(("*their reconstructions*", *empty, *judge(classifier, model.reconstruct(real), labels)))
    note = f" ({dataset.note})" if dataset.note else ""
    averaged = f", averaged weights ({args.ema_weights})" if args.ema_weights else ""
    length = f"{minutes:g} minutes for each prior (at most 0.5 for the unigram)"
    if chooses(args):
        most = f"a patience of {args.patience} epochs" if args.patience else f"{args.epochs} epochs"
        length = f"each prior after the epoch of its lowest validation loss, of {most}"
    return [
        f"## {dataset.name}{note}: {grid[0]}x{grid[1]} codes of {K}",
        "",
        f"Autoencoder `{content['run']}`, step {content['step']:,}; {len(dataset.test.images):,} held-out images; "
        f"{length}, batch 64, rate {args.lr}, {args.precision}{averaged}, seed {args.seed}."
        + (" Priors are conditioned on the class." if args.conditional else "")
        + (f" The classifier is correct on {accuracy:.2%} of held-out digits." if classifier else ""),
        "",
        *table(COLUMNS, rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, metavar="RUN", help="folders of trained autoencoders")
    add("--minutes", nargs="+", type=float, default=[5.0], metavar="MINUTES",
        help="training time of each prior: one number, or one per folder (default: 5)")  # fmt: skip
    add("--more-minutes", type=float, default=0, metavar="MINUTES",
        help="train the best prior of digits for this much longer")  # fmt: skip
    add("--patience", type=int, metavar="EPOCHS",
        help="train until the validation loss has not fallen for so many epochs, instead of for minutes")  # fmt: skip
    add("--epochs", type=int, metavar="N", help="train for so many epochs, instead of for minutes")
    add("--data-dir", default="data", help="folder of the data's files (default: data)")
    add("--lr", default="1e-3", help="learning rate (default: 1e-3)")
    add("--ema-weights", type=float, default=0.0, metavar="DECAY", help="as in train.py (default: 0, the last weights)")
    add("--conditional", action="store_true", help="train priors of classes, and sample all classes in turn")
    add("--guidance", nargs="+", type=float, default=[1.0], metavar="G",
        help="sample with each, as in visualize_codes.py; others than 1 need --conditional (default: 1)")  # fmt: skip
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="precision of training (default: fp32)")
    add("--seed", type=int, default=0, help="seed of training and samples (default: 0)")
    add("--only", nargs="+", default=tuple(PRIORS), choices=PRIORS, metavar="PRIOR",
        help=f"only these of: {', '.join(PRIORS)}")  # fmt: skip
    add("--output", help="Markdown file to write, such as results/priors.md (default: only print)")
    args = parser.parse_args()
    if args.guidance != [1.0] and not args.conditional:
        parser.error("--guidance: strengthens a class, which only priors with --conditional know")
    lines = [
        "# Priors over codes" + ("" if chooses(args) else " at equal training time"),
        "",
        f"Written by `benchmarks/priors.py` on {describe()}, commit {commit()}. bits/code is the held-out cost of a "
        f"code; that of uniform is log2 K. *sure of samples* is the share of {SAMPLES} samples for which a classifier, "
        "trained on real digits, gives one class a probability above 0.9. *classes* is the perplexity of the predicted "
        "classes.",
    ]
    minutes = args.minutes * len(args.checkpoint) if len(args.minutes) == 1 else args.minutes
    for folder, each in zip(args.checkpoint, minutes, strict=True):
        lines += ["", *compare(Path(folder), each, args)]
    write(args.output, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
