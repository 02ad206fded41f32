"""A simulation on a machine that has slow moments, at the times at which a live run had them.

A core that somebody else is on takes longer for everything, for 50 ms to some seconds. Probes that have
nothing to do with what is served say when (see ``runtime.core_probe``); how much longer batches then take,
against those on cores of their own, is a property of the machine. What batches take on cores of their own
stays as predicted.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

from policies.batch import Batch
from sim.cluster import Cluster, Setup
from sim.paced import BOUNDS, bound_of
from sim.replica import Replica
from traces.records import RunRecords
from traces.workload import Workload

NEAR_S = 0.1  # a probe says something of the moments so far from it: slow ones last as long or longer


@dataclass(frozen=True, slots=True)
class SlowMoments:
    """Probes of a stage's cores in the order of time: when, and whether each found one slow."""

    at_s: Sequence[float] = ()
    is_slow: Sequence[bool] = ()
    _slow_until: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_slow_until", [0, *accumulate(map(int, self.is_slow))])

    def share(self, start_s: float, end_s: float) -> float:
        """Share of the probes that found a core slow: of those in that time, the one before and the one after
        it, as far as they are near. Without any it is that of all; 0 if there are none."""
        first, last = bisect_left(self.at_s, start_s), bisect_right(self.at_s, end_s)
        if first > 0 and start_s - self.at_s[first - 1] <= NEAR_S:
            first -= 1
        if last < len(self.at_s) and self.at_s[last] - end_s <= NEAR_S:
            last += 1
        if last <= first:
            first, last = 0, len(self.at_s)
        return (self._slow_until[last] - self._slow_until[first]) / max(last - first, 1)


def simulate_slowed(
    workload: Workload, setup: Setup, moments: Sequence[SlowMoments], slowdowns: Sequence[float]
) -> RunRecords:
    """Simulate ``workload`` with slow moments; policies go on deciding by the profile.

    Args:
        moments: of each stage.
        slowdowns: by :func:`sim.paced.bound_of`: how many times as long a batch takes that is all in one.
    """
    if len(slowdowns) != len(BOUNDS):
        raise ValueError(f"there are {len(BOUNDS)} slowdowns, not {len(slowdowns)}")
    replica = partial(_SlowedReplica, moments=moments, slowdowns=slowdowns)
    return Cluster(workload, setup, step_by_step=True, replica=replica).run()


class _SlowedReplica(Replica):
    def __init__(
        self, *arguments: Any, moments: Sequence[SlowMoments], slowdowns: Sequence[float], **options: Any
    ) -> None:
        self._moments, self._slowdowns = moments, slowdowns
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        time_s, now_s = super().stage_s(batch, stage), self.env.now
        share = self._moments[stage].share(now_s, now_s + time_s)
        return time_s * (1.0 + share * (self._slowdowns[bound_of(batch.loads, self.cost)] - 1.0))
