"""KV-cache parallelism: how the KV cache of one request is cut along the sequence over KVP groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from policies.batch import Batch, Load
from policies.cost import CostModel


@dataclass(frozen=True, slots=True)
class Sharding:
    """Shard i of a request holds its tokens from i · ``tokens_per_group`` on and lies in the i-th group after
    its *home*, so that groups join one after the other as the request grows; the last shard has no end
    (arXiv 2409.17264)."""

    groups: int = 1
    tokens_per_group: int = 524288

    def shard_of(self, position: int) -> int:
        """The shard that holds the token at ``position``."""
        return min(position // self.tokens_per_group, self.groups - 1)

    def shards(self, tokens: int) -> int:
        """Over how many shards the first ``tokens`` tokens are spread; at least one."""
        return self.shard_of(max(tokens - 1, 0)) + 1

    def stored(self, tokens: int, shard: int) -> int:
        """How many of the first ``tokens`` tokens lie in ``shard``."""
        beyond = max(tokens - shard * self.tokens_per_group, 0)
        return beyond if shard == self.groups - 1 else min(beyond, self.tokens_per_group)

    def in_shard(self, position: int) -> int:
        """How far ``position`` lies behind the beginning of its shard."""
        return position - self.shard_of(position) * self.tokens_per_group

    def left_in_shard(self, position: int) -> int | None:
        """Tokens from ``position`` to the end of its shard; None in the last shard, which has no end."""
        shard = self.shard_of(position)
        return None if shard == self.groups - 1 else (shard + 1) * self.tokens_per_group - position

    def group(self, home: int, shard: int) -> int:
        """The group that holds ``shard`` of a request that begins in ``home``."""
        return (home + shard) % self.groups


@runtime_checkable
class ShardedCostModel(CostModel, Protocol):
    """A cost model of one KVP group, which also knows what working together costs."""

    def shard_attention_s(self, chunk_tokens: int, shard_tokens: int) -> float:
        """Seconds of attention, over all layers, of a chunk over a shard that holds none of its own keys."""
        ...

    def merge_s(self, tokens: int, shards: int) -> float:
        """Seconds, over all layers, to merge the partial attention of ``tokens`` tokens over ``shards``
        groups: the exchange of outputs and log-sum-exps, and the sum."""
        ...


class SlowestGroup:
    """The cost model of chunks that KVP groups compute together: each lasts as long as in its slowest group.

    A request that stays in one shard costs what ``cost`` says, so one model serves all.
    """

    def __init__(self, cost: ShardedCostModel, sharding: Sharding) -> None:
        self._cost, self._sharding = cost, sharding

    def tokens_s(self, tokens: int, rows: int, requests: int) -> float:
        return self._cost.tokens_s(tokens, rows, requests)

    def decode_attention_s(self, decodes: int, total_context: int) -> float:
        return self._cost.decode_attention_s(decodes, total_context)

    def chunk_attention_s(self, chunk_tokens: int, context_tokens: int) -> float:
        return max(self.by_shard_s(chunk_tokens, context_tokens))

    def by_shard_s(self, chunk_tokens: int, context_tokens: int) -> list[float]:
        """Attention, merge included, in the group of each shard that a chunk behind ``context_tokens`` tokens
        involves. The last of them takes the chunk's keys."""
        sharding = self._sharding
        last = sharding.shard_of(context_tokens)
        own_s = self._cost.chunk_attention_s(chunk_tokens, sharding.in_shard(context_tokens))
        if last == 0:
            return [own_s]
        merge_s = self._cost.merge_s(chunk_tokens, last + 1)
        other_s = self._cost.shard_attention_s(chunk_tokens, sharding.tokens_per_group)
        return [other_s + merge_s] * last + [own_s + merge_s]

    def load_decodes(self, batch: Batch) -> None:
        """Spread the decodes of a batch over the groups: each attends to the keys it stores."""
        sharding = self._sharding
        together: list[list[int]] = [[] for _ in batch.loads]  # shards of the requests with several
        for pool in batch.pools:
            request = next(iter(pool.members.values()))
            if request.shards == 1:
                batch.loads[request.home].count_decodes(len(pool), len(pool), pool.total_context, 0.0)
                continue
            for request in pool.members.values():
                length = request.kv_tokens
                shards = sharding.shards(length + 1)
                for shard in range(shards):
                    group = sharding.group(request.home, shard)
                    stored = sharding.stored(length, shard)
                    batch.loads[group].count_decodes(1, shard == 0, stored, 0.0)
                    if shards > 1:
                        together[group].append(shards)
        for load, shards_of in zip(batch.loads, together, strict=True):
            self.attend(load, shards_of)

    def attend(self, load: Load, shards_of: list[int]) -> None:
        """Add the attention of the decodes that ``load`` has counted, and their merge; ``shards_of`` has the
        number of shards of each decode that is spread over several."""
        if load.num_decodes:
            attention_s = self.decode_attention_s(load.num_decodes, load.decode_context)
            load.decode_attention_s = attention_s + self.merge_decodes_s(shards_of)
            load.attention_s += load.decode_attention_s

    def merge_decodes_s(self, shards_of: list[int]) -> float:
        """Seconds to merge the attention of decodes of which each is spread over so many shards."""
        return self._cost.merge_s(len(shards_of), max(shards_of)) if shards_of else 0.0
