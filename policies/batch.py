"""What one iteration executes: chunks of prefills, and one token for each decode."""

from __future__ import annotations

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


class Batch:
    """A batch, with the sums a cost model asks for.

    Attributes:
        chunks: prefill chunks, in the order they were chosen.
        pool: the decodes, one token each; None without decodes.
        tokens: tokens in the batch, decodes included.
        rows: tokens that reach the LM head: every decode, and every chunk that ends its prefill.
        requests: requests in the batch.
        attention_s: predicted attention time of the batch over all layers, seconds.
        decode_context: tokens the decodes attend to in their KV caches, at the batch's first step.
    """

    __slots__ = (
        "attention_s",
        "chunks",
        "decode_context",
        "formed_s",
        "id",
        "num_decodes",
        "pool",
        "requests",
        "rows",
        "tokens",
    )

    def __init__(self, id: int, formed_s: float) -> None:
        self.id = id
        self.formed_s = formed_s
        self.chunks: list[Chunk] = []
        self.pool: DecodePool | None = None
        self.num_decodes = 0
        self.decode_context = 0
        self.tokens = 0
        self.rows = 0
        self.requests = 0
        self.attention_s = 0.0

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens in the batch."""
        return self.tokens - self.num_decodes

    @property
    def slices(self) -> list[tuple[Request, int]]:
        """The batch as (request, tokens), chunks first; what a runtime executes."""
        decodes = self.pool.members.values() if self.pool is not None else ()
        return [(chunk.request, chunk.tokens) for chunk in self.chunks] + [(r, 1) for r in decodes]

    def gaps(self, end_s: float) -> list[tuple[float, int]]:
        """Times between two tokens of a request that the batch makes by ending at ``end_s``, as (seconds,
        requests): those of its decodes, and of preempted requests whose recomputation ends with it."""
        gaps = self.pool.gaps(end_s) if self.pool is not None else []
        gaps += [
            (end_s - chunk.request.last_token_s, 1)
            for chunk in self.chunks
            if chunk.request.preemptions and chunk.is_last and chunk.request.generated_tokens
        ]
        return gaps

    def add_chunk(self, chunk: Chunk, attention_s: float) -> None:
        """Add a chunk whose attention is predicted to take ``attention_s`` seconds."""
        self.chunks.append(chunk)
        self.tokens += chunk.tokens
        self.requests += 1
        self.rows += chunk.is_last
        self.attention_s += attention_s

    def add_decodes(self, pool: DecodePool, attention_s: float) -> None:
        """Add every member of ``pool``."""
        decodes = len(pool.members)
        self.pool = pool
        self.num_decodes = decodes
        self.decode_context = pool.total_context
        self.tokens += decodes
        self.rows += decodes
        self.requests += decodes
        self.attention_s += attention_s
