"""A machine's slow moments, at the times at which a live run had them.

A core that somebody else is on takes longer for everything, for 50 ms to some seconds. Probes that have
nothing to do with what is served say when (see ``runtime.core_probe``); how much longer batches then take,
against those on cores of their own, is a property of the machine. All stages and all kinds of batches meet
the same moments.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

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


@dataclass(frozen=True, slots=True)
class Slowness:
    """When the cores of each stage were slow, and what that does to batches.

    Attributes:
        moments: of each stage.
        slowdowns: by ``sim.paced.BOUNDS``: how many times as long a batch takes that is all in a slow moment.
    """

    moments: Sequence[SlowMoments]
    slowdowns: Sequence[float]

    def factor(self, stage: int, bound: int, start_s: float, time_s: float) -> float:
        """How many times as long a batch takes that began at ``start_s`` and takes ``time_s`` on cores of its
        own."""
        share = self.moments[stage].share(start_s, start_s + time_s)
        return 1.0 + share * (self.slowdowns[bound] - 1.0)
