"""Errors that the user can fix, the one-line reason of any exception, and the wording of messages."""

import contextlib
import difflib
import unicodedata
from collections.abc import Iterable, Iterator
from functools import partial

HIDDEN = {"Cc", "Cs", "Zl", "Zp"}  # categories: control characters, halves of a pair, line and paragraph separators
REORDERING = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # of the text around them


def unprintable(character: str) -> bool:
    """Whether a character breaks the line, controls the terminal or reorders text."""
    return character in REORDERING or unicodedata.category(character) in HIDDEN


def printable(text: str) -> str:
    """The text with unprintable characters escaped, as in a Python literal: a line break becomes `\\n`."""
    return "".join(c.encode("unicode_escape").decode() if unprintable(c) else c for c in text)


def shown(value: object, limit: int = 80) -> str:
    """A value as messages show it: on one line, cut to about `limit`, and quoted if it is empty or has outer spaces."""
    text = printable(str(value))
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(str(value)):,} characters)"
    return f"'{text}'" if not text or text != text.strip() else text


class UserError(ValueError):
    """A bad option, file or image. The message is one line: what was found, and the way out."""

    chosen = False  # whether this process is the one of several that prints it

    def __str__(self) -> str:
        return printable(super().__str__())


class OptionError(UserError):
    """A value that an option does not take.

    `option` is "" for a word without a flag. `owner` is the member of a slot that has the option ("vq"), or "" for a
    setting of the run. The registry adds the slot ("bottleneck"). Command lines print the flag (`--bottleneck vq
    decay=2: must be ...`, see `flagged`); Python users read `vq decay=2: must be ...`.
    """

    def __init__(self, option: str, value: object, problem: str, *, owner: str = "", slot: str = ""):
        self.option, self.value, self.problem, self.owner, self.slot = option, value, problem, owner, slot
        super().__init__(f"{owner} {self._pair}".strip() + f": {problem}")

    @property
    def _pair(self) -> str:
        return f"{self.option}={shown(self.value)}" if self.option else shown(self.value)

    @property
    def flagged(self) -> str:
        """The message with the command line's flag in front."""
        if self.slot:
            return printable(f"--{self.slot} {self.owner} {self._pair}: {self.problem}")
        if self.owner:
            return str(self)
        value = "" if self.value is None or isinstance(self.value, bool) else f" {shown(self.value)}"
        flag = f"--{'no-' if self.value is False else ''}{self.option.replace('_', '-')}" if self.option else ""
        return printable(f"{flag}{value}".strip() + f": {self.problem}")

    def __reduce__(self) -> tuple:  # processes send it to each other
        return partial(OptionError, owner=self.owner, slot=self.slot), (self.option, self.value, self.problem)

    def within(self, slot: str, owner: str) -> "OptionError":
        """The same error, as one of a slot's member."""
        return OptionError(self.option, self.value, self.problem, owner=self.owner or owner, slot=self.slot or slot)


@contextlib.contextmanager
def naming(option: str, value: object) -> Iterator[None]:
    """Make a `UserError` about a file an `OptionError` of the option that named the file."""
    try:
        yield
    except OptionError:
        raise
    except UserError as problem:
        raise OptionError(option, value, str(problem).removeprefix(f"{value}: ")) from None


def counted(count: float, noun: str) -> str:
    """A count in words: `1 code`, `1,024 codes`."""
    return f"{count:,.0f} {noun}{'' if round(count) == 1 else 's'}"


def one_line(problem: BaseException, limit: int = 200) -> str:
    """An exception's message on one line of at most `limit` characters, or its type where it has no message."""
    text = getattr(problem, "strerror", None) or str(problem)
    return " ".join(str(text).split())[:limit] or type(problem).__name__


def out_of_memory(problem: BaseException) -> bool:
    """Whether an allocation failed. torch raises RuntimeError for most of them, and for sizes beyond 64 bits."""
    failed = ("allocate memory", "out of memory", "Storage size calculation overflowed", "multiplication overflow")
    return isinstance(problem, MemoryError) or (
        isinstance(problem, RuntimeError) and any(text in str(problem) for text in failed)
    )


def near_misses(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'sonnet'?)"` for a misspelled name, `""` when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
