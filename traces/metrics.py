"""A run in numbers. A metric without a single sample has no key; it is never 0.

Definitions: TTFT is arrival to first token, E2E arrival to last token, TPOT
(E2E − TTFT) ÷ (output tokens − 1) of one request, TBT every gap between two tokens of one request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.pressure import mean_phases, missed_shares, pressure
from traces.records import FINISHED, REJECTED, RunRecords

FloatArray = NDArray[np.float64]
QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
_BINS_PER_UNIT_LOG = 10_000  # TBT quantiles are exact to 0.01 %
_GAPS_AT_ONCE = 1_000_000


def summarize(
    records: RunRecords,
    *,
    tpot_targets_s: Sequence[float | None] = (None,),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``summary.json`` of a run.

    Args:
        records: the run.
        tpot_targets_s: TPOT target of each SLO class, seconds; None where there is none.
        extra: keys that the driver knows: mfu, mbu, predictor_source, ….
    """
    requests = records.requests
    finished = requests["status"] == FINISHED
    met = slo_met(records, tpot_targets_s)
    result: dict[str, Any] = {}
    for name, values in (
        ("ttft_s", records.ttft_s),
        ("tpot_s", records.tpot_s),
        ("e2e_s", records.e2e_s),
        ("transfer_wait_s", requests["transfer_start_s"] - requests["first_token_s"]),
        ("transfer_s", requests["transfer_end_s"] - requests["transfer_start_s"]),
    ):
        statistics = describe_values(values)
        if statistics:
            result[name] = statistics
    tbt = describe_gaps(records.gaps)
    if tbt:
        result["tbt_s"] = tbt
    num_finished = int(finished.sum())
    result |= {
        "num_requests": len(finished),
        "num_finished": num_finished,
        "num_rejected": int((requests["status"] == REJECTED).sum()),
        "duration_s": records.end_s,
        "preemptions": int(requests["preemptions"].sum()),
        "iterations": records.work.iterations,
        "wall_s": records.wall_s,
    }
    if records.end_s > 0:
        result["requests_per_s"] = num_finished / records.end_s
        result["output_tokens_per_s"] = float(requests["output_tokens"][finished].sum()) / records.end_s
        result["goodput_rps"] = float(met.sum()) / records.end_s
    if len(met):
        result["slo_attainment"] = float(met.mean())
        result["missed"] = missed_shares(records, tpot_targets_s)
    if len(records.slo_names) > 1:
        result["classes"] = _classes(records, met)
    result |= {"phases_s": means} if (means := mean_phases(records)) else {}
    kv = kv_utilization(records)
    if kv is not None:
        result["kv_utilization"] = kv
    result |= {"pressure": strain} if (strain := pressure(records)) else {}
    if records.work.predicted_s > 0:
        result["extrapolated_time_share"] = records.work.extrapolated_s / records.work.predicted_s
    if records.work.looked_up_tokens:
        result["prefix_hit_rate"] = records.work.reused_tokens / records.work.looked_up_tokens
        result["prefix_reused_tokens"] = records.work.reused_tokens
    if records.interrupted:
        result["interrupted"] = True
    return result | dict(extra or {})


def _classes(records: RunRecords, met: NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    """Number of requests, attainment and latencies of each class that has requests."""
    found: dict[str, dict[str, Any]] = {}
    for code, name in enumerate(records.slo_names):
        mine = records.requests["slo_class"] == code
        if mine.any():
            found[name] = {"num_requests": int(mine.sum()), "slo_attainment": float(met[mine].mean())}
            for key, values in (("ttft_s", records.ttft_s), ("tpot_s", records.tpot_s)):
                if statistics := describe_values(values[mine]):
                    found[name][key] = statistics
    return found


def slo_met(records: RunRecords, tpot_targets_s: Sequence[float | None]) -> NDArray[np.bool_]:
    """For each request whether it finished with its TTFT within its deadline and its TPOT within its
    class's target. Unfinished and rejected requests have not met it."""
    requests = records.requests
    met = np.asarray(requests["status"] == FINISHED) & (records.ttft_s <= requests["deadline_s"])
    tpot_s = records.tpot_s
    for code, target_s in enumerate(tpot_targets_s):
        if target_s is not None:
            met &= (requests["slo_class"] != code) | np.isnan(tpot_s) | (tpot_s <= target_s)
    return met


def describe_values(values: FloatArray) -> dict[str, float]:
    """Mean, quantiles, maximum and count of the values that are there; {} if none is."""
    present = values[~np.isnan(values)]
    if len(present) == 0:
        return {}
    quantiles = np.quantile(present, list(QUANTILES.values()))
    result = {"mean": float(present.mean())}
    result |= dict(zip(QUANTILES, quantiles.tolist(), strict=True))
    return result | {"max": float(present.max()), "count": len(present)}


def describe_gaps(gaps: FloatArray) -> dict[str, float]:
    """The same for runs of gaps, [k, 4] as in ``RunRecords.gaps``: nearest-rank quantiles to 0.01 %.

    Runs are expanded a million gaps at a time into a histogram of logarithms, so that memory doesn't
    grow with the number of tokens.
    """
    if len(gaps) == 0:
        return {}
    first, growth, steps, weight = gaps.T
    last = first + growth * (steps - 1)
    total = float((steps * weight).sum())
    mean = float((weight * steps * (first + last) / 2).sum()) / total
    floor = -40.0  # e^-40 s: far below anything that takes time
    counts: FloatArray = np.zeros(1)
    for part in _parts(steps):
        lengths = steps[part].astype(np.int64)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        k = np.arange(len(starts)) - starts
        values = np.repeat(first[part], lengths) + k * np.repeat(growth[part], lengths)
        logs = np.log(np.maximum(values, np.exp(floor)))
        bins = ((logs - floor) * _BINS_PER_UNIT_LOG).astype(np.int64)
        found: FloatArray = np.bincount(bins, weights=np.repeat(weight[part], lengths)).astype(np.float64)
        longer, shorter = (found, counts) if len(found) > len(counts) else (counts, found)
        longer[: len(shorter)] += shorter
        counts = longer
    cumulative = np.cumsum(counts)
    result = {"mean": mean}
    for name, share in QUANTILES.items():
        index = int(np.searchsorted(cumulative, share * total * (1 - 1e-12)))
        result[name] = float(np.exp(floor + (index + 0.5) / _BINS_PER_UNIT_LOG))
    return result | {"max": float(np.maximum(first, last).max()), "count": int(total)}


def _parts(steps: FloatArray) -> list[slice]:
    """Slices of the runs with about ``_GAPS_AT_ONCE`` gaps each, and at least one run."""
    ends = np.cumsum(steps)
    cuts = np.searchsorted(ends, np.arange(_GAPS_AT_ONCE, ends[-1], _GAPS_AT_ONCE))
    borders = np.unique(np.concatenate([[0], cuts + 1, [len(steps)]]))
    return [slice(a, b) for a, b in pairwise(borders.tolist())]


def kv_utilization(records: RunRecords) -> float | None:
    """Mean share of KV blocks in use, over time while batches run and over replicas; None without batches."""
    batches = records.batches
    length_s = np.where(batches["stage"] == 0, batches["end_s"] - batches["start_s"], 0.0)
    if length_s.sum() <= 0 or records.kv_capacity_blocks == 0:
        return None
    used = batches["kv_used_blocks"] / records.kv_capacity_of(batches["replica"])
    return float((used * length_s).sum() / length_s.sum())
