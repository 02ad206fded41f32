"""``convoy validate``: a simulation and live runs of the same configuration, compared rung by rung."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.build import Experiment, build, errors_from
from experiments.cases import Case, load_cases
from experiments.engine_replay import print_replay, replay_engine, write_replay
from experiments.forecasts import whole
from experiments.live import live_setup, serve_live
from experiments.live_records import LiveRun, find_live_runs, read_live_run
from experiments.measured import find_requests, read_measured
from experiments.output import choose_folder, interruptible, writing
from experiments.run import summarize_run
from experiments.rungs import Ladder, climb, with_capacity_of
from experiments.terminal import progress_bar
from experiments.validation_files import Outcome, write_case, write_set
from experiments.validation_text import print_outcome, print_outcomes
from sim.cluster import simulate
from specs.errors import InputError


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """The options of ``convoy validate``; see ``convoy validate --help``."""

    config: Path
    overrides: Sequence[str] = ()
    cases: Sequence[str] = ()
    replay: str | None = None
    out: str | None = None
    plots: bool = True
    force: bool = False
    quiet: bool = False


def validate(options: ValidateOptions) -> int:
    """Validate every case, write, and show the tables.

    Returns the exit status: 0 if all is within tolerance, 1 if something isn't, 130 after Ctrl-C.

    Raises:
        InputError: anything about the configuration, the records or the folder to write; nothing has been
            written.
    """
    cases = load_cases(options.config, options.overrides, options.cases)
    if options.replay is not None and find_requests(Path(options.replay)) is not None:
        return _validate_engine(cases, options)
    folder = choose_folder(options.out, options.config.stem, force=options.force)
    prepared = [_prepare(case, options) for case in cases]
    outcomes: list[Outcome] = []
    with writing(folder, numbered=options.out is None) as (partial, final):
        for each in prepared:
            outcome = _validate_case(each, options)
            write_case(partial / each.case.name, outcome, plots=options.plots)
            if not options.quiet:
                print_outcome(outcome)
            outcomes.append(outcome.without_simulations())
            if outcome.interrupted:
                break
        if cases[0].name:
            write_set(partial, options.config.stem, outcomes)
    if not options.quiet:
        print_outcomes(outcomes, len(cases), final)
    if outcomes[-1].interrupted:
        return 130
    return 0 if all(outcome.passes for outcome in outcomes) else 1


def _validate_engine(cases: Sequence[Case], options: ValidateOptions) -> int:
    """Hold a simulation against a measured run of another engine; the exit status as of :func:`validate`."""
    if len(cases) != 1:
        raise InputError(
            f"--replay {options.replay}: is one run, but {options.config} has {len(cases)} cases"
        )
    (case,) = cases
    with errors_from(str(options.replay)):
        run = read_measured(Path(str(options.replay)))
    folder = choose_folder(options.out, options.config.stem, force=options.force)
    experiment = build(case.config, case.where)
    found, _ = replay_engine(experiment, run, case.where)
    with writing(folder, numbered=options.out is None) as (partial, final):
        write_replay(partial, found, experiment, run)
    if not options.quiet:
        print_replay(case.config.name, found, run)
        print(f"Written to {final}")
    return 0 if found.passes else 1


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A case whose input is known to be good; ``recorded`` is what there is to replay, if anything is."""

    case: Case
    experiment: Experiment
    recorded: Sequence[LiveRun]


def _prepare(case: Case, options: ValidateOptions) -> _Prepared:
    if case.config.sweep:
        raise InputError(f"{case.where}: sweep: take it out to validate; validate.cases does what it does")
    experiment = build(case.config, case.where)
    if options.replay is None:
        with errors_from(case.where):
            live_setup(experiment)
        return _Prepared(case, experiment, ())
    folders = find_live_runs(Path(options.replay) / case.name)
    return _Prepared(case, experiment, [read_live_run(folder, experiment, case.where) for folder in folders])


def _validate_case(prepared: _Prepared, options: ValidateOptions) -> Outcome:
    case, experiment = prepared.case, prepared.experiment
    runs, cut_short, failure = list(prepared.recorded), None, None
    interrupted = False
    if options.replay is None:
        from runtime.launcher import RankError

        try:
            with interruptible():
                while len(runs) < case.config.validation.runs and cut_short is None:
                    run = _serve(case, experiment, options)
                    if run.records.interrupted:
                        cut_short, interrupted = run, True
                    else:
                        runs.append(run)
        except KeyboardInterrupt:  # while ranks were starting: this run has nothing to keep
            interrupted = True
        except RankError as error:
            failure = str(error)
    ladder: Ladder | None = None
    simulated = None
    if runs and failure is None:
        # With as much KV cache as there was.
        experiment = with_capacity_of(runs[0], experiment)
        try:
            with interruptible():
                simulated = whole(simulate(experiment.workload, experiment.setup))
                ladder = climb(experiment, summarize_run(simulated, experiment), runs)
        except KeyboardInterrupt:
            interrupted = True
    return Outcome(
        name=case.name or case.config.name,
        experiment=experiment,
        runs=runs,
        cut_short=cut_short,
        simulated=simulated,
        ladder=ladder,
        failure=failure,
        interrupted=interrupted,
        replayed=options.replay is not None,
    )


def _serve(case: Case, experiment: Experiment, options: ValidateOptions) -> LiveRun:
    with (
        errors_from(case.where),
        progress_bar(experiment.workload, case.config.stop_s, quiet=options.quiet, live=True) as bar,
    ):
        return serve_live(experiment, bar)
