"""Does a profile still hold? A few of its points, measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from profiler.coverage import entry_model
from profiler.measure import environment
from profiler.measure.grid import spread
from profiler.measure.measurer import Measurer
from profiler.measure.points import Point
from profiler.measure.result import quantile_of
from profiler.measure.store import OK
from profiler.tables import COLUMNS, Profile, read_profile, read_table
from runtime.runner import DTYPES, find_device
from specs.devices import get_device
from specs.errors import InputError

CHECKED = ("gemm", "prefill_attention", "decode_attention", "norm", "layer", "host", "iteration")
POINTS = 5  # of each
VISITS = 5
TOLERANCE = 0.10  # of the median of an operator's points
LONGEST_S = 0.2  # points that take longer aren't measured again


@dataclass(frozen=True, slots=True)
class Drift:
    """How an operator's times have moved: median and worst of now ÷ then − 1 over `points` points."""

    operator: str
    points: int
    change: float
    worst: float
    allowed: float

    @property
    def holds(self) -> bool:
        return abs(self.change) <= self.allowed


def check(
    folder: Path, *, device: str = "auto", threads: int | None = None, say: Callable[[str], None] = print
) -> bool:
    """Measure a few points of the profile in `folder` again and say how they have moved.

    Returns whether the profile still holds: of each operator, the median change is within 10 %, or within
    twice the spread that the profile itself states.

    Raises:
        InputError: not a measured profile, or of another kind of device than is here.
    """
    profile = read_profile(folder)
    if profile.source != "measured":
        raise InputError(f"{folder}: is {profile.source}; only a measured profile can be checked")
    here = find_device(_kind(profile) if device == "auto" else device)
    called = environment.describe(here)
    if profile.conditions.get("device") not in (None, called):
        raise InputError(f"{folder}: was measured on {profile.conditions['device']!r}, this is {called!r}")
    if here.type == "cpu":
        torch.set_num_threads(threads or profile.threads or torch.get_num_threads())
    drifts = _drifts(profile, here)
    for drift in drifts:
        verdict = "holds" if drift.holds else "HAS MOVED"
        say(
            f"{drift.operator:<18} {drift.points} points: median {drift.change:+.1%} (allowed "
            f"±{drift.allowed:.0%}), worst {drift.worst:+.1%}  {verdict}"
        )
    holds = all(drift.holds for drift in drifts)
    say(f"{folder}: {'still holds' if holds else 'no longer holds; measure again with `convoy profile`'}")
    return holds


def _kind(profile: Profile) -> str:
    return "cpu" if profile.device == "cpu" else "cuda"


def _drifts(profile: Profile, here: torch.device) -> list[Drift]:
    chosen: dict[Point, tuple[float, float]] = {}
    for info in profile.tables:
        if info.operator not in CHECKED:
            continue
        table = read_table(profile, info)
        columns = np.stack([table.shape[name] for name in COLUMNS[info.operator].values()], axis=1)
        relative = np.zeros(len(table)) if table.spread_s is None else table.spread_s / table.time_s
        then = {
            Point(info.operator, tuple(map(int, row))): (float(time_s), float(doubt))
            for row, time_s, doubt in zip(columns, table.time_s, relative, strict=True)
            if time_s <= LONGEST_S
        }
        chosen |= {point: then[point] for point in spread(sorted(then), POINTS)}
    if not chosen:
        raise InputError(f"{profile.path}: has none of the tables {', '.join(CHECKED)}")
    now = _measure(profile, here, list(chosen))
    drifts = []
    for operator in dict.fromkeys(point.operator for point in chosen):
        points = [point for point in chosen if point.operator == operator and point in now]
        if not points:
            continue
        changes = [now[point] / chosen[point][0] - 1.0 for point in points]
        doubt = median(chosen[point][1] for point in points)
        drifts.append(
            Drift(operator, len(points), median(changes), max(changes, key=abs), max(TOLERANCE, 2 * doubt))
        )
    return drifts


def _measure(profile: Profile, here: torch.device, points: list[Point]) -> dict[Point, float]:
    """Times now, of visits that take turns, by the same quantile of them as the profile's."""
    dtype = next(info.dtype for info in profile.tables)
    measurer = Measurer(
        entry_model(profile.model, str(profile.path)),
        get_device(profile.device),
        here,
        DTYPES[dtype],
        points=points,
        visit_s=0.05,
    )
    found: dict[Point, list[float]] = {}
    try:
        for _ in range(VISITS):
            for point in points:
                visit = measurer.visit(point)
                if visit.status == OK:
                    found.setdefault(point, []).append(visit.time_s)
    finally:
        measurer.close()
    return {
        point: float(np.quantile(times, quantile_of(point.operator, here.type)))
        for point, times in found.items()
    }
