"""Import of LLMServingSim's kernel tables of one model on one device (casys-kaist/LLMServingSim, MIT).

Its profiler writes, for each degree of tensor parallelism,

    …dense          layer, tokens, time_us               one operator of one layer
    …per_sequence   layer, sequences, time_us            the LM head and the sampler
    …attention      prefill_chunk, kv_prefill, n_decode, kv_decode, time_us
                                                         one layer's attention over one chunk and n_decode
                                                         decodes of equal length, in one call
    …skew           n, nb, pc, kp, kvs, kv_big, kv_mean, t_mean_us, t_skew_us
                                                         attention of n decodes behind a chunk pc, of which nb
                                                         have kv_big tokens and the others kvs; and of as many
                                                         with kv_mean each. May be missing.

as CSV, plain or compressed. Files are found by the end of their names; the degree of tensor parallelism is a
`tp<N>` in the name or in a folder's. Times are of the device alone, in microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from profiler.estimate import BoolArray, FloatArray
from profiler.importers._csv import Csv, read_csv
from profiler.importers._profile import Imported, write_lookup_profile
from profiler.tables import Profile, Table
from profiler.work import activation_bytes, embedding_bytes, norm_bytes, rope_bytes, sampling_bytes
from specs.errors import InputError
from specs.models import ModelSpec, get_model

_TP = re.compile(r"(?<![a-z0-9])tp(\d+)(?![a-z0-9])")
_ELEMENT = 2  # bf16
_NOTES = (
    "Derived from LLMServingSim's profiles (casys-kaist/LLMServingSim, MIT): columns renamed, units changed, "
    "5 digits kept; attention of a chunk, of decodes and of both are three tables.",
    "Times are the device's alone, of eager kernels; nothing is known of the host.",
)
_Shapes = Callable[[ModelSpec, int, FloatArray], tuple[str, dict[str, FloatArray]]]


def _matrix(outputs: Callable[[ModelSpec, int], int], inputs: Callable[[ModelSpec, int], int]) -> _Shapes:
    def shapes(model: ModelSpec, tp: int, rows: FloatArray) -> tuple[str, dict[str, FloatArray]]:
        n, k = np.full_like(rows, outputs(model, tp)), np.full_like(rows, inputs(model, tp))
        return "gemm", {"m": rows, "n": n, "k": k}

    return shapes


def _moved(
    kind: str,
    width: Callable[[ModelSpec, int], int],
    num_bytes: Callable[[FloatArray, int, int], FloatArray],
) -> _Shapes:
    def shapes(model: ModelSpec, tp: int, rows: FloatArray) -> tuple[str, dict[str, FloatArray]]:
        moved = num_bytes(rows, width(model, tp), _ELEMENT)
        return kind, {"num_bytes": moved, "rows": rows, "width": np.full_like(rows, width(model, tp))}

    return shapes


_LAYERS: dict[str, _Shapes] = {
    "qkv_proj": _matrix(lambda m, tp: (m.query_size + 2 * m.kv_size) // tp, lambda m, tp: m.hidden_size),
    "o_proj": _matrix(lambda m, tp: m.hidden_size, lambda m, tp: m.query_size // tp),
    "gate_up_proj": _matrix(lambda m, tp: 2 * m.intermediate_size // tp, lambda m, tp: m.hidden_size),
    "down_proj": _matrix(lambda m, tp: m.hidden_size, lambda m, tp: m.intermediate_size // tp),
    "lm_head": _matrix(lambda m, tp: m.vocab_size // tp, lambda m, tp: m.hidden_size),
    "layernorm": _moved("norm", lambda m, tp: m.hidden_size, norm_bytes),
    "rotary_emb": _moved("rope", lambda m, tp: (m.query_size + m.kv_size) // tp, rope_bytes),
    "act_fn": _moved("activation", lambda m, tp: m.intermediate_size // tp, activation_bytes),
    "embedding": _moved("embedding", lambda m, tp: m.hidden_size, embedding_bytes),
    "sampler": _moved("sampling", lambda m, tp: m.vocab_size, sampling_bytes),
}
_WITH_ROPE = ("qk_norm", "q_norm", "k_norm")  # Qwen3's norms of queries and keys: counted with the rotation
_LEFT_OUT = ("final_layernorm",)  # one more norm of the same width, of the rows that reach the LM head


def import_profile(folder: Path, device: str, model: str, out_dir: Path, *, replace: bool = False) -> Profile:
    """Write the tables under ``folder`` as a profile ``<out_dir>/llmservingsim-<model>``.

    Args:
        folder: where the tables are, at any depth.
        device, model: names that Convoy knows, or paths.

    Raises:
        InputError: nothing there, a file is unsound, a layer is unknown, or the profile is there already.
    """
    spec = get_model(model)
    found = _find(folder)
    parts: dict[str, list[tuple[Table, str]]] = {}
    for tp, files in sorted(found.items()):
        for each in (
            *_operators(files, spec, tp),
            *_attention(files["attention"], spec, tp),
            *_uneven(files.get("skew"), spec, tp),
        ):
            parts.setdefault(each.operator, []).append((each.table, each.origin))
    tables = [
        Imported(
            operator,
            _joined([table for table, _ in those]),
            "; ".join(dict.fromkeys(o for _, o in those)),
            {},
        )
        for operator, those in parts.items()
    ]
    return write_lookup_profile(
        out_dir / f"llmservingsim-{spec.name}",
        device=device,
        model=spec,
        tps=sorted(found),
        tables=tables,
        source="vLLM's kernels, as LLMServingSim times them",
        notes=_NOTES,
        versions={},
        replace=replace,
    )


def _find(folder: Path) -> dict[int, dict[str, Path]]:
    """The files of each degree of tensor parallelism, by what they hold."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*.csv*")):
        stem = path.name.partition(".")[0]
        kind = next((k for k in ("dense", "per_sequence", "attention", "skew") if stem.endswith(k)), None)
        if kind is None:
            continue
        named = _TP.findall(str(path.relative_to(folder)).lower().replace("_", " "))
        tp = int(named[-1]) if named else 1
        if kind in found.setdefault(tp, {}):
            raise InputError(f"{path}: the second {kind} table for tp {tp}; give the folder of one model")
        found[tp][kind] = path
    if not found:
        raise InputError(
            f"{folder}: no tables there; files end in dense.csv, per_sequence.csv, attention.csv"
        )
    for tp, files in found.items():
        for kind in ("dense", "per_sequence", "attention"):
            if kind not in files:
                raise InputError(f"{folder}: no {kind} table for tp {tp}")
    return found


def _operators(files: dict[str, Path], model: ModelSpec, tp: int) -> list[Imported]:
    """All but attention."""
    columns: dict[str, tuple[FloatArray, FloatArray, str]] = {}
    for kind, size in (("dense", "tokens"), ("per_sequence", "sequences")):
        csv = read_csv(files[kind], ("layer", size, "time_us"))
        rows, time_s = csv.numbers(size), csv.numbers("time_us") * 1e-6
        names = csv.data["layer"].astype(str).to_numpy()
        for name in dict.fromkeys(names):
            mine = names == name
            columns[name] = rows[mine], time_s[mine], csv.origin
    unknown = [name for name in columns if name not in (*_LAYERS, *_WITH_ROPE, *_LEFT_OUT)]
    if unknown:
        known = ", ".join((*_LAYERS, *_WITH_ROPE, *_LEFT_OUT))
        raise InputError(f"{files['dense']}: unknown layer {unknown[0]!r}; known are {known}")
    for name in _WITH_ROPE:
        if name in columns and "rotary_emb" in columns:
            rows, time_s, origin = columns["rotary_emb"]
            more = np.interp(rows, columns[name][0], columns[name][1])
            columns["rotary_emb"] = rows, time_s + more, origin
    found = []
    for name, shapes in _LAYERS.items():
        if name in columns:
            rows, time_s, origin = columns[name]
            operator, shape = shapes(model, tp, rows)
            found.append(Imported(operator, Table(shape, time_s), origin, {}))
    return found


def _attention(path: Path, model: ModelSpec, tp: int) -> list[Imported]:
    csv = read_csv(path, ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"))
    chunk, context, decodes, mean = (
        csv.numbers(name) for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    )
    time_s = csv.numbers("time_us") * 1e-6
    has_chunk, has_decodes = chunk > 0, (decodes > 0) & (mean > 0)
    batch = np.ones_like(chunk)
    return [
        _attention_table(
            csv, model, tp, "prefill_attention", time_s, has_chunk & ~has_decodes,
            {"batch": batch, "chunk": chunk, "context": context},
        ),
        _attention_table(
            csv, model, tp, "decode_attention", time_s, has_decodes & ~has_chunk,
            {"batch": decodes, "total_context": decodes * mean},
        ),
        _attention_table(
            csv, model, tp, "mixed_attention", time_s, has_decodes & has_chunk,
            {"chunk": chunk, "context": context, "decodes": decodes, "decode_context": decodes * mean},
        ),
    ]  # fmt: skip


def _uneven(path: Path | None, model: ModelSpec, tp: int) -> list[Imported]:
    """Two rows for each of the table's: contexts as they are, and all at their mean."""
    if path is None:
        return []
    names = ("n", "nb", "pc", "kp", "kvs", "kv_big", "kv_mean", "t_mean_us", "t_skew_us")
    csv = read_csv(path, names)
    n, nb, chunk, context, short, long, mean, even_us, uneven_us = (csv.numbers(name) for name in names)
    spread = np.sqrt(np.maximum((nb * (long - mean) ** 2 + (n - nb) * (short - mean) ** 2) / n, 0.0))
    sizes = {"decodes": n, "chunk": chunk, "context": context, "mean_context": mean}
    both = {name: np.concatenate([column, column]) for name, column in sizes.items()}
    both["spread"] = np.concatenate([np.zeros_like(spread), np.maximum(np.round(spread), 1.0)])
    time_s = np.concatenate([even_us, uneven_us]) * 1e-6
    return [_attention_table(csv, model, tp, "uneven_attention", time_s, time_s > 0, both)]


def _attention_table(
    csv: Csv,
    model: ModelSpec,
    tp: int,
    operator: str,
    time_s: FloatArray,
    mine: BoolArray,
    sizes: dict[str, FloatArray],
) -> Imported:
    heads = {
        "heads": model.num_heads // tp,
        "kv_heads": max(model.num_kv_heads // tp, 1),
        "head_dim": model.head_dim,
    }
    shape = {name: column[mine] for name, column in sizes.items()}
    shape |= {name: np.full(int(mine.sum()), float(value)) for name, value in heads.items()}
    if not mine.any():
        raise InputError(f"{csv.path}: no row to make a table of {operator} of")
    return Imported(operator, Table(shape, time_s[mine]), csv.origin, {})


def _joined(tables: list[Table]) -> Table:
    names = tables[0].shape
    shape = {name: np.concatenate([table.shape[name] for table in tables]) for name in names}
    return Table(shape, np.concatenate([table.time_s for table in tables]))
