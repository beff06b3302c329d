"""Names and options become objects, and anything that does not fit becomes one clear error."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from vqvae import contracts, data
from vqvae.errors import OptionError
from vqvae.experiment import SLOTS
from vqvae.registry import (
    Choice,
    Count,
    Option,
    Options,
    Passes,
    Range,
    Slot,
    build,
    checked,
    needs,
    resolve,
    signature,
)


@dataclass(frozen=True, kw_only=True)
class Size(Options):
    """Options that members share."""

    rungs: Annotated[int, Range(1), "number of rungs"] = 6
    width: Annotated[float, Range(above=0, high=2), "meters between the sides"] = 0.5


@dataclass(frozen=True, kw_only=True)
class FoldingSize(Size):
    """Shared options with a rule between them."""

    parts: Annotated[int, Range(1, 4), Passes(lambda n: n != 3, "not 3"), "parts that fold"] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rungs % self.parts:
            raise OptionError("rungs", self.rungs, f"must be a multiple of parts={self.parts}")


class Ladder:
    """A ladder."""

    @checked
    def __init__(
        self,
        *,
        wall: str,
        size: FoldingSize = FoldingSize(),
        safe: Annotated[bool, "whether someone secures it"] = True,
        wood: Annotated[Literal["oak", "ash"], "its wood"] = "oak",
        load: Annotated[float, Range(0), "kilograms"] | None = None,
        color: Annotated[str, "its color"] = "brown",
        nails: Annotated[Count, "nails of each rung"] = 2,
    ):
        self.wall, self.size, self.others = wall, size, (safe, wood, load, color, nails)


class Rope:
    """A rope."""

    def __init__(self, *, tree: str):
        self.tree = tree


SLOT = Slot("climb", {"ladder": Ladder, "rope": Rope})


def choice(text: str) -> Choice:
    return Choice.parse("climb", text.split())


def test_options_take_their_declared_types():
    text = "ladder rungs=1e1 width=2 safe=no wood=ash load=80 color=7 nails=+3"
    ladder = build(SLOT, choice(text), {"wall": "north", "tree": "elm"})
    assert (ladder.wall, ladder.size) == ("north", FoldingSize(rungs=10, width=2.0))
    assert ladder.others == (False, "ash", 80.0, "7", 3)
    assert [type(value) for value in ladder.others] == [bool, str, float, str, int]
    same = Choice("ladder", {"rungs": 10.0, "width": 2, "safe": False, "wood": "ash", "load": 80, "nails": 3})
    assert resolve(SLOT, same) == resolve(SLOT, choice(text.replace("color=7", "color=brown")))


def test_resolve_fills_in_every_default_in_the_order_of_the_constructor():
    resolved = resolve(SLOT, choice("ladder rungs=4"))
    assert list(resolved.options.items()) == [
        ("rungs", 4), ("width", 0.5), ("parts", 2),
        ("safe", True), ("wood", "oak"), ("load", None), ("color", "brown"), ("nails", 2),
    ]  # fmt: skip
    assert resolve(SLOT, resolved) == resolved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lader", "--climb lader: no such name (did you mean 'ladder'?); known: ladder, rope"),
        ("ladder rung=3", "--climb ladder rung=3: unknown option (did you mean 'rungs'?); it takes rungs=6, width=0.5"),
        ("ladder rungs=three", "--climb ladder rungs=three: must be a whole number"),
        ("ladder rungs=2.5", "--climb ladder rungs=2.5: must be a whole number"),
        ("ladder rungs=inf", "--climb ladder rungs=inf: must be a whole number"),
        ("ladder rungs=0", "--climb ladder rungs=0: must be at least 1"),
        ("ladder width=wide", "--climb ladder width=wide: must be a number"),
        ("ladder width=nan", "--climb ladder width=nan: must be a finite number, above 0 and at most 2"),
        ("ladder safe=perhaps", "--climb ladder safe=perhaps: must be yes or no"),
        ("ladder wood=asg", "--climb ladder wood=asg: must be one of oak, ash (did you mean 'ash'?)"),
        ("ladder load=-1", "--climb ladder load=-1: must be at least 0"),
        ("ladder parts=5", "--climb ladder parts=5: must be from 1 to 4"),
        ("ladder parts=3", "--climb ladder parts=3: must be not 3"),
        ("ladder nails=16777217", "--climb ladder nails=16777217: must be from 1 to 16777216"),
        ("ladder rungs=2147483650", "--climb ladder rungs=2147483650: must be at most 2147483647"),
        ("ladder rungs=1e400", "--climb ladder rungs=1e400: must be at most 2147483647"),
        ("ladder load=1e39", "--climb ladder load=1e39: must be at most 3.4e+38"),
        ("ladder parts=4", "--climb ladder parts=4: rungs=6 must be a multiple of parts=4"),
        ("ladder rungs=7", "--climb ladder rungs=7: must be a multiple of parts=2"),
        ("rope tree=elm", "--climb rope tree=elm: unknown option; it takes no options"),  # context is not an option
    ],
)
def test_an_error_names_slot_member_option_and_value(text, message):
    with pytest.raises(OptionError) as caught:
        resolve(SLOT, choice(text))
    assert caught.value.flagged.startswith(message)


@pytest.mark.parametrize(
    "words", [[], ["rungs=3"], ["ladder", "rungs"], ["ladder", "=3"], ["ladder", ""], ["ladder", "rungs=3", "rungs=4"]]
)
def test_malformed_words_are_refused(words):
    with pytest.raises(OptionError) as caught:
        Choice.parse("climb", words)
    assert caught.value.flagged.startswith("--climb")


def test_a_choice_is_parsed_and_printed_in_one_form():
    parsed = Choice.parse("climb", ["ladder", "rung-count=3", "color=a=b", "load="])
    assert parsed == Choice("ladder", {"rung_count": "3", "color": "a=b", "load": ""})
    assert str(parsed) == "ladder rung_count=3 color=a=b load="


def test_missing_context_names_the_members_that_fit():
    with pytest.raises(OptionError) as caught:
        build(SLOT, choice("rope"), {"wall": "north"})
    assert caught.value.flagged == (
        "--climb rope: needs tree, which the other choices do not give; those that fit: ladder"
    )


def test_build_names_the_member_whose_constructor_refuses():
    class Brittle:
        def __init__(self, *, wall: str, nails: Count = 2):
            raise OptionError("nails", nails, f"do not go into {wall}")

    with pytest.raises(OptionError) as caught:
        build(Slot("climb", {"brittle": Brittle}), Choice("brittle", {}), {"wall": "sand"})
    assert caught.value.flagged == "--climb brittle nails=2: do not go into sand"


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("can't allocate memory: you tried 9 bytes")])
def test_a_model_beyond_the_memory_is_refused_by_its_largest_number(problem):
    class Huge:
        def __init__(self, *, nails: Count = 2, rungs: Count = 9, width: float = 99.0):
            raise problem

    with pytest.raises(OptionError) as caught:
        build(Slot("climb", {"huge": Huge}), Choice("huge", {"nails": 1000}), {})
    assert caught.value.flagged == "--climb huge nails=1000: the model does not fit into memory; choose a smaller one"


def test_another_error_of_a_constructor_stays_as_it_is():
    class Broken:
        def __init__(self, *, nails: Count = 2):
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        build(Slot("climb", {"broken": Broken}), Choice("broken", {}), {})


def test_needs_says_which_context_a_member_asks_for():
    assert needs(SLOT, "rope", "tree")
    assert not needs(SLOT, "ladder", "tree")
    assert not needs(SLOT, "ladder", "rungs")
    with pytest.raises(OptionError, match="did you mean 'rope'"):
        needs(SLOT, "roope", "tree")


def test_a_signature_separates_context_options_and_shared_options():
    context, options, shared = signature(Ladder)
    assert context == ("wall",)
    assert list(options) == ["rungs", "width", "parts", "safe", "wood", "load", "color", "nails"]
    assert shared == {"size": FoldingSize}
    assert options["width"] == Option("width", float, 0.5, (Range(above=0, high=2),), "meters between the sides")
    assert options["load"].optional
    assert not options["nails"].optional
    assert options["nails"].help == "nails of each rung"


@pytest.mark.parametrize(
    ("range", "text", "inside", "outside"),
    [
        (Range(), "a finite number", [-1e300, 0, 10**400], []),
        (Range(1), "at least 1", [1, 10**400], [0, -(10**400)]),
        (Range(high=1), "at most 1", [-5, 1], [1.5]),
        (Range(above=0), "above 0", [1e-9], [0, -1]),
        (Range(below=2.5), "below 2.5", [2], [2.5, 3]),
        (Range(0, 1), "from 0 to 1", [0, 1], [-0.1, 1.1]),
        (Range(0, below=1), "from 0 to below 1", [0, 0.99], [1, -1]),
        (Range(above=0, high=2), "above 0 and at most 2", [0.1, 2], [0, 2.1]),
        (Range(above=0, below=0.5), "above 0 and below 0.5", [0.1], [0, 0.5]),
        (Range(1e-6), "at least 1e-06", [1e-6], [0]),
        (Range(0, 2**63 - 1), "from 0 to 9223372036854775807", [2**63 - 1], [2**63]),
    ],
)
def test_a_range_takes_what_its_text_says_and_no_nan_or_infinity(range, text, inside, outside):
    assert str(range) == text
    assert [range.problem(value) for value in inside] == [None] * len(inside)
    assert [range.problem(value) for value in outside] == [f"must be {text}"] * len(outside)
    for value in (math.nan, math.inf, -math.inf):
        assert range.problem(value) == f"must be a finite number, {text}".replace(", a finite number", "")


def test_passes_takes_the_values_that_pass_its_test():
    odd = Passes(lambda k: k % 2 == 1, "odd")
    assert (odd.problem(3), odd.problem(4), str(odd)) == (None, "must be odd", "odd")


@pytest.mark.parametrize(
    ("name", "takes", "default"),
    [
        ("rungs", "integer at least 1", "6"),
        ("parts", "integer from 1 to 4, not 3", "2"),
        ("width", "number above 0 and at most 2", "0.5"),
        ("safe", "yes | no", "yes"),
        ("wood", "oak | ash", "oak"),
        ("load", "number at least 0", "None"),
        ("color", "text", "brown"),
    ],
)
def test_an_option_says_in_words_which_values_it_takes(name, takes, default):
    option = signature(Ladder).options[name]
    assert (option.takes(), option.shown_default()) == (takes, default)


def test_an_option_without_a_value_may_be_none_if_its_type_says_so():
    assert resolve(SLOT, Choice("ladder", {"load": None})).options["load"] is None
    for kind in (Annotated[int | None, Range(1), "count"], Annotated[int, Range(1), "count"] | None):
        option = Option.of("count", kind, None)
        assert (option.convert(None), option.convert("3")) == (None, 3)
        with pytest.raises(OptionError, match="count=0: must be at least 1"):
            option.convert("0")
    with pytest.raises(OptionError, match="must be a whole number"):
        Option.of("count", Annotated[int, Range(1), "count"], 1).convert(None)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (Ladder, {"wall": "north", "load": -1}, "load=-1: must be at least 0"),
        (Ladder, {"wall": "north", "wood": "elm"}, "wood=elm: must be one of oak, ash"),
        (Ladder, {"wall": "north", "nails": 0}, "nails=0: must be from 1 to 16777216"),
        (FoldingSize, {"width": 3}, "width=3: must be above 0 and at most 2"),
        (FoldingSize, {"rungs": 3}, "rungs=3: must be a multiple of parts=2"),
    ],
)
def test_python_users_get_the_same_errors(made, options, message):
    with pytest.raises(OptionError) as caught:
        made(**options)
    assert str(caught.value) == message


def test_a_checked_function_returns_its_value_and_keeps_its_name():
    @checked
    def climb(height: float, *, speed: Annotated[float, Range(above=0), "meters per second"] = 0.5) -> float:
        """Seconds to the top."""
        return height / speed

    assert (climb(3), climb(3, speed=1), climb.__name__, climb.__doc__) == (6, 3, "climb", "Seconds to the top.")
    with pytest.raises(OptionError, match="speed=0: must be above 0"):
        climb(3, speed=0)


# the tables of this package

MEMBERS = [(slot, name) for slot in SLOTS.values() for name in slot.table]
EVERY_MEMBER = pytest.mark.parametrize(("slot", "name"), MEMBERS, ids=[f"{slot.name}-{name}" for slot, name in MEMBERS])
CONTEXT = {
    "image_shape": (3, 32, 32), "data_variance": 0.06, "channels": 8, "grid": (4, 4), "total_steps": 10,
    "num_codes": 8, "latent_dim": 2, "num_classes": 0, "scales": (),
}  # fmt: skip


def bad_values(option: Option) -> Iterator[Any]:
    """Values that the option's type or one of its rules refuses."""
    if option.kind in (int, float):
        yield from ("some", "nan", "inf")
    elif option.kind is not str:
        yield "some"
    for rule in option.rules:
        if isinstance(rule, Range):
            finite = (bound for bound in (rule.low - 1, rule.high + 1, rule.above, rule.below) if math.isfinite(bound))
            yield from (option.kind(bound) for bound in finite)
        else:
            yield next(
                value for value in (0, 4, -1.0, "some", "-1") if isinstance(value, option.kind) and rule.problem(value)
            )


def test_there_are_six_slots_and_each_is_named_as_its_setting():
    assert {key: slot.name for key, slot in SLOTS.items()} == {
        key: key for key in ("dataset", "nets", "bottleneck", "prior", "likelihood", "objective")
    }


@EVERY_MEMBER
def test_every_option_has_an_explanation_a_rule_if_numeric_and_a_default_that_passes(slot, name):
    for option in signature(slot.table[name]).options.values():
        assert option.help.strip(), option.name
        assert "\n" not in option.help, option.name
        assert option.rules or option.kind not in (int, float), option.name
        assert option.convert(option.default) == option.default
        assert type(option.convert(option.default)) is type(option.default)
        assert option.convert(str(option.default)) == option.default or option.default is None


@EVERY_MEMBER
def test_every_option_out_of_range_is_refused_before_anything_is_built(slot, name):
    for option in signature(slot.table[name]).options.values():
        for value in bad_values(option):
            with pytest.raises(OptionError) as caught:
                resolve(slot, Choice(name, {option.name: value}))
            problem = caught.value
            assert (problem.slot, problem.owner, problem.option) == (slot.name, name, option.name)
            assert problem.flagged.startswith(f"--{slot.name} {name} {option.name}=")


@EVERY_MEMBER
def test_every_context_value_is_documented(slot, name):
    documented = data.__doc__ if slot.name == "dataset" else contracts.__doc__
    assert all(key in documented for key in signature(slot.table[name]).context)


@pytest.mark.parametrize("key", [key for key in SLOTS if key != "dataset"])  # data sets: see test_data.py
def test_every_member_is_built_from_its_defaults(key):
    for name, member in SLOTS[key].table.items():
        context = CONTEXT | ({"grid": (1, 1)} if name == "gaussian" else {})
        assert type(build(SLOTS[key], Choice(name, {}), context)) is member
