"""Several processes train one model, and one of them fails.

A trial trains a small run with two or three processes. It starts them as torchrun does. After one has failed, it sends
SIGTERM to the others, as torchrun does, at once or only after ten seconds. In most trials one process is killed with
SIGKILL at a random moment; in the others one process raises an error of the user's at a random step, or all of them do,
or all get SIGTERM.

It survives if all processes end within a minute of the failure, with exit codes other than 0, without a traceback, and
with one line on stderr in total. After SIGKILL that line says how to continue: with `--resume` if there is a
checkpoint, which must then load. A process that is not yet connected to the others may say only "interrupted". A run
that ended before the failure survives too. Only killed processes may leave temporary files.

A loss is described in a line on stderr.
"""

import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import sklearn.datasets  # noqa: F401
import torch
import torch.utils.tensorboard
from _children import end_with, run_script

from vqvae import checkpoint, experiment, training  # noqa: F401 (children are forks that need not import them again)
from vqvae.errors import UserError

LINE = [
    "--limit", "60", "--batch-size", "10", "--codes", "16", "--code-dim", "4", "--image-size", "16",
    "--device", "cpu", "--log-every", "1", "--epochs", "2", "--max-steps", "12", "--checkpoint-every", "1",
    "--name", "run",
]  # fmt: skip
KINDS = ("kill", "kill", "kill", "kill", "error", "same error", "stop")
SECONDS = 60  # in which all others must end


def run(trials: int, folder: Path) -> tuple[int, int]:
    draw = random.Random(0)
    whole = folder / "whole"
    whole.mkdir()
    started = time.perf_counter()
    port = free_port()
    processes = [Process(whole, number, 2, port) for number in range(2)]
    codes = wait(processes, time.perf_counter() + 600)
    if any(code != 0 for code in codes):
        raise SystemExit(f"exit codes {codes}: {[process.errors for process in processes]}")
    seconds = time.perf_counter() - started
    lost = 0
    for number in range(trials):
        here = folder / str(number)
        here.mkdir()
        kind, count = draw.choice(KINDS), draw.choice([2, 3])
        described, problem = trial(here, draw, kind, count, seconds)
        if problem:
            lost += 1
            print(f"  trial {number}: {described}: {problem}", file=sys.stderr)
        shutil.rmtree(here)
    return trials - lost, trials


class Process:
    """One process of a run, a fork of this one."""

    def __init__(
        self, cwd: Path, number: int, count: int, port: int, *, fails_at: int | None = None, bad: bool = False
    ):
        self.log = cwd / f"{number}.err"
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            end_with(lambda: self._run(cwd, number, count, port, fails_at, bad))

    def _run(self, cwd: Path, number: int, count: int, port: int, fails_at: int | None, bad: bool) -> None:
        os.chdir(cwd)
        os.environ |= {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "trial",
        }  # fmt: skip
        os.dup2(os.open(cwd / f"{number}.out", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT), 2)
        torch.set_num_threads(1)
        if fails_at is not None:
            fail_at(fails_at)
        run_script("train.py", [*LINE, "--hidden", "0" if bad else "8"])

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    @property
    def errors(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def fail_at(step: int) -> None:
    """Make the training loop raise an error of the user's at a step."""
    whole = training.Loop.train_step

    def train_step(self: training.Loop, index: torch.Tensor) -> None:
        if self.step == step:
            raise UserError("the data cannot be read; mend them")
        whole(self, index)

    training.Loop.train_step = train_step  # type: ignore[method-assign]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait(processes: list[Process], end: float, patience: float = 0.1) -> list[int | None]:
    """Exit codes of processes that ended in time. `patience` seconds after the first failure, others get SIGTERM."""
    failed: float | None = None
    while None in [process.poll() for process in processes] and time.perf_counter() < end:  # polls every process
        if failed is None and any(process.code for process in processes):
            failed = time.perf_counter()
        if failed is not None and time.perf_counter() > failed + patience:
            for process in processes:
                process.signal(signal.SIGTERM)
            failed = float("inf")
        time.sleep(0.01)
    codes = [process.code for process in processes]
    for process in processes:
        process.signal(signal.SIGKILL)
        while process.poll() is None:
            time.sleep(0.01)
    return codes


def trial(here: Path, draw: random.Random, kind: str, count: int, seconds: float) -> tuple[str, str]:
    """A description of the trial, and one of what was lost, empty if the trial survived."""
    victim, patience, port = draw.randrange(count), draw.choice([0.1, 10.0]), free_port()
    if kind == "same error":  # a process that is not connected yet waits three seconds for torchrun's SIGTERM
        patience = 0.1
    step, moment = draw.randrange(12), draw.uniform(0, seconds)
    described = (
        f"{kind}, {count} processes, number {victim} at step {step} or {moment:.2f} s, SIGTERM after {patience} s"
    )
    processes = [
        Process(here, number, count, port, bad=kind == "same error",
                fails_at=step if kind == "error" and number == victim else None)
        for number in range(count)
    ]  # fmt: skip
    if kind in ("kill", "stop"):
        time.sleep(moment)
    killed = processes[victim] if kind == "kill" and processes[victim].poll() is None else None
    if killed:
        killed.signal(signal.SIGKILL)
    if kind == "stop":
        for process in processes:
            process.poll()
            process.signal(signal.SIGTERM)
    codes = wait(processes, time.perf_counter() + SECONDS, patience)
    text = "".join(process.errors for process in processes)
    printed = "".join(path.read_text() for path in here.glob("*.out"))
    lines = [line for line in text.splitlines() if not line.startswith("[W")]  # warnings of torch's C++
    problem = f"exit codes {codes}: {text[-1500:]!r}"
    left = [str(path) for path in here.rglob("*.partial") if not killed or f".{killed.pid}." not in path.name]
    if None in codes:
        return described, f"did not end; {problem}"
    if any(word in text for word in ("Traceback", "terminate called", "Exception ignored")):
        return described, problem
    if left:
        return described, f"left {left}; {problem}"
    saved = here / "logs" / "run" / "checkpoint.pt"
    if saved.exists():
        checkpoint.read(saved)
    if "done: " in printed or (kind == "stop" and "interrupted; saved" in printed):
        return described, "" if lines in ([], ["interrupted"]) else problem  # the line, at the very end
    if any(code == 0 for code in codes):
        return described, problem
    if kind in ("kill", "stop") and lines and set(lines) == {"interrupted"}:  # not connected yet
        connected = any("epoch" in path.read_text() for path in here.glob("*.out"))
        return described, problem if connected or len(lines) > count else ""
    if len(lines) != 1:
        return described, f"{len(lines)} lines; {problem}"
    wanted = ("--resume " if saved.exists() else "start it again") if kind == "kill" else ""
    return described, "" if wanted in lines[0] else problem
