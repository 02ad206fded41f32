"""The table of the requests: which error is how large, how large it may be, and which one is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from experiments.batch_times import ErrorSummary
from experiments.config import RequestTolerance
from experiments.ladder import Comparison, Simulations, compare_requests


def test_error_summaries_by_hand() -> None:
    errors = ErrorSummary.of(np.array([1.1, 1.8, 3.0, 0.5]), np.array([1.0, 2.0, 3.0, 0.0]))
    assert errors is not None and errors.count == 3
    assert errors.p50 == pytest.approx(0.1) and errors.p90 == pytest.approx(0.1)
    assert errors.bias == pytest.approx(5.9 / 6.0 - 1.0)
    assert ErrorSummary.of(np.zeros(2), np.zeros(2)) is None


def summary(ttft_s: float, tpot_s: float | None = 0.01) -> dict[str, Any]:
    result = {"ttft_s": dict.fromkeys(("mean", "p50", "p90", "p99"), ttft_s)}
    return (
        result
        if tpot_s is None
        else result | {"tpot_s": dict.fromkeys(("mean", "p50", "p90", "p99"), tpot_s)}
    )


def compared(
    simulated: dict[str, Any],
    live: Sequence[dict[str, Any]],
    tolerance: RequestTolerance,
    *,
    probed: Sequence[dict[str, Any]] = (),
    calibrated: Sequence[Sequence[dict[str, Any]]] = (),
    at_pace: Sequence[Sequence[dict[str, Any]]] = (),
) -> list[Comparison]:
    """At pace it is as it is, unless something else is given."""
    paced = at_pace or [[simulated] for _ in live]
    return compare_requests(Simulations(simulated, probed, calibrated, paced), live, tolerance)


def test_an_error_may_be_as_large_as_the_tolerance_or_the_noise() -> None:
    tolerance = RequestTolerance(p50=0.05, p90=0.1, noise_factor=1.5)
    # Live runs of 0.9 and 1.1 s: 20 % noise, so 30 % are allowed.
    live = [summary(0.9), summary(1.1)]
    rows = {(row.metric, row.statistic): row for row in compared(summary(1.29), live, tolerance)}
    ttft = rows["ttft_s", "p50"]
    assert (ttft.live_s, ttft.error, ttft.noise, ttft.allowed) == pytest.approx((1.0, 0.29, 0.2, 0.3))
    assert ttft.passes and rows["ttft_s", "p99"].allowed is None
    tpot = rows["tpot_s", "p90"]
    assert (tpot.error, tpot.noise, tpot.allowed) == pytest.approx((0.0, 0.0, 0.1))
    assert not all(row.passes for row in compared(summary(1.31), live, tolerance))
    alone = compared(summary(1.06), [summary(1.0)], tolerance)
    assert alone[0].noise is None and not all(row.passes for row in alone)


def test_the_first_error_within_what_is_allowed_is_judged() -> None:
    fair = RequestTolerance(p50=0.05, p90=0.1, speed="measured")
    live = [summary(1.0), summary(1.0)]
    good, bad = summary(1.04), summary(1.5)
    others: dict[str, Any] = {"probed": [bad, bad], "calibrated": [[bad], [bad]], "at_pace": [[bad], [bad]]}

    def judged(simulated: dict[str, Any], tolerance: RequestTolerance, **found: Any) -> tuple[bool, str]:
        rows = compared(simulated, live, tolerance, **(others | found))
        (speed,) = {row.speed for row in rows}
        return all(row.passes for row in rows), speed

    assert judged(good, fair) == (True, "profile")
    assert judged(bad, fair, probed=[good, good]) == (True, "probed")
    assert judged(bad, fair, calibrated=[[good], [good]]) == (True, "calibrated")
    assert judged(bad, fair, at_pace=[[good], [good]]) == (True, "measured")
    assert judged(bad, fair) == (False, "measured")
    # No further than the configuration says.
    strict = fair.model_copy(update={"speed": "profile"})
    assert judged(bad, strict, probed=[good, good]) == (False, "profile")
    between = fair.model_copy(update={"speed": "calibrated"})
    assert judged(bad, between, at_pace=[[good], [good]]) == (False, "calibrated")
    # Without probes, or other runs, there is nothing of the kind to be judged.
    assert judged(bad, between, probed=[], calibrated=[]) == (False, "profile")


def test_what_is_simulated_of_a_run_is_held_against_it_and_the_worst_counts() -> None:
    tolerance, live = RequestTolerance(), [summary(1.0), summary(2.0)]
    (row, *_) = compared(
        summary(1.5),
        live,
        tolerance,
        probed=[summary(0.9), summary(2.4)],
        calibrated=[[summary(1.0), summary(1.4)], [summary(1.5), summary(1.7)]],
        at_pace=[[summary(0.9), summary(1.3)], [summary(1.6), summary(2.0)]],
    )
    assert row.error == pytest.approx(0.0)  # of the mean of both
    assert row.error_probed == pytest.approx(0.2)
    assert row.error_calibrated == pytest.approx(0.2)  # and −20 %, whichever comes first
    assert row.error_at_pace == pytest.approx(0.1)
    # Standard deviation of samples of two that are 0.4 apart, ÷ the mean of all.
    assert row.scatter_at_pace == pytest.approx(0.4 / 2**0.5 / 1.45)
    (other, *_) = compared(
        summary(1.5), live, tolerance, calibrated=[[summary(1.0), summary(1.3)], [summary(1.6)]]
    )
    assert other.error_calibrated == pytest.approx(-0.2) and other.error_probed is None
    assert other.scatter_at_pace == 0.0
    assert compared(summary(1.0), [summary(1.0)], tolerance)[0].error_calibrated is None


def test_a_latency_that_one_side_lacks_never_passes() -> None:
    rows = compared(summary(1.0, None), [summary(1.0)], RequestTolerance())
    tpot = [row for row in rows if row.metric == "tpot_s"]
    assert tpot and all(row.error == float("inf") for row in tpot)
    assert not all(row.passes for row in tpot)
