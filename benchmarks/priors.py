#!/usr/bin/env python3
"""Priors over the codes of trained autoencoders at equal training time: bits per code, and a judge of their samples.

Trains each prior for the same number of minutes with `train.py`, takes the held-out cost of the codes, and on digits
asks a judge, a small classifier trained on real training digits, how sure it is of samples: the share to which it
gives one class more than 0.9, and the perplexity of the classes it names (10 when balanced). The judge sees real
held-out digits, their reconstructions, and codes drawn uniformly too. Writes a Markdown table.

  python benchmarks/priors.py --checkpoint logs/mnist logs/cifar10 --minutes 5 3 --data-dir data
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import describe
from torch import Tensor, nn

from vqvae import checkpoint, data, load
from vqvae.stage_two import PriorTraining, extract_codes

ROOT = Path(__file__).parent.parent
PRIORS = {
    "unigram": "unigram",
    "pixelcnn": "pixelcnn",
    "gated-pixelcnn": "gated-pixelcnn channels=64 layers=5 kernel=5",
    "transformer": "transformer",
}
SAMPLES = 1000


def train_prior(name: str, first: Path, minutes: float, args: argparse.Namespace) -> Path:
    """Train in a process of its own, as a person would; the folder of the run."""
    run = first.parent / f"{first.name}-{name}"
    if not (run / "checkpoint.pt").exists():
        command = [sys.executable, str(ROOT / "train.py"), "--prior", *PRIORS[name].split()]
        command += ["--checkpoint", str(first), "--lr", args.lr, "--batch-size", "64", "--epochs", "10000"]
        command += ["--max-minutes", str(minutes if name != "unigram" else min(minutes, 0.5)), "--seed", str(args.seed)]
        command += ["--data-dir", args.data_dir, "--name", run.name, "--log-dir", str(run.parent)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run


def train_on(run: Path, minutes: float) -> Path:
    """A copy of a run, trained for so many minutes more."""
    longer = run.with_name(f"{run.name}-longer")
    if not longer.exists():
        shutil.copytree(run, longer)
        command = [sys.executable, str(ROOT / "train.py"), "--resume", str(longer), "--max-minutes", str(minutes)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return longer


class Judge(nn.Module):
    """Two convolutions and two linear layers, about 99% right on held-out digits after two epochs."""

    def __init__(self, classes: int, size: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def train_judge(digits: data.Dataset, seed: int) -> tuple[Judge, float]:
    torch.manual_seed(seed)
    judge = Judge(len(digits.classes), digits.train.images.shape[-1])
    optimiser = torch.optim.Adam(judge.parameters(), 1e-3)
    for epoch in range(2):
        for index in data.batch_indices(len(digits.train.images), 128, seed=seed, epoch=epoch):
            loss = F.cross_entropy(judge(digits.train.images[index].float() / 255), digits.train.labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    judge.eval()
    with torch.no_grad():
        guesses = torch.cat([judge(x.float() / 255).argmax(1) for x in digits.test.images.split(1000)])
    return judge, float((guesses == digits.test.labels).float().mean())


@torch.no_grad()
def opinion(judge: Judge | None, pictures: Tensor) -> str:
    """Two cells of the table: the share of sure verdicts, and the perplexity of the classes named."""
    if judge is None:
        return " | "
    p = judge(pictures).softmax(1)
    sure = float((p.max(1).values > 0.9).float().mean())
    named = torch.bincount(p.argmax(1), minlength=p.shape[1]).double() / len(p)
    return f"{sure:.1%} | {float(torch.special.entr(named).sum().exp()):.2f}"


def compare(first: Path, minutes: float, args: argparse.Namespace) -> list[str]:
    content, model = checkpoint.read(first), load(first)
    config = content["config"]
    held = data.load(
        config["dataset"]["name"],
        data_dir=args.data_dir,
        image_size=config["image_size"],
        limit=config["limit"],
        **config["dataset"]["options"],
    )
    judge = right = None
    if held.train.images.shape[1] == 1 and len(held.classes) == 10:
        judge, right = train_judge(held, args.seed)
    K, grid = model.bottleneck.num_codes, model.bottleneck.grid
    note = f" ({held.note})" if held.note else ""
    lines = [
        f"## {held.name}{note}: {grid[0]}x{grid[1]} codes of {K}",
        "",
        f"Autoencoder `{content['run']}`, step {content['step']:,}; {len(held.test.images):,} held-out images; "
        f"{minutes:g} minutes for each prior (the unigram needs less), batch 64, Adam {args.lr}, seed {args.seed}."
        + (f" The judge is right on {right:.2%} of held-out digits." if judge else ""),
        "",
        "| prior | bits/code | ± s.e. | bits/dim | parameters | steps | sure of samples | classes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    uniform = math.log2(K)
    scale = math.prod(grid) / model.dimensions
    torch.manual_seed(args.seed)
    pictures = model.sample(SAMPLES) if content["config"]["prior"]["name"] == "uniform" else None
    verdict = opinion(judge, pictures) if pictures is not None else " | "
    lines.append(f"| uniform | {uniform:.3f} | 0 | {uniform * scale:.4f} | 0 | 0 | {verdict} |")

    def row(run: Path, label: str) -> tuple[float, str]:
        trained = load(run)
        codes = extract_codes(trained, held.test.images, first / "codes-test.npz")
        cost = PriorTraining(trained, conditional=False).evaluate(codes, held.test.labels)
        error = cost["nats_se"] / math.prod(grid) / math.log(2)
        start = time.perf_counter()
        pictures = trained.sample(SAMPLES, generator=torch.Generator().manual_seed(args.seed))
        print(f"{run.name}: {SAMPLES} samples in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        count = sum(p.numel() for p in trained.prior.parameters())
        return cost["nats"], (
            f"| {label} | {cost['bits_per_code']:.3f} | {error:.3f} | {cost['bits_per_dim']:.4f} | {count:,} | "
            f"{checkpoint.read(run)['step']:,} | {opinion(judge, pictures)} |"
        )

    costs = {}
    for name, member in PRIORS.items():
        run = train_prior(name, first, minutes, args)
        costs[name], line = row(run, member)
        lines.append(line)
    if judge and args.more_minutes:
        best = min(costs, key=costs.get)
        run = train_on(first.parent / f"{first.name}-{best}", args.more_minutes)
        lines.append(row(run, f"{PRIORS[best]}, {minutes + args.more_minutes:g} minutes")[1])
    if judge:
        real = held.test.images[:SAMPLES]
        lines.append(f"| *held-out digits* | | | | | | {opinion(judge, real.float() / 255)} |")
        lines.append(f"| *their reconstructions* | | | | | | {opinion(judge, model.reconstruct(real))} |")
    return lines


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--checkpoint", nargs="+", required=True, help="folders of trained autoencoders")
    cli.add_argument("--minutes", nargs="+", type=float, default=[5.0], help="for each prior: one, or one per folder")
    cli.add_argument("--more-minutes", type=float, default=0, help="train the best prior of digits on for so long")
    cli.add_argument("--data-dir", default="data")
    cli.add_argument("--lr", default="1e-3")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--output", default="results/priors.md")
    args = cli.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    text = [
        "# Priors over codes at equal training time",
        "",
        f"Written by `benchmarks/priors.py` on {describe()}, commit {commit.strip()}. bits/code is the held-out cost "
        f"of a code; uniform is log2 K. *sure of samples* is the share of {SAMPLES} pictures to which a classifier of "
        "real digits gives one class more than 0.9; *classes* is the perplexity of the classes it names.",
    ]
    minutes = args.minutes * len(args.checkpoint) if len(args.minutes) == 1 else args.minutes
    for folder, each in zip(args.checkpoint, minutes, strict=True):
        text += ["", *compare(Path(folder), each, args)]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("\n".join(text) + "\n")
    print(json.dumps({"written": args.output}))


if __name__ == "__main__":
    main()
