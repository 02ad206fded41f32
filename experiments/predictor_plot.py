"""The plot of ``convoy train``: predicted against measured times, and the error by size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from profiler.train_report import OperatorReport, TrainReport

_INK, _GRID = "#333333", "#dddddd"
_MOST_POINTS = 3000  # of an operator: more would be ink upon ink
_BINS_PER_DECADE = 2
_FEWEST_IN_BIN = 5


def draw(report: TrainReport, path: Path) -> None:
    """Write a PNG: each operator in its own colour, every row predicted by a model that hasn't seen it."""
    figure = Figure(figsize=(10.5, 4.6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report.device}/{report.profile}, held out", x=0.02, ha="left", fontsize=11, color=_INK)
    left, right = figure.subplots(1, 2)
    colours = _colours(len(report.operators))
    for operator, colour in zip(report.operators, colours, strict=True):
        _scatter(left, operator, colour)
        _error_by_size(right, operator, colour)
    _finish_scatter(left, report.operators)
    right.set(xscale="log", xlabel="measured time, s", ylabel="median |predicted ÷ measured − 1|, %")
    right.set_ylim(bottom=0.0)
    for axes in (left, right):
        axes.grid(color=_GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8, markerscale=3
    )
    figure.savefig(path, format="png", metadata={"Software": None})


def _colours(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    return [tuple(map(float, colormaps["turbo"](place))) for place in np.linspace(0.05, 0.95, count)]


def _scatter(axes: Axes, operator: OperatorReport, colour: tuple[float, ...]) -> None:
    rows = np.random.default_rng(0).permutation(operator.rows)[:_MOST_POINTS]
    axes.scatter(
        operator.measured_s[rows],
        operator.predicted_s[rows],
        s=5,
        color=colour,
        alpha=0.5,
        linewidths=0,
        rasterized=True,
        label=f"{operator.operator} {operator.dtype}",
    )


def _finish_scatter(axes: Axes, operators: Sequence[OperatorReport]) -> None:
    ends = [
        min(float(operator.measured_s.min()) for operator in operators),
        max(float(operator.measured_s.max()) for operator in operators),
    ]
    axes.plot(ends, ends, color=_INK, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured, s", ylabel="predicted, s")


def _error_by_size(axes: Axes, operator: OperatorReport, colour: tuple[float, ...]) -> None:
    size = np.floor(np.log10(operator.measured_s) * _BINS_PER_DECADE).astype(int)
    error = 100 * np.abs(operator.predicted_s / operator.measured_s - 1.0)
    bins = [place for place in np.unique(size) if np.sum(size == place) >= _FEWEST_IN_BIN]
    centres = [10.0 ** ((place + 0.5) / _BINS_PER_DECADE) for place in bins]
    medians = [float(np.median(error[size == place])) for place in bins]
    axes.plot(centres, medians, color=colour, linewidth=1.4, marker="o", markersize=3)
