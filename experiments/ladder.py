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
from collections.abc import Mapping, Sequence
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
class Comparison:
    """One statistic of one latency.

    Attributes:
        live_s: mean over the live runs.
        error: simulated ÷ live − 1.
        error_probed: the same of simulations with the slow moments of each live run, in the mean; None if
            cores weren't probed.
        error_at_pace: the same of simulations at the pace that the batches of the live runs had, in the mean.
        scatter_at_pace: standard deviation of these ÷ their mean: by chance alone, as live runs differ.
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
        return self.error_at_pace if self.speed == "measured" else self.error

    @property
    def is_outside(self) -> bool:
        return self.allowed is not None and abs(self.judged) > self.allowed

    @property
    def passes(self) -> bool:
        return self.allowed is None or not (self.is_outside or self.is_noisy)


def compare_requests(
    simulated: Mapping[str, Any],
    slowed: Sequence[Mapping[str, Any]],
    at_pace: Sequence[Mapping[str, Any]],
    live: Sequence[Mapping[str, Any]],
    tolerance: RequestTolerance,
) -> list[Comparison]:
    """The table of the request rung, from the summaries of the simulation, of simulations with the slow
    moments of each live run (none if they aren't known), of simulations at the measured pace, and of the live
    runs.

    A latency without samples on either side has no rows; with samples on one side only its error is infinite.
    They are judged by the first speed at which all that decide are within what is allowed: as of the profile,
    with slow moments if they were probed, at pace; or else by the last one up to ``tolerance.speed``.
    """
    rows = []
    for metric in METRICS:
        sides = [summary.get(metric) for summary in (simulated, *slowed, *at_pace, *live)]
        if all(side is None for side in sides):
            continue
        for statistic in STATISTICS:
            simulated_s, *others_s = [
                float("nan") if side is None else float(side[statistic]) for side in sides
            ]
            slowed_s, others_s = others_s[: len(slowed)], others_s[len(slowed) :]
            at_pace_s, live_s = others_s[: len(at_pace)], others_s[len(at_pace) :]
            rows.append(_compare(metric, statistic, simulated_s, slowed_s, at_pace_s, live_s, tolerance))
    judged: list[Comparison] = []
    for speed in SPEEDS[: SPEEDS.index(tolerance.speed) + 1]:
        if speed == "probed" and not slowed:
            continue
        judged = [replace(row, speed=speed) for row in rows]
        if not any(row.is_outside for row in judged):
            break
    return judged


def _compare(
    metric: str,
    statistic: str,
    simulated_s: float,
    slowed_s: Sequence[float],
    at_pace_s: Sequence[float],
    live_s: Sequence[float],
    tolerance: RequestTolerance,
) -> Comparison:
    mean_s = float(np.mean(live_s))
    noise = None
    if len(live_s) > 1:
        noise = (max(live_s) - min(live_s)) / mean_s if mean_s > 0 else 0.0
    allowed = None
    if metric in tolerance.metrics and statistic in ("p50", "p90"):
        allowed = max(getattr(tolerance, statistic), tolerance.noise_factor * (noise or 0.0))
    return Comparison(
        metric,
        statistic,
        simulated_s,
        mean_s,
        error=_error(simulated_s, mean_s),
        error_probed=_error(float(np.mean(slowed_s)), mean_s) if slowed_s else None,
        error_at_pace=_error(float(np.mean(at_pace_s)), mean_s),
        scatter_at_pace=float(np.std(at_pace_s) / np.mean(at_pace_s)) if np.mean(at_pace_s) > 0 else 0.0,
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
