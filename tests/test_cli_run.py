"""`convoy run`: results that are complete or not there, and other ways to end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from tests.small_run import RUN, run_with, write
from traces.records import REQUEST_COLUMNS

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_leaves_what_the_design_promises(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", write(folder, RUN), "--out", "result", "--batches"]) == 0
    result = folder / "result"
    assert {path.name for path in result.iterdir()} == {
        *(
            "config.yaml",
            "summary.json",
            "requests.csv",
            "batches.csv",
            "timeline.json",
            "report.html",
            "plots",
        )
    }
    assert "Report: result/report.html" in capsys.readouterr().out

    with (result / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == REQUEST_COLUMNS
    assert len(rows) == 60
    summary = json.loads((result / "summary.json").read_text())
    for latency in ("ttft_s", "tpot_s", "tbt_s", "e2e_s"):
        assert set(summary[latency]) == {"mean", "p50", "p90", "p95", "p99", "max", "count"}
    expected = """num_requests num_finished num_rejected duration_s requests_per_s output_tokens_per_s
        slo_attainment goodput_rps preemptions mfu mbu kv_utilization extrapolated_time_share predictor_source
        wall_s iterations"""
    assert set(expected.split()) <= set(summary)
    assert summary["num_requests"] == summary["num_finished"] == 60
    assert summary["predictor_source"] == "roofline"
    assert 0 < summary["mfu"] < 1
    assert 0 < summary["mbu"] < 1
    assert sum(float(row["tpot_s"] or 0) for row in rows) / summary["tpot_s"]["count"] == pytest.approx(
        summary["tpot_s"]["mean"], rel=1e-6
    )
    # Nothing temporary is left beside it.
    assert {path.name for path in folder.iterdir()} == {"C.yaml", "result"}


def without_wall_time(summary: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(summary.read_text()).items() if key != "wall_s"}


def test_the_resolved_configuration_runs_again_to_the_same_result(folder: Path) -> None:
    config = write(folder, {key: value for key, value in RUN.items() if key != "name"})
    arguments = [
        "--set",
        "scheduler.priority=lars",
        "--set",
        "workload.arrivals={process: gamma, rate_rps: 9, cv: 2}",
    ]
    assert main(["run", config, *arguments, "--out", "first", "--no-plots", "--quiet"]) == 0
    assert main(["run", "first/config.yaml", "--out", "second", "--no-plots", "--quiet"]) == 0
    for name in ("requests.csv", "config.yaml", "timeline.json"):
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes()
    assert without_wall_time(folder / "first/summary.json") == without_wall_time(
        folder / "second/summary.json"
    )


def test_step_by_step_gives_the_same_requests(folder: Path) -> None:
    config = write(folder, RUN)
    for name, extra in (("fast", []), ("slow", ["--step-by-step"])):
        assert main(["run", config, "--out", name, "--no-plots", "--quiet", *extra]) == 0
    fast, slow = ((folder / name / "requests.csv").read_text().splitlines() for name in ("fast", "slow"))
    assert len(fast) == len(slow) == 61
    for a, b in zip(fast[1:], slow[1:], strict=True):
        for x, y in zip(a.split(","), b.split(","), strict=True):
            assert x == y or float(x) == pytest.approx(float(y), abs=2e-9)


def test_runs_without_a_folder_are_numbered(folder: Path) -> None:
    config = write(folder, RUN)
    for _ in range(3):
        assert main(["run", config, "--no-plots", "--quiet"]) == 0
    assert {path.name for path in (folder / "out").iterdir()} == {"small", "small-2", "small-3"}


def test_a_folder_is_replaced_only_by_force_and_only_if_it_is_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", write(folder, RUN), "--no-plots", "--quiet", "--out", "result"]
    (folder / "result").mkdir()
    assert main(run) == 0  # an empty folder is as good as none
    (folder / "result" / "mine.txt").write_text("a note")
    assert main(run) == 2
    assert "holds an earlier run; add --force" in capsys.readouterr().err
    assert (folder / "result" / "mine.txt").exists()
    assert main([*run, "--force"]) == 0
    assert not (folder / "result" / "mine.txt").exists()

    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.tex").write_text("important")
    run[-1] = "precious"
    assert main([*run, "--force"]) == 2
    assert "holds no run of Convoy" in capsys.readouterr().err
    assert (folder / "precious" / "thesis.tex").read_text() == "important"


def test_a_failure_while_writing_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.run.write_requests_csv", full)
    assert main(["run", write(folder, RUN), "--no-plots", "--out", "result"]) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["C.yaml"]


# -- other ways to end ------------------------------------------------------------------------------------


def test_requests_that_can_t_fit_are_rejected_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.csv").write_text("prompt_tokens,output_tokens\n100,10\n9000000,10\n200,10\n")
    data = run_with(workload__lengths={"trace": "t.csv"}, workload__num_requests=3)
    assert main(["run", write(folder, data), "--no-plots", "--out", "result"]) == 0
    assert "1 of the workload's 3 requests need more than" in capsys.readouterr().out
    summary = json.loads((folder / "result/summary.json").read_text())
    assert (summary["num_finished"], summary["num_rejected"]) == (2, 1)
    rejected = (folder / "result/requests.csv").read_text().splitlines()[2].split(",")
    assert rejected[5:10] == ["", "rejected", "", "", ""]


def test_what_a_trace_left_out_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "0,ChatGPT,100,20,120,Conversation log\n1,ChatGPT,100,0,100,Conversation log\n"
    (folder / "burst.csv").write_text(header + rows)
    data = run_with(
        workload__lengths={"trace": "burst.csv"},
        workload__arrivals={"process": "trace"},
        workload__num_requests=None,
    )
    assert main(["run", write(folder, data), "--no-plots", "--out", "result"]) == 0
    assert "1 requests with 0 response tokens failed and are left out" in capsys.readouterr().out


def test_the_clock_can_be_stopped(folder: Path) -> None:
    data = run_with(stop_s=2.0)
    assert main(["run", write(folder, data), "--no-plots", "--quiet", "--out", "result"]) == 0
    summary = json.loads((folder / "result/summary.json").read_text())
    assert summary["duration_s"] == 2.0
    assert summary["num_finished"] < 60


def test_a_closed_loop_keeps_its_concurrency(folder: Path) -> None:
    data = run_with(workload__arrivals={"process": "closed_loop", "concurrency": 3})
    assert main(["run", write(folder, data), "--no-plots", "--quiet", "--out", "result", "--batches"]) == 0
    with (folder / "result/requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    events = sorted([(float(r["arrival_s"]), 1) for r in rows] + [(float(r["finished_s"]), -1) for r in rows])
    present, most = 0, 0
    for _, change in events:
        present += change
        most = max(most, present)
    assert len(rows) == 60
    assert most == 3


def test_users_bring_their_own_priority(folder: Path) -> None:
    (folder / "shortest.py").write_text(
        "from policies.priorities import Priority\n"
        "class ShortestPrompt(Priority):\n"
        "    static = True\n"
        "    def key(self, request, now_s):\n"
        "        return request.prompt_tokens\n"
    )
    data = run_with(scheduler__priority="shortest:ShortestPrompt")
    assert main(["run", write(folder, data), "--no-plots", "--quiet", "--out", "result"]) == 0


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class P(Priority:", "SyntaxError"),
        ("raise SystemExit(7)", "SystemExit: 7"),
        ("class P(Priority): pass", "fails on a request: NotImplementedError"),
        ("class P(Priority):\n def key(self, request): return 1.0", "fails on a request: TypeError"),
        ("class P(Priority):\n def key(self, request, now_s): return 1 / 0", "ZeroDivisionError"),
        ("class P(Priority):\n def key(self, request, now_s): return float('nan')", "gives nan"),
        ("class P(Priority):\n def key(self, request, now_s): return 'x'", "gives 'x'"),
        ("class P: pass", "not a subclass"),
    ],
)
def test_a_broken_priority_of_the_users_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], source: str, expected: str
) -> None:
    module = f"broken_{abs(hash(source))}"  # modules are imported once
    (folder / f"{module}.py").write_text(f"from policies.priorities import Priority\n{source}\n")
    data = run_with(scheduler__priority=f"{module}:P")
    assert main(["run", write(folder, data), "--out", "result"]) == 2
    error = capsys.readouterr().err
    assert "scheduler.priority: " in error and expected in error and error.count("\n") == 1
    assert not (folder / "result").exists()


def test_a_folder_that_cant_be_made_is_refused_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, RUN)
    for out in ("/proc/convoy", "x" * 300):
        assert main(["run", path, "--out", out]) == 2
        assert capsys.readouterr().err.startswith("convoy: --out ")


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def test_ctrl_c_keeps_what_has_finished(folder: Path) -> None:
    data = run_with(workload__num_requests=2_000_000, workload__arrivals__rate_rps=8)
    command = [sys.executable, "-m", "experiments.cli", "run", write(folder, data), "--out", "result"]
    # The interpreter says when the simulation has begun: a signal before it would rightly leave nothing.
    started = folder.parent / "started"
    site = folder.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import simpy, pathlib\n"
        "run = simpy.Environment.run\n"
        "def marked(self, until=None):\n"
        f"    pathlib.Path({str(started)!r}).touch()\n"
        "    return run(self, until)\n"
        "simpy.Environment.run = marked\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        wait_for(started.exists, 60)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Interrupted after" in out
    summary = json.loads((folder / "result/summary.json").read_text())
    assert summary["interrupted"] is True
    assert 0 < summary["num_finished"] < 2_000_000
    assert "Interrupted after" in (folder / "result/report.html").read_text()
    assert {path.name for path in folder.iterdir()} == {"C.yaml", "result"}
