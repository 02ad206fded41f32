"""``convoy predict``: one iteration, operator by operator, with floor and source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from experiments.tables import print_table
from experiments.text import percent, seconds
from profiler.iteration import IterationModel, OperatorRow
from profiler.kernels import load_kernels
from specs import InputError, ParallelSpec, get_device, get_model

_SOURCES = ("measured", "imported", "roofline", "assumed")


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """The options of ``convoy predict``; see ``convoy predict --help``."""

    model: str
    device: str
    source: Literal["auto", "measured", "imported", "roofline"] = "auto"
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    tp: int = 1
    spp: int = 1
    kvp: int = 1
    chunk: int = 0
    decodes: int = 0
    context: int = 0
    as_json: bool = False


def predict(options: PredictOptions) -> int:
    """Print the prediction.

    Raises:
        InputError: the model can't be cut that way, there is no such profile, or nothing to predict.
    """
    if options.chunk == 0 and options.decodes == 0:
        raise InputError("predict: an iteration without tokens; give --chunk, --decodes or both")
    model, device = get_model(options.model), get_device(options.device)
    parallel = ParallelSpec(tp=options.tp, spp=options.spp, kvp=options.kvp)
    parallel.check(model, device)
    kernels = load_kernels(
        device, options.source, weight_dtype=options.weight_dtype, kv_dtype=options.kv_dtype
    )
    iteration = IterationModel(model, kernels, parallel)
    chunks = [(options.chunk, options.context)] if options.chunk else []
    # A decode attends to at least its own token.
    rows = iteration.explain(chunks, options.decodes, options.decodes * max(options.context, 1))
    if options.as_json:
        print(json.dumps(prediction(rows)))
    else:
        kvp = f", KVP {options.kvp}" if options.kvp > 1 else ""
        title = f"{model.name} on {device.vendor_name}, TP {options.tp}, SPP {options.spp}{kvp}"
        _print_table(f"{title}: {_what(options)}", rows)
    return 0


def prediction(rows: Sequence[OperatorRow]) -> dict[str, Any]:
    """The form that DESIGN.md section 9 fixes: totals and one entry an operator."""
    found = {row.source for row in rows if row.time_s > 0}
    return {
        "total_s": sum(row.time_s for row in rows),
        "floor_s": sum(row.floor_s for row in rows),
        "source": "+".join(source for source in _SOURCES if source in found),
        "operators": [asdict(row) for row in rows],
    }


def _what(options: PredictOptions) -> str:
    parts = []
    if options.chunk:
        parts.append(f"a chunk of {options.chunk:,} tokens behind {options.context:,}")
    if options.decodes:
        parts.append(f"{options.decodes:,} decodes with {options.context:,} tokens each")
    return " and ".join(parts)


def _print_table(title: str, rows: Sequence[OperatorRow]) -> None:
    total = prediction(rows)
    lines = [
        (
            row.name,
            seconds(row.time_s),
            percent(row.time_s / total["total_s"]),
            seconds(row.floor_s),
            row.source,
            "yes" if row.extrapolated else "",
        )
        for row in sorted(rows, key=lambda row: -row.time_s)
    ]
    lines.append(
        ("iteration", seconds(total["total_s"]), "100 %", seconds(total["floor_s"]), total["source"], "")
    )
    header = ("operator", "time", "share", "floor", "source", "extrapolated")
    print_table(header, lines, title=title, right=("time", "share", "floor"))
