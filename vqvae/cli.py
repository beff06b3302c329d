"""What the command lines share: one-line errors, exit codes, typed values. Imports no torch: `--help` stays quick."""

import argparse
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqvae.errors import OptionError, UserError
from vqvae.registry import Option, Rule, Slot, signature

SCRIPTS = {"train": "python train.py", "visualize": "python visualize_codes.py"}
DEVICES = ("auto", "cpu", "cuda", "mps")


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call a command's `main` and return its exit code; an error of the user's becomes one line and the code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return main(list(sys.argv[1:] if argv is None else argv))
    except UserError as problem:
        message = problem.flagged if isinstance(problem, OptionError) else str(problem)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def program(command: str) -> str:
    """How the user calls a command, for messages: `python train.py` in a checkout, `vqvae train` when installed."""
    called = Path(sys.argv[0])
    if called.name == "vqvae":
        return f"vqvae {command}"
    if called.parts[-2:] == ("vqvae", "__main__.py"):
        return f"python -m vqvae {command}"
    return SCRIPTS[command]


class _Refused(Exception):
    """Carries an `OptionError` through argparse, which would replace its message."""

    def __init__(self, problem: OptionError):
        self.problem = problem


class OneLineErrors(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')}; see --help")

    def parse_known_args(self, *args: Any, **keywords: Any):
        try:
            return super().parse_known_args(*args, **keywords)
        except _Refused as refused:
            raise refused.problem from None


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


def value(option: str, rule: Rule, kind: Any) -> Callable[[str], Any]:
    """The `type=` of an argument: converts text and checks it, with an error that names flag and value."""
    known = Option(option, kind, None, (rule,), "")

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
