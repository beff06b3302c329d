"""Images read by one process for each core.

A process imports no torch and takes 40 MB. It is started by its own command line: `multiprocessing` would run the
program's main module in it again, which a script without `if __name__ == "__main__"` does not survive.
"""

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from vqvae.decoding import Read
from vqvae.errors import UserError, one_line
from vqvae.interrupts import SIGNALS

CHUNK = 8  # images that a process gets at once
START = "import sys; sys.path[:] = sys.argv[1:]; from vqvae.workers import serve; serve()"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def cores() -> int:
    """How many processes may compute: the cores that this one may use, or fewer if OMP_NUM_THREADS says so.

    torchrun sets OMP_NUM_THREADS for each of its processes on this machine, and only one of them converts images.
    """
    available = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads):
        available = min(available, int(threads) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return available


def read_all(reads: Iterable[Read], count: int) -> Iterator[bytes | str]:
    """The bytes of images, in order, or why an image cannot be read.

    If `count` is 1, this process reads them; otherwise `count` processes are started. They end when this process does,
    however it ends.
    """
    if count == 1:
        yield from map(attempt, reads)
        return
    workers, reads = Workers(), iter(reads)
    pool = ThreadPoolExecutor(count)
    try:
        ahead: deque[Future[list[bytes | str]]] = deque()
        while part := list(itertools.islice(reads, CHUNK)):
            ahead.append(pool.submit(workers.read, part))
            if len(ahead) > 2 * count:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        workers.end()
        pool.shutdown(cancel_futures=True)


def attempt(read: Read) -> bytes | str:
    try:
        return read().tobytes()
    except Exception as problem:  # decoders raise anything on a damaged file
        return one_line(problem, 120)


class Workers:
    """A process for each thread that calls `read`."""

    def __init__(self) -> None:
        self.mine = threading.local()
        self.started: list[subprocess.Popen] = []
        self.lock, self.ended = threading.Lock(), False

    def read(self, reads: list[Read]) -> list[bytes | str]:
        """The images' bytes, or reasons. If a decoder ends its process, its image counts as unreadable."""
        process = self._process()
        try:
            pickle.dump(reads, process.stdin)
            process.stdin.flush()
            found: list[bytes | str] = pickle.load(process.stdout)
            return found
        except (OSError, EOFError, pickle.UnpicklingError):
            if self.ended:
                return []
            code = process.wait()
            self.mine.process = None
            if len(reads) == 1:
                return [f"its decoder ended the process (exit code {code})"]
            return [result for read in reads for result in self.read([read])]

    def _process(self) -> Any:
        """This thread's process, started if it has none. Raises `UserError` if that fails."""
        if getattr(self.mine, "process", None) is None:
            try:
                self.mine.process = self._start()
                pickle.load(self.mine.process.stdout)  # its first word
            except (OSError, EOFError, pickle.UnpicklingError):
                problem = "cannot be started to read images; OMP_NUM_THREADS=1 reads them without other processes"
                raise UserError(f"{sys.executable}: {problem}") from None
        return self.mine.process

    def _start(self) -> Any:
        with self.lock:
            if self.ended:
                raise EOFError
            command = [sys.executable, "-c", START, *sys.path]
            process = subprocess.Popen(
                command, env=os.environ | ONE_THREAD, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self.started.append(process)
            return process

    def end(self) -> None:
        with self.lock:
            self.ended = True
        for process in self.started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    cast(BinaryIO, pipe).close()


def serve() -> None:
    """Read images for the process that started this one, until that closes the pipe or ends."""
    for number in SIGNALS:  # sent to all processes of a terminal or a job: the first one stops
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for decoders that print
    answer: Any = True  # it has started
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pickle.dump(answer, answers)
            answers.flush()
            answer = [attempt(read) for read in pickle.load(sys.stdin.buffer)]
    os._exit(0)
