"""Whether the cores of an engine's ranks ran at their usual speed around a batch, by the probes they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.probes import slowness, usual_s

_PROBES = 4000  # of each stage, the latest, of which is taken what is usual


class RankCores:
    """Remembers the probes of every run of an engine, by stage: what is usual is known after a few."""

    def __init__(self) -> None:
        self._probes_s: dict[int, list[float]] = {}

    def are_quiet(
        self, batches: Mapping[str, NDArray[Any]], host: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.bool_]:
        """For each row of the tables of batches and of the host's times, whether no probe beside its batch
        was slow in any stage; see :func:`traces.probes.slowness`."""
        is_slow = np.zeros(len(batches["batch"]), dtype=bool)
        for stage in np.unique(batches["stage"]):
            rows = np.flatnonzero(batches["stage"] == stage)
            rows = rows[np.argsort(batches["start_s"][rows], kind="stable")]
            probe_s = host["probe_s"][rows]
            known_s = self._probes_s.setdefault(int(stage), [])
            known_s.extend(probe_s[probe_s > 0.0].tolist())
            del known_s[: len(known_s) - _PROBES]
            times_s = batches["start_s"][rows], batches["end_s"][rows], probe_s
            is_slow[rows] = np.nan_to_num(slowness(*times_s, usual_s(known_s))) > 0.0
        slow_batches = np.bincount(batches["batch"], is_slow) > 0
        return np.asarray(~slow_batches[batches["batch"]])
