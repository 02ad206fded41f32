"""Which rung to look at when a validation fails, and what speaks for it.

With the times of a live run fed back, a simulation that decides as the run did has its very latencies: every
batch begins and ends when it did. So where decisions hold, whatever is wrong with the requests comes from
batch times, or from what lies between stages. What is said beside that depends on what was judged: a
simulation as it is has all errors of batch times; one at pace has their sum right for each stage and bound,
and is wrong by what like batches are off, by what lies between stages, or by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.batch_times import BETWEEN, PARTS
from experiments.ladder import Comparison
from experiments.pace import Leftover
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
    fed_back = "with the measured times fed back it decides alike, so batch times are to blame"
    if any(each.speed == "measured" for each in ladder.comparisons):
        return Blame("iteration", f"{fed_back}: {_left_at_pace(ladder)}")
    if operator.status == "broken" and _kernels_are_off(ladder):
        return Blame("operator", f"{fed_back}, and kernels for theirs: {operator.text}")
    return Blame("iteration", f"{fed_back}: {iteration.text}")


def _left_at_pace(ladder: Ladder) -> str:
    """What a simulation at pace can be wrong by, each beside its size."""
    parts = []
    left: Leftover | None = ladder.leftover
    if left is not None:
        worst = f"{left.worst} {signed(left.worst_error)} over {percent(left.worst_share)} of the time"
        parts.append(f"at pace like batches are off by {percent(left.share)} ({worst})")
    off = _gaps_off(ladder)
    if off is not None:
        parts.append(f"what lies between stages by {percent(abs(off))}")
    outside = [each for each in ladder.comparisons if each.is_outside]
    parts.append(f"simulations differ by chance by {_chance(outside)}")
    return ", ".join(parts)


def _chance(outside: Sequence[Comparison]) -> str:
    return ", ".join(
        f"±{percent(each.scatter_at_pace)} ({each.metric.removesuffix('_s').upper()} {each.statistic})"
        for each in outside
    )


def _gaps_off(ladder: Ladder) -> float | None:
    """Predicted − measured time between stages ÷ all measured time; None without stages."""
    by_part = ladder.iterations.by_part
    if BETWEEN not in by_part:
        return None
    predicted_s, measured_s = by_part[BETWEEN]
    total_s = sum(taken_s for _, taken_s in by_part.values())
    return (predicted_s - measured_s) / total_s if total_s > 0.0 else None


def _kernels_are_off(ladder: Ladder) -> bool:
    """Whether kernels take another time, all batches together, than is predicted; yes if unknown."""
    by_part = ladder.iterations.by_part
    if not all(part in by_part for part in PARTS):
        return True
    (layers_s, live_layers_s), (head_s, live_head_s) = (by_part[part] for part in PARTS[:2])
    measured_s = live_layers_s + live_head_s
    return abs(layers_s + head_s - measured_s) > ladder.tolerance.iteration.p50 * measured_s
