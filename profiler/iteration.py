"""From kernel times to the time of an iteration, in about a microsecond.

Kernel models are vectorised and too slow for an event loop. Here they are evaluated once, on grids, for
one model under one parallelisation; the event loop only interpolates:

- everything that goes by tokens (linear layers, norms, collectives): a table with an entry per token count;
- chunk attention: bilinear in chunk and context;
- decode attention: for each number of decodes a polyline in their total context. On a polyline, the time
  of a run of decode steps is a sum of arithmetic series, which is what lets a simulator take them at once.

Interpolated values are never below the physical floor where the grid's are not: for a fixed batch the floor
is convex in each length, so a chord lies above it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from policies.sharding import Sharding
from profiler.decode_run import DecodeRun, Polyline
from profiler.estimate import BoolArray, Estimate
from profiler.joint import JointTable
from profiler.kernels import Kernels
from profiler.knots import (
    DENSE_TOKENS,
    LONGEST_TOKENS,
    chunk_knots,
    geometric,
    measured_limits,
    token_knots,
)
from profiler.layer_parts import (
    between_operators,
    collectives,
    first_operators,
    row_operators,
    token_operators,
)
from profiler.operator_rows import OperatorRow, make_row, time_outside_s
from profiler.overheads import HostOverhead, ServingOverhead
from profiler.shards import ShardTimes
from specs import ModelSpec, ParallelSpec
from specs.topology import layout_of

FloatArray = NDArray[np.float64]


__all__ = ["HostOverhead", "IterationModel", "OperatorRow"]


class IterationModel:
    """Predicted iteration time of one replica; implements ``policies.cost.CostModel``.

    With KV-cache parallelism, of one of its groups, and ``policies.sharding.ShardedCostModel`` as well.

    Args:
        model: what is served.
        kernels: kernel times of the device.
        parallel: how the model is split.
        max_batch_tokens: tokens an iteration may hold, for the size of the tables.
        max_batch_requests: requests an iteration may hold.
        max_chunk_tokens: the longest chunk, for the grid.
        host: host overhead per iteration; None takes what was measured with the kernels, if it was.
        graph_tokens: token counts that CUDA graphs were made for; a batch that fits into one takes as long as
            the smallest that holds it, attention aside.

    Attributes:
        stage_layers: layers of each stage.
        host_is_unknown: nobody has said what the host takes, so it counts as nothing.
        serving: what iterations take in a running engine beyond that and their operators.
        idle_s: what one takes more than ``tokens_s`` says if there was nothing to do before it.
        stage_gap: what a later stage does between two batches; nothing if ``host`` is given.
    """

    def __init__(
        self,
        model: ModelSpec,
        kernels: Kernels,
        parallel: ParallelSpec,
        *,
        max_batch_tokens: int = 8192,
        max_batch_requests: int = 256,
        max_chunk_tokens: int = 8192,
        host: HostOverhead | None = None,
        graph_tokens: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.kernels = kernels
        self.parallel = parallel
        self.host = host or kernels.host or HostOverhead()
        self.host_is_unknown = host is None and kernels.host is None
        self.serving = kernels.serving or ServingOverhead()
        self.idle_s = self.serving.after_a_pause_s(parallel)
        self._slower = 1.0 + self.serving.share_of(parallel)  # than operators timed by themselves
        self.stage_gap = (kernels.stage_gap if host is None else None) or HostOverhead()
        self._limits = {
            "max_batch_tokens": max_batch_tokens,
            "max_batch_requests": max_batch_requests,
            "max_chunk_tokens": max_chunk_tokens,
        }
        self._graph_tokens = tuple(sorted(graph_tokens))
        self.stage_layers = parallel.layers_of_stage(model)
        self._heads = model.num_heads // parallel.tp
        self._kv_heads = model.num_kv_heads // parallel.tp
        layout = layout_of(parallel, kernels.device.gpus_per_node)
        # For each stage, whether what it is handed comes from another node; the first is handed nothing.
        self._handed_between_nodes = [False, *(layout.crosses(stage) for stage in range(1, parallel.spp))]
        self._compile_tokens(max(max_batch_tokens, max_chunk_tokens))
        self._compile_rows(max_batch_requests)
        self._compile_chunks(max_chunk_tokens)
        self._compile_decodes(max_batch_requests)
        heads = self._heads, self._kv_heads, model.head_dim
        self._joint = JointTable(kernels, heads, model.num_layers, max_chunk_tokens, max_batch_requests)
        self._ranks = parallel.gpus_per_replica
        self._compile_overheads(max_batch_requests)
        self._sharding = Sharding(parallel.kvp, parallel.kvp_tokens_per_group)
        self._shards = ShardTimes(model, kernels, parallel, np.array(self._chunk_knots, dtype=np.float64))

    # -- the cost model ---------------------------------------------------------------------------------

    def tokens_s(self, tokens: int, rows: int, requests: int) -> float:
        """Seconds of all but attention, over all layers and stages: see ``CostModel.tokens_s``."""
        by_tokens = self._tokens_table[tokens] if tokens < self._dense else self._tokens_line.at(tokens)
        by_rows = self._rows_table[rows] if rows < len(self._rows_table) else self._rows_line.at(rows)
        return by_tokens + by_rows + self._overhead_s(tokens, requests)

    def chunk_attention_s(self, chunk_tokens: int, context_tokens: int) -> float:
        """Seconds of attention of one chunk, over all layers."""
        i = bisect_right(self._inner_chunks, chunk_tokens)
        j = bisect_right(self._inner_contexts, context_tokens)
        low, high = self._chunk_rows[i], self._chunk_rows[i + 1]
        u = (context_tokens - self._context_knots[j]) * self._context_scales[j]
        v = (chunk_tokens - self._chunk_knots[i]) * self._chunk_scales[i]
        at_low = low[j] + u * (low[j + 1] - low[j])
        at_high = high[j] + u * (high[j + 1] - high[j])
        return at_low + v * (at_high - at_low)

    def decode_attention_s(self, decodes: int, total_context: int) -> float:
        """Seconds of attention of the decodes, over all layers."""
        line = self._decode_lines.get(decodes) or self._decode_line(decodes)
        return line.at(total_context)

    @property
    def joint_is_known(self) -> bool:
        """Whether attention of whole batches was measured, not only of their parts."""
        return self._joint.is_known

    def joint_attention_s(self, chunk_tokens: int, decodes: int, total_context: int, spread: float) -> float:
        """Seconds of attention of all layers beyond the sum of chunks and decodes; see ``JointAttention``."""
        return self._joint.at(chunk_tokens, decodes, total_context, spread) * self._slower

    def shard_attention_s(self, chunk_tokens: int, shard_tokens: int) -> float:
        """Seconds of attention of a chunk over a shard with none of its own keys, over all layers."""
        share = 0.0 if self.kernels.layer is None else self.kernels.layer.share
        return self._shards.attention_s(chunk_tokens, shard_tokens) * (1.0 + share) * self._slower

    def merge_s(self, tokens: int, shards: int) -> float:
        """Seconds to merge the partial attention of ``tokens`` tokens over ``shards`` groups, all layers."""
        return self._shards.merge_s(tokens, shards) * self._slower

    def perturbed(self, factors: Mapping[str, float]) -> IterationModel:
        """The same with every operator's times multiplied by its factor; see ``Kernels.perturbed``."""
        kernels = self.kernels.perturbed(factors)
        host = None if self.host_is_unknown else self.host
        graphs = self._graph_tokens
        other = type(self)(self.model, kernels, self.parallel, host=host, graph_tokens=graphs, **self._limits)
        other.stage_gap = self.stage_gap
        return other

    def with_host(self, host: HostOverhead) -> IterationModel:
        """The same with another host."""
        other = copy(self)
        other.host, other.host_is_unknown, other.stage_gap = host, False, HostOverhead()
        other._compile_overheads(len(self._overhead_table) - 1)
        return other

    # -- what a simulator asks besides ------------------------------------------------------------------

    def decode_run(self, decodes: int, total_context: int, steps: int, joint_s: float = 0.0) -> DecodeRun:
        """``steps`` steps of the same decodes, every context one token longer each step; attention takes
        ``joint_s`` seconds more in each."""
        line = self._decode_lines.get(decodes) or self._decode_line(decodes)
        constant_s = self.tokens_s(decodes, decodes, decodes)
        return DecodeRun(line, constant_s, total_context, decodes, steps, joint_s)

    def stage_times_s(self, tokens: int, rows: int, requests: int, attention_s: float) -> list[float]:
        """Seconds of each stage for a batch; their sum is the iteration's, hand-overs not included.

        The embedding belongs to the first stage with the host's work, the LM head to the last; all layers
        cost the same.
        """
        by_tokens = self._layers_s(tokens) + attention_s
        layers = self.model.num_layers
        if self.kernels.serving is not None:
            by_tokens += self.serving_s(tokens, requests)
        times = [by_tokens * count / layers for count in self.stage_layers]
        times[0] += self.host_s(tokens, requests)
        times[-1] += self._rows_table[rows] if rows < len(self._rows_table) else self._rows_line.at(rows)
        return times

    def handover_s(self, tokens: int, stage: int) -> float:
        """Seconds to hand the activations of ``tokens`` tokens to ``stage`` from the one before it."""
        return self._handover_lines[self._handed_between_nodes[stage]].at(tokens) + self.host.stage_s

    def stage_gap_s(self, tokens: int, requests: int) -> float:
        """Seconds from when a later stage is free until it can begin a batch that is there."""
        return self.stage_gap.batch_s(tokens, requests)

    @property
    def handovers_host_s(self) -> float:
        """Seconds of the host's work in all hand-overs of an iteration."""
        return self.host.stage_s * (self.parallel.spp - 1)

    def tokens_outside_s(self, tokens: int, rows: int, requests: int) -> float:
        """Of ``tokens_s``, the seconds of operators outside what was measured: extrapolated, or without any
        table, or a host's work that is assumed."""
        dense = tokens < self._dense
        found = self._tokens_outside[tokens] if dense else self._tokens_outside_line.at(tokens)
        found += self._rows_outside[min(rows, len(self._rows_outside) - 1)]
        if self.host.source == "assumed":
            found += self.host_s(tokens, requests) + self.handovers_host_s
        return found

    def host_s(self, tokens: int, requests: int) -> float:
        """Seconds of the host's work in an iteration: one of more tokens than requests has a chunk."""
        known = requests < len(self._host_table)
        decodes_s = self._host_table[requests] if known else self.host.decodes_s(requests, self._ranks)
        if tokens <= requests:
            return decodes_s
        return decodes_s + self.host.prefill_s + (tokens - requests) * self.host.per_prefill_token_s

    def serving_s(self, tokens: int, requests: int) -> float:
        """Seconds that an iteration takes in a running engine beyond the host's work and its operators, their
        share not counted: that is in their times."""
        return self.serving.at(requests, self.parallel, has_chunk=tokens > requests)

    def chunk_is_extrapolated(self, chunk_tokens: int, context_tokens: int) -> bool:
        """Whether a chunk's attention lies outside what was measured."""
        i = min(bisect_right(self._chunk_knots, chunk_tokens) - 1, len(self._chunk_limits) - 1)
        return context_tokens > self._chunk_limits[i]

    def decode_is_extrapolated(self, decodes: int, total_context: int) -> bool:
        """Whether the decodes' attention lies outside what was measured."""
        i = min(bisect_right(self._decode_knots, decodes) - 1, len(self._decode_limits) - 1)
        return total_context > self._decode_limits[i] * decodes

    @property
    def source(self) -> str:
        """Sources of the operators, the weakest last: ``imported+roofline``, say."""
        found = {row.source for row in self.explain([(512, 1024)], 8, 8192) if row.time_s > 0}
        return "+".join(name for name in ("measured", "imported", "roofline", "assumed") if name in found)

    def explain(
        self, chunks: Sequence[tuple[int, int]], decodes: int = 0, decode_context: int = 0
    ) -> list[OperatorRow]:
        """One iteration, operator by operator, straight from the kernel models.

        Args:
            chunks: (tokens, context before them) of each prefill chunk.
            decodes: number of decodes.
            decode_context: sum of their contexts, tokens.
        """
        tokens = self._tokens_of_rank(sum(chunk for chunk, _ in chunks) + decodes)
        rows = self._tokens_of_rank(len(chunks) + decodes)
        layers = self.model.num_layers
        result = [
            make_row(name, estimate, layers)
            for name, estimate in self._token_operators(np.array([float(tokens)]))
        ]
        attention = list(self._attention_operators(chunks, decodes, decode_context))
        result.extend(make_row(name, estimate, layers) for name, estimate in attention)
        if chunks and decodes and self.joint_is_known:
            chunk_tokens = sum(chunk for chunk, _ in chunks)
            joint_s = self._joint.at(chunk_tokens, decodes, decode_context, 0.0)
            result.append(OperatorRow("mixed attention", joint_s, 0.0, attention[0][1].source, False))
        # What goes between ranks lies not between operators of one.
        within = [row.time_s for row in result if not row.name.startswith(("kvp", "ring transfer"))]
        parts_s = sum(within) / layers
        if (beyond := between_operators(self.kernels, np.array([parts_s]))) is not None:
            result.append(make_row("between operators", beyond, layers))
        result.extend(make_row(n, e, layers) for n, e in self._collectives(np.array([float(tokens)])))
        first = first_operators(self.model, self.kernels, np.array([float(tokens)]))
        result.extend(make_row(name, estimate, 1) for name, estimate in first)
        result.extend(make_row(name, e, 1) for name, e in self._row_operators(np.array([float(rows)])))
        # What of a transfer isn't hidden doesn't grow with the kernels' times.
        operators_s = sum(row.time_s for row in result if not row.name.startswith("ring transfer"))
        for between_nodes, handovers in self._handovers():
            name = "stage hand-over between nodes" if between_nodes else "stage hand-over"
            result.append(make_row(name, self._handover(np.array([float(tokens)]), between_nodes), handovers))
        requests = len(chunks) + decodes
        host_s = self.host_s(sum(chunk for chunk, _ in chunks) + decodes, requests)
        result.append(OperatorRow("host overhead", host_s, 0.0, self.host.source, False))
        if self.handovers_host_s:
            result.append(
                OperatorRow("host, hand-overs", self.handovers_host_s, 0.0, self.host.source, False)
            )
        if self.kernels.serving is not None:
            serving_s = self.serving.at(requests, self.parallel, has_chunk=bool(chunks))
            serving_s += operators_s * self.serving.share_of(self.parallel)
            result.append(OperatorRow("serving overhead", serving_s, 0.0, "measured", False))
        return result

    # -- work, for utilisation --------------------------------------------------------------------------

    def flops(self, tokens: int, rows: int, attention_pairs: int) -> float:
        """Useful FLOP of the whole replica: ``attention_pairs`` pairs of a query and a key."""
        model = self.model
        attention = 4.0 * attention_pairs * model.num_heads * model.head_dim * model.num_layers
        return model.linear_flops_per_token() * tokens + model.lm_head_flops_per_row() * rows + attention

    # -- operators --------------------------------------------------------------------------------------

    def _tokens_of_rank(self, tokens: int) -> int:
        """Of so many tokens of an iteration, those that pass through one rank's layers."""
        return tokens

    def _token_operators(self, tokens: FloatArray) -> list[tuple[str, Estimate]]:
        """Operators of one layer on one GPU that depend on the number of tokens alone; no collectives."""
        return token_operators(self.model, self.kernels, self.parallel.tp, tokens)

    def _collectives(self, tokens: FloatArray) -> list[tuple[str, Estimate]]:
        return collectives(self.model, self.kernels, self.parallel.tp, tokens)

    def _token_layer_s(self, tokens: FloatArray) -> FloatArray:
        """Seconds of one layer but for attention."""
        parts_s = np.sum([estimate.time_s for _, estimate in self._token_operators(tokens)], axis=0)
        beyond = between_operators(self.kernels, parts_s)
        together_s = parts_s if beyond is None else parts_s + beyond.time_s
        return np.asarray(together_s + sum(e.time_s for _, e in self._collectives(tokens)))

    def _within_layers_s(self, estimate: Estimate) -> FloatArray:
        """Attention's seconds in all layers: a little more than by itself, where that was measured."""
        share = 0.0 if self.kernels.layer is None else self.kernels.layer.share
        layer_s = np.maximum(estimate.time_s * (1.0 + share), estimate.floor_s)
        return np.asarray(layer_s * self.model.num_layers * self._slower)

    def _attention_operators(
        self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int
    ) -> Iterator[tuple[str, Estimate]]:
        """Attention of one layer, of several KVP groups in the slowest one: for each chunk, and for the
        decodes, which count as equally long."""
        sharding, shards = self._sharding, self._shards
        merges: list[tuple[int, int]] = []  # tokens, and the groups that share them
        if chunks:
            size, context = np.array(chunks, dtype=np.float64).T
            shard = np.minimum(context // sharding.tokens_per_group, sharding.groups - 1)
            own = self._chunk_estimate(size, context - shard * sharding.tokens_per_group)
            other = shards.attention(size, np.full_like(size, sharding.tokens_per_group))
            in_other = (shard > 0) & (other.time_s > own.time_s)
            if not in_other.all():
                yield "prefill attention", own.where(~in_other)
            if in_other.any():
                yield "shard attention", other.where(in_other)
            merges += [
                (tokens, int(last) + 1) for (tokens, _), last in zip(chunks, shard, strict=True) if last
            ]
        if decodes:
            mean = decode_context // decodes
            last = sharding.shards(mean + 1) - 1
            stored = max(sharding.stored(mean, shard) for shard in range(last + 1))
            in_group = decode_context if last == 0 else decodes * stored
            estimate = self._decode_estimate(np.array([float(decodes)]), np.array([float(in_group)]))
            yield "decode attention", estimate
            if last > 0:
                merges.append((decodes, last + 1))
        yield from shards.named_merges(merges)

    def _row_operators(self, rows: FloatArray) -> list[tuple[str, Estimate]]:
        return row_operators(self.model, self.kernels, self.parallel.tp, rows)

    def _handover(self, tokens: FloatArray, between_nodes: bool) -> Estimate:
        num_bytes = self.kernels.activation_bytes * tokens * self.model.hidden_size / self.parallel.tp
        return self.kernels.send_recv(num_bytes, inter_node=between_nodes)

    def _handovers(self) -> list[tuple[bool, int]]:
        """(whether between nodes, how many) of the hand-overs from stage to stage."""
        borders = self._handed_between_nodes[1:]
        return [(kind, borders.count(kind)) for kind in (False, True) if kind in borders]

    def _chunk_estimate(self, chunk: FloatArray, context: FloatArray) -> Estimate:
        return self.kernels.prefill_attention(
            chunk, context, self._heads, self._kv_heads, self.model.head_dim
        )

    def _decode_estimate(self, decodes: FloatArray, total_context: FloatArray) -> Estimate:
        return self.kernels.decode_attention(
            decodes, total_context, self._heads, self._kv_heads, self.model.head_dim
        )

    def _chunk_layers(self, chunk: FloatArray, context: FloatArray) -> tuple[FloatArray, BoolArray]:
        """Seconds of a chunk's attention in all layers, and whether that is extrapolated."""
        estimate = self._chunk_estimate(chunk, context)
        return self._within_layers_s(estimate), estimate.extrapolated

    def _decode_layers(self, decodes: FloatArray, total_context: FloatArray) -> tuple[FloatArray, BoolArray]:
        """The same of decodes."""
        estimate = self._decode_estimate(decodes, total_context)
        return self._within_layers_s(estimate), estimate.extrapolated

    def _overhead_s(self, tokens: int, requests: int) -> float:
        """Seconds of what an iteration takes beyond its operators: the host, hand-overs, a running engine."""
        if requests < len(self._overhead_table):
            decodes_s = self._overhead_table[requests]
        else:
            decodes_s = self._decodes_overhead_s(requests)
        if tokens <= requests:
            return decodes_s
        return decodes_s + self._chunk_overhead_s + (tokens - requests) * self.host.per_prefill_token_s

    def _decodes_overhead_s(self, requests: int) -> float:
        host_s = self.host.decodes_s(requests, self._ranks) + self.handovers_host_s
        return host_s + self.serving.at(requests, self.parallel, has_chunk=False)

    # -- grids ------------------------------------------------------------------------------------------

    def _compile_tokens(self, max_tokens: int) -> None:
        knots = token_knots(max(max_tokens, 2))
        layer_s = self._token_layer_s(knots)
        first_s = np.sum([e.time_s for _, e in first_operators(self.model, self.kernels, knots)], axis=0)
        if not self.kernels.steps_may_fall:
            layer_s = np.maximum.accumulate(layer_s)
        layers_s = (layer_s * self.model.num_layers + np.maximum.accumulate(first_s)) * self._slower
        handover_s = [np.maximum.accumulate(self._handover(knots, kind).time_s) for kind in (False, True)]
        self._handover_lines = [Polyline(knots, each) for each in handover_s]
        handovers_s = np.zeros_like(knots)
        for kind, count in self._handovers():
            handovers_s = handovers_s + handover_s[kind] * count
        self._layers_line = Polyline(knots, layers_s)
        self._tokens_line = Polyline(knots, layers_s + handovers_s)
        dense = np.arange(min(int(knots[-1]), DENSE_TOKENS) + 1, dtype=np.float64)
        dense_s = np.interp(self._padded(dense), knots, layers_s)
        self._layers_table: list[float] = dense_s.tolist()
        self._tokens_table: list[float] = (dense_s + np.interp(dense, knots, handovers_s)).tolist()
        self._dense = len(self._tokens_table)
        operators = [*self._token_operators(knots), *self._collectives(knots)]
        outside_s = time_outside_s([estimate for _, estimate in operators]) * self.model.num_layers
        outside_s += time_outside_s([each for _, each in first_operators(self.model, self.kernels, knots)])
        outside_s *= self._slower
        for kind, count in self._handovers():
            outside_s += time_outside_s([self._handover(knots, kind)]) * count
        self._tokens_outside_line = Polyline(knots, outside_s)
        self._tokens_outside: list[float] = np.interp(dense, knots, outside_s).tolist()

    def _padded(self, tokens: FloatArray) -> FloatArray:
        """The tokens that are computed: those of the smallest CUDA graph that holds a batch, if one does."""
        if not self._graph_tokens:
            return tokens
        sizes = np.array(self._graph_tokens, dtype=np.float64)
        place = np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)
        return np.where((tokens > sizes[-1]) | (tokens == 0), tokens, sizes[place])

    def _compile_overheads(self, max_requests: int) -> None:
        self._chunk_overhead_s = self.host.prefill_s + self.serving.prefill_s
        self._host_table = [self.host.decodes_s(n, self._ranks) for n in range(max_requests + 1)]
        self._overhead_table = [self._decodes_overhead_s(n) for n in range(max_requests + 1)]

    def _compile_rows(self, max_rows: int) -> None:
        knots = token_knots(max(max_rows, 2))
        rows_s = np.sum([e.time_s for _, e in self._row_operators(knots)], axis=0)
        if not self.kernels.steps_may_fall:
            rows_s = np.maximum.accumulate(rows_s)
        rows_s = rows_s * self._slower
        self._rows_line = Polyline(knots, rows_s)
        dense = np.arange(max(max_rows, 2) + 1, dtype=np.float64)
        table: list[float] = np.interp(dense, knots, rows_s).tolist()
        table[0] = 0.0  # no row, no LM head
        self._rows_table = table
        outside_s = time_outside_s([estimate for _, estimate in self._row_operators(knots)]) * self._slower
        self._rows_outside: list[float] = np.interp(dense, knots, outside_s).tolist()
        self._rows_outside[0] = 0.0

    def _compile_chunks(self, max_chunk: int) -> None:
        chunks = chunk_knots(max_chunk, self._heads // self._kv_heads)
        contexts = np.concatenate([[0.0], geometric(32, LONGEST_TOKENS, 3)])
        sizes, behind = (a.ravel() for a in np.meshgrid(chunks, contexts, indexing="ij"))
        times_s, extrapolated = self._chunk_layers(sizes, behind)
        times = times_s.reshape(len(chunks), len(contexts))
        times = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
        self._chunk_knots: list[int] = chunks.astype(int).tolist()
        self._context_knots: list[int] = contexts.astype(int).tolist()
        self._inner_chunks = self._chunk_knots[1:-1]  # a bisection among these is the segment's index
        self._inner_contexts = self._context_knots[1:-1]
        self._chunk_scales: list[float] = (1.0 / np.diff(chunks)).tolist()
        self._context_scales: list[float] = (1.0 / np.diff(contexts)).tolist()
        self._chunk_rows: list[list[float]] = times.tolist()
        self._chunk_limits = measured_limits(contexts, extrapolated.reshape(times.shape))

    def _compile_decodes(self, max_decodes: int) -> None:
        batches = np.unique(np.concatenate([[1, 2, 3, 4, 6], geometric(8, max(max_decodes, 16), 2)]))
        contexts = geometric(1, LONGEST_TOKENS, 4)  # mean context of a decode
        batch, mean = (a.ravel() for a in np.meshgrid(batches, contexts, indexing="ij"))
        times_s, extrapolated = self._decode_layers(batch, batch * mean)
        times = times_s.reshape(len(batches), len(contexts))
        self._decode_grid = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
        self._decode_knots: list[int] = batches.astype(int).tolist()
        self._mean_contexts = contexts
        self._decode_limits = measured_limits(contexts, extrapolated.reshape(times.shape))
        self._decode_lines: dict[int, Polyline] = {}

    def _decode_line(self, decodes: int) -> Polyline:
        """Attention time of ``decodes`` decodes against their total context; kept once made."""
        i = min(bisect_right(self._decode_knots, decodes) - 1, len(self._decode_knots) - 2)
        low, high = self._decode_knots[i], self._decode_knots[i + 1]
        share = (decodes - low) / (high - low)
        times = self._decode_grid[i] + share * (self._decode_grid[i + 1] - self._decode_grid[i])
        line = self._decode_lines[decodes] = Polyline(self._mean_contexts * decodes, times)
        return line

    def _layers_s(self, tokens: int) -> float:
        return self._layers_table[tokens] if tokens < self._dense else self._layers_line.at(tokens)
