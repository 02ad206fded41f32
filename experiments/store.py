"""The store of cells: one simulation each, kept as soon as it has finished, by one process or many.

Sweeps, plans, capacity searches and the paper's figures share it. A cell that is there is never simulated
again; a process that is killed, at whatever moment, leaves whole cells only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from experiments.build import Experiment, build
from experiments.grid import Cell
from experiments.run import summarize_run
from sim.cluster import simulate
from specs.errors import InputError
from traces.records import RunRecords

Work = TypeVar("Work")

_CELLS = "cells"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell: ``status`` is finished, failed or interrupted; ``error`` says why it failed."""

    id: str
    status: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """The options of ``convoy sweep``, ``plan`` and ``capacity``; their ``--help`` says what they mean."""

    config: Path
    overrides: Sequence[str] = ()
    out: str | None = None
    jobs: int | None = None
    backend: str = "loky"
    plots: bool = True
    quiet: bool = False


def open_store(out: str | None, default: str, kind: str, text: str) -> Path:
    """The folder to write to or to go on in: ``out``, or else ``out/DEFAULT.KIND``.

    ``kind`` is sweep, plan or capacity; the folder is known by the file ``KIND.yaml`` in it, which is written
    with ``text``, before anything else is there.

    Raises:
        InputError: it is there and holds something else, or can't be written to.
    """
    folder = Path(out) if out is not None else Path("out") / f"{default}.{kind}"
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder}: is there and is not a folder; choose another")
        mark = folder / f"{kind}.yaml"
        if folder.is_dir() and not mark.is_file() and any(not _is_partial(f, mark) for f in folder.iterdir()):
            raise InputError(f"--out {folder}: is not empty and holds no {kind} of Convoy; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"--out {folder}: can't be written to")
        write_text(mark, text)
        prepare(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {folder}: {getattr(error, 'strerror', None) or error}") from None
    return folder


def prepare(folder: Path) -> None:
    """Make room for results in ``folder``; what a killed process left half-written goes."""
    (folder / _CELLS).mkdir(parents=True, exist_ok=True)
    for left_over in (*folder.glob(".*.tmp"), *(folder / _CELLS).glob(".*.tmp")):
        left_over.unlink(missing_ok=True)


def run_cells(
    cells: Sequence[Cell], where: str, folder: Path, *, jobs: int | None = None, backend: str = "loky"
) -> Iterator[Outcome]:
    """Simulate the cells that ``folder`` doesn't hold yet, ``jobs`` at once; outcomes come as they are ready.

    ``where``, the configuration's file, begins the messages of cells that fail.
    """
    unique = {cell.id: cell for cell in cells}
    todo = [cell for cell in unique.values() if not is_finished(folder, cell.id)]
    work = partial(run_cell, where=where, folder=folder.absolute(), summarize=summarize_run)
    return outcomes_of(todo, work, jobs, backend)


def outcomes_of(
    todo: Sequence[Work], work: Callable[[Work], Outcome], jobs: int | None = None, backend: str = "loky"
) -> Iterator[Outcome]:
    """Do ``work`` on everything in ``todo``, as much at once as there are jobs (None: one for each core);
    outcomes come as they are ready."""
    if backend == "ray":
        yield from _on_ray(todo, work, jobs)
        return
    jobs = min(jobs or _cores(), max(len(todo), 1))
    if jobs == 1:
        yield from map(work, todo)
        return
    from joblib import Parallel, delayed, parallel_config

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


def is_finished(folder: Path, id: str) -> bool:
    """Whether the cell's result is there."""
    return result_file(folder, id).is_file()


def read_summary(folder: Path, id: str) -> dict[str, Any] | None:
    """The summary of a finished cell; None if there is none."""
    try:
        found = json.loads(result_file(folder, id).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_text(path: Path, text: str) -> None:
    """Write a file that is there in full or not at all, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _is_partial(file: Path, whole: Path) -> bool:
    """Whether a killed process left this of ``whole``."""
    return file.name.startswith(f".{whole.name}.") and file.suffix == ".tmp"


def result_file(folder: Path, id: str) -> Path:
    """Where the result of a cell is kept."""
    return folder / _CELLS / f"{id}.json"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_ray(todo: Sequence[Work], work: Callable[[Work], Outcome], jobs: int | None) -> Iterator[Outcome]:
    """The same on a Ray cluster, one started for this if there is none, with all its cores unless ``jobs``
    says how many. Its machines must see the same files."""
    try:
        import ray
    except ImportError:
        raise InputError(
            "--backend ray: ray isn't installed; in Convoy's folder: pip install -e '.[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call,unused-ignore]
    most = jobs or max(int(resources.get("CPU", 1)), 1)

    def task(each: Work) -> Outcome:
        return work(each)

    remote = ray.remote(task)
    waiting = iter(todo)
    running: list[Any] = []
    while True:
        while len(running) < most and (each := next(waiting, None)) is not None:
            running.append(remote.remote(each))
        if not running:
            return
        done, running = ray.wait(running)
        yield from ray.get(done)
