"""How often a simulation that is right would be within what is allowed.

Live runs differ by chance alone, and so do simulations with other draws. So bounds can be missed by a
simulation that is the live system's very copy: here some draws are taken for the live runs, and the others
are held against them by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, product
from typing import Any

from experiments.ladder import Simulations, compare_requests
from experiments.tolerances import RequestTolerance

_MOST = 150  # choices of draws that are tried


def chance_to_hold(
    at_pace: Sequence[Sequence[Mapping[str, Any]]], tolerance: RequestTolerance
) -> float | None:
    """Share of the choices of one draw of each live run that the others are within bounds of.

    Args:
        at_pace: summaries [runs, draws].

    Returns:
        None with fewer than two draws a run.
    """
    if not at_pace or min(map(len, at_pace)) < 2:
        return None
    held = []
    for chosen in islice(product(*(range(len(draws)) for draws in at_pace)), _MOST):
        live = [draws[place] for draws, place in zip(at_pace, chosen, strict=True)]
        others = [[*draws[:place], *draws[place + 1 :]] for draws, place in zip(at_pace, chosen, strict=True)]
        rows = compare_requests(Simulations(live[0], (), (), others), live, tolerance)
        held.append(not any(row.is_outside_at_pace for row in rows))
    return sum(held) / len(held)
