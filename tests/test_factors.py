"""Factors on operators' times: each kind of kernels takes them, and every further one multiplies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from profiler.importers import layerwise, llmservingsim
from profiler.kernels import Kernels, load_kernels
from profiler.lookup import LookupKernels
from profiler.roofline_kernels import RooflineKernels
from profiler.step_kernels import StepKernels
from profiler.trained_kernels import TrainedKernels
from profiler.work import KINDS
from specs import get_device, get_model
from tests.test_lookup import layerwise_rows, small_tables, write

H100, RTX, B300 = (get_device(name) for name in ("h100-sxm", "rtx-pro-6000-blackwell", "b300"))
LLAMA, QWEN = get_model("llama-3.1-8b"), get_model("qwen3-32b")


def tables_of_operators(folder: Path) -> Kernels:
    small_tables(folder / "in")
    uneven = [(64, 32, kind, 0, 512, 1536, 1024, 655.0, 900.0) for kind in (0, 512)]
    header = "n,nb,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_skew_us"
    write(folder / "in" / "m_tp1_skew.csv", header, uneven)
    profile = llmservingsim.import_profile(folder / "in", RTX.name, LLAMA.name, folder / "out")
    return load_kernels(RTX, profile=profile.path, model=LLAMA)


def tables_of_passes(folder: Path) -> Kernels:
    header = "attn_tp,phase,batch_size,new_tokens,past_kv,latency_ms"
    write(folder / "layerwise.csv", header, layerwise_rows())
    profile = layerwise.import_profile(folder, B300.name, QWEN.name, folder / "out")
    return load_kernels(B300, profile=profile.path, model=QWEN)


def measured_on_a_cpu(folder: Path) -> Kernels:
    return load_kernels(get_device("cpu"), "measured", model=get_model("tiny-llama"))


ALL: dict[str, Callable[[Path], Kernels]] = {
    "roofline": lambda folder: load_kernels(H100, "roofline"),
    "imported": lambda folder: load_kernels(H100, "imported"),
    "measured": measured_on_a_cpu,
    "tables of operators": tables_of_operators,
    "tables of passes": tables_of_passes,
    "steps": lambda folder: StepKernels(H100, LLAMA, [1, 512], [0.01, 0.02]),
}


@pytest.fixture(scope="module", params=ALL)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return ALL[request.param](tmp_path_factory.mktemp("tables"))


def times_of(kernels: Kernels) -> dict[str, float]:
    """Seconds of some call of everything there is, by what it is."""
    cpu = kernels.device.name == "cpu"
    heads = (4, 2, 32) if cpu else (64, 8, 128) if kernels.device.name == "b300" else (32, 8, 128)
    hidden = 128 if cpu else 4096
    rows = 64.0
    found = {
        "gemm": kernels.gemm(rows, 6144, hidden).time_s,
        "prefill_attention": kernels.prefill_attention(64.0, 1024.0, *heads).time_s,
        "decode_attention": kernels.decode_attention(4.0, 4096.0, *heads).time_s,
        "shard_attention": kernels.shard_attention(16.0, 1024.0, *heads).time_s,
        "all_reduce": kernels.all_reduce(1e6, 2).time_s,
        "all_reduce between nodes": kernels.all_reduce(1e6, 2 * kernels.device.gpus_per_node).time_s,
        "all_gather": kernels.all_gather(1e6, 2).time_s,
        "send_recv": kernels.send_recv(1e6, inter_node=False).time_s,
        "send_recv between nodes": kernels.send_recv(1e6, inter_node=True).time_s,
    }
    per_row = {"norm": 8 * 4096, "rope": 4 * (4096 + 1024), "activation": 6 * 14336}
    per_row |= {"embedding": 4 * 4096, "sampling": 2 * 128256}
    for kind in KINDS:
        found[kind] = kernels.elementwise(per_row.get(kind, 1024) * rows, kind=kind, rows=rows).time_s
    rest = kernels.rest_of_layer(np.array([rows]), 1)
    some = np.array([4.0])
    mixing_s = kernels.mixing_s(np.array([512.0]), some, np.array([1024.0]), heads)
    spread_s = kernels.spread_s(some, heads, mixed=False)
    for name, value in (
        ("rest_of_layer", None if rest is None else rest.time_s),
        ("mixed_attention", mixing_s),
        ("uneven_attention", spread_s),
    ):
        if value is not None:
            found[name] = value
    return {name: float(np.ravel(value)[0]) for name, value in found.items()}


def test_no_kind_of_kernels_is_missing_here(tmp_path_factory: pytest.TempPathFactory) -> None:
    there = {type(make(tmp_path_factory.mktemp("tables"))) for make in ALL.values()}
    kinds = [RooflineKernels]
    for kind in kinds:  # grows meanwhile
        kinds += [each for each in kind.__subclasses__() if each.__module__.startswith("profiler.")]
    assert there == {*kinds} == {RooflineKernels, TrainedKernels, LookupKernels, StepKernels}


def test_a_factor_on_top_of_another_multiplies(kernels: Kernels) -> None:
    before = times_of(kernels)
    for operator in kernels.operators:
        twice = kernels.perturbed({operator: 2.0}).perturbed({operator: 3.0})
        assert type(twice) is type(kernels)
        after = times_of(twice)
        assert after == pytest.approx(times_of(kernels.perturbed({operator: 6.0}))), operator
        changed = {name for name in before if after[name] != pytest.approx(before[name])}
        if operator == "roofline":  # of all that has no table
            assert "send_recv between nodes" in changed
        else:
            assert changed == {operator}
        for name in changed:
            assert after[name] == pytest.approx(6.0 * before[name]), name
    assert times_of(kernels) == before


def test_factors_on_other_operators_are_kept(kernels: Kernels) -> None:
    for one, other in combinations(sorted(kernels.operators), 2):
        together = times_of(kernels.perturbed({one: 2.0, other: 3.0}))
        assert together == pytest.approx(times_of(kernels.perturbed({one: 2.0}).perturbed({other: 3.0})))
        assert together == pytest.approx(times_of(kernels.perturbed({other: 3.0}).perturbed({one: 2.0})))
