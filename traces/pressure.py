"""Where requests spent their time, which promises were broken, and what the system was short of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from traces.records import FINISHED, RunRecords

FloatArray = NDArray[np.float64]
KV_FULL = 0.95  # share of KV blocks in use from which a cache counts as full; admission leaves a few free


def phases(records: RunRecords) -> dict[str, FloatArray]:
    """Seconds of each request in each phase, NaN where it didn't get so far; they add up to E2E.

    ``queue`` is arrival to its first chunk in a batch, ``prefill`` from there to the first token (waiting
    between chunks included), ``decode`` the rest, prefilling again after a preemption included. Where
    requests decode elsewhere, ``transfer`` is from the first token until the KV cache has arrived there,
    waiting for room included; ``decode`` begins then.
    """
    requests = records.requests
    found = {
        "queue": np.asarray(requests["scheduled_s"] - requests["arrival_s"]),
        "prefill": np.asarray(requests["first_token_s"] - requests["scheduled_s"]),
    }
    decodes_from_s = requests["first_token_s"]
    moved = ~np.isnan(requests["transfer_end_s"])
    if moved.any():
        decodes_from_s = np.where(moved, requests["transfer_end_s"], decodes_from_s)
        found["transfer"] = np.asarray(decodes_from_s - requests["first_token_s"])
    found["decode"] = np.asarray(requests["finished_s"] - decodes_from_s)
    return found


def mean_phases(records: RunRecords) -> dict[str, float]:
    """Mean seconds of each phase over the requests that finished; {} if none has."""
    finished = records.requests["status"] == FINISHED
    if not finished.any():
        return {}
    return {name: float(values[finished].mean()) for name, values in phases(records).items()}


def missed_shares(records: RunRecords, tpot_targets_s: Sequence[float | None]) -> dict[str, float]:
    """Shares of all requests that broke a promise: ``unserved`` (rejected or unfinished), and of the others
    ``ttft`` and ``tpot``, which may both hold of one; {} without requests."""
    requests = records.requests
    if len(requests["status"]) == 0:
        return {}
    finished = requests["status"] == FINISHED
    late = finished & ~(records.ttft_s <= requests["deadline_s"])
    slow = np.zeros(len(late), dtype=bool)
    for code, target_s in enumerate(tpot_targets_s):
        if target_s is not None:
            slow |= finished & (requests["slo_class"] == code) & (records.tpot_s > target_s)
    return {
        "ttft": float(late.mean()),
        "tpot": float(slow.mean()),
        "unserved": float((~finished).mean()),
    }


def pressure(records: RunRecords) -> dict[str, float]:
    """What the first stages were short of; {} for a run of nothing.

    - ``busy_share``: of the replicas' time, with a batch in the first stage.
    - ``kv_peak``: the most KV blocks in use at the end of a batch, as a share.
    - ``kv_full_share``: of the busy time, with requests waiting and the KV cache at least 95 % full.
    - ``late_queue_share``: of the TTFT of requests that were late, the part before their first chunk;
      absent if none was late.
    """
    batches, requests = records.batches, records.requests
    first = batches["stage"] == 0
    lasted_s = (batches["end_s"] - batches["start_s"])[first]
    if records.end_s <= 0.0 or lasted_s.sum() <= 0.0:
        return {}
    capacities = np.maximum(records.kv_capacity_of(batches["replica"][first]), 1)
    in_use = batches["kv_used_blocks"][first] / capacities
    full = (in_use >= KV_FULL) & (batches["waiting"][first] > 0)
    found = {
        "busy_share": min(float(lasted_s.sum()) / (records.end_s * records.replicas), 1.0),
        "kv_peak": float(in_use.max()),
        "kv_full_share": float(lasted_s[full].sum() / lasted_s.sum()),
    }
    late = records.ttft_s > requests["deadline_s"]
    if late.any():
        queue_s = phases(records)["queue"][late]
        found["late_queue_share"] = float(queue_s.sum() / records.ttft_s[late].sum())
    return found
