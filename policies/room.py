"""The room of a replica: who holds KV blocks and seats, in which KVP groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from policies.kv_cache import GroupedKVCache
from policies.prefix_cache import PrefixCache
from policies.request import Request
from policies.settings import SchedulerSettings
from policies.sharding import Sharding


class Reservation(NamedTuple):
    """KV blocks set aside for a request whose prefill was computed elsewhere."""

    request: Request
    home: int
    shards: int
    blocks: int


class Room:
    """KV blocks and seats; a seat is the right to be one of a group's ``max_batch_requests``.

    Args:
        capacity_tokens: tokens the KV cache of each group holds.
        settings: the policy.
        sharding: the replica's KVP groups.
        prefix_block_tokens: tokens of a block of the requests' ``prefix_ids``; needed for prefix caching.
        hands_over: requests decode elsewhere: here they only prefill.

    Attributes:
        kv: the KV cache, by groups.
        prefixes: the KV cache of the only group, if it keeps prefixes.
        holders: requests that hold KV blocks.
    """

    def __init__(
        self,
        capacity_tokens: int,
        settings: SchedulerSettings,
        sharding: Sharding,
        prefix_block_tokens: int | None,
        hands_over: bool,
    ) -> None:
        self.kv = GroupedKVCache(capacity_tokens, settings.block_tokens, settings.watermark, sharding)
        self.prefixes: PrefixCache | None = None
        if settings.prefix_caching and prefix_block_tokens is not None:
            if sharding.groups > 1:
                raise ValueError("prefixes aren't cached over several KVP groups")
            self.prefixes = PrefixCache(
                capacity_tokens, settings.block_tokens, settings.watermark, prefix_block_tokens
            )
            self.kv.groups[0] = self.prefixes
        self.holders = 0
        self._sharding = sharding
        self._hands_over = hands_over
        self._alone = [(group,) for group in range(sharding.groups)]
        self._most = settings.max_batch_requests
        self._seats = [0] * sharding.groups  # requests that hold KV blocks in a group, or will

    def longest(self, request: Request) -> int:
        """Tokens in the request's KV cache when it leaves: with its last output token, or its first."""
        if self._hands_over:
            return request.prompt_tokens
        return request.prompt_tokens + request.output_tokens - 1

    def fits(self, request: Request) -> bool:
        """Whether the request could ever run here: its longest KV cache within the capacity."""
        return self.kv.fits(0, self.kv.blocks_for(self.longest(request)))

    def shards(self, request: Request) -> int:
        """Groups that the request will have taken when it is finished."""
        return self._sharding.shards(self.longest(request))

    def groups_of(self, request: Request) -> Sequence[int]:
        """Those groups, in the order of its shards."""
        return self._groups_at(request.home, request.shards)

    def _groups_at(self, home: int, shards: int) -> Sequence[int]:
        if shards == 1:
            return self._alone[home]
        return [self._sharding.group(home, shard) for shard in range(shards)]

    def has_seat(self, groups: Sequence[int]) -> bool:
        """Whether another request may hold KV blocks in all the groups."""
        return max([self._seats[group] for group in groups]) < self._most

    def has_blocks(self, request: Request) -> bool:
        """Whether the KV blocks that its prefill needs are free: those of all its groups, since taking them
        bit by bit can end with two requests waiting for each other."""
        if self.prefixes is not None:
            return self.prefixes.can_admit(self.prefixes.new_blocks(request))
        return self.kv.can_admit(request.home, self.kv.blocks_for(request.prefill_tokens))

    def admit(self, request: Request) -> None:
        """Give a request the KV blocks of its prefill, and its seats."""
        request.kv_blocks = self.kv.blocks_for(request.prefill_tokens)
        if self.prefixes is None:
            self.kv.take(request.home, request.kv_blocks)
        else:
            self.prefixes.admit(request)
        self._sit(self.groups_of(request), 1)

    def reserve(self, request: Request) -> Reservation | None:
        """Set KV blocks and seats aside for a request that was prefilled elsewhere, in the groups that have
        most left; None if that can't be now."""
        shards = self.shards(request)
        blocks = self.kv.blocks_for(request.prefill_tokens)
        for home in sorted(range(self._sharding.groups), key=lambda group: self.kv.groups[group].used_blocks):
            groups = self._groups_at(home, shards)
            if self.has_seat(groups) and self.kv.can_admit(home, blocks):
                self.kv.take(home, blocks)
                self._sit(groups, 1)
                return Reservation(request, home, shards, blocks)
        return None

    def give_back(self, request: Request) -> None:
        """Free the KV blocks of a request, and its seats."""
        if self.prefixes is None:
            self.kv.give_back(request.home, request.kv_blocks)
        else:
            self.prefixes.leave(request)
        request.kv_blocks = 0
        self._sit(self.groups_of(request), -1)

    def _sit(self, groups: Sequence[int], requests: int) -> None:
        self.holders += requests
        for group in groups:
            self._seats[group] += requests
