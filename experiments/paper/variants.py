"""Rules of the authors' own code that ours differ from, as policies; docs/policies.md has their effect."""

from __future__ import annotations

from policies.priorities import LARS
from policies.request import Request

_FIRST = -1e18  # before every relative slack


class HalfDoneFirst(LARS):
    """LARS among prompts that haven't begun; whoever has begun is finished first, as one variant of the
    authors' code does it."""

    def line(self, request: Request) -> tuple[float, float]:
        intercept, slope = super().line(request)
        return (_FIRST + request.arrival_s, 0.0) if request.scheduled_tokens else (intercept, slope)
