"""The one exception that means "the person at the keyboard can mend this"."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A bad option, file or picture. Its message is one line: what was got, and the way out."""


def near_misses(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'sonnet'?)"` for a misspelt name, `""` when nothing known is close."""
    close = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
