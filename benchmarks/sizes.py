#!/usr/bin/env python3
"""Tokenizers of your own images: the cost and quality of image sizes and strides of the nets.

  python benchmarks/sizes.py --dataset folder --data-dir ~/Pictures --output results/sizes.md

Trains one model for each size of images (64, 128 and 256 pixels) and each stride (4, 8 and 16), each in a process of
its own, so that its peak memory is its own. Models of 128 and 256 pixels train on from that of 64 pixels, whose nets
fit images of any size (--init-from). --steps and --batch-size are those at 64 pixels; the other sizes see as many
pixels, in batches of at least 4 images. Finished runs with the same settings, data and version of the package are not
repeated, and interrupted ones are resumed. The table is printed; --output also writes it after every run.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from runs import command_line, hardware_of, row_of, table, write

SIZES = (64, 128, 256)
STRIDES = (4, 8, 16)
SMALLEST_BATCH = 4
ROWS = {f"{size} pixels, stride {stride}": (size, stride) for size in SIZES for stride in STRIDES}
INTRODUCTION = """# Tokens of real images

{train:,} images to train, {held_out:,} held out. {nets} nets, `vq` with 512 codes, seed 0.
The rows of 128 and 256 pixels train on from the row of 64 pixels with the same stride (`--init-from`), on as many
pixels again. The runs are short: the table compares costs and strides, and says little of what longer runs reach.
Metrics are those of the whole held-out split; ± is one standard error over its images. images/s is that of training.
GB is the peak memory of the process, evaluation and plots included. Hardware: {hardware}.
"""
COLUMNS = (
    "pixels", "stride", "tokens", "MSE x 1000", "PSNR, dB", "SSIM", "codes in use", "images/s", "GB", "steps x batch"
)  # fmt: skip


def main() -> None:
    parser = command_line(__doc__, rows=ROWS, steps=1000, batch_size=16, seeds=None, output="results/sizes.md")
    words = ("NAME", "key=value")
    parser.add_argument("--dataset", nargs="+", default=["folder"], metavar=words, help="data set (default: folder)")
    parser.add_argument("--nets", nargs="+", default=["sonnet"], metavar=words, help="nets (default: sonnet)")
    options = parser.parse_args()
    rows: list[dict] = []
    context = multiprocessing.get_context("spawn")
    for name in options.only:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            rows.append(process.submit(measure, *ROWS[name], options).result())
        write(options.output, report(rows, options))
    print("\n".join(report(rows, options)))


def measure(size: int, stride: int, options: argparse.Namespace) -> dict:
    """The row of one run."""
    area = (size // min(SIZES)) ** 2  # in images of the smallest size
    batch = max(options.batch_size // area, SMALLEST_BATCH)
    steps = options.steps * options.batch_size // (area * batch)
    flags = ["--dataset", *options.dataset, "--data-dir", options.data_dir, "--image-size", str(size)]
    flags += ["--nets", *options.nets, f"downsample={stride}", "--precision", options.precision]
    flags += ["--max-steps", str(steps), "--epochs", "10000", "--batch-size", str(batch)]
    if size > min(SIZES):
        first = measure(min(SIZES), stride, options)
        flags += ["--init-from", str(Path(options.logs) / first["run"])]
    folder = Path(options.logs) / f"{options.nets[0]}-{size}-stride-{stride}"
    return row_of(folder, flags, plot_dir=options.plots, plots=True) | {"size": size, "stride": stride}


def report(rows: list[dict], options: argparse.Namespace) -> list[str]:
    """The lines of the report on the runs finished so far."""
    examples = rows[0]["settings"]["data"]["examples"]
    facts = {"train": examples["train"], "held_out": examples["test"], "nets": " ".join(options.nets)}
    cells = [
        (
            str(row["size"]),
            str(row["stride"]),
            f"{row['codes_per_image']:,}",
            f"{1000 * row['mse']:.3f} ± {1000 * row['mse_se']:.3f}",
            f"{row['psnr']:.2f} ± {row['psnr_se']:.2f}",
            f"{row['ssim']:.3f} ± {row['ssim_se']:.3f}",
            f"{row['active_codes']} of {row['codebook_size']}",
            f"{row['images_per_s']:.1f}",
            f"{row['peak_gb']:.2f}",
            f"{row['step']:,} x {row['settings']['batch_size']}",
        )
        for row in rows
    ]
    return [*INTRODUCTION.format(hardware=hardware_of(rows), **facts).splitlines(), "", *table(COLUMNS, cells)]


if __name__ == "__main__":
    main()
