"""The raw record of a measuring session: a file that is only ever appended to.

    # {"device": …}                                           the set-up, as JSON
    operator,shape,visit,time_s,spread_s,samples,cost_s,status
    gemm,16;768;256,0,1.2e-05,3e-07,9,0.031,ok

A point is visited several times, far apart, so that a disturbance of seconds spoils one visit only. What
survives a kill is every visit that ended; a line cut short is dropped.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from profiler.measure.points import Point
from specs.errors import InputError

FILE = "visits.csv"
HEADER = ("operator", "shape", "visit", "time_s", "spread_s", "samples", "cost_s", "status")
OK, OUT_OF_MEMORY = "ok", "out of memory"


class Visit(NamedTuple):
    """One visit of one point: the middle of its samples, half their interquartile range, their number; what
    the visit cost in all; `status` is ok, or why there is no time (then `time_s` is 0)."""

    time_s: float
    spread_s: float
    samples: int
    cost_s: float
    status: str = OK


@dataclass(slots=True)
class Measured:
    """All visits of one point."""

    visits: list[Visit] = field(default_factory=list)

    @property
    def status(self) -> str:
        """ok, or why it can't be measured."""
        return next((visit.status for visit in self.visits if visit.status != OK), OK)

    def time_s(self, quantile: float) -> float:
        """The time: this quantile of the visits' times."""
        return float(np.quantile([visit.time_s for visit in self.visits], quantile))

    def spread_s(self) -> float:
        """The larger of the spread within visits and half the range between them."""
        times = [visit.time_s for visit in self.visits]
        within = float(np.median([visit.spread_s for visit in self.visits]))
        return max(within, (max(times) - min(times)) / 2)

    @property
    def samples(self) -> int:
        return sum(visit.samples for visit in self.visits)


class Store:
    """The visits in `folder`, in memory and on disk.

    Args:
        setup: what identifies the session; resuming needs the same.
        resume: go on with what is there; else there must be nothing.

    Raises:
        InputError: visits are there and `resume` is false, or they are of another set-up, or unreadable.
    """

    def __init__(self, folder: Path, setup: Mapping[str, object], *, resume: bool) -> None:
        self.path = folder / FILE
        self.points: dict[Point, Measured] = {}
        self.cost_s = 0.0
        head = f"# {json.dumps(dict(setup), sort_keys=True)}\n{','.join(HEADER)}\n"
        if self.path.exists():
            if not resume:
                raise InputError(f"{self.path}: is there already; go on with --resume, or take another --out")
            self._read(head)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text(head, encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def add(self, point: Point, visit: Visit) -> None:
        """Record a visit; it is on disk when this returns."""
        number = len(self._keep(point, visit).visits) - 1
        times = (f"{visit.time_s:.6g}", f"{visit.spread_s:.3g}", visit.samples, f"{visit.cost_s:.4g}")
        self._writer.writerow((point.operator, point.shape_text, number, *times, visit.status))
        self._file.flush()

    def measured(self) -> dict[str, dict[Point, Measured]]:
        """The points that have a time, by operator."""
        found: dict[str, dict[Point, Measured]] = {}
        for point, measured in self.points.items():
            if measured.status == OK:
                found.setdefault(point.operator, {})[point] = measured
        return found

    def failed(self) -> list[tuple[Point, str]]:
        """The points that can't be measured, and why."""
        return [(point, measured.status) for point, measured in self.points.items() if measured.status != OK]

    def close(self) -> None:
        self._file.close()

    def _keep(self, point: Point, visit: Visit) -> Measured:
        measured = self.points.setdefault(point, Measured())
        measured.visits.append(visit)
        self.cost_s += visit.cost_s
        return measured

    def _read(self, head: str) -> None:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]  # a line cut short by a kill is dropped
        try:
            lines = whole.decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: not a text file") from None
        expected = head.splitlines()
        if lines[1:2] != expected[1:]:
            raise InputError(
                f"{self.path}: not a record of measurements; its second line must be {expected[1]}"
            )
        if lines[0] != expected[0]:
            raise InputError(
                f"{self.path}: was measured with another set-up: {_difference(lines[0], expected[0])}"
            )
        for number, row in enumerate(csv.reader(lines[2:]), start=3):
            try:
                operator, shape, _, time_s, spread_s, samples, cost_s, status = row
                visit = Visit(float(time_s), float(spread_s), int(samples), float(cost_s), status)
                self._keep(Point.parse(operator, shape), visit)
            except (ValueError, InputError) as error:
                raise InputError(f"{self.path}: row {number} is unreadable ({error})") from None
        if len(whole) != len(raw):
            self.path.write_bytes(whole)


def _difference(found: str, wanted: str) -> str:
    """The first key in which two set-ups differ."""
    try:
        old, new = json.loads(found.removeprefix("# ")), json.loads(wanted.removeprefix("# "))
        key = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
    except (ValueError, StopIteration, AttributeError):
        return "its first line is unreadable"
    return f"{key} is {old.get(key)}, now {new.get(key)}"
