"""A simulation that takes its times from a recorded run, and must then make the same decisions.

When each batch ended is all that is fed back. Which batches are formed, when, of which requests and with how
many tokens is the simulator's own doing, under the policy's own cost model. So a difference from the record
is a difference in scheduling or in how the driver treats the scheduler, never one in predicted times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.batch import Batch
from sim.cluster import Cluster, Setup
from sim.replica import Replica
from traces.slices import Slice, Slices
from traces.workload import Workload

FloatArray = NDArray[np.float64]

_SAME_TIME_S = 1e-6  # rounding is far below, and no decision is that quick
_SHOWN = 3  # slices that a message shows


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What is fed back, and what has to come out.

    Attributes:
        slices: of each batch.
        start_s: when each batch was formed.
        end_s: [batches, stages], when each stage was through with it; infinity if it never was.
    """

    slices: Slices
    start_s: FloatArray
    end_s: FloatArray


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference; ``what`` is one line."""

    batch: int
    time_s: float
    what: str


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a simulation and the record agree: ``batches`` batches with ``tokens`` tokens, until the
    divergence if there is one."""

    batches: int
    tokens: int
    divergence: Divergence | None


def replay(workload: Workload, setup: Setup, run: RecordedRun) -> Parity:
    """Simulate ``workload`` under the times of ``run`` and compare every batch.

    Args:
        workload: the requests of the recorded run.
        setup: as of the recorded run, one replica.
        run: the record.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    if setup.replicas != 1:
        raise ValueError("one replica at a time can be replayed")
    expected = _Expected(run)
    if len(run.end_s) != len(expected.batches) or run.end_s.shape[1:] != (len(setup.cost.stage_layers),):
        raise ValueError("end_s must be [batches, stages]")
    cluster = Cluster(
        workload,
        replace(setup, replicas=1),
        step_by_step=True,
        replica=partial(_ReplayedReplica, expected=expected),
    )
    divergence = None
    try:
        records = cluster.run()
        if records.interrupted:
            raise KeyboardInterrupt  # a part that is the same says nothing of the rest
        end_s = records.end_s
    except _Diverged as stop:
        divergence = stop.args[0]
    else:
        if expected.seen < len(expected.batches):
            missing = f"the simulator forms no batch {expected.seen}: it ended with {expected.seen} batches"
            what = f"{missing}, the record holds {len(expected.batches)}"
            divergence = Divergence(expected.seen, end_s, what)
    return Parity(expected.seen, expected.tokens, divergence)


class _Diverged(Exception):
    """Ends the simulation; SimPy makes a copy of it from its one argument, a :class:`Divergence`."""


class _Expected:
    """The record, and how much of it has been met."""

    def __init__(self, run: RecordedRun) -> None:
        self.batches = run.slices.of_batches()
        self.start_s: list[float] = run.start_s.tolist()
        self.end_s: list[list[float]] = run.end_s.tolist()
        self.seen = 0
        self.tokens = 0

    def check(self, batch: Batch, now_s: float) -> None:
        """Compare a batch that has just been formed with the recorded one.

        Raises:
            _Diverged: they differ.
        """
        found = slices_of(batch)
        what = self._difference(batch.id, found, now_s)
        if what is not None:
            raise _Diverged(Divergence(batch.id, now_s, what))
        self.seen += 1
        self.tokens += batch.tokens

    def _difference(self, id: int, found: list[Slice], now_s: float) -> str | None:
        if id >= len(self.batches):
            return f"the simulator forms batch {id} {_show(found)}, the record ended with {id} batches"
        wanted, start_s = self.batches[id], self.start_s[id]
        if abs(now_s - start_s) > _SAME_TIME_S:
            return f"batch {id} begins at {now_s:.6f} s in the simulator, at {start_s:.6f} s in the record"
        if found == wanted:
            return None
        only_found = [each for each in found if each not in set(wanted)]
        only_wanted = [each for each in wanted if each not in set(found)]
        if not only_found and not only_wanted:
            return f"batch {id} holds the same slices in another order"
        return f"batch {id} holds {_show(only_found)} in the simulator, {_show(only_wanted)} in the record"


class _ReplayedReplica(Replica):
    """A replica whose stages end when the record says; hand-overs and getting ready are part of that."""

    def __init__(self, *arguments: Any, expected: _Expected, **options: Any) -> None:
        self._expected = expected
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        if stage == 0:
            self._expected.check(batch, self.env.now)
        return delay_until(self._expected.end_s[batch.id][stage], self.env.now)

    def handover_s(self, batch: Batch, stage: int) -> float:
        return 0.0

    def stage_gap_s(self, batch: Batch) -> float:
        return 0.0


def slices_of(batch: Batch) -> list[Slice]:
    """A batch that has just been formed, chunks first."""
    chunks = [(c.request.id, c.tokens, c.context, c.request.home) for c in batch.chunks]
    return chunks + [(request.id, 1, request.kv_tokens, request.home) for request in batch.decodes()]


def delay_until(moment_s: float, now_s: float) -> float:
    """The seconds that, added to ``now_s``, give exactly ``moment_s``; 0 if that is past.

    A rounding error would decide whether something happens before or after what happens at that moment.
    """
    delay_s = max(moment_s - now_s, 0.0)
    if delay_s == 0.0 or delay_s == math.inf:
        return delay_s
    while now_s + delay_s < moment_s:
        delay_s = math.nextafter(delay_s, math.inf)
    while now_s + delay_s > moment_s:
        delay_s = math.nextafter(delay_s, 0.0)
    return delay_s


def _show(slices: list[Slice]) -> str:
    """A few slices in words."""
    if not slices:
        return "nothing more"
    parts = [f"request {id}: {tokens} behind {context}" for id, tokens, context, _ in slices[:_SHOWN]]
    more = f" and {len(slices) - _SHOWN} more" if len(slices) > _SHOWN else ""
    return f"[{'; '.join(parts)}{more}]"
