"""How fast a machine was just then: batches as measured against as predicted.

A shared machine isn't as fast as when it was profiled, and not evenly: decodes, which read memory, slow down
more than attention of chunks, which computes within the cache, and one moment is slow where the next isn't.
So each stage has the factors of its batches, by what they are bound by. No latency of a request is looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiments.batch_times import BatchTimes
from sim.paced import BOUNDS, Factors, Pace

FEWEST = 10  # batches of one bound that have factors of their own


def measured_paces(times: BatchTimes, stages: int) -> list[Pace]:
    """The pace of each stage. A bound of few batches shares the factors of all; a stage without any is as
    predicted."""
    return [_pace(times, times.stage == stage) for stage in range(stages)]


def _pace(times: BatchTimes, rows: NDArray[np.bool_]) -> Pace:
    rows = rows & (times.predicted_s > 0.0) & (times.measured_s > 0.0)
    of_all = _factors(times, rows) if rows.any() else Factors()
    factors = {}
    for bound, name in enumerate(BOUNDS):
        mine = rows & (times.bound == bound)
        factors[name] = _factors(times, mine) if mine.sum() >= FEWEST else of_all
    return Pace(**factors)


def _factors(times: BatchTimes, rows: NDArray[np.bool_]) -> Factors:
    predicted_s = times.predicted_s[rows]
    return Factors((times.measured_s[rows] / predicted_s).tolist(), predicted_s.tolist())
