"""Where to measure next: where a fit to the rest predicts measured neighbours worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profiler.estimate import FloatArray
from profiler.formulas import make_physics
from profiler.measure.grid import coordinates, shape_of
from profiler.measure.points import Point
from profiler.measure.store import Measured, Store
from profiler.operators import OperatorModel
from specs.devices import DeviceSpec

FOLDS = 4
FEWEST_ROWS = 12
NEIGHBOURS = 3
FAR_OCTAVES = 2.0  # beyond this distance from any measurement, more distance is no more doubt
# Doubt counts by how much of an iteration the operator takes.
_IMPORTANCE = {"gemm": 1.0, "prefill_attention": 1.0, "decode_attention": 1.0}
_LESSER = 0.4
_WITHOUT_MODEL = (
    "layer",
    "host",
    "iteration",
    "stage_gap",
    "skewed_decode",
)  # held against the others, not fitted themselves


class Refiner:
    """Proposes points from the candidates of each operator.

    Args:
        candidates: every point that may be measured, by operator.
        quantile: of a point's visits, that counts as its time.
    """

    def __init__(
        self,
        candidates: Mapping[str, Sequence[Point]],
        device: DeviceSpec,
        dtype: str,
        *,
        cached_bytes: int,
        quantile: float,
    ) -> None:
        self._candidates = {
            operator: list(points)
            for operator, points in candidates.items()
            if operator not in _WITHOUT_MODEL and points
        }
        self._device, self._dtype = device, dtype
        self._cached_bytes, self._quantile = cached_bytes, quantile

    def __call__(self, store: Store, count: int) -> list[Point]:
        """Up to `count` points, the most doubtful first."""
        scored: list[tuple[float, Point]] = []
        for operator, measured in store.measured().items():
            open_points = [p for p in self._candidates.get(operator, ()) if p not in store.points]
            if open_points and len(measured) >= FEWEST_ROWS:
                doubts = self._doubts(operator, measured, open_points)
                # No operator takes more than a part of a round: the one with most dimensions would take all.
                scored += _apart(open_points, doubts * _IMPORTANCE.get(operator, _LESSER), count // 3 + 1)
        scored.sort(key=lambda entry: (-entry[0], entry[1]))
        return [point for _, point in scored[:count]]

    def _doubts(
        self, operator: str, measured: Mapping[Point, Measured], open_points: Sequence[Point]
    ) -> FloatArray:
        """For each open point the mean held-out error of its neighbours, the more the farther they are."""
        points = list(measured)
        errors = self._held_out_errors(operator, points, measured)
        distance = np.linalg.norm(
            coordinates(open_points)[:, None, :] - coordinates(points)[None, :, :], axis=2
        )
        nearest = np.argsort(distance, axis=1)[:, :NEIGHBOURS]
        error = errors[nearest].mean(axis=1)
        gap = np.minimum(distance.min(axis=1), FAR_OCTAVES)
        return np.asarray(error * gap)

    def _held_out_errors(
        self, operator: str, points: Sequence[Point], measured: Mapping[Point, Measured]
    ) -> FloatArray:
        """|log(predicted ÷ measured)| of every point, by a fit that hasn't seen it."""
        physics = make_physics(self._device, operator, self._dtype, self._cached_bytes)
        shape = shape_of(points)
        time_s = np.array([measured[point].time_s(self._quantile) for point in points])
        fold = np.random.default_rng(len(points)).permutation(len(points)) % FOLDS
        errors = np.empty(len(points))
        for number in range(FOLDS):
            held = fold == number
            model = OperatorModel(physics, length_scale=2.5, noise=0.3)
            known = {name: column[~held] for name, column in shape.items()}
            model.fit(known, time_s[~held], np.arange(int(np.sum(~held))))
            predicted = model.predict({name: column[held] for name, column in shape.items()})
            errors[held] = np.abs(np.log(predicted.time_s / time_s[held]))
        return errors


def _apart(points: Sequence[Point], doubts: FloatArray, count: int) -> list[tuple[float, Point]]:
    """The most doubtful points, none within an octave of one before it: those learn the same."""
    where = coordinates(points)
    chosen: list[int] = []
    for index in np.argsort(-doubts, kind="stable"):
        if len(chosen) == count:
            break
        if all(np.linalg.norm(where[index] - where[other]) >= 1.0 for other in chosen):
            chosen.append(int(index))
    return [(float(doubts[index]), points[index]) for index in chosen]
