"""The scheduler of one replica: what the next batch holds.

It is pure: it is told the time, it never asks for it, and it doesn't know whether a simulator or a live
runtime is driving. The driver's side of the conversation is

    add(request)                  a request has been routed here
    next_batch(now)               the first stage is free
    leave_first_stage(batch)      the first stage is done with it
    complete(batch, now)          the last stage is done with it; returns who has finished
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from policies.batch import Batch, Chunk
from policies.chunking import AdaptiveChunks, Chunking, StaticChunks, WholePrompts
from policies.cost import CostModel, PrefillWork
from policies.decode_pool import DecodePool
from policies.kv_cache import KVCache
from policies.priorities import LARS, Priority, find_priority
from policies.queue import make_queue
from policies.request import Request
from policies.slo import Slo


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Everything about scheduling that a configuration can say; DESIGN.md section 9 has the meanings."""

    priority: str = "fcfs"
    chunking: Literal["whole", "static", "adaptive"] = "static"
    chunk_tokens: int = 512
    packing: Literal["decode_first", "prefill_first"] = "decode_first"
    pipeline: Literal["stream", "microbatch"] = "stream"
    max_batch_requests: int = 256
    max_batch_tokens: int = 8192
    max_chunk_tokens: int = 4096
    target_iteration_s: float = 0.05
    space_sharing: bool = False
    lars_normalization: Literal["work", "deadline"] = "work"
    long_request_tokens: int = 262144
    max_yield_fraction: float = 0.4
    max_skips: int = 10
    block_tokens: int = 16
    watermark: float = 0.01


class Scheduler:
    """Decodes first, then prefill chunks in priority order (or prefills first, as early vLLM did).

    Args:
        settings: the policy.
        cost: predicts iteration times; used for adaptive chunks and for the work of a prefill.
        kv_capacity_tokens: tokens the replica's KV cache holds.
        slos: one per SLO class, for the deadlines.
        stages: pipeline stages of the replica.

    Attributes:
        running: requests that hold KV blocks: prefilling, decoding or in flight.
        outstanding: requests here that haven't finished.
        pending_prefill_tokens: prompt tokens not yet in a batch, over all requests here.
        preemptions: recompute preemptions so far.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        cost: CostModel,
        kv_capacity_tokens: int,
        *,
        slos: Sequence[Slo] = (Slo(),),
        stages: int = 1,
    ) -> None:
        self.settings = settings
        self.cost = cost
        self.slos = slos
        self.kv = KVCache(kv_capacity_tokens, settings.block_tokens, settings.watermark)
        self.work = PrefillWork(
            cost,
            target_s=settings.target_iteration_s,
            stages=stages if settings.pipeline == "stream" else 1,
            max_chunk_tokens=settings.max_chunk_tokens,
        )
        self.priority = make_priority(settings, self.work)
        # One order, two queues: who holds KV blocks can go on when nobody new can be admitted.
        self._admitted = make_queue(self.priority)
        self._unadmitted = make_queue(self.priority)
        self.chunking = make_chunking(settings, cost)
        self.running = 0
        self.outstanding = 0
        self.pending_prefill_tokens = 0
        self.preemptions = 0
        self._lars = LARS(self.work)
        self._ready: DecodePool | None = None  # decodes that aren't in flight
        self._memory_shut = False  # in the last batch somebody could not be admitted
        self._next_batch_id = 0

    @property
    def waiting(self) -> int:
        """Requests with prefill left that aren't in flight."""
        return len(self._admitted) + len(self._unadmitted)

    # -- what the driver calls ------------------------------------------------------------------------

    def fits(self, request: Request) -> bool:
        """Whether the request could ever run here: its longest KV cache within the capacity."""
        longest = request.prompt_tokens + request.output_tokens - 1
        return self.kv.blocks_for(longest) <= self.kv.capacity_blocks

    def add(self, request: Request) -> None:
        """Take a request in. Its prefill work and its deadline are set here."""
        request.work_s = self.work.work_s(request.prompt_tokens)
        request.deadline_s = self.slos[request.slo_class].ttft.deadline_s(request.work_s)
        self.outstanding += 1
        self.pending_prefill_tokens += request.remaining_prefill_tokens
        self._unadmitted.push(request)

    def next_batch(self, now_s: float) -> Batch | None:
        """The next batch at ``now_s``; None when there is nothing that can run."""
        batch = Batch(self._next_batch_id, now_s)
        if self.settings.packing == "decode_first":
            self._add_decodes(batch)
            self._add_chunks(batch)
        else:
            self._add_chunks(batch)
            if not batch.chunks:
                self._add_decodes(batch)
        if batch.requests == 0:
            return None
        self._next_batch_id += 1
        return batch

    def steady_steps(self, batch: Batch) -> int:
        """For how many steps, this one included, next_batch would return the same decodes and nothing
        else, provided that no request is added and that no other batch is in flight."""
        pool = batch.pool
        if batch.chunks or pool is None or not self._stays_shut():
            return 1
        steps = pool.steps_to_finish()
        if steps == 1:
            return 1
        free = self.kv.free_blocks + pool.blocks_for(1)  # the first step's blocks are taken already
        if len(pool) * (steps // self.kv.block_tokens + 1) <= free or pool.blocks_for(steps) <= free:
            return steps
        low, high = 1, steps  # `low` steps fit, `high` don't
        while high - low > 1:
            middle = (low + high) // 2
            if pool.blocks_for(middle) <= free:
                low = middle
            else:
                high = middle
        return low

    def leave_first_stage(self, batch: Batch) -> None:
        """The first stage is free of ``batch``: with stream pipelining, the next chunks of its prefills
        may follow at once."""
        if self.settings.pipeline == "stream":
            self._requeue(batch)

    def complete(self, batch: Batch, now_s: float, steps: int = 1) -> list[Request]:
        """The batch has left the last stage, after ``steps`` identical decode steps.

        Returns the requests that finished with it; their last token is out at ``now_s``.
        """
        finished: list[Request] = []
        pool = batch.pool
        if pool is not None:
            if steps > 1:  # the first step's blocks were taken when the batch was formed
                self.kv.take(pool.blocks_for(steps) - pool.blocks_for(1))
            finished = pool.advance(steps, now_s)
            self._return_pool(pool)
        for request, tokens, _ in batch.chunks:
            request.completed_tokens += tokens
            if request.completed_tokens == request.prefill_tokens:
                self._emit_first_token(request, now_s, finished)
        if self.settings.pipeline == "microbatch":
            self._requeue(batch)
        for request in finished:
            self.kv.give_back(request.kv_blocks)
            request.kv_blocks = 0
        self.running -= len(finished)
        self.outstanding -= len(finished)
        return finished

    # -- decodes ----------------------------------------------------------------------------------------

    def _add_decodes(self, batch: Batch) -> None:
        pool = self._ready
        if not pool:
            return
        blocks = pool.blocks_for(1)
        while blocks > self.kv.free_blocks:
            if not self._preempt_one():
                return  # all the other blocks belong to batches in flight
            blocks = pool.blocks_for(1)
        if pool.members:
            self.kv.take(blocks)
            self._ready = None
            batch.add_decodes(pool, self.cost.decode_attention_s(len(pool.members), pool.total_context))

    def _return_pool(self, pool: DecodePool) -> None:
        """Make the decodes of a completed batch ready again, the smaller pool joining the larger."""
        if self._ready is None:
            self._ready = pool
        elif len(pool) > len(self._ready):
            pool.absorb(self._ready)
            self._ready = pool
        else:
            self._ready.absorb(pool)

    def _emit_first_token(self, request: Request, now_s: float, finished: list[Request]) -> None:
        """The prefill is complete: a token is out, and the request is done or decodes from here on."""
        request.generated_tokens += 1
        if request.first_token_s != request.first_token_s:  # NaN: none before
            request.first_token_s = now_s
        request.last_token_s = now_s
        if request.generated_tokens == request.output_tokens:
            finished.append(request)
            return
        if self._ready is None:
            self._ready = DecodePool(self.kv.block_tokens)
        self._ready.add(request)

    def _preempt_one(self) -> bool:
        """Free the KV blocks of the request that arrived last, of those not in flight; its tokens so far
        will be recomputed. False when there is none."""
        candidates = [r for r in self._admitted.requests() if r.scheduled_tokens == r.completed_tokens]
        if self._ready is not None:
            candidates.extend(self._ready.members.values())
        if not candidates:
            return False
        victim = max(candidates, key=lambda r: (r.arrival_s, r.id))
        self.pending_prefill_tokens -= victim.remaining_prefill_tokens
        if victim.pool is not None:
            victim.pool.remove(victim)
        else:
            self._admitted.remove(victim)
        self.kv.give_back(victim.kv_blocks)
        victim.kv_blocks = 0
        victim.prefill_tokens = victim.prompt_tokens + victim.generated_tokens
        victim.scheduled_tokens = victim.completed_tokens = 0
        victim.preemptions += 1
        self.preemptions += 1
        self.running -= 1
        self.pending_prefill_tokens += victim.prefill_tokens
        self._unadmitted.push(victim)
        return True

    # -- prefills ---------------------------------------------------------------------------------------

    def _add_chunks(self, batch: Batch) -> None:
        """Fill the batch with chunks in priority order.

        KV blocks are granted in that order too: once a request could not be admitted, nobody behind it
        is, or short prompts would starve a long one of memory.
        """
        self._memory_shut = False
        passed: list[Request] = []
        has_long = False
        while len(passed) < self.settings.max_skips and not self.chunking.is_full(batch):
            request = self._pop_first(batch.formed_s)
            if request is None:
                break
            is_long = (
                self.settings.space_sharing and request.prefill_tokens >= self.settings.long_request_tokens
            )
            if (is_long and has_long) or not self._may_run(request):
                passed.append(request)
                continue
            tokens = self.chunking.chunk_tokens(request, batch, self._yield_fraction(request, batch, is_long))
            if tokens == 0:
                passed.append(request)
                continue
            has_long = has_long or is_long
            self._schedule(request, tokens, batch)
        for request in passed:
            (self._admitted if request.kv_blocks else self._unadmitted).push(request)

    def _pop_first(self, now_s: float) -> Request | None:
        """The first waiting prefill; only of those that hold KV blocks, once memory is shut."""
        if self._memory_shut:
            return self._admitted.pop(now_s)
        held, new = self._admitted.peek(now_s), self._unadmitted.peek(now_s)
        if held is None or (new is not None and new < held):
            return self._unadmitted.pop(now_s)
        return self._admitted.pop(now_s)

    def _may_run(self, request: Request) -> bool:
        """Whether the request holds its KV blocks or could be given them now."""
        if request.kv_blocks:
            return True
        has_seat = self.running < self.settings.max_batch_requests
        self._memory_shut = not (has_seat and self.kv.can_admit(self.kv.blocks_for(request.prefill_tokens)))
        return not self._memory_shut

    def _yield_fraction(self, request: Request, batch: Batch, is_long: bool) -> float:
        """Space sharing: a long request leaves the share ρ of the iteration to short ones."""
        if not is_long:
            return 0.0
        slack = self._lars.relative_slack(request, batch.formed_s)
        return min(max(slack, 0.0), self.settings.max_yield_fraction)

    def _schedule(self, request: Request, tokens: int, batch: Batch) -> None:
        if request.kv_blocks == 0:
            request.kv_blocks = self.kv.blocks_for(request.prefill_tokens)
            self.kv.take(request.kv_blocks)
            self.running += 1
            if request.scheduled_s != request.scheduled_s:  # NaN: never before
                request.scheduled_s = batch.formed_s
        context = request.scheduled_tokens
        batch.add_chunk(Chunk(request, tokens, context), self.cost.chunk_attention_s(tokens, context))
        request.scheduled_tokens += tokens
        self.pending_prefill_tokens -= tokens

    def _requeue(self, batch: Batch) -> None:
        for request, _, _ in batch.chunks:
            if request.scheduled_tokens < request.prefill_tokens:
                self._admitted.push(request)

    def _stays_shut(self) -> bool:
        """Whether no waiting prefill can enter a batch before a request finishes, is added, or frees memory.

        With all seats taken nobody can. Short of KV blocks, the same request stays first and stays out
        only if the order doesn't change with time.
        """
        if len(self._admitted):
            return False
        if len(self._unadmitted) == 0:
            return True
        if not self._memory_shut:
            return False
        return self.running >= self.settings.max_batch_requests or self.priority.static


def make_priority(settings: SchedulerSettings, work: PrefillWork) -> Priority:
    """The priority that ``settings`` names."""
    kind = find_priority(settings.priority)
    if issubclass(kind, LARS):
        return kind(work, settings.lars_normalization)
    return kind(work)


def make_chunking(settings: SchedulerSettings, cost: CostModel) -> Chunking:
    """The chunking that ``settings`` names."""
    if settings.chunking == "whole":
        return WholePrompts(settings.max_batch_tokens)
    if settings.chunking == "static":
        return StaticChunks(settings.chunk_tokens)
    return AdaptiveChunks(
        cost,
        target_s=settings.target_iteration_s,
        max_chunk_tokens=settings.max_chunk_tokens,
        max_batch_tokens=settings.max_batch_tokens,
    )
