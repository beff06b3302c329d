"""Errors that the user can fix, the one-line reason of any exception, and spelling suggestions."""

import difflib
from collections.abc import Iterable
from functools import partial


class UserError(ValueError):
    """A bad option, file or image. The message is one line: what was found, and the way out."""


class OptionError(UserError):
    """A value that an option does not take.

    `owner` is the member of a slot that has the option ("vq"), or "" for a setting of the run. The registry adds the
    slot ("bottleneck"). Command lines print the flag (`--bottleneck vq decay=2: must be ...`, see `flagged`); Python
    users read `vq decay=2: must be ...`.
    """

    def __init__(self, owner: str, option: str, value: object, problem: str, *, slot: str = ""):
        self.owner, self.option, self.value, self.problem, self.slot = owner, option, value, problem, slot
        super().__init__(f"{owner} {self._pair}".strip() + f": {problem}")

    @property
    def _pair(self) -> str:
        return f"{self.option}={self.value}"

    @property
    def flagged(self) -> str:
        """The message with the command line's flag in front."""
        if self.slot:
            return f"--{self.slot} {self.owner} {self._pair}: {self.problem}"
        if self.owner:
            return str(self)
        shown = "" if self.value is None or isinstance(self.value, bool) else f" {self.value}"
        no = "no-" if self.value is False else ""
        return f"--{no}{self.option.replace('_', '-')}{shown}: {self.problem}"

    def __reduce__(self) -> tuple:  # processes send it to each other
        return partial(OptionError, slot=self.slot), (self.owner, self.option, self.value, self.problem)

    def within(self, slot: str, owner: str) -> "OptionError":
        """The same error, as one of a slot's member."""
        return OptionError(self.owner or owner, self.option, self.value, self.problem, slot=self.slot or slot)


def one_line(problem: BaseException, limit: int = 200) -> str:
    """An exception's message on one line of at most `limit` characters, or its type where it has no message."""
    text = getattr(problem, "strerror", None) or str(problem)
    return " ".join(str(text).split())[:limit] or type(problem).__name__


def near_misses(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'sonnet'?)"` for a misspelled name, `""` when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
