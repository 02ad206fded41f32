"""``convoy live`` and what it leaves on disk: complete, exact, and refused where it isn't sound."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiments.build import build
from experiments.cli import main
from experiments.live_records import LiveRun, read_live_run
from experiments.load import load_config
from specs.errors import InputError
from traces.records import REQUEST_COLUMNS
from traces.slices import SLICE_COLUMNS, SliceLog

pytest.importorskip("torch")

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "model": "tiny-llama",
    "device": "cpu",
    "dtype": {"weight": "fp32", "kv": "fp32"},
    "memory_utilization": 0.03,
    "predictor": {"source": "roofline"},
    "scheduler": {"priority": "lars", "chunking": "adaptive", "target_iteration_s": 0.02},
    "workload": {
        "lengths": {"distribution": "uniform", "prompt_tokens": [8, 300], "output_tokens": [1, 6]},
        "arrivals": {"process": "poisson", "rate_rps": 40},
        "num_requests": 24,
    },
    "seed": 3,
}


def write(folder: Path, changes: dict[str, Any] | None = None, name: str = "C.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(CONFIG | (changes or {})))
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a live run; its configuration lies beside it."""
    folder = tmp_path_factory.mktemp("recorded")
    path = write(folder)
    assert main(["live", str(path), "--out", str(folder / "out"), "--quiet", "--no-plots"]) == 0
    return folder / "out"


def read(folder: Path) -> LiveRun:
    path = folder.parent / "C.yaml"
    return read_live_run(folder, build(load_config(path), str(path)), str(path))


def test_a_live_run_leaves_the_files_of_a_simulation_and_more(recorded: Path) -> None:
    with (recorded / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(REQUEST_COLUMNS) and len(rows) == 24
    assert {row["status"] for row in rows} == {"finished"}
    summary = json.loads((recorded / "summary.json").read_text())
    assert summary["predictor_source"] == "live" and summary["num_finished"] == 24
    assert "extrapolated_time_share" not in summary
    with gzip.open(recorded / "slices.csv.gz", "rt") as file:
        assert file.readline().strip().split(",") == list(SLICE_COLUMNS)
    for name in ("report.html", "timeline.json", "host.csv", "batches.csv", "config.yaml", "live.json"):
        assert (recorded / name).stat().st_size > 0
    assert "Measured on the live runtime: cpu, fp32, 1 rank, 1 thread a rank." in (
        (recorded / "report.html").read_text()
    )


def test_slices_tell_when_every_token_came_out(recorded: Path) -> None:
    run = read(recorded)
    requests = run.records.requests
    yields = run.slices.yields_token(requests["prompt_tokens"].astype(np.int64))
    for id, first_s, last_s, tokens in zip(
        *(requests[name] for name in ("request_id", "first_token_s", "finished_s", "output_tokens")),
        strict=True,
    ):
        ends_s = run.batch_end_s()[run.slices.batch[yields & (run.slices.request_id == id)]]
        assert len(ends_s) == tokens
        assert ends_s[0] == pytest.approx(first_s, abs=1e-8) and ends_s[-1] == pytest.approx(last_s, abs=1e-8)
    # so the gaps between tokens are those that were recorded
    tbt = json.loads((recorded / "summary.json").read_text())["tbt_s"]
    assert len(run.records.gaps) == tbt["count"]
    assert float(np.mean(run.records.gaps[:, 0])) == pytest.approx(tbt["mean"], rel=1e-6)


def test_what_is_recomputed_after_a_preemption_yields_no_token() -> None:
    log = SliceLog()
    log.add(0, [(0, 4, 0, 0), (1, 2, 0, 0)])  # request 0 prefills its 4 tokens, request 1 half of its 4
    log.add(1, [(0, 1, 4, 0), (1, 2, 2, 0)])
    log.add(2, [(0, 6, 0, 0), (1, 1, 4, 0)])  # request 0 was preempted: prompt and 2 tokens, then its third
    log.add(3, [(0, 3, 0, 0)])  # again, and only as far as it has been
    yields = log.slices().yields_token(np.array([4, 4]))
    assert yields.tolist() == [True, False, True, True, True, True, False]


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"parallel": {"replicas": 2}}, "parallel.replicas: the live runtime serves one replica, not 2"),
    (
        {"dtype": {"weight": "fp32", "kv": "bf16"}},
        "dtype: the live runtime computes and caches in one",
    ),
    ({"live": {"weights": "nowhere"}}, "live.weights: no such file: 'nowhere'"),
    ({"live": {"device": "cuda"}}, "device: 'cuda' is not here"),
    ({"live": {"attention": "flash-attn-9"}}, "attention 'flash-attn-9' doesn't work on this cpu"),
    ({"sweep": {"seed": [1, 2]}}, "sweep: take it out to serve a single configuration live"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_what_cannot_be_served_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, changes)
    assert main(["live", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"convoy: {path}: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
    config |= {"num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    path = write(tmp_path, {"live": {"weights": "weights"}})
    assert main(["live", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "config.json: num_layers is 2, but the model tiny-llama has 4" in capsys.readouterr().err


def test_without_torch_it_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "runtime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    path = write(tmp_path)
    assert main(["live", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "pip install -e '.[runtime]'" in capsys.readouterr().err


def test_ctrl_c_keeps_what_finished(tmp_path: Path) -> None:
    workload = CONFIG["workload"] | {"num_requests": 2000, "arrivals": {"process": "poisson", "rate_rps": 20}}
    path = write(tmp_path, {"workload": workload})
    command = [sys.executable, "-m", "experiments.cli", "live", str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    time.sleep(8.0)  # starting takes about 3
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert b"Interrupted after" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] and 0 < summary["num_finished"] < 2000
    with pytest.raises(InputError, match="the live run was interrupted"):
        read_live_run(tmp_path / "out", build(load_config(path), str(path)), str(path))


# -- records that aren't sound ----------------------------------------------------------------------------


def _edit(name: str, old: str, new: str) -> Any:
    def change(folder: Path) -> None:
        path = folder / name
        packed = name.endswith(".gz")
        text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
        assert old in text
        data = text.replace(old, new, 1).encode()
        path.write_bytes(gzip.compress(data) if packed else data)

    return change


def _cut(name: str, rows: int) -> Any:
    def change(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:rows]))

    return change


DAMAGES: list[tuple[Any, str]] = [
    (lambda folder: (folder / "requests.csv").unlink(), r"requests.csv: .*No such file"),
    (_edit("live.json", '"format": 1', '"format": 7'), r"live.json: must be a mapping with format 1"),
    (_edit("live.json", '"block_tokens": 16', '"block_tokens": "x"'), r"block_tokens must be a whole number"),
    (_edit("requests.csv", ",finished,", ",gone,"), r"line 2: status must be one of"),
    (_edit("requests.csv", "request_id", "id"), r"requests.csv: the first line must be request_id,"),
    (_cut("batches.csv", 3), r"batches.csv: stage 0 of batch 2 is missing"),
    (_cut("requests.csv", 9), r"requests.csv: \d+ of the \d+ requests in slices.csv.gz are missing"),
    (_edit("slices.csv.gz", "\n0,", "\n9,"), r"slices.csv.gz: row at line \d+: batches must be"),
    (_edit("slices.csv.gz", ",0\n", ",5\n"), r"slices.csv.gz: row at line 2: home must be below kvp, 1"),
    (_edit("config.yaml", "seed: 3", "seed: 4"), r"config.yaml: seed is not what .*C.yaml says"),
    (_edit("config.yaml", "priority: lars", "priority: edf"), r"config.yaml: scheduler.priority is not"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_records_are_one_clear_line(
    recorded: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    copy = tmp_path / "out"
    copy.mkdir()
    for path in recorded.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    (tmp_path / "C.yaml").write_bytes((recorded.parent / "C.yaml").read_bytes())
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        read(copy)
    assert "\n" not in str(caught.value)
