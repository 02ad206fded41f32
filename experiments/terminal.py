"""What ``convoy run`` shows on the screen: progress while it simulates, the answer at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.report import LIVE, latency_rows, verdict
from experiments.tables import print_table
from experiments.text import number, percent, seconds
from traces.workload import Workload

_STATISTICS = {"mean": 0, "p50": 1, "p90": 2, "p99": 4}  # places in experiments.report.STATISTICS


@contextmanager
def progress_bar(
    workload: Workload, stop_s: float | None, *, quiet: bool, live: bool = False
) -> Iterator[Callable[[float, int], None] | None]:
    """A progress bar on standard error, if that is a terminal; yields what the simulator is to call.

    Shows the share of requests finished, simulated time, finished requests and requests per wall second. A
    ``live`` run is disturbed by it less often.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    doing, done_so_far, every_s = ("serving", "served", 1.0) if live else ("simulating", "simulated", 0.1)
    columns = (
        TextColumn(doing),
        BarColumn(),
        TextColumn(
            f"{{task.percentage:3.0f}} %  {{task.fields[clock]}} {done_so_far}, {{task.fields[rate]}}"
        ),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        total = len(workload)
        task = bar.add_task(doing, total=total, clock="0 s", rate="")
        began_s = shown_s = time.perf_counter()

        def update(now_s: float, finished: int) -> None:
            nonlocal shown_s
            wall_s = time.perf_counter()
            if wall_s - shown_s < every_s:
                return
            shown_s = wall_s
            done = max(finished, int(total * now_s / stop_s)) if stop_s else finished
            rate = f"{finished:,} finished, {number(finished / (wall_s - began_s))} requests/s"
            bar.update(task, completed=min(done, total), clock=seconds(now_s), rate=rate)
            bar.refresh()

        yield update


def print_summary(summary: Mapping[str, Any], notes: Sequence[str], folder: Path) -> None:
    """The answer, the latencies and where the report is."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    kind, sentence, explanation = verdict(summary)
    style = {"good": "bold green", "fair": "bold yellow", "bad": "bold red", "none": "bold"}[kind]
    console.print(Text.assemble((f"{sentence}. ", style), explanation))
    if summary.get("interrupted"):
        console.print(
            Text(f"Interrupted after {seconds(summary['duration_s'])}{_clock(summary)}.", style="yellow")
        )
    for note in notes:
        console.print(Text(note, style="yellow"))
    rows = [
        (name, *(values[place] for place in _STATISTICS.values()))
        for name, _, values, _ in latency_rows(summary)
    ]
    print_table(("", *_STATISTICS), rows, right=tuple(_STATISTICS))
    for line in _lines(summary):
        console.print(Text(line))
    console.print(Text(f"Report: {folder / 'report.html'}"))


def _lines(summary: Mapping[str, Any]) -> list[str]:
    served = f"{summary['num_finished']:,} of {summary['num_requests']:,} requests finished"
    if "requests_per_s" in summary:
        served += (
            f", {number(summary['requests_per_s'])}/s over {seconds(summary['duration_s'])}{_clock(summary)}"
        )
    names = {"kv_utilization": "KV cache", "mfu": "MFU", "mbu": "MBU"}
    used = ", ".join(f"{name} {percent(summary[key])}" for key, name in names.items() if key in summary)
    origin = f"Kernel times: {summary['predictor_source']}"
    if "extrapolated_time_share" in summary:
        origin += f", {percent(summary['extrapolated_time_share'])} of the time extrapolated"
    how = "executed" if summary["predictor_source"] == LIVE else "simulated"
    wall = f"{summary['iterations']:,} iterations {how} in {seconds(summary['wall_s'])}"
    return [line for line in (served, used and f"In use: {used}", origin, wall) if line]


def _clock(summary: Mapping[str, Any]) -> str:
    return "" if summary["predictor_source"] == LIVE else " of simulated time"
