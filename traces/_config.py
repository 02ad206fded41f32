"""Typed access to the mappings that describe a workload; every error names the dotted key."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specs.errors import InputError, did_you_mean
from traces.workload import MAX_TOKENS


def get(spec: Mapping[str, Any], key: str, where: str) -> Any:
    """The value under `key`, which must be there."""
    if not isinstance(spec, Mapping):
        raise InputError(f"{where}: must be a mapping, not {reprlib.repr(spec)}")
    if spec.get(key) is None:
        raise InputError(f"{where}.{key}: is missing")
    return spec[key]


def refuse_unknown(spec: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise unless every key of `spec` is one of `known`."""
    known = list(known)
    for key in spec:
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; possible are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {reprlib.repr(key)}{hint}")


def mapping(
    value: Any, required: Sequence[str], optional: Sequence[str] | None, where: str
) -> dict[str, Any]:
    """A copy of a mapping that has the required keys and, if `optional` is given, no others than those."""
    if not isinstance(value, Mapping):
        keys = ", ".join(required)
        raise InputError(f"{where}: must be a mapping with {keys}, not {reprlib.repr(value)}")
    if optional is not None:
        refuse_unknown(value, (*required, *optional), where)
    for key in required:
        get(value, key, where)
    return {key: entry for key, entry in value.items() if entry is not None}


def choice(spec: Mapping[str, Any], key: str, known: Sequence[str], where: str) -> str:
    """The value under `key`, which must be one of `known`."""
    value = get(spec, key, where)
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise InputError(f"{where}.{key}: {reprlib.repr(value)} is none of {', '.join(known)}{hint}")
    return str(value)


def whole(value: Any, where: str, *, at_most: int = MAX_TOKENS) -> int:
    """A whole number from 1 to `at_most`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= at_most or value != int(value):
        raise InputError(f"{where}: must be a whole number from 1 to {at_most}, not {reprlib.repr(value)}")
    return int(value)


def number(value: Any, where: str, *, above: float | None = None) -> float:
    """A finite number that is not negative, or, if given, that is greater than `above`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0.0 or (above is not None and value <= above):
        right = "not negative" if above is None else f"above {above:g}"
        raise InputError(f"{where}: must be a finite number, {right}, not {reprlib.repr(value)}")
    return float(value)


def text(value: Any, where: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: must be text, not {reprlib.repr(value)}")
    return value


def ordered(low: int, high: int, where: str) -> None:
    """Raise unless low ≤ high."""
    if low > high:
        raise InputError(f"{where}: the lower bound {low} is above the upper bound {high}")


def token_list(value: Any, where: str) -> NDArray[np.int32]:
    """A list of token counts."""
    if isinstance(value, np.ndarray) and value.dtype == np.int32:
        return value  # a trace's column, checked when it was read
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{where}: must be a list of at least one token count, not {reprlib.repr(value)}")
    return np.array([whole(entry, f"{where}[{index}]") for index, entry in enumerate(value)], dtype=np.int32)


def weights(value: Any, n: int, where: str) -> NDArray[np.float64]:
    """`n` weights, as probabilities."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != n:
        raise InputError(f"{where}: must be a list of {n} weights, not {reprlib.repr(value)}")
    column = np.array([number(entry, f"{where}[{index}]") for index, entry in enumerate(value)])
    total = float(column.sum())
    if not 0.0 < total < math.inf:
        raise InputError(f"{where}: must add up to more than 0")
    return column / total
