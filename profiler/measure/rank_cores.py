"""Whether the cores of an engine's ranks ran at their usual speed around a batch, by the probes they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.records import SLOW_PROBE

_USUAL = 0.01  # quantile of a stage's probes that is usual
_PROBES = 4000  # the latest, of which that is taken
_SAME_MOMENT_S = 0.02  # a probe later than this after a batch says nothing of it


class RankCores:
    """Remembers the probes of every run of an engine, by stage: what is usual is known after a few."""

    def __init__(self) -> None:
        self._probes_s: dict[int, list[float]] = {}

    def are_quiet(
        self, batches: Mapping[str, NDArray[Any]], host: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.bool_]:
        """For each row of the tables of batches and of the host's times, whether in every stage of its batch
        the last probe before it and the next one, unless it came much later, were as quick as usual."""
        is_slow = np.zeros(len(batches["batch"]), dtype=bool)
        for stage in np.unique(batches["stage"]):
            rows = np.flatnonzero(batches["stage"] == stage)
            rows = rows[np.argsort(batches["start_s"][rows], kind="stable")]
            taken_s = host["probe_s"][rows]
            at = np.flatnonzero(taken_s > 0.0)
            known_s = self._probes_s.setdefault(int(stage), [])
            known_s.extend(taken_s[at].tolist())
            del known_s[: len(known_s) - _PROBES]
            if len(at) == 0:
                continue
            slow = taken_s[at] > SLOW_PROBE * float(np.quantile(known_s, _USUAL))
            following = np.searchsorted(at, np.arange(len(rows)), side="right")
            before = slow[np.maximum(following - 1, 0)]
            after = np.minimum(following, len(at) - 1)
            late_s = batches["start_s"][rows[at[after]]] - batches["end_s"][rows]
            is_slow[rows] = before | (slow[after] & (late_s <= _SAME_MOMENT_S))
        slow_batches = np.bincount(batches["batch"], is_slow) > 0
        return np.asarray(~slow_batches[batches["batch"]])
