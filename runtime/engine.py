"""The live engine: the scheduler of the simulator, driven by the wall clock and a model that computes.

It keeps the simulator's notion of time. Something happens at a moment, an arrival or the end of a batch;
the scheduler is told that moment, and what the host then does until the stage is at work belongs to the
batch that begins there. So batches follow each other without gaps, as in the simulator, and the scheduler's
decisions are a function of the recorded times alone: they can be repeated from them.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.batch import Batch
from policies.cost import CostModel
from policies.request import Request
from policies.scheduler import Scheduler, SchedulerSettings
from policies.sharding import Sharding
from policies.slo import Slo
from runtime.arrivals import Arrivals
from runtime.executors import Executor, StageDone
from runtime.launcher import start_executor
from runtime.plan import Plan, Slice
from runtime.runner import RunnerSpec
from runtime.sequences import Prompts, Sequence, make_plan
from traces.records import HOST_COLUMNS, Recorder, RunRecords
from traces.synthesis import ClosedLoop
from traces.workload import Workload

Progress = Callable[[float, int], None]
"""Called now and then with the time in seconds and the number of finished requests."""

_SPIN_S = 1e-3  # the last millisecond before an arrival is waited for awake: sleeping isn't that precise
_PROGRESS_EVERY = 16  # batches
_PROBE_EVERY_S = 0.01  # at most: a probe takes 15 µs, twice


@dataclass(frozen=True, slots=True)
class LiveSetup:
    """What serves a workload live.

    Args:
        runner: the model and the ranks that execute it. Its KV capacity is what the scheduler hands out;
            each KVP group has room for all of it.
        cost: predicted iteration times, for adaptive chunks and for deadlines.
        scheduler: the policy.
        slos: one for each SLO class of the workload.
        closed_loop: clients that wait for their answers; None for an open loop.
        send_until_s: when the clients of a closed loop send their last requests.
        seed: of the prompts.
        stop_s: when the clock stops; None lets every request finish.
    """

    runner: RunnerSpec
    cost: CostModel
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    slos: tuple[Slo, ...] = (Slo(),)
    closed_loop: ClosedLoop | None = None
    send_until_s: float | None = None
    seed: int = 0
    stop_s: float | None = None


@dataclass(slots=True)
class LiveRecords(RunRecords):
    """The records of a live run.

    Attributes:
        host: columns of ``HOST_COLUMNS``, one entry for each batch and stage, as in ``batches``.
        outputs: the tokens of each finished request.
        waited_s: how long the engine was ready to go on and had no core, because other work had it; None
            where the system doesn't say.
    """

    host: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    outputs: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    waited_s: float | None = None


class Engine:
    """Serves one workload with one executor. Made for one run."""

    def __init__(
        self, workload: Workload, setup: LiveSetup, executor: Executor, progress: Progress | None = None
    ) -> None:
        self.setup = setup
        self.executor = executor
        self.arrivals = Arrivals(workload, setup.closed_loop, setup.send_until_s)
        self.recorder = Recorder(len(workload), workload.slo_names)
        self.scheduler = Scheduler(
            setup.scheduler,
            setup.cost,
            setup.runner.kv_capacity_tokens,
            slos=setup.slos,
            stages=executor.num_stages,
            sharding=Sharding(setup.runner.parallel.kvp, setup.runner.parallel.kvp_tokens_per_group),
        )
        self._workload = workload
        self._progress = progress
        self._prompts = Prompts(workload.prompt_tokens, setup.runner.model.vocab_size, setup.seed)
        self._alive: dict[int, Sequence] = {}
        self._outputs: dict[int, NDArray[np.int64]] = {}
        self._freed: list[int] = []
        self._preemptions = 0
        self._in_flight: dict[int, Batch] = {}
        self._first_stage_free = True
        self._starts_s: dict[tuple[int, int], float] = {}  # of batches, by (batch, stage)
        self._schedule_s: dict[int, float] = {}
        self._host = array("d")
        self._began_s = 0.0
        self._probe_due_s = 0.0
        self.now_s = 0.0  # of what happened last

    def run(self) -> LiveRecords:
        """Serve until nothing is left to do, or until ``stop_s``; Ctrl-C ends it early.

        Returns the records of all requests that have arrived, whatever became of them.
        """
        interrupted = False
        self._warm_up()
        gc.collect()
        gc.freeze()  # what was made so far stays out of later collections, which would hold batches up
        waited_s = _waited_s()
        self._began_s = time.perf_counter()
        try:
            self._serve()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            gc.unfreeze()
        for sequence in self._alive.values():
            self._record_progress(sequence.request)
        kv = self.scheduler.kv
        records = self.recorder.records(
            replicas=1, kv_capacity_blocks=kv.capacity_blocks, block_tokens=kv.block_tokens, end_s=self.now_s
        )
        records.interrupted = interrupted
        records.wall_s = time.perf_counter() - self._began_s
        result = self._with_host_times(records)
        if waited_s is not None:
            result.waited_s = (_waited_s() or waited_s) - waited_s
        return result

    # -- time -------------------------------------------------------------------------------------------

    def _clock_s(self) -> float:
        return time.perf_counter() - self._began_s

    def _serve(self) -> None:
        stop_s = float("inf") if self.setup.stop_s is None else self.setup.stop_s
        while self.now_s < stop_s:
            has_room = self._has_room()
            if has_room and self._start_batch():
                continue
            next_s = self.arrivals.next_s
            if not self._in_flight:
                if next_s is None:
                    return
                self._sleep_until(min(next_s, stop_s))
                self._arrive_until(min(next_s, stop_s))
                continue
            timeout_s = None
            if has_room and next_s is not None:  # an arrival could start at once
                timeout_s = max(min(next_s, stop_s) - self._clock_s(), 0.0)
            done = self.executor.wait(timeout_s)
            if done is None:
                assert next_s is not None
                self._arrive_until(min(next_s, stop_s))
                continue
            end_s = max(self._clock_s(), self.now_s)
            if end_s >= stop_s:
                self.now_s = stop_s
                return
            self._begin_before(end_s)
            self._arrive_until(end_s)
            self._stage_done(done)

    def _begin_before(self, end_s: float) -> None:
        """Begin the batches of requests that came to a free first stage before ``end_s``, each at its own
        time: the end of another batch was heard of first, and is told to the scheduler after them."""
        while self._has_room() and (next_s := self.arrivals.next_s) is not None and next_s < end_s:
            self._arrive_until(next_s)
            self._start_batch()

    def _has_room(self) -> bool:
        return self._first_stage_free and len(self._in_flight) < self.executor.num_stages

    def _sleep_until(self, moment_s: float) -> None:
        """Wait for a moment to the microsecond, without burning the processor until the last millisecond."""
        ahead_s = moment_s - self._clock_s() - _SPIN_S
        if ahead_s > 0:
            time.sleep(ahead_s)
        while self._clock_s() < moment_s:
            pass

    # -- requests ---------------------------------------------------------------------------------------

    def _arrive_until(self, now_s: float) -> None:
        """Hand over the requests that have arrived by ``now_s``, which becomes the present."""
        self.now_s = max(self.now_s, now_s)
        for index, arrival_s in self.arrivals.pop_until(now_s):
            self._arrive(index, arrival_s)

    def _arrive(self, index: int, arrival_s: float) -> None:
        workload = self._workload
        slo_class = int(workload.slo_class[index]) if workload.slo_class is not None else 0
        prompt_tokens, output_tokens = int(workload.prompt_tokens[index]), int(workload.output_tokens[index])
        request = Request(index, arrival_s, prompt_tokens, output_tokens, slo_class)
        fits = self.scheduler.fits(request)
        self.recorder.arrival(index, arrival_s, prompt_tokens, output_tokens, slo_class, 0 if fits else -1)
        if not fits:
            self.arrivals.request_left(arrival_s)
            return
        self._alive[index] = Sequence(request, self._prompts[index])
        self.scheduler.add(request)

    def _finish(self, request: Request) -> None:
        self._outputs[request.id] = self._alive.pop(request.id).generated.copy()
        self._freed.append(request.id)
        self._record_progress(request)
        self.recorder.finish(request.id, self.now_s)
        self.arrivals.request_left(self.now_s)

    def _record_progress(self, request: Request) -> None:
        self.recorder.progress(
            request.id, request.scheduled_s, request.first_token_s, request.deadline_s, request.preemptions
        )

    # -- batches ----------------------------------------------------------------------------------------

    def _start_batch(self) -> bool:
        """Ask the scheduler for a batch at the present, and start it; False if there is none."""
        batch = self.scheduler.next_batch(self.now_s)
        if batch is None:
            return False
        self._free_preempted()
        probe = self.now_s >= self._probe_due_s
        if probe:
            self._probe_due_s = self.now_s + _PROBE_EVERY_S
        plan = make_plan(batch, self._alive, self._freed, probe=probe)
        self._freed = []
        self._in_flight[batch.id] = batch
        self._first_stage_free = False
        self._starts_s[batch.id, 0] = self.now_s
        self._schedule_s[batch.id] = self._clock_s() - self.now_s
        self.executor.submit(plan)
        return True

    def _free_preempted(self) -> None:
        if self.scheduler.preemptions == self._preemptions:
            return
        self._preemptions = self.scheduler.preemptions
        for sequence in self._alive.values():
            if sequence.request.preemptions != sequence.preemptions:
                sequence.preemptions = sequence.request.preemptions
                self._freed.append(sequence.request.id)

    def _stage_done(self, done: StageDone) -> None:
        """A stage has ended a batch at the present."""
        batch = self._in_flight[done.plan]
        if done.stage == 0:
            self._first_stage_free = True
            self.scheduler.leave_first_stage(batch)
        if done.stage == self.executor.num_stages - 1:
            self._complete(batch, done.tokens)
        self._record_stage(batch, done)

    def _complete(self, batch: Batch, tokens: list[tuple[int, int]]) -> None:
        del self._in_flight[batch.id]
        for request_id, token in tokens:
            self._alive[request_id].append(token)
        for gap_s, requests in batch.gaps(self.now_s):
            self.recorder.gap((gap_s, 0.0, 1, requests))
        self._count_work(batch)
        for request in self.scheduler.complete(batch, self.now_s):
            self._finish(request)
        if self._progress is not None and self.recorder.work.iterations % _PROGRESS_EVERY == 0:
            self._progress(self.now_s, self.recorder.finished)

    def _record_stage(self, batch: Batch, done: StageDone) -> None:
        scheduler, stage = self.scheduler, done.stage
        # A later stage has prepared its inputs while it waited for the activations.
        busy_s = done.execute_s + done.sample_s
        start_s = self._starts_s.pop((batch.id, stage), max(self.now_s - busy_s, batch.formed_s))
        self.recorder.batch(
            (
                start_s,
                self.now_s,
                0,
                stage,
                batch.id,
                1,
                len(batch.chunks),
                batch.prefill_tokens,
                batch.num_decodes,
                scheduler.waiting,
                scheduler.kv.used_blocks,
            )
        )
        schedule_s = self._schedule_s.pop(batch.id, 0.0) if stage == 0 else 0.0
        parts_s = (schedule_s, done.launch_s, done.execute_s, done.sample_s)
        self._host.extend((batch.id, stage, *parts_s, done.probe_s))

    def _count_work(self, batch: Batch) -> None:
        """Add up what the batch computed and read; nothing is predicted here."""
        work, decodes = self.recorder.work, batch.num_decodes
        work.iterations += 1
        work.tokens += batch.tokens
        work.rows += batch.rows
        seen = batch.decode_context + decodes
        work.attention_pairs += seen
        work.kv_tokens_read += seen
        for _, tokens, context in batch.chunks:
            work.attention_pairs += tokens * context + tokens * (tokens + 1) // 2
            work.kv_tokens_read += context + tokens

    def _with_host_times(self, records: RunRecords) -> LiveRecords:
        rows = np.array(self._host).reshape(-1, len(HOST_COLUMNS))
        host = {name: rows[:, i].copy() for i, name in enumerate(HOST_COLUMNS)}
        shared: dict[str, Any] = {each.name: getattr(records, each.name) for each in fields(RunRecords)}
        return LiveRecords(**shared, host=host, outputs=self._outputs)

    def _warm_up(self) -> None:
        """Execute a small request, so that connections, workspaces and kernels are there, and look up the
        prefill work of the longest prompt: the first decision would otherwise walk all of it."""
        self.scheduler.work.work_s(int(self._workload.prompt_tokens.max(initial=0)))
        tokens = min(32, self.setup.scheduler.block_tokens * self.scheduler.kv.capacity_blocks - 1)
        for start, count in ((0, tokens), (tokens, 1)):
            slices = [Slice(-1, start, count, tokens + 1, True)]
            self.executor.submit(Plan(-1, slices, np.zeros(count, dtype=np.int64)))
            for _ in range(self.executor.num_stages):
                self.executor.wait()
        self._freed.append(-1)


def _waited_s() -> float | None:
    """Seconds that this thread has been ready to run without a core. Linux counts them."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return None


def serve(workload: Workload, setup: LiveSetup, *, progress: Progress | None = None) -> LiveRecords:
    """Serve ``workload`` live, by the wall clock.

    Args:
        workload: the requests; without arrival times if ``setup.closed_loop`` is given.
        setup: what serves them.
        progress: called now and then with the time in seconds and the number of finished requests.

    Raises:
        InputError: the model, its weights, the device or the parallelisation is wrong.
        RankError: a rank died or hung.
    """
    executor = start_executor(replace(setup.runner, block_tokens=setup.scheduler.block_tokens))
    try:
        return Engine(workload, setup, executor, progress).run()
    finally:
        executor.close()
