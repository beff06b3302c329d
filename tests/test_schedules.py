"""Schedules are pure functions of the step."""

import math

import pytest

from vqvae.errors import OptionError, shown
from vqvae.schedules import Plateau, RateText, Schedule, ScheduleText, parse_rate


def value(text: str, step: int, total: int = 100) -> float:
    return Schedule.parse(text)(step, total)


def test_a_number_is_constant():
    assert [value("3e-4", step) for step in (0, 50, 1000)] == [3e-4] * 3


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


def test_a_warm_up_longer_than_the_run_is_cut_off():
    assert value("linear:0:1:10,cosine:1:0", 5, total=6) == pytest.approx(0.5)


def test_steps_may_be_written_as_floats():
    assert value("linear:0:1:1e1", 5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must be a number, or shape:start:end"),
        ("fast", "must be a number, or shape:start:end"),
        ("linear:1", "must be a number, or shape:start:end"),
        ("linear:0:1:2:3", "must be a number, or shape:start:end"),
        ("lineer:0:1:3", "no shape 'lineer' (did you mean 'linear'?); known: linear, cosine, quarter-cosine"),
        ("linear:a:b:3", "start, end and steps must be numbers"),
        ("linear:0:1:inf", "steps must be a whole number from 1 to 2147483647"),
        ("linear:0:1:2.5", "steps must be a whole number from 1 to 2147483647"),
        ("linear:0:1:1e10", "steps must be a whole number from 1 to 2147483647"),
        ("linear:0:1e39", "start and end must be finite numbers of at most 3.4e+38"),
        ("linear:0:nan", "start and end must be finite numbers of at most 3.4e+38"),
        ("linear:0:1:0", "steps must be a whole number from 1 to 2147483647"),
        ("linear:0:1,linear:1:0", "only the last piece may leave out its steps"),
        ("nan", "must be a finite number of at most 3.4e+38, or a schedule"),
        ("-inf", "must be a finite number of at most 3.4e+38, or a schedule"),
    ],
)
def test_a_bad_schedule_is_refused_in_the_name_of_its_option(text, problem):
    with pytest.raises(OptionError) as caught:
        Schedule.parse(text, "kl_weight")
    assert caught.value.flagged.startswith(f"--kl-weight {shown(text)}: {problem}")
    assert ScheduleText().problem(text) == caught.value.problem


@pytest.mark.parametrize(
    ("rule", "text", "problem"),
    [
        (ScheduleText(above=0), "0.5", None),
        (ScheduleText(above=0), "0", "must be above 0"),
        (ScheduleText(above=0), "linear:1:0:5,linear:1:2", "must be above 0 at every step"),
        (ScheduleText(low=0), "linear:1:0", None),
        (ScheduleText(low=0), "-1e-9", "must be at least 0"),
        (ScheduleText(low=0), "linear:1:2:5,cosine:1:-1", "must be at least 0 at every step"),
        (ScheduleText(), "-3", None),
    ],
)
def test_every_value_of_a_schedule_must_keep_its_bound(rule, text, problem):
    assert rule.problem(text) == problem


def test_the_rule_tells_its_bound():
    rules = (ScheduleText(), ScheduleText(low=0), ScheduleText(above=0.5))
    assert [str(rule) for rule in rules] == [
        "(a number or a schedule)",
        "(a number or a schedule, at least 0)",
        "(a number or a schedule, above 0.5)",
    ]


@pytest.mark.parametrize("text", ["3e-4", "linear:0.0003:0.0003", "0.1", "cosine:0.7:0.7:9"])
def test_a_constant_is_the_same_number_at_every_step_of_runs_of_any_length(text):
    schedule = Schedule.parse(text)
    assert {schedule(step, total) for total in (1, 3, 9, 700) for step in range(total)} == {schedule.values()[0]}


def test_a_plateau_is_a_constant_rate_that_is_reduced():
    schedule, plateau = parse_rate("plateau:1e-3:0.5:3")
    assert {schedule(step, 100) for step in (0, 50, 200)} == {1e-3}
    assert plateau == Plateau(0.5, 3)
    assert parse_rate("cosine:1:0") == (Schedule.parse("cosine:1:0"), None)


@pytest.mark.parametrize(
    "text",
    ["plateau:", "plateau:1e-3", "plateau:1e-3:1:3", "plateau:1e-3:0:3", "plateau:1e-3:0.5:-1", "plateau:1:nan:3",
     "plateau:1:0.5:2.5", "plateau:1:0.5:3:4", "plateau:x:0.5:3"],
)  # fmt: skip
def test_a_plateau_that_cannot_be_read_is_explained(text):
    problem = RateText(low=0).problem(text)
    assert problem
    assert "plateau:1e-3:0.5:3" in problem or "number" in problem


def test_a_plateau_follows_the_rule_of_rates():
    assert RateText(low=0).problem("plateau:1e-3:0.5:3") is None
    assert RateText(low=0).problem("plateau:-1:0.5:3") == "must be at least 0"
    assert ScheduleText().problem("plateau:1e-3:0.5:3")  # another schedule cannot have one
