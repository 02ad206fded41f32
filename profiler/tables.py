"""The format of a profile: a folder of kernel times with their provenance.

    profile.yaml                  who measured what, with which versions; a hash for every table
    <operator>_<dtype>.csv.gz     one row a measurement; units in the column names
    predictor.npz                 what `convoy train` learned from these very tables

Columns, besides `time_s` (seconds a call) and optionally `spread_s` (between repeats) and `samples`:

    gemm                m, n, k                                (tokens, outputs, inputs)
    prefill_attention   batch, chunk_tokens, context_tokens, heads, kv_heads, head_dim   (each of `batch`)
    decode_attention    batch, total_context_tokens, heads, kv_heads, head_dim    (summed over the batch)
    skewed_decode       the same with longest_context_tokens: contexts of very different lengths
    shard_attention     chunk_tokens, context_tokens, heads, kv_heads, head_dim   (no key of the chunk itself)
    norm, rope_angles, rope, activation, kv_write, embedding, sampling
                        num_bytes, rows, width                 (moved in all; elements of a row)
    kvp_merge           num_bytes, rows, width, shards
    all_reduce, all_gather, send_recv
                        num_bytes, ranks                       (of one rank)
    layer               chunk_tokens, context_tokens, decodes, decode_context_tokens, tp
                                (a whole layer: a chunk, or decodes that share so many tokens, or both)
    mixed_attention     chunk_tokens, context_tokens, decodes, decode_context_tokens, heads, kv_heads,
                        head_dim               (attention of a chunk and decodes in one call)
    uneven_attention    decodes, chunk_tokens, context_tokens, mean_context_tokens, spread_tokens, heads,
                        kv_heads, head_dim     (decodes whose contexts have that standard deviation)
    forward_pass        requests, new_tokens, context_tokens, decode, tp
                                (all layers and what comes once: equal prefills, or decodes if `decode` is 1)
    host                requests, chunk_tokens, ranks          (host time of an iteration of so many requests)
    iteration           requests, chunk_tokens, context_tokens, decode_context_tokens, idle, tp, spp, kvp
                                (all of it, in the running engine, summed over stages; requests and tokens of
                                one KVP group, each of which has as many; idle: it had nothing to do before)
    stage_gap          requests, chunk_tokens                 (of a later stage: the end of a batch to the
                                                               beginning of the next, which was waiting)
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from profiler.estimate import FloatArray
from specs.errors import InputError
from specs.input_files import Fields, did_you_mean, load_mapping

FORMAT = 1
PROFILES = Path(__file__).parent / "profiles"
MAX_TABLE_BYTES = 64 << 20  # a table of a million rows is about 40 MB; more is not one
COLUMNS: dict[str, dict[str, str]] = {  # operator -> file column -> name in formulas
    "gemm": {"m": "m", "n": "n", "k": "k"},
    "prefill_attention": {
        "batch": "batch",
        "chunk_tokens": "chunk",
        "context_tokens": "context",
        "heads": "heads",
        "kv_heads": "kv_heads",
        "head_dim": "head_dim",
    },
    "decode_attention": {
        "batch": "batch",
        "total_context_tokens": "total_context",
        "heads": "heads",
        "kv_heads": "kv_heads",
        "head_dim": "head_dim",
    },
    "skewed_decode": {
        "batch": "batch",
        "total_context_tokens": "total_context",
        "longest_context_tokens": "longest_context",
        "heads": "heads",
        "kv_heads": "kv_heads",
        "head_dim": "head_dim",
    },
    "shard_attention": {
        "chunk_tokens": "chunk",
        "context_tokens": "context",
        "heads": "heads",
        "kv_heads": "kv_heads",
        "head_dim": "head_dim",
    },
    **{
        kind: {"num_bytes": "num_bytes", "rows": "rows", "width": "width"}
        for kind in ("norm", "rope_angles", "rope", "activation", "kv_write", "embedding", "sampling")
    },
    "kvp_merge": {"num_bytes": "num_bytes", "rows": "rows", "width": "width", "shards": "shards"},
    **{
        collective: {"num_bytes": "num_bytes", "ranks": "ranks"}
        for collective in ("all_reduce", "all_gather", "send_recv")
    },
    "layer": {
        "chunk_tokens": "chunk",
        "context_tokens": "context",
        "decodes": "decodes",
        "decode_context_tokens": "decode_context",
        "tp": "tp",
    },
    "mixed_attention": {
        "chunk_tokens": "chunk",
        "context_tokens": "context",
        "decodes": "decodes",
        "decode_context_tokens": "decode_context",
        "heads": "heads",
        "kv_heads": "kv_heads",
        "head_dim": "head_dim",
    },
    "uneven_attention": {
        "decodes": "decodes",
        "chunk_tokens": "chunk",
        "context_tokens": "context",
        "mean_context_tokens": "mean_context",
        "spread_tokens": "spread",
        "heads": "heads",
        "kv_heads": "kv_heads",
        "head_dim": "head_dim",
    },
    "forward_pass": {
        "requests": "requests",
        "new_tokens": "new_tokens",
        "context_tokens": "context",
        "decode": "decode",
        "tp": "tp",
    },
    "host": {"requests": "requests", "chunk_tokens": "chunk", "ranks": "ranks"},
    "iteration": {
        "requests": "requests",
        "chunk_tokens": "chunk",
        "context_tokens": "context",
        "decode_context_tokens": "decode_context",
        "idle": "idle",
        "tp": "tp",
        "spp": "spp",
        "kvp": "kvp",
    },
    "stage_gap": {"requests": "requests", "chunk_tokens": "chunk"},
}
_MAY_BE_ZERO = {
    "host": ("chunk_tokens",),
    "stage_gap": ("chunk_tokens",),
    "iteration": ("chunk_tokens", "context_tokens", "decode_context_tokens", "idle"),
    "prefill_attention": ("context_tokens",),
    "layer": ("chunk_tokens", "context_tokens", "decodes", "decode_context_tokens"),
    "mixed_attention": ("context_tokens",),
    "uneven_attention": ("chunk_tokens", "context_tokens", "spread_tokens"),
    "forward_pass": ("context_tokens", "decode"),
}
_OPTIONAL = ("spread_s", "samples")
_SOURCES = ("measured", "imported")
_MEASURED_KEYS = ("model", "conditions", "skipped", "cached_bytes", "threads")
_PREDICTORS = ("trained", "lookup")


@dataclass(frozen=True, slots=True)
class TableInfo:
    """Provenance of one table. `warm`: the kernel was repeated on the same data, which L2 then holds."""

    operator: str
    dtype: str
    rows: int
    sha256: str
    kernel_source: str
    origin: str
    warm: bool
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.operator}_{self.dtype}"

    @property
    def file(self) -> str:
        return f"{self.key}.csv.gz"


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile folder's `profile.yaml`.

    `predictor` is lookup if the tables are dense enough to be read off, for the model that `model` names.

    Of a measured profile only, otherwise: `model`, the shapes it was measured for (see `profiler.coverage`);
    `conditions`, in words; `skipped`, the points that couldn't be measured, and why; `cached_bytes`, how
    much of an iteration's data stays in the last-level cache from one iteration to the next, since all
    the weights fit into it: memory then sets no floor to as many bytes; `threads`, of a rank on a CPU, or 0.
    """

    path: Path
    device: str
    source: str  # measured | imported
    created: str  # ISO date
    licence: str
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    tables: tuple[TableInfo, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    cached_bytes: int = 0
    threads: int = 0
    predictor: str = "trained"  # trained | lookup

    @property
    def name(self) -> str:
        return self.path.resolve().name


@dataclass(frozen=True, slots=True)
class Table:
    """Measurements of one operator at one dtype: equal-length columns, and seconds."""

    shape: dict[str, FloatArray]
    time_s: FloatArray
    spread_s: FloatArray | None = None
    samples: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.time_s)


def read_profile(path: Path) -> Profile:
    """Read and check the `profile.yaml` in the folder `path`; the tables are not opened.

    Raises:
        InputError: missing, malformed, or of another format version.
    """
    file = path / "profile.yaml"
    data = load_mapping(file, "yaml")
    fields = Fields(data, str(file))
    keys = ["format", "device", "source", "created", "licence", "versions", "notes", "tables"]
    fields.refuse_unknown([*keys, *_MEASURED_KEYS, "predictor"])
    if (version := fields.integer("format")) != FORMAT:
        raise fields.fail("format", f"is {version}; this version of Convoy reads {FORMAT}")
    if (source := fields.text("source")) not in _SOURCES:
        raise fields.fail("source", f"must be one of {', '.join(_SOURCES)}, not {source!r}")
    if (predictor := str(data.get("predictor", "trained"))) not in _PREDICTORS:
        raise fields.fail("predictor", f"must be one of {', '.join(_PREDICTORS)}, not {predictor!r}")
    notes = data.get("notes")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise fields.fail("notes", "must be a list of texts")
    tables = fields.mapping("tables")
    return Profile(
        path=path,
        device=fields.text("device"),
        source=source,
        created=fields.text("created"),
        licence=fields.text("licence"),
        versions={key: str(value) for key, value in fields.mapping("versions").items()},
        notes=tuple(notes),
        tables=tuple(_table_info(name, tables, f"{file}: tables") for name in tables),
        model=fields.mapping("model") if fields.has("model") else {},
        conditions={key: str(value) for key, value in fields.mapping("conditions").items()}
        if fields.has("conditions")
        else {},
        skipped=tuple(map(str, data.get("skipped") or ())),
        cached_bytes=fields.integer("cached_bytes", at_least=0, default=0),
        threads=fields.integer("threads", at_least=0, default=0),
        predictor=predictor,
    )


def write_profile(profile: Profile) -> None:
    """Write `profile.yaml` into the profile's folder."""
    import yaml

    tables = {}
    for info in profile.tables:
        entry = asdict(info)
        entry["dropped"] = dict(info.dropped)
        del entry["operator"], entry["dtype"]
        tables[info.key] = entry
    data: dict[str, Any] = {
        "format": FORMAT,
        "device": profile.device,
        "source": profile.source,
        "created": profile.created,
        "licence": profile.licence,
        "versions": dict(profile.versions),
        "notes": list(profile.notes),
        "tables": tables,
    }
    if profile.predictor != "trained":
        data["predictor"] = profile.predictor
    if profile.source == "measured" or profile.model:
        measured = (
            profile.model,
            profile.conditions,
            list(profile.skipped),
            profile.cached_bytes,
            profile.threads,
        )
        data |= {key: value for key, value in zip(_MEASURED_KEYS, measured, strict=True) if value}
    text = yaml.safe_dump(data, sort_keys=False, width=110, allow_unicode=True)
    (profile.path / "profile.yaml").write_text(text, encoding="utf-8")


def read_table(profile: Profile, info: TableInfo) -> Table:
    """Read one table and check it against its provenance.

    Raises:
        InputError: the file is missing, not gzip, too large, has other columns or another hash, or
            holds a value that isn't a positive number.
    """
    path = profile.path / info.file
    check_hash(path, info.sha256)
    lines = _gunzip(path).decode("utf-8", errors="replace").splitlines()
    header = lines[0].split(",") if lines else []
    required = [*COLUMNS[info.operator], "time_s"]
    for column in required:
        if column not in header:
            raise InputError(
                f"{path}: no column {column!r}{did_you_mean(column, header)}; expected {','.join(required)}; "
                f"of an older version? `convoy profile --only {info.operator}` measures it anew"
            )
    for column in header:
        if column not in (*required, *_OPTIONAL):
            raise InputError(
                f"{path}: unknown column {column!r}{did_you_mean(column, [*required, *_OPTIONAL])}"
            )
    rows = _numbers(path, lines[1:], header)
    if len(rows) != info.rows:
        raise InputError(f"{path}: {len(rows)} rows, but profile.yaml says {info.rows}")
    columns = dict(zip(header, rows.T, strict=True))
    for column in required:
        may_be_zero = column in _MAY_BE_ZERO.get(info.operator, ())
        least = 0.0 if may_be_zero else np.finfo(np.float64).tiny
        bad = np.flatnonzero(~(np.isfinite(columns[column]) & (columns[column] >= least)))
        if len(bad):
            value = columns[column][bad[0]]
            raise InputError(f"{path}: row {bad[0] + 2}: {column} is {value:g}; it must be a positive number")
    shape = {name: columns[column] for column, name in COLUMNS[info.operator].items()}
    return Table(shape, columns["time_s"], columns.get("spread_s"), columns.get("samples"))


def write_table(folder: Path, operator: str, dtype: str, table: Table) -> tuple[str, int]:
    """Write `<operator>_<dtype>.csv.gz`, sorted by shape and reproducible; return its SHA-256 and rows."""
    columns = [table.shape[name] for name in COLUMNS[operator].values()]
    order = np.lexsort([*columns[::-1]])
    text = io.StringIO()
    header = [*COLUMNS[operator], "time_s"]
    header += [name for name in _OPTIONAL if getattr(table, name) is not None]
    text.write(",".join(header) + "\n")
    for row in order:
        cells = [str(int(column[row])) for column in columns] + [f"{table.time_s[row]:.5g}"]
        if table.spread_s is not None:
            cells.append(f"{table.spread_s[row]:.3g}")
        if table.samples is not None:
            cells.append(str(int(table.samples[row])))
        text.write(",".join(cells) + "\n")
    data = gzip.compress(text.getvalue().encode(), compresslevel=9, mtime=0)
    (folder / f"{operator}_{dtype}.csv.gz").write_bytes(data)
    return hashlib.sha256(data).hexdigest(), len(order)


def check_hash(path: Path, sha256: str) -> None:
    """Raise `InputError` unless the file at `path` has this SHA-256."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise InputError(f"{path}: larger than {MAX_TABLE_BYTES >> 20} MiB, so it is not a table")
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if actual != sha256:
        raise InputError(
            f"{path}: changed since its profile was written (SHA-256 {actual[:12]}…, not {sha256[:12]}…)"
        )


def _gunzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            data = file.read(MAX_TABLE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a sound gzip file ({error})") from None
    if len(data) > MAX_TABLE_BYTES:
        raise InputError(f"{path}: unpacks to more than {MAX_TABLE_BYTES >> 20} MiB, so it is not a table")
    return data


def _numbers(path: Path, lines: list[str], header: list[str]) -> FloatArray:
    if not lines:
        raise InputError(f"{path}: no rows")
    try:
        rows = np.loadtxt(lines, delimiter=",", ndmin=2, comments=None)
    except ValueError:
        raise InputError(f"{path}: row {_bad_row(lines, len(header))} is not {len(header)} numbers") from None
    if rows.shape[1] != len(header):
        raise InputError(f"{path}: row 2 has {rows.shape[1]} values for {len(header)} columns")
    return np.asarray(rows, dtype=np.float64)


def _bad_row(lines: list[str], columns: int) -> int:
    for number, line in enumerate(lines, start=2):
        try:
            values = [float(cell) for cell in line.split(",")]
        except ValueError:
            return number
        if len(values) != columns:
            return number
    return len(lines) + 1


def _table_info(name: str, tables: dict[str, Any], where: str) -> TableInfo:
    operator, _, dtype = name.rpartition("_")
    if operator not in COLUMNS:
        raise InputError(
            f"{where}: unknown table '{name}'; a name is <operator>_<dtype> with {', '.join(COLUMNS)}"
        )
    fields = Fields(Fields(tables, where).mapping(name), f"{where}: {name}")
    fields.refuse_unknown(["rows", "sha256", "kernel_source", "origin", "warm", "dropped"])
    dropped = Fields(fields.mapping("dropped"), f"{where}: {name}: dropped")
    return TableInfo(
        operator=operator,
        dtype=dtype,
        rows=fields.integer("rows"),
        sha256=fields.text("sha256"),
        kernel_source=fields.text("kernel_source"),
        origin=fields.text("origin"),
        warm=fields.boolean("warm"),
        dropped={reason: dropped.integer(reason, at_least=0) for reason in fields.mapping("dropped")},
    )
