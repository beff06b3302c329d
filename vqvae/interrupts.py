"""Ctrl-C, SIGTERM and a closed terminal end a command with one line and 130, 143 or 129, wherever they arrive.

A script calls `install` before it imports anything slow, `cli.run` calls the command within `raising`, and the training
loop within `Interrupt`. A signal that a process was started to ignore stays ignored.
"""

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

Handler = Callable[[int, FrameType | None], Any]

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # the terminal was closed, several times at once; not on Windows
SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)))
LINE = "interrupted"
AGAIN = 0.2  # seconds after which `Stopped` is raised again where a library swallowed it
COPIES = 2.0  # seconds in which torchrun sends its processes the Ctrl-C that the terminal sent them already

received: int | None = None  # the first signal since `raising` or `Interrupt` began


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop."""


def exit_code() -> int:
    """130 after Ctrl-C, 143 after SIGTERM, 129 after a closed terminal."""
    return 128 + (received or signal.SIGINT)


def install() -> None:
    """From now on the signals print one line and end the process at once."""
    _handle(_exit_at_once)


def leave(code: int) -> NoReturn:
    """End the process as `sys.exit` does. An interrupted process does not wait for threads and exit handlers."""
    _handle(signal.SIG_DFL)
    if received is None:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within the block the first signal raises `Stopped`, and a second one ends the process at once.

    Libraries may swallow the exception, or raise another one in its place. `Stopped` is therefore raised again until
    the block ends, and replaces any exception that leaves the block after it.
    """
    global received
    received = None
    raiser, hook = _Raiser(), sys.unraisablehook
    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, Stopped) else hook(lost)
    before = _handle(raiser.first)
    try:
        try:
            yield
        except Stopped:
            raise
        except BaseException as problem:
            if raiser.raised:
                raise Stopped from problem
            raise
        finally:
            raiser.ended = True
    finally:
        raiser.end()
        _restore(before)
        sys.unraisablehook = hook


class _Raiser:
    """The handlers within `raising`."""

    def __init__(self) -> None:
        self.raised = self.ended = False
        self.alarm: Any = None  # the handler of SIGALRM before

    def first(self, number: int, frame: FrameType | None) -> None:
        global received
        received = received or number
        if self.raised or self.ended:
            _exit_at_once(number, frame)
        self.raised = True
        if sys.platform != "win32":
            self.alarm = signal.signal(signal.SIGALRM, self.again)
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        raise Stopped

    def again(self, number: int, frame: FrameType | None) -> None:
        problem: BaseException | None = sys.exc_info()[1]
        while problem is not None and not isinstance(problem, Stopped):
            problem = problem.__context__
        if problem is None and not self.ended:  # otherwise `Stopped` is on its way through `finally` blocks
            raise Stopped

    def end(self) -> None:
        if self.raised and sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.alarm)


class Interrupt:
    """Turns the first signal into a request that a loop obeys. A second one calls the previous handler, which stops."""

    def __enter__(self) -> "Interrupt":
        global received
        received = None
        self.wanted, self.since = False, 0.0
        self.previous = _handle(self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        global received
        if not self.wanted:
            received, self.wanted, self.since = number, True, time.monotonic()
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self.since > COPIES:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)

    def __exit__(self, *error: object) -> None:
        _restore(self.previous)


def _handle(handler: Handler | signal.Handlers) -> dict[int, Any]:
    """Set the handler of the signals, except where one is ignored; returns the handlers before.

    Only the main thread may do so; in another thread the signals stay with the program that started it.
    """
    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                of_this = _hung_up(handler) if number == HANGUP and callable(handler) else handler
                before[number] = signal.signal(number, of_this)
    return before


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _hung_up(handler: Handler) -> Handler:
    """A handler of a closed terminal: outputs to it go nowhere, and `handler` is called unless a signal came before."""

    def handle(number: int, frame: FrameType | None) -> None:
        for output in (1, 2):
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output):  # writing to it would fail
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, output)
                    os.close(nowhere)
        if received is None:
            handler(number, frame)

    return handle


def _exit_at_once(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{LINE}\n".encode())
    os._exit(128 + number)
