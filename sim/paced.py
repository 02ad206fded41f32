"""A simulation on a machine that is slower, or faster, than its profile says, and not always equally so.

Policies go on deciding by the profile, as they do on such a machine: only what batches really take changes.
That they don't all take the same multiple of it matters by itself: queues grow with the variance of what is
waited for, and the stages of a pipeline wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from policies.batch import Batch, Load
from policies.cost import CostModel
from sim.cluster import Cluster, Setup
from sim.replica import Replica
from traces.records import RunRecords
from traces.workload import Workload

RUN = 50  # batches that follow each other are drawn together, since slow moments last


@dataclass(frozen=True, slots=True)
class Factors:
    """Of batches of one kind, one after the other, how many times what was predicted each took;
    ``predicted_s`` is what that was."""

    values: Sequence[float] = (1.0,)
    predicted_s: Sequence[float] = (1.0,)

    @property
    def mean(self) -> float:
        """Of all batches together: Σ taken ÷ Σ predicted."""
        taken_s = sum(v * p for v, p in zip(self.values, self.predicted_s, strict=True))
        return taken_s / sum(self.predicted_s)

    def quantile(self, share: float) -> float:
        """The factor below which ``share`` of the batches lie."""
        return sorted(self.values)[min(int(share * len(self.values)), len(self.values) - 1)]

    def drawn(self, random: Random) -> Iterator[float]:
        """Factors for batches to come, without end: runs of them from random places (a block bootstrap). All
        are scaled alike, so that what batches take together stays as it was."""
        count = len(self.values)
        scale = self.mean / (sum(self.values) / count)
        while True:
            first = random.randrange(count)
            for place in range(first, first + min(RUN, count)):
                yield scale * self.values[place % count]


_AS_PREDICTED = Factors()


@dataclass(frozen=True, slots=True)
class Pace:
    """How many times what is predicted for it a batch takes in a stage, by the work it is (see
    :func:`work_of`): decodes alone, chunks behind a short context, chunks behind a long one."""

    decode: Factors = _AS_PREDICTED
    short: Factors = _AS_PREDICTED
    long: Factors = _AS_PREDICTED

    @property
    def kinds(self) -> tuple[Factors, ...]:
        """By the number that :func:`work_of` gives."""
        return self.decode, self.short, self.long


def work_of(loads: Sequence[Load], cost: CostModel) -> int:
    """What a batch is bound by, on a device as in a cache: 0, decodes alone, which read; 1, chunks whose
    attention takes less than all else, which multiply by weights; 2, chunks whose attention takes more."""
    if not any(load.num_chunks for load in loads):
        return 0
    for load in loads:
        chunks_s = load.attention_s - load.decode_attention_s
        if load.num_chunks and chunks_s > cost.tokens_s(load.tokens, load.rows, load.requests):
            return 2
    return 1


def simulate_paced(workload: Workload, setup: Setup, paces: Sequence[Pace], seed: int = 0) -> RunRecords:
    """Simulate ``workload`` at a pace for each stage; what lies between stages is as predicted."""
    replica = partial(_PacedReplica, paces=paces, random=Random(seed))
    return Cluster(workload, setup, step_by_step=True, replica=replica).run()


class _PacedReplica(Replica):
    def __init__(self, *arguments: Any, paces: Sequence[Pace], random: Random, **options: Any) -> None:
        self._drawn = [[factors.drawn(random) for factors in pace.kinds] for pace in paces]
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        factors = self._drawn[stage][work_of(batch.loads, self.cost)]
        return next(factors) * super().stage_s(batch, stage)
