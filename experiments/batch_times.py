"""Batch times: what a live run took for each batch, and what is predicted for exactly that batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.config import QuantileTolerance
from experiments.live_records import LiveRun
from policies.batch import Load
from policies.sharding import Sharding, SlowestGroup
from profiler.iteration import IterationModel
from sim.paced import bound_of
from traces.slices import Slice
from traces.stages import StageStarts, stage_starts
from traces.workload import Workload

FloatArray = NDArray[np.float64]

KINDS = ("decode", "mixed", "prefill")
PARTS = ("layers", "head", "host")
"""Of a batch's time: the layers with what they send each other; the LM head and sampling; the host's work."""
BETWEEN = "between stages"
"""What lies before a batch's time in a later stage: handing over, and the host's work between two batches."""
_ROUNDING_S = 1e-9  # a time below it is none


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Relative errors predicted ÷ measured − 1 of ``count`` samples: the median and the 90th percentile of
    their sizes, and ``bias``, Σ predicted ÷ Σ measured − 1."""

    count: int
    p50: float
    p90: float
    bias: float

    @property
    def measured_over_predicted(self) -> float:
        """Σ measured ÷ Σ predicted."""
        return 1.0 / (1.0 + self.bias)

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


@dataclass(frozen=True, slots=True)
class IterationErrors:
    """Errors of batch times over all batches of all stages.

    Attributes:
        total: of all batches together.
        by_kind: by what a batch holds.
        own_cores: of those in moments in which the run had its cores to itself; None without probes.
        kernels: predicted ÷ measured − 1 of the layers and the LM head, all batches together; of those on own
            cores if there are any. None if the live run didn't record it.
        by_part: seconds of each of ``PARTS`` and, in a pipeline, ``BETWEEN``, all batches together, as
            (predicted, measured); without ``PARTS`` if the live run didn't record them.
    """

    total: ErrorSummary | None
    by_kind: Mapping[str, ErrorSummary]
    own_cores: ErrorSummary | None
    kernels: float | None
    by_part: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """One entry for each executed batch and stage.

    Attributes:
        predicted_parts_s, measured_parts_s: [n, 3], by ``PARTS``; what was measured is NaN if the live run
            didn't record it.
        measured_s: of the batch.
        predicted_wait_s, measured_wait_s: before it, since the stage was free and the stage before was
            through with it; 0 in the first stage.
        kind: a place in ``KINDS``.
        bound: what it is bound by, as :func:`sim.paced.bound_of` says.
        stage: that executed it.
        decodes: how many it holds.
        slowness: see :meth:`experiments.slow_moments.Probes.slowness`; NaN until that is looked up.
    """

    predicted_parts_s: FloatArray
    measured_parts_s: FloatArray
    measured_s: FloatArray
    predicted_wait_s: FloatArray
    measured_wait_s: FloatArray
    kind: NDArray[np.int64]
    bound: NDArray[np.int64]
    stage: NDArray[np.int64]
    decodes: NDArray[np.int64]
    slowness: FloatArray

    @property
    def predicted_s(self) -> FloatArray:
        return np.asarray(self.predicted_parts_s.sum(axis=1))

    def errors(self) -> IterationErrors:
        by_kind = {}
        for place, name in enumerate(KINDS):
            mine = self.kind == place
            found = ErrorSummary.of(self.predicted_s[mine], self.measured_s[mine])
            if found is not None:
                by_kind[name] = found
        by_part = {}
        if not np.isnan(self.measured_parts_s).any():
            sums_s = zip(self.predicted_parts_s.sum(axis=0), self.measured_parts_s.sum(axis=0), strict=True)
            by_part = {
                name: (float(one), float(other)) for name, (one, other) in zip(PARTS, sums_s, strict=True)
            }
        if self.stage.any():
            by_part[BETWEEN] = float(self.predicted_wait_s.sum()), float(self.measured_wait_s.sum())
        predicted_s, measured_s = self.predicted_s, self.measured_s
        alone = self.slowness == 0.0
        own_cores = ErrorSummary.of(predicted_s[alone], measured_s[alone])
        kernels = self._kernels(alone if alone.any() else np.ones(len(alone), dtype=bool))
        return IterationErrors(ErrorSummary.of(predicted_s, measured_s), by_kind, own_cores, kernels, by_part)

    def _kernels(self, rows: NDArray[np.bool_]) -> float | None:
        in_them = slice(0, PARTS.index("host"))
        measured_s = float(self.measured_parts_s[rows, in_them].sum())
        if not measured_s > 0.0:  # NaN, too
            return None
        return float(self.predicted_parts_s[rows, in_them].sum()) / measured_s - 1.0

    @staticmethod
    def joined(parts: Sequence[BatchTimes]) -> BatchTimes:
        return BatchTimes(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in BatchTimes.__slots__)
        )


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a batch held; ``ends_prefill`` says of each chunk whether it yields a token."""

    chunks: list[Slice] = field(default_factory=list)
    ends_prefill: list[bool] = field(default_factory=list)
    decodes: list[Slice] = field(default_factory=list)


def batch_shapes(run: LiveRun, workload: Workload) -> list[BatchShape]:
    """The batches of a live run, from batch 0 on."""
    prompts = workload.prompt_tokens.astype(np.int64)
    prompt_tokens: list[int] = prompts.tolist()
    yields = iter(run.slices.yields_token(prompts).tolist())
    shapes = []
    for batch in run.slices.of_batches():
        shape = BatchShape()
        for each in batch:
            request_id, tokens, context, _ = each
            yields_token = next(yields)
            if tokens == 1 and context >= prompt_tokens[request_id] and yields_token:
                shape.decodes.append(each)
            else:
                shape.chunks.append(each)
                shape.ends_prefill.append(yields_token)
        shapes.append(shape)
    return shapes


def batch_times(run: LiveRun, workload: Workload, cost: IterationModel, sharding: Sharding) -> BatchTimes:
    """Predictions for the batches of a live run beside the times they took, stage by stage.

    They are made from what the batches held alone, so they don't depend on decisions being the same today.
    """
    shapes = batch_shapes(run, workload)
    loads = [_group_loads(shape, cost, sharding) for shape in shapes]
    stages_s = np.array([_predict(each, cost) for each in loads])
    stages_s[after_a_pause(run), 0, PARTS.index("layers")] += cost.idle_s
    kinds = [(1 if shape.decodes else 2) if shape.chunks else 0 for shape in shapes]
    bounds = [bound_of(each, cost) for each in loads]
    batches = run.records.batches
    at = batches["batch"]
    measured_s = batches["end_s"] - batches["start_s"]
    starts = stage_starts(batches)
    waits_s = np.zeros((2, len(measured_s)))
    waits_s[0, starts.rows] = _predicted_waits_s(starts, batches, loads, cost)
    waits_s[1, starts.rows] = starts.waited_s
    return BatchTimes(
        predicted_parts_s=stages_s[at, batches["stage"]],
        measured_parts_s=_measured_parts_s(run.host, measured_s),
        measured_s=measured_s,
        predicted_wait_s=waits_s[0],
        measured_wait_s=waits_s[1],
        kind=np.array(kinds, dtype=np.int64)[at],
        bound=np.array(bounds, dtype=np.int64)[at],
        stage=np.asarray(batches["stage"], dtype=np.int64),
        decodes=np.array([len(shape.decodes) for shape in shapes], dtype=np.int64)[at],
        slowness=np.full(len(at), np.nan),
    )


def _predicted_waits_s(
    starts: StageStarts,
    batches: Mapping[str, NDArray[Any]],
    loads: Sequence[Sequence[Load]],
    cost: IterationModel,
) -> FloatArray:
    """Seconds before each batch of a later stage, from when it was formed and sent and the stage was free."""
    handed = []
    rows = starts.rows
    for number, stage in zip(batches["batch"][rows].tolist(), batches["stage"][rows].tolist(), strict=True):
        groups = loads[number]
        tokens = max(load.tokens for load in groups)
        stage_gap_s = max(cost.stage_gap_s(load.tokens, load.requests) for load in groups)
        handed.append((cost.handover_s(tokens, stage), stage_gap_s))
    handover_s, stage_gaps_s = np.array(handed).reshape(-1, 2).T
    ready_s = np.maximum(starts.free_s, starts.formed_s) + stage_gaps_s
    return np.asarray(np.maximum(ready_s, starts.sent_s + handover_s) - starts.possible_s)


def after_a_pause(run: LiveRun) -> NDArray[np.int64]:
    """The batches before which the replica had nothing to do."""
    batches = run.records.batches
    order = np.argsort(batches["batch"], kind="stable")
    number, start_s, end_s = (batches[name][order] for name in ("batch", "start_s", "end_s"))
    first = np.flatnonzero(np.diff(number, prepend=-1))
    formed_s = np.minimum.reduceat(start_s, first)
    over_s = np.maximum.accumulate(np.maximum.reduceat(end_s, first))
    is_after = formed_s > np.concatenate([[0.0], over_s[:-1]]) + _ROUNDING_S
    return np.asarray(number[first][is_after], dtype=np.int64)


def _measured_parts_s(host: Mapping[str, FloatArray], measured_s: FloatArray) -> FloatArray:
    """[n, 3] by ``PARTS``. Whatever isn't execution is the host's, known for what or not."""
    if not host:
        return np.full((len(measured_s), len(PARTS)), np.nan)
    execute_s, sample_s = host["execute_s"], host["sample_s"]
    return np.stack([execute_s, sample_s, measured_s - execute_s - sample_s], axis=1)


def _predict(loads: Sequence[Load], cost: IterationModel) -> list[tuple[float, ...]]:
    """Seconds of each stage, by ``PARTS``: as long as in its slowest KVP group."""
    groups = [_stages_s(cost, load) for load in loads]
    return [max(stage, key=sum) for stage in zip(*groups, strict=True)]


def _group_loads(shape: BatchShape, cost: IterationModel, sharding: Sharding) -> list[Load]:
    """What each KVP group that takes part computes, counted as the scheduler counts it."""
    slowest = SlowestGroup(cost, sharding)
    loads = [Load() for _ in range(sharding.groups)]
    together: list[list[int]] = [[] for _ in loads]  # shards of each decode with several
    for (_, tokens, context, home), ends_prefill in zip(shape.chunks, shape.ends_prefill, strict=True):
        for shard, attention_s in enumerate(slowest.by_shard_s(tokens, context)):
            loads[sharding.group(home, shard)].count_chunk(tokens, ends_prefill and shard == 0, attention_s)
    for _, _, context, home in shape.decodes:
        shards = sharding.shards(context + 1)
        for shard in range(shards):
            group = sharding.group(home, shard)
            loads[group].count_decodes(1, shard == 0, sharding.stored(context, shard), 0.0)
            if shards > 1:
                together[group].append(shards)
    for load, shards_of in zip(loads, together, strict=True):
        slowest.attend(load, shards_of)
    return [load for load in loads if load.requests]


def _stages_s(cost: IterationModel, load: Load) -> list[tuple[float, ...]]:
    """Of one group. The host's work is the first stage's, the LM head the last one's."""
    total_s = cost.stage_times_s(load.tokens, load.rows, load.requests, load.attention_s)
    head_s, host_s = [0.0] * len(total_s), [0.0] * len(total_s)
    head_s[-1] = total_s[-1] - cost.stage_times_s(load.tokens, 0, load.requests, load.attention_s)[-1]
    host_s[0] = cost.host_s(load.tokens, load.requests)
    return [(s - a - b, a, b) for s, a, b in zip(total_s, head_s, host_s, strict=True)]
