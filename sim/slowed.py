"""A simulation on a machine that is slower, or faster, than its profile says, by one factor.

Policies go on deciding by the profile, as they do on such a machine: only what batches really take changes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from policies.batch import Batch
from sim.cluster import Cluster, Setup
from sim.replica import Replica
from traces.records import RunRecords
from traces.workload import Workload


def simulate_slowed(workload: Workload, setup: Setup, factor: float) -> RunRecords:
    """Simulate ``workload`` with every batch and hand-over ``factor`` times as long as predicted."""
    replica = partial(_SlowedReplica, factor=factor)
    return Cluster(workload, setup, step_by_step=True, replica=replica).run()


class _SlowedReplica(Replica):
    def __init__(self, *arguments: Any, factor: float, **options: Any) -> None:
        self._factor = factor
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        return self._factor * super().stage_s(batch, stage)

    def handover_s(self, batch: Batch, stage: int) -> float:
        return self._factor * super().handover_s(batch, stage)
