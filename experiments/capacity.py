"""``convoy capacity``: the highest load at which the SLOs hold, for each policy and deployment of a sweep."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.binding import binding
from experiments.build import build
from experiments.capacity_search import Capacity, find_capacity
from experiments.config import Config
from experiments.deployments import at_load, is_random
from experiments.grid import Cell, combinations
from experiments.laboratory import Laboratory
from experiments.load import dump_yaml, load_config
from experiments.plan_config import CapacityConfig
from experiments.plan_facts import capacity_json, is_edge_of_search
from experiments.store import StudyOptions, open_store, write_text
from experiments.tables import print_table
from experiments.text import number, percent
from experiments.trials import worst_attainment
from traces.workload import Workload


@dataclass(frozen=True, slots=True)
class Found:
    """The capacity of one configuration: ``changes`` make it, ``rate_rps`` is its load of 1; None where the
    clients' number is the load."""

    changes: Mapping[str, Any]
    capacity: Capacity
    rate_rps: float | None

    @property
    def name(self) -> str:
        """What it changes, as text."""
        return ", ".join(str(value) for value in self.changes.values()) or "as configured"

    @property
    def capacity_rps(self) -> float | None:
        """The capacity in requests per second."""
        load = self.capacity.load
        return None if load is None or self.rate_rps is None else load * self.rate_rps


def capacity(options: StudyOptions) -> int:
    """Search the capacity of every combination under ``sweep``, or of the one configuration there is.

    Returns the exit status: 0, or 1 if one of them holds at no load.

    Raises:
        InputError: anything about the configuration or the folder.
        KeyboardInterrupt: Ctrl-C; started again on the same folder, only the rest is done.
    """
    config = load_config(options.config, options.overrides)
    settings = config.capacity or CapacityConfig()
    combined = list(combinations(config.sweep)) if config.sweep else [{}]
    for changes in combined:  # all that can be wrong is found before anything is written
        build(_config(options, changes), str(options.config))
    folder = open_store(options.out, config.name, "capacity", dump_yaml(config))
    laboratory = Laboratory(folder, str(options.config), options.jobs, options.backend, options.quiet)
    found = [_search(options, changes, settings, laboratory) for changes in combined]
    data = [_as_json(each) for each in found]
    write_text(folder / "capacity.json", json.dumps(data, indent=2, allow_nan=False) + "\n")
    write_text(folder / "capacity.csv", _as_csv(found))
    from experiments.capacity_report import write_report

    write_report(found, config, settings, folder, plots=options.plots)
    if not options.quiet:
        print_table(HEADER, [row(each) for each in found], right=HEADER[1:5])
        print(f"At these loads {percent(settings.attainment)} of requests meet their SLOs, in every class.")
        print(f"Report: {folder / 'report.html'}")
    return 0 if all(each.capacity.load is not None for each in found) else 1


def _config(options: StudyOptions, changes: Mapping[str, Any]) -> Config:
    found = load_config(options.config, options.overrides, changes)
    return found.model_copy(update={"sweep": None, "plan": None, "capacity": None})


def _search(
    options: StudyOptions, changes: Mapping[str, Any], settings: CapacityConfig, laboratory: Laboratory
) -> Found:
    base = _config(options, changes)

    def measure(load: float, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        cells = []
        for seed in seeds:
            config = _config(options, {**changes, **at_load(base, load), "seed": base.seed + seed})
            cells.append(Cell.of(changes, config))
        what = ", ".join(map(str, changes.values()))
        return laboratory.summaries(cells, f"{what} at {load:g} × the load".strip())

    capacity = find_capacity(measure, worst_attainment, settings, random=is_random(base))
    workload = build(base, str(options.config)).workload
    return Found(changes, capacity, mean_rate_rps(base, workload))


def mean_rate_rps(config: Config, workload: Workload) -> float | None:
    """Requests per second at a load of 1: as configured, or of the trace; None for a closed loop."""
    rate = config.workload.arrivals.get("rate_rps")
    if rate is not None:
        return float(rate)
    arrivals = workload.arrival_s
    if arrivals is None or len(arrivals) < 2 or arrivals[-1] <= arrivals[0]:
        return None
    return (len(arrivals) - 1) / float(arrivals[-1] - arrivals[0])


# -- what is told -----------------------------------------------------------------------------------------

HEADER = ("", "capacity", "requests/s", "surely holds at", "surely fails at", "then binds")


def row(found: Found) -> list[str]:
    """One line of the table."""
    capacity = found.capacity
    edge = capacity.edge
    bound = binding(edge.summaries[0]) if edge is not None else None
    if capacity.load is None:
        return [found.name, "none", "", "", _load(capacity.high), bound.what if bound else ""]
    least = "≥ " if is_edge_of_search(capacity) else ""
    rate = found.capacity_rps
    return [
        found.name,
        f"{least}{number(capacity.load)} ×",
        f"{least}{number(rate)}" if rate is not None else "",
        _load(capacity.low),
        _load(capacity.high),
        bound.what if bound else "",
    ]


def _load(load: float | None) -> str:
    return "" if load is None else f"{number(load)} ×"


def _as_json(found: Found) -> dict[str, Any]:
    edge = found.capacity.edge
    bound = binding(edge.summaries[0]) if edge is not None else None
    return {
        "changes": dict(found.changes),
        "capacity_rps": found.capacity_rps,
        "rate_rps": found.rate_rps,
        **capacity_json(found.capacity),
        "binds": None if bound is None else {"what": bound.what, "why": bound.why},
    }


def _as_csv(found: Sequence[Found]) -> str:
    """One row for each load tried."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list(found[0].changes)
    writer.writerow([*keys, "load", "rate_rps", "runs", "attainment_mean", "low", "high", "holds", "settled"])
    for each in found:
        for trial in each.capacity.trials:
            rate = "" if each.rate_rps is None else each.rate_rps * trial.load
            figures = [len(trial.attainments), trial.mean, trial.low, trial.high]
            flags = [str(trial.holds).lower(), str(trial.settled).lower()]
            writer.writerow([*each.changes.values(), trial.load, rate, *figures, *flags])
    return text.getvalue()
