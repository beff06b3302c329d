"""Contestants that take turns, so that other load on the machine slows all of them down alike."""

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor

import torch

from vqvae.devices import keep_memory

ROUNDS = 5


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


def interleaved(turns: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each contestant. All take turns, after one warm-up turn each."""
    times = [{name: turn() for name, turn in turns.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(row[name] for row in times[1:]) for name in turns}


def compete(contestants: dict[str, Contestant]) -> dict[str, float]:
    """Median seconds of a run of each contestant; ends their processes."""
    with contextlib.ExitStack() as stack:
        for contestant in contestants.values():
            stack.enter_context(contestant.process)
        return interleaved({name: contestant.turn for name, contestant in contestants.items()})
