"""A simulation on a machine that is slower, or faster, than its profile says.

Policies go on deciding by the profile, as they do on such a machine: only what batches really take changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from policies.batch import Batch
from sim.cluster import Cluster, Setup
from sim.replica import Replica
from traces.records import RunRecords
from traces.workload import Workload


@dataclass(frozen=True, slots=True)
class Pace:
    """How many times what is predicted for it a batch takes in a stage, by what it holds: decodes alone,
    decodes beside chunks of prompts, chunks alone."""

    decode: float = 1.0
    mixed: float = 1.0
    prefill: float = 1.0

    def of(self, batch: Batch) -> float:
        """The factor of a batch."""
        if not batch.chunks:
            return self.decode
        return self.mixed if batch.num_decodes else self.prefill


def simulate_paced(workload: Workload, setup: Setup, paces: Sequence[Pace]) -> RunRecords:
    """Simulate ``workload`` at a pace for each stage; hand-overs are as predicted."""
    replica = partial(_PacedReplica, paces=paces)
    return Cluster(workload, setup, step_by_step=True, replica=replica).run()


class _PacedReplica(Replica):
    def __init__(self, *arguments: Any, paces: Sequence[Pace], **options: Any) -> None:
        self._paces = paces
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        return self._paces[stage].of(batch) * super().stage_s(batch, stage)
