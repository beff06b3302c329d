"""A number that may change over training, as a pure function of the step.

Written as a plain number, or as pieces `shape:start:end[:steps]` joined by commas, one after the other:
`linear:0:3e-4:500,cosine:3e-4:1e-6` warms up over 500 steps, then falls until the end of the run. Only the last piece
may leave out its steps; it then lasts to the end of the run. After the last piece its end value stays.
"""

import dataclasses
import math
from typing import NamedTuple

from vqvae.errors import OptionError, UserError, near_misses
from vqvae.registry import LARGEST

SHAPES = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    # a slow start and a steep end: the published ramps of deep-vector-quantization
    "quarter-cosine": lambda progress: 1 - math.cos(math.pi / 2 * progress),
}


class Piece(NamedTuple):
    shape: str
    start: float
    end: float
    steps: int | None  # None: to the end of the run


class Schedule(NamedTuple):
    """`schedule(step, total_steps)` is the value at a step; the module's docstring gives the form."""

    pieces: tuple[Piece, ...]

    @classmethod
    def parse(cls, text: str, option: str = "schedule") -> "Schedule":
        """Read a schedule, the value of `option`; raises `OptionError`, which names that option."""
        try:
            value = float(text)
        except ValueError:
            try:
                pieces = [_piece(part) for part in str(text).split(",")]
                if any(piece.steps is None for piece in pieces[:-1]):
                    raise UserError("only the last piece may leave out its steps")
            except UserError as problem:
                raise OptionError(option, text, str(problem)) from None
            return cls(tuple(pieces))
        if not abs(value) <= LARGEST[float]:
            raise OptionError(option, text, f"must be a finite number of at most {LARGEST[float]:g}, or a schedule")
        return cls((Piece("linear", value, value, None),))

    def __call__(self, step: int, total_steps: int) -> float:
        begin = 0
        for piece in self.pieces:
            steps = max(total_steps - begin, 1) if piece.steps is None else piece.steps
            if step < begin + steps:
                if piece.start == piece.end:  # exactly, whatever the length of the run
                    return piece.start
                weight = SHAPES[piece.shape]((step - begin) / steps)
                return (1 - weight) * piece.start + weight * piece.end
            begin += steps
        return self.pieces[-1].end

    def values(self) -> list[float]:
        """Where each piece starts and ends."""
        return [value for piece in self.pieces for value in (piece.start, piece.end)]


class Plateau(NamedTuple):
    """A rate that is multiplied by `factor` after more than `patience` epochs without a better held-out metric.

    The epochs are counted since the best one or since the last reduction, as by ReduceLROnPlateau of PyTorch.
    """

    factor: float
    patience: int


def parse_rate(text: str, option: str = "lr") -> tuple[Schedule, Plateau | None]:
    """Read a schedule or `plateau:start:factor:patience`, the value of `option`; raises `OptionError`, which names it.

    With a plateau, the schedule is constant.
    """
    if not text.startswith("plateau:"):
        return Schedule.parse(text, option), None
    try:
        start, factor, patience = text.removeprefix("plateau:").split(":")
        plateau = Plateau(float(factor), int(patience))
    except ValueError:
        plateau = None
    if plateau is None or not (0 < plateau.factor < 1 and 0 <= plateau.patience <= LARGEST[int]):
        problem = "must be plateau:rate:factor:patience, with a factor between 0 and 1, such as plateau:1e-3:0.5:3"
        raise OptionError(option, text, problem)
    return Schedule.parse(start, option), plateau


@dataclasses.dataclass(frozen=True)
class ScheduleText:
    """The rule of an option whose text is a schedule; its values must be above `above`, or at least `low`."""

    low: float = -math.inf
    above: float = -math.inf

    def read(self, text: str) -> Schedule:
        return Schedule.parse(text)

    def problem(self, text: str) -> str | None:
        try:
            values = self.read(text).values()
        except OptionError as problem:
            return problem.problem
        throughout = "" if len(set(values)) == 1 else " at every step"
        if min(values) <= self.above:
            return f"must be above {self.above:g}{throughout}"
        return f"must be at least {self.low:g}{throughout}" if min(values) < self.low else None

    def __str__(self) -> str:
        bounds = {"at least": self.low, "above": self.above}
        finite = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        return f"({', '.join(['a number or a schedule', *finite])})"


class RateText(ScheduleText):
    """The rule of a learning rate, which may also fall where a held-out metric no longer gets better."""

    def read(self, text: str) -> Schedule:
        return parse_rate(text)[0]


def _piece(text: str) -> Piece:
    shape, *numbers = text.split(":")
    if len(numbers) not in (2, 3):
        raise UserError("must be a number, or shape:start:end[:steps] such as cosine:3e-4:1e-6:20000")
    if shape not in SHAPES:
        raise UserError(f"no shape '{shape}'{near_misses(shape, SHAPES)}; known: {', '.join(SHAPES)}")
    try:
        start, end, *steps = map(float, numbers)
    except ValueError:
        raise UserError("start, end and steps must be numbers") from None
    if not all(abs(value) <= LARGEST[float] for value in (start, end)):  # nan compares as false
        raise UserError(f"start and end must be finite numbers of at most {LARGEST[float]:g}")
    if steps and not (1 <= steps[0] <= LARGEST[int] and steps[0] == int(steps[0])):
        raise UserError(f"steps must be a whole number from 1 to {LARGEST[int]}")
    return Piece(shape, start, end, int(steps[0]) if steps else None)
