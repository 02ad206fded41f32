"""Which replica a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from policies.request import Request
from specs.errors import InputError


class ReplicaLoad(Protocol):
    """What a router may know of a replica."""

    @property
    def outstanding(self) -> int:
        """Requests there that haven't finished."""
        ...

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens there that no batch has taken yet."""
        ...

    @property
    def kv_tokens_in_use(self) -> int:
        """Tokens of the KV blocks that requests hold there."""
        ...

    def cached_tokens(self, request: Request) -> int:
        """Leading tokens of its prompt that need not be computed there."""
        ...


class Router(Protocol):
    """Picks a replica for each request as it arrives."""

    def route(self, request: Request, replicas: Sequence[ReplicaLoad]) -> int:
        """The index of the replica. Ties go to the lowest index."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def route(self, request: Request, replicas: Sequence[ReplicaLoad]) -> int:
        chosen = self._next % len(replicas)
        self._next = chosen + 1
        return chosen


class Random:
    """Any, with equal probability."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def route(self, request: Request, replicas: Sequence[ReplicaLoad]) -> int:
        return int(self._rng.integers(len(replicas)))


class LeastLoaded:
    """The fewest unfinished requests."""

    def route(self, request: Request, replicas: Sequence[ReplicaLoad]) -> int:
        return min(range(len(replicas)), key=lambda i: replicas[i].outstanding)


class JoinShortestQueue:
    """The fewest prompt tokens waiting; among equals, the fewest unfinished requests."""

    def route(self, request: Request, replicas: Sequence[ReplicaLoad]) -> int:
        return min(
            range(len(replicas)), key=lambda i: (replicas[i].pending_prefill_tokens, replicas[i].outstanding)
        )


class LengthPartitioned:
    """Prompts of at least ``threshold_tokens`` to the last replicas, all others to the first ones.

    ``long_replicas`` replicas are for long prompts; within a part the least loaded is taken.
    """

    def __init__(self, threshold_tokens: int, long_replicas: int = 1) -> None:
        self.threshold_tokens = threshold_tokens
        self.long_replicas = long_replicas

    def route(self, request: Request, replicas: Sequence[ReplicaLoad]) -> int:
        border = len(replicas) - self.long_replicas
        if border <= 0:
            raise InputError(
                f"router length_partitioned keeps {self.long_replicas} replicas for long prompts: "
                f"parallel.replicas must be larger, and is {len(replicas)}"
            )
        part = (
            range(border, len(replicas)) if request.prompt_tokens >= self.threshold_tokens else range(border)
        )
        return min(part, key=lambda i: replicas[i].outstanding)


class CacheAware:
    """The fewest tokens to compute and to keep: cached prefixes count as done.

    To compute are the prompt tokens that wait there and those of the request that aren't cached; to keep are
    those in KV blocks, which decodes read each step. (NVIDIA Dynamo's KV router weighs the two, in blocks.)
    """

    def route(self, request: Request, replicas: Sequence[ReplicaLoad]) -> int:
        return min(range(len(replicas)), key=lambda i: (self._work(request, replicas[i]), i))

    @staticmethod
    def _work(request: Request, replica: ReplicaLoad) -> int:
        to_compute = replica.pending_prefill_tokens + request.prompt_tokens - replica.cached_tokens(request)
        return to_compute + replica.kv_tokens_in_use


ROUTERS = (
    "round_robin",
    "random",
    "least_loaded",
    "join_shortest_queue",
    "length_partitioned",
    "cache_aware",
)


def make_router(
    name: str, *, rng: np.random.Generator, threshold_tokens: int = 8192, long_replicas: int = 1
) -> Router:
    """The router called ``name``.

    Raises:
        InputError: there is none of that name.
    """
    if name == "round_robin":
        return RoundRobin()
    if name == "random":
        return Random(rng)
    if name == "least_loaded":
        return LeastLoaded()
    if name == "join_shortest_queue":
        return JoinShortestQueue()
    if name == "length_partitioned":
        return LengthPartitioned(threshold_tokens, long_replicas)
    if name == "cache_aware":
        return CacheAware()
    raise InputError(f"'{name}' is not a known router ({', '.join(ROUTERS)})")
