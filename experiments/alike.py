"""Rows that are alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def alike(keys: NDArray[np.int64]) -> Iterator[tuple[tuple[int, ...], NDArray[np.int64]]]:
    """The different rows of ``keys`` [n, any], each with the places at which it is."""
    found, group = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(group.ravel(), minlength=len(found)))
    for key, places in zip(found.tolist(), np.split(order, ends[:-1]), strict=True):
        yield tuple(key), places
