"""The command line: exit codes, one clear line for bad input, results that are complete or not there."""

from __future__ import annotations

import csv
import gzip
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
import yaml

from experiments.cli import main
from experiments.keys import merged
from policies.priorities import PRIORITIES
from policies.routers import ROUTERS
from traces.records import REQUEST_COLUMNS

ROOT = Path(__file__).resolve().parent.parent

RUN: dict[str, Any] = {
    "name": "small",
    "model": "llama-3-8b",
    "device": "h100-sxm",
    "predictor": {"source": "roofline"},
    "workload": {
        "lengths": {
            "distribution": "lognormal",
            "prompt_tokens": {"median": 300, "sigma": 0.5},
            "output_tokens": {"median": 20, "sigma": 0.5},
        },
        "arrivals": {"process": "poisson", "rate_rps": 8},
        "num_requests": 60,
    },
    "slo": {"tpot_s": 0.05},
    "seed": 7,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def write(folder: Path, data: Any) -> str:
    path = folder / "C.yaml"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path.name


def run_with(**changes: Any) -> dict[str, Any]:
    data = RUN
    for path, value in changes.items():
        data = merged(data, path.replace("__", "."), value)
    return data


# -- bad input --------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    # what is wrong: (configuration, what the message must say)
    "unknown priority": (
        run_with(scheduler__priority="larz"),
        "scheduler.priority: 'larz' is not a known priority",
    ),
    "priority suggestion": (run_with(scheduler__priority="larz"), "did you mean 'lars'?"),
    "unknown key": (
        run_with(scheduler__priorty="lars"),
        "scheduler.priorty: unknown key; did you mean 'priority'?",
    ),
    "unknown top key": (run_with(sede=3), "sede: unknown key; did you mean 'seed'?"),
    "unknown chunking": (run_with(scheduler__chunking="adaptiv"), "did you mean 'adaptive'?"),
    "unknown router": (run_with(scheduler__router="random_"), "did you mean 'random'?"),
    "unknown model": (run_with(model="llama-3-8bb"), "llama-3-8b"),
    "unknown device": (run_with(device="h100"), "h100-sxm"),
    "unknown source": (run_with(predictor__source="guess"), "predictor.source: 'guess' is not one of"),
    "no such profile": (run_with(predictor__profile="nowhere"), "predictor.profile: no such file: 'nowhere'"),
    "no measured profile": (run_with(predictor={"source": "measured"}), "predictor.source"),
    "missing model": ({k: v for k, v in RUN.items() if k != "model"}, "model: is missing"),
    "missing workload": ({k: v for k, v in RUN.items() if k != "workload"}, "workload: is missing"),
    "text for a number": (run_with(seed="42"), "seed: must be a whole number, not '42'"),
    "true for a number": (run_with(parallel__tp=True), "parallel.tp: must be a whole number, not true"),
    "fraction for a count": (run_with(parallel__replicas=1.5), "parallel.replicas: must be a whole number"),
    "zero replicas": (run_with(parallel__replicas=0), "parallel.replicas: must be at least 1, not 0"),
    "negative requests": (run_with(workload__num_requests=-3), "workload.num_requests: must be at least 1"),
    "negative rate": (run_with(workload__arrivals__rate_rps=-1), "workload.arrivals.rate_rps"),
    "zero rate": (run_with(workload__arrivals__rate_rps=0), "workload.arrivals.rate_rps"),
    "infinite rate": (run_with(workload__arrivals__rate_rps=float("inf")), "workload.arrivals.rate_rps"),
    "nan target": (run_with(slo__tpot_s=float("nan")), "slo.tpot_s: must be"),
    "impossible ttft": (run_with(slo__ttft=0), "slo.ttft: a time to first token of 0 s can't be met"),
    "unknown class": (
        run_with(slo__classes={"vip": {"tpot_s": 1}}),
        "slo.classes.vip: the workload has no such",
    ),
    "unknown process": (
        run_with(workload__arrivals={"process": "poison", "rate_rps": 1}),
        "did you mean 'poisson'?",
    ),
    "unknown distribution": (
        run_with(workload__lengths={"distribution": "norm"}),
        "workload.lengths.distribution",
    ),
    "bad median": (
        run_with(workload__lengths__prompt_tokens={"median": -5, "sigma": 1}),
        "prompt_tokens.median",
    ),
    "no bound": (run_with(workload__num_requests=None), "num_requests or duration_s"),
    "too many requests": (run_with(workload__num_requests=10**9), "workload.num_requests: must be at most"),
    "missing trace": (
        run_with(workload__lengths={"trace": "no.csv"}),
        "workload.lengths.trace: no such file: 'no.csv'",
    ),
    "trace without trace": (run_with(workload__arrivals={"process": "trace"}), "workload.arrivals.process"),
    "tp over kv heads": (run_with(parallel__tp=16), "parallel.tp: 16"),
    "tp doesn't divide": (run_with(parallel__tp=3), "parallel.tp: 3 must divide"),
    "more stages than layers": (run_with(parallel__spp=33), "parallel.spp: 33 stages"),
    "too many groups": (run_with(parallel__kvp=1025), "parallel.kvp: 1025 is more than"),
    "beyond any clock": (
        run_with(workload__arrivals={"process": "poisson", "rate_rps": 1e-300}),
        "workload: arrival_s of request",
    ),
    "kvp": (run_with(parallel__kvp=2, parallel__kvp_tokens_per_group=1000), "is no multiple of"),
    "doesn't fit": (run_with(model="llama-3-70b"), "tp 2, spp 1 would fit"),
    "context over kv": (
        run_with(workload__lengths={"distribution": "fixed", "prompt_tokens": 2_000_000, "output_tokens": 1}),
        "workload.lengths: the KV cache of a replica holds",
    ),
    "chunk over batch": (
        run_with(scheduler__chunk_tokens=99999),
        "chunk_tokens 99999 is more than max_batch_tokens",
    ),
    "no short replica": (
        run_with(scheduler__router="length_partitioned"),
        "scheduler.router: length_partitioned",
    ),
    "policy can't be imported": (
        run_with(scheduler__priority="no.such:Policy"),
        "scheduler.priority: priority",
    ),
    "policy is no policy": (run_with(scheduler__priority="json:JSONDecoder"), "not a subclass"),
    "name is a path": (run_with(name="../elsewhere"), "name: '../elsewhere' can't name a folder"),
    "a sweep": (run_with(sweep={"seed": [1, 2]}), "sweep: is for `convoy sweep`"),
    "sweep of nothing": (run_with(sweep={"seed": []}), "sweep: seed has no values"),
    "sweep of an unknown key": (run_with(sweep={"sed": [1]}), "sweep: 'sed' is not a key"),
    "a list on top": ("- a\n- b\n", "must be a mapping of keys to values, not a list"),
    "empty": ("", "is empty"),
    "a tab": ("name: x\nworkload:\n\tnum_requests: 3\n", "line 3: indented with a tab"),
    "a key twice": ("seed: 1\nmodel: x\nseed: 2\n", "line 3: the key 'seed' is there twice"),
    "broken YAML": ("name: [a, b\nmodel: x\n", "not valid YAML"),
    "not text": (b"name: \xff\xfe", "not a text file"),
    "too large": (b"#" * (1 << 20) + b"\n", "larger than 1 MiB"),
    "a number as key": ("1: 2\n", "the key 1 must be text"),
    "mixture in mixture": (
        run_with(
            workload__lengths={
                "distribution": "mixture",
                "components": [{"weight": 1, "distribution": "mixture", "components": []}],
            }
        ),
        "a mixture can't hold another mixture",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    data, expected = BAD_CONFIGS[case]
    config = write(folder, data)
    before = sorted(folder.rglob("*"))
    assert main(["run", config, "--no-plots"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("convoy: C.yaml: ")
    assert expected in err
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


BAD_TRACES: dict[str, tuple[str, bytes, str]] = {
    "corrupt gzip": ("t.csv.gz", b"\x1f\x8b\x08\x00nonsense", "t.csv.gz"),
    "truncated gzip": (
        "t.csv.gz",
        gzip.compress(b"prompt_tokens,output_tokens\n1,1\n" * 99)[:-12],
        "t.csv.gz",
    ),
    "empty": ("t.csv", b"", "t.csv"),
    "header only": ("t.csv", b"arrival_s,prompt_tokens,output_tokens\n", "t.csv"),
    "wrong columns": ("t.csv", b"a,b,c\n1,2,3\n", "t.csv"),
    "negative length": ("t.csv", b"arrival_s,prompt_tokens,output_tokens\n0,5,5\n1,-5,5\n", "3"),
    "nan time": ("t.csv", b"arrival_s,prompt_tokens,output_tokens\nnan,5,5\n", "2"),
    "unsorted": ("t.csv", b"arrival_s,prompt_tokens,output_tokens\n5,5,5\n1,5,5\n", "3"),
    "not JSON": ("t.jsonl", b'{"timestamp": 1,\n', "t.jsonl"),
}


@pytest.mark.parametrize("case", BAD_TRACES)
def test_bad_traces_name_the_file_and_the_row(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, content, expected = BAD_TRACES[case]
    (folder / name).write_bytes(content)
    data = run_with(workload={"lengths": {"trace": name}, "arrivals": {"process": "trace"}})
    config = write(folder, data)
    assert main(["run", config, "--no-plots"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert name in err
    assert expected in err.replace(str(folder), "")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "required: CONFIG.yaml"),
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["run", "."], "cannot be read: Is a directory"),
        (["run", "C.yaml", "--nosuch"], "unrecognized arguments: --nosuch"),
        (["run", "C.yaml", "--set", "seed"], "--set seed: must look like key.path=value"),
        (["run", "C.yaml", "--out", "C.yaml"], "--out C.yaml: is there and is not a folder"),
        (["run", "C.yaml", "--out", "C.yaml/below"], "C.yaml is not a folder"),
        (["predict", "--model", "llama-3-8b", "--device", "h100-sxm"], "give --chunk, --decodes or both"),
        (["predict", "--model", "llama", "--device", "h100-sxm", "--chunk", "1"], "model"),
        (
            ["predict", "--model", "llama-3-8b", "--device", "h100-sxm", "--chunk", "x"],
            "'x' is not a whole number",
        ),
        (
            ["predict", "--model", "llama-3-8b", "--device", "h100-sxm", "--chunk", "1", "--tp", "0"],
            "from 1 to",
        ),
        (
            ["predict", "--model", "llama-3-8b", "--device", "h100-sxm", "--chunk", "1", "--tp", "5"],
            "parallel.tp",
        ),
        (
            ["predict", "--model", "llama-3-8b", "--device", "h100-sxm", "--chunk", "1", "--kvp", "0"],
            "--kvp",
        ),
        (["train", "nowhere"], "nowhere"),
        (["import", "aiconfigurator", "--device", "cpu", "--out", "p"], "cpu"),
        (["traces", "describe", "nowhere.csv"], "nowhere.csv"),
        (["traces", "describe", "C.yaml"], "C.yaml"),
        (["traces", "describe", "C.yaml", "--format", "xml"], "unknown trace format 'xml'"),
        (["traces", "convert", "nowhere.csv", "--out", "C.yaml"], "is there already"),
        (["list", "planets"], "invalid choice: 'planets'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_command_lines(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    write(folder, RUN)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert expected in err
    assert [path.name for path in folder.iterdir()] == ["C.yaml"]


# -- where results go -------------------------------------------------------------------------------------


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


# -- the other commands -----------------------------------------------------------------------------------

PREDICT = ["predict", "--model", "llama-3-8b", "--device", "h100-sxm", "--source", "roofline"]


def test_predict_prints_the_form_that_was_agreed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, "--chunk", "512", "--decodes", "8", "--context", "1e6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"total_s", "floor_s", "source", "operators"}
    for operator in result["operators"]:
        assert set(operator) == {"name", "time_s", "floor_s", "source", "extrapolated"}
        assert operator["time_s"] >= operator["floor_s"] >= 0
    assert sum(operator["time_s"] for operator in result["operators"]) == pytest.approx(result["total_s"])
    # 8 contexts of 1M tokens are read at least: 131,072 bytes a token at 3.35 TB/s.
    decode = next(operator for operator in result["operators"] if operator["name"] == "decode attention")
    assert decode["floor_s"] >= 8 * 1e6 * 131_072 / 3.35e12 * 0.999


def test_predict_shows_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, "--chunk", "512", "--tp", "2"]) == 0
    out = capsys.readouterr().out
    for word in ("share", "floor", "source", "extrapolated", "roofline", "all-reduce after mlp", "100 %"):
        assert word in out


@pytest.mark.parametrize(
    ("what", "expected"),
    [("models", "llama-3-70b"), ("devices", "h100-sxm"), ("policies", "lars"), ("profiles", "imported")],
)
def test_list(capsys: pytest.CaptureFixture[str], what: str, expected: str) -> None:
    assert main(["list", what]) == 0
    assert expected in capsys.readouterr().out


def test_every_policy_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "policies"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {*PRIORITIES, *ROUTERS} <= listed


def test_traces_are_described_and_converted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "vidur.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n10,5,2\n12,7,4\n")
    assert main(["traces", "describe", "vidur.csv", "--json"]) == 0
    statistics = json.loads(capsys.readouterr().out)
    assert (statistics["rows"], statistics["span_s"], statistics["prompt_tokens_max"]) == (2, 2.0, 7)
    assert main(["traces", "describe", "vidur.csv"]) == 0
    assert "prompt_tokens_mean" in capsys.readouterr().out
    assert main(["traces", "convert", "vidur.csv", "--out", "own.csv.gz"]) == 0
    text = gzip.decompress((folder / "own.csv.gz").read_bytes()).decode()
    assert text == "arrival_s,prompt_tokens,output_tokens\n0.000000000,5,2\n2.000000000,7,4\n"
    assert main(["traces", "describe", "own.csv.gz", "--json"]) == 0
    assert main(["traces", "convert", "vidur.csv", "--out", "own.csv.gz", "--force"]) == 0


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["predict", "--help"], ["--version"]])
def test_help_and_version(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert "convoy" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from experiments.cli import main; main(['--help']); "
        "print([m for m in ('numpy', 'pydantic', 'yaml', 'rich', 'matplotlib', 'simpy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["quickstart", "azure_conv", "mooncake_conversation"])
def test_the_examples_are_valid(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.load import load_config
    from specs.errors import InputError

    monkeypatch.chdir(ROOT)
    try:
        assert load_config(ROOT / "experiments" / f"{name}.yaml").name
    except InputError as error:
        if "no such file" not in str(error):
            raise
        pytest.skip("the trace is not here")
