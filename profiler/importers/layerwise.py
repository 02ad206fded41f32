"""Import of aiconfigurator's layer-wise tables: whole forward passes of one model (ai-dynamo, Apache-2.0).

A row is a prefill of `batch_size` requests of `new_tokens` tokens, each behind `past_kv`, or (phase `gen`) a
decode step; `latency_ms` is of all layers. Taken on one GPU: with `attn_tp` above 1 it is a rank's share,
without what ranks send each other.

Two kinds of rows are wrong and left out. Decodes at long contexts, from 8192 tokens on, that take far more
than the slope up to there says, by an amount that has nothing to do with their number: something besides the
kernels was timed. And prefills that take longer than some with more of everything.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from profiler.estimate import BoolArray, FloatArray
from profiler.importers._csv import read_csv
from profiler.importers._profile import Imported, write_lookup_profile
from profiler.tables import Profile, Table
from specs.errors import InputError
from specs.models import get_model

_TRUSTED = 4096  # tokens of context up to which decodes are taken as they are
_SLACK = 1.15  # of the time that the slope predicts, beyond which a decode counts as inflated
_DOMINATED = 1.25  # of the time of a larger shape, beyond which a prefill counts as disturbed
_COLUMNS = ("attn_tp", "phase", "batch_size", "new_tokens", "past_kv", "latency_ms")
_NOTES = (
    "Derived from aiconfigurator's layer-wise collector (ai-dynamo/aiconfigurator, Apache-2.0): columns "
    "renamed, units changed, 5 digits kept, disturbed rows left out.",
    "Times are of a whole pass as the engine sees it, from its schedule to its update: the host's part that "
    "isn't hidden, the LM head and sampling included; with tensor parallelism without collectives.",
)


def import_profile(table: Path, device: str, model: str, out_dir: Path, *, replace: bool = False) -> Profile:
    """Write ``table`` as a profile ``<out_dir>/layerwise-<model>``.

    Args:
        table: the CSV file, or a folder with one whose name has `layerwise` in it.
        device, model: names that Convoy knows, or paths.

    Raises:
        InputError: nothing there, the file is unsound, or the profile is there already.
    """
    if table.is_dir():
        found = sorted(table.rglob("*layerwise*.csv*"))
        if len(found) != 1:
            raise InputError(
                f"{table}: {len(found)} files with 'layerwise' in the name; give the file itself"
            )
        table = found[0]
    csv = read_csv(table, _COLUMNS)
    spec = get_model(model)
    tp, requests, tokens, context = (
        csv.numbers(name) for name in ("attn_tp", "batch_size", "new_tokens", "past_kv")
    )
    phases = csv.data["phase"].astype(str).to_numpy()
    for row, phase in enumerate(phases):
        if phase not in ("ctx", "gen"):
            raise InputError(f"{table}: row {row + 2}: phase is {phase!r}; it must be ctx or gen")
    decode = (phases == "gen").astype(np.float64)
    time_s = csv.numbers("latency_ms") * 1e-3
    inflated = _inflated_decodes(tp, requests, context, decode == 1, time_s)
    disturbed = _disturbed_prefills(tp, requests, tokens, context, decode == 0, time_s)
    kept = ~(inflated | disturbed) & (time_s > 0)
    shape = {"requests": requests, "new_tokens": tokens, "context": context, "decode": decode, "tp": tp}
    imported = Imported(
        "forward_pass",
        Table({name: column[kept] for name, column in shape.items()}, time_s[kept]),
        csv.origin,
        {
            reason: int(rows.sum())
            for reason, rows in (("inflated decodes", inflated), ("disturbed prefills", disturbed))
            if rows.any()
        },
    )
    return write_lookup_profile(
        out_dir / f"layerwise-{spec.name}",
        device=device,
        model=spec,
        tps=sorted({int(each) for each in tp}),
        tables=[imported],
        source="vLLM's forward pass",
        notes=_NOTES,
        versions={},
        replace=replace,
    )


def _inflated_decodes(
    tp: FloatArray, requests: FloatArray, context: FloatArray, decode: BoolArray, time_s: FloatArray
) -> BoolArray:
    """Decodes beyond the trusted context that take more than the slope over its last three quarters says."""
    inflated = np.zeros(len(tp), dtype=np.bool_)
    for key in {(a, b) for a, b in zip(tp[decode], requests[decode], strict=True)}:
        mine = decode & (tp == key[0]) & (requests == key[1])
        trusted = mine & (context <= _TRUSTED)
        if trusted.sum() < 2:
            continue
        order = np.argsort(context[trusted])
        x, y = context[trusted][order], time_s[trusted][order]
        slope = max((y[-1] - float(np.interp(x[-1] / 4.0, x, y))) / (x[-1] - x[-1] / 4.0), 0.0)
        expected_s = y[-1] + slope * (context - x[-1])
        inflated |= mine & (context > x[-1]) & (time_s > _SLACK * expected_s)
    return inflated


def _disturbed_prefills(
    tp: FloatArray,
    requests: FloatArray,
    tokens: FloatArray,
    context: FloatArray,
    prefill: BoolArray,
    time_s: FloatArray,
) -> BoolArray:
    """Prefills that take far longer than one with at least as much of everything."""
    disturbed = np.zeros(len(tp), dtype=np.bool_)
    for row in np.flatnonzero(prefill):
        larger = prefill & (tp == tp[row]) & (requests == requests[row])
        larger &= (tokens >= tokens[row]) & (context >= context[row])
        disturbed[row] = time_s[row] > _DOMINATED * time_s[larger].min()
    return disturbed
