"""How far predictions may be off, carried from held-out residuals to iterations and to latencies."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from experiments.intervals import REPLAYS, perturbations
from experiments.predict import prediction, total_interval
from profiler.iteration import OperatorRow


def row(kernel: str, time_s: float, low_s: float | None, high_s: float | None) -> OperatorRow:
    return OperatorRow("x", time_s, 0.0, "measured", False, low_s, high_s, kernel)


def test_rows_of_a_kernel_are_wrong_together_and_kernels_independently() -> None:
    rows = [row("gemm", 10, 7, 14), row("gemm", 5, 4, 7), row("norm", 20, 17, 28), row("", 100, None, None)]
    found = total_interval(rows)
    assert found["low_s"] == pytest.approx(135 - math.hypot(3 + 1, 3))
    assert found["high_s"] == pytest.approx(135 + math.hypot(4 + 2, 8))
    assert total_interval([row("", 1, None, None)]) == {}


def test_nothing_is_said_where_nothing_is_known() -> None:
    entries = prediction([row("", 1.0, None, None), row("gemm", 2.0, 1.5, 3.0)])["operators"]
    assert set(entries[0]) == {"name", "time_s", "floor_s", "source", "extrapolated"}
    assert set(entries[1]) == {*entries[0], "low_s", "high_s", "kernel"}


def test_factors_run_through_the_whole_distribution_of_each_operator() -> None:
    replays = perturbations({"gemm": (-0.1, 0.2), "norm": (-0.01, 0.01)}, seed=3)
    assert len(replays) == REPLAYS
    gemm = np.log([factors["gemm"] for factors in replays])
    assert np.mean(gemm) == pytest.approx(0.05)  # the middle of the interval: predictors may be biased
    inside = np.sum((gemm > -0.1) & (gemm < 0.2))
    assert inside == REPLAYS and len({*gemm.round(9)}) == REPLAYS and np.ptp(gemm) > 0.8 * 0.3
    norm = np.log([factors["norm"] for factors in replays])
    assert abs(np.corrcoef(gemm, norm)[0, 1]) < 0.9
    assert replays == perturbations({"norm": (-0.01, 0.01), "gemm": (-0.1, 0.2)}, seed=3)
    assert replays != perturbations({"gemm": (-0.1, 0.2), "norm": (-0.01, 0.01)}, seed=4)


CONFIG = """
name: small
model: llama-3.1-8b
device: DEVICE
workload:
  lengths: {distribution: fixed, prompt_tokens: 2000, output_tokens: 50}
  arrivals: {process: poisson, rate_rps: 4}
  num_requests: 100
"""


def run(tmp_path: Path, device: str, *options: str) -> int:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.replace("DEVICE", device))
    return main(["run", str(config), "--out", str(tmp_path / "out"), "--force", "--no-plots", *options])


def test_a_run_with_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "h100-sxm") == 0
    plain = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "intervals" not in plain
    assert "No host overhead is modelled" in capsys.readouterr().out
    assert "No host overhead is modelled" in (tmp_path / "out" / "report.html").read_text()
    assert run(tmp_path, "h100-sxm", "--intervals") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    intervals = summary.pop("intervals")
    assert summary["ttft_s"] == plain["ttft_s"]  # the run itself is the same
    assert intervals["replays"] == REPLAYS
    for name in ("ttft_s", "tpot_s"):
        for statistic in ("mean", "p50", "p90", "p99"):
            low, high = intervals[name][statistic]
            assert low < summary[name][statistic] < high < 2 * low
    assert "With kernel times off as they were on held-out measurements" in capsys.readouterr().out


def test_intervals_are_around_a_prediction_with_the_users_factors(tmp_path: Path) -> None:
    assert run(tmp_path, "h100-sxm", "--intervals") == 0
    plain = json.loads((tmp_path / "out" / "summary.json").read_text())["intervals"]
    assert run(tmp_path, "h100-sxm", "--intervals", "--set", "predictor.factors={gemm: 2, roofline: 3}") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in ("ttft_s", "tpot_s"):
        for statistic in ("mean", "p50", "p90", "p99"):
            low, high = summary["intervals"][name][statistic]
            assert low < summary[name][statistic] < high < 2 * low
            assert plain[name][statistic][1] < low  # matrices and what has no table are most of the time


def test_intervals_need_measured_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "h100-sxm", "--intervals", "--set", "predictor.source=roofline") == 2
    assert "there are no measured errors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_host_time_that_is_given_is_not_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "h100-sxm", "--set", "predictor.host={base_s: 0.0}") == 0
    assert "No host overhead" not in capsys.readouterr().out


def test_predict_prints_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", "--model", "llama-3-8b", "--device", "h100-sxm", "--chunk", "512"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["low_s"] < found["total_s"] < found["high_s"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "90 % within" in out and "No host overhead is modelled" in out


def test_predict_with_the_measured_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", "--model", "tiny-llama", "--device", "cpu", "--decodes", "4", "--context", "100"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {entry["name"]: entry for entry in found["operators"]}
    assert rows["host overhead"]["source"] == "measured" and rows["host overhead"]["time_s"] > 1e-5
    assert {"between operators", "kv write", "rope angles"} <= set(rows)
    assert main([*arguments, "--weight-dtype", "bf16"]) == 0
    assert "A measured profile was not used: tiny-llama-fp32 was measured in fp32" in capsys.readouterr().out
