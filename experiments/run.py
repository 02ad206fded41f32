"""``convoy run``: one simulation, from its configuration to the folder of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.build import Experiment, build
from experiments.facts import report_facts
from experiments.intervals import check_intervals, interval_notes, latency_intervals
from experiments.load import dump_yaml, load_config
from experiments.output import choose_folder, writing
from experiments.predict import prediction_notes
from experiments.renderer import Renderer
from experiments.series import plot_data
from experiments.terminal import print_summary, progress_bar
from experiments.timeline import write_timeline
from experiments.utilization import utilization
from sim.cluster import simulate
from specs.errors import InputError
from traces.metrics import slo_met, summarize
from traces.records import RunRecords, write_batches_csv, write_requests_csv


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of ``convoy run``; see ``convoy run --help``."""

    config: Path
    overrides: Sequence[str] = ()
    out: str | None = None
    step_by_step: bool = False
    batches: bool = False
    plots: bool = True
    force: bool = False
    quiet: bool = False
    intervals: bool = False


def run(options: RunOptions) -> int:
    """Simulate, write, and show a summary. Returns the exit status: 0, or 130 after Ctrl-C.

    Raises:
        InputError: anything about the configuration or the folder to write; nothing has been written.
    """
    where = str(options.config)
    config = load_config(options.config, options.overrides)
    if config.sweep:
        raise InputError(f"{where}: sweep: is for `convoy sweep`; take it out to run a single simulation")
    folder = choose_folder(options.out, config.name, force=options.force)
    with Renderer(plots=options.plots) as renderer:
        experiment = build(config, where)
        if options.intervals:
            check_intervals(experiment, where)
        with progress_bar(experiment.workload, config.stop_s, quiet=options.quiet) as progress:
            records = simulate(
                experiment.workload, experiment.setup, step_by_step=options.step_by_step, progress=progress
            )
        summary = summarize_run(records, experiment)
        notes = prediction_notes(experiment.iteration)
        if options.intervals and not records.interrupted:
            summary["intervals"] = latency_intervals(experiment, summarize_run)
            notes += interval_notes(summary["intervals"])
        experiment = replace(experiment, notes=(*experiment.notes, *notes))
        with writing(folder, numbered=options.out is None) as (partial, final):
            renderer.start(
                partial, summary, report_facts(records, experiment), plot_data(records, experiment.setup.slos)
            )
            _write(partial, records, summary, experiment, batches=options.batches)
            renderer.finish()
    if not options.quiet:
        print_summary(summary, experiment.notes, final)
    return 130 if records.interrupted else 0


def summarize_run(records: RunRecords, experiment: Experiment) -> dict[str, Any]:
    """summary.json of a run."""
    extra = {**utilization(records, experiment), "predictor_source": experiment.iteration.source}
    return summarize(records, tpot_targets_s=experiment.tpot_targets_s, extra=extra)


def _write(
    folder: Path, records: RunRecords, summary: dict[str, Any], experiment: Experiment, *, batches: bool
) -> None:
    (folder / "config.yaml").write_text(dump_yaml(experiment.config), encoding="utf-8")
    text = json.dumps(summary, indent=2, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    write_requests_csv(records, slo_met(records, experiment.tpot_targets_s), folder / "requests.csv")
    if batches:
        write_batches_csv(records, folder / "batches.csv")
    write_timeline(records, folder / "timeline.json")
