"""What a configuration can say about scheduling, and the parts that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    admission: Literal["in_order", "pass_over"] = "in_order"
    prefix_caching: bool = False
    async_scheduling: bool = False


PRESETS: dict[str, dict[str, Any]] = {
    # vLLM's first scheduler of version 1 and what came after it (0.8 to 0.2x): running requests first, then
    # waiting ones in the order of arrival, all within one token budget; the next step is planned while this
    # one runs. Names there: max_num_batched_tokens is chunk_tokens, max_num_seqs is max_batch_requests.
    "vllm-v1": {
        "priority": "fcfs",
        "chunking": "static",
        "chunk_tokens": 2048,
        "packing": "decode_first",
        "max_batch_requests": 256,
        "max_skips": 1,
        "async_scheduling": True,
        "kv": {"block_tokens": 16, "watermark": 0.0, "prefix_caching": True},
    },
}
"""Named settings: what a real engine does, in the keys of a configuration."""


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
