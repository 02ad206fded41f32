"""``convoy validate``: each rung is told from the others, and the exit status says what the table says."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from experiments.batch_times import BETWEEN, BatchTimes, ErrorSummary, batch_times
from experiments.build import Experiment, build
from experiments.cases import load_cases
from experiments.cli import main
from experiments.config import RequestTolerance
from experiments.ladder import compare_requests
from experiments.live import serve_live
from experiments.live_records import LiveRun
from experiments.load import load_config
from experiments.pace import measured_paces
from policies.batch import Batch, Load
from policies.scheduler import Scheduler, SchedulerSettings
from profiler.overheads import HostOverhead
from sim.cluster import Cluster, Setup, simulate
from sim.paced import RUN, Factors, Pace, bound_of, simulate_paced
from sim.replayed import RecordedRun, delay_until, replay, slices_of
from sim.replica import Replica
from specs.errors import InputError
from tests.fakes import LinearCost
from tests.test_live import CONFIG
from traces.records import RunRecords
from traces.slices import SliceLog
from traces.stages import stage_starts
from traces.workload import Workload

pytest.importorskip("torch")
from runtime.launcher import RankError

ROOT = Path(__file__).resolve().parents[1]
LOOSE = {"p50": 1e6, "p90": 1e6, "most_noise": 1e6}
TIGHT = {"p50": 1e-9, "p90": 1e-9, "noise_factor": 0.0, "most_noise": 1e6}


def write(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    path = folder / "C.yaml"
    path.write_text(yaml.safe_dump(CONFIG | (changes or {}), sort_keys=False))
    return path


# -- replay: a simulation under recorded times ------------------------------------------------------------


Slower = Callable[[Batch, float], float]
"""How many times as long as predicted a batch takes that begins then."""


class _Noting(Replica):
    """A replica that records what a live run would: slices and times."""

    def __init__(
        self,
        *arguments: Any,
        log: SliceLog,
        ends: list[dict[int, float]],
        bounds: list[int],
        slower: Slower,
        **options: Any,
    ) -> None:
        self._log, self._ends, self._bounds, self._slower = log, ends, bounds, slower
        super().__init__(*arguments, **options)

    def stage_s(self, batch: Batch, stage: int) -> float:
        if stage == 0:
            self._log.add(batch.id, slices_of(batch))
            self._ends.append({-1: self.env.now})
            self._bounds.append(bound_of(batch.loads, self.cost))
        # Slower than predicted by a factor that changes from batch to batch.
        time_s = super().stage_s(batch, stage) * self._slower(batch, self.env.now)
        self._ends[batch.id][stage] = self.env.now + time_s
        return time_s


def experiment(tmp_path: Path, **changes: Any) -> Experiment:
    path = write(tmp_path, changes)
    return build(load_config(path), str(path))


def noted(
    made: Experiment, bounds: list[int] | None = None, slower: float | Slower = 0.37
) -> tuple[RecordedRun, LiveRun]:
    """A run in which batches take other times than predicted, and its records; ``bounds`` is filled with what
    each batch was bound by."""
    bounds = [] if bounds is None else bounds
    factor = slower if callable(slower) else lambda batch, now_s: 1.0 + slower * (batch.id % 5)
    log: SliceLog = SliceLog()
    ends: list[dict[int, float]] = []

    def replica(*arguments: Any, **options: Any) -> Replica:
        return _Noting(*arguments, log=log, ends=ends, bounds=bounds, slower=factor, **options)

    records = Cluster(made.workload, made.setup, step_by_step=True, replica=replica).run()
    stages = made.parallel.spp
    run = RecordedRun(
        log.slices(),
        np.array([each[-1] for each in ends]),
        np.array([[each[stage] for stage in range(stages)] for each in ends]),
    )
    return run, LiveRun(records, run.slices)


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"parallel": {"spp": 2}},
    {"parallel": {"kvp": 2, "kvp_tokens_per_group": 128}},
    {"parallel": {"tp": 2, "spp": 3}},
    {"parallel": {"kvp": 2, "spp": 2, "kvp_tokens_per_group": 128}},
    {"scheduler": {"priority": "fcfs", "chunking": "static", "chunk_tokens": 100}},
    {
        "scheduler": {
            "priority": "lars",
            "chunking": "adaptive",
            "space_sharing": True,
            "long_request_tokens": 200,
        }
    },
]


@pytest.mark.parametrize("changes", LAYOUTS)
def test_recorded_times_give_the_recorded_batches(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = experiment(tmp_path, **changes)
    run, live = noted(made)
    parity = replay(made.workload, made.setup, run)
    assert parity.divergence is None
    assert parity.batches == len(run.end_s)
    assert parity.tokens == live.records.work.tokens


@pytest.mark.parametrize("changes", LAYOUTS)
def test_iterations_are_predicted_from_slices_as_the_simulator_does(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    made = experiment(tmp_path, **changes)
    made.iteration.stage_gap = HostOverhead(base_s=4e-4, per_request_s=3e-5, prefill_s=2e-4)
    bounds: list[int] = []
    _, live = noted(made, bounds)
    times = batch_times(live, made.workload, made.iteration, made.setup.sharding)
    factor = 1.0 + 0.37 * (live.records.batches["batch"] % 5)
    np.testing.assert_allclose(times.measured_s, times.predicted_s * factor, rtol=1e-9)
    kinds = live.records.batches["num_decodes"] > 0
    np.testing.assert_array_equal(times.kind < 2, kinds)
    np.testing.assert_array_equal(times.bound, np.array(bounds)[live.records.batches["batch"]])
    np.testing.assert_allclose(times.measured_wait_s, times.predicted_wait_s, rtol=1e-9, atol=1e-12)
    assert (times.measured_wait_s.max() > 4e-4) == (made.parallel.spp > 1)
    by_part = times.errors().by_part
    assert list(by_part) == ([BETWEEN] if made.parallel.spp > 1 else [])  # host times weren't recorded
    for predicted_s, measured_s in by_part.values():
        assert 0.0 < predicted_s == pytest.approx(measured_s)


def test_one_token_more_or_less_is_found(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    run, _ = noted(made)
    at = 20
    tokens = run.slices.tokens.copy()
    tokens[at] += 1
    batch = int(run.slices.batch[at])
    parity = replay(made.workload, made.setup, replace(run, slices=replace(run.slices, tokens=tokens)))
    assert parity.divergence is not None and parity.divergence.batch == batch == parity.batches
    request = int(run.slices.request_id[at])
    assert f"batch {batch} holds [request {request}: {tokens[at] - 1} behind" in parity.divergence.what


def test_a_batch_too_many_or_too_few_is_found(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    run, _ = noted(made)
    count = len(run.end_s)
    kept = run.slices.batch < count - 1
    columns = {name: getattr(run.slices, name)[kept] for name in type(run.slices).__slots__}
    shorter = RecordedRun(replace(run.slices, **columns), run.start_s[:-1], run.end_s[:-1])
    parity = replay(made.workload, made.setup, shorter)
    assert parity.divergence is not None
    assert parity.divergence.what.endswith(f"the record ended with {count - 1} batches")
    fewer = replace(made.workload, output_tokens=np.minimum(made.workload.output_tokens, 1))
    found = replay(fewer, made.setup, run).divergence
    assert found is not None


def test_another_policy_diverges(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    run, _ = noted(made)
    other = experiment(tmp_path, scheduler={"priority": "fcfs", "chunking": "static", "chunk_tokens": 64})
    assert replay(other.workload, other.setup, run).divergence is not None


def test_a_slower_machine_decides_as_before_and_takes_longer(tmp_path: Path) -> None:
    made = experiment(tmp_path, scheduler={"priority": "fcfs", "chunking": "static", "chunk_tokens": 4096})
    one = replace(made.workload, arrival_s=np.arange(len(made.workload)) * 100.0)  # one at a time
    plain, slowed = simulate(one, made.setup), simulate_paced(one, made.setup, [Pace(*[Factors((1.7,))] * 3)])
    np.testing.assert_allclose(slowed.ttft_s, 1.7 * plain.ttft_s, rtol=1e-6)
    np.testing.assert_allclose(slowed.e2e_s, 1.7 * plain.e2e_s, rtol=1e-6)


def test_each_bound_has_its_own_pace(tmp_path: Path) -> None:
    """By hand: in a request of its own the first token is the chunk's, the rest are decodes'."""
    made = experiment(tmp_path, scheduler={"priority": "fcfs", "chunking": "static", "chunk_tokens": 4096})
    one = replace(made.workload, arrival_s=np.arange(len(made.workload)) * 100.0)
    pace = Pace(Factors((3.0,)), Factors((2.0,)), Factors((100.0,)))
    plain, paced = simulate(one, made.setup), simulate_paced(one, made.setup, [pace])
    np.testing.assert_allclose(paced.ttft_s, 2.0 * plain.ttft_s, rtol=1e-6)
    np.testing.assert_allclose(
        paced.e2e_s - paced.ttft_s, 3.0 * (plain.e2e_s - plain.ttft_s), rtol=1e-6, atol=1e-12
    )


def test_factors_are_drawn_in_runs_as_often_as_they_weigh() -> None:
    """By hand: a batch of three seconds at 1 and one of a second at 3 took 1.5 times the four in the mean."""
    two = Factors((3.0, 1.0), (1.0, 3.0))
    assert two.mean == pytest.approx(1.5)
    drawn = list(islice(two.drawn(Random(5)), 4000))
    assert set(drawn) == {1.0, 3.0} and np.mean(drawn) == pytest.approx(1.5, abs=0.05)
    # One that was held up five hundredfold, and short, changes none of the others.
    held_up = Factors([1.0] * 999 + [500.0], [1.0] * 999 + [1e-3])
    assert held_up.mean == pytest.approx(1.0, abs=1e-2)
    drawn = list(islice(held_up.drawn(Random(7)), 20_000))
    assert np.median(drawn) == 1.0 and set(drawn) == {1.0, 500.0}
    # Runs follow each other, and long batches are in more of them.
    many = Factors(range(1000), [1.0] * 500 + [3.0] * 500)
    drawn = list(islice(many.drawn(Random(6)), 400 * RUN))
    steps = np.diff(drawn) % 1000
    assert np.count_nonzero(steps != 1.0) in range(350, 400)
    assert np.mean(np.array(drawn) >= 500) == pytest.approx(0.75, abs=0.08)


def test_batches_that_take_unequally_long_make_queues_longer() -> None:
    """Pollaczek and Khinchine: at load ρ one server's mean wait is ρ · (1 + c²) ÷ 2(1 − ρ) services, where c²
    is the variance of a service time ÷ its mean squared: 0.25 for factors of 0.5 and 1.5, 0 without."""
    rng = np.random.default_rng(3)
    unequal = Factors(rng.choice([0.5, 1.5], 20_000), np.ones(20_000))
    count, load = 60_000, 0.8
    workload = Workload(
        prompt_tokens=np.ones(count, dtype=np.int32),
        output_tokens=np.ones(count, dtype=np.int32),
        arrival_s=np.cumsum(rng.exponential(1.0 / load, count)),
        slo_class=None,
    )
    one_by_one = SchedulerSettings(max_batch_requests=1, chunk_tokens=16)
    setup = Setup(LinearCost(base_s=1.0), kv_capacity_tokens=1 << 20, scheduler=one_by_one)
    for factors in (Factors(), unequal):
        records = simulate_paced(workload, setup, [Pace(factors, factors, factors)])
        wait_s = np.mean(records.ttft_s) - 1.0
        variance = np.mean((np.array(factors.values) - 1.0) ** 2)
        assert wait_s == pytest.approx(load * (1.0 + variance) / (2.0 * (1.0 - load)), rel=0.08)


def test_every_stage_and_every_seed_has_its_own_draws(tmp_path: Path) -> None:
    """One prompt of one chunk through two stages that take three and five times as long; by hand."""
    made = experiment(tmp_path, parallel={"spp": 2})
    one = replace(made.workload.head(1), output_tokens=np.ones(1, dtype=np.int32), arrival_s=np.zeros(1))
    paces = [Pace(*[Factors((factor,))] * 3) for factor in (3.0, 5.0)]
    first, second = _stages_s(simulate(one, made.setup)), _stages_s(simulate_paced(one, made.setup, paces))
    np.testing.assert_allclose(second, first * [3.0, 5.0], rtol=1e-9)
    scattered = [Pace(*[Factors((1.0, 2.0, 4.0), (1.0, 1.0, 1.0))] * 3)] * 2
    runs = [simulate_paced(made.workload, made.setup, scattered, seed) for seed in (0, 0, 1)]
    ends_s = [run.batches["end_s"] for run in runs]
    np.testing.assert_array_equal(ends_s[0], ends_s[1])
    assert not np.array_equal(ends_s[0], ends_s[2])


def _stages_s(records: RunRecords) -> NDArray[np.float64]:
    """Seconds in each stage, all batches together."""
    batches = records.batches
    took_s = batches["end_s"] - batches["start_s"]
    return np.array([took_s[batches["stage"] == stage].sum() for stage in (0, 1)])


def test_attention_binds_a_chunk_behind_a_long_context() -> None:
    """By hand: 10 tokens cost 10 s but for attention, which costs 2 s a chunk token behind 200."""
    cost = LinearCost(token_s=1.0, pair_s=0.01)
    for context, decodes, work in (
        (50, 0, 1),
        (99, 0, 1),
        (101, 0, 2),
        (101, 4, 1),
        (200, 4, 2),
        (None, 4, 0),
    ):
        load = Load()
        if context is not None:
            load.count_chunk(10, 0, cost.chunk_attention_s(10, context))
        load.count_decodes(decodes, decodes, 10_000, 1e9)
        assert bound_of((Load(), load), cost) == work


def test_paces_are_sums_by_bound_and_stage() -> None:
    """Decodes 2 ×, linear ones 3 ×; too few of attention in stage 0 and none in stage 1 take that of all."""
    bound = np.array([0] * 10 + [1] * 10 + [2] * 9 + [0] * 10)
    stage = np.array([0] * 29 + [1] * 10)
    predicted_s = np.linspace(1.0, 2.0, 39)
    factor = np.where(stage == 1, 4.0, np.array([2.0, 3.0, 5.0])[bound])
    parts_s = np.stack([predicted_s, np.zeros(39), np.zeros(39)], axis=1)
    waits_s = np.zeros((2, 39))
    held = (0 * bound, bound, stage, 0 * bound, 0.0 * bound)
    times = BatchTimes(parts_s, parts_s * np.nan, factor * predicted_s, *waits_s, *held)
    first, second, third = measured_paces(times, 3)
    of_all = float((factor * predicted_s)[:29].sum() / predicted_s[:29].sum())
    assert [first.of(bound).mean for bound in range(3)] == pytest.approx([2.0, 3.0, of_all])
    assert set(np.round(first.attention.values, 9)) == {2.0, 3.0, 5.0}
    assert [second.of(bound).mean for bound in range(3)] == pytest.approx([4.0] * 3)
    assert third == Pace(*[Factors(is_shared=True)] * 3)
    shared = [each.of(bound).is_shared for each in (first, second) for bound in range(3)]
    assert shared == [False, False, True, False, True, True]


def test_how_batches_came_to_begin_in_a_later_stage() -> None:
    """By hand: the first is sent at 2 and begins at 2.5; the second is sent at 4, while the stage is busy
    until 5, and begins at 6; the third was never sent on."""
    table = [
        (0, 0, 0.0, 2.0),
        (1, 0, 2.0, 4.0),
        (0, 1, 2.5, 5.0),
        (2, 0, 4.0, 9.0),
        (1, 1, 6.0, 7.0),
        (3, 1, 8.0, 9.0),
    ]
    number, stage, start_s, end_s = (np.array(column) for column in zip(*table, strict=True))
    found = stage_starts({"batch": number, "stage": stage, "start_s": start_s, "end_s": end_s})
    assert found.rows.tolist() == [2, 4]
    assert found.formed_s.tolist() == [0.0, 2.0]
    assert (found.sent_s.tolist(), found.free_s.tolist()) == ([2.0, 4.0], [0.0, 5.0])
    assert found.waited_s.tolist() == [0.5, 1.0]
    nothing = stage_starts({name: np.zeros(0) for name in ("batch", "stage", "start_s", "end_s")})
    assert len(nothing.rows) == 0


def test_a_delay_ends_at_the_very_moment() -> None:
    rng = np.random.default_rng(1)
    for now_s, ahead_s in zip(rng.uniform(0, 1e4, 2000), rng.uniform(0, 1e-2, 2000), strict=True):
        moment_s = float(now_s + ahead_s)
        assert float(now_s) + delay_until(moment_s, float(now_s)) == moment_s
    assert delay_until(1.0, 2.0) == 0.0


# -- the figures ------------------------------------------------------------------------------------------


def test_error_summaries_by_hand() -> None:
    errors = ErrorSummary.of(np.array([1.1, 1.8, 3.0, 0.5]), np.array([1.0, 2.0, 3.0, 0.0]))
    assert errors is not None and errors.count == 3
    assert errors.p50 == pytest.approx(0.1) and errors.p90 == pytest.approx(0.1)
    assert errors.bias == pytest.approx(5.9 / 6.0 - 1.0)
    assert ErrorSummary.of(np.zeros(2), np.zeros(2)) is None


def summary(ttft_s: float, tpot_s: float | None = 0.01) -> dict[str, Any]:
    result = {"ttft_s": dict.fromkeys(("mean", "p50", "p90", "p99"), ttft_s)}
    return (
        result
        if tpot_s is None
        else result | {"tpot_s": dict.fromkeys(("mean", "p50", "p90", "p99"), tpot_s)}
    )


def test_an_error_may_be_as_large_as_the_tolerance_or_the_noise() -> None:
    tolerance = RequestTolerance(p50=0.05, p90=0.1, noise_factor=1.5)
    # Live runs of 0.9 and 1.1 s: 20 % noise, so 30 % are allowed.
    rows = {
        (row.metric, row.statistic): row
        for row in compare_requests(
            summary(1.29), [], [summary(1.1)], [summary(0.9), summary(1.1)], tolerance
        )
    }
    ttft = rows["ttft_s", "p50"]
    assert (ttft.live_s, ttft.error, ttft.noise, ttft.allowed) == pytest.approx((1.0, 0.29, 0.2, 0.3))
    assert ttft.passes and rows["ttft_s", "p99"].allowed is None
    tpot = rows["tpot_s", "p90"]
    assert (tpot.error, tpot.noise, tpot.allowed) == pytest.approx((0.0, 0.0, 0.1))
    late = compare_requests(summary(1.31), [], [summary(1.0)], [summary(0.9), summary(1.1)], tolerance)
    assert not all(row.passes for row in late)
    fair = tolerance.model_copy(update={"speed": "measured"})
    paced = compare_requests(summary(2.0), [summary(1.5)], [summary(1.04)], [summary(1.0)], fair)
    assert all(row.passes and row.speed == "measured" for row in paced)
    slowed = compare_requests(
        summary(2.0), [summary(0.9), summary(1.14)], [summary(1.5)], [summary(1.0)], fair
    )
    assert all(row.passes and row.speed == "probed" for row in slowed)
    assert slowed[0].error_probed == pytest.approx(0.02) == pytest.approx(slowed[0].judged)
    as_it_is = compare_requests(summary(1.0), [summary(2.0)], [summary(2.0)], [summary(1.0)], fair)
    assert all(row.passes and row.speed == "profile" for row in as_it_is)
    strict = compare_requests(summary(2.0), [summary(1.0)], [summary(1.0)], [summary(1.0)], tolerance)
    assert {
        (row.passes, row.speed) for row in strict if row.metric == "ttft_s" and row.allowed is not None
    } == {(False, "profile")}
    several = compare_requests(summary(1.0), [], [summary(0.9), summary(1.3)], [summary(1.0)], tolerance)
    assert several[0].error_at_pace == pytest.approx(0.1) and several[0].error == 0.0
    assert several[0].scatter_at_pace == pytest.approx(0.2 / 1.1)
    alone = compare_requests(summary(1.06), [], [summary(1.0)], [summary(1.0)], tolerance)
    assert alone[0].noise is None and not all(row.passes for row in alone)


def test_a_latency_that_one_side_lacks_never_passes() -> None:
    rows = compare_requests(summary(1.0, None), [], [summary(1.0)], [summary(1.0)], RequestTolerance())
    tpot = [row for row in rows if row.metric == "tpot_s"]
    assert tpot and all(row.error == float("inf") for row in tpot)
    assert not all(row.passes for row in tpot)


# -- the command ------------------------------------------------------------------------------------------


def run(path: Path, *arguments: str) -> int:
    return main(["validate", str(path), "--out", str(path.parent / "out"), "--force", *arguments])


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a validation with two live runs that passes whatever the times are."""
    folder = tmp_path_factory.mktemp("validated")
    path = write(folder, {"validate": {"request": LOOSE}})
    assert run(path, "--quiet") == 0
    return folder / "out"


def test_a_validation_leaves_everything_its_verdict_rests_on(validated: Path) -> None:
    data = json.loads((validated / "summary.json").read_text())
    assert data["passes"] and data["live_runs"] == 2
    rungs = {rung["name"]: rung["status"] for rung in data["rungs"]}
    assert list(rungs) == ["operator", "iteration", "decisions", "request"]
    assert rungs["operator"] == "unknown" and rungs["decisions"] == rungs["request"] == "holds"
    assert {(row["metric"], row["statistic"]) for row in data["requests"]} == {
        (metric, statistic)
        for metric in ("ttft_s", "tpot_s", "tbt_s", "e2e_s")
        for statistic in ("mean", "p50", "p90", "p99")
    }
    assert all(row["noise"] is not None for row in data["requests"])
    assert {path.name for path in (validated / "plots").iterdir()} == {
        f"{name}_cdf.png" for name in ("ttft", "tpot", "tbt", "e2e")
    }
    for name in ("live-1", "live-2", "simulated"):
        assert (validated / name / "requests.csv").is_file()
    suite = ElementTree.parse(validated / "junit.xml").getroot()[0]
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("tiny", "4", "0")


def test_stored_runs_give_the_same_verdict_for_ever(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"validate": {"request": LOOSE}})
    assert run(path, "--replay", str(validated)) == 0
    text = capsys.readouterr().out
    assert "simulated against 2 live runs from disk" in text
    first = json.loads((validated / "summary.json").read_text())
    again = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in ("decisions", "iterations", "operators"):
        assert again[name] == first[name]
    for one, other in zip(first["requests"], again["requests"], strict=True):
        assert one["live_s"] == pytest.approx(other["live_s"], rel=2e-4)
        assert one["simulated_s"] == other["simulated_s"]
    assert not (tmp_path / "out" / "live-1").exists()


def test_outside_tolerance_is_exit_1_and_names_the_lowest_rung(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = {"iteration": {"p50": 1e-9, "p90": 1e-9}, "request": TIGHT}
    path = write(tmp_path, {"validate": tight})
    assert run(path, "--replay", str(validated)) == 1
    assert "tiny: outside tolerance (iteration, request); the rung to look at is iteration:" in (
        capsys.readouterr().out
    )
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    found = {test.get("name"): [child.tag for child in test] for test in suite}
    assert found["request"] == ["failure"] and found["iteration"] == ["skipped"]
    assert found["decisions"] == ["system-out"] and suite.get("failures") == "1"


def test_decisions_under_another_predictor_are_unknown_and_not_blamed(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = {"source": "roofline", "host": {"base_s": 0.0185}}
    path = write(tmp_path, {"predictor": slower, "validate": {"request": LOOSE}})
    assert run(path, "--replay", str(validated)) == 0
    assert "recorded under another cost model than today's" in capsys.readouterr().out


def test_ctrl_c_keeps_the_live_run_that_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    served: list[LiveRun] = []

    def serve(made: Experiment, progress: Any) -> LiveRun:
        if served:
            signal.raise_signal(signal.SIGINT)
        served.append(serve_live(made, progress))
        return served[0]

    monkeypatch.setattr("experiments.validate.serve_live", serve)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    path = write(tmp_path, {"validate": {"request": LOOSE}})
    assert run(path, "--no-plots") == 130
    data = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert data["interrupted"] and not data["passes"] and data["live_runs"] == 1
    assert data["rungs"][2] == {"name": "decisions", "status": "holds", "text": data["rungs"][2]["text"]}
    assert (tmp_path / "out" / "live-1" / "requests.csv").is_file()
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    assert suite.get("errors") == "1"


@pytest.mark.parametrize("where", ["summarize_run", "simulate_paced", "replay"])
def test_ctrl_c_while_judging_is_no_verdict(
    validated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """In the middle of a simulation, too, of which the part that was done is not judged."""
    module = "experiments.validate" if where == "summarize_run" else "experiments.rungs"
    real = getattr(import_module(module), where)

    def interrupting(*arguments: Any) -> Any:
        if where == "summarize_run":
            signal.raise_signal(signal.SIGINT)
        original = Scheduler.next_batch

        def next_batch(scheduler: Scheduler, now_s: float) -> Batch | None:
            if scheduler.outstanding > 2:
                signal.raise_signal(signal.SIGINT)
            return original(scheduler, now_s)

        with monkeypatch.context() as patched:
            patched.setattr(Scheduler, "next_batch", next_batch)
            return real(*arguments)

    monkeypatch.setattr(f"{module}.{where}", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert run(write(tmp_path), "--replay", str(validated), "--no-plots") == 130
    assert "no verdict: interrupted; --replay of this folder judges" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["interrupted"]


def test_a_rank_that_dies_fails_its_case_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(made: Experiment, progress: Any) -> LiveRun:
        raise RankError("rank 1 died: killed by SIGKILL")

    monkeypatch.setattr("experiments.validate.serve_live", serve)
    path = write(tmp_path)
    assert run(path) == 1
    assert "tiny: no verdict: rank 1 died: killed by SIGKILL\n" in capsys.readouterr().out
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    assert suite[0][0].get("message") == "rank 1 died: killed by SIGKILL"


BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({}, ["--replay", "nowhere"], "--replay nowhere: there is no such folder\n"),
    ({}, ["--replay", str(ROOT)], f"--replay {ROOT}: holds no live run"),
    ({}, ["--case", "x"], "--case x: "),
    ({"parallel": {"replicas": 2}}, [], "the live runtime serves one replica, not 2"),
    ({"validate": {"runs": 0}}, [], "validate.runs: must be at least 1, not 0"),
    ({"validate": {"request": {"p50": -1.0}}}, [], "validate.request.p50: must be"),
    ({"validate": {"cases": [{"a": {"seeed": 1}}]}}, [], "'seeed' is not a key of the configuration"),
    ({"validate": {"cases": [{"a b": {}}]}}, [], "validate.cases"),
    ({"validate": {"cases": [{}]}}, [], "validate.cases.0"),
    ({"validate": {"cases": [{"a": {"name": "b"}}]}}, [], "a case can't change 'name'"),
    ({"sweep": {"seed": [1]}}, [], "sweep: take it out"),
]


@pytest.mark.parametrize(("changes", "arguments", "message"), BAD)
def test_bad_input_is_exit_2_and_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    path = write(tmp_path, changes)
    assert run(path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_replaying_a_set_of_which_some_is_recorded_says_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ROOT / "experiments" / "validate"
    whole = ["validate", str(sets / "full.yaml"), "--replay", str(sets / "records" / "full")]
    assert main([*whole, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "fcfs-static.one-30: there is no such folder; " in error and error.count("\n") == 1
    assert (
        "lars-sharing.kvp2-60, lars-sharing.one-60, lars-sharing.spp2-60, lars-sharing.tp2-60 (--case"
        in error
    )


# -- cases ------------------------------------------------------------------------------------------------

AXES = [
    {"slow": {"workload.arrivals.rate_rps": 5}, "fast": {"workload.arrivals.rate_rps": 50}},
    {
        "fcfs": {"scheduler": {"priority": "fcfs"}},
        "lars": {"scheduler.priority": "lars", "validate.request.p50": 0.2},
    },
]


def test_every_combination_is_a_case_with_a_configuration_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, {"validate": {"cases": AXES}})
    cases = {case.name: case.config for case in load_cases(path, ["seed=9"])}
    assert list(cases) == ["slow.fcfs", "slow.lars", "fast.fcfs", "fast.lars"]
    chosen = cases["fast.lars"]
    assert chosen.name == "tiny.fast.lars" and chosen.seed == 9
    assert chosen.workload.arrivals["rate_rps"] == 50 and chosen.scheduler.chunking == "adaptive"
    assert chosen.validation.request.p50 == 0.2 and chosen.validation.cases == []
    assert cases["slow.fcfs"].scheduler.chunking == "static"  # the whole section was replaced


def test_cases_are_chosen_by_name_or_pattern(tmp_path: Path) -> None:
    path = write(tmp_path, {"validate": {"cases": AXES}})
    assert [case.name for case in load_cases(path, [], ["*.lars"])] == ["slow.lars", "fast.lars"]
    assert [case.name for case in load_cases(path, [], ["fast.fcfs", "slow.*"])] == [
        "slow.fcfs",
        "slow.lars",
        "fast.fcfs",
    ]
    with pytest.raises(InputError, match=r"--case fast.lar: .*did you mean 'fast.lars'"):
        load_cases(path, [], ["fast.lar"])


def test_cases_are_validated_one_by_one_and_the_worst_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = [{"passes": {"validate.request": LOOSE}, "fails": {"validate.request": TIGHT}}]
    path = write(tmp_path, {"validate": {"runs": 1, "cases": axes}})
    assert run(path, "--no-plots") == 1
    assert "1 of 2 cases within tolerance" in capsys.readouterr().out
    suites = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert [(suite.get("name"), suite.get("failures")) for suite in suites] == [
        ("passes", "0"),
        ("fails", "1"),
    ]
    data = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [data["cases"][name]["passes"] for name in ("passes", "fails")] == [True, False]
    # a case's live run is found again by its name, and its configuration stands for itself
    replay_options = ["--replay", str(tmp_path / "out"), "--case", "passes"]
    again = ["validate", str(path), "--out", str(tmp_path / "again"), "--quiet", *replay_options]
    assert main(again) == 0
    assert load_config(tmp_path / "out" / "passes" / "config.yaml").validation.cases == []


# -- the convoy effect, simulated and live ----------------------------------------------------------------

PREEMPTION = Path(__file__).parent.parent / "experiments" / "validate" / "preemption.yaml"


def short_prompts_ttft_s(records: RunRecords) -> float:
    """The median over the short prompts."""
    return float(np.median(records.ttft_s[records.requests["prompt_tokens"] < 1000]))


def test_lars_spares_short_prompts_the_wait_for_a_long_one() -> None:
    ttft_s = {}
    for case in load_cases(PREEMPTION, []):
        made = build(case.config, case.where)
        ttft_s[case.name] = short_prompts_ttft_s(simulate(made.workload, made.setup))
    assert ttft_s["fcfs"] > 5 * ttft_s["lars"]


@pytest.mark.slow
def test_lars_spares_short_prompts_the_wait_for_a_long_one_live() -> None:
    ttft_s = {}
    for case in load_cases(PREEMPTION, []):
        made = build(case.config, case.where)
        ttft_s[case.name] = short_prompts_ttft_s(serve_live(made).records)
    assert ttft_s["fcfs"] > 5 * ttft_s["lars"]


def test_the_set_for_a_gpu_is_ready() -> None:
    """Six cases whose live runs fit into one short session, with prompts of 100 tokens to over 100,000."""
    cases = load_cases(ROOT / "experiments/validate/gpu.yaml", [])
    assert len(cases) == 6
    served_s = 0.0
    for case in cases:
        experiment = build(case.config, case.where)
        assert experiment.device.name == "h100-sxm"
        prompts = experiment.workload.prompt_tokens
        assert prompts.min() <= 130 and prompts.max() >= 100_000
        records = simulate(experiment.workload, experiment.setup)
        assert np.isfinite(records.requests["finished_s"]).all()
        served_s += 2 * records.end_s
    assert served_s < 540.0
