"""What a sweep promises, measured: `python -m experiments.bench_sweep`, or one of kills, scaling, memory.

- kills: 200 cells, the whole process group killed (SIGKILL) ten times at random moments and started again:
  results.csv and results.parquet are those of an undisturbed sweep, to the last byte and value.
- scaling: the same cells with one worker and with two.
- memory: the largest process of a sweep, by the number of its cells.

Run it where nobody changes the code meanwhile: cells are keyed by it.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

KILLS = 10
_POLICIES = ["fcfs", "lars", "edf", "srpt"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, by default everything; 1 if a killed sweep differs."""
    chosen = list(sys.argv[1:] if arguments is None else arguments) or ["kills", "scaling", "memory"]
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        measures: dict[str, Callable[[Path], int]] = {"kills": kills, "scaling": scaling, "memory": memory}
        for name in chosen:
            status |= measures[name](Path(folder) / name)
    return status


def kills(
    folder: Path, cells: int = 200, times: int = KILLS, requests: int = 300, seed: int | None = None
) -> int:
    """Compare a sweep that is killed with one that isn't; returns 0 if they are equal."""
    folder.mkdir()
    path = _config(folder, cells, requests)
    began_s = time.perf_counter()
    _sweep(path, folder / "undisturbed").wait()
    undisturbed_s = time.perf_counter() - began_s
    chance = random.Random(seed)
    left: list[int] = []
    for _ in range(times):
        process = _sweep(path, folder / "killed")
        more = chance.uniform(0, 2 * cells / (times + 2))
        _wait_for(process, folder / "killed", _finished(folder / "killed") + more)
        time.sleep(chance.uniform(0.0, 0.3))
        if process.poll() is not None:
            break  # it was quicker than we
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left.append(_finished(folder / "killed"))
    status = _sweep(path, folder / "killed").wait()
    same = status == 0 and _same(folder / "undisturbed", folder / "killed")
    print(f"{cells} cells in {undisturbed_s:.1f} s; killed {len(left)} times, then with {left} cells")
    print("the results are " + ("the same" if same else "DIFFERENT"))
    return 0 if same else 1


def scaling(folder: Path, cells: int = 40, requests: int = 8000, attempts: int = 3) -> int:
    """Seconds of the same sweep with one worker and with two, several times each in turn."""
    folder.mkdir()
    path = _config(folder, cells, requests)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for attempt in range(attempts):
        for jobs, found in seconds.items():
            began_s = time.perf_counter()
            _sweep(path, folder / f"{attempt}.{jobs}", jobs).wait()
            found.append(time.perf_counter() - began_s)
    one, two = (statistics.median(seconds[jobs]) for jobs in (1, 2))
    print(f"{cells} cells: {one:.1f} s with one worker, {two:.1f} s with two: {one / two:.2f} times as fast")
    return 0


def memory(folder: Path, cells: Sequence[int] = (40, 160, 640)) -> int:
    """Peak memory of the largest process, the sweep's own or a worker."""
    folder.mkdir()
    for count in cells:
        path = _config(folder, count, 20)
        code = f"""
import resource, subprocess, sys
subprocess.run({_command(path, folder / str(count), 2)!r}, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        print(f"{count} cells: {int(done.stdout) / 1024:.0f} MiB in the largest process")
    return 0


def _finished(out: Path) -> int:
    return len(list((out / "cells").glob("*.json"))) if out.exists() else 0


def _wait_for(process: subprocess.Popen[bytes], out: Path, cells: float) -> None:
    while process.poll() is None and _finished(out) < cells:
        time.sleep(0.002)


def _config(folder: Path, cells: int, requests: int) -> Path:
    """A sweep of about as many cells: policies × rates × seeds."""
    rates = 10
    seeds = max(cells // (rates * len(_POLICIES)), 1)
    data: dict[str, Any] = {
        "model": "llama-3-8b",
        "device": "h100-sxm",
        "predictor": {"source": "roofline"},
        "scheduler": {"chunking": "adaptive"},
        "workload": {
            "lengths": {"distribution": "uniform", "prompt_tokens": [384, 640], "output_tokens": [64, 192]},
            "arrivals": {"process": "poisson", "rate_rps": 4.0},
            "num_requests": requests,
        },
        "sweep": {
            "scheduler.priority": _POLICIES,
            "workload.arrivals.rate_rps": {"start": 5, "stop": 50, "count": rates},
            "seed": {"start": 1, "stop": seeds, "count": seeds},
        },
    }
    path = folder / f"sweep{cells}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def _command(path: Path, out: Path, jobs: int) -> list[str]:
    command = [sys.executable, "-m", "experiments.cli", "sweep", str(path), "--out", str(out)]
    return [*command, "--jobs", str(jobs), "--quiet", "--no-plots"]


def _sweep(path: Path, out: Path, jobs: int = 2) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_command(path, out, jobs), start_new_session=True)


def _same(a: Path, b: Path) -> bool:
    """The same results: bytes of results.csv, values and types of results.parquet."""
    import pandas as pd

    one, other = (pd.read_parquet(folder / "results.parquet") for folder in (a, b))
    pd.testing.assert_frame_equal(one, other)
    return (a / "results.csv").read_bytes() == (b / "results.csv").read_bytes()


if __name__ == "__main__":
    sys.exit(main())
