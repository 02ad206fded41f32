"""Cost models simple enough to compute by hand."""

from __future__ import annotations

import numpy as np

from profiler.decode_run import DecodeRun, Polyline


class LinearCost:
    """An iteration takes ``base_s + token_s · tokens + pair_s · (chunk · context) + context_s · Σ contexts``.

    Times are split evenly over ``stages``; a hand-over takes ``handover_s``. Merging what KVP groups found
    takes ``merge_s`` a token and group beyond the first. After a pause ``idle_s`` are added. Later stages
    take ``stage_gap_s`` between two batches.
    """

    def __init__(
        self,
        *,
        base_s: float = 0.0,
        token_s: float = 0.0,
        pair_s: float = 0.0,
        context_s: float = 0.0,
        stages: int = 1,
        handover_s: float = 0.0,
        merge_s: float = 0.0,
        idle_s: float = 0.0,
        stage_gap_s: float = 0.0,
    ) -> None:
        self.base_s, self.token_s, self.pair_s, self.context_s = base_s, token_s, pair_s, context_s
        self.stage_layers = (1,) * stages
        self._handover_s = handover_s
        self._merge_s = merge_s
        self._stage_gap_s = stage_gap_s
        self.idle_s = idle_s

    def tokens_s(self, tokens: int, rows: int, requests: int) -> float:
        handovers_s = self._handover_s * (len(self.stage_layers) - 1)
        return self.base_s + self.token_s * tokens + handovers_s

    def chunk_attention_s(self, chunk_tokens: int, context_tokens: int) -> float:
        return self.pair_s * chunk_tokens * context_tokens

    def shard_attention_s(self, chunk_tokens: int, shard_tokens: int) -> float:
        return self.pair_s * chunk_tokens * shard_tokens

    def merge_s(self, tokens: int, shards: int) -> float:
        return self._merge_s * tokens * (shards - 1)

    def decode_attention_s(self, decodes: int, total_context: int) -> float:
        return self.context_s * total_context

    def stage_times_s(self, tokens: int, rows: int, requests: int, attention_s: float) -> list[float]:
        stages = len(self.stage_layers)
        return [(self.base_s + self.token_s * tokens + attention_s) / stages] * stages

    def handover_s(self, tokens: int, stage: int = 1) -> float:
        return self._handover_s

    def stage_gap_s(self, tokens: int, requests: int) -> float:
        return self._stage_gap_s

    def decode_run(self, decodes: int, total_context: int, steps: int, joint_s: float = 0.0) -> DecodeRun:
        line = Polyline(np.array([0.0, 1.0]), np.array([0.0, self.context_s]))
        constant_s = self.tokens_s(decodes, decodes, decodes)
        return DecodeRun(line, constant_s, total_context, decodes, steps, joint_s)

    def tokens_outside_s(self, tokens: int, rows: int, requests: int) -> float:
        return 0.0

    def chunk_is_extrapolated(self, chunk_tokens: int, context_tokens: int) -> bool:
        return False

    def decode_is_extrapolated(self, decodes: int, total_context: int) -> bool:
        return False
