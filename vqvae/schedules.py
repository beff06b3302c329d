"""A number that may change over training, as a pure function of the step.

Written on the command line as a plain number, or as pieces `shape:start:end[:steps]` joined by commas, one after
the other. `linear:0:3e-4:500,cosine:3e-4:1e-6` warms up over 500 steps, then falls until the end of the run.
A piece without steps lasts to the end of the run (only the last piece may); after the last piece its end value holds.
"""

import math
from typing import NamedTuple

from vqvae.errors import UserError, near_misses

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
    """`schedule(step, total_steps)` is its value at a step; see the module's docstring for the form."""

    pieces: tuple[Piece, ...]

    @classmethod
    def parse(cls, flag: str, text: str) -> "Schedule":
        try:
            value = float(text)
            return cls((Piece("linear", value, value, None),))
        except ValueError:
            pieces = [_piece(flag, part) for part in str(text).split(",")]
        if any(piece.steps is None for piece in pieces[:-1]):
            raise UserError(f"{flag} {text}: only the last piece may leave out its steps")
        return cls(tuple(pieces))

    def __call__(self, step: int, total_steps: int) -> float:
        begin = 0
        for piece in self.pieces:
            steps = max(total_steps - begin, 1) if piece.steps is None else piece.steps
            if step < begin + steps:
                weight = SHAPES[piece.shape]((step - begin) / steps)
                return (1 - weight) * piece.start + weight * piece.end
            begin += steps
        return self.pieces[-1].end


def _piece(flag: str, text: str) -> Piece:
    shape, *numbers = text.split(":")
    if len(numbers) not in (2, 3):
        raise UserError(f"{flag} {text}: must be a number, or shape:start:end[:steps] such as cosine:3e-4:1e-6:20000")
    if shape not in SHAPES:
        raise UserError(f"{flag} {text}: no shape '{shape}'{near_misses(shape, SHAPES)}; known: {', '.join(SHAPES)}")
    try:
        start, end = float(numbers[0]), float(numbers[1])
        steps = int(float(numbers[2])) if len(numbers) == 3 else None
    except (ValueError, OverflowError):
        raise UserError(f"{flag} {text}: start, end and steps must be numbers") from None
    if steps is not None and steps < 1:
        raise UserError(f"{flag} {text}: steps must be at least 1")
    return Piece(shape, start, end, steps)
