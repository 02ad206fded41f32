"""What a configuration can say about scheduling, and the parts that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from policies.chunking import AdaptiveChunks, Chunking, StaticChunks, WholePrompts
from policies.cost import CostModel, PrefillWork
from policies.priorities import LARS, Priority, find_priority


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Everything about scheduling that a configuration can say; docs/configuration.md has the meanings."""

    priority: str = "fcfs"
    chunking: Literal["whole", "static", "adaptive"] = "static"
    chunk_tokens: int = 512
    packing: Literal["decode_first", "prefill_first"] = "decode_first"
    pipeline: Literal["stream", "microbatch"] = "stream"
    max_batch_requests: int = 256
    max_batch_tokens: int = 8192
    max_chunk_tokens: int = 4096
    target_iteration_s: float = 0.05
    space_sharing: bool = False
    lars_normalization: Literal["work", "deadline"] = "work"
    long_request_tokens: int = 262144
    max_yield_fraction: float = 0.4
    max_skips: int = 10
    block_tokens: int = 16
    watermark: float = 0.01
    prefix_caching: bool = False


def make_priority(settings: SchedulerSettings, work: PrefillWork) -> Priority:
    """The priority that ``settings`` names."""
    kind = find_priority(settings.priority)
    if issubclass(kind, LARS):
        return kind(work, settings.lars_normalization)
    return kind(work)


def make_chunking(settings: SchedulerSettings, cost: CostModel) -> Chunking:
    """The chunking that ``settings`` names."""
    if settings.chunking == "whole":
        return WholePrompts(settings.max_batch_tokens)
    if settings.chunking == "static":
        return StaticChunks(settings.chunk_tokens)
    return AdaptiveChunks(
        cost,
        target_s=settings.target_iteration_s,
        max_chunk_tokens=settings.max_chunk_tokens,
        max_batch_tokens=settings.max_batch_tokens,
    )
