"""The time of many decode steps at once, exactly."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Polyline:
    """A piecewise linear function, evaluated one point at a time.

    Args:
        knots: strictly increasing, [n] with n ≥ 2.
        values: [n]. Outside the knots the first and last segments go on.
    """

    __slots__ = ("_inner", "knots", "slopes", "values")

    def __init__(self, knots: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        self.knots: list[float] = knots.tolist()
        self.values: list[float] = values.tolist()
        self.slopes: list[float] = (np.diff(values) / np.diff(knots)).tolist()
        self._inner = self.knots[1:-1]  # a bisection among these is the segment's index, ends included

    def segment(self, x: float) -> int:
        """Index of the segment that holds ``x``."""
        return bisect_right(self._inner, x)

    def at(self, x: float) -> float:
        """The function's value at ``x``."""
        i = bisect_right(self._inner, x)
        return self.values[i] + self.slopes[i] * (x - self.knots[i])

    def end_of_segment(self, i: int) -> float:
        """Where segment ``i`` ends; infinity for the last."""
        return self._inner[i] if i < len(self._inner) else float("inf")


class Piece(NamedTuple):
    """Consecutive steps whose durations form an arithmetic series."""

    steps: int
    first_s: float  # duration of the first step
    growth_s: float  # how much longer each further step is

    def after_s(self, steps: int) -> float:
        """Time that the first ``steps`` of its steps take."""
        return steps * self.first_s + self.growth_s * (steps * (steps - 1) // 2)


class DecodeRun:
    """``steps`` steps of ``decodes`` decodes, each step adding one token to every context.

    Step k takes ``constant_s``, ``joint_s`` (attention that goes by none of these sizes) and ``attention`` at
    the total context ``total_context + k · decodes``.
    While that stays within one segment of the polyline the durations form an arithmetic series, so a
    run has one :class:`Piece` for each segment that it touches.
    """

    __slots__ = ("_ends_s", "constant_s", "pieces", "steps", "total_s")

    def __init__(
        self,
        attention: Polyline,
        constant_s: float,
        total_context: int,
        decodes: int,
        steps: int,
        joint_s: float = 0.0,
    ) -> None:
        self.steps = steps
        self.constant_s = constant_s
        constant_s += joint_s
        self.pieces: list[Piece] = []
        self._ends_s: list[float] = []
        elapsed_s = 0.0
        context, left = total_context, steps
        segment = attention.segment(context)
        while left > 0:
            end = attention.end_of_segment(segment)
            # steps that start before the segment's end: context + (count - 1) · decodes < end
            count = left if end == float("inf") else min(left, -int((context - end) // decodes))
            slope = attention.slopes[segment]
            first_s = constant_s + attention.values[segment] + slope * (context - attention.knots[segment])
            piece = Piece(count, first_s, slope * decodes)
            elapsed_s += piece.after_s(count)
            self.pieces.append(piece)
            self._ends_s.append(elapsed_s)
            context += count * decodes
            left -= count
            segment = attention.segment(context)
        self.total_s = elapsed_s

    def pieces_between(self, first: int, end: int) -> list[Piece]:
        """The pieces of steps ``first`` to ``end`` − 1, counted from 0."""
        found = []
        for piece in self.pieces:
            low, high = max(first, 0), min(end, piece.steps)
            if low < high:
                found.append(Piece(high - low, piece.first_s + low * piece.growth_s, piece.growth_s))
            first -= piece.steps
            end -= piece.steps
        return found

    def ending_after(self, elapsed_s: float) -> tuple[int, float]:
        """The first step that ends at or after ``elapsed_s``, counted from 1, and when it ends."""
        if elapsed_s >= self.total_s:
            return self.steps, self.total_s
        done, before_s = 0, 0.0
        index = 0
        while self._ends_s[index] < elapsed_s:
            done += self.pieces[index].steps
            before_s = self._ends_s[index]
            index += 1
        piece = self.pieces[index]
        wanted_s = elapsed_s - before_s
        low, high = 0, piece.steps  # after `low` steps it is too early, after `high` steps late enough
        while high - low > 1:
            middle = (low + high) // 2
            if before_s + piece.after_s(middle) < elapsed_s:
                low = middle
            else:
                high = middle
        if wanted_s <= 0.0:
            high = 1
        return done + high, before_s + piece.after_s(high)
