"""``convoy paper``: compute every figure of the paper, and write how our numbers compare with its."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.config import Config
from experiments.grid import Cell
from experiments.keys import suggestion
from experiments.paper import measures
from experiments.paper.figures import PaperCell, figure_names, load_figure
from experiments.paper.results import Results
from experiments.store import (
    Outcome,
    keep_result,
    outcomes_of,
    prepare,
    read_summary,
    result_file,
    run_cell,
    write_text,
)
from specs.errors import InputError

MARK = "paper.txt"
_DEFAULT_OUT = Path("out") / "paper"


@dataclass(frozen=True, slots=True)
class PaperOptions:
    """The options of ``convoy paper``; see ``convoy paper --help``."""

    out: str | None = None
    only: Sequence[str] = ()
    jobs: int | None = None
    document: str | None = None
    as_is: bool = False
    quiet: bool = False


def paper(options: PaperOptions) -> int:
    """Compute what isn't there yet (nothing if ``as_is``), draw the plots, write the document.

    Returns the exit status: 0, 1 if cells have failed, 130 after Ctrl-C.

    Raises:
        InputError: an unknown figure, or a folder that can't be written to; nothing has been started.
    """
    figures = [load_figure(name) for name in _chosen(options.only)]
    if options.document and not Path(options.document).absolute().parent.is_dir():
        raise InputError(f"--doc {options.document}: there is no folder {Path(options.document).parent}")
    folder = _folder(options.out)
    unique = {cell.id: cell for figure in figures for cell in figure.cells}
    todo = [cell for cell in unique.values() if not result_file(folder, cell.id).is_file()]
    if options.as_is:
        todo = []
    failures: dict[str, str] = {}
    interrupted = False
    todo.sort(key=_cost, reverse=True)
    with _progress(len(unique), len(unique) - len(todo), quiet=options.quiet) as advance:
        try:
            for outcome in outcomes_of(todo, partial(_compute, folder=folder.absolute()), options.jobs):
                if outcome.status == "interrupted":
                    interrupted = True
                    break
                if outcome.status == "failed":
                    failures[outcome.id] = outcome.error
                advance()
        except KeyboardInterrupt:
            interrupted = True
    for figure in figures:
        for cell in figure.cells:
            if cell.id in failures:
                where = ", ".join(map(str, cell.labels.values()))
                print(f"figure {figure.name}, {where}: failed: {failures[cell.id]}", file=sys.stderr)
    if interrupted:
        return 130
    results = {
        figure.name: Results(figure, tuple(read_summary(folder, cell.id) for cell in figure.cells))
        for figure in figures
    }
    _show(results, folder, options)
    return 1 if failures else 0


def _show(results: dict[str, Results], folder: Path, options: PaperOptions) -> None:
    """Draw the plots and write the document."""
    from experiments.paper.document import document
    from experiments.paper.plots import draw

    for name, each in results.items():
        if image := draw(each):
            (folder / f"fig{name}.png").write_bytes(image)
    last = folder / "paper.md"
    write_text(last, document(results, plots=True))
    if options.document:
        last = Path(options.document)
        write_text(last, document(results))
    if not options.quiet:
        cells = [summary for each in results.values() for summary in each.summaries]
        done = sum(summary is not None for summary in cells)
        print(f"{done:,} of {len(cells):,} cells. Plots: {folder}/fig*.png. Table: {last}")


def _chosen(only: Sequence[str]) -> list[str]:
    names = figure_names()
    chosen = [name.removeprefix("fig") for name in only] or names
    for name in chosen:
        if name not in names:
            known = f"{suggestion(name, tuple(names))} ({', '.join(names)})"
            raise InputError(f"--only {name}: no such figure{known}")
    return chosen


def _folder(name: str | None) -> Path:
    """The folder to write to or to go on in.

    Raises:
        InputError: it holds something else, or can't be written to.
    """
    folder = Path(name) if name is not None else _DEFAULT_OUT
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
            raise InputError(f"--out {folder}: is not empty and holds no figures of Convoy; choose another")
        prepare(folder)
        (folder / MARK).write_text("Results of `convoy paper`; it goes on from here.\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror or error}") from None
    return folder


def _compute(cell: PaperCell, *, folder: Path) -> Outcome:
    """Compute one cell and keep it; in a process of its own."""
    if isinstance(cell.work, Config):
        whole = Cell.of(cell.labels, cell.work, cell.id)
        return run_cell(whole, where="convoy paper", folder=folder, summarize=measures.measure_run)
    measure = {"predictions": measures.measure_prediction, "decisions": measures.measure_decisions}[cell.kind]
    return keep_result(cell.id, folder, partial(measure, cell.work))


def _cost(cell: PaperCell) -> float:
    """A guess at how long a cell takes, to begin with the longest."""
    if not isinstance(cell.work, Config):
        return 0.0
    return float(cell.work.workload.arrivals.get("rate_rps", 1.0)) * (cell.work.workload.duration_s or 0.0)


@contextmanager
def _progress(total: int, done: int, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, a line now and then elsewhere."""
    if quiet:
        yield lambda: None
        return
    if not sys.stderr.isatty():
        began_s, finished = time.monotonic(), [done]

        def line() -> None:
            finished[0] += 1
            if finished[0] % 20 == 0 or finished[0] == total:
                print(f"{finished[0]} of {total} cells, {time.monotonic() - began_s:,.0f} s", file=sys.stderr)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("cells", total=total, completed=done)
        yield lambda: bar.advance(task)
