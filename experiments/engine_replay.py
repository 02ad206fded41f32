"""``convoy validate --replay`` on a measured run of another engine: its workload, simulated and compared.

    iteration   the log's times against the prediction for exactly those iterations, on the part of the log
                that nothing was fitted to
    decisions   how alike the two sequences of batches are: a real engine's log doesn't say who was in them
    request     TTFT, TPOT and E2E, the same quantity on both sides, beside another simulator's errors

Latencies of some runs count from the moment at which the engine took notice of a request; then the simulated
ones count from the batch at whose beginning the scheduler learns of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.batch_times import ErrorSummary
from experiments.build import Experiment
from experiments.config import MeasuredTolerance, Statistic
from experiments.iteration_log import errors_by_phase, first_of_each, predict, similarity
from experiments.load import dump_yaml
from experiments.measured import LATENCIES, FloatArray, MeasuredRun
from experiments.tables import print_table
from experiments.text import percent, seconds
from sim.cluster import simulate
from specs.errors import InputError
from traces.records import RunRecords

STATISTICS: tuple[Statistic, ...] = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One statistic of one latency; errors are relative to what was measured. ``allowed`` is None if it
    decides nothing, ``peer`` if nobody else predicted it."""

    metric: str
    statistic: str
    measured_s: float
    simulated_s: float
    error: float
    peer: float | None
    allowed: float | None

    @property
    def passes(self) -> bool:
        return self.allowed is None or abs(self.error) <= self.allowed


@dataclass(frozen=True, slots=True)
class EngineReplay:
    """A measured run and its simulation, compared.

    Attributes:
        iterations: errors by phase, on the part of the log that nothing was fitted to; empty without a log.
        alike: see :func:`experiments.iteration_log.similarity`; empty without a log.
    """

    rows: tuple[LatencyRow, ...]
    iterations: Mapping[str, ErrorSummary]
    alike: Mapping[str, float]
    tolerance: MeasuredTolerance
    latencies_s: Mapping[str, FloatArray]

    def allowed_of_phase(self, phase: str) -> float | None:
        """The median error that passes."""
        value: float | None = getattr(self.tolerance, phase, None)
        return value

    @property
    def passes(self) -> bool:
        """Everything that decides is within its tolerance."""
        phases = [
            allowed is None or errors.p50 <= allowed
            for phase, errors in self.iterations.items()
            for allowed in [self.allowed_of_phase(phase)]
        ]
        return all(row.passes for row in self.rows) and all(phases)


def replay_engine(experiment: Experiment, run: MeasuredRun, where: str) -> tuple[EngineReplay, RunRecords]:
    """Simulate the workload of a measured run and compare.

    Raises:
        InputError: the configuration's workload isn't that of the run.
    """
    experiment = as_sent(experiment, run)
    _check_same_workload(experiment, run, where)
    tolerance = experiment.config.validation.measured
    records = simulate(experiment.workload, experiment.setup, step_by_step=True)
    latencies_s = simulated_latencies(records, from_notice=run.from_notice)
    iterations: dict[str, ErrorSummary] = {}
    alike: dict[str, float] = {}
    if run.iterations is not None:
        log = run.iterations.take(~first_of_each(run.iterations, tolerance.fitted_share))
        if not len(log):
            raise InputError(f"{where}: validate.measured: nothing of the log is left to test")
        iterations = errors_by_phase(log, predict(experiment.iteration, log))
        alike = _alike(run, records, tolerance)
    rows = tuple(_latency_rows(run, latencies_s, records, tolerance))
    return EngineReplay(rows, iterations, alike, tolerance, latencies_s), records


def as_sent(experiment: Experiment, run: MeasuredRun) -> Experiment:
    """The experiment with the requests of the run: a closed loop that ended by the clock sent the workload's
    first ones, as many as it came to."""
    count = len(run.prompt_tokens)
    if experiment.setup.closed_loop is None or count >= len(experiment.workload):
        return experiment
    setup = replace(experiment.setup, send_until_s=None)
    return replace(experiment, workload=experiment.workload.head(count), setup=setup)


def simulated_latencies(records: RunRecords, *, from_notice: bool) -> dict[str, FloatArray]:
    """Latencies of a simulation that went step by step, from arrival, or from the beginning of the first
    batch after it: that is when a busy engine looks at what has come."""
    requests = records.requests
    since_s = requests["arrival_s"]
    if from_notice:
        starts_s = np.unique(records.batches["start_s"])
        place = np.searchsorted(starts_s, since_s - 1e-9)
        since_s = starts_s[np.minimum(place, len(starts_s) - 1)]
    return {
        "ttft_s": np.asarray(requests["first_token_s"] - since_s),
        "tpot_s": records.tpot_s,
        "e2e_s": np.asarray(requests["finished_s"] - since_s),
    }


def _check_same_workload(experiment: Experiment, run: MeasuredRun, where: str) -> None:
    workload = experiment.workload
    given = f"{where}: workload.lengths: the measured run in {run.folder}"
    if len(workload) != len(run.prompt_tokens):
        raise InputError(f"{given} has {len(run.prompt_tokens)} requests, the workload {len(workload)}")
    for name, measured in (("prompt_tokens", run.prompt_tokens), ("output_tokens", run.output_tokens)):
        ours = getattr(workload, name).astype(np.int64)
        if (different := np.flatnonzero(ours != measured)).size:
            row = int(different[0])
            raise InputError(f"{given} has {name} {measured[row]} in request {row}, the workload {ours[row]}")


def _latency_rows(
    run: MeasuredRun, simulated: Mapping[str, FloatArray], records: RunRecords, tolerance: MeasuredTolerance
) -> list[LatencyRow]:
    rows = []
    for metric in LATENCIES:
        if metric not in run.latencies_s:
            continue
        measured = statistics_of(run.latencies_s[metric])
        ours = statistics_of(simulated[metric])
        peers = statistics_of(run.peer_s[metric]) if metric in run.peer_s else {}
        for statistic in STATISTICS:
            one, other = measured[statistic], ours[statistic]
            peer = peers[statistic] / one - 1.0 if peers else None
            allowed = tolerance.of_latency(metric.removesuffix("_s"), statistic)
            rows.append(LatencyRow(metric, statistic, one, other, other / one - 1.0, peer, allowed))
    if run.makespan_s is not None:
        ends_s = float(np.nanmax(records.requests["finished_s"]))
        ours_s = ends_s - float(records.requests["arrival_s"].min())
        error = ours_s / run.makespan_s - 1.0
        rows.append(LatencyRow("makespan_s", "", run.makespan_s, ours_s, error, None, tolerance.makespan))
    return rows


def statistics_of(values: FloatArray) -> dict[str, float]:
    """Mean and quantiles, interpolated linearly, of the values that are there."""
    present = values[~np.isnan(values)]
    quantiles = np.quantile(present, [0.5, 0.9, 0.99]) if len(present) else np.full(3, np.nan)
    mean = float(present.mean()) if len(present) else float("nan")
    return dict(zip(STATISTICS, (mean, *quantiles.tolist()), strict=True))


def _alike(run: MeasuredRun, records: RunRecords, tolerance: MeasuredTolerance) -> dict[str, float]:
    """Likeness of the batches to those of the log's segment that the workload is."""
    assert run.iterations is not None
    log = run.iterations
    if tolerance.segment is not None:
        log = log.take(log.segment == tolerance.segment)
    measured = {"prefill_tokens": log.prefill_tokens, "decodes": log.decodes}
    batches = records.batches
    ours = {
        "prefill_tokens": batches["prefill_tokens"].astype(np.float64),
        "decodes": batches["num_decodes"].astype(np.float64),
    }
    return similarity(measured, ours) | {
        "measured_iterations": float(len(log)),
        "simulated_iterations": float(len(batches["start_s"])),
    }


# -- what is shown and written ------------------------------------------------------------------------------


def print_replay(name: str, found: EngineReplay, run: MeasuredRun) -> None:
    """The tables and a verdict."""
    peer = any(row.peer is not None for row in found.rows)
    header = (
        "latency",
        "",
        "simulated",
        "measured",
        "error",
        *(["peer's error"] if peer else []),
        "allowed",
        "",
    )
    rows = [
        (
            row.metric.removesuffix("_s").upper(),
            row.statistic,
            seconds(row.simulated_s),
            seconds(row.measured_s),
            _signed(row.error),
            *([_signed(row.peer)] if peer else []),
            "" if row.allowed is None else percent(row.allowed),
            "" if row.passes else "outside",
        )
        for row in found.rows
    ]
    print_table(header, rows, title=f"{name}: simulated against {run.folder}", right=header[2:-1])
    if found.iterations:
        print()
        print_table(
            ("iterations of", "count", "median", "p90", "bias", "allowed", ""),
            [_iteration_row(phase, errors, found) for phase, errors in found.iterations.items()],
            right=("count", "median", "p90", "bias", "allowed"),
        )
        if found.tolerance.fitted_share > 0:
            share = percent(found.tolerance.fitted_share)
            print(f"Without the first {share} of each segment, to which the host's time was fitted.")
        alike = found.alike
        print(
            f"Batches: {alike['simulated_iterations']:,.0f} simulated, {alike['measured_iterations']:,.0f} "
            f"measured; {percent(alike['same_mix'])} of the same kinds, "
            f"{percent(alike['same_order'])} of the decodes at the same point of the work"
        )
    print(f"{name}: {'within' if found.passes else 'outside'} tolerance")


def _iteration_row(phase: str, errors: ErrorSummary, found: EngineReplay) -> tuple[str, ...]:
    allowed = found.allowed_of_phase(phase)
    outside = allowed is not None and errors.p50 > allowed
    return (
        phase,
        f"{errors.count:,}",
        percent(errors.p50),
        percent(errors.p90),
        _signed(errors.bias),
        "" if allowed is None else percent(allowed),
        "outside" if outside else "",
    )


def _signed(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.2f} %"


def write_replay(folder: Path, found: EngineReplay, experiment: Experiment, run: MeasuredRun) -> None:
    """Write config.yaml, summary.json and requests.csv: each request as measured and as simulated."""
    (folder / "config.yaml").write_text(dump_yaml(experiment.config), encoding="utf-8")
    data: dict[str, Any] = {
        "passes": found.passes,
        "requests": [asdict(row) | {"passes": row.passes} for row in found.rows],
        "iterations": {phase: asdict(errors) for phase, errors in found.iterations.items()},
        "fitted_share": found.tolerance.fitted_share,
        "batches": dict(found.alike),
    }
    text = json.dumps(data, indent=2, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    names = [name for name in LATENCIES if name in run.latencies_s]
    columns = {"prompt_tokens": run.prompt_tokens, "output_tokens": run.output_tokens}
    lines = [
        ",".join(
            ["request_id", *columns, *(f"{side}_{n}" for n in names for side in ("measured", "simulated"))]
        )
    ]
    for row in range(len(run.prompt_tokens)):
        cells = [str(row), *(str(int(column[row])) for column in columns.values())]
        for name in names:
            for value in (run.latencies_s[name][row], found.latencies_s[name][row]):
                cells.append("" if value != value else f"{value:.6f}")
        lines.append(",".join(cells))
    (folder / "requests.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
