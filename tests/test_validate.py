"""``convoy validate``: each rung is told from the others, and the exit status says what the table says."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.build import Experiment, build
from experiments.cases import load_cases
from experiments.cli import main
from experiments.live import serve_live
from experiments.live_records import LiveRun
from experiments.load import load_config
from policies.batch import Batch
from policies.scheduler import Scheduler
from sim.cluster import simulate
from specs.errors import InputError
from tests.test_replayed_runs import write
from traces.records import RunRecords

pytest.importorskip("torch")
from runtime.launcher import RankError

ROOT = Path(__file__).resolve().parents[1]
LOOSE = {"p50": 1e6, "p90": 1e6, "most_noise": 1e6}
TIGHT = {"p50": 1e-9, "p90": 1e-9, "noise_factor": 0.0, "most_noise": 1e6}


# -- the command ------------------------------------------------------------------------------------------


def run(path: Path, *arguments: str) -> int:
    return main(["validate", str(path), "--out", str(path.parent / "out"), "--force", *arguments])


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a validation with two live runs that passes whatever the times are."""
    folder = tmp_path_factory.mktemp("validated")
    path = write(folder, {"validate": {"request": LOOSE}})
    assert run(path, "--quiet") == 0
    return folder / "out"


def test_a_validation_leaves_everything_its_verdict_rests_on(validated: Path) -> None:
    data = json.loads((validated / "summary.json").read_text())
    assert data["passes"] and data["live_runs"] == 2
    rungs = {rung["name"]: rung["status"] for rung in data["rungs"]}
    assert list(rungs) == ["operator", "iteration", "decisions", "request"]
    assert rungs["operator"] == "unknown" and rungs["decisions"] == rungs["request"] == "holds"
    assert {(row["metric"], row["statistic"]) for row in data["requests"]} == {
        (metric, statistic)
        for metric in ("ttft_s", "tpot_s", "tbt_s", "e2e_s")
        for statistic in ("mean", "p50", "p90", "p99")
    }
    assert all(row["noise"] is not None for row in data["requests"])
    assert {path.name for path in (validated / "plots").iterdir()} == {
        f"{name}_cdf.png" for name in ("ttft", "tpot", "tbt", "e2e")
    }
    for name in ("live-1", "live-2", "simulated"):
        assert (validated / name / "requests.csv").is_file()
    suite = ElementTree.parse(validated / "junit.xml").getroot()[0]
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("tiny", "4", "0")


def test_stored_runs_give_the_same_verdict_for_ever(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"validate": {"request": LOOSE}})
    assert run(path, "--replay", str(validated)) == 0
    text = capsys.readouterr().out
    assert "simulated against 2 live runs from disk" in text
    first = json.loads((validated / "summary.json").read_text())
    again = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in ("decisions", "iterations", "operators"):
        assert again[name] == first[name]
    for one, other in zip(first["requests"], again["requests"], strict=True):
        assert one["live_s"] == pytest.approx(other["live_s"], rel=2e-4)
        assert one["simulated_s"] == other["simulated_s"]
    assert not (tmp_path / "out" / "live-1").exists()


def test_outside_tolerance_is_exit_1_and_names_the_lowest_rung(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = {"iteration": {"p50": 1e-9, "p90": 1e-9}, "request": TIGHT}
    path = write(tmp_path, {"validate": tight})
    assert run(path, "--replay", str(validated)) == 1
    assert "tiny: outside tolerance (request); the rung to look at is iteration:" in (capsys.readouterr().out)
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    found = {test.get("name"): [child.tag for child in test] for test in suite}
    assert found["request"] == ["failure"] and found["iteration"] == ["skipped"]
    assert found["decisions"] == ["system-out"] and suite.get("failures") == "1"


def test_decisions_under_another_predictor_are_unknown_and_not_blamed(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = {"source": "roofline", "host": {"base_s": 0.0185}}
    path = write(tmp_path, {"predictor": slower, "validate": {"request": LOOSE}})
    assert run(path, "--replay", str(validated)) == 0
    assert "recorded under another cost model than today's" in capsys.readouterr().out


def test_ctrl_c_keeps_the_live_run_that_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    served: list[LiveRun] = []

    def serve(made: Experiment, progress: Any) -> LiveRun:
        if served:
            signal.raise_signal(signal.SIGINT)
        served.append(serve_live(made, progress))
        return served[0]

    monkeypatch.setattr("experiments.validate.serve_live", serve)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    path = write(tmp_path, {"validate": {"request": LOOSE}})
    assert run(path, "--no-plots") == 130
    data = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert data["interrupted"] and not data["passes"] and data["live_runs"] == 1
    assert data["rungs"][2] == {"name": "decisions", "status": "holds", "text": data["rungs"][2]["text"]}
    assert (tmp_path / "out" / "live-1" / "requests.csv").is_file()
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    assert suite.get("errors") == "1"


def test_a_run_that_was_cut_short_is_not_in_the_way_of_a_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[LiveRun] = []

    def serve(made: Experiment, progress: Any) -> LiveRun:
        served.append(serve_live(made, progress))
        records = replace(served[-1].records, interrupted=len(served) > 1)
        return replace(served[-1], records=records)

    monkeypatch.setattr("experiments.validate.serve_live", serve)
    path = write(tmp_path, {"validate": {"request": LOOSE}})
    assert run(path, "--no-plots") == 130
    assert (tmp_path / "out" / "interrupted" / "requests.csv").is_file()
    replayed = ["--replay", str(tmp_path / "out"), "--no-plots", "--out", str(tmp_path / "again")]
    assert main(["validate", str(path), *replayed]) == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["live_runs"] == 1
    assert "a single live run: there is no other to calibrate on" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["summarize_run", "simulate_paced", "replay"])
def test_ctrl_c_while_judging_is_no_verdict(
    validated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """In the middle of a simulation, too, of which the part that was done is not judged."""
    module = {"summarize_run": "experiments.validate", "simulate_paced": "experiments.forecasts"}.get(
        where, "experiments.rungs"
    )
    real = getattr(import_module(module), where)

    def interrupting(*arguments: Any, **options: Any) -> Any:
        if where == "summarize_run":
            signal.raise_signal(signal.SIGINT)
        original = Scheduler.next_batch

        def next_batch(scheduler: Scheduler, now_s: float) -> Batch | None:
            if scheduler.outstanding > 2:
                signal.raise_signal(signal.SIGINT)
            return original(scheduler, now_s)

        with monkeypatch.context() as patched:
            patched.setattr(Scheduler, "next_batch", next_batch)
            return real(*arguments, **options)

    monkeypatch.setattr(f"{module}.{where}", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert run(write(tmp_path), "--replay", str(validated), "--no-plots") == 130
    said = capsys.readouterr().out
    assert "no verdict: interrupted" in said and "--replay of this folder" not in said  # it was a replay
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["interrupted"]


def test_a_rank_that_dies_fails_its_case_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(made: Experiment, progress: Any) -> LiveRun:
        raise RankError("rank 1 died: killed by SIGKILL")

    monkeypatch.setattr("experiments.validate.serve_live", serve)
    path = write(tmp_path)
    assert run(path) == 1
    assert "tiny: no verdict: rank 1 died: killed by SIGKILL\n" in capsys.readouterr().out
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    assert suite[0][0].get("message") == "rank 1 died: killed by SIGKILL"


BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({}, ["--replay", "nowhere"], "--replay nowhere: there is no such folder\n"),
    ({}, ["--replay", str(ROOT)], f"--replay {ROOT}: holds no live run"),
    ({}, ["--case", "x"], "--case x: "),
    ({"parallel": {"replicas": 2}}, [], "the live runtime serves one replica, not 2"),
    ({"validate": {"runs": 0}}, [], "validate.runs: must be at least 1, not 0"),
    ({"validate": {"request": {"p50": -1.0}}}, [], "validate.request.p50: must be"),
    ({"validate": {"cases": [{"a": {"seeed": 1}}]}}, [], "'seeed' is not a key of the configuration"),
    ({"validate": {"cases": [{"a b": {}}]}}, [], "validate.cases"),
    ({"validate": {"cases": [{}]}}, [], "validate.cases.0"),
    ({"validate": {"cases": [{"a": {"name": "b"}}]}}, [], "a case can't change 'name'"),
    ({"sweep": {"seed": [1]}}, [], "sweep: take it out"),
]


@pytest.mark.parametrize(("changes", "arguments", "message"), BAD)
def test_bad_input_is_exit_2_and_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    path = write(tmp_path, changes)
    assert run(path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_replaying_a_set_of_which_some_is_recorded_says_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ROOT / "experiments" / "validate"
    whole = ["validate", str(sets / "full.yaml"), "--replay", str(sets / "records" / "full")]
    assert main([*whole, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "fcfs-static.one-30: there is no such folder; " in error and error.count("\n") == 1
    assert (
        "lars-sharing.kvp2-60, lars-sharing.one-60, lars-sharing.spp2-60, lars-sharing.tp2-60 (--case"
        in error
    )


# -- cases ------------------------------------------------------------------------------------------------

AXES = [
    {"slow": {"workload.arrivals.rate_rps": 5}, "fast": {"workload.arrivals.rate_rps": 50}},
    {
        "fcfs": {"scheduler": {"priority": "fcfs"}},
        "lars": {"scheduler.priority": "lars", "validate.request.p50": 0.2},
    },
]


def test_every_combination_is_a_case_with_a_configuration_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, {"validate": {"cases": AXES}})
    cases = {case.name: case.config for case in load_cases(path, ["seed=9"])}
    assert list(cases) == ["slow.fcfs", "slow.lars", "fast.fcfs", "fast.lars"]
    chosen = cases["fast.lars"]
    assert chosen.name == "tiny.fast.lars" and chosen.seed == 9
    assert chosen.workload.arrivals["rate_rps"] == 50 and chosen.scheduler.chunking == "adaptive"
    assert chosen.validation.request.p50 == 0.2 and chosen.validation.cases == []
    assert cases["slow.fcfs"].scheduler.chunking == "static"  # the whole section was replaced


def test_cases_are_chosen_by_name_or_pattern(tmp_path: Path) -> None:
    path = write(tmp_path, {"validate": {"cases": AXES}})
    assert [case.name for case in load_cases(path, [], ["*.lars"])] == ["slow.lars", "fast.lars"]
    assert [case.name for case in load_cases(path, [], ["fast.fcfs", "slow.*"])] == [
        "slow.fcfs",
        "slow.lars",
        "fast.fcfs",
    ]
    with pytest.raises(InputError, match=r"--case fast.lar: .*did you mean 'fast.lars'"):
        load_cases(path, [], ["fast.lar"])


def test_cases_are_validated_one_by_one_and_the_worst_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = [{"passes": {"validate.request": LOOSE}, "fails": {"validate.request": TIGHT}}]
    path = write(tmp_path, {"validate": {"runs": 1, "cases": axes}})
    assert run(path, "--no-plots") == 1
    said = capsys.readouterr().out
    assert "1 of 2 cases within tolerance; 1 inside what is allowed, those without a verdict included" in said
    suites = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert [(suite.get("name"), suite.get("failures")) for suite in suites] == [
        ("passes", "0"),
        ("fails", "1"),
    ]
    data = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [data["cases"][name]["passes"] for name in ("passes", "fails")] == [True, False]
    # a case's live run is found again by its name, and its configuration stands for itself
    replay_options = ["--replay", str(tmp_path / "out"), "--case", "passes"]
    again = ["validate", str(path), "--out", str(tmp_path / "again"), "--quiet", *replay_options]
    assert main(again) == 0
    assert load_config(tmp_path / "out" / "passes" / "config.yaml").validation.cases == []


# -- the convoy effect, simulated and live ----------------------------------------------------------------

PREEMPTION = Path(__file__).parent.parent / "experiments" / "validate" / "preemption.yaml"


def short_prompts_ttft_s(records: RunRecords) -> float:
    """The median over the short prompts."""
    return float(np.median(records.ttft_s[records.requests["prompt_tokens"] < 1000]))


def test_lars_spares_short_prompts_the_wait_for_a_long_one() -> None:
    ttft_s = {}
    for case in load_cases(PREEMPTION, []):
        made = build(case.config, case.where)
        ttft_s[case.name] = short_prompts_ttft_s(simulate(made.workload, made.setup))
    assert ttft_s["fcfs"] > 5 * ttft_s["lars"]


@pytest.mark.slow
def test_lars_spares_short_prompts_the_wait_for_a_long_one_live() -> None:
    ttft_s = {}
    for case in load_cases(PREEMPTION, []):
        made = build(case.config, case.where)
        ttft_s[case.name] = short_prompts_ttft_s(serve_live(made).records)
    assert ttft_s["fcfs"] > 5 * ttft_s["lars"]


def test_the_set_for_a_gpu_is_ready() -> None:
    """Six cases whose live runs fit into one short session, with prompts of 100 tokens to over 100,000."""
    cases = load_cases(ROOT / "experiments/validate/gpu.yaml", [])
    assert len(cases) == 6
    served_s = 0.0
    for case in cases:
        experiment = build(case.config, case.where)
        assert experiment.device.name == "h100-sxm"
        prompts = experiment.workload.prompt_tokens
        assert prompts.min() <= 130 and prompts.max() >= 100_000
        records = simulate(experiment.workload, experiment.setup)
        assert np.isfinite(records.requests["finished_s"]).all()
        served_s += 2 * records.end_s
    assert served_s < 540.0
