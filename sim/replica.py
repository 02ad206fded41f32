"""One replica: a scheduler, its pipeline stages and the links between them, as SimPy processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from policies.batch import Batch, Load
from policies.request import Request
from policies.room import Reservation
from policies.scheduler import Scheduler
from profiler.decode_run import DecodeRun
from sim.cost import IterationCost
from sim.network import Holding, Interval, Network, Port
from traces.records import Recorder

Process = Generator[simpy.Event, Any, None]


class Replica:
    """Executes what its scheduler decides, in simulated time.

    The first stage asks for a batch whenever it is free and fewer batches than stages are in flight.
    With several stages a batch then passes link, stage, link, … each one a process with a queue.

    While only decodes run and nobody can join them, the batch can't change until a member finishes or a
    request arrives. Such a stretch is one event (see :class:`~profiler.decode_run.DecodeRun`); an arrival
    interrupts it, and the step then under way is finished first. ``step_by_step`` turns that off; replicas
    of several stages always go step by step.

    Args:
        index: its number in the records.
        on_prefilled: called with a request that decodes elsewhere, and with this replica.
        network: what its stages share with the KV caches that move; None if they have links of their own.
        ports: [groups][stages]: the links of each stage; empty if nothing moves over them.

    Attributes:
        on_batch_end: called after every batch (or run of decode steps), and when there is none to begin,
            unless None.
    """

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        scheduler: Scheduler,
        cost: IterationCost,
        recorder: Recorder,
        on_finish: Callable[[Request], None],
        *,
        step_by_step: bool = False,
        on_prefilled: Callable[[Request, Replica], None] | None = None,
        network: Network | None = None,
        ports: Sequence[Sequence[Port]] = (),
    ) -> None:
        self.env = env
        self.index = index
        self.scheduler = scheduler
        self.cost = cost
        self.recorder = recorder
        self._on_finish = on_finish
        self._on_prefilled = on_prefilled
        self._network = network
        self._ports = ports
        self.on_batch_end: Callable[[], None] | None = None
        self._num_stages = len(cost.stage_layers)
        # With later stages, an arrival may enter the first one while a decode step is still in the last.
        self._fast_forward = self._num_stages == 1 and not step_by_step
        self._in_flight = 0
        self._waiting_for_work: simpy.Event | None = None
        self._in_run = False
        self._was_idle = False  # before the batch that is about to begin
        # Each later stage has an inbox, and a link with an inbox before it.
        self._inboxes = [simpy.Store(env) for _ in range(self._num_stages)]
        self._links = [simpy.Store(env) for _ in range(self._num_stages)]
        for stage in range(1, self._num_stages):
            env.process(self._link(stage))
            env.process(self._later_stage(stage))
        self._process = env.process(self._first_stage())

    def submit(self, request: Request) -> None:
        """Hand a request to the scheduler, and see to it that the first stage takes notice."""
        self.scheduler.add(request)
        self._notice()

    def release(self, request: Request) -> None:
        """A request that was prefilled here has left, so that others have more room."""
        self.scheduler.release(request)
        self._notice()

    def receive(self, reservation: Reservation) -> None:
        """The KV cache of a request that decodes here from now on has arrived."""
        self.scheduler.receive(reservation)
        self._notice()

    def end_run(self) -> None:
        """Of a run of decode steps, let the present one be the last."""
        if self._in_run:
            self._in_run = False
            self._process.interrupt()

    @property
    def is_idle(self) -> bool:
        """Whether no batch is in flight."""
        return self._in_flight == 0

    def holdings(self, request: Request) -> list[Holding]:
        """Where the KV cache of a request lies that was prefilled here."""
        return self.holdings_of(request.home, request.prefill_tokens)

    def holdings_of(self, home: int, tokens: int) -> list[Holding]:
        """Where ``tokens`` tokens of a request lie whose home is the group ``home``."""
        sharding = self.scheduler.sharding
        held, first = [], 0
        for shard in range(sharding.shards(tokens)):
            last = first + sharding.stored(tokens, shard)
            share, first = Interval(first / tokens, last / tokens), last
            layer = 0
            for port, layers in zip(
                self._ports[sharding.group(home, shard)], self.cost.stage_layers, strict=True
            ):
                held.append(Holding(port, Interval(layer, layer + layers), share))
                layer += layers
        return held

    def _notice(self) -> None:
        """See to it that the first stage looks at its scheduler."""
        if self._in_run:
            self.end_run()
        else:
            self._wake_up()

    def _wake_up(self) -> None:
        if self._waiting_for_work is not None:
            self._waiting_for_work.succeed()
            self._waiting_for_work = None

    # -- processes --------------------------------------------------------------------------------------

    def _first_stage(self) -> Process:
        env, scheduler = self.env, self.scheduler
        while True:
            batch = scheduler.next_batch(env.now) if self._in_flight < self._num_stages else None
            if batch is None:
                work = self._waiting_for_work = env.event()
                if self.on_batch_end is not None:
                    self.on_batch_end()  # asking for a batch may have freed memory
                began_s, is_idle = env.now, self._in_flight == 0
                yield work
                self._was_idle |= is_idle and env.now > began_s
                continue
            self._in_flight += 1
            takes_longer = self._was_idle and self.cost.idle_s > 0.0
            steps = scheduler.steady_steps(batch) if self._fast_forward and not takes_longer else 1
            if steps > 1:
                yield from self._run(batch, steps)
            else:
                start_s = env.now
                yield env.timeout(self.stage_s(batch, 0))
                scheduler.leave_first_stage(batch)
                if self._num_stages == 1:
                    self._complete(batch)
                else:
                    self._links[1].put(batch)
                self._record_stage(batch, 0, start_s)

    def _run(self, batch: Batch, steps: int) -> Process:
        """Take ``steps`` decode steps at once, or as many as begin before the next arrival."""
        env = self.env
        start_s = env.now
        run = self.cost.decode_run(batch.num_decodes, batch.decode_context, steps, batch.joint_s)
        self._in_run = True
        try:
            yield env.timeout(run.total_s)
            self._in_run = False
        except simpy.Interrupt:
            steps, after_s = run.ending_after(env.now - start_s)
            yield env.timeout(max(start_s + after_s - env.now, 0.0))
        self._record_run(batch, run, start_s, steps)

    def _link(self, stage: int) -> Process:
        """Carries activations to ``stage``, one batch at a time."""
        while True:
            batch = yield self._links[stage].get()
            if self._network is None:
                yield self.env.timeout(self.handover_s(batch, stage))
            else:
                pairs = [(group[stage - 1], group[stage]) for group in self._ports]
                yield from self._network.occupy_all(pairs, self.handover_s(batch, stage))
            self._inboxes[stage].put(batch)

    def _later_stage(self, stage: int) -> Process:
        env, free_s = self.env, 0.0
        while True:
            batch = yield self._inboxes[stage].get()
            # A stage gets ready for a batch as soon as it knows of it and has no other.
            ready_s = max(free_s, batch.formed_s) + self.stage_gap_s(batch)
            if ready_s > env.now:
                yield env.timeout(ready_s - env.now)
            start_s = env.now
            yield env.timeout(self.stage_s(batch, stage))
            free_s = env.now
            if stage + 1 < self._num_stages:
                self._links[stage + 1].put(batch)
            else:
                self._complete(batch)
                self._wake_up()
            self._record_stage(batch, stage, start_s)

    # -- time -------------------------------------------------------------------------------------------

    def stage_s(self, batch: Batch, stage: int) -> float:
        """Seconds that ``stage``, about to begin with ``batch``, takes: as long as its slowest KVP group."""
        loads = batch.loads
        idle_s = 0.0
        if stage == 0 and self._was_idle:
            self._was_idle, idle_s = False, self.cost.idle_s
        if len(loads) == 1:
            return idle_s + self._load_s(batch, stage)
        return idle_s + max(self._load_s(load, stage) for load in loads if load.requests)

    def _load_s(self, load: Load, stage: int) -> float:
        if self._num_stages == 1:
            return self.cost.tokens_s(load.tokens, load.rows, load.requests) + load.attention_s
        return self.cost.stage_times_s(load.tokens, load.rows, load.requests, load.attention_s)[stage]

    def handover_s(self, batch: Batch, stage: int) -> float:
        """Seconds to hand the activations of ``batch`` to ``stage``, where nothing else moves."""
        return self.cost.handover_s(max(load.tokens for load in batch.loads), stage)

    def stage_gap_s(self, batch: Batch) -> float:
        """Seconds that a later stage needs to get ready for ``batch``."""
        return max(self.cost.stage_gap_s(load.tokens, load.requests) for load in batch.loads if load.requests)

    # -- bookkeeping ------------------------------------------------------------------------------------

    def _complete(self, batch: Batch) -> None:
        """One iteration is over: its tokens are out."""
        for gap_s, requests in batch.gaps(self.env.now):
            self.recorder.gap((gap_s, 0.0, 1, requests))
        self._count_work(batch, 1, batch.attention_s)
        self._finish(batch, 1)

    def _record_run(self, batch: Batch, run: DecodeRun, start_s: float, steps: int) -> None:
        pool = batch.pools[0]
        for gap_s, requests in pool.gaps(start_s + run.pieces[0].first_s):
            self.recorder.gap((gap_s, 0.0, 1, requests))
        for piece in run.pieces_between(1, steps):
            self.recorder.gap((piece.first_s, piece.growth_s, piece.steps, batch.num_decodes))
        attention_s = self.env.now - start_s - steps * run.constant_s
        self._count_work(batch, steps, attention_s)
        self._finish(batch, steps)
        self._record_stage(batch, 0, start_s, steps)

    def _finish(self, batch: Batch, steps: int) -> None:
        self._in_flight -= 1
        for request in self.scheduler.complete(batch, self.env.now, steps):
            self._on_finish(request)
        if self._on_prefilled is not None:
            prefilled, self.scheduler.prefilled = self.scheduler.prefilled, []
            for request in prefilled:
                self._on_prefilled(request, self)
        if self.on_batch_end is not None:
            self.on_batch_end()

    def _record_stage(self, batch: Batch, stage: int, start_s: float, steps: int = 1) -> None:
        """Note that ``stage`` is through with a batch, after all that its end brings has happened."""
        scheduler = self.scheduler
        self.recorder.batch(
            (
                start_s,
                self.env.now,
                self.index,
                stage,
                batch.id,
                steps,
                len(batch.chunks),
                batch.tokens - batch.num_decodes,
                batch.num_decodes,
                scheduler.waiting,
                scheduler.kv.used_blocks,
            )
        )

    def _count_work(self, batch: Batch, steps: int, attention_s: float) -> None:
        """Add up what the batch computed and read, and how much of its time was extrapolated.

        ``attention_s`` is the attention time of all the steps. With several KVP groups a batch is one step,
        and the times of all groups count.
        """
        work, cost, decodes = self.recorder.work, self.cost, batch.num_decodes
        work.iterations += steps
        work.tokens += batch.tokens * steps
        work.rows += batch.rows * steps
        if decodes:
            # Each step attends to every context and to the new tokens, and contexts grow by one a step.
            seen = steps * (batch.decode_context + decodes) + decodes * (steps * (steps - 1) // 2)
            work.attention_pairs += seen
            work.kv_tokens_read += seen
        for chunk in batch.chunks:
            _, tokens, context = chunk
            work.attention_pairs += tokens * context + tokens * (tokens + 1) // 2
            work.kv_tokens_read += context + tokens
            if cost.chunk_is_extrapolated(tokens, self.scheduler.sharding.in_shard(context)):
                work.extrapolated_s += self.scheduler.attention_s(chunk)
        loads = batch.loads
        if len(loads) > 1:
            self._count_loads(loads)
            return
        shape = batch.tokens, batch.rows, batch.requests
        work.predicted_s += cost.tokens_s(*shape) * steps + attention_s
        work.extrapolated_s += cost.tokens_outside_s(*shape) * steps
        if decodes and cost.decode_is_extrapolated(decodes, batch.decode_context):
            chunks_s = sum(self.scheduler.attention_s(chunk) for chunk in batch.chunks)
            work.extrapolated_s += attention_s - chunks_s

    def _count_loads(self, loads: tuple[Load, ...]) -> None:
        """Add up the predicted times of several KVP groups."""
        work, cost = self.recorder.work, self.cost
        for load in loads:
            if load.requests:
                shape = load.tokens, load.rows, load.requests
                work.predicted_s += cost.tokens_s(*shape) + load.attention_s
                work.extrapolated_s += cost.tokens_outside_s(*shape)
            if load.num_decodes and cost.decode_is_extrapolated(load.num_decodes, load.decode_context):
                work.extrapolated_s += load.decode_attention_s
