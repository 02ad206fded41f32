"""How fast a machine was just then: batches as measured against as predicted.

A shared machine isn't as fast as when it was profiled, and not evenly: decodes, bound by memory, slow down
more than prefills, which compute. So a stage has a factor for each kind of batches: what they took together
by what was predicted for them together. No latency of a request is looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiments.batch_times import KINDS, BatchTimes
from sim.paced import Pace

FEWEST = 10  # batches of a kind that have a factor of their own


def measured_paces(times: BatchTimes, stages: int) -> list[Pace]:
    """The pace of each stage. Kinds with few batches share the factor of all; a stage without any is as
    predicted."""
    return [_pace(times, times.stage == stage) for stage in range(stages)]


def _pace(times: BatchTimes, rows: NDArray[np.bool_]) -> Pace:
    of_all = _factor(times, rows, 1.0)
    factors = {}
    for place, kind in enumerate(KINDS):
        mine = rows & (times.kind == place)
        factors[kind] = _factor(times, mine, of_all) if mine.sum() >= FEWEST else of_all
    return Pace(**factors)


def _factor(times: BatchTimes, rows: NDArray[np.bool_], otherwise: float) -> float:
    predicted_s, measured_s = float(times.predicted_s[rows].sum()), float(times.measured_s[rows].sum())
    return measured_s / predicted_s if predicted_s > 0.0 and measured_s > 0.0 else otherwise
