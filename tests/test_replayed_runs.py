"""Simulations under the times of a live run: fed back, at its pace; and what its batches took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from experiments.batch_times import BETWEEN, BatchTimes, batch_times
from experiments.build import Experiment, build
from experiments.live_records import LiveRun
from experiments.load import load_config
from experiments.pace import measured_paces
from policies.batch import Batch, Load
from policies.scheduler import SchedulerSettings
from profiler.overheads import HostOverhead
from sim.cluster import Cluster, Setup, simulate
from sim.paced import RUN, Factors, Pace, bound_of, simulate_paced
from sim.replayed import RecordedRun, delay_until, replay, slices_of
from sim.replica import Replica
from tests.fakes import LinearCost
from tests.test_live import CONFIG
from traces.records import RunRecords
from traces.slices import SliceLog
from traces.stages import stage_starts
from traces.workload import Workload

pytest.importorskip("torch")


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
    plain, slowed = simulate(one, made.setup), simulate_paced(one, made.setup, [Pace(*[Factors((1.7,))] * 4)])
    np.testing.assert_allclose(slowed.ttft_s, 1.7 * plain.ttft_s, rtol=1e-6)
    np.testing.assert_allclose(slowed.e2e_s, 1.7 * plain.e2e_s, rtol=1e-6)


def test_each_bound_has_its_own_pace(tmp_path: Path) -> None:
    """By hand: in a request of its own the first token is the chunk's, the rest are decodes'."""
    made = experiment(tmp_path, scheduler={"priority": "fcfs", "chunking": "static", "chunk_tokens": 4096})
    one = replace(made.workload, arrival_s=np.arange(len(made.workload)) * 100.0)
    pace = Pace(Factors((100.0,)), Factors((2.0,)), Factors((100.0,)), Factors((3.0,)))
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
        records = simulate_paced(workload, setup, [Pace(*[factors] * 4)])
        wait_s = np.mean(records.ttft_s) - 1.0
        variance = np.mean((np.array(factors.values) - 1.0) ** 2)
        assert wait_s == pytest.approx(load * (1.0 + variance) / (2.0 * (1.0 - load)), rel=0.08)


def test_every_stage_and_every_seed_has_its_own_draws(tmp_path: Path) -> None:
    """One prompt of one chunk through two stages that take three and five times as long; by hand."""
    made = experiment(tmp_path, parallel={"spp": 2})
    one = replace(made.workload.head(1), output_tokens=np.ones(1, dtype=np.int32), arrival_s=np.zeros(1))
    paces = [Pace(*[Factors((factor,))] * 4) for factor in (3.0, 5.0)]
    first, second = _stages_s(simulate(one, made.setup)), _stages_s(simulate_paced(one, made.setup, paces))
    np.testing.assert_allclose(second, first * [3.0, 5.0], rtol=1e-9)
    scattered = [Pace(*[Factors((1.0, 2.0, 4.0), (1.0, 1.0, 1.0))] * 4)] * 2
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
        (None, 1, 3),
        (50, 1, 1),
    ):
        load = Load()
        if context is not None:
            load.count_chunk(10, 0, cost.chunk_attention_s(10, context))
        load.count_decodes(decodes, decodes, 10_000, 1e9)
        assert bound_of((Load(), load), cost) == work


def test_a_decode_is_alone_if_no_group_has_two() -> None:
    loads = [Load(), Load(), Load()]
    for load, decodes in zip(loads, (1, 1, 2), strict=True):
        load.count_decodes(decodes, decodes, 100, 0.0)
    cost = LinearCost(token_s=1.0, pair_s=0.01)
    assert (bound_of(loads[:2], cost), bound_of(loads, cost)) == (3, 0)


def test_paces_are_sums_by_bound_and_stage() -> None:
    """Decodes 2 ×, linear ones 3 ×; too few of attention in stage 0 and none in stage 1 take that of all, as
    lone ones do."""
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
    assert [first.of(bound).mean for bound in range(4)] == pytest.approx([2.0, 3.0, of_all, of_all])
    assert set(np.round(first.attention.values, 9)) == {2.0, 3.0, 5.0}
    assert [second.of(bound).mean for bound in range(4)] == pytest.approx([4.0] * 4)
    assert third == Pace(*[Factors(is_shared=True)] * 4)
    shared = [each.of(bound).is_shared for each in (first, second) for bound in range(4)]
    assert shared == [False, False, True, True, False, True, True, True]


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
