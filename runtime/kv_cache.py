"""The KV cache: blocks of token slots, and which request holds which."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.attention import Extent

_FREE, _WANTED, _TAKEN = range(3)


class BlockAllocator:
    """Hands out blocks, one after the other wherever possible.

    Blocks that follow each other let attention read a request's keys in place; scattered ones have to be
    copied together first. So a new request is put where it has room to grow, and the room is kept for it
    as long as nobody is short of blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self._state: NDArray[np.int8] = np.zeros(num_blocks, dtype=np.int8)

    def place(self, count: int, room: int) -> list[int]:
        """Take ``count`` blocks for a new request that may grow to ``room`` blocks.

        Raises:
            RuntimeError: fewer are free.
        """
        starts, lengths = _runs(self._state == _FREE)
        fitting = np.flatnonzero(lengths >= room)
        if len(fitting):
            start = int(starts[fitting[np.argmin(lengths[fitting])]])
        else:
            starts, lengths = _runs(self._state != _TAKEN)
            if len(lengths) == 0 or lengths.max() < count:
                return self._scattered(count)
            start = int(starts[np.argmax(lengths)])
        self._state[start + count : start + room] = np.maximum(
            self._state[start + count : start + room], _WANTED
        )
        self._state[start : start + count] = _TAKEN
        return list(range(start, start + count))

    def grow(self, blocks: list[int], count: int) -> None:
        """Add ``count`` blocks to a request's, behind its last one if they are free there."""
        following = slice(blocks[-1] + 1, blocks[-1] + 1 + count)
        behind = self._state[following]
        if len(behind) == count and not (behind == _TAKEN).any():
            self._state[following] = _TAKEN
            blocks.extend(range(following.start, following.stop))
        else:
            blocks.extend(self._scattered(count))

    def release(self, blocks: list[int]) -> None:
        """Free a request's blocks and the room kept for it."""
        self._state[blocks] = _FREE
        end = blocks[-1] + 1
        while end < len(self._state) and self._state[end] == _WANTED:
            self._state[end] = _FREE
            end += 1

    def _scattered(self, count: int) -> list[int]:
        """Any ``count`` blocks, those kept for others last."""
        candidates = np.flatnonzero(self._state != _TAKEN)
        if len(candidates) < count:
            raise RuntimeError(f"{count} KV blocks needed, {len(candidates)} are free")
        chosen = np.sort(candidates[np.argsort(self._state[candidates], kind="stable")[:count]])
        self._state[chosen] = _TAKEN
        return [int(block) for block in chosen]


class KVTable:
    """Where the keys of one request lie.

    Attributes:
        length: tokens stored.
        blocks: the request's blocks, in token order.
    """

    __slots__ = ("blocks", "contiguous", "length")

    def __init__(self, blocks: list[int]) -> None:
        self.length = 0
        self.blocks = blocks
        self.contiguous = _follow(blocks)


class PagedKV:
    """Keys and values of the layers of one rank.

    Args:
        num_layers: layers of this rank's stage.
        kv_heads: KV heads of this rank.
        capacity_tokens: tokens the cache holds, rounded down to whole blocks.

    Attributes:
        layers: one tensor [2 (keys, values), kv_heads, slots, head_dim] for each layer.
        tables: the requests that hold blocks, by id.
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        capacity_tokens: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_blocks = capacity_tokens // block_tokens
        self.block_tokens = block_tokens
        self.layers = [
            # Zeroed, so that the pages are there before the clock runs.
            torch.zeros(2, kv_heads, num_blocks * block_tokens, head_dim, dtype=dtype, device=device)
            for _ in range(num_layers)
        ]
        self.tables: dict[int, KVTable] = {}
        self._allocator = BlockAllocator(num_blocks)

    def extend(self, request: int, tokens: int, longest: int) -> KVTable:
        """Make room for ``tokens`` more tokens of a request that may come to ``longest``."""
        table = self.tables.get(request)
        if table is None:
            table = KVTable(self._allocator.place(self._blocks(tokens), self._blocks(max(tokens, longest))))
            self.tables[request] = table
        missing = self._blocks(table.length + tokens) - len(table.blocks)
        if missing > 0:
            self._allocator.grow(table.blocks, missing)
            table.contiguous = table.contiguous and _follow(table.blocks[-missing - 1 :])
        table.length += tokens
        return table

    def release(self, request: int) -> None:
        """Free a request's blocks; one that holds none is passed over."""
        table = self.tables.pop(request, None)
        if table is not None:
            self._allocator.release(table.blocks)

    def slots(self, table: KVTable, start: int, tokens: int) -> list[int] | NDArray[np.int64]:
        """Slots [tokens] of a request's tokens from ``start`` on."""
        size = self.block_tokens
        if tokens == 1:
            return [table.blocks[start // size] * size + start % size]
        if table.contiguous:
            first = table.blocks[0] * size + start
            return np.arange(first, first + tokens)
        positions = np.arange(start, start + tokens)
        return np.array(table.blocks)[positions // size] * size + positions % size

    def extent(self, table: KVTable, length: int) -> Extent:
        """A request's first ``length`` tokens."""
        if table.contiguous:
            return Extent(table.blocks[0] * self.block_tokens, length)
        slots = torch.as_tensor(self.slots(table, 0, length), dtype=torch.int64)
        return Extent(0, length, slots.to(self.layers[0].device))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


def _follow(blocks: list[int]) -> bool:
    return all(after == before + 1 for before, after in pairwise(blocks))


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and lengths of the runs of true entries."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return edges[::2], edges[1::2] - edges[::2]
