"""Collecting the columns of a trace block by block, checking every row as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specs.errors import InputError
from traces.workload import MAX_TOKENS

MAX_ROWS = 100_000_000  # a week of the largest public trace is a third of it

Floats = NDArray[np.float64]


def at_row(path: Path, line: int) -> str:
    """How errors name a row of a file: by the line it stands on, counted from 1."""
    return f"{path}: row at line {line}"


class Columns:
    """The checked columns read so far.

    Args:
        path: named in errors.
        names: what the file calls the time, the prompt's and the output's length, for errors.
        times_are_relative: times are counted from the first row's, so a negative one is out of order.
    """

    def __init__(self, path: Path, names: tuple[str, str, str], *, times_are_relative: bool = False) -> None:
        self._path = path
        self._names = names
        self._times_are_relative = times_are_relative
        self._arrival: list[Floats] = []
        self._prompt: list[NDArray[np.int32]] = []
        self._output: list[NDArray[np.int32]] = []
        self._rows = 0
        self._last_s = 0.0

    def __len__(self) -> int:
        return self._rows

    def add(self, numbers: Sequence[int], arrival_s: Floats | None, prompt: Floats, output: Floats) -> None:
        """Append one block of rows that stand on the lines `numbers`.

        Raises:
            InputError: a value is impossible; the first bad row is named.
        """
        bad = _bad_lengths(prompt) | _bad_lengths(output)
        if arrival_s is not None:
            before = np.concatenate(([self._last_s], arrival_s[:-1]))
            bad |= ~np.isfinite(arrival_s) | (arrival_s < 0.0) | (arrival_s < before)
        if bad.any():
            index = int(np.argmax(bad))
            times = None if arrival_s is None else (float(before[index]), float(arrival_s[index]))
            problem = self._problem(times, float(prompt[index]), float(output[index]))
            raise InputError(f"{at_row(self._path, numbers[index])}: {problem}")
        if arrival_s is not None and len(arrival_s):
            self._arrival.append(arrival_s)
            self._last_s = float(arrival_s[-1])
        self._prompt.append(prompt.astype(np.int32))
        self._output.append(output.astype(np.int32))
        self._rows += len(prompt)
        if self._rows > MAX_ROWS:
            raise InputError(f"{self._path}: has more than {MAX_ROWS} rows")

    def lengths(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Prompt and output tokens of all rows."""
        return _concatenate(self._prompt), _concatenate(self._output)

    def arrival_s(self) -> Floats:
        """Times of all rows, the first at 0."""
        arrival = _concatenate(self._arrival)
        arrival -= arrival[0]
        return arrival

    def _problem(self, times: tuple[float, float] | None, prompt: float, output: float) -> str:
        """What is wrong with one row."""
        time_name, prompt_name, output_name = self._names
        if times is not None:
            before, time = times
            if not np.isfinite(time) or (time < 0.0 and not self._times_are_relative):
                return f"{time_name} must be a time, finite and not negative, not {time:g}"
            if time < before:
                return (
                    f"{time_name} is {before - time:g} s before that of the row above; "
                    "the rows must be in order of time, so sort the file first"
                )
        name, value = (prompt_name, prompt) if _bad_lengths(np.array([prompt]))[0] else (output_name, output)
        return f"{name} must be a whole number from 1 to {MAX_TOKENS}, not {value:.15g}"


def _bad_lengths(values: Floats) -> NDArray[np.bool_]:
    # A comparison with NaN is false, so NaN is bad.
    good: NDArray[np.bool_] = (values >= 1.0) & (values <= MAX_TOKENS) & (values == np.floor(values))
    return ~good


def _concatenate(blocks: list[NDArray[Any]]) -> NDArray[Any]:
    """Join the blocks and let go of them."""
    joined = np.concatenate(blocks)
    blocks.clear()
    return joined
