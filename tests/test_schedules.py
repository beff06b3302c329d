"""Schedules are pure functions of the step."""

import math

import pytest

from vqvae.errors import UserError
from vqvae.schedules import Schedule


def value(text: str, step: int, total: int = 100) -> float:
    return Schedule.parse("--lr", text)(step, total)


def test_a_number_is_constant():
    assert [value("3e-4", s) for s in (0, 50, 1000)] == [3e-4] * 3


@pytest.mark.parametrize(
    ("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("quarter-cosine", 1 - math.cos(math.pi / 4))]
)
def test_shapes_start_end_and_halfway(shape, half):
    text = f"{shape}:0:2:40"
    assert value(text, 0) == 0
    assert value(text, 20) == pytest.approx(2 * half)
    assert value(text, 40) == value(text, 5000) == 2


def test_pieces_follow_each_other_and_the_last_lasts_to_the_end():
    text = "linear:0:1:10,cosine:1:0"
    assert value(text, 5) == pytest.approx(0.5)
    assert value(text, 10) == 1
    assert value(text, 55) == pytest.approx(0.5)
    assert value(text, 99) < 0.001


@pytest.mark.parametrize(
    "text", ["", "fast", "linear:1", "linear:a:b:3", "lineer:0:1:3", "linear:0:1:0", "linear:0:1,linear:1:0"]
)
def test_bad_schedules_name_the_flag(text):
    with pytest.raises(UserError, match="--lr"):
        value(text, 0)
