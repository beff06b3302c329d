"""Signals end a command with one line and 128 plus their number, also where a library swallows them."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers import ROOT
from vqvae import cli, interrupts
from vqvae.errors import UserError

EACH = pytest.mark.parametrize("number", interrupts.SIGNALS)


@pytest.fixture(autouse=True)
def same_handlers_afterwards():
    numbers = (*interrupts.SIGNALS, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    yield
    interrupts.received = None
    assert ([signal.getsignal(number) for number in numbers], sys.unraisablehook) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def wait() -> None:
    for _ in range(500):
        time.sleep(0.01)
    pytest.fail("nothing stopped it")


def run(main) -> int:
    return cli.run(lambda argv: main(), [])


@EACH
def test_a_signal_ends_a_command_with_one_line(number, capsys):
    cleaned = []

    def main():
        try:
            send(number)
            wait()
        finally:
            cleaned.append(True)

    assert run(main) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"
    assert cleaned


@EACH
def test_a_swallowed_interrupt_is_raised_again(number, capsys):
    def main():
        try:
            send(number)
            wait()
        except BaseException:
            pass
        wait()

    assert run(main) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_that_swallows_the_interrupt_and_ends_is_interrupted(capsys):
    def main():
        try:
            send(signal.SIGTERM)
        except BaseException:
            return 0

    assert run(main) == 143
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("problem", [RuntimeError("mangled"), UserError("no such file"), OSError("no such file")])
def test_an_exception_raised_in_place_of_an_interrupt_counts_as_the_interrupt(problem, capsys):
    def main():
        try:
            send(signal.SIGINT)
            wait()
        except KeyboardInterrupt:
            raise problem from None

    assert run(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_where_python_ignores_exceptions_prints_nothing_and_is_raised_again(capsys):
    class Library:
        def __del__(self):
            send(signal.SIGINT)

    def main():
        Library()
        wait()

    assert run(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_cleaning_up_is_not_interrupted_again(capsys):
    cleaned = []

    def main():
        try:
            send(signal.SIGINT)
            wait()
        finally:
            try:
                raise OSError("an error while cleaning up")
            except OSError:
                time.sleep(3 * interrupts.AGAIN)
            time.sleep(2 * interrupts.AGAIN)
            cleaned.append(True)

    assert run(main) == 130
    assert cleaned


def test_an_error_without_an_interrupt_stays_what_it_is():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)
    assert run(lambda: 7) == 7


def test_a_message_of_the_interrupt_ends_the_line(capsys):
    def main():
        try:
            send(signal.SIGINT)
            wait()
        except KeyboardInterrupt as stopped:
            stopped.args = ("resume it",)
            raise

    assert run(main) == 130
    assert capsys.readouterr().err == "interrupted; resume it\n"


def test_the_first_request_is_noted_and_the_second_raises():
    with pytest.raises(interrupts.Stopped), interrupts.raising(), interrupts.Interrupt() as interrupt:  # noqa: PT012
        assert not interrupt.wanted
        send(signal.SIGTERM)
        assert interrupt.wanted
        send(signal.SIGTERM)
        wait()
    assert interrupts.exit_code() == 143


def test_a_closed_terminal_may_say_so_several_times():
    with interrupts.raising(), interrupts.Interrupt() as interrupt:
        for number in (signal.SIGHUP, signal.SIGHUP):
            send(number)
            assert interrupt.wanted
    assert interrupts.exit_code() == 129
    with pytest.raises(interrupts.Stopped), interrupts.raising():  # noqa: PT012
        try:
            send(signal.SIGHUP)
            wait()
        finally:
            send(signal.SIGHUP)


def test_torchruns_copy_of_a_request_is_no_second_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with interrupts.raising(), interrupts.Interrupt() as interrupt:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert interrupt.wanted
    with pytest.raises(KeyboardInterrupt), interrupts.Interrupt() as interrupt:  # noqa: PT012
        send(signal.SIGINT)
        interrupt.since -= interrupts.COPIES
        send(signal.SIGINT)
        wait()


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for `python train.py &` in a script
    try:
        with interrupts.raising(), interrupts.Interrupt() as interrupt:
            send(signal.SIGINT)
            assert not interrupt.wanted
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_may_run_a_command():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run(lambda: 5)))
    thread.start()
    thread.join()
    assert codes == [5]


def process(code: str) -> subprocess.Popen:
    """A process without torch; it prints `ready` when it may be interrupted."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import signal, sys, time\nfrom vqvae import interrupts\n{code}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@EACH
def test_before_the_command_begins_a_signal_is_one_line_too(number):
    child = process("interrupts.install()\nprint('ready', flush=True)\ntime.sleep(60)")
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.communicate(timeout=30) == ("", "interrupted\n")
    assert child.returncode == 128 + number


def test_a_second_signal_ends_the_process_at_once():
    child = process(
        "from vqvae.cli import run\n"
        "def main(argv):\n"
        "    try: print('ready', flush=True); time.sleep(60)\n"
        "    finally: print('cleaning', flush=True); time.sleep(60)\n"
        "interrupts.leave(run(main, []))"
    )
    assert child.stdout
    for line in ("ready\n", "cleaning\n"):
        assert child.stdout.readline() == line
        child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=30) == ("", "interrupted\n")
    assert child.returncode == 143


def test_an_interrupted_process_waits_for_no_thread():
    child = process(
        "import threading\nfrom vqvae.cli import run\n"
        "def main(argv):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    print('ready', flush=True); time.sleep(60)\n"
        "interrupts.leave(run(main, []))"
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30) == ("", "interrupted\n")
    assert child.returncode == 130
