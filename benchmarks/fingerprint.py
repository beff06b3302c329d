#!/usr/bin/env python3
"""Train every family for a few steps on built-in data and print a hash of what each computed.

A refactor must not change any line. Run this before and after on one machine, with the same torch:

  python benchmarks/fingerprint.py --output before.json
  python benchmarks/fingerprint.py --against before.json

A line has four hashes: the loss of every training step, all weights and buffers (sorted by content, so that a renamed
parameter changes nothing), the held-out -ELBO, MSE and nats, and reconstructions and samples. Hashes differ between
machines and versions of torch, so they are not stored in the repository.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from vqvae import cli, load
from vqvae.commands import train
from vqvae.presets import PRESETS
from vqvae.runs import LOG, read_metrics

ROOT = Path(__file__).resolve().parent.parent
SHARED = "--limit 64 --batch-size 16 --max-steps 6 --epochs 2 --image-size 16 --log-every 1 --device cpu"
CODES = "--codes 32 --code-dim 8"
SMALL = f"{SHARED} --hidden 16 --lr 3e-4"  # constant: a resumed run of another length is the same
VQ = f"{SMALL} {CODES}"
FLAT = f"{SMALL} --nets conv-vae --bottleneck gaussian latents=4 --objective elbo reduction=sum"
PROBABILISTIC = (
    "--objective probabilistic reduction=sum entropy_scale=0.5 sum_over_latents=no stop_gradient_for_prior=yes "
    "iaf_startup_steps=3 stop_training_encoder_after_startup=yes --prior transformer layers=1 width=16"
)
SMALL_PRIORS = {
    "unigram": "unigram",
    "pixelcnn": "pixelcnn channels=8 blocks=2 head=16 dropout=0.1",
    "gated-pixelcnn": "gated-pixelcnn channels=8 layers=2 embedding=8 head=16 kernel=5 dropout=0.1",
    "transformer": "transformer layers=2 width=16 heads=2 dropout=0.1",
    "masked": "masked layers=2 width=16 heads=2 dropout=0.1",
}

FAMILIES = {
    "vq": VQ,
    "vq gradient": f"{VQ} --bottleneck vq codebook=gradient init=uniform revive=0 weight=5",
    "vq fan-in": f"{VQ} --bottleneck vq init=fan-in",
    "vq revive": f"{VQ} --bottleneck vq init=normal decay=0.8 revive=0.5",
    "vq gradient revive": f"{VQ} --bottleneck vq codebook=gradient decay=0.8 revive=0.5",
    "vq rotation": f"{VQ} --gradient rotation",
    "vq diversity": f"{VQ} --bottleneck vq diversity=0.1 temperature=0.5",
    "vq no projection": f"{SMALL} --codes 32 --code-dim 16 --bottleneck vq projection=no",
    "cosine": f"{VQ} --bottleneck cosine",
    "cosine gradient": f"{VQ} --bottleneck cosine codebook=gradient decay=0.8 revive=0.5",
    "simvq": f"{VQ} --bottleneck simvq",
    "simvq normal": f"{VQ} --bottleneck simvq init=normal",
    "fsq": f"{SMALL} --bottleneck fsq levels=4,3,5",
    "lfq": f"{SMALL} --bottleneck lfq bits=5",
    "residual": f"{VQ} --bottleneck residual",
    "residual dropout": f"{VQ} --bottleneck residual dropout=0.7",
    "residual gradient": f"{VQ} --bottleneck residual codebook=gradient init=normal",
    "grouped": f"{VQ} --bottleneck grouped",
    "grouped gradient": f"{VQ} --bottleneck grouped codebook=gradient init=fan-in",
    "hierarchy": f"{VQ} --bottleneck hierarchy hidden=16",
    "hierarchy gradient": f"{VQ} --bottleneck hierarchy hidden=16 codebook=gradient",
    "multiscale": f"{VQ} --bottleneck multiscale",
    "multiscale gradient": f"{VQ} --bottleneck multiscale codebook=gradient scales=2",
    "deterministic": f"{VQ} --bottleneck deterministic",
    "categorical": f"{VQ} --bottleneck categorical num_samples=3",
    "categorical apart": f"{VQ} --bottleneck categorical num_samples=3 average_samples=no revive=0",
    "categorical linear": f"{VQ} --bottleneck categorical posterior=linear",
    "categorical iaf": f"{VQ} --bottleneck categorical iaf_flows=1 {PROBABILISTIC}",
    "categorical rloo": f"{VQ} --bottleneck categorical num_samples=3 estimator=rloo revive=0",
    "stochastic": f"{VQ} --bottleneck stochastic anneal=0.1 --likelihood mse variance=learned pixels=sigmoid",
    "gumbel": f"{VQ} --bottleneck gumbel num_samples=2 --temperature linear:1:0.1",
    "gumbel hard": f"{VQ} --bottleneck gumbel hard=yes init=normal",
    "gumbel exact": f"{VQ} --bottleneck gumbel posterior=linear entropy=exact",
    "gumbel iaf": f"{VQ} --bottleneck gumbel iaf_flows=1 {PROBABILISTIC}",
    "gumbel triangular": f"{VQ} --bottleneck gumbel iaf_flows=2 iaf_parameters=triangular",
    "gaussian": f"{FLAT} --prior normal",
    "made-flow": f"{FLAT} --prior made-flow hidden=16 --prior-flows 2",
    "made-flow likelihood": f"{FLAT} --prior made-flow hidden=16 --likelihood logit-gaussian",
    **{f"joint {name}": f"{VQ} --prior {prior}" for name, prior in SMALL_PRIORS.items()},
    "joint conditional": f"{VQ} --conditional --prior {SMALL_PRIORS['gated-pixelcnn']}",
    "gumbel pixelcnn": f"{VQ} --bottleneck gumbel --prior {SMALL_PRIORS['pixelcnn']}",
    "gumbel gated": f"{VQ} --bottleneck gumbel --prior {SMALL_PRIORS['gated-pixelcnn']}",
    "residual transformer": f"{VQ} --bottleneck residual --prior {SMALL_PRIORS['transformer']}",
    "residual masked": f"{VQ} --bottleneck residual --prior {SMALL_PRIORS['masked']}",
    "multiscale transformer": f"{VQ} --bottleneck multiscale --prior {SMALL_PRIORS['transformer']}",
    "mse symmetric": f"{VQ} --likelihood mse pixels=symmetric variance=0.1",
    "gaussian likelihood": f"{VQ} --likelihood gaussian",
    "logit-gaussian": f"{VQ} --likelihood logit-gaussian alpha=0.05",
    "bernoulli": f"{VQ} --likelihood bernoulli --dataset folder channels=1 --data-dir binary",
    "logit-laplace": f"{VQ} --likelihood logit-laplace",
    "discretized logistic": f"{VQ} --likelihood discretized-logistic",
    "softmax256": f"{VQ} --likelihood softmax256",
    "henrhoi": f"{VQ} --nets henrhoi",
    "sqvae nets": f"{VQ} --nets sqvae middle=yes",
    "mnist-conv": f"{VQ} --nets mnist-conv",
    "deepmind": f"{VQ} --nets deepmind",
    "dalle": f"{VQ} --nets dalle blocks=1 init=16",
    "vqgan": f"{VQ} --nets vqgan",
    "sonnet downsample": f"{VQ} --nets sonnet downsample=8",
    "mlp": f"{VQ} --nets mlp layers=2",
    "sum": f"{VQ} --objective elbo reduction=sum --prior unigram",
    "free bits": f"{FLAT} free_bits=30 --prior normal --kl-weight linear:0:1:4",
    "late flow": f"{VQ} --bottleneck gumbel iaf_flows=1 --objective probabilistic reduction=sum iaf_startup_steps=3",
    "photos": f"{VQ} --dataset photos crops=64 test_crops=32 --augment crop-flip",
    "folder": f"{VQ} --dataset folder --data-dir color",
    "points": "--preset vae-2d-2 --limit 640 --max-steps 6 --log-every 1 --device cpu",
    "schedules": f"{SHARED} --hidden 16 {CODES} --lr linear:0:1e-3:3,cosine:1e-3:1e-5 --weight-decay 0.1",
    "bf16": f"{VQ} --precision bf16",
    "bf16 gumbel": f"{VQ} --bottleneck gumbel --precision bf16",
    "seed": f"{VQ} --seed 3",
}
PRESET = "--limit 64 --batch-size 16 --max-steps 2 --epochs 1 --image-size 16 --log-every 1 --device cpu"
STAGE_TWO = "--batch-size 16 --max-steps 6 --epochs 2 --log-every 1 --lr 1e-3 --device cpu"


def digest(*values: bytes) -> str:
    return hashlib.sha256(b"".join(values)).hexdigest()[:10]


def of_tensor(value: torch.Tensor) -> bytes:
    plain = value.detach().cpu().contiguous()
    return hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode() + plain.numpy().tobytes()).digest()


def fingerprint(run: Path) -> str:
    """The four hashes of a finished run."""
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    rows = read_metrics(run / LOG)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    last = [row for row in rows if row["kind"] == "epoch"][-1]
    names = ("prior_nats",) if content["kind"] == "prior" else ("neg_elbo", "mse")
    metrics = [last[f"held_out_{name}"] for name in names]
    model, images = load(run), content["examples"]["images"][:4]
    labels = {"labels": torch.arange(4)} if content["config"]["conditional"] else {}
    torch.manual_seed(0)
    outputs = [model.reconstruct(images), model.sample(4, generator=torch.Generator().manual_seed(0), **labels)]
    return " ".join((
        digest(repr(losses).encode()),
        digest(*sorted(map(of_tensor, content["model"].values()))),
        digest(repr(metrics).encode()),
        digest(*map(of_tensor, outputs)),
    ))  # fmt: skip


def train_run(name: str, words: str) -> Path:
    """Train in this process, in `logs/<name>` of the current folder, and say nothing."""
    argv = [*words.split(), "--name", name]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = cli.run(train.main, argv)
    if code:
        raise SystemExit(f"{' '.join(argv)}\n{errors.getvalue()}")
    return Path("logs", name)


def single(name: str, words: str) -> str:
    return fingerprint(train_run(name.replace(" ", "-"), words))


def resumed(name: str, words: str) -> str:
    """Stop after three steps and resume; gives the same line as a run that never stopped."""
    run = train_run(f"{name}-resumed".replace(" ", "-"), words.replace("--max-steps 6", "--max-steps 3"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.run(train.main, ["--resume", str(run), "--max-steps", "6"])
    return fingerprint(run)


def two_processes(name: str, words: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(ROOT / "train.py"), *words.split(), "--name", name.replace(" ", "-")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return fingerprint(Path("logs", name.replace(" ", "-")))


def second_stage(prior: str, conditional: bool) -> str:
    if not Path("logs/vq").exists():
        train_run("vq", VQ)
    name = f"prior-{prior}{'-conditional' if conditional else ''}"
    flags = f"--prior {SMALL_PRIORS[prior]} --checkpoint logs/vq {'--conditional' if conditional else ''}"
    return fingerprint(train_run(name, f"{flags} {STAGE_TWO}"))


def preset(name: str) -> str:
    """Two steps of a published set-up, on data that needs no download."""
    if name.startswith("vae-2d"):
        return single(name, f"--preset {name} --limit 640 --max-steps 2 --log-every 1 --device cpu")
    binary = name.startswith("probabilistic")
    data = "--dataset folder channels=1 --data-dir binary" if binary else "--dataset digits"
    if PRESETS[name].prior:
        PRESETS[name].prior["batch_size"] = 16
    first = single(name, f"--preset {name} {data} {PRESET} --epochs 1")
    return first + (" " + fingerprint(Path("logs", f"{name}-prior")) if PRESETS[name].prior else "")


def jobs() -> dict:
    """The function that computes each line, by the line's name."""
    table = {name: lambda name=name, words=words: single(name, words) for name, words in FAMILIES.items()}
    for prior in SMALL_PRIORS:
        table[f"stage two {prior}"] = lambda prior=prior: second_stage(prior, False)
        table[f"stage two {prior} conditional"] = lambda prior=prior: second_stage(prior, True)
    for name in ("vq", "residual dropout", "gumbel iaf", "schedules"):
        table[f"{name} resumed"] = lambda name=name: resumed(name, FAMILIES[name])
    for name in ("vq", "residual dropout", "gumbel", "lfq"):
        table[f"{name} two processes"] = lambda name=name: two_processes(f"{name} two", FAMILIES[name])
    for name in PRESETS:
        table[f"preset {name}"] = lambda name=name: preset(name)
    return table


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make a folder the current one for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_images(folder: Path, *, binary: bool) -> None:
    """48 small PNG files, black and white or in color."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(48):
        shape = (16, 16) if binary else (20, 24, 3)
        values = rng.integers(2, size=shape) * 255 if binary else rng.integers(256, size=shape)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{i:02}.png")


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--only", nargs="+", metavar="FAMILY", help="families whose name contains one of these words")
    cli.add_argument("--output", help="write the lines as JSON")
    cli.add_argument("--against", help="compare with lines written before; exit 1 where any differs")
    args = cli.parse_args()
    before = json.loads(Path(args.against).read_text()) if args.against else {}
    output = Path(args.output).resolve() if args.output else None
    torch.set_num_threads(1)
    lines: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, inside(Path(folder)):
        os.environ["XDG_CACHE_HOME"] = folder
        write_images(Path("binary"), binary=True)
        write_images(Path("color"), binary=False)
        for name, job in jobs().items():
            if args.only and not any(word in name for word in args.only):
                continue
            lines[name] = job()
            verdict = ("" if before[name] == lines[name] else "   DIFFERS") if name in before else ""
            print(f"{name:38} {lines[name]}{verdict}", flush=True)
    print(f"{len(lines)} families, all together {digest(json.dumps(lines).encode())}")
    if output:
        output.write_text(json.dumps(lines, indent=1) + "\n")
    changed = [name for name in lines if name in before and before[name] != lines[name]]
    if before:
        print(f"{len(changed)} of {len(set(before) & set(lines))} differ{': ' if changed else ''}{', '.join(changed)}")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
