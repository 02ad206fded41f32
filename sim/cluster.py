"""The whole cluster: arrivals, a router, replicas; run to the end and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import simpy

from policies.request import Request
from policies.routers import make_router
from policies.scheduler import Scheduler, SchedulerSettings
from policies.sharding import Sharding
from policies.slo import Slo
from sim.arrivals import ClosedLoopClients, OpenLoop
from sim.cost import IterationCost
from sim.replica import Replica
from traces.records import Recorder, RunRecords
from traces.synthesis import ClosedLoop, stream
from traces.workload import Workload

Progress = Callable[[float, int], None]
_PROGRESS_EVERY = 256  # requests that arrive or finish


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated, besides the workload.

    Args:
        cost: iteration times of a replica.
        kv_capacity_tokens: tokens that the KV cache of one replica holds, or of each of its KVP groups.
        scheduler: the policy of every replica.
        replicas: how many there are.
        sharding: the KVP groups of a replica.
        slos: one for each SLO class of the workload.
        router: how requests are spread over replicas.
        length_threshold_tokens: where the length-partitioned router draws the line.
        long_replicas: replicas that router keeps for long prompts.
        closed_loop: clients that wait for their answers; None for an open loop.
        seed: of the random streams.
        stop_s: when the clock stops; None lets every request finish.
        prefix_block_tokens: tokens of the workload's prefix blocks; None if it has none.
    """

    cost: IterationCost
    kv_capacity_tokens: int
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    replicas: int = 1
    sharding: Sharding = field(default_factory=Sharding)
    slos: tuple[Slo, ...] = (Slo(),)
    router: str = "least_loaded"
    length_threshold_tokens: int = 8192
    long_replicas: int = 1
    closed_loop: ClosedLoop | None = None
    send_until_s: float | None = None
    seed: int = 0
    stop_s: float | None = None
    prefix_block_tokens: int | None = None


class Cluster:
    """Replicas behind a router. Made for one workload and run once; ``replica`` makes each of them."""

    def __init__(
        self,
        workload: Workload,
        setup: Setup,
        *,
        step_by_step: bool = False,
        progress: Progress | None = None,
        replica: Callable[..., Replica] = Replica,
    ) -> None:
        self.setup = setup
        self.env = simpy.Environment()
        self.recorder = Recorder(len(workload), workload.slo_names)
        self._progress = progress
        self._events_to_progress = _PROGRESS_EVERY
        self._prompt_tokens: list[int] = workload.prompt_tokens.tolist()
        self._output_tokens: list[int] = workload.output_tokens.tolist()
        self._classes: list[int] | None = None if workload.slo_class is None else workload.slo_class.tolist()
        self._prefix = workload.prefix if setup.scheduler.prefix_caching else None
        self._alive: dict[int, Request] = {}
        self._router = make_router(
            setup.router,
            rng=stream(setup.seed, "router"),
            threshold_tokens=setup.length_threshold_tokens,
            long_replicas=setup.long_replicas,
        )
        self.schedulers = [
            Scheduler(
                setup.scheduler,
                setup.cost,
                setup.kv_capacity_tokens,
                slos=setup.slos,
                stages=len(setup.cost.stage_layers),
                sharding=setup.sharding,
                prefix_block_tokens=setup.prefix_block_tokens,
            )
            for _ in range(setup.replicas)
        ]
        self.replicas = [
            replica(
                self.env,
                index,
                scheduler,
                setup.cost,
                self.recorder,
                self._finished,
                step_by_step=step_by_step,
            )
            for index, scheduler in enumerate(self.schedulers)
        ]
        self._source: OpenLoop | ClosedLoopClients
        if setup.closed_loop is None:
            self._source = OpenLoop(self.env, workload, self._arrived)
        else:
            self._source = ClosedLoopClients(
                self.env, workload, setup.closed_loop, self._arrived, setup.send_until_s
            )

    def run(self) -> RunRecords:
        """Simulate until nothing is left to do, or until ``stop_s``; Ctrl-C ends it early.

        Returns the records of all requests that have arrived, whatever became of them.
        """
        began_s = time.perf_counter()
        interrupted = False
        try:
            self.env.run(until=self.setup.stop_s)
        except KeyboardInterrupt:
            interrupted = True
        for request in self._alive.values():
            self._record_progress(request)
        kv, work = self.schedulers[0].kv, self.recorder.work
        for scheduler in self.schedulers:
            if scheduler.prefixes is not None:
                work.looked_up_tokens += scheduler.prefixes.looked_up_tokens
                work.reused_tokens += scheduler.prefixes.reused_tokens
        records = self.recorder.records(
            replicas=len(self.replicas),
            kv_capacity_blocks=kv.capacity_blocks,
            block_tokens=kv.block_tokens,
            end_s=self.env.now,
        )
        records.interrupted = interrupted
        records.wall_s = time.perf_counter() - began_s
        return records

    def _arrived(self, index: int, arrival_s: float) -> None:
        slo_class = self._classes[index] if self._classes is not None else 0
        prompt_tokens, output_tokens = self._prompt_tokens[index], self._output_tokens[index]
        request = Request(index, arrival_s, prompt_tokens, output_tokens, slo_class)
        if self._prefix is not None:
            full = prompt_tokens // self._prefix.block_tokens
            request.prefix_ids = self._prefix.row(index)[:full].tolist()
        chosen = self._router.route(request, self.schedulers)
        fits = self.schedulers[chosen].fits(request)
        self.recorder.arrival(
            index, arrival_s, prompt_tokens, output_tokens, slo_class, chosen if fits else -1
        )
        if fits:
            self._alive[index] = request
            self.replicas[chosen].submit(request)
        else:
            self._source.request_left()
        self._show_progress()

    def _finished(self, request: Request) -> None:
        del self._alive[request.id]
        self._record_progress(request)
        self.recorder.finish(request.id, self.env.now)
        self._source.request_left()
        self._show_progress()

    def _record_progress(self, request: Request) -> None:
        self.recorder.progress(
            request.id, request.scheduled_s, request.first_token_s, request.deadline_s, request.preemptions
        )

    def _show_progress(self) -> None:
        self._events_to_progress -= 1
        if self._events_to_progress == 0:
            self._events_to_progress = _PROGRESS_EVERY
            if self._progress is not None:
                self._progress(self.env.now, self.recorder.finished)


def simulate(
    workload: Workload, setup: Setup, *, step_by_step: bool = False, progress: Progress | None = None
) -> RunRecords:
    """Simulate ``workload`` on the cluster that ``setup`` describes.

    Args:
        workload: the requests; without arrival times if ``setup.closed_loop`` is given.
        setup: what they are served by.
        step_by_step: take every decode step as an event of its own; slower, with the same result.
        progress: called now and then with the simulated time in seconds and the number of finished requests.
    """
    return Cluster(workload, setup, step_by_step=step_by_step, progress=progress).run()
