"""Reading traces: what format a file is in, and its requests as a `Workload`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from specs.errors import InputError, did_you_mean
from traces import _csv_formats, _json_formats
from traces._files import first_character, line_blocks
from traces.workload import Workload

_CSV = {each.name: each for each in _csv_formats.CSV_FORMATS}
_JSONL = {each.name: each for each in _json_formats.JSONL_FORMATS}

FORMATS: tuple[str, ...] = (*_CSV, *_JSONL, "sharegpt")
"""Names of the formats that can be read."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A trace that was read, and what there is to say about how."""

    workload: Workload
    format: str
    left_out: int  # rows that are no requests: failed ones, conversations without an answer
    notes: tuple[str, ...]  # one sentence for each liberty taken


def read_trace(path: str | Path, format: str = "auto") -> Workload:
    """Read the requests of a trace, plain or gzip; the first arrives at 0 s.

    Formats: ``azure`` (2023 and 2024), ``burstgpt`` (requests with 0 response tokens failed and are left
    out), ``vidur``, ``splitwise``, ``lengths`` (no times), ``convoy`` (our own CSV), ``mooncake`` and
    ``groundtruth`` (one JSON object a line, with prefix blocks), ``sharegpt`` (no times).
    What was left out or estimated stands in the workload's notes.

    Raises:
        InputError: the file is unreadable or in no known format, or a row is impossible; names the row.
    """
    reading = read_trace_with_notes(path, format)
    return replace(reading.workload, notes=reading.notes) if reading.notes else reading.workload


def read_trace_with_notes(path: str | Path, format: str = "auto") -> Reading:
    """As `read_trace`, with the format found, the rows left out and what was estimated."""
    path = Path(path)
    if format == "auto":
        format = detect_format(path)
    if format in _CSV:
        workload, left_out = _csv_formats.read_csv(path, _CSV[format])
        notes = (f"{left_out} requests with 0 response tokens failed and are left out",) if left_out else ()
        return Reading(workload, format, left_out, notes)
    if format in _JSONL:
        return Reading(_json_formats.read_jsonl(path, _JSONL[format]), format, 0, ())
    if format == "sharegpt":
        workload, left_out, estimated = _json_formats.read_sharegpt(path)
        return Reading(workload, format, left_out, _sharegpt_notes(left_out, estimated))
    hint = did_you_mean(format, FORMATS)
    raise InputError(f"{path}: unknown trace format '{format}', known are {', '.join(FORMATS)}{hint}")


def detect_format(path: str | Path) -> str:
    """Recognise the format of a trace by its first line: the columns of a CSV, the keys of a JSON object.

    Raises:
        InputError: the file is unreadable, empty, or in no known format.
    """
    path = Path(path)
    if first_character(path) == "[":
        return "sharegpt"
    first = _first_line(path)
    if first.startswith("{"):
        found = _json_formats.recognise(first)
        if found is None:
            known = "; ".join(f"{each.name}: {', '.join(each.required)}" for each in _JSONL.values())
            raise InputError(f"{path}: line 1 is no object of a known trace format ({known})")
        return found.name
    kind = _csv_formats.recognise(first)
    if kind is None:
        columns = ", ".join(_csv_formats.split_header(first))[:120]
        known = "; ".join(f"{each.name}: {', '.join(each.required)}" for each in _CSV.values())
        raise InputError(f"{path}: the columns '{columns}' are of no known trace format ({known})")
    return kind.name


def _first_line(path: Path) -> str:
    """The first line that is not blank, without spaces around it."""
    for lines in line_blocks(path, _json_formats.MAX_LINE_BYTES):
        if lines.texts:
            return lines.texts[0].strip()
    raise InputError(f"{path}: is empty")


def _sharegpt_notes(left_out: int, estimated: bool) -> tuple[str, ...]:
    notes = []
    if estimated:
        notes.append(f"token counts are estimated at {_json_formats.CHARACTERS_PER_TOKEN} characters a token")
    if left_out:
        notes.append(f"{left_out} conversations without a question and an answer are left out")
    return tuple(notes)
