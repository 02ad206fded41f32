"""Paged KV-cache accounting: blocks, not contents."""

from __future__ import annotations


class KVCache:
    """The KV blocks of one replica.

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
