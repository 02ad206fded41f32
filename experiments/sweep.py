"""``convoy sweep``: a grid of simulations, each kept as soon as it has finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.grid import Cell, cells
from experiments.load import dump_yaml, load_config
from experiments.store import Outcome, StudyOptions, is_finished, open_store, read_summary, run_cells
from experiments.tables import print_table
from experiments.text import number, percent, seconds

_NOT_RESULTS = ("wall_s",)  # differ from run to run
_SHOWN_ROWS = 40
_HEADLINES: Mapping[str, Callable[[float], str]] = {
    "ttft_s_p50": seconds,
    "ttft_s_p99": seconds,
    "tpot_s_p50": seconds,
    "tpot_s_p99": seconds,
    "slo_attainment": percent,
    "goodput_rps": number,
}


def sweep(options: StudyOptions) -> int:
    """Simulate all cells that haven't finished yet, and write the table of results.

    Returns the exit status: 0, 1 if cells have failed, 130 after Ctrl-C.

    Raises:
        InputError: anything about the configuration or the folder; no cell has been started.
    """
    where = str(options.config)
    grid = cells(options.config, options.overrides)
    config = load_config(options.config, options.overrides)
    folder = open_store(options.out, config.name, "sweep", dump_yaml(config))
    unique = {cell.id: cell for cell in grid}
    done = sum(is_finished(folder, id) for id in unique)
    failures: dict[str, str] = {}
    interrupted = False
    with _progress(len(unique), done, grid, folder, quiet=options.quiet) as advance:
        try:
            for outcome in run_cells(grid, where, folder, jobs=options.jobs, backend=options.backend):
                if outcome.status == "interrupted":
                    interrupted = True
                    break
                if outcome.status == "failed":
                    failures[outcome.id] = outcome.error
                advance(outcome)
        except KeyboardInterrupt:
            interrupted = True
    rows = table(folder, grid, failures)
    _write_results(folder, rows)
    from experiments.sweep_report import write_report

    write_report(rows, list(grid[0].changes), config.name, dump_yaml(config), folder, plots=options.plots)
    if not options.quiet:
        _print(rows, grid, folder)
    if interrupted:
        return 130
    return 1 if failures else 0


# -- results ----------------------------------------------------------------------------------------------


def table(folder: Path, grid: Sequence[Cell], failures: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each cell, in the grid's order: what it changes, its status, its summary in columns."""
    rows = []
    for cell in grid:
        row: dict[str, Any] = dict(cell.changes)
        row |= {"cell": cell.id, "status": "waiting", "error": failures.get(cell.id, "")}
        if cell.id in failures:
            row["status"] = "failed"
        elif (summary := read_summary(folder, cell.id)) is not None:
            row |= {"status": "finished"} | flat(summary)
        rows.append(row)
    return rows


def flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as columns: ``ttft_s_p50`` and so on."""
    columns: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            columns |= {f"{key}_{name}": each for name, each in flat(value).items()}
        elif key not in _NOT_RESULTS:
            columns[key] = value
    return columns


def _write_results(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """results.csv and results.parquet, the same table; a swept value that isn't a number is text."""
    import pandas as pd

    frame = pd.DataFrame([{key: _cell_value(value) for key, value in row.items()} for row in rows])
    for name in frame.columns:
        if (
            frame[name].map(type).nunique() > 1
            and frame[name].map(lambda value: isinstance(value, str)).any()
        ):
            frame[name] = frame[name].astype(str)
    partial = folder / ".results.tmp"
    frame.to_csv(partial, index=False)
    partial.replace(folder / "results.csv")
    frame.to_parquet(partial, index=False)
    partial.replace(folder / "results.parquet")


def _cell_value(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


# -- on the screen ----------------------------------------------------------------------------------------


def _print(rows: Sequence[Mapping[str, Any]], grid: Sequence[Cell], folder: Path) -> None:
    keys = list(grid[0].changes)
    header = [*keys, "status", *(name for name in _HEADLINES if any(name in row for row in rows))]
    shown = rows[:_SHOWN_ROWS]
    print_table(header, [_texts(row, header) for row in shown])
    if len(rows) > len(shown):
        print(f"… and {len(rows) - len(shown):,} more")
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed[:10]:
        print(f"failed: {_name(row, keys)}: {row['error']}")
    done = sum(row["status"] == "finished" for row in rows)
    print(
        f"{done:,} of {len(rows):,} cells finished, {len(failed):,} failed. "
        f"Results: {folder / 'results.csv'}, report: {folder / 'report.html'}"
    )


def _texts(row: Mapping[str, Any], header: Sequence[str]) -> list[str]:
    return [_HEADLINES.get(name, str)(row[name]) if name in row else "" for name in header]


def _name(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} = {row[key]}" for key in keys)


@contextmanager
def _progress(
    total: int, done: int, grid: Sequence[Cell], folder: Path, *, quiet: bool
) -> Iterator[Callable[[Outcome], None]]:
    """A progress bar over a table of the cells that finished last, on a terminal; nothing elsewhere."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield lambda outcome: None
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    by_id = {cell.id: cell for cell in grid}
    keys = list(grid[0].changes)
    names = list(_HEADLINES)[:4]
    header = [*keys, "status", *names]
    bar = Progress(
        TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), auto_refresh=False
    )
    task = bar.add_task("cells", total=total, completed=done)
    last: list[list[str]] = []

    def picture() -> Group:
        found = Table(box=None, pad_edge=False, header_style="dim")
        for name in header:
            found.add_column(name)
        for row in last:
            found.add_row(*row)
        return Group(found, bar)

    with Live(picture(), console=Console(stderr=True), transient=True, refresh_per_second=4) as live:

        def advance(outcome: Outcome) -> None:
            row = {**by_id[outcome.id].changes, "status": outcome.status}
            row |= flat(read_summary(folder, outcome.id) or {})
            last.append(_texts(row, header))
            del last[:-8]
            bar.advance(task)
            live.update(picture())

        yield advance
