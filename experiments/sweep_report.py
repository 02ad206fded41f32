"""report.html of a sweep: which cell is best, and heat maps of what the cells differ in."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from experiments.plots import house_style, picture
from experiments.report import render_page
from experiments.store import write_text
from experiments.text import number, percent, seconds
from experiments.version import version

Row = Mapping[str, Any]

_MAPS = {
    "slo_attainment": ("Requests within their SLOs", percent),
    "ttft_s_p99": ("Time to first token, p99", seconds),
    "tpot_s_p99": ("Time per output token, p99", seconds),
    "goodput_rps": ("Requests per second within their SLOs", number),
}
_MOST_ROWS, _MOST_COLUMNS, _MOST_LINES = 40, 24, 200
_SEED = "seed"
_HOLDS = 0.99  # share of requests from which a combination holds, as in the report of a run


def write_report(
    rows: Sequence[Row], keys: Sequence[str], name: str, config_yaml: str, folder: Path, *, plots: bool
) -> None:
    """Write report.html into ``folder``; ``keys`` are the swept ones, ``rows`` those of results.csv."""
    finished = [row for row in rows if row["status"] == "finished"]
    failed = [row for row in rows if row["status"] == "failed"]
    groups = averaged(finished, [key for key in keys if key != _SEED])
    kind, sentence, lines = _answer(groups, len(finished), len(rows))
    notes = [f"{_label(row, keys)}: {row['error']}" for row in failed[:10]]
    notes += [f"… and {len(failed) - 10:,} more cells failed."] if len(failed) > 10 else []
    header = [*(key for key in keys if key != _SEED), "runs", *(title for title, _ in _MAPS.values())]
    page = render_page(
        "table.html.j2",
        heat_maps(groups, [key for key in keys if key != _SEED]) if plots else [],
        name=f"{name}: sweep",
        kind=kind,
        sentence=sentence,
        lines=lines,
        notes=notes,
        tables=[("Results", _shown(groups), header, [_line(group, keys) for group in groups[:_MOST_LINES]])],
        links=[("results.csv", "results.csv"), ("results.parquet", "results.parquet")],
        config_yaml=config_yaml,
        version=version(),
    )
    write_text(folder / "report.html", page)


def averaged(rows: Sequence[Row], keys: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of ``keys``: means over the others, seeds that is, and their number."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in keys]), []).append(row)
    found = []
    for members in groups.values():
        group = {key: members[0][key] for key in keys} | {"runs": len(members)}
        for metric in _MAPS:
            values = [row[metric] for row in members if metric in row]
            if values:
                group[metric] = statistics.fmean(values)
        found.append(group)
    return found


def heat_maps(groups: Sequence[Row], keys: Sequence[str]) -> list[tuple[str, bytes]]:
    """(title, PNG image) of each metric: the key with the most values across, all others down."""
    if len(groups) < 2 or not keys:
        return []
    across = max(keys, key=lambda key: len({_text(group[key]) for group in groups}))
    others = [key for key in keys if key != across]
    columns = list(dict.fromkeys(_text(group[across]) for group in groups))[:_MOST_COLUMNS]
    labels = list(dict.fromkeys(_label(group, others) for group in groups))[:_MOST_ROWS]
    images = []
    for metric, (title, words) in _MAPS.items():
        values = np.full((len(labels), len(columns)), np.nan)
        for group in groups:
            row, column = _label(group, others), _text(group[across])
            if metric in group and row in labels and column in columns:
                values[labels.index(row), columns.index(column)] = group[metric]
        if np.isfinite(values).any():
            images.append((title, _heat_map(title, values, labels, columns, across, words)))
    return images


def _heat_map(
    title: str, values: Any, labels: Sequence[str], columns: Sequence[str], across: str, words: Any
) -> bytes:
    def draw(figure: Figure) -> None:
        axes = house_style([figure.subplots()])[0]
        present = values[np.isfinite(values)]
        low, high = float(present.min()), float(present.max())
        norm = LogNorm(low, high) if low > 0 and high / low > 20 else Normalize(low, max(high, low + 1e-12))
        axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
        axes.grid(False)
        axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) <= 10 else 60)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(across)
        if values.size <= 160:
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    colour = "white" if norm(value) < 0.6 else "black"
                    axes.text(column, row, words(value), ha="center", va="center", fontsize=7.5, color=colour)
        left = min(0.08 + 0.0075 * max(map(len, labels)), 0.45)
        figure.subplots_adjust(left=left, right=0.98, top=0.88, bottom=0.16 if len(columns) <= 10 else 0.24)

    return picture(title, draw, size=(7.2, max(2.6, 1.6 + 0.32 * len(labels))))


def _answer(groups: Sequence[Row], finished: int, total: int) -> tuple[str, str, list[str]]:
    count = f"{finished:,} of {total:,} cells finished."
    judged = [group for group in groups if "slo_attainment" in group]
    if not judged:
        return "none", "No cell has finished", [count]
    holding = [group for group in judged if group["slo_attainment"] >= _HOLDS]
    sentence = f"{len(holding):,} of {len(judged):,} combinations hold their SLOs"
    best = max(
        judged, key=lambda group: (min(group["slo_attainment"], _HOLDS), group.get("goodput_rps", 0.0))
    )
    which = _label(best, [key for key in best if key not in (*_MAPS, "runs")]) or "as configured"
    of_those = "Of those, the most requests/s within their SLOs" if holding else "The most within their SLOs"
    line = f"{of_those}: {which}, with {percent(best['slo_attainment'])}. {count}"
    return "good" if holding else "bad", sentence, [f"{percent(_HOLDS)} of requests are asked. {line}"]


def _shown(groups: Sequence[Row]) -> str:
    text = "Means over seeds." if any(group["runs"] > 1 for group in groups) else ""
    left = len(groups) - _MOST_LINES
    return f"{text} {left:,} more rows are in results.csv.".strip() if left > 0 else text


def _line(group: Row, keys: Sequence[str]) -> list[str]:
    figures = [words(group[metric]) if metric in group else "" for metric, (_, words) in _MAPS.items()]
    return [*(_text(group[key]) for key in keys if key != _SEED), f"{group['runs']:,}", *figures]


def _label(row: Row, keys: Sequence[str]) -> str:
    """The values of ``keys``, each with the last part of its name."""
    return ", ".join(f"{key.rpartition('.')[2]} {_text(row[key])}" for key in keys)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
