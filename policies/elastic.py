"""Elastic context parallelism, as in LoongServe (arXiv 2404.09526): how many instances a prefill gets.

A pool of like instances, each with all the weights, prefills whole prompts first come, first served. Every
batch gets a group of instances, which share its tokens as the ranks of a ring; it holds them to the end.
Decodes run elsewhere. Some instances can be kept for short prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from policies.batch import Batch, Chunk
from policies.cost import CostModel
from policies.kv_cache import KVCache
from policies.request import Request
from policies.settings import SchedulerSettings
from policies.slo import Slo


@dataclass(frozen=True, slots=True)
class ElasticSettings:
    """What a configuration can say about an elastic pool; docs/configuration.md has the meanings."""

    max_cp: int = 4
    reserved_replicas: int = 0
    reserved_below_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class Group:
    """Instances that prefill a batch together, and how long they are predicted to take."""

    batch: Batch
    instances: tuple[int, ...]
    cost: CostModel
    seconds: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """Instances for a batch, and when it would begin and end on them."""

    end_s: float
    begin_s: float
    instances: tuple[int, ...]
    cost: CostModel


class ElasticScheduler:
    """The scheduler of a pool of instances. Like :class:`~policies.scheduler.Scheduler` it is told the time.

    A batch is the requests that have waited longest, up to ``max_batch_tokens`` tokens; a longer prompt
    goes alone. It gets the instances with which it is predicted to *end* first, waiting for busy ones
    included: two instances now may be later than four in a moment. While the first in line waits, nobody
    overtakes it, but for short prompts on the instances that are kept for them.

    Args:
        elastic: how many instances a batch may have, and how many are kept for whom.
        settings: batch sizes and KV blocks.
        costs: by number of ranks, from 1 to ``max_cp``: of a group within a node, and of one across nodes.
        nodes: the node of each instance.
        kv_capacity_tokens: tokens that the KV cache of each instance holds.
        slos: one per SLO class, for the deadlines.

    Attributes:
        outstanding: requests here that haven't finished or been handed over.
        pending_prefill_tokens: prompt tokens not yet in a batch.
        prefilled: requests whose prefill is complete, and that decode elsewhere; the driver takes them out.
        caches: KV blocks of each instance.
    """

    def __init__(
        self,
        elastic: ElasticSettings,
        settings: SchedulerSettings,
        costs: Sequence[tuple[CostModel, CostModel]],
        nodes: Sequence[int],
        kv_capacity_tokens: int,
        *,
        slos: Sequence[Slo] = (Slo(),),
    ) -> None:
        self.elastic, self.settings, self.slos = elastic, settings, slos
        self._costs, self._nodes = costs, nodes
        self.caches = [
            KVCache(kv_capacity_tokens, settings.block_tokens, settings.watermark) for _ in range(len(nodes))
        ]
        self._free_at_s = [0.0] * len(nodes)  # when each instance ends its prefill, as predicted
        self._busy = [False] * len(nodes)
        border = len(nodes) - elastic.reserved_replicas
        self._general, self._reserved = tuple(range(border)), tuple(range(border, len(nodes)))
        self._long: deque[Request] = deque()
        self._short: deque[Request] = deque()  # in use only where instances are kept for short prompts
        self._held: dict[int, tuple[tuple[int, ...], int]] = {}  # id → instances, and blocks on each of them
        self.prefilled: list[Request] = []
        self.outstanding = 0
        self.pending_prefill_tokens = 0
        self._next_id = 0

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._long) + len(self._short)

    @property
    def kv_tokens_in_use(self) -> int:
        """Tokens of the KV blocks that requests hold, on all instances."""
        return sum(cache.used_blocks * cache.block_tokens for cache in self.caches)

    def cached_tokens(self, request: Request) -> int:
        """No prefixes are kept."""
        return 0

    def fits(self, request: Request) -> bool:
        """Whether the most instances that it could get would hold its prompt."""
        ranks = min(self.elastic.max_cp, len(self._general))
        return self._blocks_each([request], ranks) <= self.caches[0].capacity_blocks

    def add(self, request: Request) -> None:
        """Take a request in. Its prefill work, the shortest there is, and its deadline are set here."""
        request.work_s = min(
            self._seconds(cost, [request]) for cost, _ in self._costs[: max(len(self._general), 1)]
        )
        request.deadline_s = self.slos[request.slo_class].ttft.deadline_s(request.work_s)
        self.outstanding += 1
        self.pending_prefill_tokens += request.prefill_tokens
        is_short = self._reserved and request.prompt_tokens < self.elastic.reserved_below_tokens
        (self._short if is_short else self._long).append(request)

    def next_group(self, now_s: float) -> Group | None:
        """A batch that can begin at ``now_s``, on idle instances; None if there is none."""
        for queue, instances in ((self._short, self._reserved), (self._first_queue(), self._general)):
            group = self._form(queue, instances, now_s) if queue and instances else None
            if group is not None:
                return group
        return None

    def complete(self, group: Group, now_s: float) -> list[Request]:
        """The group is through: its first tokens are out. Returns who has finished with that; the others are
        in ``prefilled`` and keep their KV blocks here until they are released."""
        finished = []
        for instance in group.instances:
            self._busy[instance] = False
        for request, tokens, _ in group.batch.chunks:
            request.completed_tokens += tokens
            request.generated_tokens += 1
            request.first_token_s = request.last_token_s = now_s
            if request.generated_tokens == request.output_tokens:
                self.release(request)
                finished.append(request)
            else:
                self.prefilled.append(request)
        return finished

    def release(self, request: Request) -> None:
        """The request has left: free its KV blocks."""
        instances, blocks = self._held.pop(request.id)
        for instance in instances:
            self.caches[instance].give_back(blocks)
        self.outstanding -= 1

    def instances_of(self, request: Request) -> tuple[int, ...]:
        """The instances that hold the request's KV cache, in equal parts."""
        return self._held[request.id][0]

    # -- forming a group --------------------------------------------------------------------------------

    def _first_queue(self) -> deque[Request]:
        """The queue whose first request has waited longest."""
        queues = [queue for queue in (self._long, self._short) if queue]
        return min(queues, key=lambda queue: (queue[0].arrival_s, queue[0].id), default=self._long)

    def _form(self, queue: deque[Request], instances: Sequence[int], now_s: float) -> Group | None:
        requests = self._batch_of(queue, min(self.elastic.max_cp, len(instances)))
        plan = self._best_plan(requests, instances, now_s)
        if plan is None or plan.begin_s > now_s:
            return None
        batch = Batch(self._next_id, now_s)
        self._next_id += 1
        blocks_of = {request.id: self._blocks_each([request], len(plan.instances)) for request in requests}
        for request in requests:
            queue.popleft()
            self.pending_prefill_tokens -= request.prefill_tokens
            request.scheduled_tokens = request.prefill_tokens
            request.scheduled_s = now_s
            tokens = request.prefill_tokens
            batch.add_chunk(Chunk(request, tokens, 0), plan.cost.chunk_attention_s(tokens, 0))
            self._held[request.id] = plan.instances, blocks_of[request.id]
        for instance in plan.instances:
            self.caches[instance].take(sum(blocks_of.values()))
            self._busy[instance] = True
            self._free_at_s[instance] = plan.end_s
        return Group(batch, plan.instances, plan.cost, plan.end_s - now_s)

    def _batch_of(self, queue: deque[Request], most: int) -> list[Request]:
        """The first in line, and those behind it that the batch has room for; together they have to fit the
        memory of ``most`` idle instances, or they would wait for ever."""
        requests = [queue[0]]
        tokens, blocks = queue[0].prefill_tokens, self._blocks_each(requests, most)
        for request in islice(queue, 1, self.settings.max_batch_requests):
            tokens += request.prefill_tokens
            blocks += self._blocks_each([request], most)
            if tokens > self.settings.max_batch_tokens or blocks > self.caches[0].capacity_blocks:
                break
            requests.append(request)
        return requests

    def _best_plan(self, requests: Sequence[Request], instances: Sequence[int], now_s: float) -> _Plan | None:
        """The earliest end, of equal ones with the fewest instances; None if no group has the memory."""
        best: _Plan | None = None
        for ranks in range(1, min(self.elastic.max_cp, len(instances)) + 1):
            blocks = self._blocks_each(requests, ranks)
            able = [i for i in instances if self.caches[i].can_admit(blocks)]
            able.sort(key=lambda i: (self._begin_s(i, now_s), i))
            within = {self._nodes[i]: [j for j in able if self._nodes[j] == self._nodes[i]] for i in able}
            for members in (*within.values(), able):
                plan = self._plan(requests, tuple(members[:ranks]), now_s) if len(members) >= ranks else None
                if plan is not None and (best is None or plan.end_s < best.end_s):
                    best = plan
        return best

    def _plan(self, requests: Sequence[Request], instances: tuple[int, ...], now_s: float) -> _Plan:
        begin_s = max(self._begin_s(instance, now_s) for instance in instances)
        crosses = len({self._nodes[instance] for instance in instances}) > 1
        cost = self._costs[len(instances) - 1][crosses]
        return _Plan(begin_s + self._seconds(cost, requests), begin_s, tuple(sorted(instances)), cost)

    def _begin_s(self, instance: int, now_s: float) -> float:
        """When an instance could begin: a busy one later than now, however late it is."""
        if not self._busy[instance]:
            return now_s
        return max(self._free_at_s[instance], now_s + 1e-9)

    def _blocks_each(self, requests: Sequence[Request], ranks: int) -> int:
        """KV blocks that each of ``ranks`` instances needs."""
        return sum(self.caches[0].blocks_for(-(-request.prefill_tokens // ranks)) for request in requests)

    @staticmethod
    def _seconds(cost: CostModel, requests: Sequence[Request]) -> float:
        count = len(requests)
        tokens = [request.prefill_tokens for request in requests]
        attention_s = sum(cost.chunk_attention_s(each, 0) for each in tokens)
        return cost.tokens_s(sum(tokens), count, count) + attention_s
