"""Traces in CSV: one table says which columns each format has; they are found by name."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specs.errors import InputError
from traces._columns import Columns, Floats, at_row
from traces._files import Lines, line_blocks
from traces.workload import Workload

MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class CsvFormat:
    """The columns of one CSV format."""

    name: str
    prompt: str
    output: str
    arrival: str | None = None
    arrival_is_date: bool = False  # a calendar date and time; otherwise a number of seconds
    arrival_is_optional: bool = False
    zero_output_means_failed: bool = False  # such rows are left out and counted
    slo_class: str | None = None  # optional column

    @property
    def required(self) -> list[str]:
        """Columns a file of this format must have."""
        arrival = [] if self.arrival is None or self.arrival_is_optional else [self.arrival]
        return [*arrival, self.prompt, self.output]


# In order of recognition: the first whose required columns are all there.
CSV_FORMATS = (
    CsvFormat("azure", "ContextTokens", "GeneratedTokens", "TIMESTAMP", arrival_is_date=True),
    CsvFormat("burstgpt", "Request tokens", "Response tokens", "Timestamp", zero_output_means_failed=True),
    CsvFormat("vidur", "num_prefill_tokens", "num_decode_tokens", "arrived_at"),
    CsvFormat("splitwise", "prompt_size", "token_size", "arrival_timestamp"),
    CsvFormat(
        "convoy",
        "prompt_tokens",
        "output_tokens",
        "arrival_s",
        arrival_is_optional=True,
        slo_class="slo_class",
    ),
    CsvFormat("lengths", "num_prefill_tokens", "num_decode_tokens"),
)


def recognise(header: str) -> CsvFormat | None:
    """The format whose columns `header` (the first line of a file) has, or None."""
    columns = split_header(header)
    return next((each for each in CSV_FORMATS if set(each.required) <= set(columns)), None)


def split_header(header: str) -> list[str]:
    """The names in the first line of a CSV file."""
    return [name.strip() for name in next(csv.reader([header.lstrip("\ufeff").rstrip("\r\n")]), [])]


def read_csv(path: Path, kind: CsvFormat) -> tuple[Workload, int]:
    """Read a CSV trace and return it with the number of rows left out as failed requests.

    Raises:
        InputError: the file or a row is unreadable or impossible, or there are no rows.
    """
    blocks = line_blocks(path, MAX_LINE_BYTES)
    parser, first = _start(path, kind, blocks)
    parser.add(first)
    for lines in blocks:
        parser.add(lines)
    return parser.result()


def _start(path: Path, kind: CsvFormat, blocks: Iterator[Lines]) -> tuple[_Parser, Lines]:
    """Read the header; returns the parser for the rows and the rows that came with the header."""
    for lines in blocks:
        if not lines.texts:
            continue
        columns = split_header(lines.texts[0])
        for name in kind.required:
            if columns.count(name) != 1:
                problem = "has no column" if name not in columns else "has more than one column"
                raise InputError(
                    f"{path}: {problem} '{name}'; format {kind.name} has {', '.join(kind.required)}"
                )
        return _Parser(path, kind, columns), Lines(lines.numbers[1:], lines.texts[1:])
    raise InputError(f"{path}: is empty; a trace in format {kind.name} begins with {','.join(kind.required)}")


class _Parser:
    """Turns the lines of a CSV file into the columns of a workload."""

    def __init__(self, path: Path, kind: CsvFormat, columns: list[str]) -> None:
        self._path = path
        self._kind = kind
        self._width = len(columns)
        self._position = {name: position for position, name in enumerate(columns)}
        timed = kind.arrival is not None and kind.arrival in columns
        self._arrival = kind.arrival if timed else None
        self._slo = kind.slo_class if kind.slo_class in columns else None
        names = (kind.arrival or "", kind.prompt, kind.output)
        self._columns = Columns(path, names, times_are_relative=kind.arrival_is_date)
        self._slo_codes: dict[str, int] = {}
        self._slo_class: list[NDArray[np.uint8]] = []
        self._failed = 0
        self._origin_ns: int | None = None

    def add(self, lines: Lines) -> None:
        """Parse and check one block of rows."""
        if not lines.texts:
            return
        cells = self._split(lines)
        prompt = self._numbers(cells, lines, self._kind.prompt)
        output = self._numbers(cells, lines, self._kind.output)
        arrival = None
        if self._arrival is not None:
            read = self._dates if self._kind.arrival_is_date else self._numbers
            arrival = read(cells, lines, self._arrival)
        if self._slo is not None:
            self._slo_class.append(self._classes(self._cell(cells, self._slo), lines))
        numbers = lines.numbers
        if self._kind.zero_output_means_failed:
            kept = np.flatnonzero(output != 0.0)
            self._failed += len(output) - len(kept)
            if len(kept) == 0:
                return
            prompt, output = prompt[kept], output[kept]
            arrival = None if arrival is None else arrival[kept]
            numbers = [numbers[index] for index in kept.tolist()]
        self._columns.add(numbers, arrival, prompt, output)

    def result(self) -> tuple[Workload, int]:
        """The workload, and how many rows were left out."""
        if len(self._columns) == 0:
            reason = "every request in it failed" if self._failed else "it has a header but no rows"
            raise InputError(f"{self._path}: holds no requests; {reason}")
        prompt, output = self._columns.lengths()
        return Workload(
            prompt_tokens=prompt,
            output_tokens=output,
            arrival_s=None if self._arrival is None else self._columns.arrival_s(),
            slo_class=np.concatenate(self._slo_class) if self._slo is not None else None,
            slo_names=tuple(self._slo_codes) or ("default",),
        ), self._failed

    def _split(self, lines: Lines) -> list[list[str]]:
        try:
            rows = list(csv.reader(lines.texts, strict=True))
        except csv.Error:
            rows = []
        if len(rows) == len(lines.texts) and all(len(row) == self._width for row in rows):
            return rows
        for number, text in zip(lines.numbers, lines.texts, strict=True):
            try:
                width = len(next(csv.reader([text], strict=True)))
            except csv.Error as error:
                raise InputError(f"{at_row(self._path, number)}: not CSV ({error})") from None
            if width != self._width:
                raise InputError(
                    f"{at_row(self._path, number)}: has {width} cells, but the header has {self._width}"
                )
        raise InputError(f"{at_row(self._path, lines.numbers[0])}: a cell goes over more than one line")

    def _cell(self, cells: list[list[str]], name: str) -> list[str]:
        position = self._position[name]
        return [row[position] for row in cells]

    def _numbers(self, cells: list[list[str]], lines: Lines, name: str) -> Floats:
        values = self._cell(cells, name)
        try:
            return np.fromiter(map(float, values), np.float64, len(values))
        except ValueError:
            raise self._first_bad(values, lines, name, _is_number, "a number") from None

    def _dates(self, cells: list[list[str]], lines: Lines, name: str) -> Floats:
        values = self._cell(cells, name)
        try:
            stamps = _nanoseconds(values)
        except ValueError:
            right = "a date and time as 2023-11-16 18:17:03.97"
            raise self._first_bad(values, lines, name, _is_date, right) from None
        # Relative to the first row at once: seconds since 1970 in a float64 are only good to 0.2 µs.
        if self._origin_ns is None:
            self._origin_ns = int(stamps[0])
        return (stamps - self._origin_ns) / 1e9

    def _first_bad(
        self, values: list[str], lines: Lines, name: str, is_good: Callable[[str], bool], right: str
    ) -> InputError:
        """Go over a column again, slowly, for the row to name."""
        for number, value in zip(lines.numbers, values, strict=True):
            if not is_good(value):
                return InputError(f"{at_row(self._path, number)}: {name} must be {right}, not {value[:40]!r}")
        return InputError(f"{at_row(self._path, lines.numbers[0])}: {name} must be {right}")

    def _classes(self, values: list[str], lines: Lines) -> NDArray[np.uint8]:
        codes = self._slo_codes
        numbers = [codes.setdefault(value, len(codes)) for value in values]
        if "" in codes or len(codes) > 256:
            bad = values.index("") if "" in values else next(i for i, n in enumerate(numbers) if n > 255)
            problem = "is empty" if "" in values else "is one of more than 256 different classes"
            raise InputError(f"{at_row(self._path, lines.numbers[bad])}: {self._slo} {problem}")
        return np.array(numbers, dtype=np.uint8)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# The years that a datetime64[ns] holds, as seen in traces; up to nine fractional digits; an optional zone.
_DATE = re.compile(
    r"((?:19[7-9]\d|2[01]\d\d)-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(Z|[+-]\d\d:?\d\d)?", re.ASCII
)


def _nanoseconds(values: Sequence[str]) -> NDArray[np.int64]:
    """Nanoseconds since 1970 of dates and times; without a zone they are taken as UTC."""
    matches = list(map(_DATE.fullmatch, values))
    if not all(matches):
        raise ValueError("not a date")
    parts = [match.groups() for match in matches if match is not None]
    stamps = np.array([moment for moment, _ in parts], dtype="datetime64[ns]").astype(np.int64)
    zones = {zone for _, zone in parts}
    if zones - {None, "Z", "+00:00", "+0000"}:
        stamps -= np.array([_offset_ns(zone) for _, zone in parts], dtype=np.int64)
    return stamps


def _offset_ns(zone: str | None) -> int:
    """Nanoseconds that a zone such as +02:00 is ahead of UTC."""
    if zone is None or zone == "Z":
        return 0
    minutes = int(zone[1:3]) * 60 + int(zone[-2:])
    return (-1 if zone[0] == "-" else 1) * minutes * 60 * 10**9


def _is_date(text: str) -> bool:
    try:
        _nanoseconds([text])
    except ValueError:
        return False
    return True
