"""What ``convoy validate`` writes: the verdict as JSON and JUnit, the plots, and all that they rest on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from experiments.blame import blame
from experiments.build import Experiment
from experiments.live import summarize_live, write_live
from experiments.live_records import LiveRun
from experiments.load import dump_yaml
from experiments.run import summarize_run
from experiments.rungs import DECIDING, Ladder
from experiments.series import Cdf, cdf, gap_cdf
from sim.paced import BOUNDS, Pace
from traces.metrics import slo_met
from traces.records import RunRecords, write_requests_csv

_WHAT = {
    "ttft": ("Time to first token", "time to first token"),
    "tpot": ("Time per output token", "time per output token"),
    "tbt": ("Time between tokens", "time between two tokens"),
    "e2e": ("End to end", "arrival to last token"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case.

    Attributes:
        runs: live runs that were finished.
        cut_short: the live run that Ctrl-C ended, if one was under way.
        simulated: the simulation; None if there is no live run to compare it with.
        ladder: the comparison; None likewise.
        failure: why the live runtime gave up, in one line.
        replayed: whether the live runs were read from disk.
    """

    name: str
    experiment: Experiment
    runs: Sequence[LiveRun]
    cut_short: LiveRun | None
    simulated: RunRecords | None
    ladder: Ladder | None
    failure: str | None
    interrupted: bool
    replayed: bool

    @property
    def passes(self) -> bool:
        """Within tolerance, and with as many live runs as were asked for."""
        return not self.interrupted and self.ladder is not None and self.ladder.passes

    def without_simulations(self) -> Outcome:
        """The same for a table of many cases, when its own files are written."""
        ladder = None if self.ladder is None else replace(self.ladder, calibrated=(), at_pace=())
        return replace(self, simulated=None, ladder=ladder)


def write_case(folder: Path, outcome: Outcome, *, plots: bool) -> None:
    """Write config.yaml, summary.json, junit.xml, plots, the simulation's requests and the live runs.

    Live runs that were replayed are not copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    experiment = outcome.experiment
    (folder / "config.yaml").write_text(dump_yaml(experiment.config), encoding="utf-8")
    _write_json(folder / "summary.json", verdict_data(outcome))
    _write_junit(folder / "junit.xml", [outcome])
    if not outcome.replayed:
        kept = {f"live-{number}": run for number, run in enumerate(outcome.runs, start=1)}
        if outcome.cut_short is not None:
            kept["interrupted"] = outcome.cut_short  # by this name --replay doesn't take it for a whole one
        for name, run in kept.items():
            live = folder / name
            live.mkdir()
            write_live(live, run, experiment, summarize_live(run.records, experiment))
    if outcome.simulated is not None:
        simulated = folder / "simulated"
        simulated.mkdir()
        _write_json(simulated / "summary.json", summarize_run(outcome.simulated, experiment))
        met = slo_met(outcome.simulated, experiment.tpot_targets_s)
        write_requests_csv(outcome.simulated, met, simulated / "requests.csv")
        if plots:
            _write_plots(folder / "plots", outcome)


def write_set(folder: Path, name: str, outcomes: Sequence[Outcome]) -> None:
    """Write summary.json, junit.xml and config.yaml of several cases; each has a folder of its own below."""
    _write_json(
        folder / "summary.json",
        {
            "passes": all(outcome.passes for outcome in outcomes),
            "cases": {outcome.name: verdict_data(outcome) for outcome in outcomes},
        },
    )
    _write_junit(folder / "junit.xml", outcomes)
    names = "".join(f"#   {outcome.name}/config.yaml\n" for outcome in outcomes)
    text = f"# The cases of {name}, each as it was validated:\n{names}"
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def _cdf(label: str, latency: str, records: Sequence[RunRecords]) -> Cdf | None:
    """Of several runs together."""
    if latency == "tbt":
        return gap_cdf(label, np.concatenate([each.gaps for each in records]))
    return cdf(label, np.concatenate([getattr(each, f"{latency}_s") for each in records]))


def verdict_data(outcome: Outcome) -> dict[str, Any]:
    """The verdict on one case as plain data; an error without bound is null."""
    data: dict[str, Any] = {
        "passes": outcome.passes,
        "live_runs": len(outcome.runs),
        "waited_share": [run.waited_share for run in outcome.runs],
    }
    if outcome.interrupted:
        data["interrupted"] = True
    if outcome.failure is not None:
        data["failure"] = outcome.failure
    ladder = outcome.ladder
    if ladder is not None:
        blamed = blame(ladder)
        data |= {
            "blamed_rung": None if blamed is None else blamed.rung,
            "blamed_because": None if blamed is None else blamed.why,
            "rungs": [asdict(rung) for rung in ladder.rungs],
            "speed": ladder.speed,
            "paces": [pace_data(pace) for pace in ladder.paces],
            "requests": [asdict(each) | {"passes": each.passes} for each in ladder.comparisons],
            "iterations": asdict(ladder.iterations),
            "slow_shares": list(ladder.slow_shares),
            "slowdowns": dict(zip(BOUNDS, ladder.slowdowns, strict=True)),
            "batch_errors_calibrated": list(ladder.batch_errors),
            "chance_to_hold": ladder.chance_to_hold,
            "leftover": None if ladder.leftover is None else asdict(ladder.leftover),
            "operators": [asdict(each) for each in ladder.operators],
            "decisions": [asdict(each) for each in ladder.parities],
        }
    finite: dict[str, Any] = _finite(data)
    return finite


def pace_data(pace: Pace) -> dict[str, dict[str, float] | None]:
    """Factors by ``BOUNDS``: of all batches together, and between which eight in ten lie; None for a bound of
    so few batches that it shares those of all."""
    data: dict[str, dict[str, float] | None] = {}
    for bound, name in enumerate(BOUNDS):
        factors = pace.of(bound)
        if factors.is_shared:
            data[name] = None
            continue
        p10, p90 = np.quantile(factors.values, [0.1, 0.9]).tolist()
        data[name] = {"mean": factors.mean, "p10": p10, "p90": p90}
    return data


def _finite(value: Any) -> Any:
    """The same data with None for numbers that JSON doesn't have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_junit(path: Path, outcomes: Sequence[Outcome]) -> None:
    """One suite a case, one test a rung. A rung that is unknown, or broken and doesn't decide, is skipped and
    says which; no verdict is an error."""
    root = ElementTree.Element("testsuites", name="convoy validate")
    for outcome in outcomes:
        suite = ElementTree.SubElement(root, "testsuite", name=outcome.name)
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        for name, kind, text in _tests(outcome):
            test = ElementTree.SubElement(suite, "testcase", classname=outcome.name, name=name)
            counts["tests"] += 1
            if kind == "":
                ElementTree.SubElement(test, "system-out").text = text
                continue
            counts[{"failure": "failures", "error": "errors", "skipped": "skipped"}[kind]] += 1
            ElementTree.SubElement(test, kind, message=text)
        for key, count in counts.items():
            suite.set(key, str(count))
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _tests(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The rungs as (name, kind of what is wrong or nothing, text)."""
    if outcome.ladder is None:
        kind, text = ("error", outcome.failure) if outcome.failure else ("error", "interrupted")
        return [("live runs", kind, text)]
    tests = []
    for rung in outcome.ladder.rungs:
        decides = rung.name in DECIDING
        kind, text = "", rung.text
        if rung.status == "broken":
            kind = "failure" if decides else "skipped"
            text = rung.text if decides else f"broken, but doesn't decide: {rung.text}"
        elif rung.status == "unknown":
            kind, text = "error" if rung.name == "request" else "skipped", f"unknown: {rung.text}"
        tests.append((rung.name, kind, text))
    if outcome.interrupted:
        tests.append(("live runs", "error", "interrupted"))
    return tests


def _write_plots(folder: Path, outcome: Outcome) -> None:
    """A CDF of each latency: the live runs, the simulations of each calibrated on the others, or of a single
    one those at pace, and the simulation as it is."""
    from experiments.plots import draw_cdf

    folder.mkdir()
    sides = [(f"live run {number}", [run.records]) for number, run in enumerate(outcome.runs, start=1)]
    ladder = outcome.ladder
    if ladder is not None:
        word, forecasts = (
            ("calibrated", ladder.calibrated) if ladder.calibrated else ("at pace", ladder.at_pace)
        )
        for number, draws in enumerate(forecasts, start=1):
            sides.append((f"run {number} simulated, {word}", list(draws)))
    if outcome.simulated is not None:
        sides.append(("simulated as it is", [outcome.simulated]))
    for name, (title, what) in _WHAT.items():
        found = [_cdf(label, name, records) for label, records in sides]
        curves = [curve for curve in found if curve is not None]
        if curves:
            (folder / f"{name}_cdf.png").write_bytes(draw_cdf(f"{title}: {outcome.name}", curves, what))
