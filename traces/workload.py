"""The requests of a simulation, by column: when they come, how long they are, what they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specs.errors import InputError

MAX_TOKENS = 2**31 - 1
"""Largest prompt or output of one request: lengths are int32."""
MAX_TIME_S = 1e9
"""Latest arrival, 30 years: a double then still tells 0.1 µs apart."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefixBlocks:
    """Ids of the prefix blocks of every request, one ragged row each.

    An id stands for a block of `block_tokens` tokens together with all that comes before it, so that
    equal leading ids mean an equal prefix. Row i is ``ids[offsets[i]:offsets[i + 1]]``.
    """

    offsets: NDArray[np.int64]  # [n + 1]
    ids: NDArray[np.int32]  # [offsets[n]]
    block_tokens: int

    def __post_init__(self) -> None:
        offsets, ids = self.offsets, self.ids
        if self.block_tokens < 1:
            raise InputError(f"prefix blocks: block_tokens must be at least 1, not {self.block_tokens}")
        if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(ids):
            raise InputError("prefix blocks: offsets must start at 0 and end at the number of ids")
        if np.any(np.diff(offsets) < 0):
            raise InputError("prefix blocks: offsets must not decrease")
        if len(ids) and ids.min() < 0:
            raise InputError("prefix blocks: ids must not be negative")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> NDArray[np.int32]:
        """Ids of request `index`, in prompt order."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: NDArray[np.int64]) -> PrefixBlocks:
        """Rows `indices`, in that order; a row may be taken more than once."""
        lengths = np.diff(self.offsets)[indices]
        offsets = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # Position of every taken id: its row's start plus its place within the row.
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return PrefixBlocks(
            offsets, self.ids[np.repeat(self.offsets[indices], lengths) + within], self.block_tokens
        )


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests by column; a request's id is its index. Validated at construction.

    Columns given in other types (lists, int64) are converted once they are known to fit.

    Raises:
        InputError: columns differ in length, a length is not in 1 … 2³¹ − 1, a time is negative, not
            finite or before its predecessor's, or a class has no name.
    """

    prompt_tokens: NDArray[np.int32]  # [n], at least 1
    output_tokens: NDArray[np.int32]  # [n], at least 1
    arrival_s: NDArray[np.float64] | None = None  # [n], not decreasing; None: lengths only
    slo_class: NDArray[np.uint8] | None = None  # [n], index into slo_names; None: all of the first class
    slo_names: tuple[str, ...] = ("default",)
    prefix: PrefixBlocks | None = None
    notes: tuple[str, ...] = ()  # what was left out or estimated when it was read, one sentence each

    def __post_init__(self) -> None:
        prompt = _lengths("prompt_tokens", self.prompt_tokens)
        output = _lengths("output_tokens", self.output_tokens)
        if len(prompt) != len(output):
            raise InputError(f"workload: {len(prompt)} prompt lengths but {len(output)} output lengths")
        object.__setattr__(self, "prompt_tokens", prompt)
        object.__setattr__(self, "output_tokens", output)
        if self.arrival_s is not None:
            object.__setattr__(self, "arrival_s", _arrivals(self.arrival_s, len(prompt)))
        self._check_classes()
        if self.prefix is not None and len(self.prefix) != len(prompt):
            raise InputError(f"workload: {len(prompt)} requests but {len(self.prefix)} rows of prefix blocks")

    def _check_classes(self) -> None:
        names = self.slo_names
        if not 1 <= len(names) <= 256 or len(set(names)) != len(names) or not all(names):
            raise InputError("workload: SLO classes need 1 to 256 different names, none of them empty")
        if self.slo_class is None:
            return
        codes = np.asarray(self.slo_class)
        if codes.shape != self.prompt_tokens.shape or not np.issubdtype(codes.dtype, np.integer):
            raise InputError("workload: slo_class must hold one whole number for each request")
        if len(codes) and not 0 <= codes.min() <= codes.max() < len(names):
            raise InputError(f"workload: slo_class must index the {len(names)} names in slo_names")
        object.__setattr__(self, "slo_class", codes.astype(np.uint8, copy=False))

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens of all requests."""
        return int(self.prompt_tokens.sum(dtype=np.int64) + self.output_tokens.sum(dtype=np.int64))

    def head(self, n: int) -> Workload:
        """The first `n` requests, or all of them if there are fewer."""
        return self.take(np.arange(min(n, len(self))))

    def take(self, indices: ArrayLike) -> Workload:
        """Requests `indices`, in that order; their times must still not decrease."""
        index = np.asarray(indices, dtype=np.int64)
        return Workload(
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            arrival_s=None if self.arrival_s is None else self.arrival_s[index],
            slo_class=None if self.slo_class is None else self.slo_class[index],
            slo_names=self.slo_names,
            prefix=None if self.prefix is None else self.prefix.take(index),
            notes=self.notes,
        )

    def with_arrivals(self, arrival_s: ArrayLike | None) -> Workload:
        """The same requests with other times of arrival (seconds), or with none."""
        arrivals: Any = arrival_s  # converted and checked by the constructor
        return replace(self, arrival_s=arrivals)

    def until(self, duration_s: float) -> Workload:
        """The requests that arrive before `duration_s`.

        Raises:
            InputError: there are no times of arrival.
        """
        if self.arrival_s is None:
            raise InputError("workload: has no times of arrival to compare with duration_s")
        return self.head(int(np.searchsorted(self.arrival_s, duration_s, side="left")))


def _lengths(name: str, values: ArrayLike) -> NDArray[np.int32]:
    """Check a column of token counts and return it as int32."""
    column = np.asarray(values)
    if column.ndim != 1:
        raise InputError(f"workload: {name} must be one column, not {column.ndim}-dimensional")
    if len(column) == 0:
        return np.zeros(0, dtype=np.int32)
    if not np.issubdtype(column.dtype, np.integer):
        raise InputError(f"workload: {name} must be whole numbers, not {column.dtype}")
    wrong = (column < 1) | (column > MAX_TOKENS)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise InputError(
            f"workload: {name} of request {index} must be 1 to {MAX_TOKENS}, not {int(column[index])}"
        )
    return np.ascontiguousarray(column, dtype=np.int32)


def _arrivals(values: ArrayLike, n: int) -> NDArray[np.float64]:
    """Check a column of times and return it as float64."""
    try:
        column = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("workload: arrival_s must be numbers") from None
    if column.shape != (n,):
        raise InputError(f"workload: arrival_s must hold one time for each of the {n} requests")
    wrong = ~np.isfinite(column) | (column < 0.0)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise InputError(
            f"workload: arrival_s of request {index} must be finite and not negative, not {column[index]}"
        )
    if n and column.max() > MAX_TIME_S:
        index = int(np.argmax(column > MAX_TIME_S))
        raise InputError(
            f"workload: arrival_s of request {index} is {column[index]:.3g}; beyond {MAX_TIME_S:.0e} s "
            "times are too coarse to tell iterations apart"
        )
    back = np.diff(column) < 0.0
    if back.any():
        index = int(np.argmax(back)) + 1
        raise InputError(
            f"workload: arrival_s of request {index} ({column[index]}) is before that of request {index - 1} "
            f"({column[index - 1]}); times must not decrease"
        )
    return column
