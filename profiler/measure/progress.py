"""How far a measuring session is: a bar where there is a terminal and `rich`, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from profiler.measure.points import Point
from profiler.measure.store import Visit

OnVisit = Callable[[Point, Visit, float], None]


@contextmanager
def progress(budget_s: float) -> Iterator[OnVisit]:
    """Yields what is to be called after each visit with the share of the budget that is spent."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:
        yield _silent
        return
    if not sys.stderr.isatty():
        yield _silent
        return
    columns = (
        TextColumn("measuring"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  {task.fields[left]} left, {task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=1.0, left="", what="")

        def update(point: Point, visit: Visit, spent: float) -> None:
            seconds = int(budget_s * (1.0 - spent) + 0.5)
            left = f"{seconds // 60}:{seconds % 60:02d}"
            bar.update(task, completed=spent, left=left, what=point.operator.replace("_", " "))

        yield update


def _silent(point: Point, visit: Visit, spent: float) -> None:
    """Nothing to show."""
