"""Intervals of latencies: a few replays with kernel times as far off as they were on held-out measurements.

Every operator has one factor a replay, for all its shapes: predictors err in the same direction for shapes
alike, and a serving workload has few kinds of shapes. So the intervals are on the wide side. Factors of
different operators are independent; over the replays each runs through its whole distribution (Latin
hypercube), log-normal between the 5th and the 95th percentile that training found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from experiments.build import Experiment
from experiments.text import seconds
from sim.cluster import simulate
from specs.errors import InputError
from traces.records import RunRecords

REPLAYS = 8
LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT"}
STATISTICS = ("mean", "p50", "p90", "p99")

Summarize = Callable[[RunRecords, Experiment], Mapping[str, Any]]


def check_intervals(experiment: Experiment, where: str) -> None:
    """Refuse intervals where nothing was measured.

    Raises:
        InputError: kernel times come from the data sheet alone.
    """
    if not experiment.iteration.kernels.intervals:
        raise InputError(
            f"{where}: --intervals: kernel times come from the roofline, so there are no measured errors; "
            "take a device with a profile (`convoy list profiles`)"
        )


def latency_intervals(experiment: Experiment, summarize: Summarize) -> dict[str, Any]:
    """The lowest and the highest value over the replays, by latency and statistic, and how many replays."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in LATENCIES}
    for factors in perturbations(experiment.iteration.kernels.intervals, experiment.config.seed):
        setup = experiment.perturbed_setup(factors)
        summary = summarize(simulate(experiment.workload, setup), experiment)
        for name in LATENCIES:
            for statistic in STATISTICS:
                if statistic in summary.get(name, {}):
                    found[name].setdefault(statistic, []).append(summary[name][statistic])
    ranges = {
        name: {statistic: [min(values), max(values)] for statistic, values in statistics.items()}
        for name, statistics in found.items()
        if statistics
    }
    return {"replays": REPLAYS, **ranges}


def perturbations(intervals: Mapping[str, tuple[float, float]], seed: int) -> list[dict[str, float]]:
    """A factor for each operator, for each replay."""
    rng = np.random.default_rng([seed, 0x1A7])
    places = [NormalDist().inv_cdf((rank + 0.5) / REPLAYS) for rank in range(REPLAYS)]
    replays: list[dict[str, float]] = [{} for _ in range(REPLAYS)]
    edge = NormalDist().inv_cdf(0.95)
    for operator, (low, high) in sorted(intervals.items()):
        for factors, place in zip(replays, rng.permutation(places), strict=True):
            factors[operator] = float(np.exp((low + high) / 2 + place * (high - low) / (2 * edge)))
    return replays


def interval_notes(intervals: Mapping[str, Any]) -> list[str]:
    """For the terminal and the report."""
    shown = []
    for name, title in LATENCIES.items():
        for statistic, (low, high) in intervals.get(name, {}).items():
            if statistic in ("p50", "p99"):
                shown.append(f"{title} {statistic} {seconds(low)} to {seconds(high)}")
    return [
        f"With kernel times off as they were on held-out measurements, in {intervals['replays']} replays: "
        f"{'; '.join(shown)}."
    ]
