"""When a live run had its cores to itself, by the probes that its ranks took (see ``runtime.core_probe``).

A profile is measured in such moments. So batches outside of them say nothing about the predictor, and what
they take longer than those within them is the machine's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from experiments.live_records import LiveRun
from sim.paced import BOUNDS
from sim.slowed import SlowMoments

SLOW = 1.12  # times its usual duration, from which a probe says that somebody else is on the core
_USUAL = 0.01  # quantile of the probes that is usual: they differ by 3 %, or by 70 to 100
_SAME_MOMENT_S = 0.02  # a probe later than this after a batch says nothing of it
_FEWEST = 10  # batches on either side, to say how much slower slow ones are

FloatArray = NDArray[np.float64]


def slow_share(run: LiveRun) -> float | None:
    """Share of the probes that found a core slow; None without probes."""
    slow = _slow_probes(run)
    return None if slow is None else float(slow[run.host["probe_s"] > 0.0].mean())


def slow_moments(run: LiveRun, stages: int) -> list[SlowMoments]:
    """The probes of each stage."""
    slow = _slow_probes(run)
    if slow is None:
        return [SlowMoments()] * stages
    batches = run.records.batches
    result = []
    for stage in range(stages):
        rows = np.flatnonzero((batches["stage"] == stage) & (run.host["probe_s"] > 0.0))
        rows = rows[np.argsort(batches["start_s"][rows], kind="stable")]
        result.append(SlowMoments(batches["start_s"][rows].tolist(), slow[rows].tolist()))
    return result


def slowness(run: LiveRun) -> FloatArray:
    """[batches × stages], as in ``run.records.batches``: 0 if the last probe of its stage before a batch, and
    the next one unless it came much later, were both quick; 1 if both were slow; 0.5 if one was; NaN if
    nothing is known."""
    batches = run.records.batches
    result = np.full(len(batches["start_s"]), np.nan)
    slow = _slow_probes(run)
    if slow is None:
        return result
    for stage in np.unique(batches["stage"]).tolist():
        rows = np.flatnonzero(batches["stage"] == stage)
        rows = rows[np.argsort(batches["start_s"][rows], kind="stable")]
        probed = np.flatnonzero(run.host["probe_s"][rows] > 0.0)
        if len(probed) == 0:
            continue
        start_s, end_s = batches["start_s"][rows], batches["end_s"][rows]
        following = np.searchsorted(probed, np.arange(len(rows)), side="right")
        before = probed[np.maximum(following - 1, 0)]
        after = probed[np.minimum(following, len(probed) - 1)]
        is_near = (following < len(probed)) & (start_s[after] <= end_s + _SAME_MOMENT_S)
        is_slow = slow[rows].astype(np.float64)
        both = (is_slow[before] + is_slow[np.where(is_near, after, before)]) / 2
        result[rows] = np.where(following > 0, both, np.nan)
    return result


def slowdowns(
    bound: NDArray[np.int64], ratio: FloatArray, weight: FloatArray, slow: FloatArray
) -> list[float]:
    """How many times as long batches took in slow moments as on cores of their own, by ``BOUNDS``.

    Only the two are compared, so how well either is predicted doesn't matter. What few batches were in either
    is taken from all bounds together, and is 1 if those are few, too.

    Args:
        bound: of each batch.
        ratio: measured ÷ predicted.
        weight: predicted.
        slow: as of :func:`slowness`.
    """
    everything = _slowdown(np.ones(len(bound), dtype=bool), ratio, weight, slow, 1.0)
    return [_slowdown(bound == place, ratio, weight, slow, everything) for place in range(len(BOUNDS))]


def _slowdown(
    mine: NDArray[np.bool_], ratio: FloatArray, weight: FloatArray, slow: FloatArray, otherwise: float
) -> float:
    sides: Sequence[NDArray[np.bool_]] = (mine & (slow == 0.0), mine & (slow == 1.0))
    if min(int(side.sum()) for side in sides) < _FEWEST:
        return otherwise
    own, slowed = (float(np.average(ratio[side], weights=weight[side])) for side in sides)
    return max(slowed / own, 1.0)


def _slow_probes(run: LiveRun) -> NDArray[np.bool_] | None:
    probe_s = run.host.get("probe_s", np.zeros(0))
    taken = probe_s > 0.0
    if not taken.any():
        return None
    return np.asarray(probe_s > SLOW * np.quantile(probe_s[taken], _USUAL))
