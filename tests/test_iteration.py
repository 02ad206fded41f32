"""Iteration times: interpolated against exact, never under the floor, and additive."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.iteration import HostOverhead, IterationModel
from profiler.kernels import Kernels, load_kernels
from specs import ParallelSpec, get_device, get_model

LLAMA_8B, LLAMA_70B, H100 = get_model("llama-3-8b"), get_model("llama-3-70b"), get_device("h100-sxm")
SOURCES = ("roofline", "imported")


def kernels(source: str) -> Kernels:
    return load_kernels(H100, source)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=SOURCES)
def cost(request: pytest.FixtureRequest) -> IterationModel:
    return IterationModel(LLAMA_8B, kernels(request.param), ParallelSpec())


def predicted_s(cost: IterationModel, chunks: list[tuple[int, int]], decodes: int, context: int) -> float:
    tokens = sum(c for c, _ in chunks) + decodes
    rows = requests = len(chunks) + decodes
    attention_s = sum(cost.chunk_attention_s(c, n) for c, n in chunks)
    if decodes:
        attention_s += cost.decode_attention_s(decodes, context)
    return cost.tokens_s(tokens, rows, requests) + attention_s


def test_interpolated_iterations_are_near_the_exact_ones(cost: IterationModel) -> None:
    """The event loop's times against the kernel models'. They differ by interpolation, and lie above them
    where a kernel model says that more tokens take less time: the event loop's times never fall."""
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(400):
        count = int(rng.integers(0, 3))
        chunks = [(int(2 ** rng.uniform(0, 11)), int(2 ** rng.uniform(0, 20))) for _ in range(count)]
        decodes = int(rng.integers(0 if chunks else 1, 257))
        context = decodes * int(2 ** rng.uniform(0, 17))
        exact_s = sum(row.time_s for row in cost.explain(chunks, decodes, context))
        errors.append(predicted_s(cost, chunks, decodes, context) / exact_s - 1)
    assert np.median(np.abs(errors)) < 0.005
    assert np.quantile(np.abs(errors), 0.95) < 0.03
    assert min(errors) > -0.03


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 8192), st.integers(0, 20_000_000))
def test_chunk_attention_is_never_faster_than_physics(cost: IterationModel, chunk: int, context: int) -> None:
    # 4 FLOP a pair and element, at the data sheet's peak; K and V read once, at its bandwidth.
    pairs = chunk * context + chunk * (chunk + 1) / 2
    flop_s = 4 * pairs * 32 * 128 / 989e12 * 32
    byte_s = (context + chunk) * 2 * 8 * 128 * 2 / 3.35e12 * 32
    assert cost.chunk_attention_s(chunk, context) >= max(flop_s, byte_s) * (1 - 1e-9)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 256), st.integers(1, 10_000_000))
def test_decode_attention_is_never_faster_than_physics(
    cost: IterationModel, decodes: int, context: int
) -> None:
    byte_s = decodes * context * 2 * 8 * 128 * 2 / 3.35e12 * 32
    assert cost.decode_attention_s(decodes, decodes * context) >= byte_s * (1 - 1e-9)


@pytest.mark.parametrize("chunk", [16, 32, 512, 4096])
@pytest.mark.parametrize("context", [1_000_000, 10_000_000])
def test_long_contexts_stay_above_the_floor_and_within_sight_of_it(
    cost: IterationModel, chunk: int, context: int
) -> None:
    rows = {row.name: row for row in cost.explain([(chunk, context)])}
    attention = rows["prefill attention"]
    assert attention.floor_s <= attention.time_s < 4 * attention.floor_s


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8000), st.integers(0, 2_000_000), st.integers(0, 100), st.integers(0, 100_000))
def test_times_never_fall_with_size(
    cost: IterationModel, chunk: int, context: int, more_chunk: int, more_context: int
) -> None:
    small, large = cost.chunk_attention_s(chunk, context), cost.chunk_attention_s(chunk + more_chunk, context)
    assert large >= small * (1 - 1e-12)
    assert cost.chunk_attention_s(chunk, context + more_context) >= small * (1 - 1e-12)
    assert cost.tokens_s(chunk + more_chunk, 1, 1) >= cost.tokens_s(chunk, 1, 1) * (1 - 1e-12)
    assert cost.decode_attention_s(8, context + more_context + 8) >= cost.decode_attention_s(8, context + 8)


def test_linear_layers_of_one_token_read_the_weights_once() -> None:
    """A lone decode reads 8.03 B parameters less the embedding, in bf16, at 3.35 TB/s: 4.5 ms."""
    cost = IterationModel(LLAMA_8B, kernels("roofline"), ParallelSpec())
    floor_s = sum(row.floor_s for row in cost.explain([], 1, 1000))
    weights = LLAMA_8B.num_parameters - LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    assert floor_s == pytest.approx(weights * 2 / 3.35e12, rel=0.02)


@pytest.mark.parametrize("source", SOURCES)
def test_tensor_parallelism_splits_the_work_and_adds_collectives(source: str) -> None:
    one = IterationModel(LLAMA_70B, kernels(source), ParallelSpec(tp=2))
    four = IterationModel(LLAMA_70B, kernels(source), ParallelSpec(tp=8))
    ratio = one.tokens_s(2048, 1, 1) / four.tokens_s(2048, 1, 1)
    assert 2.0 < ratio < 4.0
    names = {row.name for row in four.explain([(2048, 0)])}
    assert {"all-reduce after attention", "all-reduce after mlp", "logits gather"} <= names


def test_stage_times_and_handovers_add_up_to_the_iteration(cost: IterationModel) -> None:
    parallel = ParallelSpec(tp=8, spp=3)
    staged = IterationModel(LLAMA_8B, cost.kernels, parallel, host=HostOverhead(1e-4, 1e-6))
    assert staged.stage_layers == (11, 11, 10)
    attention_s = staged.chunk_attention_s(512, 4096)
    times_s = staged.stage_times_s(512, 1, 1, attention_s)
    total_s = sum(times_s) + 2 * staged.handover_s(512)
    assert total_s == pytest.approx(staged.tokens_s(512, 1, 1) + attention_s, rel=1e-9)


def test_host_overhead_is_added_once_an_iteration(cost: IterationModel) -> None:
    slow = IterationModel(LLAMA_8B, cost.kernels, ParallelSpec(), host=HostOverhead(1e-3, 1e-5))
    assert slow.tokens_s(10, 1, 4) - cost.tokens_s(10, 1, 4) == pytest.approx(1e-3 + 4e-5)
    rows = {row.name: row for row in slow.explain([(10, 0)], 3, 300)}
    assert (rows["host overhead"].time_s, rows["host overhead"].source) == (pytest.approx(1.04e-3), "assumed")


def test_flops_are_those_of_the_model_spec(cost: IterationModel) -> None:
    pairs = 512 * 1000 + 512 * 513 // 2
    expected = LLAMA_8B.linear_flops_per_token() * 512 + LLAMA_8B.lm_head_flops_per_row()
    triangle = LLAMA_8B.attention_flops(512, 1000)  # counts the triangle as c²/2, without its diagonal
    assert cost.flops(512, 1, pairs) == pytest.approx(expected + triangle, rel=1e-3)


def test_the_share_outside_the_measured_range_is_known() -> None:
    cost = IterationModel(LLAMA_8B, kernels("imported"), ParallelSpec())
    assert not cost.chunk_is_extrapolated(512, 1024)
    assert cost.chunk_is_extrapolated(512, 5_000_000)
    assert not cost.decode_is_extrapolated(8, 8 * 2048)
    assert cost.decode_is_extrapolated(8, 8 * 5_000_000)
    assert np.isfinite(cost.chunk_attention_s(512, 5_000_000))
