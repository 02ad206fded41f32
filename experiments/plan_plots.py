"""The plots of a plan: cost against latency, and how far the answer is from the edge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plan_facts import PlanFacts
from experiments.plots import COLOURS, house_style, picture, scale_time
from experiments.trials import Trial

_MARKERS = "os^Dv*PX"
_MISS = "#bbbbbb"
PARETO_TITLES = ("Cost against time to first token", "Cost against time per output token")


def draw_pareto(facts: PlanFacts, which: int) -> bytes:
    """Cost against TTFT p99 (0) or TPOT p99 (1) of all simulated in full; misses grey, the answer ringed."""

    def draw(figure: Figure) -> None:
        axes = house_style([figure.subplots()])[0]
        _pareto(axes, facts, which)
        axes.set_xlabel("USD per hour")
        axes.set_ylabel(("time to first token, p99 (s)", "time per output token, p99 (s)")[which])
        axes.legend(fontsize=8, edgecolor="white", framealpha=0.9, loc="best")
        figure.subplots_adjust(left=0.125, right=0.97, top=0.86, bottom=0.135)

    return picture(PARETO_TITLES[which], draw)


def draw_headroom(facts: PlanFacts) -> bytes:
    """SLO attainment of the answer against traffic, with its interval where seeds make a difference."""
    assert facts.capacity is not None
    trials = facts.capacity.trials

    def draw(figure: Figure) -> None:
        axes = house_style([figure.subplots()])[0]
        loads, means = [trial.load for trial in trials], [100 * trial.mean for trial in trials]
        low, high = [100 * trial.low for trial in trials], [100 * trial.high for trial in trials]
        axes.fill_between(loads, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        axes.plot(loads, means, color=COLOURS[0], marker="o", markersize=4)
        axes.axhline(
            100 * facts.settings.attainment, color="#333333", linestyle="--", linewidth=1.1, label="asked"
        )
        axes.axvline(1.0, color="#999999", linewidth=1.0, label="the traffic as it is")
        axes.set_xlabel("traffic, times what it is")
        axes.set_ylabel("requests within SLOs (%)")
        axes.legend(fontsize=8, edgecolor="white", framealpha=0.9, loc="lower left")
        figure.subplots_adjust(left=0.12, right=0.97, top=0.86, bottom=0.14)

    return picture("How much more traffic the answer takes", draw)


def _pareto(axes: Axes, facts: PlanFacts, which: int) -> None:
    devices = list(dict.fromkeys(trial.deployment.device for trial in facts.full))
    missed = [trial for trial in facts.full if not trial.holds]
    _points(axes, missed, which, color=_MISS, marker="x", label="misses its SLOs")
    for place, device in enumerate(devices):
        chosen = [trial for trial in facts.full if trial.holds and trial.deployment.device == device]
        marker, colour = _MARKERS[place % len(_MARKERS)], COLOURS[place % len(COLOURS)]
        _points(axes, chosen, which, color=colour, marker=marker, label=Path(device).stem)
    frontier: list[tuple[float, float]] = []
    for trial in facts.front:
        if not frontier or trial.latencies[which] < frontier[-1][1]:
            frontier.append((trial.deployment.usd_per_hour, trial.latencies[which]))
    if len(frontier) > 1:
        axes.step(*zip(*frontier, strict=True), where="post", color="#333333", linewidth=0.9, zorder=1)
    if facts.choice is not None:
        point = facts.choice.deployment.usd_per_hour, facts.choice.latencies[which]
        axes.scatter(
            *point, s=170, facecolors="none", edgecolors="#333333", linewidths=1.4, label="the answer"
        )
    axes.set_xlim(left=0.0)
    scale_time(axes, "y", np.array([trial.latencies[which] for trial in facts.full]))


def _points(axes: Axes, trials: Sequence[Trial], which: int, **style: str) -> None:
    if trials:
        x = [trial.deployment.usd_per_hour for trial in trials]
        axes.scatter(x, [trial.latencies[which] for trial in trials], s=28, **style)  # type: ignore[arg-type]
