"""Who executes the engine's plans: a runner in this process, or ranks in processes of their own."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.plan import Plan
from runtime.runner import Report, Runner, RunnerSpec


class StageDone(NamedTuple):
    """A stage is through with a plan.

    Attributes:
        tokens: (request, token) sampled; last stage only.
        launch_s, execute_s, sample_s: host time by part, as in ``runner.Report``; of the slowest rank.
        logits: [len(tokens), vocab] if they are kept.
        probe_s: the longest probe of a core that its ranks took just before; 0 if none did.
    """

    plan: int
    stage: int
    tokens: list[tuple[int, int]]
    launch_s: float
    execute_s: float
    sample_s: float
    logits: NDArray[np.float32] | None = None
    probe_s: float = 0.0

    @staticmethod
    def of(stage: int, reports: list[Report]) -> StageDone:
        """A stage is as slow as its slowest rank."""
        slowest = max(reports, key=lambda report: report.execute_s + report.sample_s)
        tokens = [pair for report in reports for pair in report.tokens]
        kept = [report.logits for report in reports if report.logits is not None]
        logits = np.concatenate(kept) if kept else None
        host_s = (slowest.launch_s, slowest.execute_s, slowest.sample_s)
        probe_s = max(report.probe_s for report in reports)
        return StageDone(slowest.plan, stage, tokens, *host_s, logits, probe_s)


class Executor(Protocol):
    """Executes plans in the order they are submitted."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages, each of which can hold a plan at a time."""
        ...

    def submit(self, plan: Plan) -> None:
        """Take a plan in; the first stage must be free."""
        ...

    def wait(self, timeout_s: float | None = None) -> StageDone | None:
        """Wait until a stage is through with a plan, in the order in which they are; None if none is after
        ``timeout_s``."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class LocalExecutor:
    """One runner in this process: a plan is executed while the engine waits for it."""

    num_stages = 1

    def __init__(self, spec: RunnerSpec) -> None:
        self.runner = Runner(spec)
        self._plan: Plan | None = None

    def submit(self, plan: Plan) -> None:
        """Take a plan in, to be executed by :meth:`wait`."""
        self._plan = plan

    def wait(self, timeout_s: float | None = None) -> StageDone | None:
        """Execute the plan; a timeout doesn't interrupt it."""
        if self._plan is None:
            return None
        plan, self._plan = self._plan, None
        return StageDone.of(0, [self.runner.run(plan)])

    def close(self) -> None:
        """Nothing is held that the garbage collector doesn't see."""
