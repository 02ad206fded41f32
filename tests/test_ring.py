"""Context parallelism: a ring of ranks against times computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.build import build
from experiments.load import load_config
from profiler.estimate import Estimate
from profiler.iteration import IterationModel
from profiler.kernels import RooflineKernels, load_kernels
from profiler.physics import STREAM_EFFICIENCY
from profiler.ring import Ring, RingModel
from sim.cluster import simulate
from specs import InputError, ModelSpec, ParallelSpec, fit_memory, get_device, get_model
from specs.devices import Link

MODEL = get_model("llama-3-8b")  # 32 layers, 32 heads, 8 KV heads of 128
H100 = get_device("h100-sxm")


def seconds(time_s: Any) -> Estimate:
    times = np.atleast_1d(np.asarray(time_s, dtype=np.float64))
    return Estimate(times, np.zeros_like(times), np.zeros(times.shape, dtype=np.bool_), "assumed")


class PairKernels(RooflineKernels):
    """Attention takes ``pair_s`` a pair of tokens (causal ones only), a byte sent ``byte_s``; nothing else
    takes time."""

    def __init__(self, *, pair_s: float, byte_s: float) -> None:
        super().__init__(H100)
        self.pair_s, self.byte_s = pair_s, byte_s

    def gemm(self, m: Any, n: Any, k: Any) -> Estimate:
        return seconds(0.0 * np.asarray(m))

    def elementwise(self, num_bytes: Any, *, kind: str = "", rows: Any = 1.0, shards: Any = 2.0) -> Estimate:
        return seconds(0.0 * np.asarray(num_bytes))

    def prefill_attention(self, chunk: Any, context: Any, *heads: Any) -> Estimate:
        return seconds(self.pair_s * chunk * (context + chunk / 2))

    def shard_attention(self, chunk: Any, context: Any, *heads: Any) -> Estimate:
        return seconds(self.pair_s * chunk * context)

    def decode_attention(self, batch: Any, total_context: Any, *heads: Any) -> Estimate:
        return seconds(self.pair_s * np.asarray(total_context))

    def send_recv(self, num_bytes: Any, inter_node: bool) -> Estimate:
        return seconds(self.byte_s * np.asarray(num_bytes))


class PeakKernels(RooflineKernels):
    """Attention at the data sheet's rate; no latency; merging is free."""

    def prefill_attention(self, *arguments: Any) -> Estimate:
        estimate = super().prefill_attention(*arguments)
        return replace(estimate, time_s=estimate.floor_s)

    def shard_attention(self, *arguments: Any) -> Estimate:
        estimate = super().shard_attention(*arguments)
        return replace(estimate, time_s=estimate.floor_s)

    def elementwise(self, num_bytes: Any, **_: Any) -> Estimate:
        return seconds(0.0 * np.asarray(num_bytes))


# -- one prompt, by hand ----------------------------------------------------------------------------------

BLOCK = 2 * 2 * 1000 * 8 * 128  # bytes of keys and values of 1,000 tokens


@pytest.mark.parametrize(
    ("ring", "byte_s", "expected_s"),
    [
        # 1,000 tokens a rank, 1e-6 s a pair: a causal block takes 0.5 s, a whole one 1 s; four steps.
        ("striped", 0.0, 4 * 0.5),
        ("striped", 0.4 / BLOCK, 4 * 0.5),  # a transfer of 0.4 s is hidden
        ("striped", 0.7 / BLOCK, 3 * 0.7 + 0.5),  # one of 0.7 s isn't: three of them, then the last block
        ("contiguous", 0.0, 0.5 + 3 * 1.0),
        ("contiguous", 0.7 / BLOCK, 0.7 + 3 * 1.0),  # only the first step is shorter than a transfer
        ("contiguous", 1.5 / BLOCK, 3 * 1.5 + 1.0),
    ],
)
def test_a_prompt_of_4000_tokens_on_four_ranks(ring: Any, byte_s: float, expected_s: float) -> None:
    kernels = PairKernels(pair_s=1e-6, byte_s=byte_s)
    cost = RingModel(MODEL, kernels, ParallelSpec(cp=4, ring=ring), max_chunk_tokens=8192)
    assert cost.prefill_s(4000) == pytest.approx(MODEL.num_layers * expected_s)
    # The event loop interpolates between sizes, of a function that is at most quadratic.
    assert cost.chunk_attention_s(4000, 0) == pytest.approx(MODEL.num_layers * expected_s, rel=0.01)


def test_a_later_chunk_sends_the_keys_of_all_that_came_before() -> None:
    """512 tokens behind 7,488 on 4 ranks: 128 queries a rank, and blocks of 2,000 keys. The transfers, 1.4 s
    each, take longer than the 0.247 s of a step: that is why a ring can't be chunked."""
    kernels = PairKernels(pair_s=1e-6, byte_s=0.7 / BLOCK)
    times = Ring(MODEL, kernels, ParallelSpec(cp=4)).attention(np.array([512.0]), np.array([7488.0]))
    step_s = 1e-6 * 128 * (1872 + 64)
    assert times.transfer.time_s == pytest.approx(1.4)
    assert times.time_s == pytest.approx(3 * 1.4 + step_s)


def test_decodes_are_dealt_out_and_read_a_share_of_the_keys_on_every_rank() -> None:
    kernels = PairKernels(pair_s=1e-6, byte_s=0.0)
    alone = RingModel(MODEL, kernels, ParallelSpec(cp=4))
    assert alone.decode_attention_s(8, 8 * 4000) == pytest.approx(MODEL.num_layers * 1e-6 * 8 * 1000)
    run = alone.decode_run(8, 8 * 4000, 3)
    assert run.total_s == pytest.approx(MODEL.num_layers * 1e-6 * (8000 + 8002 + 8004), rel=1e-6)


def test_the_rank_that_computes_is_one_of_cp() -> None:
    cost = RingModel(MODEL, RooflineKernels(H100), ParallelSpec(tp=2, cp=4), max_batch_tokens=65536)
    one = IterationModel(MODEL, RooflineKernels(H100), ParallelSpec(tp=2), max_batch_tokens=65536)
    assert cost.tokens_s(40_000, 4, 1) == one.tokens_s(10_000, 1, 1)
    assert cost.tokens_s(9, 9, 9) == one.tokens_s(3, 3, 9)
    (stage_s,) = cost.stage_times_s(40_000, 4, 1, 0.25)
    assert stage_s == pytest.approx(one.tokens_s(10_000, 1, 1) + 0.25)
    assert cost.tokens_outside_s(40_000, 4, 1) == one.tokens_outside_s(10_000, 1, 1)
    rows, alone = (
        {row.name: row.time_s for row in model.explain([(tokens, 0)])}
        for model, tokens in ((cost, 40_000), (one, 10_000))
    )
    shared = rows.keys() & alone.keys()
    assert len(shared) > 10 and all(rows[name] == alone[name] for name in shared)
    assert rows["ring attention"] == pytest.approx(4 * alone["prefill attention"])


# -- when transfers are hidden ------------------------------------------------------------------------------


def many_heads(model: ModelSpec) -> ModelSpec:
    return replace(model, num_kv_heads=model.num_heads)


def border(model: ModelSpec, ring: Any, bandwidth: float, tp: int = 1) -> int:
    link = Link(bandwidth, 0.0)
    device = replace(get_device("a100-80gb-sxm"), inter_node=link)
    return Ring(model, PeakKernels(device), ParallelSpec(tp=tp, cp=16, ring=ring)).overlap_tokens()


def test_24500_tokens_a_rank_on_a100_with_infiniband() -> None:
    """24.5K is what long-context serving papers quote for ring attention: 312 TFLOP/s and 12.5 GB/s."""
    assert border(many_heads(MODEL), "contiguous", 12.5e9) == pytest.approx(312e12 / 12.5e9, abs=2)
    assert border(many_heads(MODEL), "contiguous", 12.5e9) == pytest.approx(24.5e3, rel=0.02)


def test_grouped_queries_divide_the_border_and_the_causal_mask_doubles_it() -> None:
    assert border(MODEL, "contiguous", 12.5e9) == pytest.approx(24_960 / 4, abs=2)
    assert border(MODEL, "striped", 12.5e9) == pytest.approx(24_960 / 4 * 2, abs=2)
    assert border(MODEL, "striped", 12.5e9, tp=8) == pytest.approx(24_960 / 4 * 2, abs=2)


def test_below_the_border_ranks_wait_and_above_it_they_dont() -> None:
    device = replace(get_device("a100-80gb-sxm"), inter_node=Link(12.5e9, 14e-6))
    ring = Ring(MODEL, RooflineKernels(device), ParallelSpec(tp=8, cp=16))
    tokens = ring.overlap_tokens()
    assert tokens > 0
    for held, waits in ((tokens // 2, True), (tokens, False), (4 * tokens, False)):
        times = ring.attention(np.array([16.0 * held]), np.array([0.0]))
        assert (times.waiting_s[0] > 1e-4) == waits
    assert Ring(MODEL, RooflineKernels(device), ParallelSpec(tp=8)).overlap_tokens() == 0


# -- beside what was measured elsewhere ---------------------------------------------------------------------

# A ring of four hosts of 8 H100, TP8, Llama 3.1 405B: microseconds of a step's attention and of its SendRecv,
# of so many new tokens, 128,000 with those before them (arXiv 2411.01783, table 5).
MEASURED_STEPS = [(12_800, 1608e-6, 631e-6), (3_200, 414e-6, 627e-6)]


@pytest.mark.parametrize(("tokens", "attention_s", "send_recv_s"), MEASURED_STEPS)
def test_a_step_takes_what_it_was_measured_to(tokens: int, attention_s: float, send_recv_s: float) -> None:
    parallel = ParallelSpec(tp=8, cp=4, ring_merge="end")
    ring = Ring(get_model("llama-3.1-405b"), load_kernels(H100), parallel)
    times = ring.attention(np.array([float(tokens)]), np.array([128_000.0 - tokens]))
    assert times.step_s[0] == pytest.approx(attention_s, rel=0.2)
    assert times.transfer.time_s[0] == pytest.approx(send_recv_s, rel=0.1)
    assert (times.waiting_s[0] > 0) == (send_recv_s > attention_s)


# Forward passes a second of 8 ranks with 8,192 tokens of Llama 3.1 8B each: as many attentions without a
# ring, zigzag, striped (README of github.com/zhuzilin/ring-flash-attention).
PUBLIC_RINGS = [("h100-sxm", 591.5 / 8, 63.0, 55.0), ("a100-80gb-sxm", 373.4 / 8, 38.2, 32.5)]


@pytest.mark.parametrize(("device", "alone", "zigzag", "striped"), PUBLIC_RINGS)
def test_eager_merges_cost_what_the_rings_of_pytorch_lose(
    device: str, alone: float, zigzag: float, striped: float
) -> None:
    """What a public ring loses beyond its attention: half of a zigzag ring's merges are of half the rows, a
    striped one copies slices besides. Ours lies between; fused merges would cost less than either lost."""

    def merges_s(ring_merge: Any) -> float:
        parallel = ParallelSpec(cp=8, ring_merge=ring_merge)
        ring = Ring(MODEL, load_kernels(get_device(device)), parallel)
        times = ring.attention(np.array([65_536.0]), np.array([0.0]))
        return float((times.merges.time_s + times.waiting_s)[0])

    assert 1 / zigzag - 1 / alone < merges_s("eager") < 1 / striped - 1 / alone
    assert merges_s("end") < merges_s("step") < 1 / zigzag - 1 / alone


def test_merges_by_hand() -> None:
    """2,000 queries a rank, 32 heads of 128, four ranks: bytes ÷ (3.35 TB/s · 0.9), and a launch a kernel."""
    rows = 2000 * 32

    def merges_s(ring_merge: Any) -> float:
        ring = Ring(MODEL, RooflineKernels(H100), ParallelSpec(cp=4, ring_merge=ring_merge))
        return float(ring.attention(np.array([8000.0]), np.array([0.0])).merges.time_s[0])

    rate = 3.35e12 * STREAM_EFFICIENCY
    assert merges_s("end") == pytest.approx(3e-6 + rows * (5 * 128 * 2 + 4 * 4) / rate)
    assert merges_s("step") == pytest.approx(3 * (3e-6 + rows * (128 * (4 + 2 + 4) + 3 * 4) / rate))
    assert merges_s("eager") == pytest.approx(3 * (7 * 3e-6 + rows * (128 * 38 + 6 * 4) / rate))


# -- as a system --------------------------------------------------------------------------------------------

YAML = """
model: llama-3-8b
device: a100-80gb-sxm
predictor: {source: roofline}
parallel: {tp: 2, cp: 4}
scheduler: {chunking: whole, packing: prefill_first}
workload:
  lengths: {trace: long_and_short.csv}
  arrivals: {process: trace}
"""
ROWS = "arrival_s,prompt_tokens,output_tokens\n0,200000,20\n0.1,1000,2\n"


def written(folder: Path) -> Path:
    (folder / "ring.yaml").write_text(YAML)
    (folder / "long_and_short.csv").write_text(ROWS)
    return folder / "ring.yaml"


def test_a_prefill_holds_its_ranks_to_the_end(tmp_path: Path) -> None:
    path = written(tmp_path)
    experiment = build(load_config(path), str(path))
    assert experiment.parallel.gpus == 8
    assert isinstance(experiment.iteration, RingModel)
    records = simulate(experiment.workload, experiment.setup)
    alone_s = experiment.iteration.prefill_s(200_000)
    assert records.ttft_s[0] == pytest.approx(alone_s, rel=0.01)
    assert alone_s > 5.0
    assert records.requests["scheduled_s"][1] == records.requests["first_token_s"][0]  # behind the convoy


def test_a_rank_holds_the_activations_of_its_share() -> None:
    """1M tokens on 8 ranks: 125,000 · (2 · 4,096 + 3 · 14,336) elements of 2 bytes each, and the logits."""
    one, eight = (
        fit_memory(MODEL, H100, ParallelSpec(cp=cp), max_batch_tokens=tokens).reserved_bytes
        for cp, tokens in ((1, 125_000), (8, 1_000_000))
    )
    assert one == eight
    assert eight - H100.memory_bytes // 10 == pytest.approx(125_000 * 51_200 * 2 + 256 * 128_256 * 4, abs=2)


def test_every_rank_adds_its_memory() -> None:
    one, four = (
        fit_memory(
            MODEL, get_device("a100-80gb-sxm"), ParallelSpec(tp=2, cp=cp), max_batch_tokens=cp * 8192
        ).kv_capacity_tokens
        for cp in (1, 4)
    )
    assert four == 4 * one


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.spp=2", r"parallel.cp: 4 ranks in a ring don't go together with parallel.spp 2"),
        ("parallel.kvp=2", r"parallel.cp: 4 ranks in a ring don't go together with parallel.kvp 2"),
        ("scheduler.chunking=static", r"parallel.cp: .* scheduler.chunking must be whole, and is static"),
        ("parallel.ring=round", r"parallel.ring: .*'round'"),
        ("parallel.ring_merge=late", r"parallel.ring_merge: .*'late'"),
        ("parallel.cp=5000", r"parallel.cp: 5000 is more than 1024"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = written(tmp_path)
    with pytest.raises(InputError, match=message):
        build(load_config(path, [override]), str(path))
