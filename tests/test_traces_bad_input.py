"""Bad traces and bad workload descriptions: one clear line that names the file and row, or the key."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs import InputError
from traces import build_workload, read_trace

CONVOY = "arrival_s,prompt_tokens,output_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
HUGE_CSV = gzip.compress((CONVOY + "".join(f"{row},1,1\n" for row in range(300_000))).encode())


def mooncake(**changes: Any) -> str:
    import json

    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1], **changes}
    return json.dumps({key: value for key, value in row.items() if value != "absent"}) + "\n"


# content, parts of the message
BAD_FILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty file": ("", ("is empty",)),
    "only blank lines": ("\n\n \n", ("is empty",)),
    "empty gzip": (gzip.compress(b""), ("is empty",)),
    "header but no rows": (CONVOY, ("holds no requests", "no rows")),
    "wrong columns": ("a,b,c\n1,2,3\n", ("'a, b, c' are of no known trace format", "azure: TIMESTAMP")),
    "one column missing": ("TIMESTAMP,ContextTokens\nx,1\n", ("of no known trace format",)),
    "a column twice": (
        "arrival_s,prompt_tokens,prompt_tokens,output_tokens\n0,1,2,3\n",
        ("more than one column 'prompt_tokens'",),
    ),
    "a cell too few": (CONVOY + "0,1,1\n1,2\n", ("row at line 3", "has 2 cells, but the header has 3")),
    "a cell too many": (CONVOY + "0,1,1,9\n", ("row at line 2", "has 4 cells")),
    "cells that even out": (CONVOY + "0,1,1,1\n1,1\n", ("row at line 2", "has 4 cells")),
    "text for a length": (CONVOY + "0,1,1\n1,many,1\n", ("row at line 3", "prompt_tokens", "'many'")),
    "an empty cell": (CONVOY + "0,,1\n", ("row at line 2", "prompt_tokens must be a number, not ''")),
    "negative length": (CONVOY + "0,5,-1\n", ("row at line 2", "output_tokens", "not -1")),
    "zero prompt": (CONVOY + "0,0,5\n", ("row at line 2", "prompt_tokens", "from 1 to", "not 0")),
    "zero output": (CONVOY + "0,5,0\n", ("row at line 2", "output_tokens", "not 0")),
    "half a token": (CONVOY + "0,5.5,1\n", ("row at line 2", "whole number", "not 5.5")),
    "NaN length": (CONVOY + "0,nan,1\n", ("row at line 2", "prompt_tokens", "not nan")),
    "infinite length": (CONVOY + "0,inf,1\n", ("row at line 2", "not inf")),
    "over int32": (CONVOY + "0,2147483648,1\n", ("row at line 2", "1 to 2147483647, not 2147483648")),
    "astronomic": (CONVOY + "0,1" + "0" * 400 + ",1\n", ("row at line 2", "not inf")),
    "NaN time": (CONVOY + "0,1,1\nnan,1,1\n", ("row at line 3", "arrival_s", "finite")),
    "infinite time": (CONVOY + "0,1,1\ninf,1,1\n", ("row at line 3", "arrival_s", "finite")),
    "negative time": (CONVOY + "-1,1,1\n", ("row at line 2", "arrival_s", "not negative")),
    "unsorted times": (CONVOY + "0,1,1\n5,1,1\n3,1,1\n", ("row at line 4", "2 s before", "sort the file")),
    "unsorted dates": (
        AZURE + "2023-11-16 18:17:04.0,1,1\n2023-11-16 18:17:03.5,1,1\n",
        ("row at line 3", "TIMESTAMP", "0.5 s before"),
    ),
    "not a date": (
        AZURE + "2023-11-16 18:17:04.0,1,1\nyesterday,1,1\n",
        ("row at line 3", "date", "'yesterday'"),
    ),
    "no such day": (AZURE + "2023-02-30 00:00:00,1,1\n", ("row at line 2", "'2023-02-30 00:00:00'")),
    "a year alone": (AZURE + "2023,1,1\n", ("row at line 2", "date")),
    "a year out of range": (AZURE + "9999-01-01 00:00:00,1,1\n", ("row at line 2", "date")),
    "every request failed": (BURST + "5,ChatGPT,4,0,4,API log\n", ("every request in it failed",)),
    "open quote": (CONVOY + '0,"1,1\n1,1,1\n', ("row at line 2", "not CSV")),
    "a cell over two lines": (CONVOY + '0,"1\n",1\n', ("row at line 2",)),
    "empty class": (
        "prompt_tokens,output_tokens,slo_class\n1,1,a\n1,1,\n",
        ("row at line 3", "slo_class is empty"),
    ),
    "too many classes": (
        "prompt_tokens,output_tokens,slo_class\n" + "".join(f"1,1,c{i}\n" for i in range(300)),
        ("row at line 258", "more than 256 different classes"),
    ),
    "overlong line": (CONVOY + "0,1," + "1" * 100_000 + "\n", ("line 2 is longer than",)),
    "overlong line without an end": (b"x" * (20 << 20), ("line 1 is longer than",)),
    "binary": (bytes(range(128, 256)) * 10, ("line 1 is not text",)),
    "binary later on": (CONVOY.encode() + b"0,1,1\n\xff\xfe,1,1\n", ("line 3 is not text", "0xff")),
    "UTF-16": (CONVOY.encode("utf-16"), ("is not text",)),
    "truncated gzip": (HUGE_CSV[: len(HUGE_CSV) // 2], ("gzip ends early", "cut off")),
    "corrupt gzip": (HUGE_CSV[:10] + b"\xff" * 64 + HUGE_CSV[74:], ("corrupt gzip",)),
    # Unpacks to nonsense; the checksum would only tell at the end.
    "corrupt in the middle": (
        HUGE_CSV[: len(HUGE_CSV) // 2] + b"\x00" * 64 + HUGE_CSV[len(HUGE_CSV) // 2 + 64 :],
        (),
    ),
    "gzip with a wrong checksum": (HUGE_CSV[:-8] + b"\x00" * 8, ("corrupt gzip", "CRC")),
    "gzip followed by rubbish": (HUGE_CSV + b"rubbish", ("corrupt gzip",)),
    "not JSON": (mooncake() + '{"timestamp": 1, \n', ("row at line 2", "not valid JSON")),
    "unknown keys": ('{"when": 1}\n', ("line 1 is no object of a known trace format", "mooncake: timestamp")),
    "a list for a row": (mooncake() + "[1, 2]\n", ("row at line 2", "must be an object")),
    "a key missing": (mooncake() + mooncake(input_length="absent"), ("row at line 2", "has no input_length")),
    "text for a number": (
        mooncake() + mooncake(input_length="7"),
        ("row at line 2", "must be a number, not '7'"),
    ),
    "true for a number": (
        mooncake() + mooncake(output_length=True),
        ("row at line 2", "output_length", "True"),
    ),
    "null for a number": (mooncake() + mooncake(timestamp=None), ("row at line 2", "timestamp", "None")),
    "an astronomic number": (mooncake() + mooncake(timestamp=10**400), ("row at line 2", "timestamp")),
    "a number of a million digits": (
        mooncake() + '{"timestamp": ' + "1" * 1_000_000 + "}\n",
        ("row at line 2", "not valid JSON"),
    ),
    "JSON NaN": (mooncake(timestamp=float("nan")), ("row at line 1", "timestamp")),
    "unsorted JSON": (mooncake(timestamp=9) + mooncake(timestamp=4), ("row at line 2", "0.005 s before")),
    "zero length in JSON": (mooncake(output_length=0), ("row at line 1", "output_length", "not 0")),
    "ids that are no list": (mooncake(hash_ids=3), ("row at line 1", "hash_ids must be a list")),
    "ids as text": (mooncake(hash_ids=["a"]), ("row at line 1", "hash_ids must be a list")),
    "ids as a mapping": (mooncake(hash_ids={}), ("row at line 1", "hash_ids must be a list")),
    "fractional ids": (mooncake(hash_ids=[0.5]), ("row at line 1", "hash_ids must be a list")),
    "negative ids": (mooncake(hash_ids=[-1]), ("row at line 1", "hash_ids must not be negative")),
    "ids over int32": (mooncake(hash_ids=[2**31]), ("row at line 1", "at most 2147483647")),
    "more ids than blocks": (
        mooncake(hash_ids=[0, 1, 2]),
        ("row at line 1", "3 hash_ids", "2 blocks of 512"),
    ),
    "ids in some rows only": (mooncake() + mooncake(hash_ids="absent"), ("row at line 2", "hash_ids")),
    "ids from the second row on": (mooncake(hash_ids="absent") + mooncake(), ("row at line 2", "have none")),
    "deeply nested JSON": (mooncake() + "[" * 200_000 + "\n", ("row at line 2", "not valid JSON")),
    "no conversation": ("[]", ("holds no conversation",)),
    "array cut off": ('[{"prompt_len": 1, "output_len": 1}', ("not valid JSON after conversation 1",)),
    "no comma": ('[{"prompt_len": 1, "output_len": 1} {}]', ("not valid JSON after conversation 1",)),
    "conversation of the wrong type": (
        '[{"prompt_len": 1, "output_len": 1}, 3]',
        ("conversation 2: must be an",),
    ),
    "zero count": ('[{"prompt_len": 0, "output_len": 1}]', ("conversation 1: prompt_len", "not 0")),
    "huge count": ('[{"prompt_len": 1, "output_len": 1e99}]', ("conversation 1: output_len",)),
    "no turns": ('[{"id": 1}]', ("conversation 1: has no list of turns",)),
    "turns without text": ('[{"conversations": [{"from": "x"}]}]', ("conversation 1: every turn",)),
}


def one_line(error: InputError) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 700
    return text


@pytest.mark.parametrize("content, parts", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, content: str | bytes, parts: tuple[str, ...]
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_trace(path)
    text = one_line(caught.value)
    assert text.startswith(str(path))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: folder / "nothing.csv", "cannot be read (No such file"),
        (lambda folder: folder, "cannot be read (Is a directory"),
        (lambda folder: folder / ("x" * 300), "cannot be read (File name too long"),
    ],
)
def test_files_that_cannot_be_opened(tmp_path: Path, prepare: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_trace(prepare(tmp_path))
    assert message in one_line(caught.value)


def test_a_name_that_promises_gzip(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_text(CONVOY + "0,1,1\n")
    with pytest.raises(InputError, match=r"is named \.gz but is not gzip"):
        read_trace(path)


def test_a_bad_row_far_down_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [f"{row},1,1\n" for row in range(400_000)]  # several blocks
    rows[345_678] = "345678,1,-7\n"
    path.write_text(CONVOY + "".join(rows))
    with pytest.raises(InputError, match=r"row at line 345680: output_tokens"):
        read_trace(path)


def test_an_unsorted_row_at_the_seam_of_two_blocks_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traces._files._BLOCK_BYTES", len(CONVOY) + len("5,1,1\n"))
    path = tmp_path / "t.csv"
    path.write_text(CONVOY + "5,1,1\n4,1,1\n")
    with pytest.raises(InputError, match="row at line 3: arrival_s is 1 s before"):
        read_trace(path)


def test_a_gzip_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traces._files._MAX_TOTAL_BYTES", 10 << 20)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(CONVOY.encode() + b"\n" * (20 << 20)))
    with pytest.raises(InputError, match="holds more than"):
        read_trace(path)


def test_formats_that_are_unknown_or_not_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(CONVOY + "0,1,1\n")
    with pytest.raises(InputError, match="did you mean 'mooncake'"):
        read_trace(path, "moon-cake")
    with pytest.raises(InputError, match="has no column 'TIMESTAMP'"):
        read_trace(path, "azure")
    with pytest.raises(InputError, match="row at line 1: not valid JSON"):
        read_trace(path, "mooncake")
    with pytest.raises(InputError, match="must be a JSON array"):
        read_trace(path, "sharegpt")


@given(
    content=st.binary(max_size=400),
    prefix=st.sampled_from([b"", CONVOY.encode(), AZURE.encode(), b"{", b"["]),
)
def test_whatever_the_bytes_it_is_a_workload_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, prefix: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "trace"
    path.write_bytes(prefix + content)
    try:
        workload = read_trace(path)
    except InputError as error:
        one_line(error)
    else:
        assert len(workload) > 0


FIXED = {"distribution": "fixed", "prompt_tokens": 10, "output_tokens": 5}
POISSON = {"process": "poisson", "rate_rps": 2.0}
LOOP = {"process": "closed_loop", "concurrency": 2}


def lengths(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**FIXED, **changes}.items() if value != "absent"}


def mixture(*components: Any) -> dict[str, Any]:
    return {"distribution": "mixture", "components": list(components)}


LOGNORMAL = {"median": 100, "sigma": 1.0}

# lengths, arrivals, num_requests, duration_s, part of the message
BAD_WORKLOADS: dict[str, tuple[Any, Any, Any, Any, str]] = {
    "no distribution": ({}, POISSON, 5, None, "workload.lengths.distribution: is missing"),
    "lengths of the wrong type": ([1], POISSON, 5, None, "workload.lengths: must be a mapping"),
    "misspelt distribution": (lengths(distribution="fixd"), POISSON, 5, None, "did you mean 'fixed'?"),
    "misspelt key": (lengths(promt_tokens=3), POISSON, 5, None, "did you mean 'prompt_tokens'?"),
    "no output": (
        lengths(output_tokens="absent"),
        POISSON,
        5,
        None,
        "workload.lengths.output_tokens: is missing",
    ),
    "zero": (
        lengths(prompt_tokens=0),
        POISSON,
        5,
        None,
        "workload.lengths.prompt_tokens: must be a whole number",
    ),
    "fraction": (lengths(prompt_tokens=1.5), POISSON, 5, None, "must be a whole number"),
    "NaN": (lengths(prompt_tokens=float("nan")), POISSON, 5, None, "must be a whole number"),
    "over int32": (lengths(prompt_tokens=2**31), POISSON, 5, None, "from 1 to 2147483647"),
    "text": (lengths(prompt_tokens="many"), POISSON, 5, None, "must be a whole number"),
    "uniform the wrong way round": (
        lengths(distribution="uniform", prompt_tokens=[9, 3]),
        POISSON,
        5,
        None,
        "lower bound 9 is above the upper bound 3",
    ),
    "uniform of three": (
        lengths(distribution="uniform", prompt_tokens=[1, 2, 3]),
        POISSON,
        5,
        None,
        "[lo, hi]",
    ),
    "lognormal without sigma": (
        lengths(distribution="lognormal", prompt_tokens={"median": 5}),
        POISSON,
        5,
        None,
        "workload.lengths.prompt_tokens.sigma: is missing",
    ),
    "lognormal of negative sigma": (
        lengths(distribution="lognormal", prompt_tokens={**LOGNORMAL, "sigma": -1}),
        POISSON,
        5,
        None,
        "prompt_tokens.sigma: must be a finite number, not negative",
    ),
    "lognormal outside its bounds": (
        lengths(distribution="lognormal", prompt_tokens={**LOGNORMAL, "min": 10**9}),
        POISSON,
        5,
        None,
        "hardly any value",
    ),
    "lognormal with a misspelt key": (
        lengths(distribution="lognormal", prompt_tokens={**LOGNORMAL, "mas": 5}),
        POISSON,
        5,
        None,
        "unknown key 'mas'; did you mean 'max'?",
    ),
    "zipf too steep": (
        lengths(distribution="zipf", prompt_tokens={"exponent": 1e9, "min": 1, "max": 5}),
        POISSON,
        5,
        None,
        "exponent: must be at most 100",
    ),
    "zipf of no range": (
        lengths(distribution="zipf", prompt_tokens={"exponent": 1.0, "min": 7, "max": 5}),
        POISSON,
        5,
        None,
        "above the upper bound",
    ),
    "empty mixture": (mixture(), POISSON, 5, None, "components: must be a list of at least one"),
    "component without weight": (mixture(FIXED), POISSON, 5, None, "components[0].weight: is missing"),
    "weights of zero": (mixture({**FIXED, "weight": 0}), POISSON, 5, None, "more than 0"),
    "negative weight": (
        mixture({**FIXED, "weight": -1}),
        POISSON,
        5,
        None,
        "weight[0]: must be a finite number",
    ),
    "mixture in a mixture": (
        mixture({**mixture({**FIXED, "weight": 1}), "weight": 1}),
        POISSON,
        5,
        None,
        "can't hold another mixture",
    ),
    "class that is no text": (mixture({**FIXED, "weight": 1, "slo_class": 3}), POISSON, 5, None, "slo_class"),
    "bad component": (
        mixture({**FIXED, "weight": 1}, {**FIXED, "weight": 1, "prompt_tokens": -1}),
        POISSON,
        5,
        None,
        "workload.lengths.components[1].prompt_tokens",
    ),
    "empirical pairs of two sizes": (
        lengths(distribution="empirical", prompt_tokens=[1, 2], output_tokens=[1]),
        POISSON,
        5,
        None,
        "have 2 and 1 values",
    ),
    "empirical of zero": (
        lengths(distribution="empirical", prompt_tokens=[1, 0], output_tokens=[1, 1]),
        POISSON,
        5,
        None,
        "prompt_tokens[1]: must be a whole number",
    ),
    "trace under another distribution": (
        {"distribution": "uniform", "trace": "x"},
        POISSON,
        5,
        None,
        "goes with distribution empirical",
    ),
    "missing trace": ({"trace": "no.csv"}, POISSON, 5, None, "no.csv: cannot be read"),
    "trace that is no name": ({"trace": 3}, POISSON, 5, None, "workload.lengths.trace: must be text"),
    "no process": (FIXED, {"rate_rps": 1}, 5, None, "workload.arrivals.process: is missing"),
    "misspelt process": (FIXED, {"process": "poison"}, 5, None, "did you mean 'poisson'?"),
    "no rate": (FIXED, {"process": "poisson"}, 5, None, "workload.arrivals.rate_rps: is missing"),
    "rate of zero": (FIXED, {**POISSON, "rate_rps": 0}, 5, None, "must be a finite number, above 0"),
    "negative rate": (FIXED, {**POISSON, "rate_rps": -1.0}, 5, None, "must be a finite number, above 0"),
    "infinite rate": (FIXED, {**POISSON, "rate_rps": float("inf")}, 5, None, "must be a finite number"),
    "cv for poisson": (FIXED, {**POISSON, "cv": 2.0}, 5, None, "unknown key 'cv'"),
    "gamma without cv": (
        FIXED,
        {"process": "gamma", "rate_rps": 1.0},
        5,
        None,
        "workload.arrivals.cv: is missing",
    ),
    "gamma of cv 0": (FIXED, {"process": "gamma", "rate_rps": 1.0, "cv": 0}, 5, None, "arrivals.cv: must be"),
    "no bound": (FIXED, POISSON, None, None, "need num_requests or duration_s"),
    "negative count": (FIXED, POISSON, -3, None, "workload.num_requests: must be a whole number"),
    "negative duration": (
        FIXED,
        POISSON,
        None,
        -1.0,
        "workload.duration_s: must be a finite number, above 0",
    ),
    "too many": (FIXED, {**POISSON, "rate_rps": 1e9}, None, 1e9, "more than 100000000"),
    "too short": (FIXED, {**POISSON, "rate_rps": 1e-9}, None, 1e-9, "no request arrives within"),
    "trace times without a trace": (FIXED, {"process": "trace"}, 5, None, "needs the lengths of a trace"),
    "no concurrency": (
        FIXED,
        {"process": "closed_loop"},
        5,
        None,
        "workload.arrivals.concurrency: is missing",
    ),
    "concurrency of 0": (FIXED, {**LOOP, "concurrency": 0}, 5, None, "concurrency: must be a whole number"),
    "negative think time": (
        FIXED,
        {**LOOP, "think_time_s": -1},
        5,
        None,
        "think_time_s: must be a finite number",
    ),
    "a rate for a closed loop": (FIXED, {**LOOP, "rate_rps": 1}, 5, None, "unknown key 'rate_rps'"),
    "a closed loop without end": (FIXED, LOOP, None, None, "needs num_requests or duration_s"),
}


@pytest.mark.parametrize("case", BAD_WORKLOADS.values(), ids=BAD_WORKLOADS)
def test_bad_workloads_name_the_key(tmp_path: Path, case: tuple[Any, Any, Any, Any, str]) -> None:
    spec, arrivals, num_requests, duration_s, message = case
    with pytest.raises(InputError) as caught:
        build_workload(spec, arrivals, num_requests, duration_s, seed=1, base_dir=tmp_path)
    assert message in one_line(caught.value)


@pytest.mark.parametrize("seed", [-1, 1.5, "x", True])
def test_bad_seeds(tmp_path: Path, seed: Any) -> None:
    with pytest.raises(InputError, match="seed: must be a whole number"):
        build_workload(FIXED, POISSON, 5, None, seed=seed, base_dir=tmp_path)


def test_replaying_what_a_trace_has_not(tmp_path: Path) -> None:
    (tmp_path / "lengths.csv").write_text("prompt_tokens,output_tokens\n1,1\n")
    (tmp_path / "timed.csv").write_text(CONVOY + "0,1,1\n60,1,1\n")
    replay = {"process": "trace"}
    with pytest.raises(InputError, match="holds lengths only, no times"):
        build_workload({"trace": "lengths.csv"}, replay, None, None, seed=1, base_dir=tmp_path)
    with pytest.raises(InputError, match=r"num_requests: 3 is more than the 2 of the trace"):
        build_workload({"trace": "timed.csv"}, replay, 3, None, seed=1, base_dir=tmp_path)
    with pytest.raises(InputError, match=r"time_scale: must be a finite number, above 0"):
        build_workload(
            {"trace": "timed.csv"}, {**replay, "time_scale": 0}, None, None, seed=1, base_dir=tmp_path
        )
