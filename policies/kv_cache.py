"""Paged KV-cache accounting: blocks, not contents."""

from __future__ import annotations

from policies.sharding import Sharding


class KVCache:
    """The KV blocks of one KVP group; a replica without KV-cache parallelism is one group.

    Args:
        capacity_tokens: tokens the cache holds; rounded down to whole blocks.
        block_tokens: tokens a block holds.
        watermark: share of the blocks kept free when a request is admitted, so that the running
            requests can grow for a while before somebody is preempted.
    """

    def __init__(self, capacity_tokens: int, block_tokens: int, watermark: float) -> None:
        self.block_tokens = block_tokens
        self.capacity_blocks = capacity_tokens // block_tokens
        self.watermark_blocks = int(watermark * self.capacity_blocks)
        self.used_blocks = 0

    @property
    def free_blocks(self) -> int:
        return self.capacity_blocks - self.used_blocks

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens occupy."""
        return -(-tokens // self.block_tokens)

    def can_admit(self, blocks: int) -> bool:
        """Whether a new request may take ``blocks``; an empty cache admits whatever fits at all."""
        margin = self.watermark_blocks if self.used_blocks else 0
        return blocks + margin <= self.free_blocks

    def take(self, blocks: int) -> None:
        """Occupy ``blocks`` free blocks."""
        if blocks > self.free_blocks:
            raise RuntimeError(f"{blocks} KV blocks asked for, {self.free_blocks} free")
        self.used_blocks += blocks

    def give_back(self, blocks: int) -> None:
        """Free ``blocks`` occupied blocks."""
        if blocks > self.used_blocks:
            raise RuntimeError(f"{blocks} KV blocks given back, {self.used_blocks} in use")
        self.used_blocks -= blocks


class GroupedKVCache:
    """The KV caches of a replica's KVP groups, and how a request's blocks are spread over them.

    A shard holds whole blocks, so how many blocks a request has in each group follows from how many it has.

    Args:
        capacity_tokens: tokens that each group's cache holds.
        block_tokens, watermark: see :class:`KVCache`.
        sharding: the groups; if there are several, their tokens must be a multiple of ``block_tokens``.
    """

    def __init__(
        self, capacity_tokens: int, block_tokens: int, watermark: float, sharding: Sharding | None = None
    ) -> None:
        self.sharding = sharding or Sharding()
        self.block_tokens = block_tokens
        count = self.sharding.groups
        if count > 1 and self.sharding.tokens_per_group % block_tokens:
            raise ValueError("a shard must hold whole blocks")
        self._blocks = Sharding(count, max(self.sharding.tokens_per_group // block_tokens, 1))
        self.groups = [KVCache(capacity_tokens, block_tokens, watermark) for _ in range(count)]

    @property
    def capacity_blocks(self) -> int:
        return sum(cache.capacity_blocks for cache in self.groups)

    @property
    def used_blocks(self) -> int:
        used = 0
        for cache in self.groups:
            used += cache.used_blocks
        return used

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens occupy, in all groups together."""
        return -(-tokens // self.block_tokens)

    def spread(self, home: int, blocks: int) -> list[tuple[KVCache, int]]:
        """How many of a request's first ``blocks`` blocks lie in which cache."""
        if len(self.groups) == 1:
            return [(self.groups[0], blocks)]
        parts = self._blocks
        return [
            (self.groups[parts.group(home, shard)], parts.stored(blocks, shard))
            for shard in range(parts.shards(blocks))
        ]

    def fits(self, home: int, blocks: int) -> bool:
        """Whether the caches, were they empty, could hold a request's ``blocks`` blocks."""
        return all(count <= cache.capacity_blocks for cache, count in self.spread(home, blocks))

    def can_admit(self, home: int, blocks: int) -> bool:
        """Whether a new request may take its ``blocks`` blocks, all of them at once."""
        return all(cache.can_admit(count) for cache, count in self.spread(home, blocks))

    def take(self, home: int, blocks: int) -> None:
        """Occupy a new request's ``blocks`` blocks."""
        for cache, count in self.spread(home, blocks):
            cache.take(count)

    def give_back(self, home: int, blocks: int) -> None:
        """Free all ``blocks`` blocks of a request."""
        for cache, count in self.spread(home, blocks):
            cache.give_back(count)

    def group_of_next(self, home: int, blocks: int) -> int:
        """The group in which a request that has ``blocks`` blocks gets its next one."""
        return self._blocks.group(home, self._blocks.shard_of(blocks))
