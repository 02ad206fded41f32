"""``convoy predict``: one iteration, operator by operator, with floor and source."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path
from typing import Any, Literal

from experiments.tables import print_table
from experiments.text import percent, seconds
from policies.sharding import Sharding
from profiler.iteration import IterationModel, OperatorRow
from profiler.kernels import load_kernels
from profiler.ring import RingModel
from specs import DeviceSpec, InputError, ModelSpec, ParallelSpec, get_device, get_model

_SOURCES = ("measured", "imported", "roofline", "assumed")


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """The options of ``convoy predict``; see ``convoy predict --help``."""

    model: str
    device: str
    source: Literal["auto", "measured", "imported", "roofline"] = "auto"
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    profile: Path | None = None
    tp: int = 1
    spp: int = 1
    kvp: int = 1
    kvp_tokens_per_group: int = 524288
    cp: int = 1
    ring: Literal["striped", "contiguous"] = "striped"
    ring_merge: Literal["end", "step", "eager"] = "step"
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
    model, device, iteration = iteration_model(options)
    rows = predicted_rows(options, iteration)
    if options.as_json:
        print(json.dumps(prediction(rows)))
    else:
        taking_part = Sharding(options.kvp, options.kvp_tokens_per_group).shards(options.context + 1)
        kvp = f", KVP {options.kvp} ({taking_part} taking part)" if options.kvp > 1 else ""
        cp = f", CP {options.cp} ({options.ring})" if options.cp > 1 else ""
        title = f"{model.name} on {device.vendor_name}, TP {options.tp}, SPP {options.spp}{kvp}{cp}"
        _print_table(f"{title}: {_what(options)}", rows)
        if isinstance(iteration, RingModel):
            border = iteration.ring.overlap_tokens()
            held = f"once a rank holds {border:,} tokens of it" if border else "at any length"
            print(f"In a whole prompt, attention hides the transfers round the ring {held}.")
        for note in prediction_notes(iteration):
            print(note)
    return 0


def iteration_model(options: PredictOptions) -> tuple[ModelSpec, DeviceSpec, IterationModel]:
    """What is predicted with.

    Raises:
        InputError: the model can't be cut that way, or there is no such profile.
    """
    model, device = get_model(options.model), get_device(options.device)
    parallel = ParallelSpec(
        tp=options.tp,
        spp=options.spp,
        kvp=options.kvp,
        kvp_tokens_per_group=options.kvp_tokens_per_group,
        cp=options.cp,
        ring=options.ring,
        ring_merge=options.ring_merge,
    )
    parallel.check(model, device)
    kernels = load_kernels(
        device,
        options.source,
        weight_dtype=options.weight_dtype,
        kv_dtype=options.kv_dtype,
        profile=options.profile,
        model=model,
        tp=options.tp,
    )
    return model, device, (RingModel if options.cp > 1 else IterationModel)(model, kernels, parallel)


def predicted_rows(options: PredictOptions, iteration: IterationModel) -> list[OperatorRow]:
    """The iteration that the options ask for, operator by operator."""
    chunks = [(options.chunk, options.context)] if options.chunk else []
    # A decode attends to at least its own token.
    return iteration.explain(chunks, options.decodes, options.decodes * max(options.context, 1))


def prediction_notes(iteration: IterationModel) -> list[str]:
    """What a reader of predicted times should know, one line each."""
    notes = []
    if iteration.host_is_unknown:
        notes.append(
            "No host overhead is modelled: scheduling, launching and collecting count as 0 s an iteration. "
            "Set predictor.host, or measure it with `convoy profile`."
        )
    notes += [f"A measured profile was not used: {reason}." for reason in iteration.kernels.passed_over]
    return notes


def prediction(rows: Sequence[OperatorRow]) -> dict[str, Any]:
    """Totals and one entry an operator; ``low_s`` and ``high_s`` where errors of the predictors are known:
    90 % of what was held out in training lay between."""
    found = {row.source for row in rows if row.time_s > 0}
    return {
        "total_s": sum(row.time_s for row in rows),
        **total_interval(rows),
        "floor_s": sum(row.floor_s for row in rows),
        "source": "+".join(source for source in _SOURCES if source in found),
        "operators": [
            {key: value for key, value in asdict(row).items() if value is not None and value != ""}
            for row in rows
        ],
    }


def total_interval(rows: Sequence[OperatorRow]) -> dict[str, float]:
    """The interval of the total: rows of one kernel are wrong together, different kernels independently.

    Deviations add up within a kernel, their squares between kernels. Empty if no error is known.
    """
    below: defaultdict[str, float] = defaultdict(float)
    above: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        if row.low_s is not None and row.high_s is not None:
            below[row.kernel] += row.time_s - row.low_s
            above[row.kernel] += row.high_s - row.time_s
    if not below:
        return {}
    total_s = sum(row.time_s for row in rows)
    return {
        "low_s": total_s - hypot(*(max(part, 0.0) for part in below.values())),
        "high_s": total_s + hypot(*(max(part, 0.0) for part in above.values())),
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
            _interval(row.low_s, row.high_s),
            seconds(row.floor_s),
            row.source,
            "yes" if row.extrapolated else "",
        )
        for row in sorted(rows, key=lambda row: -row.time_s)
    ]
    lines.append(
        (
            "iteration",
            seconds(total["total_s"]),
            "100 %",
            _interval(total.get("low_s"), total.get("high_s")),
            seconds(total["floor_s"]),
            total["source"],
            "",
        )
    )
    header = ("operator", "time", "share", "90 % within", "floor", "source", "extrapolated")
    print_table(header, lines, title=title, right=("time", "share", "90 % within", "floor"))


def _interval(low_s: float | None, high_s: float | None) -> str:
    return "" if low_s is None or high_s is None else f"{seconds(low_s)} to {seconds(high_s)}"
