"""Shared parts of the command lines: one-line errors, exit codes, typed values. No torch, so that `--help` is quick."""

import argparse
import contextlib
import inspect
import io
import math
import os
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqvae import interrupts
from vqvae.errors import (
    OptionError,
    UserError,
    near_misses,
    one_line,
    out_of_memory,
    printable,
    shown,
    unprintable,
)
from vqvae.files import failed_line
from vqvae.registry import Option, Rule, Slot, signature

SCRIPTS = {"train": "python train.py", "visualize": "python visualize_codes.py"}


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call a command's `main` and return its exit code.

    An error of the user or of a file prints one line and returns 2; Ctrl-C, SIGTERM and a closed terminal print one
    line and return 130, 143 or 129. A closed pipe (`| head`) prints nothing and returns 141.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    threading.excepthook = _quiet_threads
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # of what a closed or replaced output still has to write
                stream.reconfigure(errors="backslashreplace")  # names of files need not fit the terminal's encoding
    try:
        with interrupts.raising():
            try:
                code = main(list(sys.argv[1:] if argv is None else argv))
                _flush_stdout()
            except SystemExit:  # --help
                _flush_stdout()
                raise
        if interrupts.received is None:
            return code
        if code == 0 and _is_first():  # it had finished, or a library swallowed the interrupt
            print(interrupts.LINE, file=sys.stderr)
        return interrupts.exit_code()
    except UserError as problem:
        if not problem.chosen:
            _let_first_speak()
        message = problem.flagged if isinstance(problem, OptionError) else str(problem)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except OSError as problem:
        return _failed(problem)
    except (MemoryError, RuntimeError) as problem:
        if not out_of_memory(problem):
            raise
        reason = one_line(problem).partition("] ")[2] or one_line(problem)
        print(f"error: not enough memory ({reason[:120]}); use a smaller batch, image or model", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"{interrupts.LINE}; {stopped}" if stopped.args else interrupts.LINE, file=sys.stderr)
        return interrupts.exit_code()


def _is_first() -> bool:
    """Whether this is the only process of a machine, or the first one that torchrun started there."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _let_first_speak() -> None:
    """Wait for torchrun to end this process, because the first process may have found the same error already."""
    if not _is_first():
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)


def _quiet_threads(problem: threading.ExceptHookArgs) -> None:
    """Say nothing of an `OSError` in a thread: TensorBoard's raises it again in the main thread."""
    if not issubclass(problem.exc_type, OSError):
        threading.__excepthook__(problem)


def _flush_stdout() -> None:
    """Write what was printed; raises `OSError` naming the output if that fails."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as problem:
        with contextlib.suppress(OSError, ValueError):  # what stays in the buffer would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(problem.errno, problem.strerror, "the output") from None


def _failed(problem: OSError) -> int:
    """Print the line about an `OSError`, if it is not a closed pipe, and return the exit code."""
    try:
        _flush_stdout()
    except OSError as of_stdout:
        problem = of_stdout if problem.filename is None else problem
    if isinstance(problem, BrokenPipeError):
        return 141  # as if SIGPIPE had ended the process
    print(f"error: {failed_line(problem)}", file=sys.stderr)
    return 2


def program(command: str) -> str:
    """How the user calls a command, for messages: `python train.py` in a checkout, `vqvae train` when installed."""
    called = Path(sys.argv[0])
    if called.name.removesuffix(".exe") == "vqvae":
        return f"vqvae {command}"
    if called.parts[-2:] == ("vqvae", "__main__.py"):
        return f"python -m vqvae {command}"
    if command == "train" and "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', 1)} train.py"
    return SCRIPTS[command]


class _Refused(Exception):
    """Carries an `OptionError` through argparse, which would replace its message."""

    def __init__(self, problem: OptionError):
        self.problem = problem


class OneLineErrors(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names flag and value, without the usage.

    Unlike argparse, it refuses empty and unprintable values, and a flag given twice with different values. A value may
    begin with a dash (`--lr -1`), so that the error is about the value.
    """

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would hide that it cannot be written

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')}; see --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None):
        words = list(sys.argv[1:] if args is None else args)
        try:
            return super().parse_known_args(words if {"-h", "--help"} & set(words) else self._checked(words), namespace)
        except _Refused as refused:
            raise refused.problem from None

    def _checked(self, words: list[str]) -> list[str]:
        """The words, each value joined to its flag. Raises `UserError` for those that argparse would misread."""
        known = self._option_string_actions
        free = [action.nargs for action in self._actions if not action.option_strings]
        places = math.inf if "+" in free else len(free)  # for words without a flag
        given: dict[str, tuple[str, str]] = {}  # destination -> flag, and its values
        checked, positional = list[str](), list[str]()
        flag, values = "", list[str]()
        while words:
            word = words.pop(0)
            name, equals, joined = word.partition("=")
            if word == "--":
                break
            if name in known:
                flag, action = name, known[name]
                values = [*([joined] if equals else []), *_values(action, words, bool(equals))]
                text = " ".join(values)
                if values and action.nargs == 0:
                    raise OptionError(flag.strip("-"), text, "takes no value")
                if unusable := next(filter(None, map(_unusable, values)), None):
                    raise OptionError(flag.strip("-"), text, unusable)
                if given.setdefault(action.dest, (flag, text)) != (flag, text):
                    other = " ".join(given[action.dest]).strip()
                    raise OptionError(flag.strip("-"), text or None, f"is given twice, also as {other}; keep one")
                checked += [f"{flag}={text}"] if values and action.nargs is None else [flag, *values]
            elif word.startswith("-") and len(word) > 1:
                raise UserError(f"{shown(name)}: no such flag{near_misses(name, known)}; see --help")
            elif places:
                places -= 1
                if unusable := _unusable(word):
                    raise UserError(f"{shown(word)}: {unusable}")
                positional.append(word)
            elif flag and not equals and word[:1] not in DASHES:
                count = "one value; quote a value that contains spaces" if values else "no value"
                raise OptionError(flag.strip("-"), " ".join([*values, word]), f"takes {count}")
            else:  # epochs=3, or --epochs with a dash that a word processor made
                meant = f"--{name.lstrip(DASHES)}"
                close = near_misses(meant, known) if meant in known or equals or word[:1] in DASHES else ""
                raise UserError(f"{shown(word)}: belongs to no flag{close}; see --help")
        # argparse takes several words without a flag only side by side
        return [*checked, "--", *positional, *words] if positional or words else checked


DASHES = "—–−"  # as word processors write --


def _values(action: argparse.Action, words: list[str], has_one: bool) -> list[str]:
    """Remove and return a flag's values, the words after it: one, or for a list all words up to the next flag."""
    several, values = action.nargs == "+", list[str]()
    while words and action.nargs != 0 and (several or not (values or has_one)):
        if words[0].startswith("-" if several else "--") and len(words[0]) > 1:
            break
        values.append(words.pop(0))
    return values


def _unusable(value: str) -> str | None:
    """Why no flag takes such a value, or None."""
    if any(map(unprintable, value)):
        return "contains a line break or another character that cannot be printed; remove that character"
    return None if value else "is empty; give a value, or leave it out"


def parser(description: str, epilog: str, **more: Any) -> OneLineErrors:
    """A parser that prints its texts with line breaks, and the commands in `epilog` as the user calls them.

    Abbreviated flags are refused.
    """
    for command, script in SCRIPTS.items():
        epilog = epilog.replace(script, program(command))
    return OneLineErrors(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more,
    )


def value(option: str, kind: Any, *rules: Rule) -> Callable[[str], Any]:
    """The `type=` of an argument: converts text and checks it, with an error that names flag and value."""
    known = Option(option, kind, None, rules, "")

    def convert(text: str) -> Any:
        try:
            return known.convert(text)
        except OptionError as problem:
            raise _Refused(problem) from None

    return convert


def describe(slot: Slot) -> str:
    """Every member of a slot with its options, as `--list` prints them: type, range, default, explanation."""
    return "\n\n".join(_describe_member(slot, name) for name in slot.table)


def _describe_member(slot: Slot, name: str) -> str:
    member = slot.table[name]
    lines = [f"--{slot.name} {name}", textwrap.indent(inspect.cleandoc(member.__doc__ or ""), "    ")]
    options = signature(member).options.values()
    if options:
        width = max(len(f"{o.name}={o.shown_default()}") for o in options)
        lines += [""]
        for o in options:
            head = f"      {f'{o.name}={o.shown_default()}':{width}}  "
            text = f"{o.takes()}: {o.help}" if o.help else o.takes()
            lines += textwrap.wrap(text, 118, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines)
