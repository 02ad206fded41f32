"""How many of a prompt's tokens go into the next batch."""

from __future__ import annotations

from typing import Protocol

from policies.batch import Load
from policies.cost import MIN_CHUNK_TOKENS, CostModel, largest_chunk
from policies.request import Request


class Chunking(Protocol):
    """Decides the size of chunks, one at a time, as a batch is filled."""

    def is_full(self, load: Load) -> bool:
        """Whether no further chunk need be tried."""
        ...

    def chunk_tokens(self, request: Request, load: Load, yield_fraction: float) -> int:
        """Tokens of ``request`` to add to ``load``; 0 when it doesn't fit.

        ``yield_fraction`` is the share of the iteration that the request leaves to others.
        """
        ...


class WholePrompts:
    """Whole prompts, up to ``max_batch_tokens`` in a batch; a longer prompt goes alone (Orca, early vLLM)."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens

    def is_full(self, load: Load) -> bool:
        return load.tokens >= self.max_batch_tokens

    def chunk_tokens(self, request: Request, load: Load, yield_fraction: float) -> int:
        tokens = request.remaining_prefill_tokens
        if load.num_chunks and load.tokens + tokens > self.max_batch_tokens:
            return 0
        return tokens


class StaticChunks:
    """A token budget for the batch, decodes included (Sarathi-Serve, vLLM's chunked prefill)."""

    def __init__(self, chunk_tokens: int) -> None:
        self.budget_tokens = chunk_tokens

    def is_full(self, load: Load) -> bool:
        return load.tokens >= self.budget_tokens

    def chunk_tokens(self, request: Request, load: Load, yield_fraction: float) -> int:
        room = max(1, int((1.0 - yield_fraction) * self.budget_tokens)) - load.tokens
        return max(0, min(request.remaining_prefill_tokens, room))


class AdaptiveChunks:
    """The largest chunk that keeps the predicted iteration within ``target_s`` (Medha).

    As the context grows the chunk shrinks by itself. A batch whose decodes already fill the budget still
    takes one smallest chunk, so that prefill never stands still.
    """

    FULL = 0.9  # no further chunk is tried once the prediction is within 10 % of the target (Medha)

    def __init__(
        self, cost: CostModel, *, target_s: float, max_chunk_tokens: int, max_batch_tokens: int
    ) -> None:
        self._cost = cost
        self.target_s = target_s
        self.max_chunk_tokens = max_chunk_tokens
        self.max_batch_tokens = max_batch_tokens

    def is_full(self, load: Load) -> bool:
        if not load.num_chunks:
            return False
        if load.tokens >= self.max_batch_tokens:
            return True
        predicted_s = self._cost.tokens_s(load.tokens, load.rows, load.requests) + load.attention_s
        return predicted_s >= self.FULL * self.target_s

    def chunk_tokens(self, request: Request, load: Load, yield_fraction: float) -> int:
        remaining = request.remaining_prefill_tokens
        room = max(self.max_batch_tokens - load.tokens, 0)
        if not load.num_chunks:
            room = max(room, 1)
        available = min(remaining, self.max_chunk_tokens, room)
        if available == 0:
            return 0
        chunk = largest_chunk(
            self._cost,
            context=request.scheduled_tokens,
            available=available,
            budget_s=(1.0 - yield_fraction) * self.target_s,
            tokens=load.tokens,
            rows=load.rows,
            requests=load.requests,
            attention_s=load.attention_s,
        )
        if chunk == 0 and not load.num_chunks:
            chunk = min(available, MIN_CHUNK_TOKENS)
        return chunk
