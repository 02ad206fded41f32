"""The rungs of one validation, each with a verdict: what :mod:`experiments.ladder` measures, judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from experiments.batch_times import BatchTimes, IterationErrors, batch_times
from experiments.build import Experiment
from experiments.chance import chance_to_hold
from experiments.config import Speed, ValidateConfig
from experiments.forecasts import Forecasts, forecast
from experiments.ladder import Comparison, OperatorErrors, Simulations, compare_requests, operator_errors
from experiments.live import summarize_live
from experiments.live_records import LiveRun, fingerprint
from experiments.pace import Leftover, leftover, measured_paces
from experiments.run import summarize_run
from experiments.slow_moments import Probes
from experiments.text import percent
from sim.paced import Pace
from sim.replayed import Parity, replay
from traces.records import RunRecords

Status = Literal["holds", "broken", "unknown"]

DECIDING = ("decisions", "request")
HOW: Mapping[Speed, str] = {
    "profile": "as it is",
    "probed": "probed",
    "calibrated": "calibrated",
    "measured": "at pace",
}
_COUNTS = 0.05  # share of the predicted time from which an operator's errors count


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung: whether it holds, and one line that says why."""

    name: str
    status: Status
    text: str


@dataclass(frozen=True, slots=True)
class Ladder:
    """All rungs of one validation, the lowest first, and what they rest on.

    Attributes:
        operators: of the profile that predicts; empty for a roofline.
        iterations: of the batches of all live runs together.
        parities: of each live run.
        comparisons: the table of the requests.
        speed: batch times as measured ÷ as predicted, all of them together.
        paces: of each stage, as its batches had it in all live runs, slow moments included.
        slowdowns: how many times as long batches took in slow moments, by ``BOUNDS``.
        slow_shares: of each live run, the share of its probes that found a core slow; None without probes.
        batch_errors: of each live run, batch times as calibrated on the others ÷ as measured − 1, in the sum;
            empty for a single run.
        chance_to_hold: how often a simulation that is right would be within what is allowed; None if that
            isn't known.
        leftover: what is left of the errors of batch times at pace.
        calibrated: simulations [runs, draws], each run calibrated on the others; empty for a single run.
        at_pace: simulations [runs, draws] at the pace of each live run.
        tolerance: what the rungs were judged by.
    """

    rungs: Sequence[Rung]
    operators: Sequence[OperatorErrors]
    iterations: IterationErrors
    parities: Sequence[Parity]
    comparisons: Sequence[Comparison]
    speed: float
    paces: Sequence[Pace]
    slowdowns: Sequence[float]
    slow_shares: Sequence[float | None]
    batch_errors: Sequence[float]
    chance_to_hold: float | None
    leftover: Leftover | None
    calibrated: Sequence[Sequence[RunRecords]]
    at_pace: Sequence[Sequence[RunRecords]]
    tolerance: ValidateConfig

    @property
    def is_inside(self) -> bool:
        """All that decides is within what is allowed, whether or not live runs differ by too much to say."""
        return not any(each.is_outside for each in self.comparisons)

    @property
    def passes(self) -> bool:
        """The requests hold, and the decisions as far as is known."""
        _, _, decisions, request = self.rungs
        return decisions.status != "broken" and request.status == "holds"


def climb(experiment: Experiment, simulated: dict[str, Any], runs: Sequence[LiveRun]) -> Ladder:
    """Judge a simulation, given by its summary, by the live runs of the same experiment.

    Raises:
        KeyboardInterrupt: Ctrl-C; what a part of a simulation says is no verdict.
    """
    tolerance = experiment.config.validation
    workload, setup = experiment.workload, experiment.setup
    operators = operator_errors(experiment, runs[0])
    parts = [batch_times(run, workload, experiment.iteration, setup.sharding) for run in runs]
    stages = experiment.parallel.spp
    probes = Probes(runs, stages)
    parts = [replace(part, slowness=probes.slowness(place)) for place, part in enumerate(parts)]
    times = BatchTimes.joined(parts)
    iterations = times.errors()
    parities = [replay(workload, with_capacity_of(run, experiment).setup, run.times()) for run in runs]
    same_cost = all(run.cost in ("", fingerprint(setup.cost)) for run in runs)
    speed = iterations.total.measured_over_predicted if iterations.total is not None else 1.0
    paces = measured_paces(times, stages)
    forecasts = forecast(experiment, parts, probes)
    simulations = _summarize(simulated, forecasts, experiment)
    measured = [summarize_live(run.records, experiment) for run in runs]
    comparisons = compare_requests(simulations, measured, tolerance.request)
    rungs = (
        _operator_rung(operators, tolerance),
        _iteration_rung(iterations, tolerance),
        _decision_rung(parities, same_cost),
        _request_rung(comparisons, tolerance.request.most_noise),
    )
    return Ladder(
        rungs=rungs,
        operators=operators,
        iterations=iterations,
        parities=parities,
        comparisons=comparisons,
        speed=speed,
        paces=paces,
        slowdowns=forecasts.slowdowns,
        slow_shares=[probes.slow_share(place) for place in range(len(runs))],
        batch_errors=forecasts.batch_errors,
        chance_to_hold=chance_to_hold(simulations.at_pace, tolerance.request),
        leftover=leftover(times, np.concatenate(forecasts.at_pace_s)),
        calibrated=forecasts.calibrated,
        at_pace=forecasts.at_pace,
        tolerance=tolerance,
    )


def _summarize(simulated: dict[str, Any], forecasts: Forecasts, experiment: Experiment) -> Simulations:
    def summaries(records: Sequence[RunRecords]) -> list[dict[str, Any]]:
        return [summarize_run(each, experiment) for each in records]

    return Simulations(
        as_it_is=simulated,
        probed=summaries(forecasts.probed),
        calibrated=[summaries(draws) for draws in forecasts.calibrated],
        at_pace=[summaries(draws) for draws in forecasts.at_pace],
    )


def with_capacity_of(run: LiveRun, experiment: Experiment) -> Experiment:
    """The experiment with as much KV cache as the live run had: a device's description may change later."""
    tokens = run.records.kv_capacity_blocks * run.records.block_tokens
    return replace(experiment, setup=replace(experiment.setup, kv_capacity_tokens=tokens))


def _operator_rung(operators: Sequence[OperatorErrors], tolerance: ValidateConfig) -> Rung:
    counting = [each for each in operators if each.share >= _COUNTS]
    if not counting:
        return Rung("operator", "unknown", "the predictor was not fitted to measurements")
    outside = [each for each in counting if not each.within(tolerance.operator)]
    if not outside:
        worst = max(counting, key=lambda each: max(-each.low, each.high))
        return Rung("operator", "holds", f"worst is {_operator_text(worst)}")
    return Rung("operator", "broken", "; ".join(_operator_text(each) for each in outside))


def _operator_text(each: OperatorErrors) -> str:
    spread = f"nine in ten within {signed(each.low)} … {signed(each.high)}"
    return f"{each.operator} ({percent(each.share)} of the time): {signed(each.median)}, {spread}"


def _iteration_rung(iterations: IterationErrors, tolerance: ValidateConfig) -> Rung:
    total = iterations.total
    if total is None:
        return Rung("iteration", "unknown", "no batch took time")
    status: Status = "holds" if total.within(tolerance.iteration) else "broken"
    text = f"median error {percent(total.p50)}, p90 {percent(total.p90)}, bias {signed(total.bias)}"
    parts = ", ".join(
        f"{name} {signed(predicted_s / measured_s - 1.0)}"
        for name, (predicted_s, measured_s) in iterations.by_part.items()
        if measured_s > 0.0
    )
    text += f" ({parts})" if parts else ""
    text += f", over {total.count:,} batches"
    own = iterations.own_cores
    if own is not None:
        text += (
            f"; over the {own.count:,} whose cores nobody else was on: median error {percent(own.p50)}, "
            f"p90 {percent(own.p90)}, bias {signed(own.bias)}"
        )
    return Rung("iteration", status, text)


def _decision_rung(parities: Sequence[Parity], same_cost: bool) -> Rung:
    for number, parity in enumerate(parities, start=1):
        if parity.divergence is None:
            continue
        text = f"live run {number}, after {parity.batches:,} equal batches: {parity.divergence.what}"
        if not same_cost:
            return Rung("decisions", "unknown", f"recorded under another cost model than today's; {text}")
        return Rung("decisions", "broken", text)
    batches, tokens = sum(parity.batches for parity in parities), sum(parity.tokens for parity in parities)
    return Rung("decisions", "holds", f"{batches:,} batches, {tokens:,} tokens: the same, token for token")


def _request_rung(comparisons: Sequence[Comparison], most_noise: float) -> Rung:
    deciding = [each for each in comparisons if each.allowed is not None]
    if not deciding:
        return Rung("request", "broken", "there is no latency to compare: no request got that far")
    outside = [each for each in deciding if each.is_outside]
    if outside:
        text = "; ".join(map(_comparison_text, outside))
        return Rung("request", "broken", f"{HOW[outside[0].speed]}: {text}")
    noisy = [each for each in deciding if each.is_noisy]
    if noisy:
        worst = max(noisy, key=lambda each: each.noise or 0.0)
        differ = f"the live runs differ by {percent(worst.noise or 0.0)} in {_name(worst)}"
        return Rung("request", "unknown", f"{differ}; up to {percent(most_noise)} there is a verdict")
    nearest = max(deciding, key=lambda each: abs(each.judged) / (each.allowed or 1.0))
    return Rung(
        "request", "holds", f"{HOW[nearest.speed]}; nearest to its limit: {_comparison_text(nearest)}"
    )


def _comparison_text(each: Comparison) -> str:
    return f"{_name(each)} {signed(each.judged)} (allowed {percent(each.allowed or 0.0)})"


def _name(each: Comparison) -> str:
    return f"{each.metric.removesuffix('_s').upper()} {each.statistic}"


def signed(share: float) -> str:
    """A share as a percentage with its sign."""
    return f"{100 * share:+.1f} %"
