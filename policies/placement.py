"""In which KVP group a request begins."""

from __future__ import annotations

from policies.request import Request
from policies.sharding import Sharding


class PendingWork:
    """Homes requests where the least prefill work is pending, measured as the sum of the squares of the
    prompts' lengths, as in Medha's code. A request in several shards counts in all its groups.

    Requests that spread over all groups make every home equally good by that measure; of such homes the one
    is taken where the least work begins, or every long prompt would begin in the first group.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._pending = [0] * sharding.groups
        self._homed = [0] * sharding.groups  # the same of the requests whose home it is

    def place(self, request: Request) -> None:
        """Choose the home of a new request; of equal ones the first."""
        if self._sharding.groups > 1:
            homes = range(self._sharding.groups)
            request.home = min(homes, key=lambda home: (self._work_at(home, request), self._homed[home]))
            self._add(request, 1)

    def prefilled(self, request: Request) -> None:
        """Its prefill is complete, or given up."""
        self._add(request, -1)

    def recompute(self, request: Request) -> None:
        """It has to prefill again, in the groups it had."""
        self._add(request, 1)

    def _groups(self, home: int, request: Request) -> list[int]:
        return [self._sharding.group(home, shard) for shard in range(request.shards)]

    def _work_at(self, home: int, request: Request) -> int:
        return sum(self._pending[group] for group in self._groups(home, request))

    def _add(self, request: Request, sign: int) -> None:
        if self._sharding.groups > 1:
            work = sign * request.prefill_tokens**2
            self._homed[request.home] += work
            for group in self._groups(request.home, request):
                self._pending[group] += work
