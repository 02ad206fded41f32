"""Where requests come from: a list of arrival times, or clients that wait for their answers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy
from simpy.events import URGENT

from traces.synthesis import ClosedLoop
from traces.workload import Workload

Deliver = Callable[[int, float], None]
"""Called with a request's index and its arrival time in seconds."""


class UrgentTimeout(simpy.Event):
    """A timeout that comes before everything else that happens at the same time.

    An arrival at the very moment a batch ends is therefore seen by the next batch, whichever of the two
    events was scheduled first.
    """

    def __init__(self, env: simpy.Environment, delay_s: float) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        env.schedule(self, URGENT, max(delay_s, 0.0))


class OpenLoop:
    """Requests arrive at the workload's times, whatever the system does."""

    def __init__(self, env: simpy.Environment, workload: Workload, deliver: Deliver) -> None:
        if workload.arrival_s is None:
            raise ValueError("the workload has no arrival times")
        self._env = env
        self._arrivals_s: list[float] = workload.arrival_s.tolist()
        self._deliver = deliver
        env.process(self._arrive())

    def _arrive(self) -> Generator[simpy.Event, Any, None]:
        env = self._env
        for index, arrival_s in enumerate(self._arrivals_s):
            if arrival_s > env.now:
                yield UrgentTimeout(env, arrival_s - env.now)
            self._deliver(index, arrival_s)

    def request_left(self) -> None:
        """A request finished or was rejected: nothing follows from it."""


class ClosedLoopClients:
    """Clients that each send the workload's next request a think time after their last one left.

    With ``until_s``, nothing is sent at or after that time.
    """

    def __init__(
        self,
        env: simpy.Environment,
        workload: Workload,
        loop: ClosedLoop,
        deliver: Deliver,
        until_s: float | None,
    ) -> None:
        self._env = env
        self._left = iter(range(len(workload)))
        self._think_time_s = loop.think_time_s
        self._deliver = deliver
        self._until_s = float("inf") if until_s is None else until_s
        for _ in range(loop.concurrency):
            self._send_after(0.0)

    def request_left(self) -> None:
        """A client has its answer (or refusal): it thinks, and sends again."""
        self._send_after(self._think_time_s)

    def _send_after(self, delay_s: float) -> None:
        """Let a client send the next request, if there is one and it is still time."""
        if self._env.now + delay_s < self._until_s:
            index = next(self._left, None)
            if index is not None:
                self._env.process(self._send(index, delay_s))

    def _send(self, index: int, delay_s: float) -> Generator[simpy.Event, Any, None]:
        yield UrgentTimeout(self._env, delay_s)
        self._deliver(index, self._env.now)
