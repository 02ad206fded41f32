"""What is simulated for live runs besides the profile as it is: the machine's speed known more and more.

    probed        when the cores of a run were slow, by its probes; what slow moments do to batches is taken
                  from the other live runs
    calibrated    that, and what batches of the other live runs took on cores of their own: no time that a
                  batch of the run itself took goes into its forecast
    at pace       when its cores were slow, and all that its own batches took

No latency of a request is looked at in any of them. Of a single live run there are no others: what slow
moments do is then taken from itself, and nothing is calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from experiments.batch_times import BatchTimes
from experiments.build import Experiment
from experiments.pace import measured_paces
from experiments.slow_moments import Probes, slowdowns
from sim.paced import BOUNDS, Pace, simulate_paced
from sim.slowed import Slowness
from traces.records import RunRecords

SIMULATIONS = 5  # of each live run, each with other draws

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Simulations, in the order of the live runs.

    Attributes:
        probed: of each run; empty if cores weren't probed.
        calibrated: [runs, draws]; empty for a single run.
        at_pace: [runs, draws].
        slowdowns: how many times as long batches of all runs took in slow moments, by ``BOUNDS``.
        batch_errors: of each run, batch times as calibrated ÷ as measured − 1, in the sum; empty for a single
            run.
        at_pace_s: of each run, what its batches take at its pace in the mean.
    """

    probed: Sequence[RunRecords]
    calibrated: Sequence[Sequence[RunRecords]]
    at_pace: Sequence[Sequence[RunRecords]]
    slowdowns: Sequence[float]
    batch_errors: Sequence[float]
    at_pace_s: Sequence[FloatArray]


def forecast(experiment: Experiment, parts: Sequence[BatchTimes], probes: Probes) -> Forecasts:
    """Simulate each live run.

    Args:
        parts: batches of each.
        probes: of all of them; they count if every run has some of every stage.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    workload, setup = experiment.workload, experiment.setup
    stages = experiment.parallel.spp
    if not probes.are_known:
        parts = [replace(part, slowness=np.full(len(part.stage), np.nan)) for part in parts]
    own = [_speed([part], stages) for part in parts]
    others = []
    if len(parts) > 1:
        others = [_speed([*parts[:place], *parts[place + 1 :]], stages) for place in range(len(parts))]

    def simulated(place: int, speed: _Speed, draw: int = 0) -> RunRecords:
        slowness = Slowness(probes.moments(place), speed.slowdowns) if probes.are_known else None
        seed = place * SIMULATIONS + draw
        return whole(simulate_paced(workload, setup, speed.paces, seed, slowness))

    def drawn(speeds: Sequence[_Speed]) -> list[list[RunRecords]]:
        return [
            [simulated(place, speed, draw) for draw in range(SIMULATIONS)]
            for place, speed in enumerate(speeds)
        ]

    probed = []
    if probes.are_known:
        as_predicted = [replace(speed, paces=[Pace()] * stages) for speed in others or own]
        probed = [simulated(place, speed) for place, speed in enumerate(as_predicted)]
    return Forecasts(
        probed=probed,
        calibrated=drawn(others),
        at_pace=drawn(own),
        slowdowns=_slowdowns(parts),
        batch_errors=[_error(part, speed) for part, speed in zip(parts, others, strict=False)],
        at_pace_s=[_batch_s(part, speed) for part, speed in zip(parts, own, strict=True)],
    )


def whole(records: RunRecords) -> RunRecords:
    """The records of a simulation that came to its end.

    Raises:
        KeyboardInterrupt: it was ended by Ctrl-C.
    """
    if records.interrupted:
        raise KeyboardInterrupt
    return records


@dataclass(frozen=True, slots=True)
class _Speed:
    """What batches of some runs took on cores of their own, and how much longer in slow moments."""

    paces: Sequence[Pace]
    slowdowns: Sequence[float]


def _speed(parts: Sequence[BatchTimes], stages: int) -> _Speed:
    found = _slowdowns(parts)
    on_own = [replace(part, measured_s=part.measured_s / _slower(part, found)) for part in parts]
    return _Speed(measured_paces(BatchTimes.joined(on_own), stages), found)


def _slowdowns(parts: Sequence[BatchTimes]) -> list[float]:
    """Of batches of the same run, stage and bound with as many decodes."""
    times = BatchTimes.joined(parts)
    run = np.concatenate([np.full(len(part.stage), place) for place, part in enumerate(parts)])
    keys = np.stack([run, times.stage, times.bound, times.decodes], axis=1)
    took = (times.predicted_s > 0.0) & (times.measured_s > 0.0)
    times_s = times.predicted_s[took], times.measured_s[took]
    return slowdowns(keys[took], times.bound[took], times_s, times.slowness[took])


def _slower(part: BatchTimes, found: Sequence[float]) -> FloatArray:
    """How many times as long each batch took because of slow moments. A batch of which no probe says anything
    counts as the others do in the mean."""
    known = ~np.isnan(part.slowness)
    mean = float(part.slowness[known].mean()) if known.any() else 0.0
    slow = np.where(known, part.slowness, mean)
    return np.asarray(1.0 + slow * (np.array(found)[part.bound] - 1.0))


def _batch_s(part: BatchTimes, speed: _Speed) -> FloatArray:
    """What each batch takes in the mean."""
    means = np.array([[pace.of(bound).mean for bound in range(len(BOUNDS))] for pace in speed.paces])
    return np.asarray(part.predicted_s * means[part.stage, part.bound] * _slower(part, speed.slowdowns))


def _error(part: BatchTimes, speed: _Speed) -> float:
    """Σ of batch times as forecast ÷ Σ as measured − 1; 0 if they took no time."""
    measured_s = float(part.measured_s.sum())
    return float(_batch_s(part, speed).sum()) / measured_s - 1.0 if measured_s > 0.0 else 0.0
