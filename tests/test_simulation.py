"""The event loop against closed forms, hand-computed schedules and its own slow path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.scheduler import SchedulerSettings
from policies.sharding import Sharding
from profiler.decode_run import DecodeRun, Polyline
from profiler.iteration import IterationModel
from profiler.kernels import load_kernels
from profiler.overheads import HostOverhead
from sim.cluster import Cluster, Setup, simulate
from specs import ParallelSpec, get_device, get_model
from specs.errors import InputError
from tests.fakes import LinearCost
from traces.metrics import summarize
from traces.records import FINISHED, REJECTED, UNFINISHED, RunRecords
from traces.synthesis import ClosedLoop
from traces.workload import Workload

ONE_AT_A_TIME = SchedulerSettings(chunking="whole", max_batch_requests=1)
COST = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-9, context_s=1e-8)


def workload(arrivals_s: list[float], prompts: list[int], outputs: list[int]) -> Workload:
    return Workload(
        prompt_tokens=np.array(prompts, dtype=np.int32),
        output_tokens=np.array(outputs, dtype=np.int32),
        arrival_s=np.array(arrivals_s),
    )


def poisson(rate_rps: float, n: int, seed: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, n))


# -- queueing theory ------------------------------------------------------------------------------------


def waits_s(records: RunRecords) -> np.ndarray:
    return records.requests["scheduled_s"] - records.requests["arrival_s"]


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_mean_wait_of_m_d_1(load: float) -> None:
    """Constant service time D: mean wait = ρ·D ÷ (2·(1 − ρ)) (Pollaczek–Khinchine)."""
    n, service_s = 60_000, 1.0
    work = workload(poisson(load, n, 1).tolist(), [100] * n, [1] * n)
    records = simulate(work, Setup(LinearCost(token_s=service_s / 100), 10_000, ONE_AT_A_TIME))
    expected_s = load * service_s / (2 * (1 - load))
    assert waits_s(records).mean() == pytest.approx(expected_s, rel=0.08)


def test_mean_wait_of_m_g_1() -> None:
    """Service times of 0.2 s and 2 s, 9 to 1: mean wait = λ·E[S²] ÷ (2·(1 − ρ)) (Pollaczek–Khinchine)."""
    n, rate_rps = 120_000, 1.5
    prompts = np.where(np.random.default_rng(2).random(n) < 0.1, 200, 20)
    work = workload(poisson(rate_rps, n, 3).tolist(), prompts.tolist(), [1] * n)
    records = simulate(work, Setup(LinearCost(token_s=0.01), 10_000, ONE_AT_A_TIME))
    mean_s, square = 0.9 * 0.2 + 0.1 * 2.0, 0.9 * 0.04 + 0.1 * 4.0
    expected_s = rate_rps * square / (2 * (1 - rate_rps * mean_s))
    assert waits_s(records).mean() == pytest.approx(expected_s, rel=0.08)


def test_littles_law() -> None:
    """The time average of requests in the system equals arrival rate × mean time in it."""
    n = 5000
    rng = np.random.default_rng(4)
    prompts, outputs = rng.integers(10, 2000, n), rng.integers(1, 300, n)
    work = workload(poisson(5.0, n, 5).tolist(), prompts.tolist(), outputs.tolist())
    records = simulate(work, Setup(COST, 500_000))
    arrivals, ends = records.requests["arrival_s"], records.requests["finished_s"]
    grid = np.linspace(0, records.end_s, 100_001)
    inside = np.searchsorted(arrivals, grid, side="right") - np.searchsorted(
        np.sort(ends), grid, side="right"
    )
    assert inside.mean() == pytest.approx(n / records.end_s * records.e2e_s.mean(), rel=0.01)


def test_a_saturated_pipeline_ends_a_batch_every_stage_time() -> None:
    """Two stages of 0.5 s each: 100 whole prompts, one a batch, take (100 + 1) · 0.5 s."""
    cost = LinearCost(token_s=0.01, stages=2)
    settings = replace(ONE_AT_A_TIME, max_batch_requests=8, max_batch_tokens=100, pipeline="microbatch")
    records = simulate(workload([0.0] * 100, [100] * 100, [1] * 100), Setup(cost, 100_000, settings))
    assert records.end_s == pytest.approx(101 * 0.5)


@pytest.mark.parametrize(("chunks", "stages", "handover_s"), [(20, 4, 0.0), (7, 2, 0.0), (20, 4, 0.01)])
def test_stream_pipelining_of_one_prompt(chunks: int, stages: int, handover_s: float) -> None:
    """L chunks through S stages take L + S − 1 stage times with streaming, L · S without.

    At most S batches are in flight, so with hand-overs chunk i waits until chunk i − S is out.
    """
    cost = LinearCost(token_s=0.01, stages=stages, handover_s=handover_s)
    policy = SchedulerSettings(chunk_tokens=100, max_chunk_tokens=100)
    stage_s = 1.0 / stages
    work = workload([0.0], [100 * chunks], [1])
    streamed = simulate(work, Setup(cost, 100_000, policy))
    through_s = 1.0 + (stages - 1) * handover_s
    rounds, place = divmod(chunks - 1, stages)
    assert streamed.end_s == pytest.approx(rounds * through_s + place * stage_s + through_s)
    if handover_s == 0.0:
        assert streamed.end_s == pytest.approx((chunks + stages - 1) * stage_s)
    plain = simulate(work, Setup(cost, 100_000, replace(policy, pipeline="microbatch")))
    assert plain.end_s == pytest.approx(chunks * through_s)


def test_the_convoy_and_how_lars_ends_it() -> None:
    """arXiv 2409.17264, section 4.1: work of 10 s due at 16 s, two of 0.5 s that arrive at 5 s."""
    from policies.slo import Slo, TtftTarget

    work = workload([0.0, 5.0, 5.0], [1000, 50, 50], [1, 1, 1])
    slos = (Slo(TtftTarget(1.6, 1.0)),)
    policy = SchedulerSettings(chunk_tokens=1, target_iteration_s=0.01)
    ttft_s = {}
    for priority in ("fcfs", "edf", "lars"):
        setup = Setup(LinearCost(token_s=0.01), 10_000, replace(policy, priority=priority), slos=slos)
        ttft_s[priority] = simulate(work, setup).ttft_s
    assert ttft_s["fcfs"] == pytest.approx(
        [10.0, 5.5, 6.0], abs=0.011
    )  # the short ones are starved, both miss
    assert ttft_s["edf"] == pytest.approx([11.0, 0.5, 1.0], abs=0.011)
    # The short ones start once ρ has fallen from 1.0 to the long one's 0.6, that is 0.2 s after arrival.
    assert ttft_s["lars"][0] == pytest.approx(11.0, abs=0.02)
    assert ttft_s["lars"][1:].max() < 1.3


# -- fast path against slow path ------------------------------------------------------------------------


@given(
    st.lists(st.floats(0.0, 1.0), min_size=2, max_size=12),
    st.integers(1, 40),
    st.integers(0, 3000),
    st.integers(1, 400),
)
def test_decode_runs_are_the_sum_of_their_steps(
    values: list[float], decodes: int, context: int, steps: int
) -> None:
    knots = np.arange(len(values)) * 300.0 + 10.0
    line = Polyline(knots, np.array(values))
    run = DecodeRun(line, 0.001, context, decodes, steps)
    durations = [0.001 + line.at(context + k * decodes) for k in range(steps)]
    pieces = [p.first_s + k * p.growth_s for p in run.pieces for k in range(p.steps)]
    assert pieces == pytest.approx(durations, abs=1e-9)
    assert run.total_s == pytest.approx(sum(durations), abs=1e-8)
    part = [p.first_s + k * p.growth_s for p in run.pieces_between(1, steps - 1) for k in range(p.steps)]
    assert part == pytest.approx(durations[1 : max(steps - 1, 1)], abs=1e-9)


@given(st.floats(0.0, 1.2), st.integers(1, 300))
def test_the_step_under_way_at_a_moment(share: float, steps: int) -> None:
    line = Polyline(np.array([0.0, 1000.0, 2000.0]), np.array([0.1, 0.2, 0.5]))
    run = DecodeRun(line, 0.05, 500, 10, steps)
    ends = np.cumsum([0.05 + line.at(500 + 10 * k) for k in range(steps)])
    moment_s = share * run.total_s
    step, end_s = run.ending_after(moment_s)
    assert end_s == pytest.approx(ends[step - 1], abs=1e-9)
    assert step == steps or end_s >= moment_s - 1e-9
    assert step == 1 or ends[step - 2] < moment_s + 1e-9


rows = st.lists(
    st.tuples(st.floats(0.0, 3.0), st.integers(1, 900), st.integers(1, 200)), min_size=1, max_size=30
)
policies = st.builds(
    SchedulerSettings,
    priority=st.sampled_from(["fcfs", "srpt", "edf", "lrs", "lars"]),
    chunking=st.sampled_from(["whole", "static", "adaptive"]),
    packing=st.sampled_from(["decode_first", "prefill_first"]),
    pipeline=st.sampled_from(["stream", "microbatch"]),
    max_batch_requests=st.sampled_from([2, 64]),
    admission=st.sampled_from(["in_order", "pass_over"]),
    target_iteration_s=st.just(5e-3),
)


def same_records(fast: RunRecords, slow: RunRecords) -> None:
    for name, column in slow.requests.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(fast.requests[name], column, rtol=0, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(fast.requests[name], column, err_msg=name)
    assert fast.work.iterations == slow.work.iterations
    assert fast.work.attention_pairs == slow.work.attention_pairs
    assert fast.work.kv_tokens_read == slow.work.kv_tokens_read
    one, other = summarize(fast), summarize(slow)
    assert one.get("tbt_s", {}) == pytest.approx(other.get("tbt_s", {}), rel=2e-4)
    same_batches(fast, slow)


def same_batches(fast: RunRecords, slow: RunRecords) -> None:
    """A row that stands for several steps ends as the last of them does."""
    places = np.unique(np.stack([slow.batches["replica"], slow.batches["stage"]]), axis=1).T
    for replica, stage in places.tolist():
        runs, steps = (
            {
                name: column[(records.batches["replica"] == replica) & (records.batches["stage"] == stage)]
                for name, column in records.batches.items()
            }
            for records in (fast, slow)
        )
        last = np.cumsum(runs["steps"]) - 1
        assert last[-1] == len(steps["steps"]) - 1
        np.testing.assert_allclose(runs["end_s"], steps["end_s"][last], rtol=0, atol=1e-9)
        for name in ("num_prefills", "prefill_tokens", "num_decodes", "waiting", "kv_used_blocks"):
            np.testing.assert_array_equal(runs[name], steps[name][last], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(rows, policies, st.sampled_from([1100, 4000, 100_000]), st.integers(1, 3), st.integers(1, 2))
def test_fast_forwarded_runs_equal_step_by_step_runs(
    requests: list[tuple[float, int, int]],
    policy: SchedulerSettings,
    kv_tokens: int,
    stages: int,
    replicas: int,
) -> None:
    times, prompts, outputs = zip(*sorted(requests), strict=True)
    cost = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-9, context_s=3e-8, stages=stages, handover_s=1e-5)
    setup = Setup(cost, kv_tokens, policy, replicas=replicas)
    work = workload(list(times), list(prompts), list(outputs))
    fast, slow = simulate(work, setup), simulate(work, setup, step_by_step=True)
    same_records(fast, slow)
    assert set(fast.requests["status"]) <= {FINISHED, REJECTED}


def test_a_long_run_doesnt_drift_apart() -> None:
    n = 3000
    rng = np.random.default_rng(7)
    work = workload(
        poisson(6.0, n, 8).tolist(), rng.integers(1, 1500, n).tolist(), rng.integers(1, 400, n).tolist()
    )
    setup = Setup(COST, 200_000, SchedulerSettings(priority="lars", chunking="adaptive"))
    fast, slow = simulate(work, setup), simulate(work, setup, step_by_step=True)
    same_records(fast, slow)
    assert len(fast.batches["start_s"]) < 0.5 * len(slow.batches["start_s"])


# -- arrivals, ends and records -------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    n = 400
    work = workload(poisson(20.0, n, 9).tolist(), [500] * n, [50] * n)
    setup = Setup(COST, 100_000, replicas=4, router="random", seed=1)
    first, again = simulate(work, setup), simulate(work, setup)
    for name, column in first.requests.items():
        np.testing.assert_array_equal(column, again.requests[name])
    other = simulate(work, replace(setup, seed=2))
    assert (other.requests["replica"] != first.requests["replica"]).any()


def test_closed_loop_keeps_its_concurrency_and_think_time() -> None:
    n = 60
    work = Workload(np.full(n, 100, np.int32), np.full(n, 1, np.int32))
    setup = Setup(LinearCost(token_s=0.01), 10_000, ONE_AT_A_TIME, closed_loop=ClosedLoop(3, 0.5))
    records = simulate(work, setup)
    starts, ends = records.requests["arrival_s"], records.requests["finished_s"]
    assert (starts[:3] == 0.0).all()
    for start in starts[3:]:
        assert np.isclose(ends + 0.5, start).any()
    moments = np.linspace(0, ends.max(), 2000)
    inside = [((starts <= t) & (ends > t)).sum() for t in moments]
    assert max(inside) <= 3
    # One server of 1 s and 3 clients that think for 0.5 s: the server is never idle after the start.
    assert records.end_s == pytest.approx(60.0, abs=1e-6)


def test_requests_that_never_fit_are_rejected_and_the_closed_loop_goes_on() -> None:
    work = Workload(np.array([10, 99_999, 10], np.int32), np.array([2, 2, 2], np.int32))
    records = simulate(work, Setup(COST, 1600, closed_loop=ClosedLoop(1, 0.0)))
    assert records.requests["status"].tolist() == [FINISHED, REJECTED, FINISHED]
    assert records.requests["replica"].tolist() == [0, -1, 0]
    summary = summarize(records)
    assert (summary["num_finished"], summary["num_rejected"], summary["ttft_s"]["count"]) == (2, 1, 2)


def test_the_clock_stops_and_says_who_is_unfinished() -> None:
    work = workload([0.0, 1.0, 50.0], [100, 100, 100], [2, 10_000, 2])
    records = simulate(work, Setup(COST, 100_000, stop_s=5.0))
    assert records.requests["status"].tolist() == [FINISHED, UNFINISHED]
    assert records.requests["first_token_s"][1] > 1.0
    assert np.isnan(records.requests["finished_s"][1])
    assert records.end_s == 5.0
    assert summarize(records)["slo_attainment"] == 0.5


def test_length_partitioning_keeps_short_prompts_off_the_long_replica() -> None:
    lengths = [10, 9000, 20, 10_000, 30]
    work = workload([0.0, 0.1, 0.2, 0.3, 0.4], lengths, [2] * 5)
    records = simulate(work, Setup(COST, 100_000, replicas=3, router="length_partitioned"))
    replicas = records.requests["replica"]
    assert all((replicas[i] == 2) == (lengths[i] >= 8192) for i in range(5))
    with pytest.raises(InputError, match="replicas"):
        simulate(work, Setup(COST, 100_000, replicas=1, router="length_partitioned"))


def test_a_batch_after_a_pause_takes_longer() -> None:
    """Two prompts come to a replica at rest, one to a busy one; by hand."""
    cost = LinearCost(base_s=1.0, idle_s=0.25)
    work = workload([5.0, 5.5, 20.0], [100] * 3, [3, 1, 2])
    for step_by_step in (False, True):
        records = simulate(work, Setup(cost, 10_000, SchedulerSettings()), step_by_step=step_by_step)
        assert records.requests["first_token_s"].tolist() == [6.25, 7.25, 21.25]
        assert records.requests["finished_s"].tolist() == [8.25, 7.25, 22.25]
    busy = simulate(workload([0.0], [100], [1]), Setup(cost, 10_000))
    assert busy.requests["first_token_s"][0] == 1.0  # it was there from the beginning


def test_a_pipeline_is_at_rest_when_its_last_stage_is() -> None:
    """Stages of a second. The second prompt comes while the first one is in the last stage."""
    cost = LinearCost(base_s=2.0, idle_s=0.25, stages=2)
    records = simulate(workload([1.0, 2.5, 9.0], [100] * 3, [1] * 3), Setup(cost, 10_000))
    assert records.requests["first_token_s"].tolist() == [3.25, 4.5, 11.25]


def test_a_later_stage_gets_ready_while_the_one_before_computes() -> None:
    """Stages of a second. A stage_gap of half a second is hidden from a lone prompt; of a prompt in three
    chunks the second and third begin half a second after the one before is through."""
    for stage_gap_s, lone_s, chunks_s in ((0.0, 3.0, 12.0), (0.5, 3.0, 13.0), (1.5, 3.5, 15.5)):
        cost = LinearCost(base_s=2.0, stages=2, stage_gap_s=stage_gap_s)
        settings = SchedulerSettings(chunk_tokens=100)
        work = workload([1.0, 8.0], [100, 300], [1, 1])
        records = simulate(work, Setup(cost, 10_000, settings))
        assert records.requests["first_token_s"].tolist() == [lone_s, chunks_s]


def test_ctrl_c_keeps_what_finished() -> None:
    n = 1000
    work = workload(poisson(10.0, n, 11).tolist(), [100] * n, [20] * n)

    def stop(now_s: float, finished: int) -> None:
        if finished > 300:
            raise KeyboardInterrupt

    records = simulate(work, Setup(COST, 100_000), progress=stop)
    assert records.interrupted
    assert 300 < (records.requests["status"] == FINISHED).sum() < n
    assert summarize(records)["interrupted"] is True


def test_gaps_between_tokens_add_up_to_the_decode_time() -> None:
    """Σ of all gaps = Σ over requests of (last token − first token), preempted ones included."""
    n = 40
    work = workload([0.001 * i for i in range(n)], [60] * n, [100] * n)
    cluster = Cluster(work, Setup(COST, 1600, SchedulerSettings(watermark=0.0)))
    records = cluster.run()
    summary = summarize(records)
    assert summary["preemptions"] > 0
    assert summary["tbt_s"]["count"] == n * 99
    spans = records.requests["finished_s"] - records.requests["first_token_s"]
    assert summary["tbt_s"]["mean"] * summary["tbt_s"]["count"] == pytest.approx(spans.sum())


def test_quantiles_of_gaps_are_those_of_the_expanded_list() -> None:
    from traces.metrics import describe_gaps

    gaps = np.array([[0.01, 0.001, 50, 3], [0.2, 0.0, 1, 7], [0.005, 0.0, 10, 1]])
    expanded = np.concatenate([np.tile(0.01 + 0.001 * np.arange(50), 3), np.full(7, 0.2), np.full(10, 0.005)])
    found = describe_gaps(gaps)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        expected = np.quantile(expanded, q, method="inverted_cdf")
        assert found[name] == pytest.approx(expected, rel=2e-4)
    assert found["mean"] == pytest.approx(expanded.mean())
    assert (found["max"], found["count"]) == (0.2, len(expanded))
    assert describe_gaps(np.empty((0, 4))) == {}


@pytest.mark.parametrize(("tp", "kvp"), [(1, 1), (2, 1), (1, 2)])
def test_all_time_is_extrapolated_where_nothing_was_measured(tp: int, kvp: int) -> None:
    """On the roofline the share is 1, whatever operators and groups there are."""
    device, model = get_device("h100-sxm"), get_model("tiny-llama")
    parallel = ParallelSpec(tp=tp, kvp=kvp, kvp_tokens_per_group=256)
    cost = IterationModel(model, load_kernels(device, "roofline"), parallel, host=HostOverhead(1e-4, 1e-6))
    work = workload(poisson(20.0, 60, 3).tolist(), [50, 700, 1500] * 20, [5, 40, 80] * 20)
    records = simulate(work, Setup(cost, 100_000, sharding=Sharding(kvp, 256)))
    assert summarize(records)["extrapolated_time_share"] == pytest.approx(1.0, rel=1e-6)
