"""What one iteration executes: chunks of prefills, and one token for each decode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from policies.decode_pool import DecodePool
from policies.request import Request


class Chunk(NamedTuple):
    """``tokens`` consecutive prompt tokens of ``request``, after ``context`` tokens already scheduled."""

    request: Request
    tokens: int
    context: int

    @property
    def is_last(self) -> bool:
        """Whether the chunk ends its prefill, so that it yields an output token."""
        return self.context + self.tokens == self.request.prefill_tokens


class Load:
    """What one KVP group executes of a batch, with the sums a cost model asks for.

    Attributes:
        tokens: tokens in the batch, decodes included.
        rows: tokens that reach the LM head: every decode, and every chunk that ends its prefill.
        requests: requests in the batch.
        num_chunks: of them, prefill chunks.
        num_decodes: of them, decodes.
        decode_context: tokens the decodes attend to in their KV caches, at the batch's first step.
        attention_s: predicted attention time over all layers, seconds; merges between groups included.
        decode_attention_s, chunk_attention_s: of it, those of the decodes and of the chunks.
    """

    __slots__ = (
        "attention_s",
        "chunk_attention_s",
        "decode_attention_s",
        "decode_context",
        "num_chunks",
        "num_decodes",
        "requests",
        "rows",
        "tokens",
    )

    def __init__(self) -> None:
        self.tokens = 0
        self.rows = 0
        self.requests = 0
        self.num_chunks = 0
        self.num_decodes = 0
        self.decode_context = 0
        self.attention_s = 0.0
        self.decode_attention_s = 0.0
        self.chunk_attention_s = 0.0

    def count_chunk(self, tokens: int, rows: int, attention_s: float) -> None:
        """Add a chunk, ``rows`` of whose tokens reach the LM head here."""
        self.tokens += tokens
        self.rows += rows
        self.requests += 1
        self.num_chunks += 1
        self.attention_s += attention_s
        self.chunk_attention_s += attention_s

    def count_decodes(self, decodes: int, rows: int, context: int, attention_s: float) -> None:
        """Add ``decodes`` decodes that attend to ``context`` cached tokens here."""
        self.tokens += decodes
        self.rows += rows
        self.requests += decodes
        self.num_decodes += decodes
        self.decode_context += context
        self.attention_s += attention_s
        self.decode_attention_s += attention_s


class Batch(Load):
    """A batch. As a load it is the sum of what all its requests bring, each token counted once.

    Attributes:
        chunks: prefill chunks, in the order they were chosen.
        pools: the decodes, one token each.
        loads: what each KVP group executes; without KV-cache parallelism that is the batch itself.
        joint_s: of its attention, what is beyond the sum of its chunks and its decodes.
    """

    __slots__ = ("_group_loads", "chunks", "formed_s", "id", "joint_s", "pools")

    def __init__(self, id: int, formed_s: float, groups: int = 1) -> None:
        super().__init__()
        self.id = id
        self.formed_s = formed_s
        self.joint_s = 0.0
        self.chunks: list[Chunk] = []
        self.pools: list[DecodePool] = []
        self._group_loads = tuple(Load() for _ in range(groups)) if groups > 1 else None

    @property
    def loads(self) -> tuple[Load, ...]:
        return self._group_loads or (self,)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens in the batch."""
        return self.tokens - self.num_decodes

    def decodes(self) -> Iterator[Request]:
        """The requests that decode in the batch."""
        for pool in self.pools:
            yield from pool.members.values()

    @property
    def slices(self) -> list[tuple[Request, int]]:
        """The batch as (request, tokens), chunks first; what a runtime executes."""
        return [(chunk.request, chunk.tokens) for chunk in self.chunks] + [(r, 1) for r in self.decodes()]

    def gaps(self, end_s: float) -> list[tuple[float, int]]:
        """Times between two tokens of a request that the batch makes by ending at ``end_s``, as (seconds,
        requests): those of its decodes, and of preempted requests whose recomputation ends with it."""
        gaps = [gap for pool in self.pools for gap in pool.gaps(end_s)]
        gaps += [
            (end_s - chunk.request.last_token_s, 1)
            for chunk in self.chunks
            if chunk.request.preemptions and chunk.is_last and chunk.request.generated_tokens
        ]
        return gaps

    def add_chunk(self, chunk: Chunk, attention_s: float) -> None:
        """Add a chunk whose attention is predicted to take ``attention_s`` seconds."""
        self.chunks.append(chunk)
        self.count_chunk(chunk.tokens, chunk.is_last, attention_s)

    def take_longer(self, joint_s: float) -> None:
        """Its attention takes ``joint_s`` seconds beyond the sum of its chunks and its decodes."""
        self.joint_s = joint_s
        self.attention_s += joint_s

    def decode_spread(self) -> float:
        """Standard deviation of the decodes' contexts, tokens."""
        squares = sum(pool.total_square for pool in self.pools)
        mean = self.decode_context / self.num_decodes
        return math.sqrt(max(squares / self.num_decodes - mean * mean, 0.0))

    def add_decodes(self, pool: DecodePool, attention_s: float) -> None:
        """Add every member of ``pool``."""
        decodes = len(pool.members)
        self.pools.append(pool)
        self.count_decodes(decodes, decodes, pool.total_context, attention_s)
