"""Which rung to look at when a validation fails, and what speaks for it.

With the times of a live run fed back, a simulation that decides as the run did has its very latencies: every
batch begins and ends when it did. So where decisions hold, whatever is wrong with the requests comes from
batch times, from what lies between stages, or from which batch meets which slow moment. A simulation as it is
has all errors of batch times; one calibrated on the other live runs has what differs between the runs. One at
pace has their sum about right for each stage and bound; it can be wrong by what like batches are off by, by
what lies between stages, by chance, and because what isn't due to slow moments is drawn for each stage and
bound by itself. How much each of the first three comes to is said; what they don't explain is left to the
fourth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.batch_times import BETWEEN
from experiments.forecasts import SIMULATIONS
from experiments.rungs import Ladder, signed
from experiments.text import percent


@dataclass(frozen=True, slots=True)
class Blame:
    """The rung to look at, and why in one line."""

    rung: str
    why: str


def blame(ladder: Ladder) -> Blame | None:
    """None if nothing fails, or there is no verdict."""
    operator, iteration, decisions, request = ladder.rungs
    if decisions.status == "broken":
        return Blame("decisions", decisions.text)
    if request.status != "broken":
        return None
    if decisions.status == "unknown":
        rung = iteration if iteration.status == "broken" else request
        return Blame(rung.name, rung.text)
    if any(each.is_outside and each.judged == float("inf") for each in ladder.comparisons):
        return Blame("request", request.text)
    fed_back = "with the measured times fed back it decides alike, so what differs is batch times"
    speed = ladder.comparisons[0].speed
    if speed == "calibrated":
        off = ", ".join(map(signed, ladder.batch_errors))
        why = f"calibrated on the others, those of each live run are off by {off}"
        holds = not any(each.is_outside_at_pace for each in ladder.comparisons)
        left = "all is within tolerance" if holds else _left_at_pace(ladder)
        return Blame("iteration", f"{fed_back}: {why}; at the pace of its own batches {left}")
    if speed == "measured":
        return Blame("iteration", f"{fed_back}, or which of them comes when: {_left_at_pace(ladder)}")
    kernels = ladder.iterations.kernels
    kernels_are_off = kernels is None or abs(kernels) > ladder.tolerance.iteration.p50
    if operator.status == "broken" and kernels_are_off:
        return Blame("operator", f"{fed_back}, and kernels': {operator.text}")
    within = ", though within their own bounds" if iteration.status == "holds" else ""
    return Blame("iteration", f"{fed_back}{within}: {iteration.text}")


def _left_at_pace(ladder: Ladder) -> str:
    """What is off, in standard errors of chance, and what a simulation at pace can be wrong by."""
    parts = []
    for each in ladder.comparisons:
        chance = each.scatter_at_pace * math.sqrt(1.0 / SIMULATIONS + 1.0)
        if each.is_outside_at_pace and chance > 0.0:
            name = f"{each.metric.removesuffix('_s').upper()} {each.statistic}"
            parts.append(f"{name} is off by {abs(each.error_at_pace) / chance:.1f} standard errors of chance")
    left = ladder.leftover
    if left is not None and left.share > left.by_chance:
        worst = f"{left.worst} {signed(left.worst_error)} over {percent(left.worst_share)} of the time"
        parts.append(f"like batches by {percent(left.share)}, {percent(left.by_chance)} by chance ({worst})")
    elif left is not None:
        parts.append(f"like batches by {percent(left.share)}, which is chance")
    off = _gaps_off(ladder)
    if off is not None:
        parts.append(f"what lies between stages by {percent(abs(off))} of the time")
    return "; ".join(parts)


def _gaps_off(ladder: Ladder) -> float | None:
    """Predicted − measured time between stages ÷ all measured time; None without stages."""
    by_part = ladder.iterations.by_part
    if BETWEEN not in by_part:
        return None
    predicted_s, measured_s = by_part[BETWEEN]
    total_s = sum(taken_s for _, taken_s in by_part.values())
    return (predicted_s - measured_s) / total_s if total_s > 0.0 else None
