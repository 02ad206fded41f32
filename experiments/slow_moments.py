"""When live runs had their cores to themselves, by the probes that their ranks took.

A profile is measured in such moments (see ``runtime.core_probe``). So what batches take longer outside of
them is the machine's, and says nothing about the predictor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from experiments.alike import alike
from experiments.live_records import LiveRun
from sim.paced import BOUNDS
from sim.slowed import SlowMoments
from traces.probes import slowness, usual_s
from traces.records import SLOW_PROBE

_FEWEST = 10  # slow batches, to say how much slower they are

FloatArray = NDArray[np.float64]


class Probes:
    """The probes of some live runs of one experiment.

    What is usual is a stage's own, over all runs. Where cores were never quick, probes can't tell that they
    were slow.
    """

    def __init__(self, runs: Sequence[LiveRun], stages: int) -> None:
        self._runs = [_Run(run) for run in runs]
        self._usual_s = [self._usual(stage) for stage in range(stages)]

    def _usual(self, stage: int) -> float:
        taken = [run.probe_s[(run.stage == stage) & (run.probe_s > 0.0)] for run in self._runs]
        return usual_s(np.concatenate(taken)) if taken else 0.0

    def _found(self, place: int, stage: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Of one run and stage: the rows that have a probe in the order of time, and which found it slow."""
        run = self._runs[place]
        rows = run.in_order(stage)
        rows = rows[run.probe_s[rows] > 0.0]
        return rows, np.asarray(run.probe_s[rows] > SLOW_PROBE * self._usual_s[stage])

    @property
    def are_known(self) -> bool:
        """Whether every run has some of every stage."""
        stages = range(len(self._usual_s))
        return all(len(self._found(place, stage)[0]) for place in range(len(self._runs)) for stage in stages)

    def slow_share(self, place: int) -> float | None:
        """Share of one run's probes that found a core slow; None without any."""
        slow = np.concatenate([self._found(place, stage)[1] for stage in range(len(self._usual_s))])
        return float(slow.mean()) if len(slow) else None

    def moments(self, place: int) -> list[SlowMoments]:
        """The probes of one run by stages."""
        result = []
        for stage in range(len(self._usual_s)):
            rows, slow = self._found(place, stage)
            result.append(SlowMoments(self._runs[place].start_s[rows].tolist(), slow.tolist()))
        return result

    def slowness(self, place: int) -> FloatArray:
        """[batches × stages] of one run: see :func:`traces.probes.slowness`."""
        run = self._runs[place]
        result = np.full(len(run.start_s), np.nan)
        for stage in range(len(self._usual_s)):
            rows = run.in_order(stage)
            times_s = run.start_s[rows], run.end_s[rows], run.probe_s[rows]
            result[rows] = slowness(*times_s, self._usual_s[stage])
        return result


class _Run:
    """The columns of a run that are needed here."""

    def __init__(self, run: LiveRun) -> None:
        batches = run.records.batches
        self.start_s: FloatArray = batches["start_s"]
        self.end_s: FloatArray = batches["end_s"]
        self.stage = np.asarray(batches["stage"], dtype=np.int64)
        self.probe_s = np.asarray(run.host.get("probe_s", np.zeros(len(self.start_s))))

    def in_order(self, stage: int) -> NDArray[np.int64]:
        rows = np.flatnonzero(self.stage == stage)
        return np.asarray(rows[np.argsort(self.start_s[rows], kind="stable")])


def slowdowns(
    keys: NDArray[np.int64],
    bound: NDArray[np.int64],
    times_s: tuple[FloatArray, FloatArray],
    slow: FloatArray,
) -> list[float]:
    """How many times as long batches took in slow moments as on cores of their own, by ``BOUNDS``.

    Slow batches are held against like ones: those on own cores say how many times what is predicted such
    batches take, so how well they are predicted cancels out. What few slow batches have like ones is taken
    from all bounds together, and is 1 if those are few, too.

    Args:
        keys: [batches, any]: batches with equal rows are alike.
        bound: of each batch.
        times_s: predicted and measured, positive.
        slow: as of :meth:`Probes.slowness`.
    """
    predicted_s, measured_s = times_s
    # What slow batches would have taken on cores of their own; NaN where there is nothing to say it by.
    own_s = np.full(len(bound), np.nan)
    for _, rows in alike(keys):
        on_own = rows[slow[rows] == 0.0]
        if len(on_own) >= _FEWEST:
            own_s[rows] = predicted_s[rows] * (measured_s[on_own].sum() / predicted_s[on_own].sum())
    held = (slow == 1.0) & ~np.isnan(own_s)

    def slowdown(mine: NDArray[np.bool_], otherwise: float) -> float:
        if mine.sum() < _FEWEST:
            return otherwise
        return max(float(measured_s[mine].sum() / own_s[mine].sum()), 1.0)

    everything = slowdown(held, 1.0)
    return [slowdown(held & (bound == place), everything) for place in range(len(BOUNDS))]
