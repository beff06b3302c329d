"""How a name and its key=value options become an object, the same way for every slot.

A slot (data, nets, bottlenecks, priors, likelihoods) is a plain dict of names to members. A member's keyword-only
constructor is its configuration: a parameter without a default is wiring, which the program supplies; one with a
default is an option of the user's, typed by its annotation. Nothing else in the project lists options.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from vqvae.errors import UserError, near_misses

Member = Callable[..., Any]
TRUTHS = {
    "yes": True,
    "true": True,
    "on": True,
    "1": True,
    "no": False,
    "false": False,
    "off": False,
    "0": False,
}


class Slot(NamedTuple):
    """A table of members and the flag that chooses from it."""

    flag: str  # "--bottleneck"
    table: Mapping[str, Member]


class Choice(NamedTuple):
    """A member chosen by name, with the options given for it: text from a command line, or values."""

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, flag: str, words: list[str]) -> "Choice":
        """`["vq", "decay=0.9"]` to a choice; the values stay text until `resolve` knows their types."""
        if not words or "=" in words[0]:
            raise UserError(f"{flag} {' '.join(words)}: the member's name comes first, then its key=value options")
        options = {}
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if not (key and equals):
                raise UserError(f"{flag} {words[0]}: '{word}' is not of the form key=value")
            options[key.replace("-", "_")] = value
        return cls(words[0], options)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


def signature(member: Member) -> tuple[dict[str, inspect.Parameter], dict[str, inspect.Parameter]]:
    """A member's parameters as (wiring, options), their annotations evaluated."""
    function = member.__init__ if inspect.isclass(member) else member
    hints = typing.get_type_hints(function)
    parameters = [
        p.replace(annotation=hints.get(p.name, str))
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    wiring = {p.name: p for p in parameters if p.default is inspect.Parameter.empty}
    return wiring, {p.name: p for p in parameters if p.name not in wiring}


def find(slot: Slot, name: str) -> Member:
    """The member of that name, or a `UserError` that lists the near misses and what there is."""
    if name not in slot.table:
        raise UserError(
            f"{slot.flag} {name}: no such name{near_misses(name, slot.table)}; known: {', '.join(slot.table)}"
        )
    return slot.table[name]


def resolve(slot: Slot, choice: Choice) -> Choice:
    """The choice with every option present and of its declared type; raises `UserError` on any that does not fit."""
    _, options = signature(find(slot, choice.name))
    for key in choice.options:
        if key not in options:
            takes = ", ".join(f"{p.name}={p.default}" for p in options.values()) or "no options"
            raise UserError(
                f"{slot.flag} {choice.name}: unknown option '{key}'{near_misses(key, options)}; it takes {takes}"
            )
    values = {
        key: convert(choice.options[key], p.annotation, f"{slot.flag} {choice.name}: {key}={choice.options[key]}")
        if key in choice.options
        else p.default
        for key, p in options.items()
    }
    return Choice(choice.name, values)


def convert(value: Any, kind: Any, where: str) -> Any:
    """A value, often text, as `kind`: int, float, bool, str or a Literal of strings."""
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if value in allowed:
            return value
        raise UserError(f"{where}: must be one of {', '.join(map(str, allowed))}{near_misses(str(value), allowed)}")
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        raise TypeError(f"{where}: options are of one plain type, not {kind}")
    try:
        if kind is bool:
            return value if isinstance(value, bool) else TRUTHS[str(value).lower()]
        if kind is int and isinstance(value, str) and not value.lstrip("+-").isdigit():
            number = float(value)  # 1e4 is a fine way to write a count
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(value)
    except (ValueError, KeyError, OverflowError):
        names = {int: "a whole number", float: "a number", bool: "yes or no"}
        raise UserError(f"{where}: must be {names.get(kind, kind)}") from None


def build(slot: Slot, choice: Choice, context: Mapping[str, Any]) -> Any:
    """Construct the chosen member: its options from the choice, its wiring from the context.

    Wiring that the context lacks means two slots that do not fit (a code prior on continuous latents, say).
    """
    member = find(slot, choice.name)
    wiring, _ = signature(member)
    missing = [key for key in wiring if key not in context]
    if missing:
        fitting = [name for name, m in slot.table.items() if all(key in context for key in signature(m)[0])]
        raise UserError(
            f"{slot.flag} {choice.name} needs {', '.join(missing)}, which the other choices do not give; "
            f"those that fit: {', '.join(fitting)}"
        )
    return member(**{key: context[key] for key in wiring}, **resolve(slot, choice).options)


def describe(slot: Slot) -> str:
    """Every member with its options, defaults and docstring: what `--list` prints."""
    blocks = []
    for name, member in slot.table.items():
        options = signature(member)[1].values()
        usage = " ".join([slot.flag, name, *(f"{p.name}={_show(p)}" for p in options)])
        text = inspect.getdoc(member) or ""
        blocks.append("\n".join([usage, *(f"    {line}".rstrip() for line in text.splitlines())]))
    return "\n\n".join(blocks)


def _show(parameter: inspect.Parameter) -> str:
    if typing.get_origin(parameter.annotation) is Literal:
        others = [str(a) for a in typing.get_args(parameter.annotation) if a != parameter.default]
        return "|".join([str(parameter.default), *others])
    if isinstance(parameter.default, bool):
        return "yes" if parameter.default else "no"
    return str(parameter.default)
