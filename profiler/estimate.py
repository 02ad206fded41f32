"""What a kernel model answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

SOURCES = ("measured", "imported", "roofline", "assumed")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Times of one kernel over an array of shapes; the three arrays have the same shape.

    `time_s` is never below `floor_s`, the larger of FLOP ÷ peak and bytes ÷ bandwidth with every
    byte counted once. `extrapolated` marks shapes outside what was measured; it is True everywhere
    where nothing was. `source` is one of `SOURCES`. `interval` is what prediction errors were on held-out
    measurements, as log(measured ÷ predicted): the 5th and the 95th percentile; None where nothing is known.
    `kernel` is the measured operator that it comes from, or empty.
    """

    time_s: FloatArray
    floor_s: FloatArray
    extrapolated: BoolArray
    source: str
    interval: tuple[float, float] | None = None
    kernel: str = ""

    def where(self, chosen: BoolArray) -> Estimate:
        """The estimate of some of the shapes: `chosen` is True for those."""
        return replace(
            self,
            time_s=self.time_s[chosen],
            floor_s=self.floor_s[chosen],
            extrapolated=self.extrapolated[chosen],
        )

    @property
    def low_s(self) -> FloatArray | None:
        """The time that 5 % are below, not under the floor."""
        return (
            None
            if self.interval is None
            else np.maximum(self.time_s * np.exp(self.interval[0]), self.floor_s)
        )

    @property
    def high_s(self) -> FloatArray | None:
        """The time that 5 % are above."""
        return (
            None
            if self.interval is None
            else np.maximum(self.time_s * np.exp(self.interval[1]), self.floor_s)
        )


def joined(estimates: Sequence[Estimate]) -> Estimate:
    """Estimates of the same kernel, one after the other."""
    return replace(
        estimates[0],
        time_s=np.concatenate([each.time_s for each in estimates]),
        floor_s=np.concatenate([each.floor_s for each in estimates]),
        extrapolated=np.concatenate([each.extrapolated for each in estimates]),
    )


def broadcast(*values: ArrayLike) -> tuple[FloatArray, ...]:
    """The arguments as float64 arrays of one common shape."""
    return tuple(
        np.ascontiguousarray(array)
        for array in np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in values))
    )
