"""Context parallelism: the tokens of a prompt split over ranks, keys and values going round a ring.

Ring attention (arXiv 2310.01889) gives each rank a contiguous part of the sequence, striped attention
(arXiv 2311.09431) every p-th token, so that the causal mask leaves all ranks the same work. In either, a rank
keeps its queries; the blocks of keys and values move one rank further with every step, the next block on its
way while attention over the present one is computed. A step takes the longer of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from profiler.estimate import BoolArray, Estimate, FloatArray
from profiler.iteration import IterationModel
from profiler.kernels import Kernels
from profiler.shards import ShardTimes
from profiler.work import eager_merge_bytes, kvp_merge_bytes, ring_merge_bytes
from specs import ModelSpec, ParallelSpec
from specs.topology import layout_of


@dataclass(frozen=True, slots=True)
class RingTimes:
    """One layer's attention of chunks on one rank of a ring.

    Attributes:
        attention: over the blocks of all steps, added up.
        merges: of the steps' partial results, added up.
        step_s: seconds that a rank computes in a step after the first, its merge included if it has one.
        transfer: of one block of keys and values to the next rank; there is one for each step but the last.
        waiting_s: seconds that ranks wait for blocks, since a transfer takes longer than a step.
    """

    attention: Estimate
    merges: Estimate
    step_s: FloatArray
    transfer: Estimate
    waiting_s: FloatArray

    @property
    def time_s(self) -> FloatArray:
        return np.asarray(self.attention.time_s + self.merges.time_s + self.waiting_s)


_EAGER_KERNELS = 7  # four over the outputs, three over the log-sum-exps


class Ring:
    """Times of ring and striped attention, one layer at a time.

    Partial results are merged after each step into a sum in fp32, by one kernel (``ring_merge`` step) or by
    the operators of PyTorch one after the other (eager), or all at once when the ring has gone round (end, as
    in arXiv 2411.01783).

    Args:
        parallel: its ``cp`` ranks have ``tp`` GPUs each, which keep to themselves: every GPU sends the keys
            of its own heads to its counterpart, so a ring is as quick as its slowest hop.
        is_inter_node: whether a hop leaves a node; None if the ranks lie side by side.
    """

    def __init__(
        self,
        model: ModelSpec,
        kernels: Kernels,
        parallel: ParallelSpec,
        is_inter_node: bool | None = None,
    ) -> None:
        self._model, self._kernels = model, kernels
        self.ranks = parallel.cp
        self._striped = parallel.ring == "striped"
        self._merging = parallel.ring_merge
        self._heads, self._kv_heads = model.num_heads // parallel.tp, model.num_kv_heads // parallel.tp
        nodes = {rank[0] for rank in layout_of(parallel, kernels.device.gpus_per_node).nodes}
        self.is_inter_node = len(nodes) > 1 if is_inter_node is None else is_inter_node

    def attention(self, chunk: FloatArray, context: FloatArray) -> RingTimes:
        """Of chunks behind ``context`` cached tokens, which are spread over the ranks like the chunk itself.

        Each rank has ``chunk ÷ p`` queries and sees p blocks of ``(context + chunk) ÷ p`` keys. Striped, half
        of the chunk's own keys in every block lie in a query's future; contiguous, the last rank sees whole
        blocks in all steps but its first, and the ring goes at its pace.
        """
        ranks, kernels = self.ranks, self._kernels
        queries, cached = np.maximum(chunk / ranks, 1.0), context / ranks
        heads = self._heads, self._kv_heads, self._model.head_dim
        first = kernels.prefill_attention(queries, cached, *heads)
        later = first if self._striped else kernels.shard_attention(queries, cached + queries, *heads)
        merge, last = self._merge(queries), self._last_merge(queries)
        transfer = kernels.send_recv(self.block_bytes(chunk, context), self.is_inter_node)
        step_s = later.time_s + merge.time_s
        waiting_s = np.zeros_like(step_s)
        if ranks > 1:
            waiting_s = np.maximum(transfer.time_s - first.time_s, 0.0)
            waiting_s = waiting_s + (ranks - 2) * np.maximum(transfer.time_s - step_s, 0.0)
        attention = replace(
            first,
            time_s=first.time_s + (ranks - 1) * later.time_s,
            floor_s=first.floor_s + (ranks - 1) * later.floor_s,
            extrapolated=first.extrapolated | later.extrapolated,
        )
        merges = _times(merge, ranks - 1) if last is None else last
        return RingTimes(attention, merges, step_s, transfer, waiting_s)

    def block_bytes(self, chunk: FloatArray, context: FloatArray) -> FloatArray:
        """Keys and values of one block that a GPU sends on: ``2 · (context + chunk) ÷ p · h_kv · d``."""
        tokens = (context + np.maximum(chunk, self.ranks)) / self.ranks
        return self._kernels.activation_bytes * 2.0 * tokens * self._kv_heads * self._model.head_dim

    def overlap_tokens(self) -> int:
        """Tokens that each rank must hold for attention over a block to take as long as the next block's
        transfer, in a prompt that is prefilled whole; 0 if one does.

        Computing grows with the square of the tokens and the transfer with the tokens, so from there on
        transfers are hidden. At the peak rate F of a device and a link of B bytes/s, with all scores computed
        and as many KV heads as query heads, that is F ÷ B tokens (arXiv 2310.01889, 2 bytes an element).
        """
        if self.ranks == 1:
            return 0
        tokens = np.unique(np.round(2.0 ** np.arange(0, 26, 1 / 16)))
        exposed = np.flatnonzero(self._is_exposed(tokens))
        if len(exposed) == 0:
            return 0
        between = np.arange(tokens[exposed[-1]], tokens[min(exposed[-1] + 1, len(tokens) - 1)] + 1)
        return int(between[np.flatnonzero(self._is_exposed(between))[-1]]) + 1

    def _is_exposed(self, tokens: FloatArray) -> BoolArray:
        """Whether a step is shorter than a transfer where each rank holds ``tokens`` tokens."""
        times = self.attention(tokens * self.ranks, np.zeros_like(tokens))
        return np.asarray(times.transfer.time_s > times.step_s)

    def _merge(self, queries: FloatArray) -> Estimate:
        """A step's partial output and log-sum-exp merged with what there was; nothing if that waits."""
        shape = self._heads, self._model.head_dim, self._kernels.activation_bytes
        if self._merging == "end":
            return _times(self._kernels.elementwise(queries), 0)
        if self._merging == "step":
            moved = ring_merge_bytes(queries, *shape)
            return self._kernels.elementwise(moved, kind="kvp_merge", rows=queries, shards=2)
        moved = eager_merge_bytes(queries, *shape)
        return _times(self._kernels.elementwise(moved / _EAGER_KERNELS, rows=queries), _EAGER_KERNELS)

    def _last_merge(self, queries: FloatArray) -> Estimate | None:
        """The merge of all partial results when the ring has gone round, if they have waited for it."""
        if self._merging != "end":
            return None
        shape = self._heads, self._model.head_dim, self._kernels.activation_bytes
        moved = kvp_merge_bytes(queries, np.full_like(queries, self.ranks), *shape)
        merge = self._kernels.elementwise(moved, kind="kvp_merge", rows=queries, shards=self.ranks)
        return _times(merge, 1 if self.ranks > 1 else 0)


class RingModel(IterationModel):
    """Predicted iteration time of a replica whose ``parallel.cp`` ranks share every prompt.

    All else goes by a rank's share of the tokens. Decodes, too, are dealt out over the ranks, and attend to
    the keys in all of them: partial attention in every rank, merged as between KVP groups.
    """

    def __init__(
        self,
        model: ModelSpec,
        kernels: Kernels,
        parallel: ParallelSpec,
        *,
        is_inter_node: bool | None = None,
        **options: Any,
    ) -> None:
        self.ring = Ring(model, kernels, parallel, is_inter_node)
        self._ring_merges = ShardTimes(model, kernels, parallel, np.array([1.0, 2.0]))
        super().__init__(model, kernels, parallel, **options)
        if is_inter_node is not None:
            self._limits["is_inter_node"] = is_inter_node  # so that a perturbed copy has it as well

    def tokens_s(self, tokens: int, rows: int, requests: int) -> float:
        return super().tokens_s(self._tokens_of_rank(tokens), self._tokens_of_rank(rows), requests)

    def stage_times_s(self, tokens: int, rows: int, requests: int, attention_s: float) -> list[float]:
        mine = self._tokens_of_rank(tokens), self._tokens_of_rank(rows)
        return super().stage_times_s(*mine, requests, attention_s)

    def tokens_outside_s(self, tokens: int, rows: int, requests: int) -> float:
        return super().tokens_outside_s(self._tokens_of_rank(tokens), self._tokens_of_rank(rows), requests)

    @property
    def joint_is_known(self) -> bool:
        """Attention of whole batches was measured on one rank, not on a ring."""
        return False

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a whole prompt of ``tokens`` tokens, by itself, straight from the kernel models."""
        return sum(row.time_s for row in self.explain([(tokens, 0)]))

    def _tokens_of_rank(self, tokens: int) -> int:
        return -(-tokens // self.ring.ranks)

    def _chunk_layers(self, chunk: FloatArray, context: FloatArray) -> tuple[FloatArray, BoolArray]:
        times = self.ring.attention(chunk, context)
        layer_s = times.merges.time_s * self._slower + times.waiting_s
        attention_s = self._within_layers_s(times.attention) + layer_s * self.model.num_layers
        return attention_s, times.attention.extrapolated

    def _decode_layers(self, decodes: FloatArray, total_context: FloatArray) -> tuple[FloatArray, BoolArray]:
        times_s, extrapolated = super()._decode_layers(decodes, self._context_of_rank(decodes, total_context))
        merge_s = sum(estimate.time_s for estimate in self._ring_merges.merge(decodes, self.ring.ranks))
        return times_s + merge_s * self.model.num_layers * self._slower, extrapolated

    def _context_of_rank(self, decodes: FloatArray, total_context: FloatArray) -> FloatArray:
        return np.maximum(total_context / self.ring.ranks, decodes)

    def _attention_operators(
        self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int
    ) -> Iterator[tuple[str, Estimate]]:
        if chunks:
            times = self.ring.attention(*np.array(chunks, dtype=np.float64).T)
            yield "ring attention", times.attention
            yield "ring merge", times.merges
            nothing = np.zeros_like(times.waiting_s)
            yield (
                "ring transfer, not hidden",
                replace(times.transfer, time_s=times.waiting_s, floor_s=nothing),
            )
        if decodes:
            count, total = np.array([float(decodes)]), np.array([float(decode_context)])
            yield "decode attention", self._decode_estimate(count, self._context_of_rank(count, total))
            yield from self._ring_merges.named_merges([(decodes, self.ring.ranks)])


def _times(estimate: Estimate, times: int) -> Estimate:
    return replace(estimate, time_s=estimate.time_s * times, floor_s=estimate.floor_s * times)
