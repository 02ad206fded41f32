"""What KVP groups that work together on a request take: attention over a shard, and the merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from profiler.decode_run import Polyline
from profiler.estimate import Estimate, FloatArray, joined
from profiler.kernels import Kernels
from profiler.work import LSE_BYTES, kvp_merge_bytes
from specs import ModelSpec, ParallelSpec
from specs.topology import layout_of


class ShardTimes:
    """Times of one group over all layers, interpolated between chunks; a line is made when first asked for.

    Args:
        chunks: knots, tokens.
    """

    def __init__(
        self, model: ModelSpec, kernels: Kernels, parallel: ParallelSpec, chunks: FloatArray
    ) -> None:
        self._model, self._kernels, self._chunks = model, kernels, chunks
        self._heads = model.num_heads // parallel.tp
        self._kv_heads = model.num_kv_heads // parallel.tp
        self._layout = layout_of(parallel, kernels.device.gpus_per_node)
        self._attention: dict[int, Polyline] = {}
        self._merges: dict[int, Polyline] = {}

    def attention_s(self, chunk_tokens: int, shard_tokens: int) -> float:
        """Seconds of a chunk's attention over a shard of ``shard_tokens`` keys, none of them its own."""
        line = self._attention.get(shard_tokens)
        if line is None:
            estimate = self.attention(self._chunks, np.full_like(self._chunks, shard_tokens))
            line = self._attention[shard_tokens] = self._line(estimate.time_s)
        return line.at(chunk_tokens)

    def merge_s(self, tokens: int, shards: int) -> float:
        """Seconds to exchange and merge the partial attention of ``tokens`` tokens over ``shards`` groups."""
        line = self._merges.get(shards)
        if line is None:
            times = sum(estimate.time_s for estimate in self.merge(self._chunks, shards))
            line = self._merges[shards] = self._line(np.asarray(times))
        return line.at(tokens)

    def attention(self, chunk: FloatArray, shard_tokens: FloatArray) -> Estimate:
        """One layer's attention over a shard."""
        return self._kernels.shard_attention(
            chunk, shard_tokens, self._heads, self._kv_heads, self._model.head_dim
        )

    def merge(self, tokens: FloatArray, shards: int) -> tuple[Estimate, Estimate]:
        """One layer's exchange of outputs and log-sum-exps between ``shards`` groups, and their sum.

        Each group receives those of all the others: (h_q · d) elements and a log-sum-exp a head for every
        token (arXiv 2409.17264); those from other nodes over the links between nodes, and those from its own
        beside them. The group with the most others elsewhere is the last.
        """
        head_dim, element = self._model.head_dim, self._kernels.activation_bytes
        sent = tokens * self._heads * (head_dim * element + LSE_BYTES)
        elsewhere = self._layout.farthest(shards)
        if elsewhere:
            exchange = self._kernels.send_recv(sent * elsewhere, inter_node=True)
        else:
            exchange = self._kernels.all_gather(sent, shards)
        moved = kvp_merge_bytes(tokens, np.full_like(tokens, shards), self._heads, head_dim, element)
        return exchange, self._kernels.elementwise(moved, kind="kvp_merge", rows=tokens, shards=shards)

    def named_merges(self, merges: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Estimate]]:
        """The same by name, of several (tokens, shards)."""
        pairs = [self.merge(np.array([float(tokens)]), shards) for tokens, shards in merges]
        if pairs:
            yield "kvp exchange", joined([exchange for exchange, _ in pairs])
            yield "kvp merge", joined([merge for _, merge in pairs])

    def _line(self, layer_s: FloatArray) -> Polyline:
        return Polyline(self._chunks, np.maximum.accumulate(layer_s) * self._model.num_layers)
