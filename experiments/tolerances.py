"""The parts of the configuration that say how far a prediction may be off."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from experiments.section import NotNegative, Positive, Section

Statistic = Literal["mean", "p50", "p90", "p99"]
Allowed = Positive | Annotated[dict[Statistic, Positive], Field(min_length=1)]
Latency = Literal["ttft_s", "tpot_s", "tbt_s", "e2e_s"]
_JUDGED_STATISTICS: tuple[Statistic, ...] = ("mean", "p50", "p99")
_JUDGED: tuple[Latency, ...] = ("ttft_s", "tpot_s")
Speed = Literal["profile", "probed", "calibrated", "measured"]
SPEEDS: tuple[Speed, ...] = ("profile", "probed", "calibrated", "measured")
"""From the one that takes nothing from the live runs to the one that takes most."""


class QuantileTolerance(Section):
    """Relative errors that are allowed, at the median and at the 90th percentile."""

    p50: Positive = 0.05
    p90: Positive = 0.15


class RequestTolerance(QuantileTolerance):
    """Those of the requests, for the latencies in ``metrics``; ``noise_factor`` times the difference between
    live runs is allowed too, if that is larger. Live runs that differ by more than ``most_noise`` say too
    little to judge a latency by.

    ``speed`` says at which speed of the machine the simulation may be judged: that of its profile alone; or,
    unless all is within bounds at that, with the slow moments that probes found; or else calibrated on the
    other live runs; or else at the pace that the run's own batches had (see ``experiments.forecasts``).
    """

    p90: Positive = 0.10
    noise_factor: NotNegative = 1.5
    most_noise: Positive = 0.33
    speed: Speed = "profile"
    metrics: Annotated[list[Latency], Field(min_length=1)] = Field(default_factory=lambda: list(_JUDGED))


class MeasuredTolerance(Section):
    """Relative errors that are allowed against a measured run of another engine.

    Of the latencies, one number for those of ``statistics``, or one for each statistic that is named; of the
    iterations of a log the median, without the first ``fitted_share`` of each segment, to which something was
    fitted. ``segment`` is that of the workload.
    """

    ttft: Allowed = 0.04
    tpot: Allowed = 0.015
    e2e: Allowed = 0.015
    makespan: Positive = 0.03
    decode: Positive = 0.04
    mixed: Positive = 0.06
    context: Positive = 0.06
    statistics: Annotated[list[Statistic], Field(min_length=1)] = Field(
        default_factory=lambda: list(_JUDGED_STATISTICS)
    )
    segment: str | None = None
    fitted_share: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def of_latency(self, name: str, statistic: Statistic) -> float | None:
        """What is allowed for a statistic of ``ttft``, ``tpot`` or ``e2e``; None if it decides nothing."""
        limit: Allowed = getattr(self, name)
        if isinstance(limit, dict):
            return limit.get(statistic)
        return limit if statistic in self.statistics else None
