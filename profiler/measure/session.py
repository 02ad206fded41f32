"""Which point is measured next, until the budget is spent.

1. The coarse grid, operators in turn: the first few points of each, enough to learn something, and then
   equal shares. Each prefix of it covers the ranges, so any early stop is usable.
2. Refinement: points that the fit so far predicts worst, in rounds, until half of the budget is spent.
3. A second visit of everything, in another order; then of the points whose visits disagree most.

Nothing here knows torch or the clock: the measuring is a function that is called with a point.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from profiler.measure.points import Point
from profiler.measure.store import OK, Store, Visit

FIRST = 6  # points of every operator before more of any
REFINE_UNTIL = 0.5  # share of the budget after which no new point is begun
VISITS = 2  # of every point, if the budget allows
MOST_VISITS = 9
STEADY = 0.02  # spread over time below which a point is not visited a third time

Measure = Callable[[Point], Visit]
Refine = Callable[[Store, int], list[Point]]
"""Given what was measured and how many are wanted, the points to measure next; none when there is no use."""


class Session:
    """Spends a budget on measurements.

    Args:
        store: what was measured before, and where the rest goes.
        coarse: the coarse grid, in order.
        measure: visits one point.
        refine: proposes points beyond the grid.
        budget_s: of all visits, those of resumed sessions included.
        on_visit: called after each visit with the share of the budget that is spent.
        only: operators to visit again; all if empty. The store may hold others.
    """

    def __init__(
        self,
        store: Store,
        coarse: Sequence[Point],
        measure: Measure,
        refine: Refine,
        budget_s: float,
        on_visit: Callable[[Point, Visit, float], None] = lambda point, visit, spent: None,
        only: Sequence[str] = (),
    ) -> None:
        self.store = store
        self.budget_s = budget_s
        self._coarse = coarse
        self._measure = measure
        self._refine = refine
        self._on_visit = on_visit
        self._only = only

    def run(self) -> None:
        """Measure until the budget is spent or nothing is left to learn. Ctrl-C passes through: what was
        measured until then is in the store."""
        for point in self._next():
            visit = self._measure(point)
            self.store.add(point, visit)
            self._on_visit(point, visit, min(self.spent_s / self.budget_s, 1.0))
            if self.spent_s >= self.budget_s:
                return

    @property
    def spent_s(self) -> float:
        return self.store.cost_s

    def _next(self) -> Iterator[Point]:
        points = self.store.points
        yield from (point for point in self._coarse if point not in points)
        while self.spent_s < REFINE_UNTIL * self.budget_s:
            wanted = [point for point in self._refine(self.store, 24) if point not in points]
            if not wanted:
                break
            for point in wanted:
                if self.spent_s >= REFINE_UNTIL * self.budget_s:
                    break
                yield point
        for visits in range(1, VISITS):
            again = [point for point in self._sound() if len(points[point].visits) <= visits]
            random.Random(visits).shuffle(again)
            yield from again
        while (unsteady := self._least_steady()) is not None:
            yield unsteady

    def _sound(self) -> list[Point]:
        return [
            point
            for point, measured in self.store.points.items()
            if measured.status == OK and (not self._only or point.operator in self._only)
        ]

    def _least_steady(self) -> Point | None:
        """The point whose visits disagree most, if it is worth another."""
        best, worst = None, STEADY
        for point in self._sound():
            measured = self.store.points[point]
            if len(measured.visits) >= MOST_VISITS:
                continue
            # Each further visit has to earn its place: it narrows the doubt by less than the one before.
            relative = measured.spread_s() / max(measured.time_s(0.5), 1e-12)
            doubt = relative / (len(measured.visits) - VISITS + 1)
            if doubt > worst:
                best, worst = point, doubt
        return best


def interleave(grids: Mapping[str, Sequence[Point]]) -> list[Point]:
    """The grids of several operators as one: after the first few points of each, each has had about an equal
    share at any moment."""
    ranked = [
        (min(rank, FIRST), (rank + 1) / len(points) if rank >= FIRST else 0.0, operator, point)
        for operator, points in grids.items()
        for rank, point in enumerate(points)
    ]
    return [point for *_, point in sorted(ranked)]
