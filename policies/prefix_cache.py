"""A paged KV cache that keeps the blocks of finished requests for the prompts that begin alike.

A *prefix block* is the unit in which a workload says what prompts share: an id stands for so many tokens
together with all that comes before them. It takes a whole number of KV blocks. Requests that hold the same
one count a reference each; the last to leave puts it at the end of a queue of idle blocks, from whose front
blocks are taken when no unused ones are left. Blocks that hold output, or the rest of a prompt that fills no
prefix block, go through the same queue but are never found again. (Rules of vLLM v1's block pool.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from policies.kv_cache import KVCache
from policies.request import Request


class PrefixCache(KVCache):
    """A KV cache with prefix blocks. Idle blocks count as free.

    Args:
        capacity_tokens, block_tokens, watermark: see :class:`KVCache`.
        prefix_block_tokens: tokens of a prefix block, a multiple of ``block_tokens``.

    Attributes:
        looked_up_tokens: tokens of all prefills that were admitted.
        reused_tokens: of them, those that were found and not computed.
    """

    def __init__(
        self, capacity_tokens: int, block_tokens: int, watermark: float, prefix_block_tokens: int
    ) -> None:
        super().__init__(capacity_tokens, block_tokens, watermark)
        if prefix_block_tokens % block_tokens:
            raise ValueError("a prefix block must take whole KV blocks")
        self.prefix_block_tokens = prefix_block_tokens
        self._blocks_each = prefix_block_tokens // block_tokens
        self._holders: dict[int, int] = {}  # id → requests that hold it
        self._idle: OrderedDict[int, int] = OrderedDict()  # id → KV blocks, the longest idle first
        self._idle_blocks = 0
        self._next_nameless = -1  # keys of idle blocks that nobody can find are negative
        self.looked_up_tokens = 0
        self.reused_tokens = 0

    def leading_hits(self, ids: Sequence[int]) -> int:
        """How many of the first ids are here without a gap, idle or held."""
        holders, idle = self._holders, self._idle
        for place, id in enumerate(ids):
            if id not in holders and id not in idle:
                return place
        return len(ids)

    def cached_tokens(self, request: Request) -> int:
        """Leading tokens of its prefill that need not be computed: whole prefix blocks, and never the last
        token, which has to yield the next one."""
        return self._hits(request) * self.prefix_block_tokens

    def new_blocks(self, request: Request) -> int:
        """KV blocks that must be free for the request's prefill: all but those that others hold."""
        ids = request.prefix_ids[: self._hits(request)]
        held = sum(id in self._holders for id in ids)
        return self.blocks_for(request.prefill_tokens) - held * self._blocks_each

    def admit(self, request: Request) -> None:
        """Give the request the KV blocks of its prefill; what it skips is ``cached_tokens``."""
        hits = self._hits(request)
        self.looked_up_tokens += request.prefill_tokens
        self.reused_tokens += hits * self.prefix_block_tokens
        for id in request.prefix_ids[:hits]:
            if id not in self._holders:
                self._idle_blocks -= self._idle.pop(id)
                self.used_blocks += self._blocks_each
            self._holders[id] = self._holders.get(id, 0) + 1
        request.held_prefix = list(request.prefix_ids[:hits])
        request.stored_prefix = hits
        self.take(self.blocks_for(request.prefill_tokens) - hits * self._blocks_each)

    def store(self, request: Request, tokens: int) -> None:
        """The request's first ``tokens`` tokens are in a batch: the prefix blocks that they fill can be
        found from now on. One that somebody else has stored meanwhile stays a copy of its own."""
        full = min(tokens // self.prefix_block_tokens, len(request.prefix_ids))
        for id in request.prefix_ids[request.stored_prefix : full]:
            if id not in self._holders and id not in self._idle:
                self._holders[id] = 1
                request.held_prefix.append(id)
        request.stored_prefix = max(request.stored_prefix, full)

    def leave(self, request: Request) -> None:
        """Let go of all blocks of a request, the end of its sequence first, so that it is lost first."""
        nameless = request.kv_blocks - len(request.held_prefix) * self._blocks_each
        self.give_back(nameless)
        for id in reversed(request.held_prefix):
            self._holders[id] -= 1
            if self._holders[id] == 0:
                del self._holders[id]
                super().give_back(self._blocks_each)
                self._put_idle(id, self._blocks_each)
        request.held_prefix = []
        request.stored_prefix = 0

    def take(self, blocks: int) -> None:
        super().take(blocks)
        over = self.used_blocks + self._idle_blocks - self.capacity_blocks
        while over > 0:
            _, found = self._idle.popitem(last=False)
            self._idle_blocks -= found
            if found > over:  # what is left of it is nobody's any more, and first to go next
                self._put_idle(self._name(), found - over)
                self._idle.move_to_end(self._next_nameless + 1, last=False)
            over -= found

    def give_back(self, blocks: int) -> None:
        super().give_back(blocks)
        if blocks:
            self._put_idle(self._name(), blocks)

    def _hits(self, request: Request) -> int:
        most = (request.prefill_tokens - 1) // self.prefix_block_tokens
        return self.leading_hits(request.prefix_ids[:most])

    def _put_idle(self, key: int, blocks: int) -> None:
        self._idle[key] = blocks
        self._idle_blocks += blocks

    def _name(self) -> int:
        self._next_nameless -= 1
        return self._next_nameless + 1
