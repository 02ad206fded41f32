"""Statistics of a workload, one number a name."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from traces.workload import PrefixBlocks, Workload

_PEAK_BIN_S = 60.0


def describe(workload: Workload) -> dict[str, float]:
    """Return the statistics of a workload; what it has no data for is absent.

    Times (with arrivals): ``span_s`` from the first to the last, ``rate_rps`` rows / span, ``peak_rpm``
    the busiest minute counted from the first arrival, ``interarrival_cv``, ``longest_gap_s``,
    ``distinct_timestamps``. Lengths: ``prompt_tokens_*`` and ``output_tokens_*`` with mean, p50, p90,
    p99 (nearest rank), min, max and total, and ``total_tokens_max``, the longest prompt and output
    together. Prefix blocks: see `describe_prefix`.
    """
    statistics: dict[str, float] = {"rows": len(workload)}
    if len(workload) == 0:
        return statistics
    if workload.arrival_s is not None:
        statistics |= _describe_arrivals(workload.arrival_s)
    for name in ("prompt_tokens", "output_tokens"):
        statistics |= _describe_lengths(name, getattr(workload, name))
    total = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
    statistics["total_tokens_max"] = int(total.max())
    if workload.prefix is not None and len(workload.prefix.ids):
        statistics |= describe_prefix(workload.prefix, workload.prompt_tokens)
    return statistics


def nearest_rank(ordered: NDArray[np.int32], percent: float) -> float:
    """The smallest of the ascending values that at least `percent` of them don't exceed."""
    return float(ordered[max(0, math.ceil(percent / 100.0 * len(ordered)) - 1)])


def _describe_arrivals(arrival_s: NDArray[np.float64]) -> dict[str, float]:
    since_first = arrival_s - arrival_s[0]
    span_s = float(since_first[-1])
    minutes = np.floor(since_first / _PEAK_BIN_S)
    statistics = {
        "span_s": span_s,
        "peak_rpm": int(np.unique(minutes, return_counts=True)[1].max()),
        "distinct_timestamps": len(np.unique(arrival_s)),
    }
    if span_s > 0.0:
        gaps = np.diff(arrival_s)
        statistics["rate_rps"] = len(arrival_s) / span_s
        statistics["interarrival_cv"] = float(gaps.std() / gaps.mean())
        statistics["longest_gap_s"] = float(gaps.max())
    return statistics


def _describe_lengths(name: str, lengths: NDArray[np.int32]) -> dict[str, float]:
    ordered = np.sort(lengths)
    total = int(lengths.sum(dtype=np.int64))
    return {
        f"{name}_mean": total / len(lengths),
        **{f"{name}_p{percent}": nearest_rank(ordered, percent) for percent in (50, 90, 99)},
        f"{name}_min": int(ordered[0]),
        f"{name}_max": int(ordered[-1]),
        f"{name}_total": total,
    }


def describe_prefix(prefix: PrefixBlocks, prompt_tokens: NDArray[np.int32]) -> dict[str, float]:
    """Statistics of prefix blocks and of the hits that an ideal prefix cache would have.

    Ideal: unlimited, requests taken in order, each one's blocks there for all later ones at once. A block
    hits when it and all before it in its request were seen in earlier requests; in a last, partly filled
    block only the tokens that are in it count.
    """
    per_request = np.diff(prefix.offsets)
    row = np.repeat(np.arange(len(prefix)), per_request)
    _, first, inverse = np.unique(prefix.ids, return_index=True, return_inverse=True)
    seen_before = row[first][inverse] < row
    place = np.arange(len(prefix.ids)) - np.repeat(prefix.offsets[:-1], per_request)
    hits = per_request.copy()  # blocks before the first that was not seen: all, if there is none
    np.minimum.at(hits, row[~seen_before], place[~seen_before])
    hit_tokens = np.minimum(hits * prefix.block_tokens, prompt_tokens)
    return {
        "prefix_block_tokens": prefix.block_tokens,
        "prefix_block_references": len(prefix.ids),
        "prefix_distinct_blocks": len(first),
        "prefix_blocks_mean": len(prefix.ids) / len(prefix),
        "prefix_blocks_p50": nearest_rank(np.sort(per_request).astype(np.int32), 50),
        "prefix_blocks_max": int(per_request.max()),
        "prefix_hit_blocks": int(hits.sum()),
        "prefix_hit_blocks_share": float(hits.sum() / len(prefix.ids)),
        "prefix_hit_tokens_share": float(hit_tokens.sum() / prompt_tokens.sum(dtype=np.int64)),
        "prefix_requests_with_hit": int((hits > 0).sum()),
        "prefix_requests_hit_in_every_block": int(((hits == per_request) & (per_request > 0)).sum()),
    }
