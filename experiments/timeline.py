"""timeline.json: the run as Chrome trace events, for https://ui.perfetto.dev or chrome://tracing.

Processes are replicas, threads their stages, slices batches; counters show the queue and the KV cache, and
async slices the requests. Times are microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.records import RunRecords

# Together at most 50,000 events, which browsers open at once.
MAX_SLICES = 24_000
MAX_SAMPLES = 8_000  # of each of the two counters
MAX_REQUESTS = 1_500  # each has at most four phases, and each phase two events

_PHASES = (
    ("waiting", "arrival_s", "scheduled_s"),
    ("prefill", "scheduled_s", "first_token_s"),
    ("transfer", "transfer_start_s", "transfer_end_s"),  # within decode
    ("decode", "first_token_s", "finished_s"),
)


def write_timeline(records: RunRecords, path: Path) -> str | None:
    """Write the events of a run; of a long one, its beginning.

    Returns:
        What was left out, in words; None if nothing was.
    """
    order = np.argsort(records.batches["start_s"], kind="stable")
    kept = order[:MAX_SLICES]
    until_s = float("inf")
    if len(kept) < len(order):
        until_s = float(records.batches["start_s"][kept[-1]])
    requests = np.flatnonzero(records.requests["arrival_s"] <= until_s)
    cut = _what_is_cut(len(order), len(kept), until_s, len(requests))
    events = [
        *_names(records),
        *_slices(records, kept),
        *_counters(records, kept),
        *_request_phases(records, requests[:MAX_REQUESTS], until_s),
    ]
    other = json.dumps({"cut": cut} if cut else {})
    body = ",\n".join(events)
    path.write_text(
        f'{{"displayTimeUnit":"ms","otherData":{other},"traceEvents":[\n{body}\n]}}\n', encoding="utf-8"
    )
    return cut


def _what_is_cut(batches: int, kept: int, until_s: float, requests: int) -> str | None:
    parts = []
    if kept < batches:
        parts.append(f"the first {kept:,} of {batches:,} batches (to {until_s:.3f} s)")
    if requests > MAX_REQUESTS:
        parts.append(f"the first {MAX_REQUESTS:,} requests")
    return f"holds only {' and '.join(parts)}" if parts else None


def _names(records: RunRecords) -> list[str]:
    """Names of processes and threads."""
    stages = int(records.batches["stage"].max()) + 1 if len(records.batches["stage"]) else 1
    events: list[dict[str, Any]] = []
    for replica in range(records.replicas):
        name = {"name": f"replica {replica}"}
        events.append({"ph": "M", "pid": replica, "name": "process_name", "args": name})
        events.append(
            {"ph": "M", "pid": replica, "name": "process_sort_index", "args": {"sort_index": replica}}
        )
        for stage in range(stages):
            name = {"name": f"stage {stage}"}
            events.append({"ph": "M", "pid": replica, "tid": stage, "name": "thread_name", "args": name})
    return [json.dumps(event) for event in events]


def _slices(records: RunRecords, rows: NDArray[np.int64]) -> list[str]:
    batches = {name: column[rows] for name, column in records.batches.items()}
    # Both ends are rounded, not the length: a slice that ends where the next begins must not overlap it.
    starts, ends = (np.rint(batches[name] * 1e9) / 1e3 for name in ("start_s", "end_s"))
    times = starts.tolist(), (ends - starts).tolist()
    names = ("replica", "stage", "batch", "steps", "num_prefills", "prefill_tokens", "num_decodes")
    counts = (batches[name].tolist() for name in names)
    return [
        f'{{"ph":"X","pid":{replica},"tid":{stage},"ts":{start:.3f},"dur":{length:.3f},'
        f'"name":"{_kind(prefills, decodes)}","args":{{"batch":{batch},"steps":{steps},"prefills":{prefills},'
        f'"prefill_tokens":{tokens},"decodes":{decodes}}}}}'
        for start, length, replica, stage, batch, steps, prefills, tokens, decodes in zip(
            *times, *counts, strict=True
        )
    ]


def _kind(prefills: int, decodes: int) -> str:
    if prefills and decodes:
        return "mixed"
    return "prefill" if prefills else "decode"


def _counters(records: RunRecords, rows: NDArray[np.int64]) -> list[str]:
    rows = rows[records.batches["stage"][rows] == 0]
    if len(rows) > MAX_SAMPLES:
        rows = rows[np.linspace(0, len(rows) - 1, MAX_SAMPLES).astype(np.int64)]
    batches = {name: column[rows].tolist() for name, column in records.batches.items()}
    times = _microseconds(records.batches["end_s"][rows])
    events = []
    for at, replica, waiting, used in zip(
        times, batches["replica"], batches["waiting"], batches["kv_used_blocks"], strict=True
    ):
        head = f'{{"ph":"C","pid":{replica},"ts":{at:.3f},"name":'
        events.append(f'{head}"waiting requests","args":{{"requests":{waiting}}}}}')
        events.append(f'{head}"KV blocks in use","args":{{"blocks":{used}}}}}')
    return events


def _request_phases(records: RunRecords, rows: NDArray[np.int64], until_s: float) -> list[str]:
    requests = records.requests
    columns = {name: requests[name][rows].tolist() for name in ("request_id", "replica", "prompt_tokens")}
    events = []
    for name, begin, end in _PHASES:
        for id_, replica, tokens, begin_s, end_s in zip(
            columns["request_id"],
            columns["replica"],
            columns["prompt_tokens"],
            requests[begin][rows].tolist(),
            requests[end][rows].tolist(),
            strict=True,
        ):
            if not (begin_s <= until_s and end_s == end_s):  # a phase that never ended has NaN
                continue
            head = f'"cat":"request","id":{id_},"pid":{replica},"tid":0,"name":"{name}"'
            args = f'"args":{{"request":{id_},"prompt_tokens":{tokens}}}'
            events.append(f'{{"ph":"b","ts":{begin_s * 1e6:.3f},{head},{args}}}')
            events.append(f'{{"ph":"e","ts":{end_s * 1e6:.3f},{head}}}')
    return events


def _microseconds(seconds: NDArray[np.float64]) -> list[float]:
    values: list[float] = (seconds * 1e6).tolist()
    return values
