"""A simulation on a machine that is slower, or faster, than its profile says, and not always equally so.

Policies go on deciding by the profile, as they do on such a machine: only what batches really take changes.
That they don't all take the same multiple of it matters by itself: queues grow with the variance of what is
waited for, and the stages of a pipeline wait for each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any

from policies.batch import Batch
from sim.cluster import Cluster, Setup
from sim.replica import Replica
from traces.records import RunRecords
from traces.workload import Workload


@dataclass(frozen=True, slots=True)
class Factors:
    """Of many batches of one kind, how many times what was predicted each took; ``weights`` is what was
    predicted. One drawn by weight leaves what all of them take together as it was."""

    values: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)
    _sums: Sequence[float] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sums", list(accumulate(self.weights)))

    @property
    def mean(self) -> float:
        """Of all batches together: Σ taken ÷ Σ predicted."""
        return sum(v * w for v, w in zip(self.values, self.weights, strict=True)) / self._sums[-1]

    def quantile(self, share: float) -> float:
        """The factor below which ``share`` of the weight lies."""
        reached = 0.0
        pairs = sorted(zip(self.values, self.weights, strict=True))
        for value, weight in pairs:
            reached += weight
            if reached >= share * self._sums[-1]:
                return value
        return pairs[-1][0]

    def draw(self, random: Random) -> float:
        """One of them."""
        place = bisect_right(self._sums, random.random() * self._sums[-1])
        return self.values[min(place, len(self.values) - 1)]


_AS_PREDICTED = Factors()


@dataclass(frozen=True, slots=True)
class Pace:
    """How many times what is predicted for it a batch takes in a stage, by what it holds: decodes alone,
    decodes beside chunks of prompts, chunks alone."""

    decode: Factors = _AS_PREDICTED
    mixed: Factors = _AS_PREDICTED
    prefill: Factors = _AS_PREDICTED

    def of(self, batch: Batch) -> Factors:
        """The factors of batches such as this one."""
        if not batch.chunks:
            return self.decode
        return self.mixed if batch.num_decodes else self.prefill


def simulate_paced(workload: Workload, setup: Setup, paces: Sequence[Pace], seed: int = 0) -> RunRecords:
    """Simulate ``workload`` at a pace for each stage; what lies between stages is as predicted."""
    replica = partial(_PacedReplica, paces=paces, random=Random(seed))
    return Cluster(workload, setup, step_by_step=True, replica=replica).run()


class _PacedReplica(Replica):
    def __init__(self, *arguments: Any, paces: Sequence[Pace], random: Random, **options: Any) -> None:
        self._paces = paces
        self._random = random
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        return self._paces[stage].of(batch).draw(self._random) * super().stage_s(batch, stage)
