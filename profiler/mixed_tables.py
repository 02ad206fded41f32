"""Attention of mixed and of uneven batches, from tables of such batches."""

from __future__ import annotations

import numpy as np

from profiler.estimate import FloatArray, broadcast
from profiler.ladders import Ladder
from profiler.tables import Table

_LEAST_SPREAD = 0.2  # of the mean context: below, the difference is noise
_LEAST_CONTEXT = 256  # tokens on average: below, a kernel takes its shortest time


def chunk_attention_s(ladder: Ladder, chunk: FloatArray, context: FloatArray) -> FloatArray:
    """Attention of chunks; one beyond the longest that was measured is that one, as often as it goes into
    it, behind the context that leaves its queries as many keys on average."""
    over = np.maximum(chunk - ladder.highest, 0.0)
    return ladder.at(chunk, context + over / 2.0)


class Mixing:
    """What attention of a mixed batch takes beyond that of its chunk and of its decodes alone.

    The mean over the contexts of the chunk that were measured: it changes little with them.

    Args:
        table: of mixed batches, for one number of heads.
        prefill, decode: each alone.
    """

    def __init__(self, table: Table, prefill: Ladder, decode: Ladder) -> None:
        chunk, context, decodes, total = (
            table.shape[name] for name in ("chunk", "context", "decodes", "decode_context")
        )
        mean = total / decodes
        extra_s = table.time_s - chunk_attention_s(prefill, chunk, context) - decode.at(decodes, mean)
        self._chunks = np.unique(chunk)
        self._planes = [
            _Plane(decodes[chunk == each], mean[chunk == each], extra_s[chunk == each])
            for each in self._chunks
        ]

    def at(self, chunk: FloatArray, decodes: FloatArray, mean: FloatArray) -> FloatArray:
        """Seconds a layer; as at the nearest measured chunk beyond their range."""
        chunk, decodes, mean = broadcast(chunk, decodes, mean)
        by_plane = np.stack([plane.at(decodes, mean) for plane in self._planes])
        return _between(by_plane, np.interp(chunk, self._chunks, np.arange(len(self._chunks))))


class _Plane:
    """Bilinear in decodes and their mean context; zero at no decode, in proportion beyond the last."""

    def __init__(self, decodes: FloatArray, mean: FloatArray, extra_s: FloatArray) -> None:
        self._decodes = np.unique(decodes)
        self._rows = []
        for each in self._decodes:
            mine = decodes == each
            contexts = np.unique(mean[mine])
            values = np.array([extra_s[mine][mean[mine] == context].mean() for context in contexts])
            self._rows.append((contexts, values))

    def at(self, decodes: FloatArray, mean: FloatArray) -> FloatArray:
        rows = [np.zeros_like(mean)]
        for contexts, values in self._rows:
            beyond = np.maximum(mean / contexts[-1], 1.0)
            rows.append(np.interp(mean, contexts, values) * beyond)
        knots = np.concatenate([[0.0], self._decodes])
        inside_s = _between(np.stack(rows), np.interp(decodes, knots, np.arange(len(knots))))
        return np.asarray(inside_s * np.maximum(decodes / self._decodes[-1], 1.0))


def _between(rows: FloatArray, place: FloatArray) -> FloatArray:
    """For each column of ``rows`` the value at a row that may lie between two."""
    lower = np.clip(place.astype(np.int64), 0, max(len(rows) - 2, 0))
    upper = np.minimum(lower + 1, len(rows) - 1)
    low = np.take_along_axis(rows, lower[None], 0)[0]
    high = np.take_along_axis(rows, upper[None], 0)[0]
    return np.asarray(low + (place - lower) * (high - low))


class Spread:
    """What decodes of unequal contexts take more, for each token of standard deviation.

    The table has batches with and without a spread about the same mean. What the spread adds is taken as a
    share of what the decodes take in that table, and that share of what they take in the others: the two were
    not measured alike. For each number of decodes the median over its rows.

    Args:
        table: of uneven batches, for one number of heads.
        prefill, decode: chunks and even decodes alone.
        mixing: what both take more in one batch; None if it isn't known.
        mixed: which rows: those with a chunk, or those without.
    """

    def __init__(
        self, table: Table, prefill: Ladder, decode: Ladder, mixing: Mixing | None, *, mixed: bool
    ) -> None:
        names = ("decodes", "chunk", "context", "mean_context")
        mine = (table.shape["chunk"] > 0) == mixed
        keys = np.stack([table.shape[name][mine] for name in names], axis=1)
        spread, time_s = table.shape["spread"][mine], table.time_s[mine]
        _, group = np.unique(keys, axis=0, return_inverse=True)
        group = group.ravel()
        even = spread == 0
        count = np.bincount(group, weights=even)
        even_s = np.bincount(group, weights=np.where(even, time_s, 0.0)) / np.maximum(count, 1.0)
        decodes, chunk, context, mean = keys.T
        alone_s = np.where(chunk > 0, chunk_attention_s(prefill, np.maximum(chunk, 1.0), context), 0.0)
        base_s = even_s[group] - alone_s
        use = ~even & (count[group] > 0) & (base_s > 0)
        use &= (spread >= _LEAST_SPREAD * mean) & (mean >= _LEAST_CONTEXT)
        here_s = decode.at(decodes, mean)
        if mixed and mixing is not None:
            here_s = here_s + mixing.at(chunk, decodes, mean)
        share = np.divide(time_s - even_s[group], base_s, out=np.zeros_like(base_s), where=use)
        per_token_s = np.divide(share * here_s, spread, out=np.zeros_like(base_s), where=use)
        self._decodes = np.unique(decodes[use])
        self._per_token_s = np.array(
            [max(float(np.median(per_token_s[use & (decodes == each)])), 0.0) for each in self._decodes]
        )

    def at(self, decodes: FloatArray) -> FloatArray:
        """Seconds a layer and token of standard deviation; none for a single decode."""
        if not len(self._decodes):
            return np.zeros_like(decodes)
        found_s = np.interp(decodes, self._decodes, self._per_token_s)
        return np.asarray(np.where(decodes > 1, found_s, 0.0))
