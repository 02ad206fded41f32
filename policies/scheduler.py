"""The scheduler of one replica: what the next batch holds.

It is pure: it is told the time, it never asks for it, and it doesn't know whether a simulator or a live
runtime is driving. The driver's side of the conversation is

    add(request)                  a request has been routed here
    next_batch(now)               the first stage is free
    leave_first_stage(batch)      the first stage is done with it
    complete(batch, now)          the last stage is done with it; returns who has finished

Where prefills and decodes run in different places, a request leaves the one scheduler by ``prefilled`` and
``release`` and enters the other by ``expect``, ``reserve`` and ``receive``.
"""

from __future__ import annotations

from collections.abc import Sequence

from policies.batch import Batch, Chunk, Load
from policies.cost import CostModel, JointAttention, PrefillWork
from policies.decode_pool import DecodePool
from policies.lane import Lane
from policies.placement import PendingWork
from policies.priorities import LARS
from policies.queue import Rank
from policies.request import Request
from policies.room import Reservation, Room
from policies.settings import SchedulerSettings, make_chunking, make_priority
from policies.sharding import ShardedCostModel, Sharding, SlowestGroup
from policies.slo import Slo

__all__ = ["Scheduler", "SchedulerSettings"]


class Scheduler:
    """Decodes first, then prefill chunks in priority order (or prefills first, as early vLLM did).

    With KV-cache parallelism the replica's groups step together: a batch holds a load for each of them,
    short requests in their home group alone, a long one in all groups that have a shard of it.

    Args:
        settings: the policy.
        cost: predicts iteration times of one group; used for adaptive chunks and for the work of a prefill.
            A ``ShardedCostModel`` if there are several groups.
        kv_capacity_tokens: tokens the KV cache of each group holds.
        slos: one per SLO class, for the deadlines.
        stages: pipeline stages of the replica.
        sharding: its KVP groups; None is one group.
        prefix_block_tokens: tokens of a block of the requests' ``prefix_ids``; needed for prefix caching.
        hands_over: requests decode elsewhere: here they only prefill.

    Attributes:
        room: the KV blocks and seats, and who holds them.
        outstanding: requests here that haven't finished.
        pending_prefill_tokens: prompt tokens not yet in a batch, over all requests here.
        preemptions: recompute preemptions so far.
        kv, prefixes: the KV cache of the room, by groups; and that of the only one, if it keeps prefixes.
        prefilled: requests whose prefill is complete and that decode elsewhere; the driver takes them out.
            They keep their KV blocks until they are released.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        cost: CostModel,
        kv_capacity_tokens: int,
        *,
        slos: Sequence[Slo] = (Slo(),),
        stages: int = 1,
        sharding: Sharding | None = None,
        prefix_block_tokens: int | None = None,
        hands_over: bool = False,
    ) -> None:
        self.settings = settings
        self._hands_over = hands_over
        self.prefilled: list[Request] = []
        self.slos = slos
        self.sharding = sharding = sharding or Sharding()
        self.room = Room(kv_capacity_tokens, settings, sharding, prefix_block_tokens, hands_over)
        self.kv, self.prefixes = self.room.kv, self.room.prefixes
        self._slowest: SlowestGroup | None = None
        if sharding.groups > 1:
            if not isinstance(cost, ShardedCostModel):
                raise TypeError("several KVP groups need a cost model that knows shards and merges")
            self._slowest = SlowestGroup(cost, sharding)
        self.cost = self._slowest or cost
        knows_joint = isinstance(self.cost, JointAttention) and self.cost.joint_is_known
        self._joint: JointAttention | None = self.cost if knows_joint else None  # type: ignore[assignment]
        self.work = PrefillWork(
            self.cost,
            target_s=settings.target_iteration_s,
            stages=stages if settings.pipeline == "stream" else 1,
            max_chunk_tokens=settings.max_chunk_tokens,
        )
        self.priority = make_priority(settings, self.work)
        self.chunking = make_chunking(settings, self.cost)
        self.outstanding = 0
        self.pending_prefill_tokens = 0
        self.preemptions = 0
        self._lars = LARS(self.work)
        groups = range(sharding.groups)
        self._lanes = [Lane(self.priority, (group,)) for group in groups]
        if sharding.groups > 1:
            self._lanes.append(Lane(self.priority, tuple(groups)))  # of the requests in several shards
        self._placement = PendingWork(sharding)
        self._memory_shut: set[int] = set()  # groups where somebody could not be admitted to the last batch
        self._next_batch_id = 0
        # With asynchronous scheduling, what has happened since the last batch was formed, which the next one
        # can't know: it is planned as that one begins.
        self._unseen: list[Request] = []
        self._leaving: list[Request] = []
        self._news = False  # whether the last batch was formed without something that the next one knows

    @property
    def running(self) -> int:
        """Requests that hold KV blocks: prefilling, decoding or in flight."""
        return self.room.holders

    @property
    def waiting(self) -> int:
        """Requests with prefill left that aren't in flight."""
        waiting = len(self._unseen)
        for lane in self._lanes:
            waiting += len(lane.admitted) + len(lane.unadmitted)
        return waiting

    # -- what the driver calls ------------------------------------------------------------------------

    def fits(self, request: Request) -> bool:
        """Whether the request could ever run here: its longest KV cache within the capacity."""
        return self.room.fits(request)

    def add(self, request: Request) -> None:
        """Take a request in. Its prefill work, its deadline and its home group are set here."""
        request.work_s = self.work.work_s(request.prompt_tokens)
        request.deadline_s = self.slos[request.slo_class].ttft.deadline_s(request.work_s)
        request.shards = self.room.shards(request)
        self._placement.place(request)
        self.outstanding += 1
        self.pending_prefill_tokens += request.remaining_prefill_tokens
        if self.settings.async_scheduling:
            self._unseen.append(request)
        else:
            self._lane_of(request).unadmitted.push(request)

    def next_batch(self, now_s: float) -> Batch | None:
        """The next batch at ``now_s``; None when there is nothing that can run.

        With asynchronous scheduling it is the one that was planned when the batch before it began: of what
        has come and gone since, it knows nothing. If that leaves it nothing to do it is planned now.
        """
        batch = self._form(now_s)
        if self.settings.async_scheduling:
            self._news = self._take_notice()
            if batch is None and self._news:
                batch = self._form(now_s)
        return batch

    def _take_notice(self) -> bool:
        """Let requests in that have arrived, let go of those that have finished; whether there were any."""
        news = bool(self._unseen or self._leaving)
        for request in self._unseen:
            self._lane_of(request).unadmitted.push(request)
        for request in self._leaving:
            self.room.give_back(request)
        self._unseen.clear()
        self._leaving.clear()
        return news

    def _form(self, now_s: float) -> Batch | None:
        batch = Batch(self._next_batch_id, now_s, self.sharding.groups)
        if self.settings.packing == "decode_first":
            self._add_decodes(batch)
            self._add_chunks(batch)
        else:
            self._add_chunks(batch)
            if not batch.chunks:
                self._add_decodes(batch)
        if batch.requests == 0:
            return None
        if self._joint is not None and batch.num_decodes:
            shape = batch.prefill_tokens, batch.num_decodes, batch.decode_context
            batch.take_longer(self._joint.joint_attention_s(*shape, batch.decode_spread()))
        self._next_batch_id += 1
        return batch

    def steady_steps(self, batch: Batch) -> int:
        """For how many steps, this one included, next_batch would return the same decodes and nothing
        else, provided that no request is added and that no other batch is in flight. Always one with
        several KVP groups."""
        if batch.chunks or not batch.pools or self.sharding.groups > 1:
            return 1
        if self._news or not self._stays_shut():
            return 1
        pool = batch.pools[0]
        steps = pool.steps_to_finish()
        if steps == 1:
            return 1
        cache = self.kv.groups[0]
        free = cache.free_blocks + pool.blocks_for(1)  # the first step's blocks are taken already
        return pool.steps_within(free, steps)

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
        for pool in batch.pools:
            if steps > 1:  # the first step's blocks were taken when the batch was formed
                self.kv.groups[0].take(pool.blocks_for(steps) - pool.blocks_for(1))
            lane = self._lane_of(next(iter(pool.members.values())))
            finished += pool.advance(steps, now_s)
            lane.put_back(pool)
        for request, tokens, _ in batch.chunks:
            request.completed_tokens += tokens
            if request.completed_tokens == request.prefill_tokens:
                self._emit_first_token(request, now_s, finished)
        if self.settings.pipeline == "microbatch":
            self._requeue(batch)
        if self.settings.async_scheduling:
            self._leaving += finished
        else:
            for request in finished:
                self.room.give_back(request)
        self.outstanding -= len(finished)
        return finished

    # -- hand-over ------------------------------------------------------------------------------------

    def release(self, request: Request) -> None:
        """A request from ``prefilled`` has left: its KV cache has been copied elsewhere."""
        self.room.give_back(request)
        self.outstanding -= 1

    def expect(self) -> None:
        """A request will come that has been prefilled elsewhere."""
        self.outstanding += 1

    def reserve(self, request: Request) -> Reservation | None:
        """Set KV blocks and a seat aside for a request that was prefilled elsewhere; None if that can't be
        now. Requests of this replica that have lost their blocks go first."""
        for lane in self._lanes:
            if len(lane.unadmitted):
                return None
        return self.room.reserve(request)

    def receive(self, reservation: Reservation) -> None:
        """The KV cache of a request has arrived, and nobody else holds it: it decodes from here on."""
        request = reservation.request
        request.home, request.shards, request.kv_blocks = reservation[1:]
        self._lane_of(request).decode(request, self.kv.block_tokens)

    def attention_s(self, chunk: Chunk) -> float:
        """Predicted attention time of a chunk, added up over the groups that take part in it."""
        if self._slowest is None:
            return self.cost.chunk_attention_s(chunk.tokens, chunk.context)
        return sum(self._slowest.by_shard_s(chunk.tokens, chunk.context))

    def cached_tokens(self, request: Request) -> int:
        """Leading tokens of a prompt that are in the KV cache now; 0 if it keeps no prefixes."""
        return 0 if self.prefixes is None else self.prefixes.cached_tokens(request)

    @property
    def kv_tokens_in_use(self) -> int:
        """Tokens of the KV blocks that requests hold here."""
        return self.kv.used_blocks * self.kv.block_tokens

    # -- groups -----------------------------------------------------------------------------------------

    def _lane_of(self, request: Request) -> Lane:
        """Where the request waits and decodes."""
        return self._lanes[request.home if request.shards == 1 else -1]

    # -- decodes ----------------------------------------------------------------------------------------

    def _add_decodes(self, batch: Batch) -> None:
        for lane in self._lanes:
            pool = lane.ready
            if pool and self._grow(lane, pool):
                lane.ready = None
                if self._slowest is None:
                    attention_s = self.cost.decode_attention_s(len(pool.members), pool.total_context)
                    batch.add_decodes(pool, attention_s)
                else:
                    batch.add_decodes(pool, 0.0)
        if self._slowest is not None:
            self._slowest.load_decodes(batch)

    def _grow(self, lane: Lane, pool: DecodePool) -> bool:
        """Take the KV blocks of the pool's next step, from others if need be. False if it can't step: all
        the other blocks belong to batches in flight, or all its members had to give theirs up."""
        caches = self.kv.groups
        if len(lane.groups) == 1:  # what follows, for the case that is almost always there
            cache, blocks = caches[lane.groups[0]], pool.blocks_for(1)
            if blocks <= cache.free_blocks:
                cache.take(blocks)
                return True
        while True:
            needs = self._blocks_needed(lane, pool)
            for group, blocks in needs:
                if blocks > caches[group].free_blocks:
                    break
            else:
                break  # nobody is short
            if not self._preempt_one(group):
                return False
        if not pool.members:
            return False
        for group, blocks in needs:
            caches[group].take(blocks)
        return True

    def _blocks_needed(self, lane: Lane, pool: DecodePool) -> list[tuple[int, int]]:
        """(group, blocks) of the pool's next step."""
        if len(lane.groups) == 1:
            return [(lane.groups[0], pool.blocks_for(1))]
        needs = dict.fromkeys(lane.groups, 0)
        for request in pool.members.values():
            blocks, rest = divmod(request.kv_tokens, self.kv.block_tokens)
            if rest == 0:
                needs[self.kv.group_of_next(request.home, blocks)] += 1
        return list(needs.items())

    def _emit_first_token(self, request: Request, now_s: float, finished: list[Request]) -> None:
        """The prefill is complete: a token is out, and the request is done or decodes from here on."""
        self._placement.prefilled(request)
        request.generated_tokens += 1
        if request.first_token_s != request.first_token_s:  # NaN: none before
            request.first_token_s = now_s
        request.last_token_s = now_s
        if request.generated_tokens == request.output_tokens:
            finished.append(request)
        elif self._hands_over:
            self.prefilled.append(request)
        else:
            self._lane_of(request).decode(request, self.kv.block_tokens)

    def _preempt_one(self, group: int) -> bool:
        """Free the KV blocks of the request that arrived last, of those in ``group`` that aren't in flight;
        its tokens so far will be recomputed. False when there is none."""
        candidates = [
            request
            for lane in self._lanes
            if group in lane.groups
            for request in lane.preemptable()
            if len(lane.groups) == 1 or group in self.room.groups_of(request)
        ]
        if not candidates:
            return False
        victim = max(candidates, key=lambda r: (r.arrival_s, r.id))
        self.pending_prefill_tokens -= victim.remaining_prefill_tokens
        lane = self._lane_of(victim)
        if victim.pool is not None:
            victim.pool.remove(victim)
        else:
            lane.admitted.remove(victim)
            self._placement.prefilled(victim)
        self.room.give_back(victim)
        victim.prefill_tokens = victim.prompt_tokens + victim.generated_tokens
        victim.scheduled_tokens = victim.completed_tokens = 0
        victim.preemptions += 1
        self.preemptions += 1
        self.pending_prefill_tokens += victim.prefill_tokens
        self._placement.recompute(victim)
        lane.unadmitted.push(victim)
        return True

    # -- prefills ---------------------------------------------------------------------------------------

    def _add_chunks(self, batch: Batch) -> None:
        """Fill the batch with chunks in priority order.

        KV blocks are granted in that order too: once a request could not be admitted, nobody behind it
        in its groups is, or short prompts would starve a long one of memory. With ``admission: pass_over``
        they are tried nevertheless.
        """
        self._memory_shut.clear()
        lanes = [lane for lane in self._lanes if lane.admitted or lane.unadmitted]
        if not lanes:
            return
        passed: list[Request] = []
        sharing: set[int] = set()  # groups in which a long request shares the iteration with short ones
        for lane in lanes:
            lane.skips = 0
        while (found := self._pop_first(lanes, batch)) is not None:
            lane, request = found
            if not self._add_chunk(request, batch, sharing):
                passed.append(request)
                lane.skips += 1
        for request in passed:
            lane = self._lane_of(request)
            (lane.admitted if request.kv_blocks else lane.unadmitted).push(request)

    def _is_open(self, lane: Lane, batch: Batch) -> bool:
        """Whether another request of the lane should be tried."""
        if lane.skips >= self.settings.max_skips:
            return False
        is_full, loads = self.chunking.is_full, batch.loads
        if len(lane.groups) == 1:
            return not is_full(loads[lane.groups[0]])
        return not all(is_full(loads[group]) for group in lane.groups)

    def _pop_first(self, lanes: list[Lane], batch: Batch) -> tuple[Lane, Request] | None:
        """The first waiting prefill that should be tried; where memory is shut, only of those that hold KV
        blocks."""
        now_s, shut_groups = batch.formed_s, self._memory_shut
        best: Rank | None = None
        first: Lane | None = None
        for lane in lanes:
            if not self._is_open(lane, batch):
                continue
            shut = bool(shut_groups) and not shut_groups.isdisjoint(lane.groups)
            rank = lane.first(now_s, admitted_only=shut)
            if rank is not None and (best is None or rank < best):
                best, first = rank, lane
        if first is None:
            return None
        request = first.pop(now_s)
        return first, request

    def _add_chunk(self, request: Request, batch: Batch, sharing: set[int]) -> bool:
        """Add a chunk of ``request`` if one fits."""
        is_long = self.settings.space_sharing and request.prefill_tokens >= self.settings.long_request_tokens
        groups = self._groups_of_chunk(request)
        if is_long and not sharing.isdisjoint(groups):
            return False
        if not self._may_run(request):
            return False
        if self.prefixes is not None and not request.kv_blocks:
            self._skip_to(request, self.prefixes.cached_tokens(request))
            groups = self._groups_of_chunk(request)
        loads = [batch.loads[group] for group in groups]
        yield_fraction = self._yield_fraction(request, batch, is_long)
        if len(loads) == 1:
            tokens = self.chunking.chunk_tokens(request, loads[0], yield_fraction)
        elif any(self.chunking.is_full(load) for load in loads):
            return False
        else:
            tokens = min(self.chunking.chunk_tokens(request, load, yield_fraction) for load in loads)
        if tokens == 0:
            if not request.kv_blocks:
                self._skip_to(request, 0)
            return False
        if is_long:
            sharing.update(groups)
        self._schedule(request, tokens, batch, loads)
        return True

    def _groups_of_chunk(self, request: Request) -> Sequence[int]:
        """The groups that the request's next chunk involves, in the order of its shards."""
        if request.shards == 1:
            return self._lanes[request.home].groups
        sharding = self.sharding
        last = sharding.shard_of(request.scheduled_tokens)
        return [sharding.group(request.home, shard) for shard in range(last + 1)]

    def _may_run(self, request: Request) -> bool:
        """Whether the request holds its KV blocks or could be given them now."""
        if request.kv_blocks:
            return True
        groups = self.room.groups_of(request)
        if self._memory_shut and not self._memory_shut.isdisjoint(groups):
            return False
        if self.room.has_seat(groups) and self.room.has_blocks(request):
            return True
        if self.settings.admission == "in_order":
            self._memory_shut.update(groups)
        return False

    def _skip_to(self, request: Request, tokens: int) -> None:
        """The first ``tokens`` tokens of a request not admitted yet are in the cache, it seems."""
        self.pending_prefill_tokens -= tokens - request.scheduled_tokens
        request.scheduled_tokens = request.completed_tokens = tokens

    def _yield_fraction(self, request: Request, batch: Batch, is_long: bool) -> float:
        """Space sharing: a long request leaves the share ρ of the iteration to short ones."""
        if not is_long:
            return 0.0
        slack = self._lars.relative_slack(request, batch.formed_s)
        return min(max(slack, 0.0), self.settings.max_yield_fraction)

    def _schedule(self, request: Request, tokens: int, batch: Batch, loads: Sequence[Load]) -> None:
        if request.kv_blocks == 0:
            self.room.admit(request)
            if request.scheduled_s != request.scheduled_s:  # NaN: never before
                request.scheduled_s = batch.formed_s
        context = request.scheduled_tokens
        if self._slowest is None:
            attention_s = self.cost.chunk_attention_s(tokens, context)
            batch.add_chunk(Chunk(request, tokens, context), attention_s)
        else:
            left = self.sharding.left_in_shard(context)
            tokens = tokens if left is None else min(tokens, left)
            chunk = Chunk(request, tokens, context)
            batch.add_chunk(chunk, 0.0)
            by_shard_s = self._slowest.by_shard_s(tokens, context)
            for shard, (load, attention_s) in enumerate(zip(loads, by_shard_s, strict=True)):
                load.count_chunk(tokens, chunk.is_last and shard == 0, attention_s)
        request.scheduled_tokens += tokens
        self.pending_prefill_tokens -= tokens
        if self.prefixes is not None:
            self.prefixes.store(request, request.scheduled_tokens)

    def _requeue(self, batch: Batch) -> None:
        for request, _, _ in batch.chunks:
            if request.scheduled_tokens < request.prefill_tokens:
                self._lane_of(request).admitted.push(request)

    def _stays_shut(self) -> bool:
        """Whether no waiting prefill can enter a batch before a request finishes, is added, or frees memory.

        With all seats taken nobody can. Short of KV blocks, the same request stays first and stays out
        only if the order doesn't change with time.
        """
        lane = self._lanes[0]
        if len(lane.admitted):
            return False
        if len(lane.unadmitted) == 0:
            return True
        if not self._memory_shut:
            return False
        return not self.room.has_seat((0,)) or self.priority.static
