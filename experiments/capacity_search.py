"""The highest load at which the SLOs hold: bisection over loads, each judged by as many seeds as it takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.plan_config import CapacityConfig

LOWEST_LOAD = 1 / 1024
Measure = Callable[[float, Sequence[int]], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class LoadTrial:
    """All runs at one load.

    Attributes:
        attainments: of each seed, in the class where it is lowest.
        low, high: confidence interval of their mean.
        holds: the mean reaches the attainment asked for.
        settled: so does the whole interval, or no part of it.
        summaries: of each run.
    """

    load: float
    attainments: tuple[float, ...]
    low: float
    high: float
    holds: bool
    settled: bool
    summaries: Sequence[Mapping[str, Any]] = field(hash=False, compare=False)

    @property
    def mean(self) -> float:
        """Mean attainment."""
        return statistics.fmean(self.attainments)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the search found.

    Attributes:
        load: the highest load found to hold; None if even the lowest tried fails.
        low, high: the highest load that surely holds and the lowest that surely doesn't, among those tried;
            None if there is none.
        trials: all loads tried, in ascending order.
    """

    load: float | None
    low: float | None
    high: float | None
    trials: tuple[LoadTrial, ...]

    @property
    def edge(self) -> LoadTrial | None:
        """The lowest load tried above the capacity: what fails first there is what binds."""
        return next((trial for trial in self.trials if not trial.holds), None)


def find_capacity(
    measure: Measure,
    attainment_of: Callable[[Mapping[str, Any]], float],
    settings: CapacityConfig,
    *,
    random: bool,
    start: float = 1.0,
    max_load: float | None = None,
) -> Capacity:
    """Search the highest load at which the mean attainment reaches ``settings.attainment``.

    From ``start`` the load doubles, or halves, until one holds and one doesn't; then the gap is halved, in
    ratios, down to ``settings.precision``.

    Args:
        measure: simulates a load with some seeds, numbered from 0; returns their summaries.
        attainment_of: the share in a summary that counts.
        settings: how sure and how precise to be.
        random: whether seeds make a difference; if not, each load is run once.
        start: the load tried first.
        max_load: no load above is tried; ``settings.max_load`` if not given.
    """
    trials: dict[float, LoadTrial] = {}
    most = settings.max_load if max_load is None else max_load

    def holds(load: float) -> bool:
        if load not in trials:
            trials[load] = judge_load(measure, attainment_of, settings, load, random=random)
        return trials[load].holds

    load = min(start, most)
    if holds(load):
        low, high = load, None
        while low < most:
            load = min(2 * low, most)
            if not holds(load):
                high = load
                break
            low = load
    else:
        low, high = None, load
        while load > LOWEST_LOAD and low is None:
            load /= 2
            if holds(load):
                low = load
            else:
                high = load
    while low is not None and high is not None and high / low > 1 + settings.precision:
        middle = _round(math.sqrt(low * high))
        if not low < middle < high:
            break
        if holds(middle):
            low = middle
        else:
            high = middle
    tried = tuple(trials[load] for load in sorted(trials))
    sure = [each.load for each in tried if each.holds and each.settled]
    unsure = [each.load for each in tried if not each.holds and each.settled]
    return Capacity(low, max(sure, default=None), min(unsure, default=None), tried)


def judge_load(
    measure: Measure,
    attainment_of: Callable[[Mapping[str, Any]], float],
    settings: CapacityConfig,
    load: float,
    *,
    random: bool,
) -> LoadTrial:
    """Run a load with more and more seeds until it is settled, or there are ``settings.max_seeds``."""
    target = settings.attainment
    summaries = list(measure(load, range(settings.min_seeds if random else 1)))
    while True:
        values = [attainment_of(summary) for summary in summaries]
        low, high = interval(values, settings.confidence) if random else (values[0], values[0])
        settled = low >= target or high < target
        if settled or not random or len(values) >= settings.max_seeds:
            holds = statistics.fmean(values) >= target
            return LoadTrial(load, tuple(values), low, high, holds, settled, summaries)
        summaries += measure(load, range(len(values), min(len(values) + 2, settings.max_seeds)))


def interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Two-sided interval of the mean of independent values (Student's t), cut off at 0 and 1."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return max(mean - half, 0.0), min(mean + half, 1.0)


def _round(load: float) -> float:
    """Four figures: a load is a factor that people read, and the name of a cell."""
    return float(f"{load:.4g}")
