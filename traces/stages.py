"""What lies between the stages of a pipeline, from the records of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StageStarts:
    """How batches came to begin in later stages, one entry for each of them.

    Attributes:
        rows: their places in the table of batches.
        formed_s: when the batch was formed.
        sent_s: when the stage before was through with it.
        free_s: when this stage was through with the batch before; 0 if it is the first.
        start_s: when it began.
    """

    rows: NDArray[np.int64]
    formed_s: FloatArray
    sent_s: FloatArray
    free_s: FloatArray
    start_s: FloatArray

    @property
    def possible_s(self) -> FloatArray:
        """When each could have begun, if handing over and getting ready took no time."""
        return np.maximum(self.sent_s, self.free_s)

    @property
    def waited_s(self) -> FloatArray:
        """How much later each began. It may be negative: ends are as the engine heard of them, which has no
        core of its own, and a beginning is the end less what a rank says it took."""
        return self.start_s - self.possible_s


def stage_starts(batches: Mapping[str, NDArray[Any]]) -> StageStarts:
    """The batches of one replica in stages behind the first, from the columns ``batch``, ``stage``,
    ``start_s`` and ``end_s``. Batches that an interrupted run left in a stage before are left out."""
    number, stage = batches["batch"].astype(np.int64), batches["stage"].astype(np.int64)
    start_s, end_s = batches["start_s"], batches["end_s"]
    count, stages = int(number.max(initial=-1)) + 1, int(stage.max(initial=0)) + 1
    starts_s, ends_s = np.full((2, count, stages), np.nan)
    starts_s[number, stage], ends_s[number, stage] = start_s, end_s
    # Batches go through a stage in their order.
    free_s = np.vstack([np.zeros(stages), np.fmax.accumulate(ends_s, axis=0)[:-1]]) if count else ends_s
    rows = np.flatnonzero(stage > 0)
    rows = rows[~np.isnan(ends_s[number[rows], stage[rows] - 1])]
    at, where = number[rows], stage[rows]
    return StageStarts(
        rows=rows,
        formed_s=starts_s[at, 0],
        sent_s=ends_s[at, where - 1],
        free_s=np.nan_to_num(free_s[at, where]),
        start_s=starts_s[at, where],
    )
