"""Random requests: lengths from a distribution, arrivals from a process, all from named random streams."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specs.errors import InputError
from traces.workload import MAX_TOKENS

Int32s = NDArray[np.int32]


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A random generator for one purpose ("lengths", "arrivals" …) of the run with this seed.

    Streams of different purposes are independent, so that drawing more from one changes no other.

    Raises:
        InputError: `seed` is negative or not a whole number.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed: must be a whole number of at least 0, not {reprlib.repr(seed)}")
    # Not hash(): that differs from one process to the next.
    digest = hashlib.sha256(purpose.encode()).digest()
    return np.random.default_rng(np.random.SeedSequence([seed, int.from_bytes(digest[:16], "little")]))


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Arrivals by feedback: so many users, each sending its next request when the last one is answered."""

    concurrency: int
    think_time_s: float = 0.0  # between an answer and the user's next request
