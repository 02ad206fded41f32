"""Requests that compete for the same KVP groups: where they wait, and where they decode."""

from __future__ import annotations

from collections.abc import Iterator

from policies.decode_pool import DecodePool
from policies.priorities import Priority
from policies.queue import PrefillQueue, Rank, make_queue
from policies.request import Request


class Lane:
    """One order of waiting prefills in two queues, since who holds KV blocks can go on when nobody new can be
    admitted; and the decodes that aren't in flight.

    Attributes:
        groups: KVP groups that the requests may take.
        skips: requests that could not be added to the batch being formed.
    """

    __slots__ = ("_first", "admitted", "groups", "ready", "skips", "unadmitted")

    def __init__(self, priority: Priority, groups: tuple[int, ...]) -> None:
        self.groups = groups
        self.admitted: PrefillQueue = make_queue(priority)
        self.unadmitted: PrefillQueue = make_queue(priority)
        self._first = self.admitted
        self.ready: DecodePool | None = None
        self.skips = 0

    @property
    def waiting(self) -> int:
        """Requests with prefill left that aren't in flight."""
        return len(self.admitted) + len(self.unadmitted)

    def first(self, now_s: float, *, admitted_only: bool) -> Rank | None:
        """Rank of the request that goes first, which :meth:`pop` takes out; None if there is none."""
        held = self.admitted.peek(now_s)
        self._first = self.admitted
        if not admitted_only:
            new = self.unadmitted.peek(now_s)
            if new is not None and (held is None or new < held):
                self._first = self.unadmitted
                return new
        return held

    def pop(self, now_s: float) -> Request:
        """Take out the request that :meth:`first` found."""
        request = self._first.pop(now_s)
        assert request is not None
        return request

    def decode(self, request: Request, block_tokens: int) -> None:
        """The request has completed its prefill and decodes from here on."""
        if self.ready is None:
            self.ready = DecodePool(block_tokens)
        self.ready.add(request)

    def put_back(self, pool: DecodePool) -> None:
        """Make the decodes of a completed batch ready again, the smaller pool joining the larger."""
        if self.ready is None:
            self.ready = pool
        elif len(pool) > len(self.ready):
            pool.absorb(self.ready)
            self.ready = pool
        else:
            self.ready.absorb(pool)

    def preemptable(self) -> Iterator[Request]:
        """Requests that hold KV blocks and aren't in flight."""
        yield from (r for r in self.admitted.requests() if r.scheduled_tokens == r.completed_tokens)
        if self.ready is not None:
            yield from self.ready.members.values()
