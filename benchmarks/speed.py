#!/usr/bin/env python3
"""Time training, the quantizer, the training loop, the input pipeline and the start-up against common alternatives.

  python benchmarks/speed.py [--quick] [--device cpu|cuda] [--output results/speed.json]
  python benchmarks/speed.py --to 0.056 [--data-dir data] [--seeds 0 1 2]     time to quality, see race.py

The peers of peers.py have the same nets, data and Adam, and take turns with our code, which is also timed with Muon.
Times are medians of five rounds after a warm-up round. Each contestant has a process of its own, because on a CPU our
training changes how its process allocates memory (vqvae.devices.keep_memory); peers keep glibc's setting. The ratios
named `same_allocator` compare with peers that have our setting. Extra memory is what one pass adds to the peak of a new
process. bf16 is timed where the machine has instructions for it.

The output has one entry for each kind of machine, and a run replaces the entry of its own kind. An AVX-512 machine can
be restricted to AVX2, as its entry then says:

  ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/speed.py
"""

import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contest import Contestant, compete, fresh_process, interleaved, seconds
from hardware import ROOT, describe, restricted
from memory import memory_of
from peers import BATCH, DIM, QUANTIZERS, SHAPE, need_peers, our_step, ours, plan_of, training_step
from race import race
from runs import table
from torch import Tensor

from vqvae import cli
from vqvae.autoencoder import unit_range
from vqvae.bottlenecks.nearest import BLOCK, TILE_SCORES
from vqvae.data.batches import batch_indices
from vqvae.devices import IMAGES, computes_bf16, keep_memory
from vqvae.errors import OptionError, UserError
from vqvae.files import write_json
from vqvae.runs import Run
from vqvae.training import Stage, fit, take

SIDE = 2048  # of the matrices that measure the peak rate


def product(kind: str, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """The same matrix product by torch.mm or as a 1x1 convolution; on a CPU the two use different libraries."""
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    # [B, C, H, 1], channels last; of fewer images one thread does not take oneDNN's convolution
    pixels = a.view(min(IMAGES), -1, 1, SIDE).permute(0, 3, 1, 2)
    return {"mm": lambda: a @ b.T, "convolution": lambda: F.conv2d(pixels, b.view(SIDE, SIDE, 1, 1))}[kind]


def peak(kind: str, dtype: torch.dtype, device: torch.device) -> Contestant:
    return Contestant(product, kind, dtype, device, runs=5, our_allocator=True)


def precisions(device: torch.device) -> dict[str, torch.dtype]:
    """The precisions that a device has instructions for."""
    has_bf16 = device.type == "cuda" or (computes_bf16() and not restricted())
    return {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_bf16 else {})


def training(device: torch.device, steps: int) -> dict:
    """Training speed in images/s, compared with the peers and with the rate of matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        training_step("plain", device)()  # whose search for codes is no convolution
    flops = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op)) / BATCH
    peers, types = ("plain", "vqp"), precisions(device)

    def contestant(*arguments: str, our_allocator: bool) -> Contestant:
        return Contestant(training_step, arguments[0], device, *arguments[1:], runs=steps, our_allocator=our_allocator)

    contestants = {precision: contestant("ours", precision, our_allocator=True) for precision in types}
    contestants |= {f"muon {precision}": contestant("muon", precision, our_allocator=True) for precision in types}
    contestants |= {name: contestant(name, our_allocator=False) for name in peers}
    contestants |= {f"{name}, same allocator": contestant(name, our_allocator=True) for name in peers}
    for precision, dtype in types.items():
        contestants |= {f"{kind} {precision}": peak(kind, dtype, device) for kind in ("mm", "convolution")}
    took = compete(contestants)
    speed = {name: BATCH / took[name] for name in took}
    result: dict[str, Any] = {"mflop_per_image": flops / 1e6}
    result |= {f"{name}_images_per_s": speed[name] for name in peers}
    for precision in types:
        gflops = {kind: 2 * SIDE**3 / took[f"{kind} {precision}"] / 1e9 for kind in ("mm", "convolution")}
        result[precision] = {"images_per_s": speed[precision], "muon_images_per_s": speed[f"muon {precision}"]}
        for name in peers:
            result[precision][f"ratio_{name}"] = speed[precision] / speed[name]
            result[precision][f"ratio_{name}_same_allocator"] = speed[precision] / speed[f"{name}, same allocator"]
        result[precision] |= {f"{kind}_gflops": rate for kind, rate in gflops.items()}
        result[precision]["fastest_gemm_fraction"] = speed[precision] * flops / 1e9 / max(gflops.values())
    return result


def quantizer_pass(name: str, num_codes: int, vectors: int, device: torch.device) -> Callable[[], None]:
    """Forward, backward and EMA update on vectors in the memory format that the encoders produce."""
    quantizer = QUANTIZERS[name](num_codes).to(device)
    z = torch.randn(vectors // 64, DIM, 8, 8, device=device)
    z = (z.contiguous(memory_format=torch.channels_last) if name == "ours" else z).requires_grad_()

    def run() -> None:
        out = quantizer(z, 0) if name == "ours" else quantizer(z)
        quantized, loss = (out.z, out.loss) if name == "ours" else out
        (quantized.sum() + loss).backward()
        z.grad = None

    return run


def product_of_codes(num_codes: int, vectors: int, device: torch.device) -> Callable[[], None]:
    """Only the product of vectors and codes, the least that a search computes, in tiles that stay in a CPU's cache."""
    z, codebook = torch.randn(vectors, DIM, device=device), torch.randn(num_codes, DIM, device=device)
    columns = min(num_codes, BLOCK) if device.type == "cpu" else num_codes
    tiles = z.split(TILE_SCORES.get(device.type, 1 << 24) // columns)
    blocks = codebook.split(columns)
    buffer = z.new_empty(len(tiles[0]), columns)

    def run() -> None:
        for tile in tiles:
            for block in blocks:
                torch.mm(tile, block.T, out=buffer[: len(tile), : len(block)])

    return run


def extra_megabytes(name: str, num_codes: int, vectors: int, device: torch.device) -> float:
    """The megabytes that one pass adds to this process's peak memory, in a process that has done nothing else."""
    run = quantizer_pass(name, num_codes, vectors, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    (before,) = memory_of("self", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    run()
    return (memory_of("self", "VmHWM")[0] - before) / 1e6


def quantizer(num_codes: int, vectors: int, device: torch.device) -> dict:
    """Time and memory of one pass of each quantizer, compared with the matrix product of vectors and codes."""
    passes = {
        name: Contestant(quantizer_pass, name, num_codes, vectors, device, our_allocator=name == "ours")
        for name in QUANTIZERS
    }
    products = {kind: peak(kind, torch.float32, device) for kind in ("mm", "convolution")}
    alone = {"product": Contestant(product_of_codes, num_codes, vectors, device, our_allocator=True)}
    took = compete(passes | products | alone)
    fastest = min(took[kind] for kind in products)
    floor = fastest * vectors * num_codes * DIM / SIDE**3  # time of the product of vectors and codes at this rate
    memory = dict.fromkeys(QUANTIZERS)
    if device.type == "cuda" or Path("/proc/self/clear_refs").exists():
        for name in memory:
            with fresh_process() as fresh:
                memory[name] = fresh.submit(extra_megabytes, name, num_codes, vectors, device).result()
    return {
        "ms": took["ours"] * 1e3,
        "ratio_plain": took["plain"] / took["ours"],
        "ratio_vqp": took["vqp"] / took["ours"],
        "product_ratio": took["ours"] / took["product"],
        "floor_ratio": took["ours"] / floor,
        "extra_mb": memory["ours"],
        "plain_extra_mb": memory["plain"],
        "vqp_extra_mb": memory["vqp"],
    }


def loop(device: torch.device, steps: int) -> dict:
    """An epoch of `fit`, with data, logs, events and checkpoints, compared with the same number of bare steps."""
    images = torch.randint(256, (steps * BATCH, *SHAPE), dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.long)
    step = our_step(ours(device), images[:BATCH].to(device), plan_of(device))
    folders = tempfile.TemporaryDirectory()

    def epoch() -> None:
        facts = {"kind": "autoencoder", "run": "loop", "config": {}, "data": {}, "examples": {}, "plots": ""}
        run = Run(Path(tempfile.mkdtemp(dir=folders.name)) / "run", facts)
        module = ours(device)
        module.initialize = lambda batches: None
        stage = Stage(module, images, labels, evaluate=lambda: {module.monitor: 0.0})
        fit(stage, plan_of(device), run)
        run.close()

    with folders, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work = {"loop": epoch, "step": lambda: [step() for _ in range(steps)]}
        took = interleaved({name: partial(seconds, run) for name, run in work.items()})
    return {"images_per_s": len(images) / took["loop"], "fraction_of_step": took["step"] / took["loop"]}


class PILImages(torch.utils.data.Dataset):
    """Converts each image as torchvision's CIFAR10 does: to PIL, then by ToTensor and Normalize."""

    def __init__(self, images: Tensor):
        from torchvision.transforms import Compose, Normalize, ToTensor

        self.arrays = images.permute(0, 2, 3, 1).numpy()  # [N, H, W, C]
        self.transform = Compose([ToTensor(), Normalize((0.5,) * 3, (1.0,) * 3)])

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[index])), 0


def pipeline(device: torch.device, batches: int) -> dict:
    """Shuffled, scaled batches on the device, compared with a DataLoader of PIL images."""
    images = torch.randint(256, (batches * BATCH, *SHAPE), dtype=torch.uint8)
    resident = images.to(device)
    network_input = ours(device).model.likelihood.network_input
    loaders = {
        f"dataloader_{workers}_workers": torch.utils.data.DataLoader(
            PILImages(images), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        for workers in (0, os.cpu_count())
    }

    def indexed() -> None:
        for index in batch_indices(len(resident), BATCH, seed=0, epoch=0):
            network_input(unit_range(take(resident, index, device)))

    def loaded(loader) -> None:
        for batch, _ in loader:
            batch.to(device)

    work = {"ours": indexed} | {name: partial(loaded, loader) for name, loader in loaders.items()}
    took = interleaved({name: partial(seconds, run) for name, run in work.items()})
    result = {"images_per_s": len(images) / took.pop("ours")}
    for name, taken in took.items():
        result |= {f"{name}_images_per_s": len(images) / taken}
        result |= {f"ratio_{name}": result["images_per_s"] * taken / len(images)}
    return result


def startup(device: torch.device) -> dict:
    """Seconds until the first step of `train.py --dataset digits`, seconds of its imports, and seconds of `--help`."""
    # Python keeps what it compiled, as for most users
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    how: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL}

    def command(folder: str, *options: str) -> list[str]:
        digits = ["train.py", "--dataset", "digits", "--device", device.type, "--log-every", "1"]
        return [sys.executable, *options, *digits, "--log-dir", folder, "--plot-dir", folder, "--name", "run"]

    def first_step(*options: str) -> str:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command(folder, *options), stderr=errors, **how)
            while child.poll() is None and not (Path(folder) / "run" / "metrics.jsonl").exists():
                time.sleep(0.005)
            child.kill()
            child.wait()
            errors.seek(0)
            return errors.read()

    def imports() -> float:
        lines = first_step("-X", "importtime").splitlines()
        return sum(int(line.split("|")[0].split(":")[1]) for line in lines if re.match(r"import time: +\d", line)) / 1e6

    def helps() -> None:
        subprocess.run([sys.executable, "train.py", "--help"], check=True, **how)

    took = interleaved({"step": partial(seconds, first_step), "help": partial(seconds, helps)})
    return {
        "startup_s": took["step"],
        "startup_imports_s": statistics.median(imports() for _ in range(3)),
        "help_s": took["help"],
    }


def show(rows: dict[str, dict], *columns: str) -> None:
    """Print a table with a line per row. Columns default to all of the first row."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"

    columns = columns or tuple(next(iter(rows.values())))
    print(
        "", *table(("", *columns), [(name, *(cell(row[c]) for c in columns)) for name, row in rows.items()]), sep="\n"
    )
    sys.stdout.flush()


def write_entry(path: Path, kind: str, entry: dict) -> None:
    """Write the entry of a kind of machine, and keep those of the others."""
    others: Any = {}
    if path.exists():
        with contextlib.suppress(ValueError):
            others = json.loads(path.read_text())
        if not (isinstance(others, dict) and all(isinstance(other, dict) for other in others.values()) and others):
            raise OptionError("output", str(path), "is not a file of this benchmark; name another one")
    write_json(path, {**others, kind: entry})


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__, "")
    parser.add_argument("--quick", action="store_true", help="shorter turns, and a quarter of the vectors")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--output", help="JSON file to write, such as results/speed.json (default: only print)")
    parser.add_argument("--to", type=float, metavar="ERROR", help="train until the MSE / variance is this instead")
    parser.add_argument("--data-dir", default="data", help="folder of CIFAR-10, for --to (default: data)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of --to (default: 0)")
    parser.add_argument("--most", type=int, default=10_000, help="steps after which --to gives up (default: 10,000)")
    args = parser.parse_args(argv)
    need_peers()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device", "cuda", "not available on this machine; use cpu")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist; make it first")
    device, quick = torch.device(args.device), args.quick
    kind, hardware = describe(device.type, versions=False), {"hardware": describe(device.type)}
    print(hardware["hardware"])
    if args.to is not None:
        rows = race(args.to, args.data_dir, args.seeds, tuple(precisions(device)), device, most=args.most)
        if args.output:
            write_entry(Path(args.output), f"{kind}, time to {args.to}", hardware | {"rows": rows})
        return 0
    if device.type == "cpu":
        keep_memory()
    torch.manual_seed(0)
    vectors = 16_384 if quick else 65_536

    result = {**hardware, "quick": quick, "vectors": vectors}
    result["train"] = training(device, 1 if quick else 6)
    show({"train, peers": result["train"]}, "plain_images_per_s", "vqp_images_per_s")
    show({f"train, {precision}": result["train"][precision] for precision in precisions(device)})
    result["quantizer"] = {str(k): quantizer(k, vectors, device) for k in (512, 8192)}
    show({f"quantizer, K = {k}": row for k, row in result["quantizer"].items()})
    result["loop"] = loop(device, 10 if quick else 50)
    show({"loop": result["loop"]})
    result["pipeline"] = pipeline(device, 20 if quick else 100)
    show({"pipeline": result["pipeline"]})
    result |= startup(device)
    show({"start": result}, "startup_s", "startup_imports_s", "help_s")
    if args.output:
        write_entry(Path(args.output), kind, result)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
