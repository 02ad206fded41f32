"""When the first token of a request is due."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TtftTarget:
    """D = max(multiplier · C[L], floor): longer prompts may take longer (arXiv 2409.17264).

    With ``multiplier`` 0 it is the same number of seconds for everybody.
    """

    multiplier: float = 1.5
    floor_s: float = 0.5

    def deadline_s(self, work_s: float) -> float:
        """D in seconds after arrival, for a prompt whose prefill alone takes ``work_s``."""
        return max(self.multiplier * work_s, self.floor_s)


@dataclass(frozen=True, slots=True)
class Slo:
    """What one class of requests was promised: time to first token, and time per output token."""

    ttft: TtftTarget = TtftTarget()
    tpot_s: float | None = None
