"""Decoding requests that advance in lockstep, at a cost that doesn't grow with their number.

Every batch that takes a pool takes all of it, so all members gain one token a batch. What one step
changes can then be kept as a few sums: a step costs the same for 2 requests and for 200, and a run of
steps in which nobody finishes costs no more than a single one.
"""

from __future__ import annotations

from heapq import heappop, heappush

from policies.request import NOT_YET, Request


class DecodePool:
    """A set of requests that decode together.

    Attributes:
        steps: steps taken since the pool was made; a member's own progress is measured against it.
        total_context: tokens in all members' KV caches, which is what the next step attends to
            besides the new tokens themselves.
        total_square: sum of the squares of the members' contexts.
        last_step_s: when the last step ended; NaN before the first.
    """

    __slots__ = (
        "_block_tokens",
        "_ends",
        "_newcomers",
        "_phases",
        "last_step_s",
        "members",
        "steps",
        "total_context",
        "total_square",
    )

    def __init__(self, block_tokens: int) -> None:
        self.members: dict[int, Request] = {}
        self.steps = 0
        self.total_context = 0
        self.total_square = 0
        self.last_step_s = NOT_YET
        # Members that haven't taken a step in this pool yet, counted by the time of their last token.
        self._newcomers: dict[float, int] = {}
        self._block_tokens = block_tokens
        # _phases[p]: members that write the first token of a new KV block at steps ≡ p (mod block size)
        self._phases = [0] * block_tokens
        self._ends: list[tuple[int, int]] = []  # heap of (step at which a member finishes, its id)

    def __len__(self) -> int:
        return len(self.members)

    def add(self, request: Request) -> None:
        """Let ``request`` in: its prefill is complete, its last token came out at ``last_token_s``."""
        context = request.kv_tokens
        remaining = request.output_tokens - request.generated_tokens
        request.pool = self
        request.pool_entry_step = self.steps
        self.members[request.id] = request
        self.total_context += context
        self.total_square += context * context
        self._phases[(self.steps - context) % self._block_tokens] += 1
        heappush(self._ends, (self.steps + remaining, request.id))
        since_s = request.last_token_s
        self._newcomers[since_s] = self._newcomers.get(since_s, 0) + 1

    def remove(self, request: Request) -> None:
        """Take ``request`` out and settle its progress."""
        del self.members[request.id]
        context = request.kv_tokens
        self.total_context -= context
        self.total_square -= context * context
        self._phases[(self.steps - context) % self._block_tokens] -= 1
        request.generated_tokens = request.generated_tokens
        request.kv_blocks = -(-context // self._block_tokens)
        if request.pool_entry_step == self.steps:
            self._newcomers[request.last_token_s] -= 1
        else:
            request.last_token_s = self.last_step_s
        request.pool = None

    def absorb(self, other: DecodePool) -> None:
        """Take over all members of ``other``, which is left empty."""
        for request in list(other.members.values()):
            other.remove(request)
            self.add(request)

    def gaps(self, end_s: float) -> list[tuple[float, int]]:
        """Times between tokens that a step ending at ``end_s`` makes, as (seconds, members)."""
        gaps = [(end_s - since_s, count) for since_s, count in self._newcomers.items() if count]
        settled = len(self.members) - sum(count for _, count in gaps)
        if settled:
            gaps.append((end_s - self.last_step_s, settled))
        return gaps

    def advance(self, steps: int, end_s: float) -> list[Request]:
        """Give every member ``steps`` more tokens, the last at ``end_s``.

        ``steps`` must not exceed :meth:`steps_to_finish`. Returns the finished members, taken out of
        the pool, in the order of their ids.
        """
        self.steps += steps
        self.total_square += steps * (2 * self.total_context + steps * len(self.members))
        self.total_context += steps * len(self.members)
        self.last_step_s = end_s
        if self._newcomers:
            self._newcomers.clear()
        finished: list[Request] = []
        ends = self._ends
        while ends and ends[0][0] <= self.steps:
            _, request_id = heappop(ends)
            request = self.members.get(request_id)
            if request is not None and request.generated_tokens >= request.output_tokens:
                self.remove(request)
                finished.append(request)
        return finished

    def steps_to_finish(self) -> int:
        """Steps until the first member finishes; 0 when the pool is empty."""
        ends = self._ends
        while ends:
            step, request_id = ends[0]
            request = self.members.get(request_id)
            # An entry is stale when its request was preempted (and perhaps came back with a later end).
            if request is not None and step - self.steps == request.output_tokens - request.generated_tokens:
                return step - self.steps
            heappop(ends)
        return 0

    def blocks_for(self, steps: int) -> int:
        """KV blocks the next ``steps`` steps add, over all members."""
        size = self._block_tokens
        start = self.steps % size
        if steps == 1:
            return self._phases[start]
        rounds, rest = divmod(steps, size)
        end = start + rest
        partial = sum(self._phases[start:end])
        if end > size:
            partial += sum(self._phases[: end - size])
        return rounds * len(self.members) + partial

    def steps_within(self, blocks: int, most: int) -> int:
        """How many of the next ``most`` steps add no more than ``blocks`` KV blocks in all; one at least."""
        if len(self.members) * (most // self._block_tokens + 1) <= blocks or self.blocks_for(most) <= blocks:
            return most
        low, high = 1, most  # `low` steps fit, `high` don't
        while high - low > 1:
            middle = (low + high) // 2
            if self.blocks_for(middle) <= blocks:
                low = middle
            else:
                high = middle
        return low
