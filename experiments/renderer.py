"""Plots and report, made by a process of their own.

Importing matplotlib takes as long as many a simulation. The process does that while the simulation runs on
another core, and draws while the tables are written. For 10,000 requests that saves a sixth of the whole
run where a second core is idle, and costs a tenth where none is.
"""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments.report import ReportFacts, render_report
from experiments.series import PlotData, sample_plot_data

Job = tuple[Path, Mapping[str, Any], ReportFacts, PlotData | None]

_ROOT = str(Path(__file__).resolve().parent.parent)
_COMMAND = f"import sys; sys.path.insert(0, {_ROOT!r}); from experiments.renderer import serve; serve()"


class Renderer:
    """Renders one report. Use as a context manager: on leaving, the process is gone."""

    def __init__(self, *, plots: bool) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._job: Job | None = None
        self._plots = plots

    def __enter__(self) -> Renderer:
        if self._plots:
            # In a session of its own, so that Ctrl-C in a terminal doesn't reach it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        return self

    def start(self, folder: Path, summary: Mapping[str, Any], facts: ReportFacts, data: PlotData) -> None:
        """Begin to write ``plots/*.png`` and ``report.html`` into ``folder``."""
        self._job = (folder.resolve(), summary, facts, data if self._plots else None)
        if self._process is not None and self._process.stdin is not None:
            try:
                pickle.dump(self._job, self._process.stdin)
                self._process.stdin.flush()
            except BrokenPipeError:
                pass  # it has died; finish() tells why

    def finish(self) -> None:
        """Wait until it is done.

        Raises:
            RuntimeError: the process failed; the message is the last line it wrote.
        """
        if self._process is None:
            assert self._job is not None
            render(self._job)
            return
        _, errors = self._process.communicate()
        if self._process.returncode != 0:
            lines = errors.decode(errors="replace").strip().splitlines() or ["no message"]
            raise RuntimeError(f"the report could not be made: {lines[-1]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.communicate()


def render(job: Job) -> None:
    """Draw the plots, unless there is no data for them, and write the report."""
    folder, summary, facts, data = job
    plots: list[tuple[str, bytes]] = []
    if data is not None:
        from experiments.plots import TITLES, draw_plots

        (folder / "plots").mkdir()
        for stem, image in draw_plots(data).items():
            (folder / "plots" / f"{stem}.png").write_bytes(image)
            plots.append((TITLES[stem], image))
    (folder / "report.html").write_text(render_report(summary, facts, plots), encoding="utf-8")


def serve() -> None:
    """The process: get ready, wait for a job on standard input, do it."""
    from experiments.plots import draw_plots

    gc.disable()  # nothing that is made here outlives the report
    draw_plots(sample_plot_data())  # loads fonts and whatever else matplotlib puts off
    import_module("jinja2")
    try:
        job = pickle.load(sys.stdin.buffer)
    except EOFError:
        return  # the simulation came to nothing
    render(job)
