"""A simulation on a machine that is slower, or faster, than its profile says, and not always equally so.

What a batch takes is what is predicted, times a factor that batches of its kind had, times what a slow moment
of the machine makes of it if it meets one.

Policies go on deciding by the profile, as they do on such a machine: only what batches really take changes.
That they don't all take the same multiple of it matters by itself: queues grow with the variance of what is
waited for, and the stages of a pipeline wait for each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any

from policies.batch import Batch, Load
from policies.cost import CostModel
from sim.cluster import Cluster, Setup
from sim.replica import Replica
from sim.slowed import Slowness
from traces.records import RunRecords
from traces.workload import Workload

RUN = 50  # batches that follow each other are drawn together, since slow moments last


@dataclass(frozen=True, slots=True)
class Factors:
    """Of batches of one kind, one after the other, how many times what was predicted each took;
    ``predicted_s`` is what that was. ``is_shared`` says that they are of all kinds, for want of their own."""

    values: Sequence[float] = (1.0,)
    predicted_s: Sequence[float] = (1.0,)
    is_shared: bool = False

    @property
    def mean(self) -> float:
        """Of all batches together: Σ taken ÷ Σ predicted."""
        taken_s = sum(v * p for v, p in zip(self.values, self.predicted_s, strict=True))
        return taken_s / sum(self.predicted_s)

    def drawn(self, random: Random) -> Iterator[float]:
        """Factors for batches to come, without end: runs of them, each as likely as what was predicted for it
        is long, so that what batches take together stays about as it was (a weighted block bootstrap)."""
        count = len(self.values)
        length = max(min(RUN, count // 5), 1)
        sums_s = [0.0, *accumulate([*self.predicted_s, *self.predicted_s[:length]])]
        until_s = list(accumulate(sums_s[first + length] - sums_s[first] for first in range(count)))
        while True:
            first = min(bisect_right(until_s, random.random() * until_s[-1]), count - 1)
            for place in range(first, first + length):
                yield self.values[place % count]


_AS_PREDICTED = Factors()


@dataclass(frozen=True, slots=True)
class Pace:
    """How many times what is predicted for it a batch takes in a stage, by what it is bound by; see
    :func:`bound_of`."""

    decode: Factors = _AS_PREDICTED
    linear: Factors = _AS_PREDICTED
    attention: Factors = _AS_PREDICTED
    lone: Factors = _AS_PREDICTED

    def of(self, bound: int) -> Factors:
        """Those of batches of which :func:`bound_of` says so."""
        return (self.decode, self.linear, self.attention, self.lone)[bound]


BOUNDS = ("decode", "linear", "attention", "lone")


def bound_of(loads: Sequence[Load], cost: CostModel) -> int:
    """What a batch is bound by, as a place in ``BOUNDS``: decodes alone, which read weights and KV caches;
    all but attention, in batches with chunks; attention of chunks, if that takes longer in some KVP group; or
    a lone decode, at most one in every KVP group, whose products are of a vector, by another kernel."""
    if not any(load.num_chunks for load in loads):
        return 0 if any(load.num_decodes > 1 for load in loads) else 3
    for load in loads:
        if load.chunk_attention_s > cost.tokens_s(load.tokens, load.rows, load.requests):
            return 2
    return 1


def simulate_paced(
    workload: Workload,
    setup: Setup,
    paces: Sequence[Pace],
    seed: int = 0,
    slowness: Slowness | None = None,
) -> RunRecords:
    """Simulate ``workload`` at a pace for each stage; what lies between stages is as predicted.

    Args:
        paces: of each stage; on cores of its own, if there is a ``slowness``.
        seed: of the draws.
        slowness: of the machine; None has no slow moments.
    """
    if slowness is not None and len(slowness.slowdowns) != len(BOUNDS):
        raise ValueError(f"there are {len(BOUNDS)} slowdowns, not {len(slowness.slowdowns)}")
    replica = partial(_PacedReplica, paces=paces, random=Random(seed), slowness=slowness)
    return Cluster(workload, setup, step_by_step=True, replica=replica).run()


class _PacedReplica(Replica):
    def __init__(
        self,
        *arguments: Any,
        paces: Sequence[Pace],
        random: Random,
        slowness: Slowness | None,
        **options: Any,
    ) -> None:
        self._drawn = [[pace.of(bound).drawn(random) for bound in range(len(BOUNDS))] for pace in paces]
        self._slowness = slowness
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        bound = bound_of(batch.loads, self.cost)
        time_s = next(self._drawn[stage][bound]) * super().stage_s(batch, stage)
        if self._slowness is None:
            return time_s
        return time_s * self._slowness.factor(stage, bound, self.env.now, time_s)
