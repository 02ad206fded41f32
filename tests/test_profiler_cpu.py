"""Formulas for CPUs, and the shipped profile of one: found where it holds, and as exact as it says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from profiler.coverage import part_used
from profiler.cpu_operators import (
    CpuCollective,
    CpuDecodeAttention,
    CpuElementwise,
    CpuGemm,
    CpuPrefillAttention,
)
from profiler.formulas import make_physics
from profiler.iteration import IterationModel
from profiler.kernels import find_profile, load_kernels
from profiler.operators import OperatorModel
from profiler.overheads import (
    HOST_RATES,
    SERVING_RATES,
    HostOverhead,
    ServingOverhead,
    fit_host,
    fit_serving,
    host_s,
    serving_s,
)
from profiler.tables import PROFILES
from profiler.train import TrainReport, train
from specs import ParallelSpec, get_device, get_model
from specs.errors import InputError

CPU, TINY = get_device("cpu"), get_model("tiny-llama")
SHIPPED = PROFILES / "cpu" / "tiny-llama-fp32"


def columns(**values: float) -> dict[str, np.ndarray]:
    return {name: np.array([float(value)]) for name, value in values.items()}


def test_part_of_a_device() -> None:
    one = part_used(CPU, 1)
    assert one.num_sms == 1 and one.peak_flops["fp32"] == CPU.peak_flops["fp32"] / 2
    assert one.memory_bandwidth_bytes_per_s == CPU.memory_bandwidth_bytes_per_s
    assert part_used(CPU, 0) == part_used(CPU, 2) == part_used(CPU, 64) == CPU


def test_floors_by_hand() -> None:
    gemm = CpuGemm(part_used(CPU, 1), "fp32")
    compute = gemm.floor_s(columns(m=512, n=704, k=256))
    assert compute == pytest.approx(2 * 512 * 704 * 256 / 105e9)
    memory = gemm.floor_s(columns(m=1, n=4096, k=256))
    assert memory == pytest.approx(4 * (256 + 256 * 4096 + 4096) / 36e9)
    # 32 MiB of weights that never leave the cache set no floor by memory.
    cached = CpuGemm(part_used(CPU, 1), "fp32", CPU.l2_bytes).floor_s(columns(m=1, n=4096, k=256))
    assert cached == pytest.approx(2 * 4096 * 256 / 105e9)
    decode = CpuDecodeAttention(CPU, "fp32").floor_s(
        columns(batch=2, total_context=10_000, heads=8, kv_heads=4, head_dim=32)
    )
    assert decode == pytest.approx(4 * (2 * 10_000 * 4 * 32 + 2 * 2 * 8 * 32) / 36e9)


def test_blocks_of_the_kernel_by_hand() -> None:
    # 40 tokens of 2 heads each: 80 rows a KV head in 3 blocks of 32, 100 keys: 6 over after 6 vectors of 16.
    attention = CpuPrefillAttention(CPU, "fp32")
    shape = columns(batch=1, chunk=40, context=100, heads=8, kv_heads=4, head_dim=32)
    terms = {name: float(amount[0]) for name, amount in attention.terms(shape).items()}
    assert terms["pair_s"] == 4 * 80 * 100 * 32 and terms["load_s"] == 4 * 3 * 100 * 32
    assert terms["rescale_s"] == terms["row_s"] == terms["left_over_s"] == 4 * 80
    # The causal part, head by head: 2 blocks of 32; the last has 8 rows, and 40 is no multiple of 16.
    assert terms["own_load_s"] == 2 * 8 * 36 * 32 and terms["own_left_over_s"] == 8 * 8
    nothing_before = attention.terms({**shape, "context": np.zeros(1)})
    assert nothing_before["merge_s"] == nothing_before["launch_s"] == nothing_before["left_over_s"] == 0


@pytest.mark.parametrize(
    ("m", "left_over", "odd"), [(1, 0, 0), (2, 1, 0), (3, 1, 1), (4, 0, 0), (5, 1, 1), (6, 1, 0), (8, 0, 0)]
)
def test_rows_left_over_by_hand(m: int, left_over: int, odd: int) -> None:
    """Rows are taken by four. A weight of 512 × 512 numbers fills a cache of a megabyte, one of 256 × 512
    doesn't."""
    gemm = CpuGemm(CPU, "fp32")
    for n, fills in ((512, 1), (256, 0)):
        terms = {name: float(each[0]) for name, each in gemm.terms(columns(m=m, n=n, k=512)).items()}
        assert terms["left_over_s"] == n * 512 * left_over and terms["odd_s"] == n * 512 * odd
        assert terms["left_over_load_s"] == n * 512 * left_over * fills
        assert terms["weight_s"] == n * 512 * (m > 1) and terms["product_s"] == m * n * 512


def test_rates_are_recovered_and_hold_eight_times_as_far() -> None:
    """Times from known rates: what isn't there comes out as nothing, and the line goes on."""
    rng = np.random.default_rng(0)
    true = {"launch_s": 1e-5, "request_s": 1.2e-5, "head_s": 2e-6, "key_s": 5e-10}
    physics = CpuDecodeAttention(CPU, "fp32")
    batch, each = 2.0 ** rng.integers(0, 7, 200), 2.0 ** rng.integers(4, 13, 200)
    kv_heads = 2.0 ** rng.integers(0, 3, 200)
    shape = {
        "batch": batch,
        "total_context": batch * each,
        "heads": 2 * kv_heads,
        "kv_heads": kv_heads,
        "head_dim": np.full(200, 32.0),
    }
    time_s = physics.time_s(shape, {name: true.get(name, 0.0) for name in physics.parameters})
    noisy_s = time_s * np.exp(rng.normal(0, 0.03, 200))
    model = OperatorModel(physics).fit(shape, noisy_s, np.arange(200))
    assert model.state_.parameters["request_s"] == pytest.approx(1.2e-5, rel=0.1)
    far = {**shape, "total_context": shape["total_context"] * 8}
    expected = physics.time_s(far, {name: true.get(name, 0.0) for name in physics.parameters})
    assert np.median(np.abs(model.predict(far).time_s / expected - 1)) < 0.03


def test_merging_goes_by_the_results_beyond_the_first() -> None:
    merge = CpuElementwise(CPU, "kvp_merge")
    two = {"num_bytes": np.array([3000.0]), "rows": np.array([10.0]), "shards": np.array([2.0])}
    eight = {"num_bytes": np.array([9000.0]), "rows": np.array([10.0]), "shards": np.array([8.0])}
    assert merge.terms(two)["step_s"] == 1 and merge.terms(eight)["step_s"] == 7
    assert merge.terms(eight)["byte_s"] == 7 * merge.terms(two)["byte_s"]
    assert make_physics(get_device("h100-sxm"), "kvp_merge", "bf16").columns == merge.columns


def test_a_message_that_fills_a_socket_takes_another_round() -> None:
    """Between two ranks an all-reduce sends halves, an all-gather and a send all of it."""
    size = 1 << 20
    for operator, whole in (("all_reduce", 2 * size), ("all_gather", size), ("send_recv", size)):
        terms = CpuCollective(CPU, operator).terms(
            {"num_bytes": np.array([whole - 8.0, whole]), "ranks": np.array([2.0, 2.0])}
        )
        assert terms["round_s"].tolist() == [0.0, 1.0]


def test_host_rates_are_recovered() -> None:
    rng = np.random.default_rng(0)
    requests, chunk = 2.0 ** rng.integers(0, 7, 200), rng.choice([0.0, 64.0, 1024.0], 200)
    shape = {"requests": requests, "chunk": chunk, "ranks": rng.choice([1.0, 2.0], 200)}
    true = HostOverhead(2.5e-4, 9e-6, 4e-5, prefill_s=1.7e-4, per_prefill_token_s=4e-7, ranks_s=4e-4)
    noise = np.exp(rng.normal(0, 0.02, 200))
    found = fit_host(shape, host_s(true, shape) * noise)
    for name in HOST_RATES:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.25), name
    without = fit_host({**shape, "ranks": np.ones(200)}, host_s(true, {**shape, "ranks": np.ones(200)}))
    assert without.ranks_s == 0.0 and without.source == "measured"
    del shape["ranks"]  # as of a later stage
    assert fit_host(shape, host_s(without, shape)).prefill_s == pytest.approx(without.prefill_s, rel=1e-3)


def test_what_serving_adds_is_recovered() -> None:
    rng, count = np.random.default_rng(1), 1000
    shape = {
        "requests": 2.0 ** rng.integers(0, 7, count),
        "chunk": rng.choice([0.0, 64.0, 1024.0], count),
        "idle": rng.choice([0.0, 1.0], count),
        "tp": rng.choice([1.0, 2.0], count),
        "spp": rng.choice([1.0, 2.0], count),
        "kvp": rng.choice([1.0, 2.0], count),
    }
    true = ServingOverhead(4e-4, 4e-5, 3e-4, 1.7e-3, 6e-4, 8e-4, share=0.04, ranks_share=0.08)
    operators_s = np.exp(rng.uniform(np.log(2e-3), np.log(2e-1), count))
    host_s = np.full(count, 3e-4)
    time_s = operators_s + host_s + serving_s(true, shape, operators_s)
    found = fit_serving(shape, operators_s, host_s, time_s * np.exp(rng.normal(0, 0.01, count)))
    for name in SERVING_RATES:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.25), name
    # Never less than the parts.
    assert fit_serving(shape, 2 * time_s, host_s, time_s) == ServingOverhead()


def test_what_serving_adds_by_hand() -> None:
    """Of an iteration of 10 ms of operators and five requests, one of them a chunk: 0.1 ms, 0.02 a request,
    0.3 with a chunk, and 4 % of the operators; split in two, 8 % more, and 2 ms if by tensors. After a pause
    0.7 more, and another 0.6 if split."""
    serving = ServingOverhead(1e-4, 2e-5, 3e-4, 2e-3, 7e-4, 6e-4, share=0.04, ranks_share=0.08)
    for parallel, wanted_s, idle_s in (
        (ParallelSpec(), 5e-4 + 4e-4, 7e-4),
        (ParallelSpec(spp=2), 5e-4 + 12e-4, 13e-4),
        (ParallelSpec(tp=2), 5e-4 + 12e-4 + 2e-3, 13e-4),
        (ParallelSpec(kvp=2), 5e-4 + 12e-4, 13e-4),
    ):
        found_s = serving.at(5, parallel, has_chunk=True) + serving.share_of(parallel) * 1e-2
        assert found_s == pytest.approx(wanted_s)
        sizes = {"requests": 5, "chunk": 64, "idle": 0}
        sizes |= {"tp": parallel.tp, "spp": parallel.spp, "kvp": parallel.kvp}
        shape = {name: np.array([float(value)]) for name, value in sizes.items()}
        assert serving_s(serving, shape, np.array([1e-2])) == pytest.approx(wanted_s)
        shape["idle"] += 1
        assert serving_s(serving, shape, np.array([1e-2])) == pytest.approx(wanted_s + idle_s)
        assert serving.after_a_pause_s(parallel) == pytest.approx(idle_s)


# -- the shipped profile ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> TrainReport:
    return train(SHIPPED, save=False)


def test_held_out_errors(report: TrainReport) -> None:
    assert {entry.operator for entry in report.operators} >= {"all_reduce", "all_gather", "send_recv"}
    for entry in report.operators:
        assert entry.held_out.median <= 0.05, (entry.operator, str(entry.held_out))
        assert entry.held_out.p90 <= 0.12, (entry.operator, str(entry.held_out))
        assert entry.below_floor == 0


def test_eight_times_the_context(report: TrainReport) -> None:
    axes = {"prefill_attention": "length", "decode_attention": "context of one", "shard_attention": "context"}
    for entry in report.operators:
        if entry.operator in axes:
            far = entry.extrapolation[axes[entry.operator]]
            assert far.rows > 20 and far.median <= 0.10, (entry.operator, str(far))


def test_whole_layers_and_host(report: TrainReport) -> None:
    assert report.layer is not None and report.layer.corrected.median <= 0.07
    assert report.host is not None and report.host[0].median <= 0.05 and report.host[0].p90 <= 0.12
    assert report.skewed is not None and report.skewed.median <= 0.10
    assert report.iterations is not None and report.iterations.corrected.median <= 0.05
    # The least steady of all: quartiles within a visit are as far apart as half of what it takes.
    assert report.stage_gap is not None and report.stage_gap[0].median <= 0.12
    assert report.stage_gap[1] == load_kernels(CPU).stage_gap


def test_it_is_found_for_the_model_that_it_was_measured_for() -> None:
    kernels = load_kernels(CPU)
    assert kernels.gemm(64, 512, 256).source == "measured"
    assert load_kernels(CPU, model=TINY, tp=2).prefill_attention(64, 1000, 4, 2, 32).source == "measured"
    assert kernels.host is not None and kernels.layer is not None
    assert not kernels.attention_includes_kv_write and "kv_write" in kernels.kinds
    profile = find_profile(CPU, "measured")
    assert profile is not None and profile.threads == 1 and profile.path == SHIPPED


def test_three_rows_of_the_lm_head_take_longer_than_four() -> None:
    """As measured: so in an iteration's time, where GPUs count that as noise."""
    kernels = load_kernels(CPU, model=TINY)
    three_s, four_s = kernels.gemm([3, 4], TINY.vocab_size, TINY.hidden_size).time_s.tolist()
    assert kernels.steps_may_fall and 1.05 < three_s / four_s < 1.5
    cost = IterationModel(TINY, kernels, ParallelSpec())
    slower = 1.0 + cost.serving.share
    added_s = cost.tokens_s(8, 3, 8) - cost.tokens_s(8, 4, 8)
    assert added_s == pytest.approx(slower * (three_s - four_s), rel=0.1)
    assert not load_kernels(get_device("h100-sxm"), source="imported").steps_may_fall


def test_it_is_passed_over_for_others_and_the_reason_is_kept() -> None:
    other = load_kernels(CPU, model=get_model("llama-3-8b"))
    assert other.gemm(64, 512, 256).source == "roofline"
    assert (
        "measured for the shape of tiny-llama: its head_dim is 32, that of llama-3-8b 128"
        in other.passed_over[0]
    )
    narrow = load_kernels(CPU, weight_dtype="bf16", kv_dtype="bf16", model=TINY)
    assert narrow.gemm(1, 8, 8).source == "roofline"
    assert "was measured in fp32, not in bf16" in narrow.passed_over[0]
    with pytest.raises(InputError, match=r"no measured profile of cpu fits: .*shape of tiny-llama"):
        load_kernels(CPU, "measured", model=get_model("llama-3-8b"))
    with pytest.raises(InputError, match=r"tiny-llama-fp32: was measured for the shape of tiny-llama"):
        load_kernels(CPU, profile=SHIPPED, model=get_model("llama-3-8b"))
    with pytest.raises(InputError, match="trained with other data-sheet figures"):
        load_kernels(dataclasses.replace(CPU, memory_bandwidth_bytes_per_s=1e9), profile=SHIPPED)


def test_times_grow_with_context_and_stay_above_the_floor() -> None:
    kernels = load_kernels(CPU, model=TINY)
    contexts = np.unique(np.geomspace(1, 1e7, 200).astype(int))
    for chunk in (1, 16, 100, 512, 2048):
        found = kernels.prefill_attention(chunk, contexts, 8, 4, 32)
        assert np.all(np.diff(found.time_s) >= -1e-12) and np.all(found.time_s >= found.floor_s)
    assert kernels.prefill_attention(64, 1 << 20, 8, 4, 32).extrapolated
    assert not kernels.prefill_attention(64, 3000, 8, 4, 32).extrapolated
