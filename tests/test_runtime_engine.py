"""The live engine: the simulator's scheduler and records, with real tokens and a real clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from policies.request import Request  # noqa: E402
from policies.scheduler import Scheduler, SchedulerSettings  # noqa: E402
from policies.slo import Slo, TtftTarget  # noqa: E402
from runtime.engine import HOST_COLUMNS, Engine, LiveSetup, serve  # noqa: E402
from runtime.executors import LocalExecutor, StageDone  # noqa: E402
from runtime.plan import Plan, Slice  # noqa: E402
from runtime.runner import Runner, RunnerSpec  # noqa: E402
from runtime.sequences import Prompts  # noqa: E402
from specs import ParallelSpec, get_model  # noqa: E402
from specs.errors import InputError  # noqa: E402
from tests.fakes import LinearCost  # noqa: E402
from traces.metrics import summarize  # noqa: E402
from traces.records import FINISHED, REJECTED, UNFINISHED, write_batches_csv, write_requests_csv  # noqa: E402
from traces.synthesis import ClosedLoop  # noqa: E402
from traces.workload import Workload  # noqa: E402

MODEL = replace(
    get_model("tiny-llama"),
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=256,
)
SPEC = RunnerSpec(MODEL, weights=1, kv_capacity_tokens=4096)
COST = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-8, context_s=1e-7)
SETTINGS = SchedulerSettings(chunk_tokens=64, target_iteration_s=0.004)


def setup(scheduler=SETTINGS, **changes):
    return replace(LiveSetup(SPEC, COST, scheduler, seed=3), **changes)


def workload(num=24, seed=0, gap_s=0.004, longest=200):
    rng = np.random.default_rng(seed)
    return Workload(
        rng.integers(1, longest, num), rng.integers(1, 12, num), np.cumsum(rng.exponential(gap_s, num))
    )


def greedy_alone(runner, prompt, steps):
    """What one request generates by itself, prefilled in one pass."""
    tokens, ids, start = [], prompt, 0
    for _ in range(steps):
        token = runner.run(Plan(0, [Slice(0, start, len(ids), len(prompt) + steps, True)], ids)).tokens[0][1]
        tokens.append(token)
        start, ids = start + len(ids), np.array([token])
    runner.model.cache.release(0)
    return tokens


def assert_outputs_are_greedy(records, requests, spec=SPEC):
    runner, prompts = Runner(replace(spec, parallel=ParallelSpec())), Prompts(requests.prompt_tokens, 256, 3)
    assert sorted(records.outputs) == list(range(len(requests)))
    for index, tokens in records.outputs.items():
        assert tokens.tolist() == greedy_alone(runner, prompts[index], int(requests.output_tokens[index]))


@pytest.mark.parametrize(
    "scheduler",
    [
        SETTINGS,
        replace(SETTINGS, chunking="whole", packing="prefill_first"),
        replace(SETTINGS, priority="edf", chunking="adaptive"),
        replace(SETTINGS, priority="lars", chunking="adaptive", space_sharing=True, long_request_tokens=100),
    ],
    ids=["fcfs-static", "fcfs-whole", "edf-adaptive", "lars-adaptive"],
)
def test_every_request_gets_the_tokens_it_gets_alone(scheduler):
    requests = workload()
    records = serve(requests, setup(scheduler))
    assert (records.requests["status"] == FINISHED).all()
    assert_outputs_are_greedy(records, requests)


def test_preempted_requests_are_recomputed_to_the_same_tokens():
    spec = replace(SPEC, kv_capacity_tokens=320)
    requests = Workload(np.full(6, 48), np.full(6, 40), np.arange(6) * 1e-3)
    records = serve(requests, setup(runner=spec))
    assert records.requests["preemptions"].sum() > 0
    assert_outputs_are_greedy(records, requests, spec)


def test_batches_follow_each_other_and_times_are_in_order():
    records = serve(workload(), setup())
    requests, batches = records.requests, records.batches
    assert (batches["steps"] == 1).all() and (batches["stage"] == 0).all()
    assert (batches["start_s"][1:] >= batches["end_s"][:-1]).all()
    for index in range(len(requests["request_id"])):
        times = [
            requests[name][index] for name in ("arrival_s", "scheduled_s", "first_token_s", "finished_s")
        ]
        assert times == sorted(times)
    # without an idle gap the next batch begins when the last one ends
    began_late = batches["start_s"][1:] > batches["end_s"][:-1]
    assert set(batches["start_s"][1:][began_late]) <= set(requests["arrival_s"])
    assert batches["prefill_tokens"].sum() == requests["prompt_tokens"].sum()
    assert batches["num_decodes"].sum() == (requests["output_tokens"] - 1).sum()
    gaps = records.gaps
    assert (gaps[:, 2] * gaps[:, 3]).sum() == (requests["output_tokens"] - 1).sum()
    assert summarize(records)["tbt_s"]["count"] == (requests["output_tokens"] - 1).sum()


def replay(requests, records, settings):
    """Drive a fresh scheduler by the recorded times alone; what each batch held, by the columns recorded."""
    scheduler = Scheduler(settings, COST, SPEC.kv_capacity_tokens, slos=(Slo(),))
    arrivals = list(enumerate(requests.arrival_s.tolist()))
    rows = []

    def arrive(until_s):
        while arrivals and arrivals[0][1] <= until_s:
            index, arrival_s = arrivals.pop(0)
            lengths = int(requests.prompt_tokens[index]), int(requests.output_tokens[index])
            scheduler.add(Request(index, arrival_s, *lengths))

    for start_s, end_s in zip(records.batches["start_s"], records.batches["end_s"], strict=True):
        arrive(start_s)
        batch = scheduler.next_batch(start_s)
        arrive(end_s)
        scheduler.leave_first_stage(batch)
        scheduler.complete(batch, end_s)
        rows.append(
            (
                len(batch.chunks),
                batch.prefill_tokens,
                batch.num_decodes,
                scheduler.waiting,
                scheduler.kv.used_blocks,
            )
        )
    return rows


@pytest.mark.parametrize("priority", ["fcfs", "lars"])
def test_decisions_can_be_repeated_from_the_recorded_times(priority):
    requests = workload(40, gap_s=0.002)
    settings = replace(SETTINGS, priority=priority, chunking="adaptive")
    records = serve(requests, setup(settings))
    names = ("num_prefills", "prefill_tokens", "num_decodes", "waiting", "kv_used_blocks")
    recorded = list(zip(*(records.batches[name].tolist() for name in names), strict=True))
    assert replay(requests, records, settings) == recorded


def test_host_time_is_kept_for_each_part_of_each_batch():
    records = serve(workload(), setup())
    host, batches = records.host, records.batches
    assert tuple(host) == HOST_COLUMNS
    assert host["batch"].tolist() == batches["batch"].tolist()
    parts = sum(host[name] for name in HOST_COLUMNS[2:6])
    duration_s = batches["end_s"] - batches["start_s"]
    assert (parts <= duration_s + 1e-6).all()
    assert parts.sum() > 0.8 * duration_s.sum()
    # A core is probed every 10 ms at most, as part of preparing a batch.
    probed = host["probe_s"] > 0.0
    assert probed.any() and (host["probe_s"] <= host["launch_s"]).all()
    assert (np.diff(batches["start_s"][probed]) >= 0.01 - 1e-9).all()
    # A batch's own scheduling decision takes less than a millisecond (P17).
    assert np.median(host["schedule_s"]) < 1e-3


def test_stages_in_processes_work_on_different_batches_at_once():
    spec = replace(SPEC, parallel=ParallelSpec(spp=2))
    requests = Workload(np.array([900, 300]), np.array([6, 6]), np.zeros(2))
    records = serve(requests, setup(runner=spec))
    assert_outputs_are_greedy(records, requests, spec)
    batches = records.batches
    first, second = (batches["stage"] == stage for stage in (0, 1))
    assert sorted(batches["batch"][first]) == sorted(batches["batch"][second])
    ends = dict(zip(batches["batch"][second].tolist(), batches["end_s"][second].tolist(), strict=True))
    overlaps = [
        start_s < ends[batch - 1]
        for batch, start_s in zip(batches["batch"][first].tolist(), batches["start_s"][first], strict=True)
        if batch
    ]
    assert sum(overlaps) >= 10
    assert (records.host["schedule_s"][second] == 0).all()


class LateExecutor:
    """Two stages; the second one answers after 50 ms, whatever else happens meanwhile."""

    num_stages = 2

    def __init__(self):
        self._waiting = []

    def submit(self, plan):
        tokens = [(each.request, 1) for each in plan.slices if each.samples]
        self._waiting[:0] = [StageDone(plan.id, 0, [], 0.0, 0.0, 0.0)]
        self._waiting.append(StageDone(plan.id, 1, tokens, 0.0, 0.0, 0.0))

    def wait(self, timeout_s=None):
        if self._waiting and self._waiting[0].stage == 1:
            time.sleep(0.05)
        return self._waiting.pop(0) if self._waiting else None


def test_an_arrival_at_a_free_stage_begins_its_batch_then_even_if_an_end_is_heard_of_first():
    requests = Workload(np.full(3, 4), np.full(3, 1), np.array([0.0, 0.02, 0.03]))
    records = Engine(requests, setup(), LateExecutor()).run()
    first = records.batches["stage"] == 0
    assert records.batches["start_s"][first][:2].tolist() == [0.0, 0.02]
    assert (records.batches["start_s"][first][2:] >= 0.05).all()  # two batches are in flight until then


def test_a_closed_loop_sends_when_an_answer_is_there():
    requests = Workload(np.full(12, 20), np.full(12, 3))
    records = serve(requests, setup(closed_loop=ClosedLoop(3, think_time_s=0.005)))
    arrivals, finished = records.requests["arrival_s"], records.requests["finished_s"]
    assert arrivals[:3].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(np.sort(arrivals[3:]), np.sort(finished)[:9] + 0.005, atol=1e-12)
    at_once = [((arrivals <= t) & (finished > t)).sum() for t in arrivals]
    assert max(at_once) <= 3


def test_requests_that_can_never_fit_are_rejected():
    requests = Workload(np.array([10, 5000, 10]), np.array([2, 2, 2]), np.array([0.0, 0.001, 0.002]))
    records = serve(requests, setup())
    assert records.requests["status"].tolist() == [FINISHED, REJECTED, FINISHED]
    assert sorted(records.outputs) == [0, 2]


def test_stopping_the_clock_leaves_the_rest_unfinished():
    requests = Workload(np.full(3, 30), np.full(3, 4), np.array([0.0, 0.05, 30.0]))
    records = serve(requests, setup(stop_s=0.3))
    assert records.requests["status"].tolist() == [FINISHED, FINISHED]
    assert records.end_s == 0.3
    long = Workload(np.array([30]), np.array([3000]), np.zeros(1))
    records = serve(long, setup(stop_s=0.1))
    assert records.requests["status"].tolist() == [UNFINISHED]
    assert 0.0 < records.requests["first_token_s"][0] < 0.1


def test_ctrl_c_keeps_what_finished(tmp_path):
    requests = Workload(np.array([10, 10, 10]), np.array([3, 4000, 3]), np.array([0.0, 0.0, 60.0]))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    records = serve(requests, setup())
    assert records.interrupted
    assert records.requests["status"].tolist() == [FINISHED, UNFINISHED]
    write_requests_csv(records, np.zeros(2, dtype=bool), tmp_path / "requests.csv")
    write_batches_csv(records, tmp_path / "batches.csv")
    assert len((tmp_path / "requests.csv").read_text().splitlines()) == 3


def test_waiting_for_an_arrival_neither_burns_the_processor_nor_oversleeps():
    requests = Workload(np.full(2, 4), np.full(2, 1), np.array([0.0, 0.6]))
    engine = Engine(requests, setup(), LocalExecutor(SPEC))
    wait, waited_s = engine._sleep_until, []

    def timed(moment_s):
        began_s = time.process_time()
        wait(moment_s)
        waited_s.append(time.process_time() - began_s)

    engine._sleep_until = timed
    records = engine.run()
    assert len(waited_s) == 2 and sum(waited_s) < 0.1
    assert records.requests["scheduled_s"].tolist() == requests.arrival_s.tolist()
    assert records.host["schedule_s"][1] < 0.1  # what waiting by turns of a second would exceed


def test_a_workload_without_times_needs_a_closed_loop():
    with pytest.raises(InputError, match="has no arrival times"):
        serve(Workload(np.array([3]), np.array([3])), setup())


def test_lars_lets_short_prompts_pass_a_long_one():
    """One long prompt and shorts behind it: what the convoy effect is, live."""
    requests = Workload(
        np.array([6000] + [16] * 10), np.full(11, 2), np.concatenate([[0.0], 0.02 + 0.01 * np.arange(10)])
    )
    spec = replace(SPEC, kv_capacity_tokens=8192)
    changes = {
        "runner": spec,
        "cost": LinearCost(base_s=1e-3, token_s=1e-4),
        "slos": (Slo(TtftTarget(1.5, 0.002)),),
    }
    ttft_s = {}
    for priority in ("fcfs", "lars"):
        settings = replace(SETTINGS, priority=priority, chunk_tokens=32)
        records = serve(requests, setup(settings, **changes))
        ttft_s[priority] = np.median(records.ttft_s[1:])
    assert ttft_s["fcfs"] > 5 * ttft_s["lars"]
