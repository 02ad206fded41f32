"""Iteration times: interpolated against exact, never under the floor, and additive."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.iteration import HostOverhead, IterationModel
from profiler.kernels import Kernels, RooflineKernels, load_kernels
from profiler.overheads import LayerCorrection, ServingOverhead
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
    staged = IterationModel(LLAMA_8B, cost.kernels, parallel, host=HostOverhead(1e-4, 1e-6, stage_s=2e-4))
    assert staged.stage_layers == (11, 11, 10)
    attention_s = staged.chunk_attention_s(512, 4096)
    times_s = staged.stage_times_s(512, 1, 1, attention_s)
    total_s = sum(times_s) + 2 * staged.handover_s(512, 1)
    assert total_s == pytest.approx(staged.tokens_s(512, 1, 1) + attention_s, rel=1e-9)
    plain = staged.with_host(HostOverhead(1e-4, 1e-6))
    assert staged.handover_s(512, 1) - plain.handover_s(512, 1) == pytest.approx(2e-4)
    assert staged.tokens_s(512, 1, 1) - plain.tokens_s(512, 1, 1) == pytest.approx(2 * 2e-4)
    rows = {row.name: row.time_s for row in staged.explain([(512, 4096)])}
    assert rows["host, hand-overs"] == pytest.approx(2 * 2e-4)


def test_host_overhead_is_added_once_an_iteration(cost: IterationModel) -> None:
    slow = IterationModel(LLAMA_8B, cost.kernels, ParallelSpec(), host=HostOverhead(1e-3, 1e-5))
    assert slow.tokens_s(10, 1, 4) - cost.tokens_s(10, 1, 4) == pytest.approx(1e-3 + 4e-5)
    rows = {row.name: row for row in slow.explain([(10, 0)], 3, 300)}
    assert (rows["host overhead"].time_s, rows["host overhead"].source) == (pytest.approx(1.04e-3), "assumed")


def test_host_time_knows_chunks_and_ranks(cost: IterationModel) -> None:
    """By hand, whether looked up (few requests) or worked out (more than the table holds)."""
    host = HostOverhead(1e-3, 1e-5, root_s=1e-4, prefill_s=3e-4, per_prefill_token_s=1e-6, ranks_s=4e-4)
    one = IterationModel(LLAMA_8B, cost.kernels, ParallelSpec(), host=host, max_batch_requests=8)
    two = IterationModel(LLAMA_8B, cost.kernels, ParallelSpec(spp=2), host=host)
    free = IterationModel(LLAMA_8B, cost.kernels, ParallelSpec(), max_batch_requests=8)
    for tokens, rows, requests, wanted_s in (
        (1, 1, 1, 1.11e-3),
        (4, 4, 4, 1.24e-3),
        (64, 1, 1, 1.473e-3),
        (67, 4, 4, 1.603e-3),
        (336, 8, 36, 2.56e-3),
    ):
        assert one.tokens_s(tokens, rows, requests) - free.tokens_s(tokens, rows, requests) == pytest.approx(
            wanted_s
        )
        assert one.host_s(tokens, requests) == pytest.approx(wanted_s)
        assert two.host_s(tokens, requests) == pytest.approx(wanted_s + 4e-4)
    bare = IterationModel(LLAMA_8B, cost.kernels, ParallelSpec(spp=2))
    added_s = np.subtract(two.stage_times_s(64, 1, 1, 0.0), bare.stage_times_s(64, 1, 1, 0.0))
    assert added_s == pytest.approx([1.873e-3, 0.0])


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


# -- what was measured with the kernels -------------------------------------------------------------------


class Measured(RooflineKernels):
    """The roofline as if it had been measured: with the host, whole layers and rotation angles."""

    def __init__(
        self,
        *,
        includes_kv_write: bool = False,
        share: float = 0.1,
        serving: ServingOverhead | None = None,
        stage_gap: HostOverhead | None = None,
    ) -> None:
        super().__init__(H100)
        self.host = HostOverhead(2e-4, 3e-6, source="measured")
        self.layer = LayerCorrection(1e-6, share)
        self.serving = serving
        self.stage_gap = stage_gap
        self.kinds = frozenset({"rope_angles"})
        self.attention_includes_kv_write = includes_kv_write


def names_and_seconds(model: IterationModel) -> dict[str, float]:
    return {row.name: row.time_s for row in model.explain([(512, 1000)], 4, 4000)}


def test_imported_attention_has_stored_the_keys_already() -> None:
    """The published benchmarks of attention include the KV write: it isn't an operator of its own."""
    imported = names_and_seconds(IterationModel(LLAMA_8B, kernels("imported"), ParallelSpec()))
    roofline = names_and_seconds(IterationModel(LLAMA_8B, kernels("roofline"), ParallelSpec()))
    assert "kv write" in roofline and "kv write" not in imported
    assert set(roofline) - set(imported) == {"kv write"}
    assert "kv write" not in names_and_seconds(
        IterationModel(LLAMA_8B, Measured(includes_kv_write=True), ParallelSpec())
    )


def test_a_type_without_imported_attention_writes_its_keys() -> None:
    # No table of fp8 attention on the A100: attention is roofline, and that has no KV write in it.
    a100 = load_kernels(get_device("a100-80gb-sxm"), "imported", kv_dtype="fp8")
    assert not a100.attention_includes_kv_write
    assert load_kernels(get_device("a100-80gb-sxm"), "imported").attention_includes_kv_write


def test_measured_host_time_is_used_unless_another_is_given() -> None:
    measured = IterationModel(LLAMA_8B, Measured(), ParallelSpec())
    row = {row.name: row for row in measured.explain([(512, 0)], 3, 300)}["host overhead"]
    assert (row.time_s, row.source) == (pytest.approx(2e-4 + 4 * 3e-6), "measured")
    assert not measured.host_is_unknown
    given = IterationModel(LLAMA_8B, Measured(), ParallelSpec(), host=HostOverhead(1e-3))
    assert names_and_seconds(given)["host overhead"] == pytest.approx(1e-3)
    assert IterationModel(LLAMA_8B, kernels("roofline"), ParallelSpec()).host_is_unknown


def test_whole_layers_take_what_was_measured_beyond_their_parts() -> None:
    """A microsecond a layer and a tenth of the parts, attention included; interpolation sees the same."""
    plain = IterationModel(LLAMA_8B, Measured(share=0.0), ParallelSpec())
    more = IterationModel(LLAMA_8B, Measured(share=0.1), ParallelSpec())
    rows = names_and_seconds(more)
    outside = {"embedding", "rope angles", "final norm", "lm head", "sampling", "host overhead"}
    parts_s = sum(s for name, s in rows.items() if name not in outside and name != "between operators")
    assert rows["between operators"] == pytest.approx(32 * 1e-6 + 0.1 * parts_s)
    assert rows["rope angles"] > 0
    ratio = more.chunk_attention_s(512, 1000) / plain.chunk_attention_s(512, 1000)
    assert ratio == pytest.approx(1.1) == more.decode_attention_s(4, 4000) / plain.decode_attention_s(4, 4000)
    predicted = predicted_s(more, [(512, 1000)], 4, 4000)
    assert predicted == pytest.approx(sum(rows.values()), rel=0.01)


def test_a_running_engine_adds_what_was_measured_there() -> None:
    serving = ServingOverhead(4e-4, 3e-5, prefill_s=1e-4, tp_s=2e-3, idle_s=5e-4, idle_ranks_s=3e-4)
    for parallel, tp_s in (
        (ParallelSpec(spp=2), 0.0),
        (ParallelSpec(tp=2, spp=2), 2e-3),
        (ParallelSpec(spp=2, kvp=2), 0.0),
    ):
        plain = IterationModel(LLAMA_8B, Measured(), parallel)
        served = IterationModel(LLAMA_8B, Measured(serving=serving), parallel)
        for tokens, requests, wanted_s in ((3, 3, 4.9e-4), (66, 3, 5.9e-4)):
            added_s = served.tokens_s(tokens, 3, requests) - plain.tokens_s(tokens, 3, requests)
            assert added_s == pytest.approx(wanted_s + tp_s)
            stages = [model.stage_times_s(tokens, 3, requests, 0.01) for model in (served, plain)]
            assert np.subtract(*stages) == pytest.approx([(wanted_s + tp_s) / 2] * 2)
        rows = {row.name: row for row in served.explain([(64, 0)], 2, 300)}
        assert rows["serving overhead"].time_s == pytest.approx(5.9e-4 + tp_s)
        assert (plain.idle_s, served.idle_s) == (0.0, pytest.approx(8e-4))
    alone = IterationModel(LLAMA_8B, Measured(serving=serving), ParallelSpec())
    assert alone.idle_s == 5e-4


@pytest.mark.parametrize("parallel", [ParallelSpec(), ParallelSpec(tp=2), ParallelSpec(spp=2, kvp=2)])
def test_operators_take_a_share_more_in_a_running_engine(parallel: ParallelSpec) -> None:
    """5 % in one process, 12 on several ranks: all operators, but neither the host nor what goes between."""
    serving = ServingOverhead(share=0.05, ranks_share=0.07)
    factor = 1.05 if parallel.gpus_per_replica == 1 else 1.12
    host = HostOverhead(base_s=3e-3)
    plain = IterationModel(LLAMA_8B, Measured(), parallel, host=host)
    served = IterationModel(LLAMA_8B, Measured(serving=serving), parallel, host=host)
    stages = zip(served.stage_times_s(66, 3, 3, 0.0), plain.stage_times_s(66, 3, 3, 0.0), strict=True)
    for stage, (one, other) in enumerate(stages):
        host_s = 0.0 if stage else 3e-3
        assert one - host_s == pytest.approx(factor * (other - host_s))
    assert served.chunk_attention_s(64, 900) == pytest.approx(factor * plain.chunk_attention_s(64, 900))
    assert served.decode_attention_s(2, 300) == pytest.approx(factor * plain.decode_attention_s(2, 300))
    assert served.shard_attention_s(64, 900) == pytest.approx(factor * plain.shard_attention_s(64, 900))
    assert served.merge_s(64, 2) == pytest.approx(factor * plain.merge_s(64, 2))
    assert served.handover_s(66, parallel.spp - 1) == plain.handover_s(66, parallel.spp - 1)
    predicted = predicted_s(served, [(64, 0)], 2, 300)
    assert predicted == pytest.approx(sum(row.time_s for row in served.explain([(64, 0)], 2, 300)), rel=0.01)
    # Nothing was measured, so all is outside: the host's work and hand-overs no longer than they are.
    fixed_s = 3e-3 + sum(plain.handover_s(66, stage) for stage in range(1, parallel.spp))
    more_s, less_s = (model.tokens_outside_s(66, 3, 3) - fixed_s for model in (served, plain))
    assert more_s == pytest.approx(factor * less_s)
    steps = [model.decode_run(2, 300, 5).total_s for model in (served.with_host(host), served.perturbed({}))]
    assert steps == pytest.approx([served.decode_run(2, 300, 5).total_s] * 2)


def test_what_a_later_stage_takes_between_batches() -> None:
    """By hand: 300 µs, 50 a request, twice the root of their number; with a chunk 200 more and 1 a token."""
    gap = HostOverhead(3e-4, 5e-5, 1e-4, prefill_s=2e-4, per_prefill_token_s=1e-6)
    served = IterationModel(LLAMA_8B, Measured(stage_gap=gap), ParallelSpec(spp=2))
    assert served.stage_gap_s(4, 4) == pytest.approx(3e-4 + 4 * 5e-5 + 2 * 1e-4)
    assert served.stage_gap_s(104, 4) == pytest.approx(7e-4 + 2e-4 + 100 * 1e-6)
    plain = IterationModel(LLAMA_8B, Measured(), ParallelSpec(spp=2))
    assert plain.stage_gap_s(104, 4) == 0.0
    assert served.stage_times_s(104, 4, 4, 0.01) == plain.stage_times_s(104, 4, 4, 0.01)  # no part of a stage
    assert served.perturbed({"gemm": 1.2}).stage_gap == gap
    # Who says what the host takes says it of all of it.
    assert served.with_host(HostOverhead(1e-3)).stage_gap_s(4, 4) == 0.0
    given = IterationModel(LLAMA_8B, Measured(stage_gap=gap), ParallelSpec(spp=2), host=HostOverhead(1e-3))
    assert given.stage_gap_s(4, 4) == 0.0


def test_a_perturbed_kernel_moves_its_own_rows_alone() -> None:
    model = IterationModel(LLAMA_8B, kernels("imported"), ParallelSpec())
    slower = model.perturbed({"gemm": 1.2, "not_there": 3.0})
    before, after = names_and_seconds(model), names_and_seconds(slower)
    for name in before:
        factor = 1.2 if "projection" in name or name == "lm head" else 1.0
        assert after[name] == pytest.approx(factor * before[name]), name
    assert slower.chunk_attention_s(512, 0) == model.chunk_attention_s(512, 0)
    # No factor takes a time below what physics allows.
    impossible = model.perturbed({"gemm": 0.01}).explain([(512, 0)])
    assert all(row.time_s >= row.floor_s for row in impossible)


def test_rows_know_how_far_off_they_may_be() -> None:
    rows = {
        row.name: row
        for row in IterationModel(LLAMA_8B, kernels("imported"), ParallelSpec()).explain([(512, 0)])
    }
    gemm = rows["qkv projection"]
    assert gemm.kernel == "gemm" == rows["lm head"].kernel
    assert gemm.low_s is not None and gemm.high_s is not None and gemm.low_s < gemm.time_s < gemm.high_s
    assert rows["sampling"].low_s is None and rows["sampling"].kernel == ""
