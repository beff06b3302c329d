"""Names and key=value options become objects, or one clear line."""

from typing import Literal

import pytest

from vqvae.errors import UserError
from vqvae.members import Choice, Slot, build, describe, resolve


class Ladder:
    """A ladder.

    rungs   how many.
    """

    def __init__(
        self,
        *,
        wall: str,
        rungs: int = 5,
        width: float = 0.5,
        safe: bool = True,
        wood: Literal["oak", "ash"] = "oak",
    ):
        self.values = (wall, rungs, width, safe, wood)


class Rope:
    """A rope."""

    def __init__(self, *, tree: str):
        self.tree = tree


SLOT = Slot("--climb", {"ladder": Ladder, "rope": Rope})


def parse(text: str) -> Choice:
    return Choice.parse("--climb", text.split())


def test_options_take_their_declared_types():
    built = build(SLOT, parse("ladder rungs=1e1 width=2 safe=no wood=ash"), {"wall": "north", "tree": "elm"})
    assert built.values == ("north", 10, 2.0, False, "ash")


def test_resolve_fills_in_every_default():
    assert resolve(SLOT, parse("ladder rungs=3")).options == {
        "rungs": 3,
        "width": 0.5,
        "safe": True,
        "wood": "oak",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lader", "did you mean 'ladder'"),
        ("ladder rung=3", "unknown option 'rung' \\(did you mean 'rungs'\\?\\); it takes rungs=5"),
        ("ladder rungs=three", "rungs=three: must be a whole number"),
        ("ladder rungs=2.5", "must be a whole number"),
        ("ladder width=wide", "must be a number"),
        ("ladder safe=perhaps", "must be yes or no"),
        ("ladder wood=asg", "must be one of oak, ash \\(did you mean 'ash'"),
        ("rope tree=elm", "unknown option 'tree'; it takes no options"),  # wiring is not for the user
    ],
)
def test_what_does_not_fit_is_named(text, message):
    with pytest.raises(UserError, match=message):
        resolve(SLOT, parse(text))


@pytest.mark.parametrize("words", [["rungs=3"], ["ladder", "rungs"], ["ladder", "=3"]])
def test_malformed_words_are_refused(words):
    with pytest.raises(UserError, match="--climb"):
        Choice.parse("--climb", words)


def test_missing_wiring_names_the_members_that_fit():
    with pytest.raises(UserError, match="--climb rope needs tree.*those that fit: ladder"):
        build(SLOT, parse("rope"), {"wall": "north"})


def test_describe_shows_every_option_with_its_default():
    text = describe(SLOT)
    assert "--climb ladder rungs=5 width=0.5 safe=yes wood=oak|ash" in text
    assert "rungs   how many." in text
