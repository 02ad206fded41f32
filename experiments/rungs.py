"""The rungs of one validation, each with a verdict: what :mod:`experiments.ladder` measures, judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.batch_times import BETWEEN, PARTS, BatchTimes, IterationErrors, batch_times
from experiments.build import Experiment
from experiments.config import ValidateConfig
from experiments.ladder import Comparison, OperatorErrors, compare_requests, operator_errors
from experiments.live import summarize_live
from experiments.live_records import LiveRun, fingerprint
from experiments.pace import measured_paces
from experiments.run import summarize_run
from experiments.text import percent
from sim.paced import Pace, simulate_paced
from sim.replayed import Parity, replay
from traces.records import RunRecords

Status = Literal["holds", "broken", "unknown"]

DECIDING = ("decisions", "request")
_SIMULATIONS = 10  # at the measured pace, each with other draws
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
        paces: of each stage, as its batches had it.
        tolerance: what the rungs were judged by.
    """

    rungs: Sequence[Rung]
    operators: Sequence[OperatorErrors]
    iterations: IterationErrors
    parities: Sequence[Parity]
    comparisons: Sequence[Comparison]
    speed: float
    paces: Sequence[Pace]
    tolerance: ValidateConfig

    @property
    def passes(self) -> bool:
        """The decisions and the requests hold; what is unknown doesn't count against it."""
        return all(rung.status != "broken" for rung in self.rungs if rung.name in DECIDING)

    @property
    def blamed(self) -> Rung | None:
        """The rung to look at if the validation fails, else None.

        Decisions that differ need no other reason. Requests are wrong because iterations are, or what lies
        between stages, unless those hold; and iterations because operators are, unless the time in the layers
        and the LM head is right.
        """
        operator, iteration, decisions, request = self.rungs
        if decisions.status == "broken":
            return decisions
        if request.status != "broken":
            return None
        if iteration.status != "broken":
            return iteration if self._gaps_are_off() else request
        return operator if operator.status == "broken" and self._kernels_are_off() else iteration

    def _gaps_are_off(self) -> bool:
        """Whether what lies between stages is off by a noticeable share of all time."""
        predicted_s, measured_s = self.iterations.by_part.get(BETWEEN, (0.0, 0.0))
        total_s = sum(measured_s for _, measured_s in self.iterations.by_part.values())
        return abs(predicted_s - measured_s) > self.tolerance.iteration.p50 * total_s

    def _kernels_are_off(self) -> bool:
        """Whether kernels take another time, all batches together, than is predicted; yes if unknown."""
        by_part = self.iterations.by_part
        if not all(part in by_part for part in PARTS):
            return True
        (layers_s, live_layers_s), (head_s, live_head_s) = (by_part[part] for part in PARTS[:2])
        measured_s = live_layers_s + live_head_s
        return abs(layers_s + head_s - measured_s) > self.tolerance.iteration.p50 * measured_s


def climb(experiment: Experiment, simulated: dict[str, Any], runs: Sequence[LiveRun]) -> Ladder:
    """Judge a simulation, given by its summary, by the live runs of the same experiment.

    Raises:
        KeyboardInterrupt: Ctrl-C; what a part of a simulation says is no verdict.
    """
    tolerance = experiment.config.validation
    workload, setup = experiment.workload, experiment.setup
    operators = operator_errors(experiment, runs[0])
    parts = [batch_times(run, workload, experiment.iteration, setup.sharding) for run in runs]
    times = BatchTimes.joined(parts)
    iterations = times.errors()
    parities = [replay(workload, with_capacity_of(run, experiment).setup, run.times()) for run in runs]
    same_cost = all(run.cost in ("", fingerprint(setup.cost)) for run in runs)
    speed = iterations.total.measured_over_predicted if iterations.total is not None else 1.0
    paces = measured_paces(times, experiment.parallel.spp)
    at_pace = [
        summarize_run(whole(simulate_paced(workload, setup, paces, seed)), experiment)
        for seed in range(_SIMULATIONS)
    ]
    measured = [summarize_live(run.records, experiment) for run in runs]
    comparisons = compare_requests(simulated, at_pace, measured, tolerance.request)
    rungs = (
        _operator_rung(operators, tolerance),
        _iteration_rung(iterations, tolerance),
        _decision_rung(parities, same_cost),
        _request_rung(comparisons),
    )
    return Ladder(rungs, operators, iterations, parities, comparisons, speed, paces, tolerance)


def whole(records: RunRecords) -> RunRecords:
    """The records of a simulation that came to its end.

    Raises:
        KeyboardInterrupt: it was ended by Ctrl-C.
    """
    if records.interrupted:
        raise KeyboardInterrupt
    return records


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
    return Rung("iteration", status, f"{text}, over {total.count:,} batches")


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


def _request_rung(comparisons: Sequence[Comparison]) -> Rung:
    deciding = [each for each in comparisons if each.allowed is not None]
    if not deciding:
        return Rung("request", "broken", "there is no latency to compare: no request got that far")
    outside = [each for each in deciding if not each.passes]
    shown = outside or [max(deciding, key=lambda each: abs(each.judged) / (each.allowed or 1.0))]
    text = "; ".join(f"{_metric(each.metric)} {each.statistic} {_comparison_text(each)}" for each in shown)
    return Rung(
        "request", "broken" if outside else "holds", text if outside else f"nearest to its limit: {text}"
    )


def _comparison_text(each: Comparison) -> str:
    return f"{signed(each.judged)} (allowed {percent(each.allowed or 0.0)})"


def _metric(name: str) -> str:
    return name.removesuffix("_s").upper()


def signed(share: float) -> str:
    """A share as a percentage with its sign."""
    return f"{100 * share:+.1f} %"
