"""Batch times: what a live run took for each batch, and what is predicted for exactly that batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from experiments.config import QuantileTolerance
from experiments.live_records import LiveRun
from policies.batch import Load
from policies.sharding import Sharding, SlowestGroup
from profiler.iteration import IterationModel
from traces.slices import Slice
from traces.workload import Workload

FloatArray = NDArray[np.float64]

KINDS = ("decode", "mixed", "prefill")
PARTS = ("layers", "head", "host")
"""Of a batch's time: the layers with what they send each other; the LM head and sampling; the host's work."""
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
        by_part: seconds of each of ``PARTS``, all batches together, as (predicted, measured); empty if the
            live run didn't record them.
    """

    total: ErrorSummary | None
    by_kind: Mapping[str, ErrorSummary]
    by_part: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """One entry for each executed batch and stage.

    Attributes:
        predicted_parts_s, measured_parts_s: [n, 3], by ``PARTS``; what was measured is NaN if the live run
            didn't record it.
        measured_s: of the batch.
        kind: a place in ``KINDS``.
        stage: that executed it.
    """

    predicted_parts_s: FloatArray
    measured_parts_s: FloatArray
    measured_s: FloatArray
    kind: NDArray[np.int64]
    stage: NDArray[np.int64]

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
        return IterationErrors(ErrorSummary.of(self.predicted_s, self.measured_s), by_kind, by_part)

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
    stages_s = np.array([_predict(shape, cost, sharding) for shape in shapes])
    stages_s[after_a_pause(run), 0, PARTS.index("layers")] += cost.idle_s
    kinds = [(1 if shape.decodes else 2) if shape.chunks else 0 for shape in shapes]
    batches = run.records.batches
    at = batches["batch"]
    measured_s = batches["end_s"] - batches["start_s"]
    return BatchTimes(
        predicted_parts_s=stages_s[at, batches["stage"]],
        measured_parts_s=_measured_parts_s(run.host, measured_s),
        measured_s=measured_s,
        kind=np.array(kinds, dtype=np.int64)[at],
        stage=np.asarray(batches["stage"], dtype=np.int64),
    )


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


def _predict(shape: BatchShape, cost: IterationModel, sharding: Sharding) -> list[tuple[float, ...]]:
    """Seconds of each stage, by ``PARTS``: as long as in its slowest KVP group. Loads are counted as the
    scheduler counts them."""
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
    groups = []
    for load, shards_of in zip(loads, together, strict=True):
        if load.requests:
            attention_s = load.attention_s + slowest.merge_decodes_s(shards_of)
            if load.num_decodes:
                attention_s += cost.decode_attention_s(load.num_decodes, load.decode_context)
            groups.append(_stages_s(cost, load, attention_s))
    return [max(stage, key=sum) for stage in zip(*groups, strict=True)]


def _stages_s(cost: IterationModel, load: Load, attention_s: float) -> list[tuple[float, ...]]:
    """Of one group. The host's work is the first stage's, the LM head the last one's."""
    total_s = cost.stage_times_s(load.tokens, load.rows, load.requests, attention_s)
    head_s, host_s = [0.0] * len(total_s), [0.0] * len(total_s)
    head_s[-1] = total_s[-1] - cost.stage_times_s(load.tokens, 0, load.requests, attention_s)[-1]
    host_s[0] = cost.host_s(load.tokens, load.requests)
    return [(s - a - b, a, b) for s, a, b in zip(total_s, head_s, host_s, strict=True)]
