"""Live runs that were measured once, replayed: what held when they were recorded holds for ever."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from experiments.build import build
from experiments.cases import load_cases
from experiments.cli import main

SETS = Path(__file__).resolve().parent.parent / "experiments" / "validate"
RECORDS = SETS / "records"
# Of this runtime; those of other engines are in tests of their own.
CASES = sorted({path.parents[1].relative_to(RECORDS) for path in RECORDS.glob("*/*/live-1/live.json")})
# Decisions of static chunks, first come, first served, don't depend on predicted times. Those of other
# policies can only be repeated under the predictor that they were made with; else they are "unknown".
WITHOUT_PREDICTIONS = ("fcfs-static",)


def verdict(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recorded_runs_are_still_explained(case: Path, tmp_path: Path) -> None:
    """Every rung that held holds, every latency that was within tolerance is: getting worse is caught."""
    config, name = SETS / f"{case.parent}.yaml", case.name
    options = ["--case", name, "--replay", str(RECORDS / case.parent), "--no-plots", "--quiet"]
    assert main(["validate", str(config), *options, "--out", str(tmp_path / "out")]) in (0, 1)
    then, now = verdict(RECORDS / case), verdict(tmp_path / "out" / name)
    status = {rung["name"]: rung["status"] for rung in now["rungs"]}
    for rung in then["rungs"]:
        if rung["status"] == "holds" and rung["name"] != "decisions":
            assert status[rung["name"]] == "holds", (rung["name"], now["rungs"])
    assert status["decisions"] == "holds" or (
        status["decisions"] == "unknown" and name not in WITHOUT_PREDICTIONS
    )
    for one, other in zip(then["requests"], now["requests"], strict=True):
        assert (one["metric"], one["statistic"]) == (other["metric"], other["statistic"])
        assert other["live_s"] == pytest.approx(one["live_s"], rel=1e-6)
        if one["allowed"] is not None:
            for error in ("error", "error_probed", "error_calibrated", "error_at_pace"):
                assert abs(one[error]) > one["allowed"] or abs(other[error]) <= other["allowed"], (
                    error,
                    other,
                )


@pytest.mark.parametrize(("name", "count"), [("ci", 3), ("preemption", 2), ("full", 36)])
def test_the_sets_mix_lengths_of_a_hundred_to_one(name: str, count: int) -> None:
    """What is really sent in each case, not what might be."""
    cases = load_cases(SETS / f"{name}.yaml", [])
    assert len({case.name for case in cases}) == count
    lengths = {}
    for case in cases:
        section = json.dumps(case.config.workload.model_dump(mode="json"), sort_keys=True)
        if section not in lengths:
            lengths[section] = build(case.config, case.where).workload.prompt_tokens
        assert lengths[section].max() >= 100 * lengths[section].min(), case.name


def test_there_are_records_of_every_case_of_the_small_sets() -> None:
    wanted = {"ci/fcfs-static", "ci/edf-adaptive", "ci/lars-sharing", "preemption/lars", "preemption/fcfs"}
    wanted |= {f"full/lars-sharing.{layout}-60" for layout in ("one", "tp2", "kvp2", "spp2")}
    assert {case.as_posix() for case in CASES} == wanted
    assert all(len(list((RECORDS / case).glob("live-*/live.json"))) == 2 for case in CASES)


def test_records_name_no_place_on_the_machine_that_made_them() -> None:
    texts = [
        path.read_text(encoding="utf-8") for path in RECORDS.rglob("*") if path.suffix in (".yaml", ".json")
    ]
    assert texts and not any(re.search(r"[:\s\"\'\[]/\w+/", text) for text in texts)


def test_short_prompts_passed_the_long_one_live_too() -> None:
    """At least five times sooner in the median, in the simulation and on the live runtime."""
    found = {}
    for policy in ("lars", "fcfs"):
        rows = verdict(RECORDS / "preemption" / policy)["requests"]
        found[policy] = next(r for r in rows if (r["metric"], r["statistic"]) == ("ttft_s", "p50"))
    for side in ("simulated_s", "live_s"):
        assert found["fcfs"][side] >= 5 * found["lars"][side]
