"""Sizes at which kernel models are evaluated, so that what lies between may be interpolated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiler.estimate import FloatArray
from profiler.roofline import QUERY_TILE_ROWS

LONGEST_TOKENS = 1 << 25  # grids reach 33M tokens; beyond, the last segment goes on
DENSE_TOKENS = 16384  # token counts up to here have a table entry each


def token_knots(largest: int) -> FloatArray:
    """Token counts at which token-wise operators are evaluated.

    Every one to 512; from there multiples of a kernel's tile and the count just behind each, where another
    tile begins; geometric beyond 16K.
    """
    borders = np.concatenate([np.arange(512, 4096, 64), np.arange(4096, DENSE_TOKENS, 256)])
    beyond = geometric(DENSE_TOKENS, max(largest, DENSE_TOKENS + 1), 4)
    knots = np.unique(np.concatenate([np.arange(1, 512), borders, borders + 1, beyond])).astype(np.float64)
    return np.asarray(knots[: max(int(np.searchsorted(knots, largest)) + 1, 2)])


def chunk_knots(largest: int, group: int) -> FloatArray:
    """Chunks at which attention is evaluated: geometric, and both sides of every border between tiles.

    A tile has 128 rows. Where the ``group`` query heads of a KV head share one, it is full after
    128 ÷ ``group`` tokens, else after 128. One tile more can mean one wave more, at any size that is used.
    """
    packed = np.arange(1, 65) * max(QUERY_TILE_ROWS // group, 1)
    separate = np.arange(1, 65) * QUERY_TILE_ROWS
    borders = np.concatenate([packed, separate])
    knots = np.unique(np.concatenate([geometric(16, max(largest, 32), 4), borders, borders + 1]))
    beyond = int(np.searchsorted(knots, largest)) + 1
    return np.unique(np.concatenate([[1, 2, 4, 8, 12], knots[: max(beyond, 2)]])).astype(np.float64)


def geometric(low: int, high: int, per_octave: int) -> FloatArray:
    """Whole numbers from ``low`` to at least ``high``, ``per_octave`` of them to a doubling."""
    count = int(np.ceil(np.log2(high / low) * per_octave)) + 1
    return np.unique(np.round(low * 2.0 ** (np.arange(count) / per_octave)))


def measured_limits(contexts: FloatArray, outside: NDArray[np.bool_]) -> list[float]:
    """For each row, the largest context that isn't extrapolated: −1 if all are, infinity if none is."""
    limits = []
    for row in outside:
        inside = np.flatnonzero(~row)
        limit = float(contexts[inside[-1]]) if len(inside) else -1.0
        limits.append(limit if row[-1] else float("inf"))
    return limits
