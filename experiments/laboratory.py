"""Where plans and capacity searches have their simulations made: cells of a store, several at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.grid import Cell
from experiments.store import is_finished, read_summary, run_cells
from specs.errors import InputError


@dataclass(frozen=True, slots=True)
class Laboratory:
    """Simulates cells, in ``jobs`` processes, and keeps them in ``folder``; ``where`` begins messages."""

    folder: Path
    where: str
    jobs: int | None = None
    backend: str = "loky"
    quiet: bool = False

    def summaries(self, cells: Sequence[Cell], doing: str) -> list[Mapping[str, Any]]:
        """The summary of each cell, in their order; ``doing`` says on the screen what is under way.

        Raises:
            InputError: a cell fails; its configuration or its file is at fault.
            KeyboardInterrupt: Ctrl-C; what has finished is kept.
        """
        todo = {cell.id for cell in cells if not is_finished(self.folder, cell.id)}
        failures: dict[str, str] = {}
        with _counting(doing, len(todo), quiet=self.quiet) as advance:
            for outcome in run_cells(cells, self.where, self.folder, jobs=self.jobs, backend=self.backend):
                if outcome.status == "interrupted":
                    raise KeyboardInterrupt
                if outcome.status == "failed":
                    failures[outcome.id] = outcome.error
                advance()
        for error in failures.values():
            raise InputError(error)
        found = [read_summary(self.folder, cell.id) for cell in cells]
        missing = [cell.id for cell, summary in zip(cells, found, strict=True) if summary is None]
        if missing:
            raise InputError(
                f"{self.folder}/cells/{missing[0]}.json: can't be read; remove it and start again"
            )
        return [summary for summary in found if summary is not None]


@contextmanager
def _counting(doing: str, total: int, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, if that is a terminal."""
    if quiet or total == 0 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)
