"""Processes that are stopped at a random moment.

Two thirds of the trials train a small run, with a checkpoint at every step or after every epoch. They kill it once or
twice (SIGKILL, SIGTERM or SIGINT), and continue with `--resume`, or with the same command if no checkpoint was saved.
Such a trial survives if the result is that of a run never stopped: weights and optimizer of checkpoint.pt and best.pt
bit for bit, the rows of metrics.jsonl, and the points that TensorBoard reads.

The other trials send SIGTERM or SIGINT, once or twice, to a process of any command. Half of them start a new Python
process, which imports everything; the others fork. Such a trial survives if the process ends with one line and the exit
code 143 or 130, or had finished its work, and leaves no traceback and no incomplete file.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets  # noqa: F401 (this and the next: children are forks, which need not import them again)
import torch
import torch._dynamo
import torch.utils.tensorboard
from _children import ROOT, end_with, parts, run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqvae import checkpoint, experiment, report, tokens  # noqa: F401
from vqvae.runs import LOG, read_metrics

SMALL = (
    "--limit 60 --batch-size 20 --hidden 8 --codes 16 --code-dim 4 --image-size 16 --device cpu --log-every 2"
).split()
PRIOR = "--prior pixelcnn channels=8 blocks=1 --batch-size 20".split()
KILLED = [*SMALL, "--epochs", "4", "--name", "run"]
STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def run(trials: int, folder: Path) -> tuple[int, int]:
    draw = random.Random(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job would ignore it
    killed, fresh = Killed(folder / "killed"), Fresh(folder / "fresh")
    losses = []
    for trial in range(trials):
        losses.append((killed if trial % 3 else fresh).trial(draw, trial))
        if losses[-1]:
            print(f"  trial {trial}: {losses[-1]}", file=sys.stderr)
    return losses.count(""), trials


class Child:
    """A script of this package in a process of its own. A fork saves the time of the imports."""

    def __init__(self, words: list[str], cwd: Path, *, fork: bool, script: str = "train.py"):
        self.log = cwd / "output.txt"
        self.started = time.perf_counter()
        self.code: int | None = None
        if not fork:
            command = [sys.executable, str(ROOT / script)] if script.endswith(".py") else [sys.executable, "-m", script]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            with open(self.log, "wb") as out:
                process = subprocess.Popen([*command, *words], cwd=cwd, env=environment, stdout=out, stderr=out)
            self.pid = process.pid
            process.returncode = 0  # its end is awaited below
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            end_with(lambda: self._run(script, words, cwd))

    def _run(self, script: str, words: list[str], cwd: Path) -> None:
        os.chdir(cwd)
        out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        run_script(script, words)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def alive(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, seconds: float = 120) -> int:
        """The exit code; -n if signal n killed it. A process that does not end is killed, and its code is 999."""
        end = time.perf_counter() + seconds
        while self.alive():
            if time.perf_counter() > end:
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = 999
            time.sleep(0.005)
        return self.code or 0

    def catches_sigterm(self, seconds: float = 2) -> None:
        """Wait until the process handles SIGTERM. Before that it is Python that starts."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            try:
                status = Path(f"/proc/{self.pid}/status").read_text()
            except OSError:
                return
            if int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
                return
            time.sleep(0.002)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Killed:
    """Runs that are killed and resumed, compared with one that was not."""

    def __init__(self, folder: Path):
        self.folder, self.expected, self.seconds = folder, {}, 0.0
        for every in ("1", "300s"):
            straight = folder / f"straight-{every}"
            straight.mkdir(parents=True)
            child = Child([*KILLED, "--checkpoint-every", every], straight, fork=True)
            if child.wait():
                raise SystemExit(f"the run never stopped failed: {child.output}")
            self.seconds = max(self.seconds, time.perf_counter() - child.started)
            self.expected[every] = content(straight / "logs" / "run")

    def trial(self, draw: random.Random, number: int) -> str:
        """A description of what was lost; empty if the trial survived."""
        here = self.folder / str(number)
        here.mkdir()
        every = draw.choice(["1", "300s"])
        logs = here / "logs" / "run"
        for _ in range(draw.choice([1, 1, 2])):
            child = Child(self.words(logs, every), here, fork=True)
            time.sleep(draw.uniform(0, self.seconds))
            stop = draw.choice([signal.SIGKILL, *STOPS])
            child.signal(stop)
            code = child.wait()
            if code not in (0, -stop, 128 + stop) or "Traceback" in child.output:
                return f"exit code {code} after {stop.name}: {child.output[-300:]!r}"
            if code == 0 or "\ndone: " in child.output:
                break
        else:
            child = Child(self.words(logs, every), here, fork=True)
            code = child.wait()
            if code and "has taken all of its" not in child.output:  # killed after its last checkpoint
                return f"exit code {code} when it went on after {stop.name}: {child.output[-300:]!r}"
        lost = differences(self.expected[every], content(logs)) or parts(here)
        if not lost:
            shutil.rmtree(here)
        return lost and f"{lost}, after {stop.name}, saved every {every}"

    def words(self, logs: Path, every: str) -> list[str]:
        saved = (logs / "checkpoint.pt").exists()
        return ["--resume", "logs/run"] if saved else [*KILLED, "--checkpoint-every", every]


class Fresh:
    """Commands in new processes, which import, read data, train, draw, encode, decode and export."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        for words in (
            [*SMALL, "--epochs", "2", "--name", "run"],
            [*PRIOR, "--checkpoint", "logs/run", "--epochs", "1", "--name", "prior"],
        ):
            self.finish(Child(words, folder, fork=True))
        for i in range(40):
            (folder / "images").mkdir(exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "images" / f"{i}.png")
        codes = ["encode", "--checkpoint", "logs/run", "--input", "images", "--output", "codes.npz", "--device", "cpu"]
        self.finish(Child(codes, folder, fork=True, script="vqvae"))
        model = ["--checkpoint", str(folder / "logs" / "run"), "--device", "cpu"]
        prior = ["--checkpoint", str(folder / "logs" / "prior"), "--device", "cpu", "--plot-dir", "plots"]
        images = str(folder / "images")
        train = [*SMALL, "--epochs", "3", "--name", "run"]
        self.commands: dict[str, tuple[str, list[str]]] = {
            "train": ("train.py", [*train, "--checkpoint-every", "1"]),
            "k-means": ("train.py", [*train, "--bottleneck", "vq", "codebook=ema", "init=kmeans"]),
            "folder": ("train.py", [*train, "--dataset", "folder", "--data-dir", images]),
            "stage two": ("train.py", [*PRIOR, *model, "--epochs", "2", "--name", "prior"]),
            "evaluate": ("train.py", ["--evaluate", *model, "--iw-samples", "20"]),
            "visualize": ("visualize_codes.py", [*model, "--plot-dir", "plots"]),
            "sample": ("visualize_codes.py", [*prior, "--only", "samples.png", "completions.png"]),
            "encode": ("vqvae", ["encode", *model, "--input", images, "--output", "codes.npz"]),
            "decode": ("vqvae", ["decode", str(folder / "codes.npz"), *model, "--output", "decoded"]),
            "export": ("vqvae", ["export", *model[:2], "--output", "exported"]),
            "help": ("vqvae", ["train", "--help"]),
        }
        self.whole: dict[
            tuple[str, bool], tuple[float, str]
        ] = {}  # how long a command takes, and the beginning of its last line

    def finish(self, child: Child) -> None:
        if code := child.wait():
            raise SystemExit(f"exit code {code}: {child.output}")

    def start(self, name: str, here: Path, *, fork: bool) -> Child:
        here.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(here / "cache")
        script, words = self.commands[name]
        return Child(words, here, fork=fork, script=script)

    def trial(self, draw: random.Random, number: int) -> str:
        """A description of what was lost; empty if the trial survived."""
        name = draw.choice(list(self.commands))
        kind = name, draw.random() < 0.5
        if kind not in self.whole:
            child = self.start(name, self.folder / f"whole-{name}-{kind[1]}", fork=kind[1])
            self.finish(child)
            self.whole[kind] = time.perf_counter() - child.started, child.output.splitlines()[-1][:4]
        seconds, last_line = self.whole[kind]
        here = self.folder / str(number)
        child = self.start(name, here, fork=kind[1])
        child.catches_sigterm()
        time.sleep(draw.uniform(0, seconds))
        stop = draw.choice(list(STOPS))
        child.signal(stop)
        if twice := draw.random() < 0.3:
            time.sleep(draw.choice([0, 0.001, 0.01, 0.1]))
            child.signal(stop)
        asked = time.perf_counter()
        code = child.wait()
        problem = f"{name}, {'two ' * twice}{stop.name}, exit code {code}: {child.output[-400:]!r}"
        finished = f"\n{last_line}" in f"\n{child.output}"
        lines = child.output.count("interrupted")
        if code == STOPS[stop] and not 1 <= lines <= 1 + twice:
            return problem
        if code != STOPS[stop] and (lines or code not in (0, -stop) or not finished):
            return problem
        if any(word in child.output for word in ("Traceback", "Exception ignored", "terminate called", "Error")):
            return problem
        if time.perf_counter() - asked > 20:
            return f"ended late: {problem}"
        if lost := "" if twice else parts(here):
            return f"{lost}: {problem}"
        shutil.rmtree(here)
        return ""


def content(folder: Path) -> dict[str, Any]:
    """All that a run's folder says about the run, except times."""
    rows = read_metrics(folder / LOG)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    return {
        "metrics.jsonl": [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows],
        **{name: saved(folder / name) for name in ("checkpoint.pt", "best.pt")},
        "scalars": {
            tag: [(e.step, None if "images_per_s" in tag else e.value) for e in events.Scalars(tag)]
            for tag in tags["scalars"]
            if not tag.startswith("result/")  # of the HParams tab; written after the last checkpoint
        },
        "images": {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]},
        "histograms": {tag: [e.step for e in events.Histograms(tag)] for tag in tags["histograms"]},
        "texts": {tag: [e.step for e in events.Tensors(tag)] for tag in tags["tensors"] if tag.startswith("config")},
    }


def saved(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and numbers, without those that depend on folder and time."""
    stored = checkpoint.read(path)
    state = {f"model.{name}": value for name, value in stored["model"].items()}
    for index, values in stored["optimizer"]["state"].items():
        state |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    return state | {name: stored[name] for name in ("step", "epoch", "best", "best_epoch")}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """A description of the differences."""
    same: Callable[[Any, Any], bool] = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # noqa: E731
    lost = []
    for name, wanted in expected.items():
        if isinstance(wanted, dict):
            keys = sorted({*wanted, *found[name]})
            wrong = [k for k in keys if k not in wanted or k not in found[name] or not same(wanted[k], found[name][k])]
            if wrong:
                lost.append(f"{name} differs in {', '.join(wrong[:3])}")
        elif wanted != found[name]:
            lost.append(f"{name} differs")
    return "; ".join(lost)
