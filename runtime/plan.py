"""What a batch looks like to the ranks that execute it, and what each of them makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.sharding import Sharding
from runtime.attention import Extent
from runtime.kv_cache import KVTable, PagedKV


class Slice(NamedTuple):
    """``tokens`` consecutive tokens of one request, from position ``start`` on: a chunk or a decode."""

    request: int
    start: int
    tokens: int
    longest: int  # tokens the request's KV cache may come to
    samples: bool  # whether its last token yields a new one
    home: int = 0  # KVP group of the request's first tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """One batch, the same for all ranks.

    Attributes:
        token_ids: the slices' tokens, one slice after the other.
        freed: requests whose KV blocks are free from here on.
        probe: whether ranks on a CPU probe their cores before it.
    """

    id: int
    slices: list[Slice]
    token_ids: NDArray[np.int64]
    freed: list[int] = field(default_factory=list)
    probe: bool = False


@dataclass(frozen=True, slots=True)
class KVGroups:
    """How KV caches are cut along the sequence, as the group ``index`` of this rank sees it."""

    sharding: Sharding = field(default_factory=Sharding)
    index: int = 0

    def taking_part(self, home: int, shard: int) -> tuple[int, ...]:
        """The groups that hold something of a request's first ``shard`` + 1 shards, in shard order."""
        return tuple(self.sharding.group(home, i) for i in range(shard + 1))

    def stored(self, home: int, length: int) -> int:
        """How many of a request's first ``length`` tokens this rank's group stores."""
        return self.sharding.stored(length, (self.index - home) % self.sharding.groups)


class Piece(NamedTuple):
    """The part of a slice within one shard, as one group sees it: its rows in the group's batch."""

    row: int
    tokens: int
    prefix: Extent | None  # the group's keys before the piece
    own: bool  # the group stores the piece's keys
    groups: tuple[int, ...]  # who takes part, in shard order

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.tokens)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch as one group executes it: pieces of several tokens first, then single tokens.

    Attributes:
        token_ids, positions: [tokens].
        slots: cache slots of the tokens that are stored here.
        stored_rows: their rows; None for all of them.
        chunks: the pieces of several tokens.
        decodes: keys that the single tokens attend to, themselves included where they are stored here.
        shared: rows and groups of the pieces in which several groups take part.
        sampled_rows: rows whose logits this group computes.
        sampled: (request, position) of each of them.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    stored_rows: Tensor | None
    chunks: list[Piece]
    decodes: list[Extent]
    shared: list[tuple[slice, tuple[int, ...]]]
    sampled_rows: Tensor
    sampled: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        return len(self.positions)


class _Cut(NamedTuple):
    """A piece before it has a row: which tokens of the plan it is."""

    slice: Slice
    offset: int  # of its first token among the plan's
    start: int
    tokens: int
    shard: int


def make_inputs(plan: Plan, cache: PagedKV, groups: KVGroups, device: torch.device) -> Inputs:
    """What this rank's group computes of ``plan``; makes room in the cache for the tokens it stores."""
    for request in plan.freed:
        cache.release(request)
    cuts = [
        cut for cut in _cuts(plan, groups) if groups.index in groups.taking_part(cut.slice.home, cut.shard)
    ]
    cuts.sort(key=lambda cut: cut.tokens == 1)  # stable: the order of the plan otherwise
    rows = np.cumsum([0, *(cut.tokens for cut in cuts)])
    chunks: list[Piece] = []
    decodes: list[Extent] = []
    slots: list[list[int] | NDArray[np.int64]] = []
    stored: list[bool] = []
    shared: list[tuple[slice, tuple[int, ...]]] = []
    sampled: list[tuple[int, int, int]] = []
    for cut, row in zip(cuts, rows.tolist(), strict=False):
        home = cut.slice.home
        taking_part = groups.taking_part(home, cut.shard)
        own = taking_part[-1] == groups.index
        before = groups.stored(home, cut.start)
        table: KVTable = cache.tables[cut.slice.request] if not own else _extend(cache, cut, groups)
        stored.append(own)
        if own:
            slots.append(cache.slots(table, before, cut.tokens))
        if cut.tokens == 1:
            decodes.append(cache.extent(table, before + own))
        else:
            prefix = cache.extent(table, before) if before else None
            chunks.append(Piece(row, cut.tokens, prefix, own, taking_part))
        if len(taking_part) > 1:
            shared.append((slice(row, row + cut.tokens), taking_part))
        end = cut.start + cut.tokens
        if cut.slice.samples and end == cut.slice.start + cut.slice.tokens and home == groups.index:
            sampled.append((row + cut.tokens - 1, cut.slice.request, end))
    # Every group that takes part knows the sampled row; its home computes the logits.
    counts = np.array([cut.tokens for cut in cuts], dtype=np.int64)
    positions = _ranges([cut.start for cut in cuts], counts)
    offsets = _ranges([cut.offset for cut in cuts], counts)
    return Inputs(
        token_ids=torch.from_numpy(plan.token_ids[offsets]).to(device),
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *slots])).to(device),
        stored_rows=None
        if all(stored)
        else torch.from_numpy(np.flatnonzero(np.repeat(stored, counts))).to(device),
        chunks=chunks,
        decodes=decodes,
        shared=shared,
        sampled_rows=torch.tensor([row for row, _, _ in sampled], dtype=torch.int64, device=device),
        sampled=[(request, position) for _, request, position in sampled],
    )


def _cuts(plan: Plan, groups: KVGroups) -> Iterator[_Cut]:
    """The plan's slices, cut where a shard ends."""
    offset = 0
    for item in plan.slices:
        start, end = item.start, item.start + item.tokens
        while start < end:
            shard = groups.sharding.shard_of(start)
            left = groups.sharding.left_in_shard(start)
            border = end if left is None else min(end, start + left)
            yield _Cut(item, offset, start, border - start, shard)
            offset += border - start
            start = border


def _extend(cache: PagedKV, cut: _Cut, groups: KVGroups) -> KVTable:
    return cache.extend(cut.slice.request, cut.tokens, groups.stored(cut.slice.home, cut.slice.longest))


def _ranges(starts: list[int], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenation of [start, start + count) over all starts and counts."""
    shifts = np.array(starts, dtype=np.int64) - (np.cumsum(counts) - counts)
    ranges: NDArray[np.int64] = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(shifts, counts)
    return ranges
