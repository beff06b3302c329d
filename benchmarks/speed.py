#!/usr/bin/env python3
"""Time training, the quantizer, the training loop, the input pipeline and the start-up against common alternatives.

  python benchmarks/speed.py [--quick] [--device cpu|cuda] [--output results/speed.json]

The peers have the same nets and data, and take turns with our code:
  plain   the usual PyTorch VQ-VAE: distances with both norms, one-hot matrix products for the codes and for the EMA,
          NCHW, Adam with PyTorch's defaults
  vqp     the EMA quantizer of vector-quantize-pytorch, otherwise as plain
Times are medians of five rounds after a warm-up round. Each contestant has a process of its own, because on a CPU our
training changes how its process allocates memory (vqvae.devices.keep_memory); peers keep glibc's setting. The ratios
named `same_allocator` are to peers with our setting. Extra memory is what one pass adds to the peak of a new process.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import ROOT, describe
from runs import table
from torch import Tensor, nn

from vqvae.autoencoder import SLOTS, build_autoencoder, unit_range
from vqvae.bottlenecks.vq import VQ, VQOptions
from vqvae.data.batches import batch_indices
from vqvae.devices import keep_memory
from vqvae.files import write_json
from vqvae.nets import Sonnet
from vqvae.objectives import ElboObjective
from vqvae.optimizer import adamw
from vqvae.registry import Choice
from vqvae.runs import Run
from vqvae.schedules import Schedule
from vqvae.stage_one import AutoencoderTraining
from vqvae.training import Plan, Stage, fit, take

SHAPE, VARIANCE, BATCH = (3, 32, 32), 0.063, 128  # CIFAR-10's images, the variance of its pixels, images per step
DIM, ROUNDS, SIDE = 64, 5, 2048  # code dimension, rounds, side of the matrices that measure the peak rate


class PlainQuantizer(nn.Module):
    """The EMA quantizer found in most PyTorch repositories (`[B, D, h, w]`, decay 0.99, commitment 0.25)."""

    def __init__(self, num_codes: int):
        super().__init__()
        self.register_buffer("codebook", torch.randn(num_codes, DIM))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("totals", self.codebook.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        rows = z.permute(0, 2, 3, 1).contiguous()  # [B, h, w, D]
        flat = rows.view(-1, DIM)
        norms = flat.square().sum(dim=1, keepdim=True) + self.codebook.square().sum(dim=1)
        distances = norms - 2 * flat @ self.codebook.t()
        one_hot = torch.zeros_like(distances).scatter_(1, distances.argmin(dim=1, keepdim=True), 1)
        quantized = (one_hot @ self.codebook).view_as(rows)
        with torch.no_grad():
            self.counts.mul_(0.99).add_(one_hot.sum(dim=0), alpha=0.01)
            self.totals.mul_(0.99).add_(one_hot.t() @ flat, alpha=0.01)
            n = self.counts.sum()
            smoothed = (self.counts + 1e-5) / (n + len(self.counts) * 1e-5) * n
            self.codebook.copy_(self.totals / smoothed.unsqueeze(1))
        loss = 0.25 * F.mse_loss(rows, quantized.detach())
        quantized = rows + (quantized - rows).detach()
        return quantized.permute(0, 3, 1, 2).contiguous(), loss


class PeerQuantizer(nn.Module):
    """The quantizer of vector-quantize-pytorch with the same settings."""

    def __init__(self, num_codes: int):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.inner = VectorQuantize(
            DIM, num_codes, decay=0.99, commitment_weight=0.25, accept_image_fmap=True, rotation_trick=False
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = self.inner(z)
        return quantized, loss.sum()


class Peer(nn.Module):
    """Our nets with a peer's quantizer and Sonnet's loss: images `[B, C, H, W]` (uint8) to a scalar."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        nets = Sonnet(image_shape=SHAPE)
        self.encoder = nn.Sequential(nets.encoder(), nn.Conv2d(nets.channels, DIM, 1))
        self.quantizer, self.decoder = quantizer, nets.decoder(DIM, SHAPE[0])

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255 - 0.5
        quantized, loss = self.quantizer(self.encoder(x))
        return F.mse_loss(self.decoder(quantized), x) / VARIANCE + loss


def ours(device: torch.device) -> AutoencoderTraining:
    """train.py's default model for CIFAR-10, without the k-means start."""
    words = {"nets": "sonnet", "bottleneck": "vq init=normal", "prior": "uniform", "likelihood": "mse"}
    choices = {slot: Choice.parse(slot, words[slot].split()) for slot in SLOTS}
    model = build_autoencoder(choices, image_shape=SHAPE, data_variance=VARIANCE)
    return AutoencoderTraining(model, ElboObjective(total_steps=1)).to(device)


def our_quantizer(num_codes: int) -> VQ:
    options = VQOptions(num_codes=num_codes, code_dim=DIM, init="normal")
    return VQ(channels=DIM, grid=(8, 8), options=options, projection=False)


QUANTIZERS: dict[str, Callable[[int], nn.Module]] = {
    "ours": our_quantizer,
    "plain": PlainQuantizer,
    "vqp": PeerQuantizer,
}


def fresh_process(prepare: Callable[..., None] | None = None, arguments: tuple = ()) -> ProcessPoolExecutor:
    """A new process that shares no state with this one and first calls `prepare(*arguments)`."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare, arguments)


class Contestant:
    """A process of its own that runs `build(*arguments)()`, `runs` times a turn.

    With `our_allocator` the process first calls keep_memory, as our training does.
    """

    work: Callable[[], object]  # exists only in that process

    def __init__(
        self, build: Callable[..., Callable[[], object]], *arguments, runs: int = 1, our_allocator: bool = False
    ):
        self.runs = runs
        self.process = fresh_process(Contestant._prepare, (our_allocator, build, *arguments))

    @staticmethod
    def _prepare(our_allocator: bool, build: Callable[..., Callable[[], object]], *arguments) -> None:
        if our_allocator:
            keep_memory()
        torch.manual_seed(0)
        Contestant.work = staticmethod(build(*arguments))

    @staticmethod
    def _turn(runs: int) -> float:
        return seconds(lambda: [Contestant.work() for _ in range(runs)]) / runs

    def turn(self) -> float:
        """Mean seconds per run."""
        return self.process.submit(Contestant._turn, self.runs).result()


def seconds(work: Callable[[], object]) -> float:
    """The duration of `work()`, including what it starts on a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def interleaved(turns: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median seconds of each. All take turns, after a warm-up turn each."""
    times = [{name: turn() for name, turn in turns.items()} for _ in range(ROUNDS + 1)]
    return {name: statistics.median(row[name] for row in times[1:]) for name in turns}


def compete(contestants: dict[str, Contestant]) -> dict[str, float]:
    """Median seconds of a run of each contestant; ends their processes."""
    with contextlib.ExitStack() as stack:
        for contestant in contestants.values():
            stack.enter_context(contestant.process)
        return interleaved({name: contestant.turn for name, contestant in contestants.items()})


def plan_of(device: torch.device, **settings) -> Plan:
    rest = {"weight_decay": 0.0, "seed": 0, "precision": "fp32", "log_every": 50, "checkpoint_every": (50, None)}
    return Plan(epochs=1, batch_size=BATCH, lr=Schedule.parse("3e-4"), device=device, **(rest | settings))


def our_step(module: AutoencoderTraining, images: Tensor, plan: Plan) -> Callable[[], None]:
    adam = adamw(module.parameter_groups(plan.weight_decay), plan.device)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            loss = module(images, None, 0).loss
        loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def peer_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    adam = torch.optim.Adam(model.parameters(), lr=3e-4)

    def step() -> None:
        adam.zero_grad()
        model(images).backward()
        adam.step()

    return step


def training_step(name: str, device: torch.device) -> Callable[[], None]:
    """A training step of `plain`, of `vqp`, or of our model in the precision `name`."""
    images = torch.randint(256, (BATCH, *SHAPE), dtype=torch.uint8, device=device)
    if name in QUANTIZERS:
        return peer_step(Peer(QUANTIZERS[name](512)).to(device), images)
    return our_step(ours(device), images, plan_of(device, precision=name))


def product(kind: str, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """The same matrix product by torch.mm or as a 1x1 convolution; on a CPU the two use different libraries."""
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    pixels = a.view(1, SIDE, 1, SIDE).permute(0, 3, 1, 2)  # [1, C, H, 1], channels last
    return {"mm": lambda: a @ b.T, "convolution": lambda: F.conv2d(pixels, b.view(SIDE, SIDE, 1, 1))}[kind]


def peak(kind: str, dtype: torch.dtype, device: torch.device) -> Contestant:
    return Contestant(product, kind, dtype, device, runs=5, our_allocator=True)


def training(device: torch.device, steps: int) -> dict:
    """Training speed in images/s, compared with the peers and with the rate of matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        training_step("fp32", device)()
    flops = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op)) / BATCH
    peers, precisions = ("plain", "vqp"), {"fp32": torch.float32, "bf16": torch.bfloat16}

    def contestant(name: str, our_allocator: bool) -> Contestant:
        return Contestant(training_step, name, device, runs=steps, our_allocator=our_allocator)

    contestants = {name: contestant(name, our_allocator=name in precisions) for name in (*precisions, *peers)}
    contestants |= {f"{name}, same allocator": contestant(name, our_allocator=True) for name in peers}
    for precision, dtype in precisions.items():
        contestants |= {f"{kind} {precision}": peak(kind, dtype, device) for kind in ("mm", "convolution")}
    took = compete(contestants)
    speed = {name: BATCH / took[name] for name in took}
    result = {"mflop_per_image": flops / 1e6} | {f"{name}_images_per_s": speed[name] for name in peers}
    for precision in precisions:
        rate = speed[precision] * flops
        peaks = {kind: 2 * SIDE**3 / took[f"{kind} {precision}"] for kind in ("mm", "convolution")}
        result[precision] = {"images_per_s": speed[precision]}
        for name in peers:
            result[precision][f"ratio_{name}"] = speed[precision] / speed[name]
            result[precision][f"ratio_{name}_same_allocator"] = speed[precision] / speed[f"{name}, same allocator"]
        result[precision] |= {
            "gemm_fraction": rate / peaks["mm"],
            "fastest_gemm_fraction": rate / max(peaks.values()),
            "gemm_gflops": peaks["mm"] / 1e9,
        }
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


def extra_megabytes(name: str, num_codes: int, vectors: int, device: torch.device) -> float:
    """The megabytes that one pass adds to this process's peak memory, in a process that has done nothing else."""
    run = quantizer_pass(name, num_codes, vectors, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    run()
    return (_resident("VmHWM") - before) / 1e6


def _resident(field: str) -> int:
    """Bytes of memory that Linux counts for this process, now (VmRSS) or at the peak (VmHWM)."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def quantizer(num_codes: int, vectors: int, device: torch.device) -> dict:
    """Time and memory of one pass of each quantizer, compared with the matrix product of vectors and codes."""
    passes = {
        name: Contestant(quantizer_pass, name, num_codes, vectors, device, our_allocator=name == "ours")
        for name in QUANTIZERS
    }
    took = compete(passes | {"mm": peak("mm", torch.float32, device)})
    floor = took["mm"] * vectors * num_codes * DIM / SIDE**3  # time of the product of vectors and codes at this rate
    memory = dict.fromkeys(QUANTIZERS)
    if device.type == "cuda" or Path("/proc/self/clear_refs").exists():
        for name in memory:
            with fresh_process() as fresh:
                memory[name] = fresh.submit(extra_megabytes, name, num_codes, vectors, device).result()
    return {
        "ms": took["ours"] * 1e3,
        "ratio_plain": took["plain"] / took["ours"],
        "ratio_vqp": took["vqp"] / took["ours"],
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
        stage = Stage(module, images, labels, evaluate=lambda: {module.monitor: 0.0}, draw=None, caption="")
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

    def command(folder: str, *options: str) -> list[str]:
        digits = ["train.py", "--dataset", "digits", "--device", device.type, "--log-every", "1"]
        return [sys.executable, *options, *digits, "--log-dir", folder, "--plot-dir", folder, "--name", "run"]

    def first_step(*options: str) -> str:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command(folder, *options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
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
        subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter turns, and a quarter of the vectors")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--output", help="JSON file to write, such as results/speed.json (default: only print)")
    args = parser.parse_args()
    try:
        import vector_quantize_pytorch  # noqa: F401
    except ImportError:
        sys.exit("error: a peer is not installed: pip install vector-quantize-pytorch")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: not available on this machine; use cpu")
    device, quick = torch.device(args.device), args.quick
    if device.type == "cpu":
        keep_memory()
    torch.manual_seed(0)
    vectors = 16_384 if quick else 65_536

    result = {"hardware": describe(device.type), "quick": quick, "vectors": vectors}
    print(result["hardware"])
    result["train"] = training(device, 1 if quick else 6)
    show({"train, peers": result["train"]}, "plain_images_per_s", "vqp_images_per_s")
    show({f"train, {precision}": result["train"][precision] for precision in ("fp32", "bf16")})
    result["quantizer"] = {str(k): quantizer(k, vectors, device) for k in (512, 8192)}
    show({f"quantizer, K = {k}": row for k, row in result["quantizer"].items()})
    result["loop"] = loop(device, 10 if quick else 50)
    show({"loop": result["loop"]})
    result["pipeline"] = pipeline(device, 20 if quick else 100)
    show({"pipeline": result["pipeline"]})
    result |= startup(device)
    show({"start": result}, "startup_s", "startup_imports_s", "help_s")
    if args.output:
        write_json(Path(args.output), result)


if __name__ == "__main__":
    main()
