"""How fast Convoy is, measured: `make bench` prints the table that the README quotes.

Every figure is the median of several runs, with the smallest and largest beside it. Whole-process figures
start a new process each time.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.build import Experiment, build
from experiments.config import Config
from experiments.load import load_config
from experiments.paper.figures import load_figure
from policies.request import Request
from policies.scheduler import Scheduler, SchedulerSettings
from profiler.iteration import IterationModel
from sim.cluster import simulate
from traces.workload import Workload

CONFIG = Path(__file__).parent / "bench.yaml"
MILLION = 1_000_000
Row = tuple[str, float, float, float, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything; ``million`` as an argument runs only the million requests, in this process, and
    ``hours`` only the hours of Medha's evaluation."""
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    experiment = build(load_config(CONFIG), str(CONFIG))
    if chosen == ["million"]:
        _million(experiment)
        return 0
    rows = _hours() if chosen == ["hours"] else _all(experiment)
    print(f"{'':58} {'median':>10} {'min':>10} {'max':>10}")
    for name, median, low, high, unit in rows:
        print(f"{name:58} {median:>10,.4g} {low:>10,.4g} {high:>10,.4g}  {unit}")
    return 0


def _all(experiment: Experiment) -> list[Row]:
    return [
        *_whole_run(),
        _row("convoy --help", "s", 5, lambda: _run("--help")),
        *_event_loop(experiment),
        *_predictor(experiment.iteration),
        _decision(experiment),
        *_million_in_a_process(),
        *_hours(),
    ]


def _row(name: str, unit: str, repeats: int, measure: Callable[[], float]) -> Row:
    values = [measure() for _ in range(repeats)]
    return name, statistics.median(values), min(values), max(values), unit


def _run(*arguments: str) -> float:
    """Seconds of one ``convoy`` process, start to exit."""
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-m", "experiments.cli", *arguments], check=True, capture_output=True)
    return time.perf_counter() - began_s


def _whole_run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        name, *seconds, unit = _row(
            "convoy run, 10,000 requests, reports included",
            "s",
            5,
            lambda: _run("run", str(CONFIG), "--out", out, "--force"),
        )
    median, low, high = seconds
    return [
        (name, median, low, high, unit),
        (
            "  as simulated requests per wall second",
            10_000 / median,
            10_000 / high,
            10_000 / low,
            "requests/s",
        ),
    ]


def _event_loop(experiment: Experiment) -> list[Row]:
    def requests_per_s() -> float:
        return len(experiment.workload) / simulate(experiment.workload, experiment.setup).wall_s

    def iterations_per_s() -> float:
        records = simulate(experiment.workload, experiment.setup, step_by_step=True)
        return records.work.iterations / records.wall_s

    return [
        _row("event loop alone, decode runs taken at once", "requests/s", 5, requests_per_s),
        _row("event loop alone, step by step", "iterations/s", 3, iterations_per_s),
    ]


def _predictor(cost: IterationModel) -> list[Row]:
    repeats = 20_000

    def batch_of_64() -> float:
        began_s = time.perf_counter()
        for context in range(repeats):
            attention_s = cost.chunk_attention_s(448, context) + cost.decode_attention_s(63, 63 * context)
            cost.tokens_s(511, 64, 64) + attention_s
        return (time.perf_counter() - began_s) / repeats * 1e6

    def one_more_slice() -> float:
        began_s = time.perf_counter()
        for context in range(repeats):
            cost.tokens_s(1023, 65, 65) + 0.001 + cost.chunk_attention_s(512, context)
        return (time.perf_counter() - began_s) / repeats * 1e6

    return [
        _row("predicted time of a batch of 64", "µs", 5, batch_of_64),
        _row("  of the same batch with one slice more", "µs", 5, one_more_slice),
    ]


def _decision(experiment: Experiment) -> Row:
    """One scheduling decision with 2,000 prefills waiting, LARS and adaptive chunks."""
    settings = SchedulerSettings(priority="lars", chunking="adaptive", space_sharing=True)
    rng = np.random.default_rng(0)

    def decision_ms() -> float:
        scheduler = Scheduler(settings, experiment.iteration, 10_000_000)
        for id, tokens in enumerate(rng.integers(100, 20_000, 2000).tolist()):
            scheduler.add(Request(id, id * 0.01, tokens, 100))
        spent_s, now_s = 0.0, 20.0
        for _ in range(200):
            began_s = time.perf_counter()
            batch = scheduler.next_batch(now_s)
            spent_s += time.perf_counter() - began_s
            assert batch is not None
            scheduler.leave_first_stage(batch)
            scheduler.complete(batch, now_s)
            now_s += 0.05
        return spent_s / 200 * 1e3

    return _row("scheduling decision, 2,000 waiting, LARS, adaptive", "ms", 3, decision_ms)


def _million(experiment: Experiment) -> None:
    """A million requests on 64 replicas; prints wall seconds and peak memory in GB."""
    rng = np.random.default_rng(0)
    workload = Workload(
        prompt_tokens=rng.integers(384, 641, MILLION, dtype=np.int32),
        output_tokens=rng.integers(64, 193, MILLION, dtype=np.int32),
        arrival_s=np.cumsum(rng.exponential(1 / 256, MILLION)),
    )
    began_s = time.perf_counter()
    records = simulate(workload, replace(experiment.setup, replicas=64))
    wall_s = time.perf_counter() - began_s
    assert not records.interrupted
    print(wall_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def _million_in_a_process() -> list[Row]:
    command = [sys.executable, "-m", "experiments.bench", "million"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    wall_s, peak_gb = map(float, done.stdout.split())
    return [
        ("a million requests on 64 replicas", wall_s, wall_s, wall_s, "s"),
        ("  peak memory", peak_gb, peak_gb, peak_gb, "GB"),
    ]


def _hours() -> list[Row]:
    """An hour each of Medha's evaluation, one simulation on one core."""
    return [
        _hour("9", "8B, TP8 SPP2, 5 % long prompts, 0.75/s", "Medha"),
        _hour("11", "70B, TP8 SPP4 KVP2, 5 % of 2M tokens, 0.75/s", "3D, SPP4 × KVP2"),
    ]


def _hour(figure: str, what: str, system: str) -> Row:
    [config] = [
        cell.work
        for cell in load_figure(figure).cells
        if cell.labels["system"] == system and cell.labels["workload.arrivals.rate_rps"] == 0.75
    ]
    assert isinstance(config, Config)
    experiment = build(config, f"figure {figure}")
    repeats = 1 if config.parallel.kvp > 1 else 3
    return _row(
        f"an hour of {what}",
        "s",
        repeats,
        lambda: simulate(experiment.workload, experiment.setup).wall_s,
    )


if __name__ == "__main__":
    sys.exit(main())
