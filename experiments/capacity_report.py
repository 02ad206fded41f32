"""report.html of a capacity search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.capacity import HEADER, Found, row
from experiments.config import Config
from experiments.load import dump_yaml
from experiments.plan_config import CapacityConfig
from experiments.plots import COLOURS, house_style, picture
from experiments.report import render_page
from experiments.store import write_text
from experiments.text import number, percent
from experiments.version import version

_SHOWN = 12


def write_report(
    found: Sequence[Found], config: Config, settings: CapacityConfig, folder: Path, *, plots: bool
) -> None:
    """Write report.html into ``folder``."""
    best = max(found, key=lambda each: each.capacity.load or 0.0)
    if best.capacity.load is None:
        sentence = "The SLOs hold at no load that was tried"
    else:
        rate = best.capacity_rps
        words = (
            f"{number(rate)} requests/s" if rate is not None else f"{number(best.capacity.load)} × the load"
        )
        sentence = f"{words}: {best.name}" if len(found) > 1 else f"Holds up to {words}"
    tables = [("Capacities", _explanation(settings), HEADER, [row(each) for each in found])]
    page = render_page(
        "table.html.j2",
        [("Attainment by load", _draw(found, settings))] if plots else [],
        name=f"{config.name}: capacity",
        kind="good" if best.capacity.load is not None else "bad",
        sentence=sentence,
        lines=[
            f"The highest load found at which {percent(settings.attainment)} of requests meet their SLOs."
        ],
        notes=[],
        tables=tables,
        links=[("capacity.json", "capacity.json"), ("capacity.csv", "capacity.csv")],
        config_yaml=dump_yaml(config),
        version=version(),
    )
    write_text(folder / "report.html", page)


def _explanation(settings: CapacityConfig) -> str:
    return (
        f"A load surely holds or fails where the {percent(settings.confidence)} interval of the "
        f"mean attainment over {settings.min_seeds} to {settings.max_seeds} seeds lies on one side of "
        f"{percent(settings.attainment)}. A trace at its own times is the same whatever the seed: one run."
    )


def _draw(found: Sequence[Found], settings: CapacityConfig) -> bytes:
    in_rps = all(each.rate_rps is not None for each in found)

    def draw(figure: Figure) -> None:
        axes = house_style([figure.subplots()])[0]
        for place, each in enumerate(found[:_SHOWN]):
            colour = COLOURS[place % len(COLOURS)]
            style = "-" if place < len(COLOURS) else "--"
            unit = (each.rate_rps or 1.0) if in_rps else 1.0
            trials = each.capacity.trials
            loads = [trial.load * unit for trial in trials]
            low, high = [100 * trial.low for trial in trials], [100 * trial.high for trial in trials]
            axes.fill_between(loads, low, high, color=colour, alpha=0.15, linewidth=0)
            means = [100 * trial.mean for trial in trials]
            axes.plot(loads, means, style, color=colour, marker="o", markersize=3.5, label=each.name)
        axes.axhline(100 * settings.attainment, color="#333333", linestyle="--", linewidth=1.0)
        axes.set_xlabel("requests per second" if in_rps else "load, times the configured one")
        axes.set_ylabel("requests within SLOs (%)")
        axes.legend(fontsize=8, edgecolor="white", framealpha=0.9, loc="lower left")
        figure.subplots_adjust(left=0.12, right=0.97, top=0.86, bottom=0.14)

    return picture("SLO attainment by load", draw)
