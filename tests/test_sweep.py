"""Sweeps: their cells, and that nothing that has finished is lost or done twice."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from experiments.cli import main
from experiments.config import RangeConfig
from experiments.grid import cells, combinations, spread

CONFIG: dict[str, Any] = {
    "model": "llama-3-8b",
    "device": "h100-sxm",
    "predictor": {"source": "roofline"},
    "scheduler": {"chunking": "static"},
    "workload": {
        "lengths": {"distribution": "uniform", "prompt_tokens": [100, 900], "output_tokens": [10, 60]},
        "arrivals": {"process": "poisson", "rate_rps": 5.0},
        "num_requests": 40,
    },
    "sweep": {"scheduler.priority": ["fcfs", "lars"], "seed": {"start": 0, "stop": 3, "step": 1}},
}


def write(folder: Path, sweep: dict[str, Any] | None = None, **changes: Any) -> Path:
    data = copy.deepcopy(CONFIG) | changes
    if sweep is not None:
        data["sweep"] = sweep
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def results(folder: Path) -> pd.DataFrame:
    frame = pd.read_parquet(folder / "results.parquet")
    pd.testing.assert_frame_equal(
        frame.drop(columns="error"),
        pd.read_csv(folder / "results.csv").drop(columns="error"),
        check_dtype=False,
    )
    return frame


def test_keys_are_crossed_or_taken_together() -> None:
    grid = {"a, b": [[1, "x"], [2, "y"]], "c": RangeConfig(start=1, stop=2, count=2)}
    assert list(combinations(grid)) == [
        {"a": 1, "b": "x", "c": 1},
        {"a": 1, "b": "x", "c": 2},
        {"a": 2, "b": "y", "c": 1},
        {"a": 2, "b": "y", "c": 2},
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"start": 0.25, "stop": 1.75, "step": 0.5}, [0.25, 0.75, 1.25, 1.75]),
        ({"start": 0.1, "stop": 0.3, "step": 0.1}, [0.1, 0.2, 0.3]),
        ({"start": 1, "stop": 64, "count": 4, "log": True}, [1, 4, 16, 64]),
        ({"start": 1, "stop": 2, "count": 3}, [1, 1.5, 2]),
        ({"start": 5, "stop": 5, "count": 1}, [5]),
    ],
)
def test_ranges_include_both_ends(values: dict[str, Any], expected: list[float]) -> None:
    values = {key: float(v) if key in ("start", "stop", "step") else v for key, v in values.items()}
    assert spread(RangeConfig(**values)) == expected


def test_a_sweep_leaves_one_row_a_cell_the_same_in_any_number_of_processes(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert main(["sweep", str(path), "--out", str(tmp_path / "one"), "--jobs", "1", "--quiet"]) == 0
    assert main(["sweep", str(path), "--out", str(tmp_path / "two"), "--jobs", "2", "--quiet"]) == 0
    frame = results(tmp_path / "one")
    pd.testing.assert_frame_equal(frame, results(tmp_path / "two"))
    assert list(frame["scheduler.priority"]) == ["fcfs"] * 4 + ["lars"] * 4
    assert list(frame["seed"]) == [0, 1, 2, 3] * 2
    assert (frame["status"] == "finished").all() and (frame["num_finished"] == 40).all()
    assert frame["ttft_s_p50"].nunique() >= 4  # one for each seed; light load leaves the order no choice


def test_a_cell_is_the_run_of_its_configuration(tmp_path: Path) -> None:
    path = write(tmp_path)
    main(["sweep", str(path), "--out", str(tmp_path / "grid"), "--jobs", "1", "--quiet"])
    single = write(tmp_path, sweep={})
    arguments = ["--set", "seed=2", "--set", "scheduler.priority=lars", "--no-plots", "--quiet"]
    assert main(["run", str(single), "--out", str(tmp_path / "run"), *arguments]) == 0
    summary = yaml.safe_load((tmp_path / "run/summary.json").read_text())
    frame = results(tmp_path / "grid")
    row = frame[(frame["seed"] == 2) & (frame["scheduler.priority"] == "lars")].iloc[0]
    assert row["ttft_s_p99"] == summary["ttft_s"]["p99"] and row["tbt_s_mean"] == summary["tbt_s"]["mean"]


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    path = write(tmp_path)
    out = tmp_path / "grid"
    main(["sweep", str(path), "--out", str(out), "--jobs", "1", "--quiet"])
    files = {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    assert len(files) == 8
    path = write(tmp_path, sweep={"scheduler.priority": ["fcfs", "lars", "edf"], "seed": [0, 1, 2, 3]})
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "1", "--quiet"]) == 0
    assert len(results(out)) == 12 and len(list((out / "cells").iterdir())) == 12
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_what_a_result_depends_on_is_in_its_cells_name(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    lengths = {"trace": str(trace)}
    workload = {"lengths": lengths, "arrivals": {"process": "trace"}}
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,20,5\n")
    first = {cell.id for cell in cells(write(tmp_path, workload=workload))}
    assert len(first) == 8
    assert {cell.id for cell in cells(write(tmp_path, workload=workload, name="another"))} == first
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,20,6\n")
    assert first.isdisjoint(cell.id for cell in cells(write(tmp_path, workload=workload)))


def test_a_failing_cell_is_named_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, sweep={"parallel.tp": [1, 3, 2]})
    assert main(["sweep", str(path), "--out", str(tmp_path / "grid"), "--jobs", "1"]) == 1
    frame = results(tmp_path / "grid")
    assert list(frame["status"]) == ["finished", "failed", "finished"]
    assert "parallel.tp: 3 must divide" in frame["error"][1]
    assert "failed: parallel.tp = 3: " in capsys.readouterr().out


def test_killed_at_random_and_started_again_it_gives_the_same_results(tmp_path: Path) -> None:
    """SIGKILL to the whole process group, at moments spread over the run."""
    path = write(tmp_path, sweep={"scheduler.priority": ["fcfs", "lars"], "seed": list(range(10))})
    main(["sweep", str(path), "--out", str(tmp_path / "undisturbed"), "--jobs", "1", "--quiet"])
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "experiments.cli", "sweep", str(path), "--out", str(out), "--jobs", "2"]
    kills = 0
    for attempt in range(20):
        process = subprocess.Popen(
            command, cwd=Path(__file__).parent.parent, start_new_session=True, stdout=subprocess.DEVNULL
        )
        seen = len(list((out / "cells").glob("*.json"))) if out.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            now = len(list((out / "cells").glob("*.json"))) if out.exists() else 0
            if now >= seen + 4 + attempt % 3:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    pd.testing.assert_frame_equal(results(out), results(tmp_path / "undisturbed"))


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({"scheduler.prioritee": ["fcfs"]}, "did you mean 'priority'"),
        ({"seed": []}, "seed has no values"),
        ({"seed, scheduler.priority": [[1, "fcfs"], [2]]}, "must be a list of 2"),
        ({"seed": [1], "seed, scheduler.priority": [[1, "fcfs"]]}, "'seed' is there twice"),
        ({"seed": {"start": 1, "stop": 2}}, "a step or a count"),
        ({"seed": {"start": 3, "stop": 2, "step": 1}}, "must not be below start"),
        ({"seed": {"start": 0, "stop": 2, "count": 2, "log": True}}, "a start above 0"),
        ({"name": ["a"]}, "can't vary 'name'"),
        ({"scheduler.priority": ["fcfs", "larz"]}, "'larz'"),
        ({}, "sweep: is missing"),
    ],
)
def test_bad_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sweep: dict[str, Any], expected: str
) -> None:
    assert main(["sweep", str(write(tmp_path, sweep=sweep)), "--out", str(tmp_path / "grid")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "grid").exists()


def test_a_swept_key_cant_be_set_and_a_foreign_folder_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    assert main(["sweep", str(path), "--set", "seed=3"]) == 2
    assert "seed is swept" in capsys.readouterr().err
    assert main(["sweep", str(path), "--out", str(tmp_path)]) == 2
    assert "holds no sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_ray_gives_what_loky_gives(tmp_path: Path) -> None:
    """On a Ray of this machine alone, started for this and stopped after it."""
    ray = pytest.importorskip("ray", reason="ray isn't installed: pip install -e '.[ray]'")
    path = write(tmp_path, sweep={"seed": [0, 1, 2]})
    main(["sweep", str(path), "--out", str(tmp_path / "loky"), "--jobs", "1", "--quiet", "--no-plots"])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        arguments = ["--backend", "ray", "--jobs", "2", "--quiet", "--no-plots"]
        assert main(["sweep", str(path), "--out", str(tmp_path / "ray"), *arguments]) == 0
    finally:
        ray.shutdown()
    pd.testing.assert_frame_equal(results(tmp_path / "ray"), results(tmp_path / "loky"))
