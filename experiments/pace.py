"""How fast a machine was just then: batches as measured against as predicted.

A shared machine isn't as fast as when it was profiled, and not evenly: decodes, which read memory, slow down
more than attention of chunks, which computes within the cache, and one moment is slow where the next isn't.
So each stage has the factors of its batches, by what they are bound by. No latency of a request is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from experiments.alike import alike
from experiments.batch_times import BatchTimes
from sim.paced import BOUNDS, Factors, Pace

FEWEST = 10  # batches of one bound that have factors of their own
_WORDS = (
    "batches of {} decodes",
    "chunks with {} decodes",
    "chunks bound by attention with {} decodes",
    "lone decodes, {} in all groups",
)
_SHIFTS = 40  # of factors against batches, to see what is left by chance

FloatArray = NDArray[np.float64]


def measured_paces(times: BatchTimes, stages: int) -> list[Pace]:
    """The pace of each stage. A bound of few batches shares the factors of all; a stage without any is as
    predicted."""
    return [_pace(times, times.stage == stage) for stage in range(stages)]


def _pace(times: BatchTimes, rows: NDArray[np.bool_]) -> Pace:
    rows = rows & (times.predicted_s > 0.0) & (times.measured_s > 0.0)
    of_all = replace(_factors(times, rows), is_shared=True) if rows.any() else Factors(is_shared=True)
    factors = {}
    for bound, name in enumerate(BOUNDS):
        mine = rows & (times.bound == bound)
        factors[name] = _factors(times, mine) if mine.sum() >= FEWEST else of_all
    return Pace(**factors)


def _factors(times: BatchTimes, rows: NDArray[np.bool_]) -> Factors:
    predicted_s = times.predicted_s[rows]
    return Factors((times.measured_s[rows] / predicted_s).tolist(), predicted_s.tolist())


@dataclass(frozen=True, slots=True)
class Leftover:
    """What is left of the errors of batch times at pace, by what batches hold: those of a stage and a bound
    with as many decodes are alike.

    Attributes:
        share: Σ over groups of like batches of |Σ predicted at pace − Σ measured| ÷ Σ measured.
        by_chance: what ``share`` comes to where factors have nothing to do with what batches hold, but follow
            each other as they did: nine in ten times it is less.
        worst: the group that is off by most time, in words.
        worst_error: predicted at pace ÷ measured − 1 of it.
        worst_share: how much of the time it takes.
    """

    share: float
    by_chance: float
    worst: str
    worst_error: float
    worst_share: float


def leftover(times: BatchTimes, predicted_s: FloatArray) -> Leftover | None:
    """What is left in groups of ``FEWEST`` batches or more; the others of a stage and a bound count as one.

    Args:
        predicted_s: of each batch, at pace.

    Returns:
        None without any batches.
    """
    total_s = float(times.measured_s.sum())
    if total_s <= 0.0:
        return None
    names, group = _groups(times, int(times.stage.max()) + 1)

    def off_s(measured_s: FloatArray) -> FloatArray:
        return np.asarray(np.bincount(group, predicted_s) - np.bincount(group, measured_s))

    found_s = off_s(times.measured_s)
    random = np.random.default_rng(0)
    together = [rows for _, rows in alike(np.stack([times.stage, times.bound], axis=1))]
    shifted = [off_s(_shifted(together, predicted_s, times.measured_s, random)) for _ in range(_SHIFTS)]
    by_chance = np.quantile([np.abs(each).sum() for each in shifted], 0.9) / total_s
    worst = int(np.argmax(np.abs(found_s)))
    taken_s = float(np.bincount(group, times.measured_s)[worst])
    return Leftover(
        share=float(np.abs(found_s).sum()) / total_s,
        by_chance=float(by_chance),
        worst=names[worst],
        worst_error=float(found_s[worst]) / taken_s if taken_s > 0.0 else 0.0,
        worst_share=taken_s / total_s,
    )


def _groups(times: BatchTimes, stages: int) -> tuple[list[str], NDArray[np.int64]]:
    """The groups' names, and the group of each batch."""
    names: dict[str, int] = {}
    group = np.zeros(len(times.stage), dtype=np.int64)
    for (stage, bound, decodes), rows in alike(np.stack([times.stage, times.bound, times.decodes], axis=1)):
        name = _WORDS[bound].format(decodes if len(rows) >= FEWEST else "other numbers of")
        name += f" in stage {stage}" if stages > 1 else ""
        group[rows] = names.setdefault(name, len(names))
    return list(names), group


def _shifted(
    together: Sequence[NDArray[np.int64]],
    predicted_s: FloatArray,
    measured_s: FloatArray,
    random: np.random.Generator,
) -> FloatArray:
    """Measured times as they would be if factors met other batches of those ``together`` with them."""
    result = measured_s.copy()
    for rows in together:
        rows = rows[predicted_s[rows] > 0.0]
        if len(rows) > 1:
            factors = measured_s[rows] / predicted_s[rows]
            result[rows] = predicted_s[rows] * np.roll(factors, int(random.integers(1, len(rows))))
    return result
