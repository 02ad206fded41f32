"""Whether a core runs at its usual speed, by a probe that has nothing to do with what is served."""

from __future__ import annotations

import time

import torch


class CoreProbe:
    """A few small operations, timed.

    Virtual machines share cores with others: for moments of 50 ms to some seconds everything takes 1.3 to 2
    times as long, and nothing in the system says so. This does: its inputs stay in the core's own cache, so
    that it takes the same time again to 3 %, or nearly twice as long while somebody else is on the core.

    Args:
        operations: of one probe, about 1 µs each; they are done twice, and timed the second time: what ran
            before may have left nothing of the probe's own code in the caches.
    """

    def __init__(self, operations: int = 30) -> None:
        self._operations = operations
        self._x = torch.ones(4, 256)
        for _ in range(60):
            self.duration_s()

    def duration_s(self) -> float:
        """Take a probe."""
        x = self._x
        duration_s = 0.0
        for _ in range(2):
            began_s = time.perf_counter()
            for _ in range(self._operations):
                x * x
            duration_s = time.perf_counter() - began_s
        return duration_s
