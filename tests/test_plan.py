"""Plans: that the answer is the cheapest that holds, and that no bound excludes what does."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.binding import binding
from experiments.bounds import allowance, demand, ruled_out
from experiments.build import build
from experiments.cli import main
from experiments.deployments import Deployment, at_load, cell_of, deployments, replica_numbers
from experiments.grid import Cell
from experiments.load import load_config
from experiments.run import summarize_run
from experiments.search import Search, promising
from experiments.trials import Trial, front, judge
from sim.cluster import simulate
from specs import get_model
from specs.devices import get_device
from traces.build import build_workload

CONFIG: dict[str, Any] = {
    "model": "llama-3-8b",
    "device": "h100-sxm",
    "predictor": {"source": "roofline"},
    "workload": {
        "lengths": {"distribution": "uniform", "prompt_tokens": [500, 3500], "output_tokens": [20, 300]},
        "arrivals": {"process": "poisson", "rate_rps": 12.0},
        "num_requests": 120,
    },
    "slo": {"ttft": 0.5, "tpot_s": 0.03},
    "plan": {
        "gpus": 3,
        "devices": ["h100-sxm", "a100-80gb-sxm"],
        "spp": [1],
        "attainment": 0.95,
        "traffic": [1.5],
        "parts": [0.25],
        "keep": 3,
    },
    "capacity": {"min_seeds": 2, "max_seeds": 2, "precision": 0.5},
}


def write(folder: Path, **changes: Any) -> Path:
    data = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def candidates(path: Path) -> tuple[list[Deployment], Search]:
    config = load_config(path)
    assert config.plan is not None
    spec = config.workload
    workload, _ = build_workload(spec.lengths, spec.arrivals, spec.num_requests, None, config.seed, Path())
    model = get_model(config.model)
    needs = demand(config, model, workload, config.plan.attainment)
    search = Search(path, (), config.plan, needs, Fake())  # type: ignore[arg-type]
    return deployments(config, config.plan, model, workload), search


@dataclass(frozen=True)
class Fake:
    """A laboratory that knows the answer: attainment grows with the ``strength`` of the replicas."""

    needed: float = 4.0
    noise: int = 0

    def summaries(self, cells: Sequence[Cell], doing: str) -> list[Mapping[str, Any]]:
        return [self.summary(cell) for cell in cells]

    def summary(self, cell: Cell) -> dict[str, Any]:
        config = cell.config
        shape = (config.device, config.parallel.tp, config.scheduler.priority)
        strength = config.parallel.replicas * (1 + (crc32(repr((shape, self.noise)).encode()) % 1000) / 500)
        requests = config.workload.num_requests or 0
        missed = min(round(requests * max(0.0, 0.6 * (1 - strength / self.needed))), requests)
        latency = {"p99": 1 / strength}
        attainment = 1 - missed / requests
        return {"num_requests": requests, "slo_attainment": attainment, "ttft_s": latency, "tpot_s": latency}


# -- the search -------------------------------------------------------------------------------------------


@given(needed=st.floats(0.5, 40.0), noise=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_search_finds_what_trying_everything_finds(tmp_path: Path, needed: float, noise: int) -> None:
    """With 24 GPUs some numbers of replicas aren't listed; the gaps are searched as well."""
    path = write(tmp_path, plan={"gpus": 24, "tp": [1], "keep": 3}, slo={"ttft": 1e6, "tpot_s": 1e6})
    listed, search = candidates(path)
    fake = Fake(needed, noise)
    search = Search(search.path, (), search.plan, search.needs, fake)  # type: ignore[arg-type]
    found = search.run(listed, keep=3)
    asked, allowed = search.plan.attainment, search.needs.allowed
    summaries = [fake.summary(cell_of(each, path, (), 1.0, None)) for each in listed]
    everything = [
        judge(each, 1.0, summary, ("default",), allowed, asked)
        for each, summary in zip(listed, summaries, strict=True)
    ]
    holding = [trial for trial in everything if trial.holds]
    if not holding:
        assert found.choice is None
        return
    best = min(trial.deployment.usd_per_hour for trial in holding)
    assert found.choice is not None and found.choice.holds
    assert found.choice.deployment.usd_per_hour <= best + 1e-9
    cost = found.choice.deployment.usd_per_hour
    cheaper = [each for each in found.neighbours if each.deployment.usd_per_hour < cost - 1e-9]
    assert not any(trial.holds for trial in cheaper)


def test_that_nothing_holds_is_known_from_the_most_replicas_of_each_kind(tmp_path: Path) -> None:
    path = write(tmp_path, plan={"gpus": 24, "tp": [1], "keep": 3}, slo={"ttft": 1e6, "tpot_s": 1e6})
    listed, search = candidates(path)
    barely = Fake(needed=1e3)
    search = Search(search.path, (), search.plan, search.needs, barely)  # type: ignore[arg-type]
    found = search.run(listed, keep=3)
    assert found.choice is None and found.neighbours == []
    kinds = {each.kind for each in listed}
    assert all(
        any(trial.lost and trial.deployment.kind == kind for trial in found.trials.values()) for kind in kinds
    )


def test_the_plan_is_the_cheapest_of_all_simulated_in_full(tmp_path: Path) -> None:
    path = write(tmp_path)
    out = tmp_path / "plan"
    assert main(["plan", str(path), "--out", str(out), "--jobs", "1", "--quiet", "--no-plots"]) == 0
    answer = json.loads((out / "plan.json").read_text())["answer"]
    listed, search = candidates(path)
    holding = []
    for each in listed:
        experiment = build(cell_of(each, path, (), 1.0, None).config, "test")
        summary = summarize_run(simulate(experiment.workload, experiment.setup), experiment)
        trial = judge(each, 1.0, summary, ("default",), search.needs.allowed, 0.95)
        if trial.holds:
            holding.append(trial)
        else:
            continue
        assert search.why_not(each) is None, "a bound excludes what holds"
    assert 0 < len(holding) < len(listed)
    assert answer["usd_per_hour"] == min(trial.deployment.usd_per_hour for trial in holding)
    assert answer["name"] in {trial.deployment.name for trial in holding}


def test_a_second_plan_on_the_same_folder_simulates_nothing_and_says_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, plan={"devices": ["h100-sxm"], "tp": [1], "gpus": 2})
    arguments = ["plan", str(path), "--jobs", "1", "--quiet", "--no-plots", "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    cells = {file: file.stat().st_mtime_ns for file in (tmp_path / "one/cells").iterdir()}
    text = (tmp_path / "one/plan.json").read_text()
    half = sorted(cells)[::2]
    for file in half:  # as if it had been killed
        file.unlink()
    assert main([*arguments, str(tmp_path / "one")]) == 0
    assert (tmp_path / "one/plan.json").read_text() == text
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "one/cells").iterdir()}
    assert after.keys() == cells.keys()
    assert all(after[file] == when for file, when in cells.items() if file not in half)
    assert (tmp_path / "one/choice/summary.json").is_file()


def test_misses_on_a_part_are_no_more_than_on_the_whole(tmp_path: Path) -> None:
    path = write(tmp_path, workload={"arrivals": {"process": "poisson", "rate_rps": 40.0}})
    missed = []
    for requests in (30, 60, 120):
        config = load_config(path, [f"workload.num_requests={requests}"])
        experiment = build(config, "test")
        summary = summarize_run(simulate(experiment.workload, experiment.setup), experiment)
        missed.append(round(requests * (1 - summary["slo_attainment"])))
    assert missed == sorted(missed) and missed[-1] > 0


def trial(replicas: int, usd: float, ttft_s: float, *, holds: bool = True, lost: bool = False) -> Trial:
    deployment = Deployment("d", 1, 1, 1, replicas, "p", {}, usd, replicas, 1)
    summary = {"ttft_s": {"p99": ttft_s}, "tpot_s": {"p99": 0.01}}
    return Trial(deployment, 1.0, 100, 1.0 if holds else 0.9, holds, lost, summary)


def test_the_front_holds_what_nothing_beats() -> None:
    cheap, better, beaten, best = trial(1, 1, 0.5), trial(2, 2, 0.3), trial(3, 3, 0.4), trial(4, 4, 0.1)
    assert front([best, beaten, better, cheap]) == [cheap, better, best]


def test_fewer_replicas_of_what_is_lost_are_lost_too() -> None:
    trials = [trial(1, 1, 9, holds=False), trial(2, 2, 9, holds=False, lost=True), trial(3, 3, 0.1)]
    assert [each.replicas for each in promising(trials, 10)] == [3]


def test_numbers_of_replicas_are_all_there_first_and_then_thinned_out() -> None:
    numbers = replica_numbers(64)
    assert numbers[:16] == list(range(1, 17)) and numbers[-1] <= 64
    assert all(b <= a * 1.25 + 1 for a, b in pairwise(numbers))


# -- bounds -----------------------------------------------------------------------------------------------


def test_a_device_that_cant_read_the_weights_in_time_is_ruled_out(tmp_path: Path) -> None:
    model, device = get_model("llama-3-8b"), get_device("a100-80gb-sxm")
    weights = 2 * (model.num_layers * model.layer_linear_weights + model.vocab_size * model.hidden_size)
    floor_s = weights / device.memory_bandwidth_bytes_per_s  # 7.36 ms
    for factor, excluded in ((0.99, True), (1.01, False)):
        path = write(tmp_path, slo={"tpot_s": factor * floor_s}, device="a100-80gb-sxm", plan={"tp": [1]})
        listed, search = candidates(path)
        why = search.why_not(next(each for each in listed if each.device == "a100-80gb-sxm"))
        assert (why is not None and why.startswith("bandwidth")) == excluded


def test_more_flop_than_the_gpus_have_is_ruled_out(tmp_path: Path) -> None:
    """A prompt of 1,000 tokens takes 2 × 6.98e9 × 1,000 FLOP and more: 14.1 ms at the peak of an H100."""
    lengths = {"distribution": "fixed", "prompt_tokens": 1000, "output_tokens": 1}
    for rate, excluded in ((60.0, False), (90.0, True)):
        workload = {"lengths": lengths, "arrivals": {"process": "uniform", "rate_rps": rate}}
        path = write(tmp_path, workload={**workload, "num_requests": 5000}, plan={"devices": ["h100-sxm"]})
        listed, search = candidates(path)
        why = search.why_not(listed[0])
        assert listed[0].gpus == 1 and (why is not None and why.startswith("compute")) == excluded


def test_what_doesnt_fit_is_ruled_out_by_memory(tmp_path: Path) -> None:
    path = write(tmp_path, model="llama-3-70b", plan={"gpus": 4, "tp": None})
    listed, search = candidates(path)
    for each in listed:
        why = search.why_not(each)
        assert (why is not None and why.startswith("memory")) == (each.tp == 1)


@given(rate=st.floats(5, 400), tpot_s=st.floats(0.004, 0.05), ttft_s=st.floats(0.05, 1.0))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_bound_excludes_misses_when_simulated(
    tmp_path: Path, rate: float, tpot_s: float, ttft_s: float
) -> None:
    arrivals = {"process": "uniform", "rate_rps": rate}
    path = write(tmp_path, workload={"arrivals": arrivals}, slo={"ttft": ttft_s, "tpot_s": tpot_s})
    config = load_config(path)
    experiment = build(config, "test")
    needs = demand(config, experiment.model, experiment.workload, 0.95)
    if ruled_out(config, needs) is not None:
        summary = summarize_run(simulate(experiment.workload, experiment.setup), experiment)
        assert summary["slo_attainment"] < 0.95


@pytest.mark.parametrize(
    ("requests", "share", "allowed"), [(100, 0.99, 1), (99, 0.99, 0), (19366, 0.99, 193)]
)
def test_how_many_may_miss(requests: int, share: float, allowed: int) -> None:
    assert allowance(requests, share) == allowed


# -- traffic, binding, bad input --------------------------------------------------------------------------


def test_traffic_is_multiplied_where_the_arrivals_say_how_much_there_is(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert at_load(config, 1.5) == {"workload.arrivals.rate_rps": 18.0}
    trace = config.model_copy(
        update={"workload": config.workload.model_copy(update={"arrivals": {"process": "trace"}})}
    )
    assert at_load(trace, 2.0) == {"workload.arrivals.time_scale": 0.5}
    assert at_load(trace, 1.0) == {}


def test_what_binds_is_read_off_a_run_that_fails(tmp_path: Path) -> None:
    def of(**missed: float) -> dict[str, Any]:
        strain = {"busy_share": 0.5, "kv_peak": 0.5, "kv_full_share": 0.0, "late_queue_share": 0.9}
        shares = {"ttft": 0.0, "tpot": 0.0, "unserved": 0.0} | missed
        return {"missed": shares, "pressure": strain, "mfu": 0.3, "mbu": 0.2}

    assert binding(of()) is None
    found = [binding(of(ttft=0.1)), binding(of(tpot=0.1)), binding(of(unserved=0.2))]
    assert [each and each.what for each in found] == ["queueing", "compute", "KV memory"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"plan": {"policies": {"x": {"scheduler.prioritee": "fcfs"}}}}, "did you mean 'priority'"),
        ({"plan": {"policies": {"x": {"slo.tpot_s": 1}}}}, "a policy can't change 'slo.tpot_s'"),
        ({"plan": {"devices": ["h100"]}}, "h100"),
        ({"plan": {"prices": {"b200": 1.0}}}, "is not one of the plan's devices"),
        ({"plan": {"gpus": 1, "tp": [2]}}, "no deployment"),
        ({"plan": {"attainment": 1.5}}, "at most 1"),
        ({"sweep": {"seed": [1]}}, "is for `convoy sweep`"),
        ({"capacity": {"min_seeds": 5, "max_seeds": 2}}, "must not be below min_seeds"),
    ],
)
def test_bad_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    assert main(["plan", str(write(tmp_path, **changes)), "--out", str(tmp_path / "plan")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "plan").exists()


def test_where_nothing_holds_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, slo={"ttft": 0.02}, plan={"gpus": 1, "devices": ["a100-80gb-sxm"]})
    assert main(["plan", str(path), "--out", str(tmp_path / "plan"), "--jobs", "1", "--no-plots"]) == 1
    assert "No deployment of up to 1 GPUs holds" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan/plan.json").read_text())["answer"] is None
