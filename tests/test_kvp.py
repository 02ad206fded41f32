"""KV-cache parallelism: shards, groups that join, and what working together takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.batch import Batch
from policies.request import Request
from policies.scheduler import Scheduler, SchedulerSettings
from policies.sharding import Sharding
from profiler.iteration import IterationModel
from profiler.kernels import load_kernels
from profiler.work import LSE_BYTES
from sim.cluster import Setup, simulate
from specs import ParallelSpec, get_device, get_model
from tests.fakes import LinearCost
from traces.records import RunRecords
from traces.workload import Workload

COST = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-8, context_s=1e-7, merge_s=1e-6)
STATIC = SchedulerSettings(chunk_tokens=100, block_tokens=16)
T = 256
THREE = Sharding(3, T)


def make(
    settings: SchedulerSettings = STATIC, kv_tokens: int = 4096, sharding: Sharding = THREE
) -> Scheduler:
    return Scheduler(settings, COST, kv_tokens, sharding=sharding)


def workload(*rows: tuple[float, int, int]) -> Workload:
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Workload(
        prompt_tokens=np.array(prompts, dtype=np.int32),
        output_tokens=np.array(outputs, dtype=np.int32),
        arrival_s=np.array(arrival_s, dtype=np.float64),
    )


def run(rows: Workload, settings: SchedulerSettings = STATIC, sharding: Sharding = THREE) -> RunRecords:
    return simulate(rows, Setup(COST, 4096, settings, sharding=sharding))


def advance(scheduler: Scheduler, now_s: float = 0.0) -> Batch:
    batch = scheduler.next_batch(now_s)
    assert batch is not None
    scheduler.leave_first_stage(batch)
    scheduler.complete(batch, now_s)
    return batch


@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 2000), st.integers(0, 4))
def test_every_token_lies_in_one_shard_and_groups_join_one_by_one(
    groups: int, size: int, tokens: int, home: int
) -> None:
    sharding = Sharding(groups, size)
    stored = [sharding.stored(tokens, shard) for shard in range(groups)]
    counted = [0] * groups
    for position in range(tokens):
        counted[sharding.shard_of(position)] += 1
    assert stored == counted
    assert sharding.shards(tokens) == sum(1 for count in counted if count)
    active = [sharding.group(home % groups, shard) for shard in range(sharding.shards(tokens))]
    assert len(set(active)) == len(active)


def test_chunks_stop_at_shard_borders_and_groups_join_as_the_context_grows() -> None:
    """A prompt of 700 tokens in shards of 256, chunks of 100: by hand."""
    scheduler = make()
    scheduler.add(Request(0, 0.0, 700, 1))
    found = []
    while scheduler.outstanding:
        batch = advance(scheduler)
        ((_, tokens, context),) = batch.chunks
        found.append((context, tokens, [load.tokens for load in batch.loads]))
    assert found == [
        (0, 100, [100, 0, 0]),
        (100, 100, [100, 0, 0]),
        (200, 56, [56, 0, 0]),
        (256, 100, [100, 100, 0]),
        (356, 100, [100, 100, 0]),
        (456, 56, [56, 56, 0]),
        (512, 100, [100, 100, 100]),
        (612, 88, [88, 88, 88]),
    ]


def test_each_group_attends_to_its_own_shard_and_pays_for_the_merge() -> None:
    scheduler = make()
    scheduler.add(Request(0, 0.0, 700, 1))
    for _ in range(7):
        advance(scheduler)
    batch = advance(scheduler)  # 88 tokens behind 612, of which shard 2 holds 100
    merge_s = 1e-6 * 88 * 2
    attention = [load.attention_s for load in batch.loads]
    assert attention == pytest.approx([1e-8 * 88 * T + merge_s] * 2 + [1e-8 * 88 * 100 + merge_s])
    assert [load.rows for load in batch.loads] == [1, 0, 0]  # its home computes the logits
    assert batch.tokens == 88 and batch.rows == 1  # counted once, whoever computes it


def test_decodes_read_a_shard_in_each_group() -> None:
    scheduler = make()
    scheduler.add(Request(0, 0.0, 700, 3))
    scheduler.add(Request(1, 0.0, 50, 40))
    while scheduler.waiting:
        advance(scheduler)
    batch = advance(scheduler)
    assert batch.num_decodes == 2
    short = next(r for r in batch.decodes() if r.id == 1)
    home = short.home
    contexts = [256, 256, 188]
    decodes = [1, 1, 1]
    contexts[home] += short.kv_tokens - 1  # before the step
    decodes[home] += 1
    assert [load.decode_context for load in batch.loads] == contexts
    assert [load.num_decodes for load in batch.loads] == decodes
    assert [load.attention_s for load in batch.loads] == pytest.approx(
        [1e-7 * context + 1e-6 * 2 for context in contexts]
    )


def test_short_requests_go_where_the_least_prefill_work_is_pending() -> None:
    scheduler = make()
    requests = [Request(i, 0.0, tokens, 4) for i, tokens in enumerate((300, 100, 100, 90, 80))]
    for request in requests:
        scheduler.add(request)
    # The first takes groups 0 and 1 with 300² each; the others balance groups 2, 2 …: 100², 100², … < 300²
    assert [request.home for request in requests] == [0, 2, 2, 2, 2]
    assert [request.shards for request in requests] == [2, 1, 1, 1, 1]
    while scheduler.waiting:
        advance(scheduler)
    late = Request(5, 1.0, 10, 1)
    scheduler.add(late)
    assert late.home == 0  # all prefill is done: nothing is pending anywhere


def test_groups_serve_short_requests_side_by_side_and_step_as_the_slowest() -> None:
    """Two prompts of 90 and 60 tokens prefill in one iteration, which takes as long as the longer's."""
    records = run(workload((0.0, 90, 1), (0.0, 60, 1)), sharding=Sharding(2, T))
    assert records.requests["finished_s"] == pytest.approx([1e-3 + 90e-5] * 2)
    alone = run(workload((0.0, 90, 1), (0.0, 60, 1)), sharding=Sharding(1, T))
    assert alone.requests["finished_s"].max() > 1e-3 + 90e-5


def test_an_iteration_lasts_as_long_as_its_slowest_group() -> None:
    """700 tokens alone, chunk by chunk as above: Σ (base + token · c + pair · c · keys + merge)."""
    expected = 0.0
    for context, tokens in (
        (0, 100),
        (100, 100),
        (200, 56),
        (256, 100),
        (356, 100),
        (456, 56),
        (512, 100),
        (612, 88),
    ):
        shard = min(context // T, 2)
        keys = max(context - shard * T, T if shard else 0)
        expected += 1e-3 + 1e-5 * tokens + 1e-8 * tokens * keys + 1e-6 * tokens * shard
    records = run(workload((0.0, 700, 1)))
    assert records.requests["first_token_s"] == pytest.approx([expected])


def test_long_prompts_share_an_iteration_while_they_are_in_different_groups() -> None:
    """One long prompt a batch is one for each group: the second begins in the group that the first, still in
    its first shard, has no use for yet."""
    scheduler = make(replace(STATIC, space_sharing=True, long_request_tokens=500), sharding=Sharding(2, T))
    for i in range(2):
        scheduler.add(Request(i, 0.0, 500, 1))
    together = []
    while scheduler.outstanding:
        batch = advance(scheduler)
        together.append((batch.chunks[0].context >= T, [chunk.request.id for chunk in batch.chunks]))
    assert together[:3] == [(False, [0, 1])] * 3  # 256 tokens each, 100 at a time
    assert all(len(ids) == 1 for in_both, ids in together if in_both)


def test_kv_blocks_of_all_groups_are_reserved_at_admission() -> None:
    scheduler = make()
    scheduler.add(Request(0, 0.0, 600, 1))
    advance(scheduler)
    assert [cache.used_blocks for cache in scheduler.kv.groups] == [16, 16, 6]  # 256, 256 and 88 tokens


def test_many_long_prompts_that_only_fit_one_by_one_all_finish() -> None:
    """With blocks taken bit by bit, each would hold one group and wait for the other's."""
    rows = workload(*[(0.0, 500, 4)] * 6)
    setup = Setup(COST, 272, replace(STATIC, watermark=0.0), sharding=Sharding(2, T))
    records = simulate(rows, setup)
    assert np.isfinite(records.requests["finished_s"]).all()
    assert (records.batches["kv_used_blocks"] <= 2 * 17).all()


def test_a_request_that_fits_no_group_is_rejected() -> None:
    scheduler = make(kv_tokens=256, sharding=Sharding(2, T))
    assert scheduler.fits(Request(0, 0.0, 512, 1))
    assert not scheduler.fits(Request(1, 0.0, 530, 1))  # the last shard has no end: 274 tokens in it


def test_adaptive_chunks_hold_the_target_in_every_group() -> None:
    settings = SchedulerSettings(chunking="adaptive", target_iteration_s=4e-3)
    scheduler = make(settings)
    for i, tokens in enumerate((700, 200, 150)):
        scheduler.add(Request(i, 0.0, tokens, 20))
    while scheduler.waiting:
        batch = advance(scheduler)
        for load in batch.loads:
            if load.num_chunks:
                assert COST.tokens_s(load.tokens, load.rows, load.requests) + load.attention_s <= 4e-3 + 1e-12


def test_more_groups_make_a_long_decode_faster_down_to_the_merge() -> None:
    """Medha's reason for KVP: the KV cache of one request is read by several groups at once."""

    def tpot(groups: int) -> float:
        records = run(workload((0.0, 1000, 11)), sharding=Sharding(groups, T))
        found = records.requests
        return float((found["finished_s"] - found["first_token_s"])[0] / 10)

    def expected(groups: int) -> float:
        keys = max(1000 - (groups - 1) * T, T if groups > 1 else 0)
        grown = keys + (4.5 if keys != T else 0.0)  # only the last shard grows
        return 1e-3 + 1e-5 + 1e-7 * grown + 1e-6 * (groups - 1)

    for groups in (1, 2, 3):
        assert tpot(groups) == pytest.approx(expected(groups), rel=1e-9)


def test_predicted_merge_counts_every_byte_between_groups() -> None:
    """Llama-3 8B, TP8: 4 heads of 128 in bf16 and a log-sum-exp each, to be received from 3 other groups."""
    model, device = get_model("llama-3-8b"), get_device("h100-sxm")
    parallel = ParallelSpec(tp=8, kvp=4)
    iteration = IterationModel(model, load_kernels(device, "roofline"), parallel)
    num_bytes = 1000 * 4 * (128 * 2 + LSE_BYTES) * 3
    floor_s = num_bytes / device.inter_node.bandwidth_bytes_per_s * model.num_layers
    assert floor_s < iteration.merge_s(1000, 4) < 2 * floor_s + model.num_layers * 1e-4
    assert iteration.merge_s(1000, 2) < iteration.merge_s(1000, 4)


@pytest.mark.parametrize("source", ["roofline", "imported"])
@pytest.mark.parametrize("context", [600_000, 3_000_000, 10_000_000])
def test_interpolated_iterations_of_several_groups_are_near_the_exact_ones(source: str, context: int) -> None:
    model, device = get_model("llama-3-8b"), get_device("h100-sxm")
    parallel = ParallelSpec(tp=8, spp=2, kvp=4)
    iteration = IterationModel(model, load_kernels(device, source), parallel)  # type: ignore[arg-type]
    sharding = Sharding(parallel.kvp, parallel.kvp_tokens_per_group)
    scheduler = Scheduler(SchedulerSettings(), iteration, 1 << 24, sharding=sharding)
    for tokens in (32, 500, 2048):
        exact = sum(row.time_s for row in iteration.explain([(tokens, context)]))
        quick = iteration.tokens_s(tokens, 1, 1) + scheduler.cost.chunk_attention_s(tokens, context)
        assert quick == pytest.approx(exact, rel=0.03)
