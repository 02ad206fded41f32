"""Import of the kernel tables in NVIDIA's `aiconfigurator-core` package (Apache-2.0).

Only its Parquet files are read, under `systems/data/<system>/<family>/<backend>/<version>/`; its query
API isn't imported. What they hold and lack:

- latency is in milliseconds, all-reduce `message_size` in elements;
- context attention has no prefix (`step` is 0) and ends at 16K tokens; times include the KV write;
- generation attention of `step` s reads s + 1 tokens and ends at 128K a request;
- kernels are repeated on the same KV cache, so a small one is read from L2 (`warm`);
- no norms, no RoPE, no point-to-point transfers, no collectives beyond a node.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from profiler.estimate import BoolArray, FloatArray
from profiler.tables import Profile, Table, TableInfo, write_profile, write_table
from specs.errors import InputError
from specs.input_files import did_you_mean

PACKAGE = "aiconfigurator-core"
SYSTEMS = {  # our device -> folder of the package
    "h100-sxm": "h100_sxm",
    "a100-80gb-sxm": "a100_sxm",
    "h200-sxm": "h200_sxm",
    "b200": "b200_sxm",
}
HEAD_DIMS = (64, 128)
MAX_FILE_BYTES = 256 << 20
_INSTALL = "in Convoy's folder, pip install -e '.[nvidia-data]' brings it"
_DTYPES = {"bf16": "bfloat16", "fp8": "fp8"}

Columns = dict[str, Any]  # numpy arrays by the package's column names


@dataclass(frozen=True, slots=True)
class _Family:
    """How one Parquet file becomes one of our tables."""

    operator: str
    file: str  # <family>/<backend>/<version>/<name>
    columns: tuple[str, ...]
    keep: Callable[[Columns, str], BoolArray]
    shape: Callable[[Columns], dict[str, FloatArray]]
    dtypes: tuple[str, ...]
    warm: bool


def _keep_attention(data: Columns, dtype: str) -> BoolArray:
    keep = (data["kv_cache_dtype"] == _DTYPES[dtype]) & np.isin(data["head_dim"], HEAD_DIMS)
    keep &= (data["attn_dtype"] == "bfloat16") & (data["beam_width"] == 1)
    if "window_size" in data:
        keep &= data["window_size"] == 0
    return np.asarray(keep, dtype=np.bool_)


def _attention_shape(data: Columns) -> dict[str, FloatArray]:
    return {
        "batch": data["batch_size"],
        "heads": data["num_heads"],
        "kv_heads": data["num_key_value_heads"],
        "head_dim": data["head_dim"],
    }


_ATTENTION = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "beam_width", "attn_dtype")
_FAMILIES = (
    _Family(
        operator="gemm",
        file="gemm/{backend}/{version}/gemm_perf.parquet",
        columns=("gemm_dtype", "m", "n", "k"),
        keep=lambda data, dtype: data["gemm_dtype"] == _DTYPES[dtype],
        shape=lambda data: {name: data[name] for name in ("m", "n", "k")},
        dtypes=("bf16", "fp8"),
        warm=False,
    ),
    _Family(
        operator="prefill_attention",
        file="attention/{backend}/{version}/context_attention_perf.parquet",
        columns=(*_ATTENTION, "kv_cache_dtype", "step"),
        keep=lambda data, dtype: _keep_attention(data, dtype) & (data["step"] == 0),
        shape=lambda data: {**_attention_shape(data), "chunk": data["isl"], "context": data["step"]},
        dtypes=("bf16", "fp8"),
        warm=True,
    ),
    _Family(
        operator="decode_attention",
        file="attention/{backend}/{version}/generation_attention_perf.parquet",
        columns=(*_ATTENTION, "kv_cache_dtype", "step"),
        keep=_keep_attention,
        shape=lambda data: {
            **_attention_shape(data),
            "total_context": data["batch_size"] * (data["step"] + 1),
        },
        dtypes=("bf16", "fp8"),
        warm=True,
    ),
    _Family(
        operator="all_reduce",
        file="comm/{backend}/{version}/custom_allreduce_perf.parquet",
        columns=("allreduce_dtype", "num_gpus", "message_size", "backend"),
        # CUDA graph, as a serving engine runs it; the eager rows time the host.
        keep=lambda data, dtype: (data["backend"] == "vllm_graph") & (data["allreduce_dtype"] == "bfloat16"),
        shape=lambda data: {"num_bytes": 2 * data["message_size"], "ranks": data["num_gpus"]},
        dtypes=("bf16",),
        warm=True,
    ),
)
_NOTES = (
    "Derived from aiconfigurator-core, Copyright (c) NVIDIA CORPORATION & AFFILIATES, Apache-2.0: rows "
    "selected (bf16 and fp8, head_dim 64 and 128, full window, beam 1), units changed, 5 digits kept.",
    "Prefill has no prefix (context_tokens is 0) and ends at 16384 tokens; decode ends at 131072 tokens a "
    "request; beyond, times are physics.",
    "Attention times include the KV write and the call's own overhead, within a CUDA graph.",
    "Attention repeats one kernel on one KV cache: a cache below the size of L2 was read from L2. The "
    "predictor learns that gain and leaves it out when it predicts serving.",
    "All-reduce is vLLM's in a CUDA graph over its whole range (own kernel for short messages, NCCL beyond).",
)


def data_root() -> tuple[Path, str]:
    """The installed package's `systems/data` folder, and its version.

    Raises:
        InputError: the package isn't installed.
    """
    try:
        spec = importlib.util.find_spec("aiconfigurator_core")
        version = importlib.metadata.version(PACKAGE)
    except (ImportError, ValueError, importlib.metadata.PackageNotFoundError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{PACKAGE} is not installed; {_INSTALL}")
    for location in spec.submodule_search_locations:
        root = Path(location) / "systems" / "data"
        if root.is_dir():
            return root, version
    raise InputError(f"{PACKAGE} {version} has no folder systems/data; this importer knows 0.12")


def import_profile(
    device: str,
    out_dir: Path,
    *,
    root: Path | None = None,
    package_version: str | None = None,
    backend: str = "vllm",
    version: str | None = None,
    today: datetime.date | None = None,
    replace: bool = False,
) -> Profile:
    """Write the package's tables for `device` as a profile `<out_dir>/<backend>-<version>`.

    Args:
        device: one of `SYSTEMS`.
        out_dir: created if need be.
        root: a `systems/data` folder; that of the installed package by default.
        package_version: of the files under `root`, for the provenance.
        backend: the serving engine whose kernels were timed.
        version: of that engine; by default the newest with all tables.
        today: the date written into the profile.
        replace: whether a profile that is there may be replaced.

    Raises:
        InputError: there is a profile already, unknown device or version, the package or pyarrow is missing,
            or a file is unsound.
    """
    if device not in SYSTEMS:
        hint = did_you_mean(device, SYSTEMS)
        raise InputError(f"device: {PACKAGE} has no tables of {device!r}{hint}; it has {', '.join(SYSTEMS)}")
    if root is None:
        root, package_version = data_root()
    system = root / SYSTEMS[device]
    version = version or _newest_complete(system, backend)
    folder = out_dir / f"{backend}-{version}"
    if not replace and folder.exists():
        raise InputError(f"{folder}: is there already; add --force to replace its tables and its predictor")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: can't be made ({error.strerror})") from None
    (folder / "predictor.npz").unlink(missing_ok=True)  # of other tables, perhaps
    tables: list[TableInfo] = []
    for family in _FAMILIES:
        path = system / family.file.format(backend=backend, version=version)
        data = _read_parquet(path, family.columns)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        origin = f"{path.relative_to(root.parent).as_posix()} (SHA-256 {sha256})"
        for dtype in family.dtypes:
            info = _write_family(folder, family, data, dtype, origin)
            if info is not None:
                tables.append(info)
    profile = Profile(
        path=folder,
        device=device,
        source="imported",
        created=(today or datetime.date.today()).isoformat(),
        licence="Apache-2.0",
        versions={PACKAGE: package_version or "unknown", backend: version},
        notes=_NOTES,
        tables=tuple(tables),
    )
    write_profile(profile)
    return profile


def _newest_complete(system: Path, backend: str) -> str:
    """The newest version of `backend` for which every table exists."""
    versions: set[str] | None = None
    for family in _FAMILIES:
        found = {path.parent.name for path in system.glob(family.file.format(backend=backend, version="*"))}
        versions = found if versions is None else versions & found
    if not versions:
        raise InputError(
            f"{system}: no version of {backend} has all of gemm, attention and all-reduce tables"
        )
    return max(versions, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])


def _read_parquet(path: Path, columns: Sequence[str]) -> Columns:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"pyarrow is not installed; {_INSTALL}") from None
    if not path.is_file():
        raise InputError(f"{path}: no such table")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so it is not such a table")
    wanted = [*columns, "latency", "kernel_source"]
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        for column in wanted:
            if column not in names:
                raise InputError(f"{path}: no column {column!r}{did_you_mean(column, names)}")
        optional = [name for name in ("window_size",) if name in names]
        table = file.read(columns=[*wanted, *optional])
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a sound Parquet file ({str(error).splitlines()[0]})") from None
    return {name: np.asarray(table.column(name).to_pylist()) for name in table.column_names}


def _write_family(folder: Path, family: _Family, data: Columns, dtype: str, origin: str) -> TableInfo | None:
    keep = family.keep(data, dtype)
    if not keep.any():
        return None
    latency = np.asarray(data["latency"][keep], dtype=np.float64)
    shape = {name: np.asarray(column, dtype=np.float64)[keep] for name, column in family.shape(data).items()}
    sound = np.isfinite(latency) & (latency > 0)
    shape = {name: column[sound] for name, column in shape.items()}
    table, repeats = _merge_repeats(Table(shape, latency[sound] * 1e-3))
    sha256, rows = write_table(folder, family.operator, dtype, table)
    kernels = sorted(set(data["kernel_source"][keep].tolist()))
    dropped = {"no time, or not above 0": int(np.sum(~sound)), "repeats of a shape, median taken": repeats}
    return TableInfo(
        operator=family.operator,
        dtype=dtype,
        rows=rows,
        sha256=sha256,
        kernel_source=", ".join(kernels),
        origin=origin,
        warm=family.warm,
        dropped={reason: count for reason, count in dropped.items() if count},
    )


def _merge_repeats(table: Table) -> tuple[Table, int]:
    """One row a shape, with the median time of its repeats; and how many rows that saved."""
    names = list(table.shape)
    rows = np.stack([table.shape[name] for name in names], axis=1)
    shapes, index = np.unique(rows, axis=0, return_inverse=True)
    index = index.ravel()
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(len(shapes) + 1))
    times = table.time_s[order]
    medians = np.array([np.median(times[starts[i] : starts[i + 1]]) for i in range(len(shapes))])
    merged = Table({name: shapes[:, i] for i, name in enumerate(names)}, medians)
    return merged, len(table) - len(merged)
