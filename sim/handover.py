"""Requests that prefill in one place and decode in another: the way between.

A request whose prefill is complete keeps its KV blocks until a copy has arrived. It is sent to a decode
replica at once and waits there, first come first served, until blocks for it are free; then the copy moves,
and with its end the request decodes. A decode replica looks at who waits whenever a batch of its own ends.
So nobody waits in a circle: decodes never wait for prefills.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import simpy

from policies.request import Request
from policies.room import Reservation
from policies.routers import Router
from sim.network import Holding, Network, parts_between
from sim.replica import Replica
from traces.records import Recorder


class Source(Protocol):
    """Where requests prefill."""

    def release(self, request: Request) -> None:
        """Free the KV blocks of a request that has left."""
        ...

    def holdings(self, request: Request) -> Sequence[Holding]:
        """Where its KV cache lies."""
        ...


class _Leaving(NamedTuple):
    request: Request
    source: Source


class Handovers:
    """All hand-overs of a cluster.

    Args:
        targets: the decode replicas.
        router: picks one of them.
        network: what KV caches move over; None if they move while the prefill computes, at no cost.
        layer_bytes_per_token: bytes of keys and values of a token in one layer.
    """

    def __init__(
        self,
        env: simpy.Environment,
        recorder: Recorder,
        targets: Sequence[Replica],
        router: Router,
        network: Network | None,
        layer_bytes_per_token: float,
    ) -> None:
        self.env = env
        self.targets = targets
        self._recorder = recorder
        self._router = router
        self._network = network
        self._layer_bytes = layer_bytes_per_token
        self._waiting: list[deque[_Leaving]] = [deque() for _ in targets]
        for place, target in enumerate(targets):
            target.on_batch_end = partial(self._admit, place)

    def prefilled(self, request: Request, source: Source) -> None:
        """A request's prefill is complete at ``source``, and it has tokens left to make."""
        place = self._router.route(request, [target.scheduler for target in self.targets])
        target, waiting = self.targets[place], self._waiting[place]
        target.scheduler.expect()
        waiting.append(_Leaving(request, source))
        if len(waiting) > 1:
            return  # whoever is in front of it is looked at first, when the replica's batch ends
        if target.is_idle:
            self._admit(place)
        else:
            target.end_run()

    def _admit(self, place: int) -> None:
        """Let those in whose KV blocks are free now."""
        waiting, target = self._waiting[place], self.targets[place]
        while waiting:
            reservation = target.scheduler.reserve(waiting[0].request)
            if reservation is None:
                return
            request, source = waiting.popleft()
            if self._network is None:
                self._arrive(request, source, target, reservation, self.env.now)
            else:
                self.env.process(self._move(self._network, request, source, target, reservation))

    def _move(
        self,
        network: Network,
        request: Request,
        source: Source,
        target: Replica,
        reservation: Reservation,
    ) -> Generator[simpy.Event, Any, None]:
        start_s = self.env.now
        wanted = target.holdings_of(reservation.home, request.prefill_tokens)
        layer_bytes = self._layer_bytes * request.prefill_tokens
        yield from network.move(list(parts_between(source.holdings(request), wanted, layer_bytes)))
        self._arrive(request, source, target, reservation, start_s)

    def _arrive(
        self, request: Request, source: Source, target: Replica, reservation: Reservation, start_s: float
    ) -> None:
        self._recorder.transfer(request.id, target.index, start_s, self.env.now)
        source.release(request)
        target.receive(reservation)
