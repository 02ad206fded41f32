"""Capacity: the bisection against curves that are known, its intervals, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.capacity_search import find_capacity, interval
from experiments.cli import main
from experiments.plan_config import CapacityConfig


def curve(limit: float, noise: float = 0.0, steepness: float = 20.0) -> Any:
    """Runs whose attainment falls through 0.99 at ``limit``, with noise that depends on the seed."""

    def measure(load: float, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        at_limit = math.log(0.99 / 0.01)
        values = []
        for seed in seeds:
            random = np.random.default_rng([seed, round(load * 1e6)])
            value = 1 / (1 + math.exp(-(at_limit - steepness * math.log(load / limit))))
            values.append({"a": min(max(value + noise * random.normal(), 0.0), 1.0), "load": load})
        return values

    return measure


def attainment(summary: Mapping[str, Any]) -> float:
    return float(summary["a"])


@given(limit=st.floats(0.01, 60.0), precision=st.floats(0.005, 0.2))
@settings(max_examples=60, deadline=None)
def test_without_noise_the_capacity_is_found_to_its_precision(limit: float, precision: float) -> None:
    given_ = CapacityConfig(precision=precision)
    found = find_capacity(curve(limit), attainment, given_, random=False)
    assert found.load is not None
    assert found.load <= limit <= found.load * (1 + precision) * 1.001
    assert all(len(trial.attainments) == 1 for trial in found.trials)
    assert found.low == found.load and found.edge is not None and found.edge.load == found.high


def test_with_noise_the_limit_lies_between_what_surely_holds_and_what_surely_fails() -> None:
    settings_ = CapacityConfig(min_seeds=3, max_seeds=10, confidence=0.95)
    within = 0
    for limit in np.geomspace(0.3, 9.0, 20):
        found = find_capacity(curve(float(limit), noise=0.004), attainment, settings_, random=True)
        assert found.load is not None and found.low is not None and found.high is not None
        assert 0.85 < found.load / limit < 1.15
        within += found.low <= limit <= found.high
    assert within >= 18


def test_more_seeds_are_run_only_where_it_is_close() -> None:
    settings_ = CapacityConfig(min_seeds=3, max_seeds=8)
    found = find_capacity(curve(2.006, noise=0.001), attainment, settings_, random=True)
    many = [trial.load for trial in found.trials if len(trial.attainments) > 3]
    assert many and all(0.9 < load / 2.006 < 1.1 for load in many)
    assert len(many) < len(found.trials)


def test_a_load_that_always_holds_or_never_does() -> None:
    most = find_capacity(curve(1e9), attainment, CapacityConfig(max_load=8), random=False)
    assert most.load == 8 and most.high is None and most.edge is None
    least = find_capacity(curve(1e-9), attainment, CapacityConfig(), random=False)
    assert least.load is None and least.low is None and least.high is not None


def test_the_interval_is_students() -> None:
    low, high = interval([0.1, 0.2, 0.3], 0.9)  # t(0.95; 2) = 2.920, s = 0.1
    assert (low, high) == pytest.approx((0.2 - 0.16859, 0.2 + 0.16859), abs=1e-4)
    assert interval([1.0, 1.0], 0.99) == (1.0, 1.0)


CONFIG: dict[str, Any] = {
    "model": "llama-3-8b",
    "device": "h100-sxm",
    "predictor": {"source": "roofline"},
    "scheduler": {"chunking": "static", "chunk_tokens": 2000},
    "workload": {
        "lengths": {"distribution": "fixed", "prompt_tokens": 2000, "output_tokens": 1},
        "arrivals": {"process": "uniform", "rate_rps": 10.0},
        "num_requests": 200,
    },
    "slo": {"ttft": 1.0},
    "capacity": {"precision": 0.05},
}


def test_the_capacity_of_a_replica_is_known_in_closed_form(tmp_path: Path) -> None:
    """Equal prompts, one a batch, equally far apart: the n-th has a TTFT of s + (n − 1)(s − gap).
    2 of 200 may be late, so the 198th decides, or with two replicas that share them the 99th of each."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "sweep": {"parallel.replicas": [1, 2]}}))
    out = tmp_path / "capacity"
    assert main(["capacity", str(path), "--out", str(out), "--jobs", "1", "--quiet", "--no-plots"]) == 0
    found = json.loads((out / "capacity.json").read_text())
    service_s = _predicted_s("predict --model llama-3-8b --device h100-sxm --source roofline --chunk 2000")
    for each, replicas, place in zip(found, (1, 2), (198, 99), strict=True):
        exact_rps = replicas / (service_s - (1.0 - service_s) / (place - 1))
        assert exact_rps / 1.05 <= each["capacity_rps"] <= exact_rps * 1.005
    one = found[0]
    assert one["binds"]["what"] in ("compute", "queueing")
    again = {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    assert main(["capacity", str(path), "--out", str(out), "--jobs", "1", "--quiet", "--no-plots"]) == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()} == again


def _predicted_s(command: str) -> float:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main([*command.split(), "--json"]) == 0
    return float(json.loads(text.getvalue())["total_s"])
