"""Measured runs of other engines: read, simulated again, compared; and what can be learned from a part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.build import Experiment, build
from experiments.calibrate import fit
from experiments.cli import main
from experiments.engine_replay import replay_engine, simulated_latencies
from experiments.iteration_log import first_of_each, fit_host, predict, similarity
from experiments.load import load_config
from experiments.measured import Iterations, Throughput, read_iterations, read_measured
from profiler.overheads import HostOverhead
from sim.cluster import simulate
from specs.errors import InputError

GIVEN = Path(__file__).resolve().parents[1].parent / "shared" / "groundtruth"
CONFIG = """
model: llama-3.1-8b
device: h100-sxm
predictor: {source: roofline, host: {base_s: 0.001, per_request_s: 2.0e-5, prefill_s: 0.003}}
scheduler: {preset: vllm-v1, max_batch_requests: 16}
workload:
  lengths: {distribution: uniform, prompt_tokens: [100, 3000], output_tokens: [20, 150]}
  arrivals: {process: poisson, rate_rps: 5}
  num_requests: 40
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "engine.yaml"
    path.write_text(CONFIG)
    return path


def experiment_of(config: Path, *overrides: str) -> Experiment:
    return build(load_config(config, overrides), "test")


def write_run(folder: Path, experiment: Experiment) -> Path:
    """What `convoy measure` would leave of an engine that is just like the simulation."""
    records = simulate(experiment.workload, experiment.setup, step_by_step=True)
    found = simulated_latencies(records, from_notice=False)
    folder.mkdir()
    columns = {
        "arrival_s": records.requests["arrival_s"],
        "prompt_tokens": records.requests["prompt_tokens"],
        "output_tokens": records.requests["output_tokens"],
        **found,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    lines = [",".join(columns), *(",".join(map(repr, row)) for row in rows)]
    (folder / "requests.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_an_engine_like_the_simulation_is_predicted_exactly(tmp_path: Path, config: Path) -> None:
    run = read_measured(write_run(tmp_path / "run", experiment_of(config)))
    found, _ = replay_engine(experiment_of(config), run, "test")
    assert found.passes
    assert max(abs(row.error) for row in found.rows) < 1e-9
    slower = experiment_of(config, "predictor.host.base_s=0.01")
    worse, _ = replay_engine(slower, run, "test")
    assert not worse.passes
    assert all(row.error > 0 for row in worse.rows)


def test_the_command_writes_both_sides_of_every_request(tmp_path: Path, config: Path) -> None:
    run = write_run(tmp_path / "run", experiment_of(config))
    out = tmp_path / "out"
    arguments = ["validate", str(config), "--replay", str(run), "--out", str(out), "--quiet"]
    assert main(arguments) == 0
    header, *rows = (out / "requests.csv").read_text().splitlines()
    assert header.split(",")[3:5] == ["measured_ttft_s", "simulated_ttft_s"]
    assert len(rows) == 40
    assert json.loads((out / "summary.json").read_text())["passes"] is True
    assert main([*arguments, "--force", "--set", "predictor.host.base_s=0.02"]) == 1
    assert main([*arguments, "--force", "--set", "workload.num_requests=39"]) == 2


def test_latencies_may_count_from_the_moment_a_busy_engine_looks(config: Path) -> None:
    experiment = experiment_of(config)
    records = simulate(experiment.workload, experiment.setup, step_by_step=True)
    arrived = simulated_latencies(records, from_notice=False)
    noticed = simulated_latencies(records, from_notice=True)
    waited_s = arrived["ttft_s"] - noticed["ttft_s"]
    longest_s = float((records.batches["end_s"] - records.batches["start_s"]).max())
    assert (waited_s >= -1e-9).all()
    assert 0 < waited_s.max() <= longest_s
    np.testing.assert_allclose(arrived["e2e_s"] - noticed["e2e_s"], waited_s, atol=1e-9)


def log_of(experiment: Experiment, host: HostOverhead, count: int = 300) -> Iterations:
    """Iterations of all kinds that take exactly what is predicted with this host."""
    rng = np.random.default_rng(3)
    prefills = rng.integers(0, 3, count).astype(float)
    decodes = np.where(prefills == 0, rng.integers(1, 16, count), rng.integers(0, 13, count)).astype(float)
    zeros = np.zeros(count)
    log = Iterations(
        prefills=prefills,
        prefill_tokens=prefills * rng.integers(2, 1000, count),
        prefill_context=prefills * rng.integers(0, 2000, count),
        decodes=decodes,
        decode_context=decodes * rng.integers(100, 4000, count),
        decode_variance=zeros,
        time_s=zeros,
        segment=np.array(["a"] * (count // 2) + ["b"] * (count - count // 2)),
    )
    return replace(log, time_s=predict(experiment.iteration.with_host(host), log))


def test_the_host_is_found_in_a_log(config: Path) -> None:
    experiment = experiment_of(config)
    truth = HostOverhead(4e-4, 3e-5, prefill_s=2e-3)
    log = log_of(experiment, truth)
    wrong = experiment.iteration.with_host(HostOverhead(5e-3))  # what is believed doesn't matter
    found = fit_host(wrong, log.take(first_of_each(log, 0.5)))
    assert found.base_s == pytest.approx(truth.base_s, rel=0.02)
    assert found.per_request_s == pytest.approx(truth.per_request_s, rel=0.02)
    assert found.prefill_s == pytest.approx(truth.prefill_s, rel=0.02)


def test_the_first_part_is_that_of_each_segment(config: Path) -> None:
    log = log_of(experiment_of(config), HostOverhead(), 20)
    assert np.flatnonzero(first_of_each(log, 0.3)).tolist() == [0, 1, 2, 10, 11, 12]


def test_the_cost_of_prefills_is_found_in_tokens_a_second(tmp_path: Path, config: Path) -> None:
    truth = experiment_of(config, "predictor.host={prefill_s: 0.008}", "workload.num_requests=120")
    records = simulate(truth.workload, truth.setup, step_by_step=True)
    ends_s = np.arange(1.0, 25.0)
    upto = [
        records.batches["num_decodes"][records.batches["end_s"] <= end_s].sum()
        + (records.requests["first_token_s"] <= end_s).sum()
        for end_s in ends_s
    ]
    run = read_measured(write_run(tmp_path / "run", truth))
    run = replace(run, throughput=Throughput(ends_s, np.diff([0, *upto]).astype(float)))
    found = fit(experiment_of(config, "workload.num_requests=120"), run, 0.8)
    assert found.host.prefill_s == pytest.approx(0.008, abs=0.0015)


def test_an_unknown_machine_is_learned_from_half_of_the_requests(tmp_path: Path, config: Path) -> None:
    """Half as quick as its data sheet, with a slow host: found well enough to predict the whole run."""
    truth = experiment_of(config, "predictor.factors={roofline: 2.0}")
    run = read_measured(write_run(tmp_path / "run", truth))
    found = fit(experiment_of(config), run, 0.5)
    host, factor = found.host, found.factors["roofline"]
    assert factor == pytest.approx(2.0, rel=0.1)
    learned = experiment_of(
        config,
        f"predictor.factors={{roofline: {factor}}}",
        f"predictor.host={{base_s: {host.base_s}, per_request_s: {host.per_request_s}, "
        f"prefill_s: {host.prefill_s}}}",
    )
    compared, _ = replay_engine(learned, run, "test")
    errors = {(row.metric, row.statistic): abs(row.error) for row in compared.rows}
    assert max(errors["tpot_s", each] for each in ("mean", "p50", "p90")) < 0.02
    assert max(errors["e2e_s", each] for each in ("mean", "p50", "p90")) < 0.02
    assert errors["ttft_s", "mean"] < 0.05  # single ones are a step sooner or later


def test_likeness() -> None:
    one = {"prefill_tokens": np.array([100.0, 0, 0, 0, 100, 0]), "decodes": np.array([0.0, 1, 1, 1, 1, 2])}
    assert similarity(one, one) == pytest.approx({"same_mix": 1.0, "same_order": 1.0})
    other = {"prefill_tokens": np.zeros(10), "decodes": np.full(10, 20.0)}
    found = similarity(one, other)
    assert found["same_mix"] == 0.0
    assert found["same_order"] < 0


BENCHMARK = "request,input_tokens,output_tokens,queued_s,first_token_s,last_token_s,peer_ttft_s\n"


def test_the_benchmark_form(tmp_path: Path) -> None:
    (tmp_path / "x_requests.csv").write_text(BENCHMARK + "0,10,5,1.0,1.5,3.5,0.4\n1,20,1,2.0,4.0,4.0,1.0\n")
    run = read_measured(tmp_path)
    assert run.from_notice
    np.testing.assert_allclose(run.latencies_s["ttft_s"], [0.5, 2.0])
    np.testing.assert_allclose(run.latencies_s["tpot_s"], [0.5, np.nan])
    np.testing.assert_allclose(run.latencies_s["e2e_s"], [2.5, 2.0])
    np.testing.assert_allclose(run.peer_s["ttft_s"], [0.4, 1.0])
    assert run.makespan_s == 3.0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("requests.csv", "a,b\n1,2\n", "has neither input_tokens"),
        ("requests.csv", BENCHMARK, "no rows"),
        ("requests.csv", BENCHMARK + "0,10,5,-1,1,3,1\n", "row 2: queued_s"),
        ("other.csv", BENCHMARK, "holds no measured run"),
    ],
)
def test_unsound_runs_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_measured(tmp_path)


def test_a_log_without_a_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "iterations.csv").write_text("latency_ms\n1\n")
    with pytest.raises(InputError, match="no column 'sum_prefill_tokens'"):
        read_iterations(tmp_path / "iterations.csv")


@pytest.mark.skipif(not GIVEN.exists(), reason=f"{GIVEN} isn't there")
@pytest.mark.parametrize(
    ("what", "source", "run"),
    [
        ("vllm019-rtxpro6000", "llmservingsim", "vllm019_rtxpro6000"),
        ("vllm020-b300", "layerwise", "vllm020_b300"),
    ],
)
def test_vllm_as_measured_is_predicted_within_tolerance(
    tmp_path: Path, what: str, source: str, run: str
) -> None:
    """The configurations' own tolerances; what was fitted to which part stands in them."""
    path = Path(__file__).resolve().parents[1] / "experiments" / "validate" / "engines" / f"{what}.yaml"
    config = path.read_text()
    device = "rtx-pro-6000-blackwell" if source == "llmservingsim" else "b300"
    model = "llama-3.1-8b" if source == "llmservingsim" else "qwen3-32b"
    tables = GIVEN / run / ("profile" if source == "llmservingsim" else "")
    import_it = ["import", source, str(tables), "--device", device, "--model", model, "--out", str(tmp_path)]
    assert main(import_it) == 0
    copy = tmp_path / "config.yaml"
    copy.write_text(
        config.replace("out/profiles/", f"{tmp_path}/").replace("../shared/groundtruth", str(GIVEN))
    )
    out = tmp_path / "found"
    assert main(["validate", str(copy), "--replay", str(GIVEN / run), "--out", str(out), "--quiet"]) == 0
    found = json.loads((out / "summary.json").read_text())
    if source == "llmservingsim":
        peers = {
            ("ttft_s", "mean"),
            ("ttft_s", "p50"),
            ("ttft_s", "p99"),
            ("tpot_s", "mean"),
            ("e2e_s", "mean"),
        }
        for row in found["requests"]:
            if (row["metric"], row["statistic"]) in peers:
                assert abs(row["error"]) < abs(row["peer"])
    else:
        assert found["batches"]["same_mix"] > 0.95
        assert found["batches"]["same_order"] > 0.95
