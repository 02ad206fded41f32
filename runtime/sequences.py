"""The tokens of live requests: synthetic prompts, and what the model adds to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from policies.batch import Batch
from policies.request import Request
from runtime.plan import Plan, Slice
from traces.synthesis import stream

TokenIds = NDArray[np.int64]


class Sequence:
    """A request and its tokens: the prompt, then what was generated."""

    __slots__ = ("known", "preemptions", "request", "tokens")

    def __init__(self, request: Request, prompt: TokenIds) -> None:
        self.request = request
        self.tokens = np.concatenate([prompt, np.zeros(request.output_tokens, dtype=np.int64)])
        self.known = len(prompt)
        self.preemptions = 0  # that its KV cache has been freed for

    def append(self, token: int) -> None:
        """The model gave ``token``."""
        self.tokens[self.known] = token
        self.known += 1

    @property
    def generated(self) -> TokenIds:
        """Tokens the model gave so far."""
        return self.tokens[self.request.prompt_tokens : self.known]


class Prompts:
    """Random prompts, the same for a seed whatever order they are asked for in."""

    def __init__(self, prompt_tokens: NDArray[np.int32], vocab_size: int, seed: int) -> None:
        self._ends = np.cumsum(prompt_tokens, dtype=np.int64)
        total = int(self._ends[-1]) if len(self._ends) else 0
        self._tokens = stream(seed, "prompt tokens").integers(0, vocab_size, total, dtype=np.int32)

    def __getitem__(self, index: int) -> TokenIds:
        start = int(self._ends[index - 1]) if index else 0
        return self._tokens[start : self._ends[index]].astype(np.int64)


def make_plan(batch: Batch, sequences: dict[int, Sequence], freed: list[int], *, probe: bool) -> Plan:
    """What the ranks execute for ``batch``.

    ``freed`` are the requests whose KV blocks the scheduler has taken back since the last plan; ``probe``
    says whether cores are probed before it.
    """
    slices: list[Slice] = []
    parts: list[TokenIds] = []

    def add(request: Request, start: int, tokens: int, samples: bool) -> None:
        longest = request.prompt_tokens + request.output_tokens - 1
        slices.append(Slice(request.id, start, tokens, longest, samples, request.home))
        parts.append(sequences[request.id].tokens[start : start + tokens])

    for chunk in batch.chunks:
        add(chunk.request, chunk.context, chunk.tokens, chunk.is_last)
    for request in batch.decodes():
        add(request, request.kv_tokens, 1, True)
    return Plan(batch.id, slices, np.concatenate(parts), freed, probe)
