"""A name and key=value options become an object, the same way for every slot.

A slot (data, nets, bottleneck, prior, likelihood, objective) is a table of names and members. A member is a class or a
function whose keyword-only parameters are its configuration:

- one without a default is context, which the program supplies (`channels`, `grid` ...; see contracts.py);
- one with a default is an option. Its annotation contains everything else about it: type, range and explanation, as in
  `beta: Annotated[float, Range(0), "weight of the commitment loss"] = 0.25`;
- one annotated with an `Options` dataclass stands for all of that class's fields: options that members share.

Nothing else in the project lists options. `resolve` checks them before any data is read.
"""

import dataclasses
import functools
import inspect
import math
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, runtime_checkable

from vqvae.errors import OptionError, near_misses, out_of_memory

Member = Callable[..., Any]
P = ParamSpec("P")
R = TypeVar("R")
TRUTHS = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}


@runtime_checkable
class Rule(Protocol):
    """A condition on an option's value, given in its annotation."""

    def problem(self, value: Any) -> str | None:
        """Why the value is refused ("must be from 0 to 1"), or None."""

    def __str__(self) -> str:
        """The rule as `--list` prints it ("0 to 1")."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, both included; `above` and `below` exclude their bound."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def problem(self, value: float) -> str | None:
        if self.low <= value <= self.high and self.above < value < self.below:  # false for nan and infinities
            return None
        finite = "" if isinstance(value, int) or math.isfinite(value) or self == Range() else "a finite number, "
        return f"must be {finite}{self}"

    def __str__(self) -> str:
        low = f"from {_number(self.low)}" if math.isfinite(self.low) else ""
        low = f"above {_number(self.above)}" if math.isfinite(self.above) else low
        high = f"to {_number(self.high)}" if math.isfinite(self.high) else ""
        high = f"below {_number(self.below)}" if math.isfinite(self.below) else high
        if low and not high:
            return low.replace("from", "at least")
        if low.startswith("above") and high:
            return f"{low} and {high.replace('to', 'at most')}"
        return f"{low} to {high.removeprefix('to ')}" if low else high.replace("to", "at most") or "a finite number"


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) and (isinstance(bound, int) or bound < 1e16) else f"{bound:g}"


@dataclasses.dataclass(frozen=True)
class Passes:
    """Values for which `test` is true; `text` says what they are ("odd")."""

    test: Callable[[Any], bool]
    text: str

    def problem(self, value: Any) -> str | None:
        return None if self.test(value) else f"must be {self.text}"

    def __str__(self) -> str:
        return self.text


class Size(tuple[int, int]):
    """Height and width in pixels, made from 64, "64", "96x128" or (96, 128). Raises `ValueError` for anything else."""

    def __new__(cls, value: "int | str | Sequence[int]") -> "Size":
        sides = value if isinstance(value, tuple | list) else str(value).lower().replace("×", "x").split("x")
        if not 1 <= len(sides) <= 2:
            raise ValueError
        return super().__new__(cls, (whole_number(sides[0]), whole_number(sides[-1])))

    def plain(self) -> int | str:
        """As files store it: 64, or "96x128"."""
        return self[0] if self[0] == self[1] else f"{self[0]}x{self[1]}"

    def __str__(self) -> str:
        return str(self.plain())


@dataclasses.dataclass(frozen=True)
class Sides:
    """Sizes, or values that `Size` accepts, whose sides are in a range."""

    range: Range

    def problem(self, value: Any) -> str | None:
        try:
            return next(filter(None, map(self.range.problem, Size(value))), None)
        except (ValueError, TypeError, OverflowError):
            return f"must be {NAMES[Size]}"

    def __str__(self) -> str:
        return str(self.range)


NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "yes or no",
    str: "text",
    Size: "pixels, such as 64, or height and width, such as 96x128",
}
Count = typing.Annotated[int, Range(1, 2**24)]  # codes, dimensions: what fits in memory
LARGEST = {int: 2**31 - 1, float: 3.4e38}  # for options without an upper bound: what int32 and float32 can store


class Option(NamedTuple):
    """One option of a member, read from its annotation."""

    name: str
    kind: Any  # int, float, bool, str, Size, or a Literal of strings
    default: Any
    rules: tuple[Rule, ...]
    help: str
    optional: bool = False  # whether None is a value too

    @classmethod
    def of(cls, name: str, annotation: Any, default: Any) -> "Option":
        """Read `Annotated[kind, rules ..., "help"]`."""
        annotation, optional = without_none(annotation)
        kind: Any = annotation
        notes: list[Any] = []
        if typing.get_origin(annotation) is typing.Annotated:
            kind, *notes = typing.get_args(annotation)
            kind, inner = without_none(kind)
            optional = optional or inner
        rules = tuple(note for note in notes if isinstance(note, Rule) and not isinstance(note, str))
        help = " ".join(note for note in notes if isinstance(note, str))
        return cls(name, kind, default, rules, help, optional)

    def problem(self, value: Any) -> str | None:
        """Why a value of the option's type is refused, or None."""
        if value is None and self.optional:
            return None
        if typing.get_origin(self.kind) is Literal and value not in typing.get_args(self.kind):
            known = typing.get_args(self.kind)
            return f"must be one of {', '.join(known)}{near_misses(str(value), known)}"
        return next(filter(None, (rule.problem(value) for rule in self.rules)), None) or self._too_large(value)

    def _too_large(self, value: Any) -> str | None:
        bounded = any(isinstance(rule, Range) and math.isfinite(min(rule.high, rule.below)) for rule in self.rules)
        if self.kind not in LARGEST or bounded:
            return None
        limit = LARGEST[self.kind]
        return Range(-limit).problem(value) or Range(high=limit).problem(value)

    def check(self, value: Any) -> None:
        """Raise `OptionError` for a value that is refused."""
        if problem := self.problem(value):
            raise OptionError(self.name, value, problem)

    def convert(self, value: Any) -> Any:
        """A value, often text, in the option's type, checked; raises `OptionError`."""
        if value is None and self.optional:
            return None
        converted = self._typed(value)
        if problem := self.problem(converted):
            raise OptionError(self.name, value, problem)  # shows the value as it was given
        return converted

    def _typed(self, value: Any) -> Any:
        if typing.get_origin(self.kind) is Literal:
            return value
        try:
            if self.kind is bool:
                return value if isinstance(value, bool) else TRUTHS[str(value).lower()]
            return whole_number(value) if self.kind is int else self.kind(value)
        except (ValueError, KeyError, OverflowError, TypeError):
            raise OptionError(self.name, value, f"must be {NAMES[self.kind]}") from None

    def takes(self) -> str:
        """Type and range in words, for `--list`."""
        if typing.get_origin(self.kind) is Literal:
            return " | ".join(typing.get_args(self.kind))
        names = {int: "integer", float: "number", bool: "yes | no", str: "text"}
        return f"{names[self.kind]} {', '.join(map(str, self.rules))}".rstrip()

    def shown_default(self) -> str:
        return ("yes" if self.default else "no") if self.kind is bool else str(self.default)


def whole_number(value: Any) -> int:
    """The number that a value or text is; raises `ValueError`, `OverflowError` or `TypeError` if it is none."""
    if str(value).lstrip("+-").isdigit():
        return int(str(value)[:400])  # Python reads no more than 4,300 digits; no range includes 400
    number = float(value)  # 1e4 is a fine way to write a count
    if math.isinf(number) and "n" not in str(value).lower():
        number = math.copysign(sys.float_info.max, number)  # 1e400, which every range refuses
    if number != int(number):
        raise ValueError
    return int(number)


def whole_number_in(name: str, value: Any, rule: Range) -> int:
    """An argument as a whole number. Raises `OptionError`, a ValueError, that names the argument and its range."""
    number: int = Option(name, int, None, (rule,), "").convert(value)
    return number


def whole_numbers(text: str) -> list[int]:
    """Whole numbers separated by commas; 0 stands for a word that is none, or has more than ten digits."""
    return [int(word) if word.strip().isdecimal() and len(word) <= 10 else 0 for word in text.split(",")]


def without_none(annotation: Any) -> tuple[Any, bool]:
    """`int | None` as (int, True), `int` as (int, False)."""
    arguments = typing.get_args(annotation)
    if type(None) in arguments:
        (rest,) = (a for a in arguments if a is not type(None))
        return rest, True
    return annotation, False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of dataclasses of options that members share. Making one checks every field."""

    def __post_init__(self) -> None:
        for name, option in fields_of(type(self)).items():
            option.check(getattr(self, name))

    def idle(self) -> dict[str, str]:
        """Options that have no effect given the others, and the setting that each needs (`diversity above 0`)."""
        return {}


def fields_of(cls: type) -> dict[str, Option]:
    """The fields of a dataclass as options, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: Option.of(f.name, hints[f.name], f.default) for f in dataclasses.fields(cls)}


class Signature(NamedTuple):
    """The parameters of a member's constructor."""

    context: tuple[str, ...]  # parameters without a default
    options: dict[str, Option]  # those of shared dataclasses included
    shared: dict[str, type[Options]]  # parameter -> its dataclass


@functools.cache
def signature(member: Member) -> Signature:
    """Read a member's keyword-only parameters."""
    function = member.__init__ if inspect.isclass(member) else member
    hints = typing.get_type_hints(function, include_extras=True)
    context: list[str] = []
    options: dict[str, Option] = {}
    shared: dict[str, type[Options]] = {}
    for p in inspect.signature(function).parameters.values():
        if p.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(p.name, str)
        if inspect.isclass(hint) and issubclass(hint, Options):
            shared[p.name] = hint
            options |= fields_of(hint)
        elif p.default is inspect.Parameter.empty:
            context.append(p.name)
        else:
            options[p.name] = Option.of(p.name, hint, p.default)
    return Signature(tuple(context), options, shared)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check a constructor's options whenever it is called, so that Python users get the command line's errors."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **keywords: P.kwargs) -> R:
        known = signature(function).options
        for name, value in keywords.items():
            if name in known:
                known[name].check(value)
        return function(*args, **keywords)

    return wrapper


class Slot(NamedTuple):
    """A table of members, and the name of the setting that chooses from it."""

    name: str  # "bottleneck"
    table: Mapping[str, Member]
    built_in: tuple[str, ...] = ()  # data sets that read no files


class Choice(NamedTuple):
    """A member chosen by name, with its options: text from a command line, or values."""

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, slot: str, words: list[str]) -> "Choice":
        """`["vq", "decay=0.9"]` as a choice. Values stay text until `resolve` knows their types."""
        if not words or "=" in words[0]:
            raise OptionError(slot, " ".join(words), "must be a name, followed by its key=value options")
        options: dict[str, Any] = {}
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if not (key and equals):
                raise OptionError(slot, words[0], f"'{word}' must be of the form key=value")
            key = key.replace("-", "_")
            if key in options:
                problem = f"is given twice, also as {key}={options[key]}; keep one"
                raise OptionError(key, value, problem, owner=words[0], slot=slot)
            options[key] = value
        return cls(words[0], options)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


def find(slot: Slot, name: str) -> Member:
    """The member of that name; raises `OptionError` with near misses and the known names."""
    if name not in slot.table:
        raise OptionError(
            slot.name, name, f"no such name{near_misses(name, slot.table)}; known: {', '.join(slot.table)}"
        )
    return slot.table[name]


def resolve(slot: Slot, choice: Choice, typed: Collection[str] | None = None) -> Choice:
    """The choice with every option present, in its type and checked; raises `OptionError`.

    If two options do not fit each other, the error names one that is in `typed` (default: all of the choice's options).
    """
    _, options, shared = signature(find(slot, choice.name))
    given = choice.options if typed is None else typed
    try:
        for key, value in choice.options.items():
            if key not in options:
                takes = ", ".join(f"{o.name}={o.shown_default()}" for o in options.values()) or "no options"
                raise OptionError(key, value, f"unknown option{near_misses(key, options)}; it takes {takes}")
        values = {
            key: option.convert(choice.options[key]) if key in choice.options else option.default
            for key, option in options.items()
        }
        for cls in shared.values():  # rules between options live in the dataclasses
            try:
                cls(**{key: values[key] for key in fields_of(cls)})
            except OptionError as problem:
                named = [key for key in given if f"{key}={values[key]}" in problem.problem.split()]
                if problem.option in given or not named:
                    raise
                reason = f"{problem.option}={problem.value} {problem.problem}"
                raise OptionError(named[0], values[named[0]], reason) from None
    except OptionError as problem:
        raise problem.within(slot.name, choice.name) from None
    return Choice(choice.name, values)


def refuse_idle(slot: Slot, choice: Choice, typed: Collection[str]) -> None:
    """Raise `OptionError` for an option in `typed` that has no effect, unless it switches something off (0, no).

    `choice` must be resolved.
    """
    for cls in signature(find(slot, choice.name)).shared.values():
        for key, need in cls(**{key: choice.options[key] for key in fields_of(cls)}).idle().items():
            if key in typed and choice.options[key]:
                problem = f"has no effect without {need}; leave it out"
                raise OptionError(key, choice.options[key], problem, owner=choice.name, slot=slot.name)


def brief(slot: Slot, choice: Choice) -> Choice:
    """The choice with those options only that differ from their defaults."""
    known = signature(find(slot, choice.name)).options
    return Choice(choice.name, {k: value for k, value in choice.options.items() if value != known[k].default})


def build(slot: Slot, choice: Choice, context: Mapping[str, Any]) -> Any:
    """Construct the chosen member from its options and the context it asks for.

    Raises `OptionError` where the context lacks something: two slots do not fit (a code prior on continuous latents).
    """
    member = find(slot, choice.name)
    needed = signature(member).context
    if missing := [key for key in needed if key not in context]:
        fitting = [name for name, m in slot.table.items() if all(key in context for key in signature(m).context)]
        raise OptionError(
            slot.name, choice.name,
            f"needs {', '.join(missing)}, which the other choices do not give; those that fit: {', '.join(fitting)}",
        )  # fmt: skip
    values = resolve(slot, choice).options
    try:
        return member(**{key: context[key] for key in needed}, **arguments(member, values))
    except OptionError as problem:
        if problem.option not in signature(member).options:  # a setting of the run, such as image_size
            raise
        raise problem.within(slot.name, choice.name) from None
    except (MemoryError, RuntimeError) as problem:
        sizes = {key: value for key, value in values.items() if type(value) is int}
        if not (out_of_memory(problem) and sizes):
            raise
        largest = max(sizes, key=lambda key: sizes[key])
        reason = "the model does not fit into memory; choose a smaller one"
        raise OptionError(largest, sizes[largest], reason, owner=choice.name, slot=slot.name) from None


def arguments(member: Member, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a member for all of its options: those of a shared dataclass become one object."""
    shared = {name: cls(**{k: values[k] for k in fields_of(cls)}) for name, cls in signature(member).shared.items()}
    taken = {key for options in shared.values() for key in fields_of(type(options))}
    return shared | {key: value for key, value in values.items() if key not in taken}


def needs(slot: Slot, name: str, context: str) -> bool:
    """Whether the member of that name asks for a context value."""
    return context in signature(find(slot, name)).context
