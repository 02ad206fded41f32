"""One plot for each figure: what is drawn over what is a table, the drawing is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.paper.results import NotThere, Results, value
from experiments.plots import COLOURS

_DPI = 110
_MARKERS = "osD^vP*X"


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: values over the labels of an axis, a line for every combination of the others.

    ``y`` is a path in a cell's result, or computes a value from it; ``x`` an axis, or a path as well.
    """

    y: str | Callable[[Mapping[str, Any]], float]
    label: str
    x: str
    x_label: str
    log_y: bool = True
    log_x: bool = False
    target: float | None = None


_LOAD = "requests per second"
_ALL = "(s, unfinished: the wait so far)"
PANELS: dict[str, tuple[Panel, ...]] = {
    "1a": (
        Panel("ttft_all_s.p50", f"median TTFT\n{_ALL}", "long_prompts", "share of long prompts"),
        Panel("ttft_all_s.p90", f"p90 TTFT\n{_ALL}", "long_prompts", "share of long prompts"),
    ),
    "1b": (
        Panel("ttft_all_s.p50", f"median TTFT\n{_ALL}", "rate_rps", _LOAD, target=10.0),
        Panel("ttft_all_s.p90", f"p90 TTFT\n{_ALL}", "rate_rps", _LOAD, target=10.0),
    ),
    "3a": (Panel("longest_batch_s", "longest batch (s)", "gpus", "GPUs", log_x=True),),
    "3b": (
        Panel(
            lambda cell: cell["attention_s"] / cell["chunk"] * 1e6,
            "attention a token (µs)",
            "chunk",
            "chunk (tokens)",
            log_y=False,
            log_x=True,
        ),
    ),
    "4": (
        Panel(
            "mixed_batch_s.p95",
            "p95 gap of decodes (s)",
            "long.ttft_all_s.p50",
            "prefill of 1M tokens (s)",
            log_x=True,
        ),
    ),
    "5b": (Panel("ttft_s.max", "prefill of 1M tokens (s)", "gpus", "GPUs", log_x=True),),
    "5c": (Panel("ttft_s.max", "prefill of 1M tokens (s)", "gpus", "GPUs", log_x=True),),
    "5d": (Panel("total_s", "prefill (s)", "cp", "servers in a ring", log_x=True),),
    "7a": (Panel("total_s", "time per output token (s)", "kvp", "KVP groups", log_y=False),),
    "7b": (
        Panel("ttft_s.max", "prefill of 4M tokens (s)", "kvp", "KVP groups", log_y=False),
        Panel("tpot_s.max", "time per output token (s)", "kvp", "KVP groups", log_y=False),
    ),
    "9": (
        Panel("ttft_all_s.p50", f"median TTFT\n{_ALL}", "rate_rps", _LOAD),
        Panel("ttft_all_s.p90", f"p90 TTFT\n{_ALL}", "rate_rps", _LOAD),
    ),
    "10": (
        Panel("tpot_finished_s.p50", "median TPOT (s)", "rate_rps", _LOAD, target=0.05),
        Panel("tbt_s.p99", "p99 gap (s)", "rate_rps", _LOAD, target=0.05),
    ),
    "11": (
        Panel("ttft_all_s.p50", f"median TTFT\n{_ALL}", "rate_rps", _LOAD),
        Panel("ttft_all_s.p90", f"p90 TTFT\n{_ALL}", "rate_rps", _LOAD),
    ),
    "11b": (
        Panel("ttft_s.max", "prefill of 2M tokens (s)", "system", "", log_y=False),
        Panel("tpot_s.max", "time per output token (s)", "system", "", log_y=False),
    ),
    "12": (
        Panel("tpot_finished_s.p50", "median TPOT (s)", "rate_rps", _LOAD),
        Panel("tbt_s.p99", "p99 gap (s)", "rate_rps", _LOAD),
    ),
    "13": (
        Panel("ttft_all_s.p50", f"median TTFT\n{_ALL}", "rate_rps", _LOAD),
        Panel("ttft_all_s.p90", f"p90 TTFT\n{_ALL}", "rate_rps", _LOAD),
    ),
    "12b": (Panel("tpot_finished_s.p50", "median TPOT (s)", "system", "", log_y=False, target=0.05),),
    "rules": (
        Panel("ttft_all_s.p50", f"median TTFT\n{_ALL}", "rate_rps", _LOAD),
        Panel("short.ttft_all_s.p90", f"p90 TTFT, short\n{_ALL}", "rate_rps", _LOAD),
    ),
    "lockstep": (
        Panel("ttft_all_s.p50", f"median TTFT\n{_ALL}", "chunks", "chunks", log_y=False),
        Panel("tbt_s.p99", "p99 gap (s)", "chunks", "chunks", log_y=False),
    ),
    "admission": (
        Panel("ttft_all_s.p50", f"median TTFT\n{_ALL}", "admission", "who doesn't fit"),
        Panel("short.ttft_all_s.p90", f"p90 TTFT, short\n{_ALL}", "admission", "who doesn't fit"),
    ),
    "14": (
        Panel("short.ttft_all_s.p50", f"median TTFT, short\n{_ALL}", "rate_rps", _LOAD),
        Panel("long.finished", "long prompts finished", "rate_rps", _LOAD, log_y=False),
    ),
    "15": (Panel("mfu", "model FLOP utilization", "gpus", "GPUs", log_y=False, log_x=True),),
    "16": (Panel("mbu", "memory bandwidth utilization", "context", "context (tokens)", log_y=False),),
    "17": (Panel("ttft_s.max", "prefill of 1M tokens (s)", "spp", "stages", log_x=True),),
    "18": (Panel("total_s", "decode step (s)", "spp", "stages", log_y=False),),
    "19": (
        Panel("ttft_s.max", "prefill (s)", "tokens", "prompt (tokens)"),
        Panel(
            "tpot_s.max", "time per output token (s)", "tokens", "prompt (tokens)", log_y=False, target=0.03
        ),
    ),
    "19b": (
        Panel("ttft_s.max", "prefill of 10M tokens (s)", "kvp", "KVP groups", log_y=False),
        Panel("tpot_s.max", "time per output token (s)", "kvp", "KVP groups", log_y=False, target=0.03),
    ),
    "decisions": (
        Panel("decision_s.p50", "decision (s)", "waiting", "prefills waiting", log_x=True, target=1e-3),
    ),
}


def draw(results: Results) -> bytes | None:
    """A PNG image of the figure; None if nothing of it has been computed."""
    if not any(results.summaries):
        return None
    panels = PANELS.get(results.figure.name, ())
    figure = Figure(
        figsize=(7.2, 2.2 + 2.2 * max(len(panels), 1)), dpi=_DPI, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(results.figure.title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    all_axes = figure.subplots(max(len(panels), 1), 1, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=False):
        _panel(axes, panel, results)
    if results.figure.name == "6b":
        _servers(all_axes[0], results)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
    image = BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _panel(axes: Axes, panel: Panel, results: Results) -> None:
    lines: dict[tuple[Any, ...], list[tuple[Any, float]]] = {}
    for labels, summary in results.cells():
        if summary is None:
            continue
        whole = {**summary, **{key: label for key, label in labels.items() if key not in summary}}
        try:
            y = panel.y(whole) if callable(panel.y) else value(whole, panel.y)
            x = labels[panel.x] if panel.x in labels else value(whole, panel.x)
        except NotThere:
            continue
        others = {key: label for key, label in labels.items() if key != panel.x}
        kind = str(next(iter(others.values()), "")).partition(" ")[0]  # "static" of "static 512"
        name = tuple(others.values()) if panel.x in labels else (kind,)
        lines.setdefault(name, []).append((x, y))
    for place, (name, points) in enumerate(lines.items()):
        x_values, y_values = zip(*points, strict=True)
        marker, colour = _MARKERS[place % len(_MARKERS)], COLOURS[place % len(COLOURS)]
        label = ", ".join(map(str, name))
        axes.plot(x_values, y_values, color=colour, label=label, marker=marker, markersize=4, linewidth=1.6)
    if panel.target is not None:
        axes.axhline(panel.target, color="#333333", linewidth=1.0, linestyle="--")
    if panel.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)
    if panel.log_x:
        axes.set_xscale("log", base=2 if panel.x in ("gpus", "chunk", "spp") else 10)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.label, fontsize=9)
    axes.tick_params(labelsize=9)
    if len(lines) > 1:
        axes.legend(fontsize=8, edgecolor="white")


def _servers(axes: Axes, results: Results) -> None:
    """Figure 6b: servers at work over the time of one prefill."""
    joins_s, end_s = results.get("groups_join_s"), results.get("prefill_end_s")
    servers = [4 * (place + 1) for place in range(len(joins_s))]
    axes.step([*joins_s, end_s], [*servers, servers[-1]], where="post", color=COLOURS[0])
    axes.set_xlabel("time since the first batch (s)", fontsize=9)
    axes.set_ylabel("servers at work", fontsize=9)
    axes.set_ylim(bottom=0.0)
