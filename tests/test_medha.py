"""Medha's mechanisms (arXiv 2409.17264) in the event loop, against schedules worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.paper.measures import groups_join_s
from policies.scheduler import SchedulerSettings
from policies.sharding import Sharding
from policies.slo import Slo, TtftTarget
from profiler.iteration import IterationModel
from profiler.kernels import load_kernels
from sim.cluster import Setup, simulate
from specs import ParallelSpec, get_device, get_model
from tests.fakes import LinearCost
from traces.records import RunRecords
from traces.workload import Workload

TEN_MILLION = 10_000_000


def workload(*rows: tuple[float, int, int]) -> Workload:
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Workload(
        prompt_tokens=np.array(prompts, dtype=np.int32),
        output_tokens=np.array(outputs, dtype=np.int32),
        arrival_s=np.array(arrival_s, dtype=np.float64),
    )


# -- priorities -------------------------------------------------------------------------------------------


def stream_of_shorts(priority: str) -> RunRecords:
    """A prompt of 10 s of work, due at 16.3 s, and from the same moment one of 0.5 s every 0.6 s, due 1 s
    after its arrival, in chunks of 50 ms."""
    rows = [(0.0, 1000, 1), *((0.6 * k, 50, 1) for k in range(100))]
    policy = SchedulerSettings(priority=priority, chunk_tokens=5, target_iteration_s=0.05)
    slos = (Slo(TtftTarget(1.63, 1.0)),)
    return simulate(workload(*rows), Setup(LinearCost(token_s=0.01), 100_000, policy, slos=slos))


def test_edf_starves_a_long_prompt_and_then_lets_it_block_everybody() -> None:
    """Until one of the short prompts is due after 16.3 s the long one gets the 0.1 s that each leaves; the
    one of 15.6 s is due at 16.6, and waits until the 7.4 s that are left are over, at 23.0."""
    ttft_s = stream_of_shorts("edf").ttft_s
    assert ttft_s[0] == pytest.approx(23.0, abs=0.15)
    short = ttft_s[1:]
    assert short[:26] == pytest.approx(np.full(26, 0.5), abs=0.11)
    assert short[26] == pytest.approx(23.5 - 15.6, abs=0.15)
    # The convoy: who came meanwhile waits in turn, 0.6 s less each and 0.5 s more.
    assert short[27:39] == pytest.approx(short[26] - 0.1 * np.arange(1, 13), abs=0.2)


def test_lars_neither_starves_the_long_prompt_nor_lets_it_block_the_others() -> None:
    """The short prompts go when their slack is as small, relative to 0.5 s of work, as the long one's is to
    10 s. The long one starts at 0.63, so a short one waits about (1.0 − 0.63 · 0.5 − 0.5) s at first."""
    ttft_s = stream_of_shorts("lars").ttft_s
    assert ttft_s[1] == pytest.approx(0.5 + (1.0 - 0.5 - 0.63 * 0.5), abs=0.11)
    # In overload everybody is late by the same share of their work: the long one by (finish − 16.3) ÷ 10.
    late = (ttft_s[0] - 16.3) / 10
    assert ttft_s[1:].max() == pytest.approx(1.0 + 0.5 * late, abs=0.1)
    # The others leave 0.1 s of every 0.6 s: with those first, always, the long one would take 60 s.
    assert ttft_s[0] < 60.0


short_or_long = st.one_of(st.integers(1, 60), st.integers(400, 2000))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 12.0), short_or_long), min_size=1, max_size=40),
    st.sampled_from(["fcfs", "srpt", "edf", "lrs", "lars"]),
    st.sampled_from(["static", "adaptive"]),
    st.booleans(),
)
def test_no_order_idles_while_there_is_work_or_takes_longer_than_the_work(
    gaps: list[tuple[float, int]], priority: str, chunking: str, space_sharing: bool
) -> None:
    """Work conservation. 10 ms a token whatever the batch: a busy period begins and ends when it would in
    Lindley's recursion, and everybody who came in it has finished by its end. So nobody starves: at a load
    below one busy periods end."""
    arrivals = np.cumsum([gap for gap, _ in gaps])
    policy = SchedulerSettings(
        priority=priority,
        chunking=chunking,  # type: ignore[arg-type]
        chunk_tokens=64,
        target_iteration_s=0.64,
        space_sharing=space_sharing,
        long_request_tokens=400,
    )
    rows = [(float(a), tokens, 1) for a, (_, tokens) in zip(arrivals, gaps, strict=True)]
    records = simulate(workload(*rows), Setup(LinearCost(token_s=0.01), 10_000_000, policy))
    busy: list[tuple[int, float]] = []  # first request, end
    for i, (arrival_s, tokens, _) in enumerate(rows):
        if not busy or arrival_s >= busy[-1][1]:
            busy.append((i, arrival_s))
        busy[-1] = (busy[-1][0], busy[-1][1] + 0.01 * tokens)
    finished_s = records.requests["finished_s"]
    borders = [first for first, _ in busy] + [len(rows)]
    for (first, end_s), after in zip(busy, borders[1:], strict=True):
        assert finished_s[first:after].max() == pytest.approx(end_s, abs=1e-6)


# -- stages and groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "stages"), [(1, 4), (3, 4), (4, 4), (50, 8)])
def test_filling_steady_state_and_draining_of_a_stream(chunks: int, stages: int) -> None:
    """Stage s works on chunk i from (i + s) to (i + s + 1) stage times: all start one after another while
    the pipe fills, all are busy in between, and it is empty after chunks + stages − 1."""
    cost = LinearCost(token_s=0.01, stages=stages)
    policy = SchedulerSettings(chunk_tokens=100, max_chunk_tokens=100)
    records = simulate(workload((0.0, 100 * chunks, 1)), Setup(cost, 100_000, policy))
    stage_s = 1.0 / stages
    batches = records.batches
    for stage in range(stages):
        starts_s = np.sort(batches["start_s"][batches["stage"] == stage])
        assert starts_s == pytest.approx((np.arange(chunks) + stage) * stage_s)
    assert records.end_s == pytest.approx((chunks + stages - 1) * stage_s)


def test_groups_join_when_the_prompt_has_filled_those_before() -> None:
    """4,096 tokens, 1 ms each, 1,024 a group: groups 1, 2, 3 join after 1.024, 2.048 and 3.072 s."""
    sharding = Sharding(4, 1024)
    cost = LinearCost(token_s=1e-3)
    records = simulate(workload((5.0, 4096, 1)), Setup(cost, 4096, SchedulerSettings(), sharding=sharding))
    assert groups_join_s(records, sharding) == pytest.approx([0.0, 1.024, 2.048, 3.072])
    shorter = simulate(workload((5.0, 2000, 1)), Setup(cost, 4096, SchedulerSettings(), sharding=sharding))
    assert groups_join_s(shorter, sharding) == pytest.approx([0.0, 1.024])


# -- ten million tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["llama-3-8b", "llama-3-70b"])
def test_ten_million_tokens_end_to_end_and_never_below_physics(model_name: str) -> None:
    """TP8 SPP4 KVP4 on 128 H100, chunks of 4,096. No stage is ever quicker than the FLOP of its layers and of
    its largest shard at the data sheet's peak, and no decode than reading weights and shard once."""
    model, device = get_model(model_name), get_device("h100-sxm")
    parallel = ParallelSpec(tp=8, spp=4, kvp=4, kvp_tokens_per_group=TEN_MILLION // 4)
    sharding = Sharding(4, TEN_MILLION // 4)
    cost = IterationModel(model, load_kernels(device, "auto"), parallel)
    policy = SchedulerSettings(chunk_tokens=4096)
    setup = Setup(cost, 4_000_000, policy, sharding=sharding)
    records = simulate(workload((0.0, TEN_MILLION, 20)), setup)
    assert np.isfinite(records.requests["finished_s"]).all()

    batches = records.batches
    first = batches["stage"] == 0
    taken_s = (batches["end_s"] - batches["start_s"])[first]
    tokens = batches["prefill_tokens"][first]
    context = np.cumsum(tokens) - tokens
    is_prefill = tokens > 0
    layers = model.num_layers / 4
    shard = np.minimum(context // sharding.tokens_per_group, 3)
    keys = np.where(shard > 0, sharding.tokens_per_group, context)
    keys = np.maximum(keys, context - shard * sharding.tokens_per_group)
    attention = 4.0 * tokens * keys * model.num_heads * model.head_dim * layers
    linear = 2.0 * tokens * model.layer_linear_weights * layers
    floor_s = (attention + linear) / 8 / device.peak_flops_for("bf16")
    assert (taken_s[is_prefill] >= floor_s[is_prefill]).all()
    assert taken_s[is_prefill].sum() < 3.0 * floor_s[is_prefill].sum()  # and within sight of it

    shard_bytes = TEN_MILLION // 4 * model.kv_bytes_per_token("bf16") / model.num_layers
    read = (2.0 * model.layer_linear_weights + shard_bytes) * layers / 8
    read_s = read / device.memory_bandwidth_bytes_per_s
    assert (taken_s[~is_prefill] >= read_s).all()
    assert taken_s[~is_prefill].mean() < 2.0 * read_s
    tpot_s = float(records.tpot_s[0])
    assert 4 * read_s < tpot_s < 8 * read_s
