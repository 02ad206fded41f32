"""Where a live run's requests come from: a list of times, or clients that wait for their answers."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from specs.errors import InputError
from traces.synthesis import ClosedLoop
from traces.workload import Workload


class Arrivals:
    """The requests to come, in the order of their times.

    With a closed loop each client sends the workload's next request a think time after its last one left,
    as long as that is before ``until_s``.

    Raises:
        InputError: the workload has no arrival times, and there is no closed loop.
    """

    def __init__(
        self, workload: Workload, closed_loop: ClosedLoop | None = None, until_s: float | None = None
    ) -> None:
        self._heap: list[tuple[float, int]] = []
        self._unsent: Iterator[int] = iter(())
        self._think_time_s = 0.0
        self._until_s = float("inf") if until_s is None else until_s
        if closed_loop is not None:
            self._unsent = iter(range(len(workload)))
            self._think_time_s = closed_loop.think_time_s
            for _ in range(closed_loop.concurrency):
                self._send_at(0.0)
        elif workload.arrival_s is None:
            raise InputError("workload: has no arrival times; give an arrival process or a closed loop")
        else:
            self._heap = list(zip(workload.arrival_s.tolist(), range(len(workload)), strict=True))

    @property
    def next_s(self) -> float | None:
        """When the next request arrives; None if none will."""
        return self._heap[0][0] if self._heap else None

    def pop_until(self, now_s: float) -> Iterator[tuple[int, float]]:
        """Take out the requests, as (index, arrival time), that have arrived by ``now_s``."""
        while self._heap and self._heap[0][0] <= now_s:
            arrival_s, index = heappop(self._heap)
            yield index, arrival_s

    def request_left(self, now_s: float) -> None:
        """A request finished or was rejected at ``now_s``: its client thinks, and sends again."""
        self._send_at(now_s + self._think_time_s)

    def _send_at(self, arrival_s: float) -> None:
        if arrival_s < self._until_s:
            index = next(self._unsent, None)
            if index is not None:
                heappush(self._heap, (arrival_s, index))
