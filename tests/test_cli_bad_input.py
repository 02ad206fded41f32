"""The command line: exit status 2 and one clear line for bad input, and nothing is written."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from tests.small_run import RUN, run_with, write

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
