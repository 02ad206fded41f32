"""The whole cluster: arrivals, a router, replicas; run to the end and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable

import simpy

from policies.request import Request
from policies.routers import LeastLoaded, Router, make_router
from sim.arrivals import ClosedLoopClients, OpenLoop
from sim.pools import Pools
from sim.replica import Replica
from sim.setup import DecodeSetup, ElasticSetup, NetworkSetup, Setup
from traces.records import Recorder, RunRecords
from traces.synthesis import stream
from traces.workload import Workload

__all__ = ["Cluster", "DecodeSetup", "ElasticSetup", "NetworkSetup", "Setup", "simulate"]

Progress = Callable[[float, int], None]
_PROGRESS_EVERY = 256  # requests that arrive or finish


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
        pools = Pools(
            self.env,
            setup,
            self.recorder,
            self._finished,
            step_by_step=step_by_step,
            replica=replica,
        )
        self._pools = pools
        self.replicas, self.schedulers = pools.entries, pools.entry_schedulers
        self._router: Router = LeastLoaded()  # for an elastic pool, which is one for all
        if setup.elastic is None:
            self._router = make_router(
                setup.router,
                rng=stream(setup.seed, "router"),
                threshold_tokens=setup.length_threshold_tokens,
                long_replicas=setup.long_replicas,
            )
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
        work = self.recorder.work
        for scheduler in self._pools.schedulers:
            if scheduler.prefixes is not None:
                work.looked_up_tokens += scheduler.prefixes.looked_up_tokens
                work.reused_tokens += scheduler.prefixes.reused_tokens
        capacities = self._pools.kv_capacities()
        records = self.recorder.records(
            replicas=len(capacities),
            kv_capacity_blocks=capacities[0],
            block_tokens=self.setup.scheduler.block_tokens,
            end_s=self.env.now,
        )
        if len(set(capacities)) > 1:
            records.kv_capacities = capacities
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
        fits = self.schedulers[chosen].fits(request) and self._pools.could_decode(request)
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
