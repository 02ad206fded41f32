"""What the simulator asks of a cost model, besides what policies ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from policies.cost import CostModel
from profiler.decode_run import DecodeRun


class IterationCost(CostModel, Protocol):
    """Times of a replica's stages and links. ``profiler.iteration.IterationModel`` is one."""

    @property
    def stage_layers(self) -> Sequence[int]:
        """Layers of each stage; its length is the number of stages."""
        ...

    @property
    def idle_s(self) -> float:
        """Seconds that the first stage takes longer if the replica had nothing to do before."""
        ...

    def stage_times_s(self, tokens: int, rows: int, requests: int, attention_s: float) -> list[float]:
        """Seconds of each stage; with the hand-overs they add up to the iteration."""
        ...

    def handover_s(self, tokens: int, stage: int) -> float:
        """Seconds to hand the activations of ``tokens`` tokens to ``stage`` from the one before it."""
        ...

    def stage_gap_s(self, tokens: int, requests: int) -> float:
        """Seconds from when a later stage is free until it can begin a batch that is there, of so many tokens
        and requests in one KVP group."""
        ...

    def decode_run(self, decodes: int, total_context: int, steps: int, joint_s: float = 0.0) -> DecodeRun:
        """``steps`` steps of the same decodes, each adding one token to every context; their attention takes
        ``joint_s`` seconds more in each."""
        ...

    def tokens_outside_s(self, tokens: int, rows: int, requests: int) -> float:
        """Of ``tokens_s``, the seconds that lie outside what was measured."""
        ...

    def chunk_is_extrapolated(self, chunk_tokens: int, context_tokens: int) -> bool:
        """Whether a chunk's attention lies outside what was measured."""
        ...

    def decode_is_extrapolated(self, decodes: int, total_context: int) -> bool:
        """Whether the decodes' attention lies outside what was measured."""
        ...
