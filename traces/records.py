"""What a run leaves behind: one row a request and one row a batch, the same from every driver.

Columns are NumPy arrays; a driver fills them through a :class:`Recorder`. NaN means "no value".
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

STATUSES = ("unfinished", "finished", "rejected")
UNFINISHED, FINISHED, REJECTED = range(3)

REQUEST_COLUMNS = (
    "request_id",
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "slo_class",
    "replica",
    "status",
    "scheduled_s",
    "first_token_s",
    "finished_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "preemptions",
    "deadline_s",
    "slo_met",
    "decode_replica",
    "transfer_start_s",
    "transfer_end_s",
)
BATCH_COLUMNS = (
    "start_s",
    "end_s",
    "replica",
    "stage",
    "batch",
    "steps",
    "num_prefills",
    "prefill_tokens",
    "num_decodes",
    "waiting",
    "kv_used_blocks",
)
HOST_COLUMNS = ("batch", "stage", "schedule_s", "launch_s", "execute_s", "sample_s", "probe_s")
"""Of a live run: seconds the host took, for each batch and stage, to decide on the batch (first stage only),
to prepare it, to execute the layers and to sample; and what a probe of the core took just before (see
:mod:`runtime.core_probe`), 0 if none was taken."""
SLOW_PROBE = 1.12
"""Times its usual duration, from which a probe says that somebody else is on its core; others vary by 3 %."""
_BATCH_TIMES = ("start_s", "end_s")


@dataclass(slots=True)
class Work:
    """Useful work of a run, for utilisation: integer sums over all batches of all replicas."""

    iterations: int = 0
    tokens: int = 0
    rows: int = 0  # tokens that reached the LM head
    attention_pairs: int = 0  # pairs of a query and a key
    kv_tokens_read: int = 0
    extrapolated_s: float = 0.0
    predicted_s: float = 0.0
    looked_up_tokens: int = 0  # of prefills admitted to a cache of prefixes
    reused_tokens: int = 0  # of them, found there


@dataclass(slots=True)
class RunRecords:
    """The records of a run.

    Attributes:
        requests: columns of one entry a request: request_id, arrival_s, prompt_tokens, output_tokens,
            slo_class and status (codes), replica (−1 if none), scheduled_s, first_token_s, finished_s,
            preemptions, deadline_s; and where prefills and decodes run in different places, decode_replica
            (else −1), transfer_start_s and transfer_end_s: of its KV cache, from when there was room for it.
        batches: columns of ``BATCH_COLUMNS``, one entry for each batch and stage, or for each run of
            ``steps`` equal decode batches. ``waiting`` and ``kv_used_blocks`` are as of the batch's end: what
            finished with it holds none.
        gaps: [k, 4]: runs of gaps between tokens as (first gap in s, growth per step in s, steps, requests).
    """

    requests: dict[str, NDArray[Any]]
    batches: dict[str, NDArray[Any]]
    gaps: FloatArray
    slo_names: tuple[str, ...]
    replicas: int
    kv_capacity_blocks: int
    block_tokens: int
    end_s: float
    work: Work = field(default_factory=Work)
    wall_s: float = 0.0
    interrupted: bool = False
    kv_capacities: tuple[int, ...] = ()  # blocks of each replica, if not all have kv_capacity_blocks

    def kv_capacity_of(self, replica: NDArray[Any]) -> NDArray[Any]:
        """KV blocks that the replicas of these indices hold."""
        if not self.kv_capacities:
            return np.full(len(replica), self.kv_capacity_blocks)
        return np.array(self.kv_capacities)[replica.astype(np.int64)]

    @property
    def ttft_s(self) -> FloatArray:
        """Time to first token of each request, seconds; NaN where there is none."""
        return np.asarray(self.requests["first_token_s"] - self.requests["arrival_s"])

    @property
    def e2e_s(self) -> FloatArray:
        """Arrival to last token of each request, seconds; NaN where there is none."""
        return np.asarray(self.requests["finished_s"] - self.requests["arrival_s"])

    @property
    def tpot_s(self) -> FloatArray:
        """(e2e − ttft) ÷ (output tokens − 1) of each request; NaN where there is none."""
        later_tokens = self.requests["output_tokens"].astype(np.float64) - 1.0
        later_tokens[later_tokens == 0.0] = np.nan
        return np.asarray((self.requests["finished_s"] - self.requests["first_token_s"]) / later_tokens)


class Recorder:
    """Collects a run's records.

    Args:
        num_requests: requests of the workload.
        slo_names: names behind the ``slo_class`` codes.

    Attributes:
        batch: call it with a tuple, one row of ``BATCH_COLUMNS``.
        gap: call it with a tuple, one row of ``RunRecords.gaps``.
    """

    def __init__(self, num_requests: int, slo_names: Sequence[str] = ("default",)) -> None:
        self.slo_names = tuple(slo_names)
        self.work = Work()
        self.finished = 0
        self.rejected = 0
        nothing = float("nan")
        self._times = {
            name: array("d", [nothing]) * num_requests
            for name in (
                "arrival_s",
                "scheduled_s",
                "first_token_s",
                "finished_s",
                "deadline_s",
                "transfer_start_s",
                "transfer_end_s",
            )
        }
        self._counts = {
            "prompt_tokens": array("i", [0]) * num_requests,
            "output_tokens": array("i", [0]) * num_requests,
            "slo_class": array("B", [0]) * num_requests,
            "replica": array("i", [-1]) * num_requests,
            "status": array("B", [UNFINISHED]) * num_requests,
            "preemptions": array("i", [0]) * num_requests,
            "decode_replica": array("i", [-1]) * num_requests,
        }
        self._seen = array("B", [0]) * num_requests
        self._batches = array("d")  # row by row: one call appends a row
        self._gaps = array("d")
        self.batch = self._batches.extend  # a row of BATCH_COLUMNS
        self.gap = self._gaps.extend  # (first gap in s, growth per step in s, steps, requests)

    def arrival(
        self, id: int, arrival_s: float, prompt_tokens: int, output_tokens: int, slo_class: int, replica: int
    ) -> None:
        """A request has arrived; ``replica`` is −1 if it is rejected."""
        self._seen[id] = 1
        self._times["arrival_s"][id] = arrival_s
        self._counts["prompt_tokens"][id] = prompt_tokens
        self._counts["output_tokens"][id] = output_tokens
        self._counts["slo_class"][id] = slo_class
        self._counts["replica"][id] = replica
        if replica < 0:
            self._counts["status"][id] = REJECTED
            self.rejected += 1

    def placed(self, id: int, replica: int) -> None:
        """Where a request prefills, if that wasn't known when it arrived."""
        self._counts["replica"][id] = replica

    def transfer(self, id: int, decode_replica: int, start_s: float, end_s: float) -> None:
        """A request's KV cache has moved to where it decodes."""
        self._counts["decode_replica"][id] = decode_replica
        self._times["transfer_start_s"][id] = start_s
        self._times["transfer_end_s"][id] = end_s

    def progress(
        self, id: int, scheduled_s: float, first_token_s: float, deadline_s: float, preemptions: int
    ) -> None:
        """How far a request has come."""
        self._times["scheduled_s"][id] = scheduled_s
        self._times["first_token_s"][id] = first_token_s
        self._times["deadline_s"][id] = deadline_s
        self._counts["preemptions"][id] = preemptions

    def finish(self, id: int, finished_s: float) -> None:
        """A request's last token is out."""
        self._times["finished_s"][id] = finished_s
        self._counts["status"][id] = FINISHED
        self.finished += 1

    def records(
        self, *, replicas: int, kv_capacity_blocks: int, block_tokens: int, end_s: float
    ) -> RunRecords:
        """Everything so far; requests that haven't arrived are left out."""
        seen = _view(self._seen).astype(bool)
        ids = np.flatnonzero(seen)
        requests: dict[str, NDArray[Any]] = {"request_id": ids}
        columns: dict[str, array[Any]] = {**self._times, **self._counts}
        for name, column in columns.items():
            requests[name] = _view(column)[ids]
        rows = _view(self._batches).reshape(-1, len(BATCH_COLUMNS))
        batches = {
            name: rows[:, i] if name in _BATCH_TIMES else rows[:, i].astype(np.int32)
            for i, name in enumerate(BATCH_COLUMNS)
        }
        return RunRecords(
            requests=requests,
            batches=batches,
            gaps=_view(self._gaps).reshape(-1, 4),
            slo_names=self.slo_names,
            replicas=replicas,
            kv_capacity_blocks=kv_capacity_blocks,
            block_tokens=block_tokens,
            end_s=end_s,
            work=self.work,
        )


def _view(column: array[Any]) -> NDArray[Any]:
    """The column as an array, without a copy: a run of a million requests has many."""
    return np.frombuffer(column, dtype=column.typecode) if column else np.empty(0, dtype=column.typecode)


def write_requests_csv(records: RunRecords, slo_met: NDArray[np.bool_], path: Path) -> None:
    """Write ``requests.csv``: the columns of ``REQUEST_COLUMNS``, empty where there is no value.

    ``slo_met`` has one entry a request.
    """
    columns = dict(records.requests)
    columns["ttft_s"], columns["tpot_s"], columns["e2e_s"] = records.ttft_s, records.tpot_s, records.e2e_s
    text = {name: _cells(columns[name]) for name in REQUEST_COLUMNS if name != "slo_met"}
    text["slo_class"] = [records.slo_names[code] for code in columns["slo_class"].tolist()]
    text["status"] = [STATUSES[code] for code in columns["status"].tolist()]
    for name in ("replica", "decode_replica"):
        text[name] = ["" if code < 0 else str(code) for code in columns[name].tolist()]
    text["slo_met"] = ["true" if met else "false" for met in slo_met.tolist()]
    _write_csv(path, REQUEST_COLUMNS, zip(*(text[name] for name in REQUEST_COLUMNS), strict=True))


def write_batches_csv(records: RunRecords, path: Path, *, exact: bool = False) -> None:
    """Write ``batches.csv``: one row for each batch and stage; ``steps`` says how many equal decode batches
    a row stands for. With ``exact``, times read back are the same to the last bit."""
    text = [
        list(map(repr, records.batches[name].tolist())) if exact else _cells(records.batches[name])
        for name in BATCH_COLUMNS
    ]
    _write_csv(path, BATCH_COLUMNS, zip(*text, strict=True))


def _cells(column: NDArray[Any]) -> list[str]:
    """A column as text; NaN becomes an empty cell, times keep nanoseconds."""
    if column.dtype.kind == "f":
        return ["" if value != value else f"{value:.9f}" for value in column.tolist()]
    return [str(value) for value in column.tolist()]


def _write_csv(path: Path, header: Sequence[str], rows: Iterator[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
