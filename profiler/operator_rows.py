"""An iteration operator by operator, for people and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profiler.estimate import Estimate, FloatArray


@dataclass(frozen=True, slots=True)
class OperatorRow:
    """One operator's share of an iteration, summed over layers and stages.

    90 % of the times that were held out in training lay between ``low_s`` and ``high_s``; None where nothing
    was measured. Rows of the same ``kernel`` are wrong together.
    """

    name: str
    time_s: float
    floor_s: float
    source: str
    extrapolated: bool
    low_s: float | None = None
    high_s: float | None = None
    kernel: str = ""


def make_row(name: str, estimate: Estimate, times: int) -> OperatorRow:
    """The row of an operator that is called `times` times on the shapes of an estimate, all added up."""
    return OperatorRow(
        name=name,
        time_s=float(estimate.time_s.sum()) * times,
        floor_s=float(estimate.floor_s.sum()) * times,
        source=estimate.source,
        extrapolated=bool(estimate.extrapolated.any()),
        low_s=None if estimate.low_s is None else float(estimate.low_s.sum()) * times,
        high_s=None if estimate.high_s is None else float(estimate.high_s.sum()) * times,
        kernel=estimate.kernel,
    )


def time_outside_s(estimates: Sequence[Estimate]) -> FloatArray:
    """Time of the shapes outside what was measured, added up over operators."""
    parts = [estimate.time_s * estimate.extrapolated for estimate in estimates]
    return np.asarray(np.sum(parts, axis=0), dtype=np.float64)
