"""Several processes that train one model: `torchrun --nproc-per-node 2 train.py ...`, one GPU each, or on the CPU.

Every process has the whole model, and the whole data set or one of several parts of it (`--data-shards`). It takes its
share of every batch (shares.py). Whatever is learned from a batch is reduced over all processes, so their weights stay
equal bit for bit. Only the first (rank 0) writes. With one process, every function here does nothing and costs nothing.

A process that dies ends the others (`Peers`): within seconds, with one line, however long they may wait for work.
"""

import ctypes
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqvae import interrupts
from vqvae.errors import OptionError, UserError, one_line

Result = TypeVar("Result")
TIMEOUT = timedelta(hours=6)  # the others wait while the first evaluates, draws, or reads images
JOIN = timedelta(minutes=5)  # for all processes to start
FOUND, ENDED = 2.0, 15.0  # seconds that a process has to notice that another one died, and then to clean up
FAILED = 2  # exit code


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world() -> int:
    return dist.get_world_size() if _several() else 1


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def start(device: torch.device) -> None:
    """Join the other processes that torchrun started, if any; from here on only the first prints."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or _several():
        return
    if device.type not in ("cpu", "cuda"):
        raise OptionError("device", device.type, f"{count} processes cannot share it; use cpu, or one process")
    if device.type == "cuda":
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
        if here > there:
            raise OptionError("device", "cuda", f"{here} processes but {there} GPUs; start as many, or use cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # decisions of the host use gloo even with GPUs, so that no process waits for its device to take them
    _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 (until the process ends)


def _join(backend: str) -> None:
    """Start the process group and watch the peers. In a thread: in the main thread, signals would have to wait."""
    problems: list[Exception] = []

    def join() -> None:
        global _peers
        try:
            dist.init_process_group(backend, timeout=JOIN)
            _peers = Peers()
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            set_timeout(TIMEOUT)
        except Exception as problem:
            problems.append(problem)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if problems:
        reason = one_line(problems[0])
        raise UserError(f"the processes of torchrun cannot reach each other ({reason}); see that all of them started")


def on_lost_process(advice: Callable[[], str]) -> None:
    """Set the end of the line about a process that died: how to go on."""
    if _peers:
        _peers.advice = advice


def stop() -> None:
    """Leave the other processes, at the end of a run or while an exception of it is handled.

    Ends this process at once if another one died, or says the same error as this one.
    """
    global _peers
    peers, _peers = _peers, None
    if peers:
        peers.leave(sys.exc_info()[1])
    if _several():
        dist.destroy_process_group()


class Lost(SystemExit):
    """Raised in the main thread of a process that need not go on, because another one died."""

    def __init__(self) -> None:
        super().__init__(FAILED)


class Peers:
    """Connections of the first process with all others, which the system closes when a process dies.

    A thread waits for that. Before a process ends, it sends a letter: `.` at the end of its work, `!` after an error.
    One process prints the line about what happened, and the first process decides which: it answers the first `!` with
    `s` (say it) and sends the others `q` (quiet). When a process dies, waiting processes get an error of gloo, and
    computing processes get `Lost`. Processes that still run after `ENDED` seconds, such as in NCCL, are ended.
    """

    def __init__(self) -> None:
        self.advice: Callable[[], str] = lambda: "start it again as before"
        self.leaving, self.news = threading.Event(), threading.Event()
        self.line: str | None = None  # to print, if this process reports that another one died
        self.taken = False  # whether a process was chosen to say what happened
        self.lock = threading.Lock()
        self.others = self._connect()
        threading.Thread(target=self._watch, daemon=True).start()

    def _connect(self) -> dict[socket.socket, int]:
        """The connections of this process, and the ranks at their other ends."""
        here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        known: list[Any] = [None, None]  # port, and a word that only these processes know
        server = None
        if rank() == 0:
            server = socket.create_server(("127.0.0.1" if here else "", 0), backlog=world())
            known = [server.getsockname()[1], secrets.token_bytes(16)]
        dist.broadcast_object_list(known, src=0, device=torch.device("cpu"))
        port, word = known
        if server is None:
            host = "127.0.0.1" if here else os.environ["MASTER_ADDR"]
            mine = socket.create_connection((host, port), timeout=60)
            mine.sendall(word + rank().to_bytes(4, "big"))
            found = {mine: 0}
        else:
            found = {}
            server.settimeout(60)
            while len(found) < world() - 1:
                other, _ = server.accept()
                other.settimeout(60)
                with suppress(OSError):
                    hello = other.recv(20, socket.MSG_WAITALL)
                    if secrets.compare_digest(hello[:16], word):
                        found[other] = int.from_bytes(hello[16:], "big")
            server.close()
        for connection in found:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # tells of machines that vanish
            for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
                with suppress(AttributeError):  # not on every system
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return found

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self.others:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    other: Any = key.fileobj
                    try:
                        letter = other.recv(1)
                    except OSError:
                        letter = b""
                    if letter == b".":
                        selector.unregister(other)
                    elif self._told(other, letter):
                        return

    def _told(self, connection: socket.socket, letter: bytes) -> bool:
        """React to what another process sent, or to its death; True if there is nothing more to wait for."""
        number = self.others[connection]
        if letter == b"s":
            self.news.set()
            return True
        with self.lock:
            speaks, self.taken = not self.taken, True
        if letter == b"" and number == 0:  # the first process died: one process on each machine speaks
            local = int(os.environ.get("LOCAL_RANK", rank()))
            speaks = local == (1 if local == rank() else 0)
        if letter == b"!":
            self._send(connection, b"s" if speaks else b"q")
        if rank() == 0:
            for other in self.others:
                if other is not connection:
                    self._send(other, b"q")
        if letter == b"" and speaks:
            self.line = f"process {number} of {world()} ended without a word"
        self.news.set()
        if not self.leaving.wait(FOUND):
            raise_in_main(Lost)
            if not self.leaving.wait(ENDED):
                self.end()
        return True

    def leave(self, problem: BaseException | None) -> None:
        """Say goodbye. Ends this process if another one died or speaks for it."""
        stopped = isinstance(problem, KeyboardInterrupt)
        code = interrupts.exit_code() if stopped and not self.line else FAILED
        if isinstance(problem, RuntimeError):
            self.news.wait(FOUND)  # another process's death may be the cause
        elif stopped:  # alone by torchrun because another one died, or with all others: the first one prints it
            self.news.wait(FOUND / 4)
        self.leaving.set()
        if self.news.is_set():
            self.end(code)
        if problem is None:
            for other in self.others:
                self._send(other, b".")
            return
        with self.lock:
            speaks, self.taken = not self.taken, True
        if rank() == 0:
            for other in self.others:
                self._send(other, b"q")
            if not speaks:
                self.end(code)
        else:
            self.taken = False
            self._send(next(iter(self.others)), b"!")
            if self.news.wait(FOUND) and self.taken:  # `q` takes it, `s` does not
                self.end(code)
        if isinstance(problem, UserError):
            problem.chosen = True

    def end(self, code: int = FAILED) -> NoReturn:
        """Print the line, if there is one, and end at once: exit handlers may wait for processes that died."""
        with suppress(Exception):
            if self.line:
                print(f"error: {self.line}; {self.advice()}", file=sys.stderr, flush=True)
        os._exit(code)

    @staticmethod
    def _send(connection: socket.socket, letter: bytes) -> None:
        with suppress(OSError):
            connection.sendall(letter)


_peers: Peers | None = None


def raise_in_main(problem: type[BaseException]) -> None:
    """Raise an exception in the main thread, as soon as that runs Python."""
    main = threading.main_thread().ident or 0
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(problem))


def share(batch: Tensor, parts: int = 1) -> Tensor:
    """This process's rows of a batch; another process may have one row more.

    With several parts of the data, the batch is of this process's part, which the processes with the same part share.
    """
    alike = world() // parts
    return batch.tensor_split(alike)[rank() % alike]


def first_of_part(parts: int) -> bool:
    """Whether this process is the first one with its part of the data."""
    return rank() % (world() // parts) == 0


def of_parts(value: Result, parts: int) -> list[Result]:
    """One value for each part of the data, from its first process; they are pickled."""
    return gather_objects(value)[:: world() // parts]


def rows_of_parts(rows: Tensor, parts: int) -> Tensor:
    """The rows `[N, ...]` of all parts of the data, one after the other, given those of this process's part."""
    return gather_rows(share(rows, parts)) if parts > 1 else rows


def sum_step(parameters: Iterable[Tensor], metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over the processes of the gradients (in place) and of the metrics, in one message."""
    if world() == 1:
        return metrics
    gradients = [p.grad for p in parameters if p.grad is not None]
    values = [*gradients, *metrics.values()]
    sums = unflatten(sum_over(flatten(values)), values)
    for gradient, total in zip(gradients, sums, strict=False):
        gradient.copy_(total)
    return dict(zip(metrics, sums[len(gradients) :], strict=True))


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector of floats, in float64 if one of them is."""
    precise = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if precise else torch.float32
    return torch.cat([tensor.to(dtype).reshape(-1) for tensor in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors of a vector, in the shapes and types of others."""
    parts = flat.split([tensor.numel() for tensor in like])
    return tuple(part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True))


def sum_over(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, with the same bits in every process."""
    if world() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """The first process's tensor; those of the others must have its shape and type."""
    if world() == 1:
        return tensor
    sent = tensor.to(_carrier(tensor.device)).clone(memory_format=torch.contiguous_format)
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device)


def _carrier(device: torch.device) -> torch.device:
    """A device whose tensors can be sent: a process group that other code made may have only nccl, without the CPU."""
    backends = dist.get_backend_config()  # such as cpu:gloo,cuda:nccl
    return device if f"{device.type}:" in backends else torch.device("cuda")


def gather_rows(rows: Tensor) -> Tensor:
    """The rows `[N_rank, ...]` of all processes in order of rank; N may differ between them."""
    if world() == 1:
        return rows
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    # processes can only exchange equal shapes: each sends as many rows as the longest has
    padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def hides_bars() -> bool | None:
    """The value for tqdm's `disable`: only the first process has a bar, where the output is a terminal (None)."""
    return True if rank() else None


def gather_objects(value: Result) -> list[Result]:
    """The values of all processes, in order of rank; they are pickled."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def any_of(*wishes: bool) -> tuple[bool, ...]:
    """For each wish, whether any process has it. Decisions by clocks or signals must be the same in all processes."""
    if world() == 1:
        return wishes
    votes = torch.tensor(wishes, dtype=torch.uint8)  # on the CPU, wherever the model computes
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(map(bool, votes.tolist()))


def barrier() -> None:
    any_of(False)


def on_first(work: Callable[[], Result]) -> Result:
    """The result of `work`, done by the first process (nothing on a device); its `UserError` is raised everywhere."""
    if world() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except UserError as problem:
            outcome[1] = problem
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def part_of(count: int) -> int:
    """Which of `count` parts of the data this process has: neighboring processes have the same."""
    return rank() * count // world()


@contextmanager
def first_goes_first(parts: int = 1) -> Iterator[bool]:
    """Let the first process finish before the others begin, so that they find the files it downloads or converts.

    If the data have several parts, the first process of each part begins. The first process of every other machine is
    next, because it may not see these files. Yields whether this process is one of these.
    """
    begins = rank() == 0 or (rank() - 1) * parts // world() != part_of(parts)
    turn = 0 if begins else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn):
        barrier()
    try:
        yield turn < 2
    finally:
        for _ in range(2 - turn):
            barrier()
