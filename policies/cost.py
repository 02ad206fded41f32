"""What policies know of time: a cost model's Protocol, and the prefill work derived from it."""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol, runtime_checkable

MIN_CHUNK_TOKENS = (
    32  # step of the chunk search and smallest chunk (as in the code of Medha, arXiv 2409.17264)
)


class CostModel(Protocol):
    """Predicted time of one iteration of a replica, summed over its stages, in three addends.

    An iteration costs ``tokens_s`` plus ``chunk_attention_s`` of every chunk plus ``decode_attention_s``.
    They grow with their arguments; ``tokens_s`` may fall by a little where more tokens fill a kernel's blocks
    better.
    """

    def tokens_s(self, tokens: int, rows: int, requests: int) -> float:
        """Seconds of everything but attention: ``tokens`` through the layers, ``rows`` through the LM
        head, collectives, and the host's work for ``requests`` requests."""
        ...

    def chunk_attention_s(self, chunk_tokens: int, context_tokens: int) -> float:
        """Seconds of attention, over all layers, of a chunk behind ``context_tokens`` cached tokens."""
        ...

    def decode_attention_s(self, decodes: int, total_context: int) -> float:
        """Seconds of attention, over all layers, of decodes whose contexts add up to ``total_context``."""
        ...


@runtime_checkable
class JointAttention(Protocol):
    """A cost model that also knows what attention takes beyond the sum of chunks and decodes.

    Attributes:
        joint_is_known: whether it does so for what it was made for.
    """

    joint_is_known: bool

    def joint_attention_s(self, chunk_tokens: int, decodes: int, total_context: int, spread: float) -> float:
        """Seconds beyond that sum, over all layers: because chunks, ``chunk_tokens`` tokens together, and
        decodes share a batch, and because the decodes' contexts differ, with ``spread`` tokens of standard
        deviation. May be below 0."""
        ...


def largest_chunk(
    cost: CostModel,
    *,
    context: int,
    available: int,
    budget_s: float,
    tokens: int = 0,
    rows: int = 0,
    requests: int = 0,
    attention_s: float = 0.0,
) -> int:
    """The largest chunk with which a batch stays within ``budget_s``: a multiple of 32 tokens, or all of
    ``available``; 0 when not even the smallest does.

    ``tokens``, ``rows``, ``requests`` and ``attention_s`` describe what the batch holds already. The search
    is a bisection: what it finds fits, and where the cost model falls somewhere, a larger one may fit, too.
    """

    def fits(chunk: int) -> bool:
        fixed_s = cost.tokens_s(tokens + chunk, rows + 1, requests + 1) + attention_s
        return fixed_s + cost.chunk_attention_s(chunk, context) <= budget_s

    if fits(available):
        return available
    low, high = 0, -(-available // MIN_CHUNK_TOKENS)  # in steps: `low` fits, `high` doesn't
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * MIN_CHUNK_TOKENS):
            low = middle
        else:
            high = middle
    return low * MIN_CHUNK_TOKENS


class PrefillWork:
    """C[L]: how long a prompt of L tokens takes when it prefills alone with adaptive chunks.

    Medha's algorithm 3 (arXiv 2409.17264): walk the prompt with the largest chunk that keeps the
    iteration within ``target_s`` and add the iterations up; with stream pipelining over ``stages``
    stages the next chunk enters when the first stage is free, so the sum is divided by ``stages``.

    One walk serves every L: it is extended when a longer prompt turns up, and C is interpolated
    linearly between its points. Behind a long context the iteration time changes slowly, so up to
    1 % of the context is walked in one go, at the time of the chunk in its middle.
    """

    def __init__(
        self, cost: CostModel, *, target_s: float, stages: int = 1, max_chunk_tokens: int = 4096
    ) -> None:
        self._cost = cost
        self._target_s = target_s
        self._stages = stages
        self._max_chunk_tokens = max_chunk_tokens
        self._tokens = [0]
        self._work_s = [0.0]

    def work_s(self, tokens: int) -> float:
        """C[tokens], seconds."""
        while self._tokens[-1] < tokens:
            self._extend()
        index = bisect_right(self._tokens, tokens) - 1
        start, start_s = self._tokens[index], self._work_s[index]
        if start == tokens:
            return start_s
        share = (tokens - start) / (self._tokens[index + 1] - start)
        return start_s + share * (self._work_s[index + 1] - start_s)

    def remaining_s(self, done_tokens: int, total_tokens: int) -> float:
        """C[total] − C[done], seconds."""
        return self.work_s(total_tokens) - self.work_s(done_tokens)

    def _extend(self) -> None:
        context = self._tokens[-1]
        chunk = largest_chunk(
            self._cost, context=context, available=self._max_chunk_tokens, budget_s=self._target_s
        )
        chunk = max(chunk, MIN_CHUNK_TOKENS)
        repeats = max(1, context // 100 // chunk)
        middle = context + (repeats - 1) * chunk // 2
        iteration_s = self._cost.tokens_s(chunk, 1, 1) + self._cost.chunk_attention_s(chunk, middle)
        self._tokens.append(context + repeats * chunk)
        self._work_s.append(self._work_s[-1] + repeats * iteration_s / self._stages)
