"""``convoy live``: a configuration on the live runtime, and the same files as a simulation leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.build import Experiment, build, errors_from
from experiments.facts import report_facts
from experiments.live_records import LiveRun, write_live_records
from experiments.load import dump_yaml, load_config
from experiments.output import choose_folder, writing
from experiments.renderer import Renderer
from experiments.report import LIVE
from experiments.run import RunOptions
from experiments.series import plot_data
from experiments.terminal import print_summary, progress_bar
from experiments.timeline import write_timeline
from experiments.utilization import utilization
from specs.errors import InputError
from traces.metrics import slo_met, summarize
from traces.records import RunRecords, write_requests_csv
from traces.slices import SliceLog

if TYPE_CHECKING:
    from runtime.engine import LiveSetup
    from runtime.executors import Executor, StageDone
    from runtime.plan import Plan

Progress = Callable[[float, int], None]

_HOW_TO_INSTALL = "the live runtime needs torch; in Convoy's folder: pip install -e '.[runtime]'"


def live(options: RunOptions) -> int:
    """Serve, write, and show a summary. Returns the exit status: 0, or 130 after Ctrl-C.

    Under torchrun the process of rank 0 does so, and the others execute what it tells them.

    Raises:
        InputError: anything about the configuration or the folder to write; nothing has been written.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        from runtime.worker import main as work

        work()
        return 0
    where = str(options.config)
    config = load_config(options.config, options.overrides)
    if config.sweep:
        raise InputError(f"{where}: sweep: take it out to serve a single configuration live")
    folder = choose_folder(options.out, config.name, force=options.force)
    experiment = build(config, where)
    with (
        errors_from(where),
        progress_bar(experiment.workload, config.stop_s, quiet=options.quiet, live=True) as bar,
    ):
        run = serve_live(experiment, bar)
    summary = summarize_live(run.records, experiment)
    with (
        Renderer(plots=options.plots) as renderer,  # from here on: it would take time from the live run
        writing(folder, numbered=options.out is None) as (partial, final),
    ):
        facts = report_facts(run.records, experiment)
        facts = replace(
            facts, notes=[*facts.notes, f"Measured on the live runtime: {describe_runtime(experiment)}."]
        )
        renderer.start(partial, summary, facts, plot_data(run.records, experiment.setup.slos))
        write_live(partial, run, experiment, summary)
        write_timeline(run.records, partial / "timeline.json")
        renderer.finish()
    if not options.quiet:
        print_summary(summary, experiment.notes, final)
    return 130 if run.records.interrupted else 0


def serve_live(experiment: Experiment, progress: Progress | None = None) -> LiveRun:
    """Serve the experiment's workload by the wall clock.

    Raises:
        InputError: torch is missing, or the runtime doesn't do what is asked for.
    """
    setup = live_setup(experiment)
    from runtime.engine import Engine
    from runtime.launcher import start_executor

    executor = start_executor(setup.runner)
    try:
        noting = _NotingExecutor(executor)
        records = Engine(experiment.workload, setup, noting, progress).run()
    finally:
        executor.close()
    return LiveRun(records, noting.log.slices(), records.host, waited_s=records.waited_s)


def live_setup(experiment: Experiment) -> LiveSetup:
    """The experiment in the runtime's terms.

    Raises:
        InputError: torch is missing, or the runtime doesn't do what is asked for.
    """
    config, setup = experiment.config, experiment.setup
    if setup.replicas != 1:
        raise InputError(f"parallel.replicas: the live runtime serves one replica, not {setup.replicas}")
    if config.scheduler.async_scheduling:
        raise InputError(
            "scheduler.async_scheduling: the live runtime plans a batch when the last is over; false would do"
        )
    if config.scheduler.kv.prefix_caching:
        raise InputError(
            "scheduler.kv.prefix_caching: the live runtime computes every prompt in full; false would do"
        )
    if setup.decode is not None:
        raise InputError("parallel.decode: the live runtime prefills and decodes in one place; leave it out")
    if experiment.parallel.cp > 1:
        raise InputError(
            f"parallel.cp: the live runtime has no rings; 1 is possible, not {experiment.parallel.cp}"
        )
    if config.dtype.weight == "fp8" or config.dtype.kv != config.dtype.weight:
        raise InputError(
            f"dtype: the live runtime computes and caches in one format, bf16 or fp32, not with weights in "
            f"{config.dtype.weight} and KV in {config.dtype.kv}"
        )
    try:
        from runtime.engine import LiveSetup
        from runtime.runner import RunnerSpec
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] in ("torch", "safetensors"):
            raise InputError(_HOW_TO_INSTALL) from None
        raise
    weights = config.live.weights
    runner = RunnerSpec(
        model=experiment.model,
        weights=weights if isinstance(weights, int) else Path(weights),
        parallel=experiment.parallel,
        dtype=config.dtype.weight,
        device=device_of(experiment),
        attention=config.live.attention,
        kv_capacity_tokens=setup.kv_capacity_tokens,
        block_tokens=setup.scheduler.block_tokens,
        seed=config.seed,
        threads=config.live.threads,
        timeout_s=config.live.timeout_s,
    )
    return LiveSetup(
        runner=runner,
        cost=setup.cost,
        scheduler=setup.scheduler,
        slos=setup.slos,
        closed_loop=setup.closed_loop,
        send_until_s=setup.send_until_s,
        seed=config.seed,
        stop_s=setup.stop_s,
    )


def device_of(experiment: Experiment) -> str:
    """Where the runtime executes: as the configuration says, or by the simulated device's kind."""
    return experiment.config.live.device or ("cpu" if experiment.device.name == "cpu" else "cuda")


def describe_runtime(experiment: Experiment) -> str:
    """A few words on how the model was executed."""
    device, config = device_of(experiment), experiment.config
    threads = (
        f", {config.live.threads} thread{'s' if config.live.threads > 1 else ''} a rank"
        if device == "cpu"
        else ""
    )
    ranks = experiment.parallel.gpus_per_replica
    return f"{device}, {config.dtype.weight}, {ranks} rank{'s' if ranks > 1 else ''}{threads}"


def summarize_live(records: RunRecords, experiment: Experiment) -> dict[str, Any]:
    """summary.json of a live run."""
    extra = {**utilization(records, experiment), "predictor_source": LIVE}
    return summarize(records, tpot_targets_s=experiment.tpot_targets_s, extra=extra)


def write_live(folder: Path, run: LiveRun, experiment: Experiment, summary: dict[str, Any]) -> None:
    """Write everything about a live run but its report; ``convoy validate --replay`` reads it again."""
    (folder / "config.yaml").write_text(dump_yaml(experiment.config), encoding="utf-8")
    text = json.dumps(summary, indent=2, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    write_requests_csv(run.records, slo_met(run.records, experiment.tpot_targets_s), folder / "requests.csv")
    write_live_records(folder, run, experiment, describe_runtime(experiment))


class _NotingExecutor:
    """An executor that notes what every batch holds, as it is told, without a look at the clock."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.log = SliceLog()

    @property
    def num_stages(self) -> int:
        return self._executor.num_stages

    def submit(self, plan: Plan) -> None:
        self._executor.submit(plan)
        if plan.id >= 0:  # not the warm-up
            self.log.add(plan.id, [(s.request, s.tokens, s.start, s.home) for s in plan.slices])

    def wait(self, timeout_s: float | None = None) -> StageDone | None:
        return self._executor.wait(timeout_s)

    def close(self) -> None:
        self._executor.close()
