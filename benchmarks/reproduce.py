#!/usr/bin/env python3
"""Train runs of published length, one after the other, and put them next to the published metrics.

  python benchmarks/reproduce.py --list                              the rows, their commands and what is published
  python benchmarks/reproduce.py --data-dir data --output results/reproduced.md         all rows, shortest first
  python benchmarks/reproduce.py sonnet-cifar10 mnist-20 --data-dir data                only these
  python benchmarks/reproduce.py --status                            how far each run is

The state of the queue is in the runs' folders. A stop costs at most the steps since the last checkpoint (five minutes),
and the same command continues. Finished runs with the same settings, data and version of the package are not repeated.

--output FILE.md also writes FILE.json. Rows in it from other calls and machines stay unless they are trained again.
"""

import argparse
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from runs import row_of, table, write

from vqvae.files import write_json
from vqvae.runs import LOG, read_metrics


class Row(NamedTuple):
    """A run of train.py, and what is published for it."""

    flags: str
    seeds: int
    published: str  # with its source
    protocol: str  # what differs from the published one
    of: str | None = None  # the row whose run is the prior's --checkpoint


JPEG = "the data here are re-encoded as JPEG if they are not the published files"
# of 2302.05917's repository (github.com/VuongLong/VQ-WAE: util.py, trainer.py, configs)
VQ_WAE = "there MNIST is scaled to 32x32 (bilinear), and PSNR is of 8-bit PNGs, by a formula that is not stated"
MNIST_VQ = "33.37 dB, perplexity 47 (2302.05917)"
TEN = "-ELBO in nats is not published for these ten"
ROWS = {
    "vae-2d-1": Row("--preset vae-2d-1", 1, "the data's entropy is the limit", "own data set"),
    "vae-2d-2": Row("--preset vae-2d-2", 1, "the data's entropy is the limit", "own data set"),
    "default-10k": Row(
        "--dataset cifar10 --validation test --batch-size 32 --epochs 7 --max-steps 10000",
        3,
        "MSE / variance 0.056 (Sonnet)",
        JPEG,
    ),
    "sonnet-cifar10": Row("--preset sonnet-cifar10", 3, "MSE / variance 0.056 (Sonnet, in training)", JPEG),
    "mnist-20": Row(
        "--dataset mnist --validation test --epochs 20",
        1,
        MNIST_VQ,
        f"28 pixels and 7x7 codes here; {VQ_WAE}",
    ),
    "mnist32-20": Row(
        "--dataset mnist --image-size 32 --validation test --epochs 20",
        1,
        MNIST_VQ,
        f"other nets and 20 epochs here; {VQ_WAE}",
    ),
    "vae-mnist": Row("--preset vae-cifar10 --dataset mnist --epochs 20", 1, "none", "own likelihood"),
    "vlae-mnist": Row("--preset vlae-cifar10 --dataset mnist --epochs 20", 1, "none", "own likelihood"),
    "cifar10-50": Row(
        "--dataset cifar10 --validation test --epochs 50",
        1,
        "24.94 dB, perplexity 377 (2405.14222)",
        f"195,000 steps there; {JPEG}",
    ),
    "sqvae-mnist-512": Row(
        "--preset sqvae-mnist --codes 512 --image-size 32", 1, "36.25 dB, perplexity 302 (2302.05917)", VQ_WAE
    ),
    "sqvae-mnist-512-vq": Row("--preset sqvae-mnist-vq --codes 512 --image-size 32", 1, MNIST_VQ, VQ_WAE),
    "sqvae-cifar10": Row("--preset sqvae-cifar10", 1, "26.11 dB, perplexity 435 (2302.05917)", JPEG),
    "sqvae-cifar10-vq": Row("--preset sqvae-cifar10-vq", 1, "23.14 dB, perplexity 70 (2302.05917)", JPEG),
    "sqvae-fashion-mnist-512": Row("--preset sqvae-fashion-mnist --codes 512", 1, "none for 512 codes", "7x7 codes"),
    "sqvae-fashion-mnist-512-vq": Row(
        "--preset sqvae-fashion-mnist-vq --codes 512", 1, "none for 512 codes", "7x7 codes"
    ),
    "bits-10k": Row(
        "--dataset cifar10 --validation test --bottleneck grouped groups=10 code_dim=640 --likelihood softmax256 "
        "--batch-size 32 --epochs 7 --max-steps 10000",
        1,
        "4.67 bits/dim (1711.00937)",
        f"256 channels and 250,000 steps of 128 images there; a code costs 9 bits here, without a prior; {JPEG}",
    ),
    "bits-10k-prior": Row(
        "--prior gated-pixelcnn --lr cosine:1e-3:1e-5 --batch-size 64 --epochs 6",
        1,
        "4.67 bits/dim (1711.00937)",
        f"as above, with a learned prior; the paper does not name its own; {JPEG}",
        of="bits-10k",
    ),
    "raq-cifar10": Row("--preset raq-cifar10", 1, "24.94 ± 0.01 dB, perplexity 377 (2405.14222)", JPEG),
    **{
        f"probabilistic-{name}": Row(f"--preset probabilistic-{name}", 1, TEN, "pixels binarized at 0.5")
        for name in ("1", "2.1", "2.2", "2.3", "2.4", "2.5", "3", "4.1", "4.2.1", "4.2.2")
    },
}
# the default before Muon
ROWS |= {
    f"{name}-adamw": ROWS[name]._replace(flags=f"{ROWS[name].flags} --optimizer adamw")
    for name in ("default-10k", "mnist-20", "cifar10-50")
}
INTRODUCTION = """# Runs of published length

Each row is a run of `python train.py` with the flags in the table below. Its last weights, not those of best.pt, are
evaluated on the test split. ± is one standard error over images. Hours are training time on the named hardware.
"""
COLUMNS = (
    "row", "seed", "data", "steps x batch", "MSE x 1000", "PSNR, dB", "perplexity", "-ELBO", "bits/dim", "bits/code",
    "hours", "hardware", "commit"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rows", nargs="*", default=list(ROWS), metavar="ROW", help=f"of: {', '.join(ROWS)} (default: all)")
    add("--list", action="store_true", help="print the rows and what is published for them")
    add("--status", action="store_true", help="print how far each run is")
    add("--data-dir", default="data", help="folder of the data's files")
    add("--precision", choices=("fp32", "bf16"), help="of training (default: the machine's, as in train.py)")
    add("--logs", default="logs/reproduce", help="folder of the runs (default: logs/reproduce)")
    add("--plots", default="plots/reproduce", help="folder of the plots (default: plots/reproduce)")
    add("--output", help="Markdown file to write after every run, with a JSON file, such as results/reproduced.md")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    if options.list:
        for name in options.rows:
            row = ROWS[name]
            flags = row.flags + (f" --checkpoint (the run of {row.of})" if row.of else "")
            print(f"{name} (seeds: {row.seeds})\n    python train.py {flags}\n    published: {row.published}")
            print(f"    protocol: {row.protocol}")
    elif options.status:
        for name in options.rows:
            for seed in range(ROWS[name].seeds):
                print(f"{name} seed {seed}: {progress(Path(options.logs), name, seed)}")
    else:
        train(options)


def train(options: argparse.Namespace) -> None:
    """Train, evaluate and plot the chosen rows that are not finished: all rows with seed 0, then with seed 1, ..."""
    done: list[dict[str, Any]] = []
    for seed in range(max(ROWS[name].seeds for name in options.rows)):
        for name in options.rows:
            if seed < ROWS[name].seeds:
                done.append({"row": name} | run(name, seed, options))
                if options.output:
                    publish(Path(options.output), done)
    print("\n".join(report([scalars(row) for row in done])))


def publish(output: Path, done: list[dict[str, Any]]) -> None:
    """Write the finished rows, and those from other calls that are in the output already."""
    stored = output.with_suffix(".json")
    earlier = json.loads(stored.read_text()) if stored.exists() else []
    rows = {(row["row"], row["seed"]): row for row in [*earlier, *map(scalars, done)]}
    write_json(stored, ordered(rows.values()))
    write(str(output), report(rows.values()))


def scalars(row: dict[str, Any]) -> dict[str, Any]:
    """The published part of a row: its numbers and names, the size of its batches, and its precision."""
    return {name: value for name, value in row.items() if isinstance(value, int | float | str)} | {
        name: row["settings"][name] for name in ("batch_size", "precision")
    }


def ordered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (list(ROWS).index(row["row"]), row["seed"]))


def run(name: str, seed: int, options: argparse.Namespace) -> dict:
    """The metrics of a row's run. Trains it if it is not finished, and first the autoencoder if the row is a prior."""
    row = ROWS[name]
    flags = [*shlex.split(row.flags), "--data-dir", options.data_dir, "--seed", str(seed)]
    if options.precision:
        flags += ["--precision", options.precision]
    if row.of:
        flags += ["--checkpoint", str(Path(options.logs) / run(row.of, seed, options)["run"])]
    return row_of(Path(options.logs) / f"{name}-seed{seed}", flags, plot_dir=options.plots, plots=True)


def progress(logs: Path, name: str, seed: int) -> str:
    """How far a run is, from the files in its folder."""
    folders = sorted(logs.glob(f"{name}-seed{seed}-*"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        return "not started"
    if (folders[-1] / "row.json").exists():
        return "finished"
    steps = [entry["step"] for entry in read_metrics(folders[-1] / LOG)] if (folders[-1] / LOG).exists() else []
    return f"at step {max(steps, default=0):,}"


def codes_of(row: dict[str, Any]) -> int:
    """K of one level, over which perplexity is; `codebook_size` is of all levels."""
    bits = row.get("uniform_bits_per_code")
    return row["codebook_size"] if bits is None else round(2**bits)


def report(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The table of the finished rows, with the commands and what is published below it."""
    cells = [
        (
            r["row"],
            str(r["seed"]),
            r["data"] + (f" ({r['note']})" if r["note"] else ""),
            f"{r['step']:,} x {r['batch_size']}" + (", bf16" if r.get("precision") == "bf16" else ""),
            f"{1000 * r['mse']:.3f} ± {1000 * r['mse_se']:.3f}" if "mse" in r else "",
            f"{r['psnr']:.2f} ± {r['psnr_se']:.2f}" if "psnr" in r else "",
            f"{r['perplexity']:.0f} of {codes_of(r):,}" if "perplexity" in r else "",
            f"{r['neg_elbo']:.2f} ± {r['neg_elbo_se']:.2f}",
            f"{r['bits_per_dim']:.3f}" if "bits_per_dim" in r else "",
            f"{r['bits_per_code']:.3f}" if "bits_per_code" in r else "",
            f"{r['seconds'] / 3600:.2f}",
            r["hardware"],
            r["commit"],
        )
        for r in ordered(rows)
    ]
    names = [name for name in ROWS if any(row[0] == name for row in cells)]
    below = [(name, f"`{ROWS[name].flags}`", ROWS[name].published, ROWS[name].protocol) for name in names]
    return [INTRODUCTION, *table(COLUMNS, cells), "", *table(("row", "flags", "published", "what differs"), below)]


if __name__ == "__main__":
    main()
