"""``convoy sweep``: a grid of simulations, each kept as soon as it has finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from experiments.build import Experiment, build
from experiments.grid import Cell, cells
from experiments.load import dump_yaml, load_config
from experiments.run import summarize_run
from experiments.tables import print_table
from experiments.text import number, percent, seconds
from sim.cluster import simulate
from specs.errors import InputError
from traces.records import RunRecords

Work = TypeVar("Work")

MARK = "sweep.yaml"
_CELLS = "cells"
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


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """The options of ``convoy sweep``; see ``convoy sweep --help``."""

    config: Path
    overrides: Sequence[str] = ()
    out: str | None = None
    jobs: int | None = None
    backend: str = "loky"
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell: ``status`` is finished, failed or interrupted; ``error`` says why it failed."""

    id: str
    status: str
    error: str = ""


def sweep(options: SweepOptions) -> int:
    """Simulate all cells that haven't finished yet, and write the table of results.

    Returns the exit status: 0, 1 if cells have failed, 130 after Ctrl-C.

    Raises:
        InputError: anything about the configuration or the folder; no cell has been started.
    """
    where = str(options.config)
    grid = cells(options.config, options.overrides)
    folder = _folder(options)
    prepare(folder)
    config = load_config(options.config, options.overrides)
    write_text(folder / MARK, dump_yaml(config))
    unique = {cell.id: cell for cell in grid}
    todo = [cell for cell in unique.values() if not result_file(folder, cell.id).is_file()]
    work = partial(run_cell, where=where, folder=folder.absolute(), summarize=summarize_run)
    failures: dict[str, str] = {}
    interrupted = False
    with _progress(len(unique), len(unique) - len(todo), grid, folder, quiet=options.quiet) as advance:
        try:
            for outcome in outcomes_of(todo, work, options.jobs, options.backend):
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
    if not options.quiet:
        _print(rows, grid, folder)
    if interrupted:
        return 130
    return 1 if failures else 0


def _folder(options: SweepOptions) -> Path:
    """The folder to write to or to go on in.

    Raises:
        InputError: it is there and isn't a sweep's, or can't be written to.
    """
    name = load_config(options.config, options.overrides).name
    folder = Path(options.out) if options.out is not None else Path("out") / f"{name}.sweep"
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder}: is there and is not a folder; choose another")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
            raise InputError(f"--out {folder}: is not empty and holds no sweep of Convoy; choose another")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {folder}: {getattr(error, 'strerror', None) or error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: can't be written to")
    return folder


# -- cells ------------------------------------------------------------------------------------------------


def outcomes_of(
    todo: Sequence[Work], work: Callable[[Work], Outcome], jobs: int | None = None, backend: str = "loky"
) -> Iterator[Outcome]:
    """Do ``work`` on everything in ``todo``, as much at once as there are jobs (None: one for each core);
    outcomes come as they are ready."""
    jobs = min(jobs or _cores(), max(len(todo), 1))
    if backend == "loky" and jobs == 1:
        yield from map(work, todo)
        return
    from joblib import Parallel, delayed, parallel_config

    if backend == "ray":
        _start_ray()
    with parallel_config(backend=backend):
        # Cells are handed out a few at a time, and nothing of a finished one stays here.
        parallel = Parallel(
            n_jobs=jobs, return_as="generator_unordered", pre_dispatch="2*n_jobs", batch_size=1
        )
        yield from parallel(delayed(work)(each) for each in todo)


def run_cell(
    cell: Cell, *, where: str, folder: Path, summarize: Callable[[RunRecords, Experiment], Mapping[str, Any]]
) -> Outcome:
    """Simulate one cell and keep its summary in ``folder``."""

    def summary() -> Mapping[str, Any] | None:
        experiment = build(cell.config, where)
        records = simulate(experiment.workload, experiment.setup)
        return None if records.interrupted else summarize(records, experiment)

    return keep_result(cell.id, folder, summary)


def keep_result(id: str, folder: Path, compute: Callable[[], Mapping[str, Any] | None]) -> Outcome:
    """Compute a cell's result and keep it in ``folder``, complete or not at all; None is an interruption."""
    try:
        result = compute()
        if result is None:
            return Outcome(id, "interrupted")
        write_text(result_file(folder, id), json.dumps(result, allow_nan=False) + "\n")
    except KeyboardInterrupt:
        return Outcome(id, "interrupted")
    except InputError as error:
        return Outcome(id, "failed", " ".join(str(error).split()))
    except Exception as error:  # one cell's trouble must not end the others
        return Outcome(id, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Outcome(id, "finished")


def prepare(folder: Path) -> None:
    """Make room for results in ``folder``; what a killed process left half-written goes."""
    (folder / _CELLS).mkdir(parents=True, exist_ok=True)
    for left_over in (folder / _CELLS).glob(".*.tmp"):
        left_over.unlink(missing_ok=True)


def result_file(folder: Path, id: str) -> Path:
    """Where the result of a cell is kept."""
    return folder / _CELLS / f"{id}.json"


def write_text(path: Path, text: str) -> None:
    """Write a file that is there in full or not at all, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_ray() -> None:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError:
        raise InputError(
            "--backend ray: ray isn't installed; in Convoy's folder: pip install -e '.[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    register_ray()


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


def read_summary(folder: Path, id: str) -> dict[str, Any] | None:
    """The summary of a finished cell."""
    try:
        found = json.loads(result_file(folder, id).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as columns: ``ttft_s_p50`` and so on."""
    columns: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            columns |= {f"{key}_{name}": each for name, each in value.items()}
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
        f"{done:,} of {len(rows):,} cells finished, {len(failed):,} failed. Results: {folder / 'results.csv'}"
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
