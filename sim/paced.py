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

from policies.batch import Batch
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
    """How many times what is predicted for it a batch takes in a stage, by what it holds: decodes alone,
    decodes beside chunks of prompts, chunks alone."""

    decode: Factors = _AS_PREDICTED
    mixed: Factors = _AS_PREDICTED
    prefill: Factors = _AS_PREDICTED


def simulate_paced(workload: Workload, setup: Setup, paces: Sequence[Pace], seed: int = 0) -> RunRecords:
    """Simulate ``workload`` at a pace for each stage; what lies between stages is as predicted."""
    replica = partial(_PacedReplica, paces=paces, random=Random(seed))
    return Cluster(workload, setup, step_by_step=True, replica=replica).run()


class _PacedReplica(Replica):
    def __init__(self, *arguments: Any, paces: Sequence[Pace], random: Random, **options: Any) -> None:
        self._drawn = [
            [kind.drawn(random) for kind in (pace.decode, pace.mixed, pace.prefill)] for pace in paces
        ]
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        kind = (1 if batch.num_decodes else 2) if batch.chunks else 0
        return next(self._drawn[stage][kind]) * super().stage_s(batch, stage)
