"""What every batch held: its slices, one row each, and what can be told from them.

A slice is ``tokens`` consecutive tokens of one request, behind ``context`` tokens that are cached: a chunk of
its prefill, or the one token of a decode. ``home`` is the KVP group in which the request begins. With the
times at which batches end, slices tell when every token came out.
"""

from __future__ import annotations

import gzip
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SLICE_COLUMNS = ("batch", "request_id", "tokens", "context", "home")

Slice = tuple[int, int, int, int]
"""(request, tokens, context, home)"""


@dataclass(frozen=True, slots=True)
class Slices:
    """Columns of one entry a slice, batch after batch, in the order in which a batch holds them."""

    batch: IntArray
    request_id: IntArray
    tokens: IntArray
    context: IntArray
    home: IntArray

    def __len__(self) -> int:
        return len(self.batch)

    def of_batches(self) -> list[list[Slice]]:
        """The slices of each batch, from batch 0 on."""
        count = int(self.batch[-1]) + 1 if len(self) else 0
        borders = np.searchsorted(self.batch, np.arange(count + 1)).tolist()
        columns = (self.request_id, self.tokens, self.context, self.home)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        return [rows[borders[i] : borders[i + 1]] for i in range(count)]

    def yields_token(self, prompt_tokens: IntArray) -> NDArray[np.bool_]:
        """Whether each slice yields an output token; ``prompt_tokens`` is indexed by request id.

        It does if it reaches the end of the prompt or goes beyond, to where its request has not been before:
        what is computed again after a preemption yields nothing until it passes the last token.
        """
        result = np.zeros(len(self), dtype=bool)
        order = np.lexsort((self.batch, self.request_id))
        request = self.request_id[order]
        reached = (self.context + self.tokens)[order]
        # The running maximum within each request: requests lie in ranges of numbers that don't overlap.
        place = np.cumsum(np.diff(request, prepend=-1) != 0) * (np.int64(1) << 33) + reached
        before = np.concatenate([[-1], np.maximum.accumulate(place)[:-1]])
        result[order] = (place > before) & (reached >= prompt_tokens[request])
        return result

    def gaps(self, prompt_tokens: IntArray, end_s: FloatArray) -> FloatArray:
        """Times between two tokens of a request, in the form of ``RunRecords.gaps``.

        ``end_s`` is when each batch left the last stage, by its id; NaN if it never did.
        """
        chosen = self.yields_token(prompt_tokens) & np.isfinite(end_s[self.batch])
        request, at_s = self.request_id[chosen], end_s[self.batch[chosen]]
        order = np.lexsort((at_s, request))
        request, at_s = request[order], at_s[order]
        same = np.diff(request) == 0
        gaps: FloatArray = np.diff(at_s)[same]
        return np.stack([gaps, np.zeros_like(gaps), np.ones_like(gaps), np.ones_like(gaps)], axis=1)


class SliceLog:
    """Collects slices as batches are formed."""

    def __init__(self) -> None:
        self._values = array("q")

    def add(self, batch: int, slices: Iterable[Slice]) -> None:
        """A batch with its slices."""
        for each in slices:
            self._values.extend((batch, *each))

    def slices(self) -> Slices:
        """Everything so far."""
        rows = np.array(self._values, dtype=np.int64).reshape(-1, len(SLICE_COLUMNS))
        return Slices(*(rows[:, i].copy() for i in range(len(SLICE_COLUMNS))))


def write_slices_csv(slices: Slices, path: Path) -> None:
    """Write a gzip CSV with the columns of ``SLICE_COLUMNS``; the same slices give the same bytes."""
    columns = [getattr(slices, name).tolist() for name in SLICE_COLUMNS]
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        lines = [",".join(SLICE_COLUMNS)]
        lines += [",".join(map(str, row)) for row in zip(*columns, strict=True)]
        packed.write(("\n".join(lines) + "\n").encode("ascii"))
