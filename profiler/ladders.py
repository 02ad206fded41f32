"""Interpolation in tables of kernel times that have rows of one size, each over another size."""

from __future__ import annotations

import numpy as np

from profiler.estimate import FloatArray


class Curve:
    """Times against one size, linear between measured sizes: where a kernel for more is quicker, they fall.

    Below the smallest size the time is that of the smallest; beyond the largest it goes on as from half of
    the largest to there.
    """

    def __init__(self, size: FloatArray, time_s: FloatArray) -> None:
        self.size, where = np.unique(size, return_inverse=True)
        sums = np.bincount(where, weights=time_s)
        mean_s = sums / np.bincount(where)
        self.time_s: FloatArray = mean_s
        last = float(self.size[-1])
        half_s = float(np.interp(last / 2.0, self.size, self.time_s))
        reach = last - max(last / 2.0, float(self.size[0]))
        self._slope = max(float(self.time_s[-1]) - half_s, 0.0) / reach if reach > 0 else 0.0

    @property
    def largest(self) -> float:
        """The largest size that was measured."""
        return float(self.size[-1])

    def at(self, size: FloatArray) -> FloatArray:
        """Seconds at each size."""
        inside = np.interp(size, self.size, self.time_s)
        return np.asarray(inside + np.maximum(size - self.size[-1], 0.0) * self._slope)


class Ladder:
    """Curves of several heights (chunk sizes, numbers of decodes), linear between neighbours.

    Args:
        height, size, time_s: equally long columns. A height with a single size is left out if others have
            more.
    """

    def __init__(self, height: FloatArray, size: FloatArray, time_s: FloatArray) -> None:
        found = {}
        for each in np.unique(height):
            mine = height == each
            found[float(each)] = Curve(size[mine], time_s[mine])
        most = max(len(curve.size) for curve in found.values())
        kept = {each: curve for each, curve in found.items() if len(curve.size) > 1 or most == 1}
        self.heights = np.array(list(kept))
        self.curves = list(kept.values())

    @property
    def highest(self) -> float:
        """The largest height that was measured."""
        return float(self.heights[-1])

    @property
    def largest(self) -> float:
        """The largest size that was measured at any height."""
        return max(curve.largest for curve in self.curves)

    def at(self, height: FloatArray, size: FloatArray) -> FloatArray:
        """Seconds; beyond the highest rung in proportion to the height, below the lowest as there."""
        flat, wide = np.broadcast_arrays(height, size)
        heights, sizes = flat.ravel(), wide.ravel()
        inside = np.clip(heights, self.heights[0], self.heights[-1])
        lower = np.clip(np.searchsorted(self.heights, inside, side="right") - 1, 0, len(self.heights) - 1)
        upper = np.minimum(lower + 1, len(self.heights) - 1)
        low_s, high_s = np.empty(len(sizes)), np.empty(len(sizes))
        for rung, curve in enumerate(self.curves):
            for side, out in ((lower, low_s), (upper, high_s)):
                if (mine := side == rung).any():
                    out[mine] = curve.at(sizes[mine])
        gap = np.maximum(self.heights[upper] - self.heights[lower], 1e-30)
        share = (inside - self.heights[lower]) / gap
        time_s = low_s + share * (high_s - low_s)
        time_s = time_s * np.maximum(heights / self.heights[-1], 1.0)
        return np.asarray(time_s.reshape(flat.shape))
