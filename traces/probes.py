"""Whether cores were slow around batches, by the probes that a live run's ranks take before some of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from traces.records import SLOW_PROBE

_USUAL = 0.01  # quantile of the probes that is usual: they differ by 3 %, or by 70 to 100
_SAME_MOMENT_S = 0.02  # a probe later than this after a batch says nothing of it

FloatArray = NDArray[np.float64]


def usual_s(probes_s: Sequence[float] | FloatArray) -> float:
    """What a probe of a stage usually takes, of many; 0 without any."""
    return float(np.quantile(probes_s, _USUAL)) if len(probes_s) else 0.0


def slowness(start_s: FloatArray, end_s: FloatArray, probe_s: FloatArray, usual: float) -> FloatArray:
    """Of batches of one stage in the order of time: 0 if the last probe before a batch, and the next one
    unless it came much later, were both quick; 1 if both were slow; 0.5 if one was; NaN if nothing is known.

    Args:
        probe_s: what a probe just before took; 0 if none was taken.
        usual: what one takes on a core of its own, seconds.
    """
    at = np.flatnonzero(probe_s > 0.0)
    if len(at) == 0:
        return np.full(len(start_s), np.nan)
    slow = (probe_s[at] > SLOW_PROBE * usual).astype(np.float64)
    following = np.searchsorted(at, np.arange(len(start_s)), side="right")
    before = np.maximum(following - 1, 0)
    after = np.minimum(following, len(at) - 1)
    is_near = (following < len(at)) & (start_s[at[after]] - end_s <= _SAME_MOMENT_S)
    both = (slow[before] + slow[np.where(is_near, after, before)]) / 2
    return np.where(following > 0, both, np.nan)
