"""The import of aiconfigurator-core's Parquet: units, selection, provenance; and its absence."""

from __future__ import annotations

import datetime
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiler.importers.aiconfigurator import SYSTEMS, data_root, import_profile
from profiler.tables import PROFILES, read_profile, read_table
from specs.errors import InputError

pytest.importorskip("pyarrow", reason="pyarrow (extra nvidia-data) is not installed")

DAY = datetime.date(2026, 1, 2)


def attention(**changes: list[Any]) -> dict[str, list[Any]]:
    rows = len(next(iter(changes.values())))
    base: dict[str, Any] = {
        "kernel_source": "fa3",
        "batch_size": 2,
        "isl": 1,
        "num_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "beam_width": 1,
        "attn_dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "step": 0,
        "window_size": 0,
        "latency": 0.5,
    }
    return {name: changes.get(name, [value] * rows) for name, value in base.items()}


def write(root: Path, relative: str, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / "h100_sxm" / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A tiny copy of the package's `systems/data`, with rows that have to be left out."""
    root = tmp_path / "systems" / "data"
    write(
        root,
        "gemm/vllm/0.24.0/gemm_perf.parquet",
        {
            "gemm_dtype": ["bfloat16", "bfloat16", "bfloat16", "fp8", "fp8_block", "bfloat16"],
            "m": [16, 16, 16, 16, 16, 32],
            "n": [128] * 6,
            "k": [256] * 6,
            "latency": [0.010, 0.030, 0.011, 0.004, 0.1, float("nan")],
            "kernel_source": ["linear"] * 3 + ["cutlass", "deepgemm", "linear"],
        },
    )
    write(
        root,
        "attention/vllm/0.24.0/context_attention_perf.parquet",
        attention(isl=[512, 512, 512, 64], window_size=[0, 128, 0, 0], head_dim=[128, 128, 256, 64]),
    )
    write(
        root,
        "attention/vllm/0.24.0/generation_attention_perf.parquet",
        attention(step=[1, 1023], kv_cache_dtype=["bfloat16", "fp8"]),
    )
    write(
        root,
        "comm/vllm/0.24.0/custom_allreduce_perf.parquet",
        {
            "allreduce_dtype": ["bfloat16", "bfloat16"],
            "num_gpus": [8, 8],
            "message_size": [1024, 1024],
            "latency": [0.005, 0.02],
            "backend": ["vllm_graph", "vllm_eager"],
            "kernel_source": ["custom", "custom"],
        },
    )
    # An older version, complete, and a newer one that has only GEMMs: neither is chosen.
    for family in ("gemm", "attention", "comm"):
        for file in (root / "h100_sxm" / family / "vllm" / "0.24.0").iterdir():
            old = file.parent.parent / "0.9.0" / file.name
            old.parent.mkdir(exist_ok=True)
            old.write_bytes(file.read_bytes())
    newer = root / "h100_sxm" / "gemm" / "vllm" / "0.30.0"
    newer.mkdir()
    (newer / "gemm_perf.parquet").write_bytes(b"")
    return root


def test_units_and_selection(package: Path, tmp_path: Path) -> None:
    written = import_profile("h100-sxm", tmp_path / "out", root=package, package_version="0.12.0", today=DAY)
    profile = read_profile(tmp_path / "out" / "vllm-0.24.0")
    assert profile == written
    assert (
        profile.source == "imported" and profile.licence == "Apache-2.0" and profile.created == "2026-01-02"
    )
    assert profile.versions == {"aiconfigurator-core": "0.12.0", "vllm": "0.24.0"}
    tables = {info.key: (info, read_table(profile, info)) for info in profile.tables}

    info, gemm = tables["gemm_bf16"]
    assert len(gemm) == 1 and gemm.time_s[0] == pytest.approx(11e-6)  # ms, median of three repeats
    assert info.dropped == {"no time, or not above 0": 1, "repeats of a shape, median taken": 2}
    assert info.kernel_source == "linear" and "gemm_perf.parquet (SHA-256 " in info.origin
    assert tables["gemm_fp8"][0].kernel_source == "cutlass"  # not the block-scaled kernels

    _, prefill = tables["prefill_attention_bf16"]
    assert sorted(zip(prefill.shape["chunk"], prefill.shape["head_dim"], strict=True)) == [
        (64, 64),
        (512, 128),
    ]
    assert not prefill.shape["context"].any()

    _, decode = tables["decode_attention_bf16"]
    assert decode.shape["total_context"].tolist() == [2 * 2]  # step 1 reads two tokens, for two requests
    assert tables["decode_attention_fp8"][1].shape["total_context"].tolist() == [2 * 1024]

    _, reduce = tables["all_reduce_bf16"]
    assert reduce.shape["num_bytes"].tolist() == [2048] and reduce.time_s.tolist() == [
        5e-6
    ]  # graph, elements


def test_importing_twice_gives_the_same_files(package: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        import_profile("h100-sxm", tmp_path / name, root=package, today=DAY)
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "vllm-0.24.0").iterdir()}
        for name in "ab"
    )
    assert first == second


def test_bad_requests(package: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tables of 'h100'; did you mean 'h100-sxm'"):
        import_profile("h100", tmp_path, root=package)
    with pytest.raises(InputError, match="no version of sglang has"):
        import_profile("h100-sxm", tmp_path, root=package, backend="sglang")
    with pytest.raises(InputError, match="no such table"):
        import_profile("h100-sxm", tmp_path, root=package, version="9.9.9")
    with pytest.raises(InputError, match="not a sound Parquet file"):
        import_profile("h100-sxm", tmp_path, root=package, version="0.30.0")
    write(package, "gemm/vllm/0.24.0/gemm_perf.parquet", {"m": [1], "latency": [1.0], "dtype": ["x"]})
    with pytest.raises(InputError, match="no column 'gemm_dtype'"):
        import_profile("h100-sxm", tmp_path, root=package)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="aiconfigurator-core is not installed; in Convoy's folder"):
        import_profile("h100-sxm", tmp_path)


@pytest.mark.parametrize("device", sorted(SYSTEMS))
def test_the_real_package_gives_the_shipped_tables(device: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("aiconfigurator_core") is None:
        pytest.skip("aiconfigurator-core (extra nvidia-data) is not installed")
    _, version = data_root()
    assert "aiconfigurator_core" not in sys.modules  # its query API is never imported
    profile = import_profile(device, tmp_path)
    shipped = read_profile(PROFILES / device / profile.name)
    if shipped.versions["aiconfigurator-core"] != version:
        pytest.skip(f"shipped from {shipped.versions['aiconfigurator-core']}, installed is {version}")
    assert [info.sha256 for info in profile.tables] == [info.sha256 for info in shipped.tables]
    largest = max(profile.tables, key=lambda info: info.rows)
    assert np.all(read_table(profile, largest).time_s > 1e-7)


def test_a_profile_is_replaced_only_when_asked(package: Path, tmp_path: Path) -> None:
    folder = import_profile("h100-sxm", tmp_path / "out", root=package, today=DAY).path
    (folder / "predictor.npz").write_bytes(b"of these tables")
    with pytest.raises(InputError, match="is there already; add --force"):
        import_profile("h100-sxm", tmp_path / "out", root=package, today=DAY)
    assert (folder / "predictor.npz").exists()
    import_profile("h100-sxm", tmp_path / "out", root=package, today=DAY, replace=True)
    assert not (folder / "predictor.npz").exists()
