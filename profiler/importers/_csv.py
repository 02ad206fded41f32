"""Reading of other tools' CSV tables, plain or gzip-compressed."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from profiler.estimate import FloatArray
from specs.errors import InputError
from specs.input_files import did_you_mean

MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Csv:
    """A table of another tool: columns of numbers, and of text."""

    path: Path
    data: pd.DataFrame
    sha256: str

    def numbers(self, column: str) -> FloatArray:
        """A column as numbers.

        Raises:
            InputError: a cell isn't a finite number that is at least 0.
        """
        values = pd.to_numeric(self.data[column], errors="coerce").to_numpy(dtype=np.float64)
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(bad):
            raise InputError(
                f"{self.path}: row {bad[0] + 2}: {column} must be a number of at least 0, not "
                f"{self.data[column].iloc[bad[0]]!r}"
            )
        return values

    @property
    def origin(self) -> str:
        """For the provenance of a profile."""
        return f"{self.path.name} (SHA-256 {self.sha256})"


def read_csv(path: Path, columns: Sequence[str]) -> Csv:
    """Read a table that has at least these columns.

    Raises:
        InputError: missing, too large, not CSV, empty, or without a column.
    """
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    if len(text) > MAX_BYTES:
        raise InputError(f"{path}: unpacks to more than {MAX_BYTES >> 20} MiB, so it is not such a table")
    import io

    try:
        data = pd.read_csv(io.BytesIO(text))
    except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV table ({str(error).splitlines()[0]})") from None
    for column in columns:
        if column not in data.columns:
            names = [str(name) for name in data.columns]
            raise InputError(f"{path}: no column {column!r}{did_you_mean(column, names)}")
    if data.empty:
        raise InputError(f"{path}: no rows")
    return Csv(path, data, hashlib.sha256(raw).hexdigest())
