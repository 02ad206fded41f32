"""The examples and the README's way to a plan, run as they are written, at a small scale."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from experiments.grid import cell_id
from experiments.load import load_config

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "experiments" / "examples"
TRACE = ROOT.parent / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv.gz"


def commands(page: Path, heading: str) -> list[str]:
    """The indented commands under a heading of a page, without what calls them."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    joined = section.replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.startswith("    ")]


def arguments(command: str) -> list[str]:
    import shlex

    return shlex.split(re.sub(r"^(\.venv/bin/)?convoy ", "", command))


def small(command: str, folder: Path, *settings: str) -> list[str]:
    """A command of an example, on few requests, with its results in ``folder``."""
    given = arguments(command)
    changes = [part for setting in settings for part in ("--set", setting)]
    name = given[given.index("--set") + 1] if "--set" in given else "plain"
    out = [] if "--out" in given else ["--out", str(folder / re.sub(r"\W", "-", f"{given[0]}-{name}"))]
    return [*given, *changes, *out, "--no-plots"]


def test_a_newcomer_with_a_csv_gets_to_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The three commands of the README; the first is `make install`, which these tests stand on."""
    random = np.random.default_rng(0)
    rows = np.stack(
        [
            np.cumsum(random.exponential(0.2, 100)),
            random.integers(50, 3000, 100),
            random.integers(5, 200, 100),
        ]
    )
    lines = [f"{time:.3f},{prompt:.0f},{output:.0f}" for time, prompt, output in rows.T]
    (tmp_path / "requests.csv").write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]))
    install, describe, plan = commands(ROOT / "README.md", "From your requests to a plan")
    assert install == "make install" and "install: .venv/installed" in (ROOT / "Makefile").read_text()
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    assert main(arguments(describe)) == 0
    assert "100" in capsys.readouterr().out
    # As written, but for fewer GPUs and the report's plots, which take the time.
    assert main([*arguments(plan), "--set", "plan.gpus=2", "--jobs", "1", "--no-plots"]) == 0
    text = capsys.readouterr().out
    for part in ("an hour", "per million tokens", "Headroom", "+50 % traffic"):
        assert part in text
    answer = json.loads((tmp_path / "out/plan.plan/plan.json").read_text())["answer"]
    assert answer["holds"] and answer["requests"] == 100
    assert (tmp_path / "out/plan.plan/report.html").is_file()


@pytest.mark.skipif(not TRACE.is_file(), reason="the Azure trace isn't here")
def test_the_planners_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    walk = commands(EXAMPLES / "README.md", "A planner: from a trace to a deployment")
    assert main(arguments(walk[0])) == 0
    settings = [
        "workload.num_requests=60",
        "plan.gpus=2",
        "plan.tp=[1]",
        "plan.spp=[1]",
        "plan.traffic=[]",
        "capacity.precision=1",
    ]
    for command in walk[1:]:
        assert main([*small(command, tmp_path, *settings), "--jobs", "1", "--quiet"]) == 0
    plans = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/plan.json")}
    assert len(plans) == 4
    assert any(each["decode"] for plan in plans.values() for each in plan["simulated_in_full"])


def test_the_researchers_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    sweep, capacity, first, second, compare = commands(
        EXAMPLES / "README.md", "A researcher: policies compared"
    )
    few = "workload.num_requests=30"
    grid = "sweep={scheduler.priority: [fcfs, srpt, edf, lrs, lars]}"
    two = "sweep={scheduler.priority: [fcfs, lars]}"
    settings = [few, two, "capacity={min_seeds: 2, max_seeds: 2, precision: 1, max_load: 2}"]
    assert main([*small(sweep, tmp_path, few, grid), "--jobs", "1", "--quiet"]) == 0
    assert main([*small(capacity, tmp_path, *settings), "--jobs", "1", "--quiet"]) == 0
    assert len((next(tmp_path.glob("sweep*")) / "results.csv").read_text().splitlines()) == 6
    assert len(json.loads((next(tmp_path.glob("capacity*")) / "capacity.json").read_text())) == 2
    for command in (first, second):
        assert main([*small(command, tmp_path, few), "--quiet"]) == 0
    assert main([*arguments(compare), "--no-plots", "--quiet"]) == 0
    changed = json.loads((tmp_path / "out/fcfs-against-lars/compare.json").read_text())["configuration"]
    assert changed["scheduler.priority"] == {"a": "fcfs", "b": "lars"}


def test_a_policy_from_a_package_of_its_own(tmp_path: Path) -> None:
    """Installed by pip beside Convoy, not into it; a process that knows of the folder finds the name."""
    package = shutil.copytree(EXAMPLES / "own_policy", tmp_path / "own_policy")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(site), str(package)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip can't build a package here: {done.stderr.strip().splitlines()[-1:]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}

    def convoy(*given: str) -> str:
        command = [sys.executable, "-m", "experiments.cli", *given]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "ShortestPromptWithAging" in convoy("list", "policies")
    quickstart = str(ROOT / "experiments" / "quickstart.yaml")
    few = [
        "--set",
        "workload.num_requests=200",
        "--set",
        "scheduler.space_sharing=false",
        "--no-plots",
        "--quiet",
    ]
    for name in ("aging", "fcfs"):
        convoy("run", quickstart, "--set", f"scheduler.priority={name}", "--out", str(tmp_path / name), *few)
    aging, fcfs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("aging", "fcfs"))
    assert aging["num_finished"] == 200
    assert aging["ttft_s"]["p50"] < fcfs["ttft_s"]["p50"]  # chats don't wait for documents


def test_a_cell_under_ones_own_policy_depends_on_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from policies.priorities import FCFS\nclass Mine(FCFS):\n    pass\n"
    (tmp_path / "mine_here.py").write_text(code)
    path = EXAMPLES / "policies.yaml"
    config = load_config(path, ["scheduler.priority=mine_here:Mine"])
    before = cell_id(config)
    assert cell_id(config) == before
    (tmp_path / "mine_here.py").write_text(code + "    static = False\n")
    assert cell_id(config) != before
