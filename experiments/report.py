"""report.html: one page with everything in it, which leads with the answer."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.text import number, percent, seconds

_TEMPLATES = Path(__file__).parent / "templates"
LIVE = "live"  # the predictor_source of a run that nothing was predicted for
_HOLDS, _MOSTLY = 0.99, 0.90  # shares of requests from which the SLOs count as held, and as mostly held

_LATENCIES = (
    ("ttft_s", "TTFT", "arrival to first token"),
    ("tpot_s", "TPOT", "mean time per output token after the first"),
    ("tbt_s", "TBT", "every gap between two tokens"),
    ("e2e_s", "E2E", "arrival to last token"),
)
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")


PhaseBar = tuple[str, str, Sequence[float]]
"""Some requests, their mean time in words, and the share of each phase in it."""


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class of requests; ``latencies``: TTFT p50, p90, p99 and TPOT p50, p99, empty without a sample."""

    name: str
    promise: str
    requests: str
    met: str
    latencies: Sequence[str]


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """What the page says besides the summary."""

    name: str
    model: str
    device: str
    gpus: int
    layout: str
    load: str
    classes: Sequence[ClassRow]
    notes: Sequence[str]
    config_yaml: str
    version: str
    phase_names: Sequence[str] = ()
    phases: Sequence[PhaseBar] = ()


def render_report(summary: Mapping[str, Any], facts: ReportFacts, plots: Sequence[tuple[str, bytes]]) -> str:
    """The page; ``plots`` are (title, PNG image) in order."""
    return render_page(
        "report.html.j2",
        plots,
        facts=facts,
        verdict=verdict(summary),
        headlines=_headlines(summary),
        latencies=latency_rows(summary),
        statistics=STATISTICS,
        throughput=_throughput(summary),
        hardware=_hardware(summary),
        origin=_origin(summary),
    )


def render_page(template: str, plots: Sequence[tuple[str, bytes]], **content: Any) -> str:
    """A page of one of the templates; it loads nothing from elsewhere. ``plots`` are (title, PNG image)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    images = [(title, base64.b64encode(image).decode("ascii")) for title, image in plots]
    return environment.get_template(template).render(plots=images, **content)


def verdict(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """(kind, sentence, explanation); the kind is good, fair, bad or none."""
    attainment = summary.get("slo_attainment")
    left = summary["num_requests"] - summary["num_finished"]
    missing = (
        f" {left:,} of {summary['num_requests']:,} requests did not finish; they count as missed."
        if left
        else ""
    )
    if attainment is None:
        return "none", "No request was served", missing.strip()
    share = f"{percent(attainment)} of requests met their SLOs."
    if attainment >= _HOLDS:
        return "good", "Holds its SLOs", share + missing
    if attainment >= _MOSTLY:
        return "fair", "Holds its SLOs for most requests", share + missing
    return "bad", "Misses its SLOs", share + missing


def latency_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, list[str], str]]:
    """(name, meaning, one text a statistic, count) of each latency there are samples of."""
    return [
        (
            name,
            meaning,
            [seconds(summary[key][statistic]) for statistic in STATISTICS],
            f"{summary[key]['count']:,}",
        )
        for key, name, meaning in _LATENCIES
        if key in summary
    ]


def _headlines(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, figure, detail)."""
    result = []
    for key, name, _ in _LATENCIES[:2]:
        if key in summary:
            values = summary[key]
            detail = f"p90 {seconds(values['p90'])}, p99 {seconds(values['p99'])}"
            result.append((f"{name}, median", seconds(values["p50"]), detail))
    if "requests_per_s" in summary:
        detail = f"{number(summary['output_tokens_per_s'])} output tokens/s"
        result.append(("Throughput", f"{number(summary['requests_per_s'])} req/s", detail))
    if "goodput_rps" in summary:
        result.append(("Goodput", f"{number(summary['goodput_rps'])} req/s", "requests within their SLOs"))
    return result


def _throughput(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("requests", f"{summary['num_requests']:,}"),
        ("finished", f"{summary['num_finished']:,}"),
        ("rejected", f"{summary['num_rejected']:,}"),
        ("time served" if _is_live(summary) else "simulated time", seconds(summary["duration_s"])),
        ("preemptions", f"{summary['preemptions']:,}"),
        ("iterations", f"{summary['iterations']:,}"),
    ]


def _hardware(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {
        "mfu": "MFU, of the peak FLOP/s",
        "mbu": "MBU, of the bandwidth",
        "kv_utilization": "KV cache in use",
    }
    return [(label, percent(summary[key])) for key, label in names.items() if key in summary]


def _origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "predictor_source" in summary:
        rows.append(("kernel times", str(summary["predictor_source"]).replace("+", " + ")))
    if "extrapolated_time_share" in summary:
        rows.append(("time extrapolated", percent(summary["extrapolated_time_share"])))
    if not _is_live(summary):
        rows.append(("simulated within", seconds(summary["wall_s"])))
    return rows


def _is_live(summary: Mapping[str, Any]) -> bool:
    return summary.get("predictor_source") == LIVE
