"""The plots of a run, drawn with matplotlib's object API: pyplot would cost its import and keep state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from experiments.series import Cdf, FloatArray, PlotData, Scatter, Timeline

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _GRID = "#333333", "#dddddd"
_DPI = 110
_STEPS = [1, 2, 2.5, 5, 10]  # between ticks, in any power of ten
_LOG_FROM = 5.0  # a spread (99th percentile to 1st) from which an axis is logarithmic

TITLES = {
    "ttft_cdf": "Time to first token",
    "tpot_cdf": "Time per output token",
    "ttft_over_time": "Time to first token by arrival",
    "queue_kv": "Queue and KV cache over time",
    "batches": "What batches hold over time",
}
"""File stem of each plot and its title, in the order of the report."""


def draw_plots(data: PlotData) -> dict[str, bytes]:
    """PNG images of what there is data for, by the stems in ``TITLES`` and in that order."""
    drawings: dict[str, Callable[[Figure], None]] = {}
    if data.ttft:
        drawings["ttft_cdf"] = lambda figure: _cdf(figure, data.ttft, "time to first token")
        drawings["ttft_over_time"] = lambda figure: _ttft_over_time(figure, data.scatter)
    if data.tpot:
        drawings["tpot_cdf"] = lambda figure: _cdf(figure, data.tpot, "time per output token")
    timeline = data.timeline
    if timeline is not None:
        drawings["queue_kv"] = lambda figure: _queue_kv(figure, timeline)
        drawings["batches"] = lambda figure: _batches(figure, timeline)
    return {stem: picture(title, drawings[stem]) for stem, title in TITLES.items() if stem in drawings}


def draw_cdf(title: str, curves: list[Cdf], what: str) -> bytes:
    """A PNG image of some distributions of one latency, ``what``."""
    return picture(title, lambda figure: _cdf(figure, curves, what))


def picture(title: str, draw: Callable[[Figure], None], size: tuple[float, float] = (7.2, 4.0)) -> bytes:
    """A PNG image under a title; ``draw`` fills the figure, ``size`` is in inches."""
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold", color=_INK)
    draw(figure)
    image = BytesIO()
    # Level 3 takes half the time of the default and a tenth more room.
    figure.savefig(image, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    return image.getvalue()


def _cdf(figure: Figure, curves: list[Cdf], what: str) -> None:
    axes = _axes(figure, 1)[0]
    for colour, curve in zip(COLOURS, curves, strict=False):
        values, shares = np.append(curve.values[:1], curve.values), np.append(0.0, curve.shares)
        axes.step(values, shares, where="post", color=colour, linewidth=1.8, label=curve.label)
    targets_s = sorted({curve.target_s for curve in curves if curve.target_s is not None})
    for place, target_s in enumerate(targets_s):
        label = "target" if place == 0 else None
        axes.axvline(target_s, color=_INK, linewidth=1.2, linestyle="--", label=label)
    scale_time(axes, "x", np.concatenate([curve.values for curve in curves]), targets_s)
    for share in (0.5, 0.9, 0.99):
        axes.axhline(share, color=_GRID, linewidth=0.8, zorder=0)
    axes.set_yticks([0.0, 0.25, 0.5, 0.75, 0.9, 0.99], ["0", "25 %", "50 %", "75 %", "90 %", "99 %"])
    axes.set_ylim(0.0, 1.02)
    axes.set_xlabel(f"{what} (s)")
    axes.set_ylabel("requests at or below")
    if len(curves) > 1 or targets_s:
        axes.legend(loc="lower right", fontsize=9, edgecolor="white", framealpha=0.9)


def _ttft_over_time(figure: Figure, scatter: Scatter) -> None:
    axes = _axes(figure, 1)[0]
    order = np.argsort(scatter.prompt_tokens, kind="stable")  # long prompts on top: they are few
    tokens = scatter.prompt_tokens[order]
    low, high = float(tokens.min()), float(tokens.max())
    norm: Normalize | None = None
    if high > low:
        norm = LogNorm(low, high) if high / low > _LOG_FROM else Normalize(low, high)
    points = axes.scatter(
        scatter.arrival_s[order],
        scatter.ttft_s[order],
        c=tokens if norm is not None else COLOURS[0],
        cmap="viridis_r" if norm is not None else None,
        norm=norm,
        s=7,
        linewidths=0,
        alpha=0.8,
    )
    scale_time(axes, "y", scatter.ttft_s)
    axes.set_xlabel("arrival (s)")
    axes.set_ylabel("time to first token (s)")
    if norm is not None:
        bar = figure.colorbar(points, ax=axes, pad=0.02)
        bar.set_label("prompt (tokens)", color=_INK)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(_thousands))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.tick_params(colors=_INK, labelsize=9)
        bar.outline.set_visible(False)
    shown = len(scatter.ttft_s)
    if shown < scatter.total:
        axes.set_title(
            f"{shown:,} of {scatter.total:,} requests, the slowest all among them",
            fontsize=9,
            color=_INK,
            loc="left",
        )


def _queue_kv(figure: Figure, timeline: Timeline) -> None:
    above, below = _axes(figure, 2)
    _band(above, timeline, timeline.waiting, timeline.waiting_low, timeline.waiting_high, COLOURS[0])
    above.set_ylabel("requests waiting,\nper replica")
    above.set_ylim(bottom=0.0)
    _band(below, timeline, 100 * timeline.kv_share, 100 * timeline.kv_low, 100 * timeline.kv_high, COLOURS[1])
    below.set_ylabel("KV cache in use (%)")
    # Up to 100 % where that leaves the curve visible.
    below.set_ylim(0.0, 102.0 if timeline.kv_high.max() > 0.25 else None)
    below.set_xlabel("simulated time (s)")
    if timeline.replicas > 1:
        text = f"mean of {timeline.replicas} replicas; shaded: least to most loaded"
        above.set_title(text, fontsize=9, color=_INK, loc="left")


def _band(
    axes: Axes, timeline: Timeline, mean: FloatArray, low: FloatArray, high: FloatArray, colour: str
) -> None:
    if timeline.replicas > 1:
        axes.fill_between(timeline.time_s, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(timeline.time_s, mean, color=colour, linewidth=1.3)


def _batches(figure: Figure, timeline: Timeline) -> None:
    above, below = _axes(figure, 2)
    above.plot(timeline.time_s, timeline.prefill_tokens, color=COLOURS[0], linewidth=1.1)
    above.set_ylabel("prefill tokens\nper batch")
    below.plot(timeline.time_s, timeline.decode_tokens, color=COLOURS[1], linewidth=1.1)
    below.set_ylabel("decode tokens\nper batch")
    below.set_xlabel("simulated time (s)")
    for axes in (above, below):
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))


def _axes(figure: Figure, rows: int) -> list[Axes]:
    """``rows`` axes above each other that share their x axis, in the house style."""
    all_axes: list[Axes] = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0].tolist()
    figure.subplots_adjust(left=0.125, right=0.97, top=0.86, bottom=0.135, hspace=0.12)
    return house_style(all_axes)


def house_style(all_axes: Iterable[Axes]) -> list[Axes]:
    """Give axes their looks; returns them."""
    all_axes = list(all_axes)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=_INK, labelsize=9, which="both")
        axes.xaxis.set_major_locator(
            MaxNLocator(6, steps=_STEPS)
        )  # a tick takes longer to draw than a thousand points
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
    return all_axes


def scale_time(axes: Axes, which: str, values: FloatArray, marks: Sequence[float] = ()) -> None:
    """Make an axis of seconds logarithmic if the values and marks on it are spread widely, and its labels
    plain numbers."""
    positive = values[values > 0.0]
    axis = axes.xaxis if which == "x" else axes.yaxis
    spread = [*np.quantile(positive, [0.01, 0.99]), *marks] if len(positive) else [1.0]
    if max(spread) > _LOG_FROM * min(spread):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        decades = np.log10(max(positive.max(), *spread) / min(positive.min(), *spread))
        axis.set_major_locator(LogLocator(10.0, subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_plain))
    elif which == "x":
        axes.set_xlim(left=0.0)
    else:
        axes.set_ylim(bottom=0.0)


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:.6g}"


def _thousands(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"
