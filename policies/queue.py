"""The waiting prefills of one replica, served by priority."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.priorities import LinearPriority, Priority
from policies.request import Request

Rank = tuple[float, float, int]
"""A total order: key, arrival in seconds, id."""


class PrefillQueue(Protocol):
    """Requests with prefill left to schedule. Ties are broken by arrival and then by id."""

    def push(self, request: Request) -> None:
        """Put a request in; its key is taken from its present progress."""
        ...

    def pop(self, now_s: float) -> Request | None:
        """Take the request with the smallest key out; None when empty."""
        ...

    def peek(self, now_s: float) -> Rank | None:
        """The rank of the request that :meth:`pop` would return; None when empty."""
        ...

    def requests(self) -> list[Request]:
        """All requests in the queue, in no particular order."""
        ...

    def remove(self, request: Request) -> None:
        """Take one request out."""
        ...

    def __len__(self) -> int: ...


def make_queue(priority: Priority) -> PrefillQueue:
    """The fastest queue that serves ``priority`` exactly."""
    if priority.static:
        return HeapQueue(priority)
    if isinstance(priority, LinearPriority):
        return LinearQueue(priority)
    return ScanQueue(priority)


class HeapQueue:
    """For keys that change only with the request's own progress, that is, while it is out of the queue."""

    def __init__(self, priority: Priority) -> None:
        self._priority = priority
        self._heap: list[tuple[float, float, int, Request]] = []

    def push(self, request: Request) -> None:
        heappush(self._heap, (self._priority.key(request, 0.0), request.arrival_s, request.id, request))

    def pop(self, now_s: float) -> Request | None:
        return heappop(self._heap)[3] if self._heap else None

    def peek(self, now_s: float) -> Rank | None:
        return self._heap[0][:3] if self._heap else None

    def requests(self) -> list[Request]:
        return [entry[3] for entry in self._heap]

    def remove(self, request: Request) -> None:
        kept = [entry for entry in self._heap if entry[3] is not request]
        self._heap = sorted(kept)  # a sorted list is a heap

    def __len__(self) -> int:
        return len(self._heap)


class ScanQueue:
    """For any priority: every key is computed at every pop."""

    def __init__(self, priority: Priority) -> None:
        self._priority = priority
        self._requests: dict[int, Request] = {}

    def push(self, request: Request) -> None:
        self._requests[request.id] = request

    def pop(self, now_s: float) -> Request | None:
        rank = self.peek(now_s)
        return None if rank is None else self._requests.pop(rank[2])

    def peek(self, now_s: float) -> Rank | None:
        key = self._priority.key
        return min(((key(r, now_s), r.arrival_s, r.id) for r in self._requests.values()), default=None)

    def requests(self) -> list[Request]:
        return list(self._requests.values())

    def remove(self, request: Request) -> None:
        del self._requests[request.id]

    def __len__(self) -> int:
        return len(self._requests)


class LinearQueue:
    """For keys linear in time: intercepts and slopes in two arrays, the smallest found by numpy."""

    def __init__(self, priority: LinearPriority) -> None:
        self._priority = priority
        self._requests: list[Request] = []
        self._intercepts: NDArray[np.float64] = np.empty(64)
        self._slopes: NDArray[np.float64] = np.empty(64)

    def push(self, request: Request) -> None:
        size = len(self._requests)
        if size == len(self._intercepts):
            self._intercepts = np.resize(self._intercepts, 2 * size)
            self._slopes = np.resize(self._slopes, 2 * size)
        self._intercepts[size], self._slopes[size] = self._priority.line(request)
        self._requests.append(request)

    def pop(self, now_s: float) -> Request | None:
        return self._take(self._first(now_s)[1]) if self._requests else None

    def peek(self, now_s: float) -> Rank | None:
        return self._first(now_s)[0] if self._requests else None

    def _first(self, now_s: float) -> tuple[Rank, int]:
        """Rank and index of the first request."""
        size = len(self._requests)
        keys = self._intercepts[:size] + self._slopes[:size] * now_s
        index = int(keys.argmin())
        ties = np.flatnonzero(keys == keys[index])
        if len(ties) > 1:
            index = min(
                (int(i) for i in ties), key=lambda i: (self._requests[i].arrival_s, self._requests[i].id)
            )
        request = self._requests[index]
        return (float(keys[index]), request.arrival_s, request.id), index

    def requests(self) -> list[Request]:
        return list(self._requests)

    def remove(self, request: Request) -> None:
        self._take(next(i for i, r in enumerate(self._requests) if r is request))

    def _take(self, index: int) -> Request:
        """Take out one entry; the last one fills its place."""
        request, last = self._requests[index], len(self._requests) - 1
        self._requests[index] = self._requests[last]
        self._intercepts[index] = self._intercepts[last]
        self._slopes[index] = self._slopes[last]
        self._requests.pop()
        return request

    def __len__(self) -> int:
        return len(self._requests)
