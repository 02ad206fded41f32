"""A pool of instances that prefill together in groups of changing size, as processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from policies.elastic import ElasticScheduler, Group
from policies.request import Request
from sim.cost import IterationCost
from sim.network import Holding, Interval, Port
from traces.records import Recorder

Process = Generator[simpy.Event, Any, None]


class ElasticPool:
    """Executes what an :class:`~policies.elastic.ElasticScheduler` decides. Each group is a process.

    Args:
        cost: of one instance, to say what lies outside what was measured.
        on_prefilled: called with a request that decodes elsewhere, and with this pool.
        ports: the links of each instance; empty if nothing moves over them.
    """

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: ElasticScheduler,
        cost: IterationCost,
        recorder: Recorder,
        on_finish: Callable[[Request], None],
        on_prefilled: Callable[[Request, ElasticPool], None],
        ports: Sequence[Port] = (),
    ) -> None:
        self.env = env
        self.scheduler = scheduler
        self._cost = cost
        self._recorder = recorder
        self._on_finish = on_finish
        self._on_prefilled = on_prefilled
        self._ports = ports
        self._layers = Interval(0, sum(cost.stage_layers))

    def submit(self, request: Request) -> None:
        """Hand a request to the scheduler."""
        self.scheduler.add(request)
        self._begin()

    def release(self, request: Request) -> None:
        """A request's KV cache has been copied elsewhere."""
        self.scheduler.release(request)
        self._begin()

    def holdings(self, request: Request) -> list[Holding]:
        """Equal parts of its KV cache on each instance that took part."""
        instances = self.scheduler.instances_of(request)
        count = len(instances)
        return [
            Holding(self._ports[instance], self._layers, Interval(place / count, (place + 1) / count))
            for place, instance in enumerate(instances)
        ]

    def _begin(self) -> None:
        """Start all groups that can begin now."""
        while (group := self.scheduler.next_group(self.env.now)) is not None:
            for chunk in group.batch.chunks:
                self._recorder.placed(chunk.request.id, group.instances[0])
            self.env.process(self._prefill(group))

    def _prefill(self, group: Group) -> Process:
        start_s = self.env.now
        yield self.env.timeout(group.seconds)
        finished = self.scheduler.complete(group, self.env.now)
        self._count_work(group)
        self._record(group, start_s)
        for request in finished:
            self._on_finish(request)
        prefilled, self.scheduler.prefilled = self.scheduler.prefilled, []
        for request in prefilled:
            self._on_prefilled(request, self)
        self._begin()

    def _record(self, group: Group, start_s: float) -> None:
        """A row for each instance, with its share of the tokens."""
        batch, scheduler = group.batch, self.scheduler
        share, rest = divmod(batch.tokens, len(group.instances))
        for place, instance in enumerate(group.instances):
            self._recorder.batch(
                (
                    start_s,
                    self.env.now,
                    instance,
                    0,
                    batch.id,
                    1,
                    len(batch.chunks),
                    share + (place < rest),
                    0,
                    scheduler.waiting,
                    scheduler.caches[instance].used_blocks,
                )
            )

    def _count_work(self, group: Group) -> None:
        work, cost, batch = self._recorder.work, self._cost, group.batch
        ranks = len(group.instances)
        work.iterations += 1
        work.tokens += batch.tokens
        work.rows += batch.rows
        work.predicted_s += group.seconds
        shape = -(-batch.tokens // ranks), batch.rows, batch.requests
        work.extrapolated_s += cost.tokens_outside_s(*shape)
        for _, tokens, _ in batch.chunks:
            work.attention_pairs += tokens * (tokens + 1) // 2
            work.kv_tokens_read += tokens
            if cost.chunk_is_extrapolated(-(-tokens // ranks), 0):
                work.extrapolated_s += group.cost.chunk_attention_s(tokens, 0)
