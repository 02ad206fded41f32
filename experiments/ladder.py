"""The validation ladder: how far the simulator is from a live run, rung by rung.

    operator    a kernel's time, held out of the fit that predicts it
    iteration   a batch's time, as measured live, against the prediction for exactly that batch
    decisions   the batches themselves, with the live run's times fed back into the simulator
    request     TTFT, TPOT, TBT and E2E of the simulation against those of the live runs

The decisions and the requests are what a validation passes or fails by; the two rungs below say where an
error of the requests comes from. Decisions are compared by :mod:`sim.replayed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.batch_times import batch_shapes
from experiments.build import Experiment
from experiments.config import SPEEDS, QuantileTolerance, RequestTolerance, Speed
from experiments.live_records import LiveRun
from profiler.kernels import Wanted, find_profile
from profiler.predictor import load_predictor
from profiler.tables import read_profile

FloatArray = NDArray[np.float64]

METRICS = ("ttft_s", "tpot_s", "tbt_s", "e2e_s")
STATISTICS = ("mean", "p50", "p90", "p99")
_EXPLAINED = 60  # batches that are predicted operator by operator

# -- operators ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OperatorErrors:
    """Held-out errors predicted ÷ measured − 1 of one operator, as its predictor stores them: the median, and
    the range in which nine in ten rows lie; and its ``share`` of the time predicted for what was served."""

    operator: str
    median: float
    low: float
    high: float
    share: float

    def within(self, tolerance: QuantileTolerance) -> bool:
        return abs(self.median) <= tolerance.p50 and max(-self.low, self.high) <= tolerance.p90


def operator_errors(experiment: Experiment, run: LiveRun) -> list[OperatorErrors]:
    """Of the operators that the experiment's predictor learned from a table and that ``run`` needs, the
    largest share first; none for a roofline."""
    config = experiment.config
    if config.predictor.profile is not None:
        profile = read_profile(Path(config.predictor.profile))
    elif config.predictor.source == "roofline":
        return []
    else:
        wanted = Wanted(experiment.model, experiment.parallel.tp, config.dtype.weight, config.dtype.kv)
        found = find_profile(experiment.device, config.predictor.source, wanted=wanted)
        if found is None:
            return []
        profile = found
    dtypes = {config.dtype.weight, config.dtype.kv}
    shares = _shares(experiment, run)
    result = []
    for key, (p05, p50, p95) in load_predictor(profile, experiment.device).residuals.items():
        operator, _, dtype = key.rpartition("_")
        if dtype in dtypes and operator in shares:
            # Stored is log(measured ÷ predicted), so that high and low change places.
            low, median, high = (math.exp(-value) - 1.0 for value in (p95, p50, p05))
            result.append(OperatorErrors(operator, median, low, high, shares[operator]))
    return sorted(result, key=lambda each: -each.share)


def _shares(experiment: Experiment, run: LiveRun) -> dict[str, float]:
    """Each measured operator's share of the time predicted for some of the batches, evenly chosen."""
    shapes = batch_shapes(run, experiment.workload)
    times_s: dict[str, float] = {}
    for place in np.unique(np.linspace(0, len(shapes) - 1, _EXPLAINED).astype(np.int64)).tolist():
        shape = shapes[place]
        chunks = [(tokens, context) for _, tokens, context, _ in shape.chunks]
        decode_context = sum(context for _, _, context, _ in shape.decodes)
        for row in experiment.iteration.explain(chunks, len(shape.decodes), decode_context):
            times_s[row.kernel] = times_s.get(row.kernel, 0.0) + row.time_s
    total_s = sum(times_s.values())
    return {kernel: time_s / total_s for kernel, time_s in times_s.items() if time_s > 0.0}


# -- requests -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Simulations:
    """Summaries of what was simulated for some live runs; see ``experiments.forecasts``.

    Attributes:
        probed: of each run; empty if cores weren't probed.
        calibrated: [runs, draws]; empty for a single run.
        at_pace: [runs, draws].
    """

    as_it_is: Mapping[str, Any]
    probed: Sequence[Mapping[str, Any]]
    calibrated: Sequence[Sequence[Mapping[str, Any]]]
    at_pace: Sequence[Sequence[Mapping[str, Any]]]

    def every(self) -> Iterator[Mapping[str, Any]]:
        """All of them."""
        yield self.as_it_is
        yield from self.probed
        for draws in (*self.calibrated, *self.at_pace):
            yield from draws


@dataclass(frozen=True, slots=True)
class Comparison:
    """One statistic of one latency.

    What is simulated for a live run, with its slow moments or more, is held against that run, and the error
    of the run that is further off counts: calibrated on each other, one is too fast where the other is too
    slow.

    Attributes:
        live_s: mean over the live runs.
        error: simulated as it is ÷ live − 1.
        error_probed: of simulations with the slow moments of each run; None if cores weren't probed.
        error_calibrated: of simulations of each run, calibrated on the others; None for a single run.
        error_at_pace: of simulations at the pace that the batches of each run had.
        scatter_at_pace: standard deviation of those of a run ÷ their mean: by chance alone, as live runs
            differ.
        noise: largest difference between two live runs ÷ their mean; None with a single one.
        allowed: the size of error that passes; None if this statistic decides nothing.
        speed: which of the errors must pass; the same for all of a table.
        is_noisy: the live runs differ by more than a verdict can be based on.
    """

    metric: str
    statistic: str
    simulated_s: float
    live_s: float
    error: float
    error_probed: float | None
    error_calibrated: float | None
    error_at_pace: float
    scatter_at_pace: float
    noise: float | None
    allowed: float | None
    speed: Speed
    is_noisy: bool

    @property
    def judged(self) -> float:
        """The error that must pass."""
        if self.speed == "probed" and self.error_probed is not None:
            return self.error_probed
        if self.speed == "calibrated" and self.error_calibrated is not None:
            return self.error_calibrated
        return self.error_at_pace if self.speed == "measured" else self.error

    @property
    def is_outside(self) -> bool:
        return self.allowed is not None and abs(self.judged) > self.allowed

    @property
    def is_outside_at_pace(self) -> bool:
        """Whether it would be, judged at pace."""
        return self.allowed is not None and abs(self.error_at_pace) > self.allowed

    @property
    def passes(self) -> bool:
        return self.allowed is None or not (self.is_outside or self.is_noisy)


def compare_requests(
    simulations: Simulations, live: Sequence[Mapping[str, Any]], tolerance: RequestTolerance
) -> list[Comparison]:
    """The table of the request rung, from summaries of what was simulated and of the live runs.

    A latency without samples on either side has no rows; with samples on one side only its error is infinite.
    They are judged by the first speed at which all that decide are within what is allowed: as of the profile,
    with slow moments if they were probed, calibrated if there are several live runs, at pace; or else by the
    last one up to ``tolerance.speed``.
    """
    rows = []
    for metric in METRICS:
        sides = (*simulations.every(), *live)
        if all(side.get(metric) is None for side in sides):
            continue
        rows += [_compare(metric, statistic, simulations, live, tolerance) for statistic in STATISTICS]
    judged: list[Comparison] = []
    for speed in SPEEDS[: SPEEDS.index(tolerance.speed) + 1]:
        if (speed == "probed" and not simulations.probed) or (
            speed == "calibrated" and not simulations.calibrated
        ):
            continue
        judged = [replace(row, speed=speed) for row in rows]
        if not any(row.is_outside for row in judged):
            break
    return judged


def _compare(
    metric: str,
    statistic: str,
    simulations: Simulations,
    live: Sequence[Mapping[str, Any]],
    tolerance: RequestTolerance,
) -> Comparison:
    def value_s(summary: Mapping[str, Any]) -> float:
        found = summary.get(metric)
        return float("nan") if found is None else float(found[statistic])

    def values_s(summaries: Sequence[Mapping[str, Any]]) -> FloatArray:
        return np.array([value_s(summary) for summary in summaries])

    live_s = values_s(live)
    mean_s = float(np.mean(live_s))
    noise = None
    if len(live_s) > 1:
        noise = float(np.ptp(live_s)) / mean_s if mean_s > 0 else 0.0
    allowed = None
    if metric in tolerance.metrics and statistic in ("p50", "p90"):
        allowed = max(getattr(tolerance, statistic), tolerance.noise_factor * (noise or 0.0))

    def worst(by_run: Sequence[Sequence[Mapping[str, Any]]]) -> float | None:
        means_s = [float(np.mean(values_s(draws))) for draws in by_run]
        errors = map(_error, means_s, live_s.tolist())
        return max(errors, key=abs, default=None)

    simulated_s = value_s(simulations.as_it_is)
    error_at_pace = worst(simulations.at_pace)
    assert error_at_pace is not None
    at_pace_s = np.array([values_s(draws) for draws in simulations.at_pace])
    scatter_s = math.sqrt(float(np.mean(np.var(at_pace_s, axis=1, ddof=min(at_pace_s.shape[1] - 1, 1)))))
    return Comparison(
        metric,
        statistic,
        simulated_s,
        mean_s,
        error=_error(simulated_s, mean_s),
        error_probed=worst([[each] for each in simulations.probed]),
        error_calibrated=worst(simulations.calibrated),
        error_at_pace=error_at_pace,
        scatter_at_pace=scatter_s / float(np.mean(at_pace_s)) if np.mean(at_pace_s) > 0 else 0.0,
        noise=noise,
        allowed=allowed,
        speed=tolerance.speed,
        is_noisy=allowed is not None and (noise or 0.0) > tolerance.most_noise,
    )


def _error(simulated_s: float, live_s: float) -> float:
    if simulated_s == live_s:
        return 0.0
    error = simulated_s / live_s - 1.0 if live_s > 0 else float("inf")
    return error if error == error else float("inf")  # NaN: one side has no samples
