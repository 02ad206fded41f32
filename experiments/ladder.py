"""The validation ladder (DESIGN.md section 7): how far the simulator is from a live run, rung by rung.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.build import Experiment
from experiments.config import QuantileTolerance, RequestTolerance
from experiments.live_records import LiveRun
from policies.batch import Load
from policies.sharding import Sharding, SlowestGroup
from profiler.iteration import IterationModel
from profiler.kernels import Wanted, find_profile
from profiler.predictor import load_predictor
from profiler.tables import read_profile
from traces.slices import Slice
from traces.workload import Workload

FloatArray = NDArray[np.float64]

METRICS = ("ttft_s", "tpot_s", "tbt_s", "e2e_s")
STATISTICS = ("mean", "p50", "p90", "p99")
KINDS = ("decode", "mixed", "prefill")
_ROUNDING_S = 1e-9  # a time below it is none

# -- errors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Relative errors predicted ÷ measured − 1 of ``count`` samples: the median and the 90th percentile of
    their sizes, and ``bias``, Σ predicted ÷ Σ measured − 1."""

    count: int
    p50: float
    p90: float
    bias: float

    @staticmethod
    def of(predicted_s: FloatArray, measured_s: FloatArray) -> ErrorSummary | None:
        """None without a sample that took time."""
        took = measured_s > _ROUNDING_S
        predicted_s, measured_s = predicted_s[took], measured_s[took]
        if len(measured_s) == 0:
            return None
        size = np.abs(predicted_s / measured_s - 1.0)
        p50, p90 = np.quantile(size, [0.5, 0.9]).tolist()
        return ErrorSummary(len(size), p50, p90, float(predicted_s.sum() / measured_s.sum()) - 1.0)

    def within(self, tolerance: QuantileTolerance) -> bool:
        return self.p50 <= tolerance.p50 and self.p90 <= tolerance.p90


# -- operators ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OperatorErrors:
    """Held-out errors predicted ÷ measured − 1 of one operator, as its predictor stores them: the median, and
    the range in which nine in ten rows lie."""

    operator: str
    median: float
    low: float
    high: float

    def within(self, tolerance: QuantileTolerance) -> bool:
        return abs(self.median) <= tolerance.p50 and max(-self.low, self.high) <= tolerance.p90


def operator_errors(experiment: Experiment) -> list[OperatorErrors]:
    """Of the operators that the experiment's predictor learned from a table; none for a roofline."""
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
    result = []
    for key, (p05, p50, p95) in load_predictor(profile, experiment.device).residuals.items():
        operator, _, dtype = key.rpartition("_")
        if dtype in dtypes:  # stored is log(measured ÷ predicted), so that high and low change places
            result.append(OperatorErrors(operator, *(math.exp(-value) - 1.0 for value in (p50, p95, p05))))
    return result


# -- iterations -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IterationErrors:
    """Errors of batch times by kind of batch, over all batches of all stages, and in all of them together."""

    by_kind: Mapping[str, ErrorSummary]
    total: ErrorSummary | None


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """One entry for each executed batch and stage: what was predicted, what was measured, the kind of batch
    as a place in ``KINDS``."""

    predicted_s: FloatArray
    measured_s: FloatArray
    kind: NDArray[np.int64]

    def errors(self) -> IterationErrors:
        by_kind = {}
        for place, name in enumerate(KINDS):
            mine = self.kind == place
            found = ErrorSummary.of(self.predicted_s[mine], self.measured_s[mine])
            if found is not None:
                by_kind[name] = found
        return IterationErrors(by_kind, ErrorSummary.of(self.predicted_s, self.measured_s))

    @staticmethod
    def joined(parts: Sequence[BatchTimes]) -> BatchTimes:
        return BatchTimes(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in BatchTimes.__slots__)
        )


def batch_times(run: LiveRun, workload: Workload, cost: IterationModel, sharding: Sharding) -> BatchTimes:
    """Predictions for the batches of a live run beside the times they took, stage by stage.

    They are made from what the batches held alone, so they don't depend on decisions being the same today.
    """
    prompts = workload.prompt_tokens.astype(np.int64)
    yields = run.slices.yields_token(prompts).tolist()
    prompt_tokens: list[int] = prompts.tolist()
    stages_s: list[list[float]] = []
    kinds: list[int] = []
    place = 0
    for batch in run.slices.of_batches():
        predicted = _PredictedBatch(cost, sharding)
        for each in batch:
            request_id, tokens, context, _ = each
            if tokens == 1 and context >= prompt_tokens[request_id] and yields[place]:
                predicted.add_decode(each)
            else:
                predicted.add_chunk(each, yields[place])
            place += 1
        stages_s.append(predicted.stages_s())
        kinds.append(0 if predicted.decodes == len(batch) else 1 if predicted.decodes else 2)
    batches = run.records.batches
    at = batches["batch"]
    return BatchTimes(
        predicted_s=np.array(stages_s)[at, batches["stage"]],
        measured_s=batches["end_s"] - batches["start_s"],
        kind=np.array(kinds, dtype=np.int64)[at],
    )


class _PredictedBatch:
    """What each KVP group executes of a batch, counted as the scheduler counts it."""

    def __init__(self, cost: IterationModel, sharding: Sharding) -> None:
        self._cost, self._sharding = cost, sharding
        self._slowest = SlowestGroup(cost, sharding)
        self._loads = [Load() for _ in range(sharding.groups)]
        self._together: list[list[int]] = [[] for _ in self._loads]  # shards of each decode with several
        self.decodes = 0

    def add_chunk(self, chunk: Slice, yields_token: bool) -> None:
        _, tokens, context, home = chunk
        for shard, attention_s in enumerate(self._slowest.by_shard_s(tokens, context)):
            load = self._loads[self._sharding.group(home, shard)]
            load.count_chunk(tokens, yields_token and shard == 0, attention_s)

    def add_decode(self, decode: Slice) -> None:
        _, _, context, home = decode
        self.decodes += 1
        shards = self._sharding.shards(context + 1)
        for shard in range(shards):
            group = self._sharding.group(home, shard)
            self._loads[group].count_decodes(1, shard == 0, self._sharding.stored(context, shard), 0.0)
            if shards > 1:
                self._together[group].append(shards)

    def stages_s(self) -> list[float]:
        """Seconds of each stage: as long as in its slowest group."""
        times_s = []
        for load, shards_of in zip(self._loads, self._together, strict=True):
            if load.requests == 0:
                continue
            attention_s = load.attention_s + self._slowest.merge_decodes_s(shards_of)
            if load.num_decodes:
                attention_s += self._cost.decode_attention_s(load.num_decodes, load.decode_context)
            times_s.append(self._cost.stage_times_s(load.tokens, load.rows, load.requests, attention_s))
        return [max(stage) for stage in zip(*times_s, strict=True)]


# -- requests -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """One statistic of one latency.

    Attributes:
        live_s: mean over the live runs.
        error: simulated ÷ live − 1.
        noise: largest difference between two live runs ÷ their mean; None with a single one.
        allowed: the size of error that passes; None if this statistic decides nothing.
    """

    metric: str
    statistic: str
    simulated_s: float
    live_s: float
    error: float
    noise: float | None
    allowed: float | None

    @property
    def passes(self) -> bool:
        return self.allowed is None or abs(self.error) <= self.allowed


def compare_requests(
    simulated: Mapping[str, Any], live: Sequence[Mapping[str, Any]], tolerance: RequestTolerance
) -> list[Comparison]:
    """The table of the request rung, from the summaries of the simulation and of the live runs.

    A latency without samples on either side has no rows; with samples on one side only its error is infinite.
    """
    rows = []
    for metric in METRICS:
        sides = [summary.get(metric) for summary in (simulated, *live)]
        if all(side is None for side in sides):
            continue
        for statistic in STATISTICS:
            simulated_s, *live_s = [
                float("nan") if side is None else float(side[statistic]) for side in sides
            ]
            rows.append(_compare(metric, statistic, simulated_s, live_s, tolerance))
    return rows


def _compare(
    metric: str, statistic: str, simulated_s: float, live_s: Sequence[float], tolerance: RequestTolerance
) -> Comparison:
    mean_s = float(np.mean(live_s))
    noise = None
    if len(live_s) > 1:
        spread_s = max(live_s) - min(live_s)
        noise = spread_s / mean_s if mean_s > 0 else 0.0
    error = simulated_s / mean_s - 1.0 if mean_s > 0 else float("inf")
    if simulated_s == mean_s:
        error = 0.0
    elif error != error:  # one side has no samples
        error = float("inf")
    allowed = None
    if metric in tolerance.metrics and statistic in ("p50", "p90"):
        allowed = max(getattr(tolerance, statistic), tolerance.noise_factor * (noise or 0.0))
    return Comparison(metric, statistic, simulated_s, mean_s, error, noise, allowed)
