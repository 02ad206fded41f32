"""Prefixes that prompts share: found, counted, lost in the right order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.prefix_cache import PrefixCache
from policies.request import Request
from policies.routers import CacheAware
from policies.scheduler import Scheduler, SchedulerSettings
from sim.cluster import Setup, simulate
from tests.fakes import LinearCost
from traces.describe import describe
from traces.metrics import summarize
from traces.readers import read_trace
from traces.workload import PrefixBlocks, Workload

COST = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-9, context_s=1e-8)
SETTINGS = SchedulerSettings(chunk_tokens=512, watermark=0.0, prefix_caching=True)
TRACES = Path(__file__).resolve().parents[1].parent / "shared" / "traces"


def make(kv_tokens: int = 1_000_000, block: int = 64, **changes: object) -> Scheduler:
    return Scheduler(replace(SETTINGS, **changes), COST, kv_tokens, prefix_block_tokens=block)  # type: ignore[arg-type]


def run(scheduler: Scheduler, now_s: float = 0.0) -> list[list[tuple[int, int, int]]]:
    """Serve until nothing is left; the chunks of each batch as (request, tokens, context)."""
    found = []
    while (batch := scheduler.next_batch(now_s)) is not None:
        found.append([(c.request.id, c.tokens, c.context) for c in batch.chunks])
        scheduler.leave_first_stage(batch)
        now_s += 1.0
        scheduler.complete(batch, now_s)
    return [chunks for chunks in found if chunks]


def test_the_second_of_two_equal_prompts_computes_only_what_is_no_full_block() -> None:
    scheduler = make()
    scheduler.add(Request(0, 0.0, 200, 2, prefix_ids=(7, 8, 9)))
    assert run(scheduler) == [[(0, 200, 0)]]
    scheduler.add(Request(1, 9.0, 200, 2, prefix_ids=(7, 8, 9)))
    assert scheduler.pending_prefill_tokens == 200
    assert run(scheduler, 9.0) == [[(1, 8, 192)]]
    assert scheduler.pending_prefill_tokens == 0
    assert scheduler.prefixes is not None
    assert (scheduler.prefixes.looked_up_tokens, scheduler.prefixes.reused_tokens) == (400, 192)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = make()
    for id in range(2):
        scheduler.add(Request(id, float(id), 128, 1, prefix_ids=(1, 2)))
        chunks = run(scheduler, float(id))
    assert chunks == [[(1, 64, 64)]]


def test_prompts_of_one_batch_share_at_once_and_blocks_are_counted_once() -> None:
    scheduler = make()
    for id in range(2):
        scheduler.add(Request(id, 0.0, 130, 2, prefix_ids=(1, 2)))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert [(c.tokens, c.context) for c in batch.chunks] == [(130, 0), (2, 128)]
    assert scheduler.kv.used_blocks == 8 + 1 + 1  # 128 tokens in 16-token blocks, and two rests


def test_a_gap_ends_the_prefix() -> None:
    cache = PrefixCache(10_000, 16, 0.0, 64)
    first = Request(0, 0.0, 64 * 3, 1, prefix_ids=(1, 2, 3))
    cache.admit(first)
    cache.store(first, 64 * 3)
    assert cache.leading_hits((1, 2, 3, 4)) == 3
    assert cache.leading_hits((1, 9, 3)) == 1
    assert cache.leading_hits((9, 2, 3)) == 0


def test_the_longest_idle_goes_first_and_of_a_request_its_end() -> None:
    """Ten KV blocks, four a prefix block: A leaves, then B; C needs two more blocks than were never used."""
    cache = PrefixCache(160, 16, 0.0, 32)
    for id, ids in ((0, (1, 2)), (1, (3, 4))):
        request = Request(id, 0.0, 64, 1, prefix_ids=ids)
        request.kv_blocks = 4
        cache.admit(request)
        cache.store(request, 64)
        cache.leave(request)
    assert cache.used_blocks == 0
    cache.take(2)  # the two that nobody has used
    assert [cache.leading_hits((id,)) for id in (1, 2, 3, 4)] == [1, 1, 1, 1]
    cache.take(1)
    assert [cache.leading_hits((id,)) for id in (1, 2, 3, 4)] == [1, 0, 1, 1]
    cache.take(1)  # the other half of block 2
    assert [cache.leading_hits((id,)) for id in (1, 2, 3, 4)] == [1, 0, 1, 1]
    cache.take(2)
    assert [cache.leading_hits((id,)) for id in (1, 2, 3, 4)] == [0, 0, 1, 1]
    with pytest.raises(RuntimeError):
        cache.take(5)


def test_a_request_is_admitted_for_the_blocks_that_others_hold_already() -> None:
    """12 blocks: the first request holds 9, the second shares 8 of its 9."""
    for shared, together in (((1, 2), True), ((5, 6), False)):
        scheduler = make(kv_tokens=12 * 16)
        scheduler.add(Request(0, 0.0, 130, 5, prefix_ids=(1, 2)))
        scheduler.add(Request(1, 0.0, 130, 5, prefix_ids=shared))
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        assert (len(batch.chunks) == 2) is together


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 300), st.integers(1, 60), st.lists(st.integers(0, 5), min_size=5, max_size=5)
        ),
        min_size=1,
        max_size=25,
    ),
    blocks=st.integers(24, 60),
)
def test_blocks_are_never_lost_nor_made(requests: list[tuple[int, int, list[int]]], blocks: int) -> None:
    """Whatever is shared, evicted and preempted: all finish, nothing stays taken, used plus idle never
    exceed the cache, and with few enough output tokens the work is that of an uncached run minus hits."""
    scheduler = make(kv_tokens=blocks * 16, chunk_tokens=100)
    cache = scheduler.prefixes
    assert cache is not None
    computed = preempted = 0
    for id, (prompt, output, path) in enumerate(requests):
        # An id names its whole past, as in the traces.
        ids = [hash(tuple(path[: i + 1])) % 2**31 for i in range(prompt // 64)]
        request = Request(id, float(id), prompt, min(output, blocks * 16 - prompt), prefix_ids=ids)
        scheduler.add(request)
    now_s = 100.0
    while (batch := scheduler.next_batch(now_s)) is not None:
        now_s += 1.0
        computed += batch.prefill_tokens
        scheduler.leave_first_stage(batch)
        scheduler.complete(batch, now_s)
        assert cache.used_blocks >= 0
        assert cache.used_blocks + cache._idle_blocks <= cache.capacity_blocks
        assert cache._idle_blocks == sum(cache._idle.values())
        preempted = scheduler.preemptions
    assert scheduler.outstanding == scheduler.running == cache.used_blocks == 0
    assert not cache._holders
    if preempted == 0:
        assert computed == sum(prompt for prompt, _, _ in requests) - cache.reused_tokens


def test_without_ids_it_is_the_plain_cache() -> None:
    rng = np.random.default_rng(1)
    workload = Workload(
        rng.integers(1, 300, 200).astype(np.int32),
        rng.integers(1, 600, 200).astype(np.int32),
        np.sort(rng.uniform(0, 2, 200)),
        prefix=PrefixBlocks(np.zeros(201, dtype=np.int64), np.empty(0, dtype=np.int32), 64),
    )
    plain = Setup(COST, 3_000, replace(SETTINGS, prefix_caching=False))
    caching = Setup(COST, 3_000, SETTINGS, prefix_block_tokens=64)
    a, b = simulate(workload, plain), simulate(workload, caching)
    assert a.requests["preemptions"].sum() > 0
    np.testing.assert_array_equal(a.requests["finished_s"], b.requests["finished_s"])


def test_decode_runs_taken_at_once_change_nothing_with_a_full_cache() -> None:
    rng = np.random.default_rng(2)
    prompts = rng.integers(64, 640, 150).astype(np.int32)
    rows = [rng.integers(0, 3) * 100 + np.arange(p // 64) for p in prompts]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    workload = Workload(
        prompts,
        rng.integers(1, 300, 150).astype(np.int32),
        np.sort(rng.uniform(0, 20, 150)),
        prefix=PrefixBlocks(offsets, np.concatenate(rows).astype(np.int32), 64),
    )
    setup = Setup(COST, 4_000, SETTINGS, prefix_block_tokens=64)
    quick, slow = simulate(workload, setup), simulate(workload, setup, step_by_step=True)
    np.testing.assert_allclose(quick.requests["finished_s"], slow.requests["finished_s"], rtol=1e-9)
    assert quick.work.reused_tokens == slow.work.reused_tokens > 0
    rate = summarize(quick)["prefix_hit_rate"]
    assert rate == quick.work.reused_tokens / quick.work.looked_up_tokens


def test_the_router_weighs_what_is_cached_against_the_load() -> None:
    here, there = make(), make()
    here.add(Request(0, 0.0, 640, 1, prefix_ids=tuple(range(10))))
    run(here)
    alike = Request(1, 1.0, 640, 1, prefix_ids=tuple(range(10)))
    assert CacheAware().route(alike, [there, here]) == 1
    here.add(Request(2, 1.0, 600, 1))  # 600 tokens to do there, 576 saved
    assert CacheAware().route(alike, [there, here]) == 0


@pytest.mark.parametrize(
    ("name", "hits"), [("mooncake_conversation", 105_710), ("mooncake_synthetic", 77_953)]
)
def test_an_unlimited_cache_has_the_ideal_hits_of_the_mooncake_traces(name: str, hits: int) -> None:
    """Counted as the traces' description does: a partly filled last block is a block too."""
    path = TRACES / f"{name}_trace.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} isn't there")
    workload = read_trace(path)
    assert workload.prefix is not None
    cache = PrefixCache(2**40, 16, 0.0, 512)
    found = full = 0
    for index in range(len(workload)):
        ids = workload.prefix.row(index).tolist()
        found += cache.leading_hits(ids)
        request = Request(index, 0.0, len(ids) * 512, 1, prefix_ids=ids)
        request.kv_blocks = len(ids) * 32
        cache.admit(request)
        cache.store(request, request.prompt_tokens)
        cache.leave(request)
    full = cache.reused_tokens // 512
    assert found == hits == describe(workload)["prefix_hit_blocks"]
    assert full == hits - describe(workload)["prefix_requests_hit_in_every_block"]
