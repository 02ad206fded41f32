"""Records read back from the files of a run. Nobody vouches for those: every row is checked."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specs.errors import InputError
from traces._files import line_blocks
from traces.records import BATCH_COLUMNS, HOST_COLUMNS, REQUEST_COLUMNS, STATUSES
from traces.slices import SLICE_COLUMNS, Slices

MAX_ROWS = 20_000_000
_MAX_LINE_BYTES = 1 << 14
_MAX_NUMBER = 2**31 - 1

Columns = dict[str, NDArray[Any]]
_LATER_REQUEST_COLUMNS = 3  # where a request decodes, and when its KV cache went there
_LATER_HOST_COLUMNS = 1  # the probe


def read_requests_csv(path: Path, slo_names: Sequence[str]) -> Columns:
    """The columns of ``RunRecords.requests`` from a ``requests.csv``; ids must rise.

    Raises:
        InputError: the file is missing, unreadable or too long, a row is not what it should be, or a class is
            not one of ``slo_names``.
    """
    classes = {name: code for code, name in enumerate(slo_names)}
    statuses = {name: code for code, name in enumerate(STATUSES)}
    kinds = {name: _time for name in REQUEST_COLUMNS if name.endswith("_s")}
    counts = ("request_id", "prompt_tokens", "output_tokens", "preemptions")
    columns = _read(
        path,
        REQUEST_COLUMNS,
        {
            **kinds,
            **dict.fromkeys(counts, _count),
            **dict.fromkeys(("replica", "decode_replica"), lambda text: -1 if text == "" else _count(text)),
            "slo_class": lambda text: _name(text, classes),
            "status": lambda text: _name(text, statuses),
        },
        later=_LATER_REQUEST_COLUMNS,
    )
    ids = columns["request_id"]
    if np.any(np.diff(ids) <= 0):
        row = int(np.argmax(np.diff(ids) <= 0)) + 3
        raise InputError(f"{path}: row at line {row}: request_id must be larger than that of the row above")
    derived = ("ttft_s", "tpot_s", "e2e_s", "slo_met")
    return {name: column for name, column in columns.items() if name not in derived}


def read_batches_csv(path: Path) -> Columns:
    """The columns of ``RunRecords.batches`` from a ``batches.csv``.

    Raises:
        InputError: as for :func:`read_requests_csv`.
    """
    counts = tuple(name for name in BATCH_COLUMNS if not name.endswith("_s"))
    kinds = {"start_s": _moment, "end_s": _moment, **dict.fromkeys(counts, _count)}
    columns = _read(path, BATCH_COLUMNS, kinds)
    backwards = columns["end_s"] < columns["start_s"]
    if backwards.any():
        raise InputError(f"{path}: row at line {int(np.argmax(backwards)) + 2}: end_s is before start_s")
    return columns


def read_host_csv(path: Path) -> Columns:
    """The columns of ``HOST_COLUMNS`` of a live run.

    Raises:
        InputError: as for :func:`read_requests_csv`.
    """
    kinds = {name: _moment if name.endswith("_s") else _count for name in HOST_COLUMNS}
    kinds["probe_s"] = lambda text: 0.0 if text == "" else _moment(text)
    return _read(path, HOST_COLUMNS, kinds, later=_LATER_HOST_COLUMNS)


def read_slices_csv(path: Path) -> Slices:
    """The slices that ``traces.slices.write_slices_csv`` wrote.

    Raises:
        InputError: as for :func:`read_requests_csv`; or batches aren't in order, or a slice is empty.
    """
    columns = _read(path, SLICE_COLUMNS, dict.fromkeys(SLICE_COLUMNS, _count))
    slices = Slices(*(columns[name] for name in SLICE_COLUMNS))
    wrong = (np.diff(slices.batch, prepend=0) < 0) | (slices.tokens < 1)
    if wrong.any():
        row = int(np.argmax(wrong)) + 2
        raise InputError(f"{path}: row at line {row}: batches must be in order, and tokens at least 1")
    return slices


def _read(
    path: Path, header: Sequence[str], kinds: Mapping[str, Callable[[str], float]], *, later: int = 0
) -> Columns:
    """The columns in ``kinds`` of a CSV that must have exactly this header; its ``later`` last columns aren't
    in older files, and are empty then."""
    places = [(place, name, kinds[name]) for place, name in enumerate(header) if name in kinds]
    blocks: dict[str, list[NDArray[Any]]] = {name: [] for name in kinds}
    rows = 0
    has_header, missing = False, 0
    older = ",".join(header[: len(header) - later])
    for block in line_blocks(path, _MAX_LINE_BYTES):
        numbers, texts = list(block.numbers), block.texts
        if not has_header and texts:
            missing = later if texts[0] == older else 0
            if not missing and texts[0] != ",".join(header):
                raise InputError(f"{path}: the first line must be {','.join(header)}")
            numbers, texts, has_header = numbers[1:], texts[1:], True
        values: dict[str, list[float]] = {name: [] for name in kinds}
        for number, cells in zip(numbers, csv.reader(texts), strict=False):
            if len(cells) != len(header) - missing:
                raise InputError(
                    f"{path}: row at line {number}: has {len(cells)} cells, not {len(header) - missing}"
                )
            cells += [""] * missing
            for place, name, convert in places:
                try:
                    values[name].append(convert(cells[place]))
                except ValueError as error:
                    raise InputError(f"{path}: row at line {number}: {name} {error}") from None
        rows += len(texts)
        if rows > MAX_ROWS:
            raise InputError(f"{path}: has more than {MAX_ROWS} rows")
        for name in kinds:
            dtype = np.float64 if name.endswith("_s") else np.int64
            blocks[name].append(np.array(values[name], dtype=dtype))
    if not has_header:
        raise InputError(f"{path}: is empty; its first line must be {','.join(header)}")
    return {name: np.concatenate(parts) for name, parts in blocks.items()}


def _time(text: str) -> float:
    """A time or, where the cell is empty, no value."""
    return float("nan") if text == "" else _moment(text)


def _moment(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"must be a time, finite and not negative, not {_show(text)}")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10) or int(text) > _MAX_NUMBER:
        raise ValueError(f"must be a whole number from 0 to {_MAX_NUMBER}, not {_show(text)}")
    return int(text)


def _name(text: str, codes: Mapping[str, int]) -> int:
    if text not in codes:
        raise ValueError(f"must be one of {', '.join(codes)}, not {_show(text)}")
    return codes[text]


def _show(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 40 else f"{shown[:37]}…'"
