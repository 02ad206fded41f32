"""The command line: predict, list, traces, help, and the examples."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import main
from policies.priorities import PRIORITIES
from policies.routers import ROUTERS

ROOT = Path(__file__).resolve().parent.parent

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
