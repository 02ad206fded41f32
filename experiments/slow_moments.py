"""When a live run had its cores to itself, by the probes that its ranks took (see ``runtime.core_probe``).

A profile is measured in such moments. So batches outside of them say nothing about the predictor, and those
within them nothing about the machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiments.live_records import LiveRun

SLOW = 1.12  # times its usual duration, from which a probe says that somebody else is on the core
_USUAL = 0.01  # quantile of the probes that is usual: they differ by 3 %, or by 70 to 100
_SAME_MOMENT_S = 0.02  # a probe later than this after a batch says nothing of it


def slow_share(run: LiveRun) -> float | None:
    """Share of the probes that found a core slow; None without probes."""
    slow = _slow_probes(run)
    return None if slow is None else float(slow[run.host["probe_s"] > 0.0].mean())


def own_cores(run: LiveRun) -> NDArray[np.bool_]:
    """[batches × stages], as in ``run.records.batches``: whether the last probe of its stage before a batch,
    and the next one unless it came much later, were both quick. All False without probes."""
    batches = run.records.batches
    result = np.zeros(len(batches["start_s"]), dtype=bool)
    slow = _slow_probes(run)
    if slow is None:
        return result
    for stage in np.unique(batches["stage"]).tolist():
        rows = np.flatnonzero(batches["stage"] == stage)
        rows = rows[np.argsort(batches["start_s"][rows], kind="stable")]
        probed = np.flatnonzero(run.host["probe_s"][rows] > 0.0)
        if len(probed) == 0:
            continue
        start_s, end_s = batches["start_s"][rows], batches["end_s"][rows]
        at = np.arange(len(rows))
        following = np.searchsorted(probed, at, side="right")
        before = probed[np.maximum(following - 1, 0)]
        after = probed[np.minimum(following, len(probed) - 1)]
        has_after = (following < len(probed)) & (start_s[after] <= end_s + _SAME_MOMENT_S)
        is_slow = slow[rows]
        result[rows] = (following > 0) & ~is_slow[before] & ~(has_after & is_slow[after])
    return result


def _slow_probes(run: LiveRun) -> NDArray[np.bool_] | None:
    probe_s = run.host.get("probe_s", np.zeros(0))
    taken = probe_s > 0.0
    if not taken.any():
        return None
    return np.asarray(probe_s > SLOW * np.quantile(probe_s[taken], _USUAL))
