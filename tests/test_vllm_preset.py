"""vLLM v1's rules as a named configuration, and asynchronous scheduling by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from experiments.config import SchedulerConfig
from policies.request import Request
from policies.scheduler import Scheduler, SchedulerSettings
from sim.cluster import Setup, simulate
from tests.fakes import LinearCost
from traces.workload import Workload

COST = LinearCost(base_s=1.0)  # every step takes a second
ASYNC = SchedulerSettings(chunk_tokens=2048, watermark=0.0, async_scheduling=True)


def served(arrivals: list[float], prompts: list[int], outputs: list[int], **changes: object):  # type: ignore[no-untyped-def]
    workload = Workload(
        np.array(prompts, dtype=np.int32), np.array(outputs, dtype=np.int32), np.array(arrivals)
    )
    return simulate(workload, Setup(COST, 100_000, replace(ASYNC, **changes)))  # type: ignore[arg-type]


def test_a_request_waits_for_the_step_that_is_planned_already() -> None:
    """The first runs 0–1, 1–2, …; one that comes at 1.5 misses the step 2–3, planned at 1, and gets 3–4."""
    planned = served([0.0, 1.5], [10, 10], [9, 2])
    at_once = served([0.0, 1.5], [10, 10], [9, 2], async_scheduling=False)
    assert planned.requests["first_token_s"].tolist() == [1.0, 4.0]
    assert at_once.requests["first_token_s"].tolist() == [1.0, 3.0]
    assert planned.requests["scheduled_s"][1] == 3.0


def test_an_idle_engine_begins_at_once() -> None:
    records = served([5.0], [10], [3])
    assert records.requests["first_token_s"].tolist() == [6.0]
    assert records.requests["finished_s"].tolist() == [8.0]


def test_a_seat_is_free_a_step_after_its_request_has_finished() -> None:
    """One seat. The first request ends at 3; at 3 the planned step has nothing in it, so the next is planned
    then. With two seats and a second request that goes on, the third misses a step."""
    alone = served([0.0, 0.0], [10, 10], [3, 1], max_batch_requests=1)
    assert alone.requests["first_token_s"].tolist() == [1.0, 4.0]
    among = served([0.0, 0.0, 0.0], [10, 10, 10], [3, 9, 1], max_batch_requests=2)
    assert among.requests["first_token_s"].tolist() == [1.0, 1.0, 5.0]


def test_the_chunks_of_one_prompt_follow_each_other() -> None:
    records = served([0.0], [5000], [2])
    assert records.requests["first_token_s"].tolist() == [3.0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), seats=st.integers(1, 6), caching=st.booleans())
def test_decode_runs_taken_at_once_change_nothing(seed: int, seats: int, caching: bool) -> None:
    rng = np.random.default_rng(seed)
    n = 30
    workload = Workload(
        rng.integers(1, 400, n).astype(np.int32),
        rng.integers(1, 40, n).astype(np.int32),
        np.sort(rng.uniform(0, 0.6, n)),
    )
    cost = LinearCost(base_s=1e-3, token_s=1e-5, context_s=1e-7)
    policy = replace(ASYNC, chunk_tokens=256, max_batch_requests=seats, prefix_caching=caching)
    setup = Setup(cost, 1_000, policy)
    quick, slow = simulate(workload, setup), simulate(workload, setup, step_by_step=True)
    np.testing.assert_allclose(quick.requests["finished_s"], slow.requests["finished_s"], rtol=1e-9)
    assert (quick.requests["status"] == 1).all()


def test_nothing_is_left_behind() -> None:
    scheduler = Scheduler(ASYNC, COST, 10_000)
    scheduler.add(Request(0, 0.0, 100, 2))
    assert scheduler.waiting == 1
    now_s = 0.0
    while (batch := scheduler.next_batch(now_s)) is not None:
        now_s += 1.0
        scheduler.leave_first_stage(batch)
        scheduler.complete(batch, now_s)
    assert scheduler.kv.used_blocks == scheduler.running == scheduler.outstanding == scheduler.waiting == 0


def test_the_preset_gives_way_to_what_is_said() -> None:
    config = SchedulerConfig(preset="vllm-v1", chunk_tokens=8192, kv={"block_tokens": 32})
    assert (config.chunk_tokens, config.max_batch_requests, config.async_scheduling) == (8192, 256, True)
    assert (config.kv.block_tokens, config.kv.prefix_caching, config.kv.watermark) == (32, True, 0.0)
    again = SchedulerConfig(**config.model_dump())
    assert again == config
    with pytest.raises(ValidationError, match="vllm-v1"):
        SchedulerConfig(preset="vllm")
