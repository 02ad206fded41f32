"""``convoy compare A B``: two runs, metric by metric, with their distributions in one picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.report import render_page
from experiments.store import write_text
from experiments.tables import print_table
from experiments.text import number, percent, seconds
from experiments.version import version
from experiments.yaml_files import read_yaml_mapping
from specs.errors import InputError

FloatArray = NDArray[np.float64]


def _count(value: float) -> str:
    return f"{value:,.0f}"


_LATENCIES = {
    "ttft_s": ("TTFT", "arrival to first token"),
    "tpot_s": ("TPOT", "(E2E − TTFT) ÷ (output tokens − 1) of one request"),
    "tbt_s": ("TBT", "every gap between two tokens of one request"),
    "e2e_s": ("E2E", "arrival to last token"),
}
_STATISTICS = ("mean", "p50", "p90", "p99")
_FIGURES: Mapping[str, tuple[str, str, Callable[[float], str]]] = {
    "slo_attainment": ("SLOs met", "share of all requests with TTFT and TPOT as promised", percent),
    "goodput_rps": ("Goodput", "requests within their SLOs per second", number),
    "requests_per_s": ("Throughput", "finished requests per second", number),
    "output_tokens_per_s": ("Output", "output tokens of finished requests per second", number),
    "num_finished": ("Finished", "requests with their last token", _count),
    "preemptions": ("Preemptions", "how often a request lost its KV cache", _count),
    "kv_utilization": ("KV cache", "mean share of KV blocks in use", percent),
    "mfu": ("MFU", "useful FLOP ÷ (time × GPUs × peak)", percent),
    "mbu": ("MBU", "bytes that had to be read ÷ (time × GPUs × bandwidth)", percent),
    "duration_s": ("Duration", "from the first arrival to the last token", seconds),
}
_CURVES = ("ttft_s", "tpot_s", "e2e_s")
_NOT_COMPARED = ("name",)
_MOST_CHANGES = 100


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's folder says: its summary, its configuration by dotted keys, columns of its requests."""

    label: str
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    requests: Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the comparison; ``change`` is b ÷ a − 1, None where that says nothing."""

    name: str
    meaning: str
    key: str
    a: float
    b: float
    change: float | None
    words: Callable[[float], str]


def compare(first: Path, second: Path, out: str | None, *, plots: bool = True, quiet: bool = False) -> int:
    """Compare two folders of ``convoy run`` or ``convoy live``; returns the exit status, 0.

    Raises:
        InputError: one of them isn't a run's, or the folder to write to is taken.
    """
    runs = read_run(first), read_run(second)
    folder = _folder(out, first, second)
    metrics = list(compared(runs[0].summary, runs[1].summary))
    changes = config_changes(runs[0].config, runs[1].config)
    pairs = paired(*runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.json", json.dumps(_as_json(runs, metrics, changes, pairs), indent=2) + "\n")
    _write_report(runs, metrics, changes, pairs, folder, plots=plots)
    if not quiet:
        print(_sentence(metrics))
        if pairs is not None:
            print(_pairs(pairs))
        print_table(("", "A", "B", "B against A"), [_row(each) for each in metrics], right=("A", "B"))
        print(f"A is {first}, B is {second}. Report: {folder / 'report.html'}")
    return 0


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        InputError: a file is missing or isn't what a run leaves.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        with (folder / "requests.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = ("request_id", "prompt_tokens", "output_tokens", *_CURVES)
        requests = {
            name: np.array([float(row[name]) if row[name] else np.nan for row in rows]) for name in columns
        }
    except OSError as error:
        raise InputError(f"{folder}: holds no run of Convoy ({error.strerror}: {error.filename})") from None
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder}: its files aren't those of a run of Convoy: {error}") from None
    if not isinstance(summary, dict) or "num_requests" not in summary:
        raise InputError(f"{folder}/summary.json: is not a run's")
    return Run(folder.name, summary, dict(_flat(read_yaml_mapping(folder / "config.yaml"))), requests)


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Metric]:
    """All metrics that both summaries have."""
    for key, (name, meaning, words) in _FIGURES.items():
        if key in a and key in b:
            yield _metric(name, meaning, key, a[key], b[key], words)
    for key, (name, meaning) in _LATENCIES.items():
        for statistic in _STATISTICS:
            if key in a and key in b:
                both = a[key][statistic], b[key][statistic]
                yield _metric(f"{name} {statistic}", meaning, f"{key}.{statistic}", *both, seconds)
    for phase in a.get("phases_s", {}):
        if phase in b.get("phases_s", {}):
            both = a["phases_s"][phase], b["phases_s"][phase]
            meaning = "mean time in this phase, finished requests"
            yield _metric(f"in {phase}", meaning, f"phases_s.{phase}", *both, seconds)


def _metric(name: str, meaning: str, key: str, a: float, b: float, words: Callable[[float], str]) -> Metric:
    return Metric(name, meaning, key, a, b, b / a - 1 if a else None, words)


def config_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ; None where one has no such key."""
    keys = [key for key in dict.fromkeys((*a, *b)) if key not in _NOT_COMPARED]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def paired(a: Run, b: Run) -> dict[str, float] | None:
    """Of the same requests in both, the shares whose first token came earlier in each by over 1 %, and the
    median change; None if the workloads differ."""
    same = all(
        np.array_equal(a.requests[key], b.requests[key])
        for key in ("request_id", "prompt_tokens", "output_tokens")
    )
    if not same:
        return None
    first, second = a.requests["ttft_s"], b.requests["ttft_s"]
    both = (first > 0) & (second > 0)
    if not both.any():
        return None
    ratio = second[both] / first[both]
    return {
        "requests": int(both.sum()),
        "earlier_in_a": float((ratio > 1.01).mean()),
        "earlier_in_b": float((ratio < 1 / 1.01).mean()),
        "median_change": float(np.median(ratio)) - 1.0,
    }


# -- what is told -----------------------------------------------------------------------------------------


def _sentence(metrics: Sequence[Metric]) -> str:
    by_key = {each.key: each for each in metrics}
    parts = []
    if (met := by_key.get("slo_attainment")) is not None:
        parts.append(f"SLOs met by {percent(met.a)} in A and {percent(met.b)} in B")
    for key in ("ttft_s.p50", "ttft_s.p99", "tpot_s.p99"):
        if (each := by_key.get(key)) is not None and each.change is not None:
            parts.append(f"{each.name} {_change(each.change)}")
    return "; ".join(parts) + " from A to B." if parts else "The runs have no metric in common."


def _pairs(pairs: Mapping[str, float]) -> str:
    return (
        f"The same {int(pairs['requests']):,} requests: first token earlier in A for "
        f"{percent(pairs['earlier_in_a'])}, in B for {percent(pairs['earlier_in_b'])}; the median changes by "
        f"{_change(pairs['median_change'])}."
    )


def _change(change: float) -> str:
    """``+12.3 %``, or ``× 4.56`` from a doubling on."""
    if change >= 1:
        return f"× {number(1 + change)}"
    if change <= -0.5 and change > -1:
        return f"÷ {number(1 / (1 + change))}"
    return f"{100 * change:+.1f} %".replace("-", "−")


def _row(metric: Metric) -> list[str]:
    change = "" if metric.change is None else _change(metric.change)
    return [metric.name, metric.words(metric.a), metric.words(metric.b), change]


def _as_json(
    runs: tuple[Run, Run],
    metrics: Sequence[Metric],
    changes: Mapping[str, tuple[Any, Any]],
    pairs: Mapping[str, float] | None,
) -> dict[str, Any]:
    return {
        "a": runs[0].label,
        "b": runs[1].label,
        "metrics": {
            each.key: {"a": each.a, "b": each.b, "change": each.change, "meaning": each.meaning}
            for each in metrics
        },
        "configuration": {key: {"a": a, "b": b} for key, (a, b) in changes.items()},
        "same_requests": pairs,
    }


def _write_report(
    runs: tuple[Run, Run],
    metrics: Sequence[Metric],
    changes: Mapping[str, tuple[Any, Any]],
    pairs: Mapping[str, float] | None,
    folder: Path,
    *,
    plots: bool,
) -> None:
    names = [f"A: {runs[0].label}", f"B: {runs[1].label}"]
    configuration = [[key, _text(a), _text(b)] for key, (a, b) in list(changes.items())[:_MOST_CHANGES]]
    page = render_page(
        "table.html.j2",
        _plots(runs, names) if plots else [],
        name=f"{runs[0].label} against {runs[1].label}",
        kind="none",
        sentence=_sentence(metrics),
        lines=[_pairs(pairs)] if pairs is not None else [],
        notes=[] if pairs is not None else ["The two runs served different requests."],
        tables=[
            ("What was changed", "", ["key", *names], configuration),
            (
                "Metrics",
                "Latencies are over the requests that got so far; shares are over all.",
                ["", "A", "B", "B against A", "what it is"],
                [[*_row(each), each.meaning] for each in metrics],
            ),
        ],
        links=[("compare.json", "compare.json")],
        config_yaml="",
        version=version(),
    )
    write_text(folder / "report.html", page)


def _plots(runs: tuple[Run, Run], names: Sequence[str]) -> list[tuple[str, bytes]]:
    from experiments.plots import draw_cdf
    from experiments.series import cdf

    images = []
    for key in _CURVES:
        title = {"ttft_s": "Time to first token", "tpot_s": "Time per output token", "e2e_s": "Whole answer"}[
            key
        ]
        curves = [cdf(name, run.requests[key]) for name, run in zip(names, runs, strict=True)]
        present = [curve for curve in curves if curve is not None]
        if present:
            images.append((title, draw_cdf(title, present, title.lower())))
    return images


def _folder(out: str | None, first: Path, second: Path) -> Path:
    folder = Path(out) if out is not None else Path("out") / f"{first.name}-against-{second.name}"
    taken = folder.is_dir() and any(folder.iterdir()) and not (folder / "compare.json").is_file()
    if taken or (folder.exists() and not folder.is_dir()):
        raise InputError(f"--out {folder}: is there and holds no comparison of Convoy; choose another")
    return folder


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
