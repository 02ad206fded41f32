"""Profiles that are read off: imported tables of one model, interpolated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.scheduler import SchedulerSettings
from profiler.importers import layerwise, llmservingsim
from profiler.iteration import IterationModel
from profiler.kernels import load_kernels
from profiler.ladders import Curve, Ladder
from profiler.lookup import LookupKernels
from sim.cluster import Setup, simulate
from specs import ParallelSpec, get_device, get_model
from specs.errors import InputError
from traces.workload import Workload

LLAMA, QWEN = get_model("llama-3.1-8b"), get_model("qwen3-32b")
RTX, B300 = get_device("rtx-pro-6000-blackwell"), get_device("b300")
GIVEN = Path(__file__).resolve().parents[1].parent / "shared" / "groundtruth"


def write(path: Path, header: str, rows: list[tuple[object, ...]]) -> None:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def small_tables(folder: Path) -> Path:
    """LLMServingSim's tables by simple formulas, microseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "layernorm", "rotary_emb", "act_fn")
    dense = [
        (layer, tokens, 1000.0 * (place + 1) + tokens)
        for place, layer in enumerate((*layers, "embedding", "final_layernorm"))
        for tokens in (1, 64, 1024, 2048)
    ]
    write(folder / "m_tp1_dense.csv", "layer,tokens,time_us", dense)
    rows = [(layer, n, 900.0 + n) for layer in ("lm_head", "sampler") for n in (1, 128)]
    write(folder / "m_tp1_per_sequence.csv", "layer,sequences,time_us", rows)
    attention = []
    for chunk in (0, 16, 512, 2048):
        for context in (0, 1024, 4096) if chunk else (0,):
            for decodes in (0, 1, 64):
                for mean in (1024, 4096) if decodes else (0,):
                    if chunk or decodes:
                        time_us = chunk * (1000 + context) / 1000 + decodes * mean / 100
                        time_us *= 1.5 if chunk and decodes else 1.0
                        attention.append((chunk, context, decodes, mean, time_us))
    write(folder / "m_tp1_attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", attention)
    return folder


def kernels_of(tmp_path: Path) -> LookupKernels:
    llmservingsim.import_profile(small_tables(tmp_path / "in"), RTX.name, LLAMA.name, tmp_path / "out")
    found = load_kernels(RTX, profile=tmp_path / "out" / "llmservingsim-llama-3.1-8b", model=LLAMA)
    assert isinstance(found, LookupKernels)
    return found


def test_operators_are_read_off_and_interpolated(tmp_path: Path) -> None:
    kernels = kernels_of(tmp_path)
    qkv = kernels.gemm(np.array([64.0, 544.0, 1024.0]), 6144, 4096)
    np.testing.assert_allclose(qkv.time_s * 1e6, [1064, 1544, 2024])
    assert qkv.source == "imported"
    assert not qkv.extrapolated.any()
    beyond = kernels.gemm(np.array([4096.0]), 6144, 4096)
    np.testing.assert_allclose(beyond.time_s * 1e6, [1000 + 4096])
    assert beyond.extrapolated.all()
    assert kernels.gemm(64.0, 4095, 4096).source == "roofline"
    norm = kernels.elementwise(2 * 64.0 * 4 * 4096, kind="norm", rows=64.0)
    np.testing.assert_allclose(norm.time_s * 1e6, 5064)


def test_attention_is_that_of_the_tables(tmp_path: Path) -> None:
    kernels = kernels_of(tmp_path)
    chunk = kernels.prefill_attention(np.array([512.0, 512.0]), np.array([1024.0, 2560.0]), 32, 8, 128)
    np.testing.assert_allclose(chunk.time_s * 1e6, [512 * 2.024, 512 * 3.56], rtol=1e-4)
    decodes = kernels.decode_attention(np.array([64.0]), np.array([64.0 * 2560]), 32, 8, 128)
    np.testing.assert_allclose(decodes.time_s * 1e6, [64 * 25.6], rtol=1e-4)


def test_a_mixed_batch_takes_what_was_measured_of_mixed_batches(tmp_path: Path) -> None:
    """In the tables a mixed call takes half as long again as its parts; the joint term is the rest."""
    cost = IterationModel(LLAMA, kernels_of(tmp_path), ParallelSpec(), max_chunk_tokens=2048)
    assert cost.joint_is_known
    mean_context_of_chunks = (0 + 1024 + 4096) / 3
    alone_us = 512 * (1000 + mean_context_of_chunks) / 1000 + 64 * 1024 / 100
    joint_s = cost.joint_attention_s(512, 64, 64 * 1024, 0.0)
    assert joint_s == pytest.approx(0.5 * alone_us * 1e-6 * 32, rel=0.02)
    assert cost.joint_attention_s(0, 64, 64 * 1024, 0.0) == 0.0


def test_uneven_decodes_take_longer_in_proportion_to_their_spread(tmp_path: Path) -> None:
    folder = small_tables(tmp_path / "in")
    rows = []
    for n in (8, 64):
        for big in (2, 4):  # half of them with 1024 − d, half with 1024 + d; 1 µs more for every 8 tokens
            d = 128 * big
            even_us = n * 1024 / 100
            rows.append((n, n // 2, 0, 0, 1024 - d, 1024 + d, 1024, even_us, even_us + d / 8))
    write(folder / "m_tp1_skew.csv", "n,nb,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_skew_us", rows)
    llmservingsim.import_profile(folder, RTX.name, LLAMA.name, tmp_path / "out")
    kernels = load_kernels(RTX, profile=tmp_path / "out" / "llmservingsim-llama-3.1-8b", model=LLAMA)
    cost = IterationModel(LLAMA, kernels, ParallelSpec(), max_chunk_tokens=2048)
    assert cost.joint_attention_s(0, 64, 64 * 1024, 400.0) == pytest.approx(32 * 50e-6, rel=1e-3)
    assert cost.joint_attention_s(0, 1, 1024, 0.0) == 0.0


def test_runs_of_steps_taken_at_once_last_as_long_with_uneven_contexts(tmp_path: Path) -> None:
    """The contexts' spread stays as it is while the same requests decode, so each step takes as much more."""
    folder = small_tables(tmp_path / "in")
    rows = [(64, 32, 0, 0, 512, 1536, 1024, 655.0, 900.0), (64, 32, 512, 0, 512, 1536, 1024, 955.0, 1400.0)]
    write(folder / "m_tp1_skew.csv", "n,nb,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_skew_us", rows)
    llmservingsim.import_profile(folder, RTX.name, LLAMA.name, tmp_path / "out")
    kernels = load_kernels(RTX, profile=tmp_path / "out" / "llmservingsim-llama-3.1-8b", model=LLAMA)
    cost = IterationModel(LLAMA, kernels, ParallelSpec(), max_chunk_tokens=2048)
    rng = np.random.default_rng(4)
    workload = Workload(
        rng.integers(50, 3000, 60).astype(np.int32),
        rng.integers(1, 200, 60).astype(np.int32),
        np.sort(rng.uniform(0, 20, 60)),
    )
    settings = SchedulerSettings(chunk_tokens=1024, max_batch_requests=24)
    setup = Setup(cost, 200_000, settings)
    quick, slow = simulate(workload, setup), simulate(workload, setup, step_by_step=True)
    np.testing.assert_allclose(quick.requests["finished_s"], slow.requests["finished_s"], rtol=1e-9)
    even = IterationModel(LLAMA, kernels_of(tmp_path / "even"), ParallelSpec(), max_chunk_tokens=2048)
    assert quick.end_s > simulate(workload, Setup(even, 200_000, settings)).end_s


def test_graphs_are_padded() -> None:
    kernels = load_kernels(RTX, "roofline")
    plain = IterationModel(LLAMA, kernels, ParallelSpec())
    padded = IterationModel(LLAMA, kernels, ParallelSpec(), graph_tokens=(1, 2, 4, 8, 16))
    assert padded.tokens_s(9, 1, 9) == plain.tokens_s(16, 1, 9)
    assert padded.tokens_s(16, 1, 16) == plain.tokens_s(16, 1, 16)
    assert padded.tokens_s(17, 1, 17) == plain.tokens_s(17, 1, 17)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m_tp1_dense.csv", "layer,tokens,time_us\nmoe,1,2\n", "unknown layer 'moe'"),
        ("m_tp1_dense.csv", "layer,tokens\nqkv_proj,1\n", "no column 'time_us'"),
        ("m_tp1_dense.csv", "layer,tokens,time_us\nqkv_proj,1,fast\n", "row 2: time_us"),
        ("other_tp1_dense.csv", "layer,tokens,time_us\nqkv_proj,1,2\n", "the second dense table"),
    ],
)
def test_unsound_tables_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = small_tables(tmp_path / "in")
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        llmservingsim.import_profile(folder, RTX.name, LLAMA.name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def layerwise_rows(tp: int = 1) -> list[tuple[object, ...]]:
    """Passes of 10 ms + 40 µs a token, attention of a chunk 1 ns a pair, of decodes 100 ns a key."""
    rows: list[tuple[object, ...]] = []
    for requests in (1, 4):
        for tokens in (16, 256, 2048):
            for past in (0, 1024, 8192):
                pairs = tokens * past + tokens * tokens / 2
                seconds = 0.010 + 40e-6 * requests * tokens + 1e-9 * requests * pairs
                rows.append((tp, "ctx", requests, tokens, past, 1e3 * seconds))
    for requests in (1, 16):
        for past in (1, 512, 1024, 4096, 8192, 16384):
            seconds = 0.010 + 40e-6 * requests + 1e-7 * requests * past
            seconds += 0.016 if past >= 8192 and requests == 1 else 0.0
            rows.append((tp, "gen", requests, 1, past, 1e3 * seconds))
    return rows


def test_passes_come_apart_into_attention_and_the_rest(tmp_path: Path) -> None:
    write(
        tmp_path / "layerwise.csv", "attn_tp,phase,batch_size,new_tokens,past_kv,latency_ms", layerwise_rows()
    )
    profile = layerwise.import_profile(tmp_path, B300.name, QWEN.name, tmp_path / "out")
    assert dict(profile.tables[0].dropped) == {"inflated decodes": 2}
    cost = IterationModel(
        QWEN, load_kernels(B300, profile=profile.path, model=QWEN), ParallelSpec(), max_chunk_tokens=8192
    )
    assert cost.tokens_s(1024, 1, 1) == pytest.approx(0.010 + 40e-6 * 1024, rel=0.01)
    assert cost.tokens_s(8192, 1, 1) == pytest.approx(0.010 + 40e-6 * 8192, rel=0.01)
    assert cost.chunk_attention_s(2048, 4096) == pytest.approx(1e-9 * (2048 * 4096 + 2048**2 / 2), rel=0.02)
    assert cost.chunk_attention_s(8192, 0) == pytest.approx(1e-9 * 8192**2 / 2, rel=0.02)
    assert cost.decode_attention_s(1, 16384) == pytest.approx(1e-7 * 16384, rel=0.02)
    assert cost.decode_attention_s(16, 16 * 2048) == pytest.approx(1e-7 * 16 * 2048, rel=0.02)


def test_a_lookup_holds_for_its_model_alone(tmp_path: Path) -> None:
    write(
        tmp_path / "layerwise.csv", "attn_tp,phase,batch_size,new_tokens,past_kv,latency_ms", layerwise_rows()
    )
    profile = layerwise.import_profile(tmp_path, B300.name, QWEN.name, tmp_path / "out")
    with pytest.raises(InputError, match="qwen3-32b"):
        load_kernels(B300, profile=profile.path, model=LLAMA)
    with pytest.raises(InputError, match="tensor parallelism 1, not 2"):
        load_kernels(B300, profile=profile.path, model=QWEN, tp=2)
    with pytest.raises(InputError, match="--force"):
        layerwise.import_profile(tmp_path, B300.name, QWEN.name, tmp_path / "out")


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-6, 1)), min_size=1, max_size=20))
def test_a_curve_stays_between_its_measurements(points: list[tuple[int, float]]) -> None:
    sizes, times = np.array([float(x) for x, _ in points]), np.array([y for _, y in points])
    found = Curve(sizes, times).at(np.arange(0.0, sizes.max() + 1))
    assert (found >= times.min() - 1e-12).all()
    assert (found <= times.max() + 1e-12).all()


def test_a_ladder_meets_its_measurements() -> None:
    height, size = (a.ravel() for a in np.meshgrid([1.0, 4.0, 16.0], [10.0, 100.0, 1000.0]))
    time_s = height * size**1.1
    ladder = Ladder(height, size, time_s)
    np.testing.assert_allclose(ladder.at(height, size), time_s)


@pytest.mark.skipif(not GIVEN.exists(), reason=f"{GIVEN} isn't there")
def test_the_given_tables_are_read(tmp_path: Path) -> None:
    profile = llmservingsim.import_profile(
        GIVEN / "vllm019_rtxpro6000" / "profile", RTX.name, LLAMA.name, tmp_path
    )
    kernels = load_kernels(RTX, profile=profile.path, model=LLAMA)
    # Rows of the files: qkv_proj of 128 tokens 42.976 µs; 64 decodes of 2048 tokens 398 µs.
    np.testing.assert_allclose(kernels.gemm(128.0, 6144, 4096).time_s, 42.976e-6, rtol=1e-4)
    found = kernels.decode_attention(64.0, 64.0 * 2048, 32, 8, 128).time_s
    np.testing.assert_allclose(found, 398e-6, rtol=2e-3)
    passes = layerwise.import_profile(GIVEN / "vllm020_b300", B300.name, QWEN.name, tmp_path)
    assert passes.tables[0].dropped["inflated decodes"] > 0
