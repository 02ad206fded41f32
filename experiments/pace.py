"""How fast a machine was just then: batches as measured against as predicted.

A shared machine isn't as fast as when it was profiled, and not evenly: decodes, which read memory, slow down
more than attention of chunks, which computes within the cache, and one moment is slow where the next isn't.
So each stage has the factors of its batches, by what they are bound by. No latency of a request is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from experiments.batch_times import BatchTimes
from sim.paced import BOUNDS, Factors, Pace

FEWEST = 10  # batches of one bound that have factors of their own
_WORDS = ("decodes of {}", "chunks with {} decodes", "chunks bound by attention with {} decodes")


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
    """What the paces leave of the errors of batch times, by what batches hold: those of a stage and a bound
    with as many decodes are alike.

    Attributes:
        share: Σ over groups of like batches of |Σ predicted at pace − Σ measured| ÷ Σ measured.
        worst: the group that is off by most time, in words.
        worst_error: predicted at pace ÷ measured − 1 of it.
        worst_share: how much of the time it takes.
    """

    share: float
    worst: str
    worst_error: float
    worst_share: float


def leftover(times: BatchTimes, paces: Sequence[Pace]) -> Leftover | None:
    """What is left in groups of ``FEWEST`` batches or more, smaller ones together; None without any."""
    means = np.array([[pace.of(bound).mean for bound in range(len(BOUNDS))] for pace in paces])
    predicted_s = times.predicted_s * means[times.stage, times.bound]
    groups: dict[str, list[float]] = {}
    keys = np.stack([times.stage, times.bound, times.decodes], axis=1)
    for (stage, bound, decodes), rows in _alike(keys):
        name = _WORDS[bound].format(decodes) if len(rows) >= FEWEST else "few alike"
        name += f" in stage {stage}" if len(paces) > 1 else ""
        sums_s = groups.setdefault(name, [0.0, 0.0])
        sums_s[0] += float(predicted_s[rows].sum())
        sums_s[1] += float(times.measured_s[rows].sum())
    total_s = sum(measured_s for _, measured_s in groups.values())
    if total_s <= 0.0:
        return None
    name, (worst_s, taken_s) = max(groups.items(), key=lambda item: abs(item[1][0] - item[1][1]))
    share = sum(abs(one_s - other_s) for one_s, other_s in groups.values()) / total_s
    return Leftover(share, name, worst_s / taken_s - 1.0, taken_s / total_s)


def _alike(keys: NDArray[np.int64]) -> Iterator[tuple[tuple[int, ...], NDArray[np.int64]]]:
    """The different rows of ``keys``, and where each is."""
    found, places = np.unique(keys, axis=0, return_inverse=True)
    for number, key in enumerate(found.tolist()):
        yield tuple(key), np.flatnonzero(places.ravel() == number)
