"""What is simulated for live runs besides the profile as it is: the machine's speed known more and more.

    probed        when the cores of a run were slow, by its probes, and what slow moments do to batches
    calibrated    that, and what batches of the other live runs took on cores of their own: nothing that a
                  batch of the run itself took goes into its forecast
    at pace       that, and what batches of the run itself took

No latency of a request is looked at in any of them.
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
from sim.paced import Pace, simulate_paced
from sim.slowed import Slowness
from traces.records import RunRecords

SIMULATIONS = 5  # of each live run, each with other draws

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Simulations, in the order of the live runs.

    Attributes:
        probed: one of each run; empty if cores weren't probed.
        calibrated: [runs, draws]; empty for a single run.
        at_pace: [runs, draws].
        slowdowns: how many times as long batches of all runs took in slow moments, by ``BOUNDS``.
        batch_errors: of each run, batch times as calibrated ÷ as measured − 1, in the sum; empty for a single
            run.
    """

    probed: Sequence[RunRecords]
    calibrated: Sequence[Sequence[RunRecords]]
    at_pace: Sequence[Sequence[RunRecords]]
    slowdowns: Sequence[float]
    batch_errors: Sequence[float]


def forecast(experiment: Experiment, parts: Sequence[BatchTimes], probes: Probes) -> Forecasts:
    """Simulate each live run.

    Args:
        parts: batches of each.
        probes: of all of them.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    workload, setup = experiment.workload, experiment.setup
    stages = experiment.parallel.spp
    count = len(parts)
    slower = _slowdowns(parts)

    def slowness(place: int, found: Sequence[float]) -> Slowness | None:
        return Slowness(probes.moments(place), found) if probes.are_known else None

    def simulated(place: int, speed: _Speed) -> list[RunRecords]:
        slow = slowness(place, speed.slowdowns)
        return [
            whole(simulate_paced(workload, setup, speed.paces, seed, slow)) for seed in range(SIMULATIONS)
        ]

    probed = []
    if probes.are_known:
        as_predicted = [Pace()] * stages
        probed = [
            whole(simulate_paced(workload, setup, as_predicted, slowness=slowness(place, slower)))
            for place in range(count)
        ]
    own = [_speed([part], stages) for part in parts]
    others = []
    if count > 1:
        others = [_speed([*parts[:place], *parts[place + 1 :]], stages) for place in range(count)]
    return Forecasts(
        probed=probed,
        calibrated=[simulated(place, speed) for place, speed in enumerate(others)],
        at_pace=[simulated(place, speed) for place, speed in enumerate(own)],
        slowdowns=slower,
        batch_errors=[_batch_error(parts[place], speed) for place, speed in enumerate(others)],
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


def _batch_error(part: BatchTimes, speed: _Speed) -> float:
    """Σ of batch times as forecast ÷ Σ as measured − 1; 0 if they took no time."""
    means = np.array([[pace.decode.mean, pace.linear.mean, pace.attention.mean] for pace in speed.paces])
    forecast_s = part.predicted_s * means[part.stage, part.bound] * _slower(part, speed.slowdowns)
    measured_s = float(part.measured_s.sum())
    return float(forecast_s.sum()) / measured_s - 1.0 if measured_s > 0.0 else 0.0
