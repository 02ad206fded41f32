"""What attention of a whole batch takes beyond its chunks and its decodes alone, for the event loop."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from profiler.estimate import FloatArray
from profiler.kernels import Kernels
from profiler.knots import geometric

_LONGEST = 1 << 20  # mean context of a decode; beyond, as there


class JointTable:
    """Chunks and decodes in one call: trilinear in the chunks' tokens, the number of decodes and their mean
    context. Unequal contexts: in proportion to their standard deviation. Seconds of all layers.

    Args:
        kernels: whose ``mixing_s`` and ``spread_s`` are asked, once.
        heads: query heads, KV heads and elements of a head, of one rank.
        layers: of the model.
        max_chunk, max_decodes: how far the table reaches.

    Attributes:
        is_known: whether the kernels know either of the two.
    """

    def __init__(
        self, kernels: Kernels, heads: tuple[int, int, int], layers: int, max_chunk: int, max_decodes: int
    ) -> None:
        chunks = geometric(16, max(max_chunk, 32), 3)
        decodes = np.concatenate([[0.0], geometric(1, max(max_decodes, 2), 2)])
        contexts = geometric(16, _LONGEST, 3)
        grid = np.meshgrid(chunks, decodes, contexts, indexing="ij")
        flat = [each.ravel() for each in grid]
        mixing_s = kernels.mixing_s(flat[0], np.maximum(flat[1], 1.0), flat[2], heads)
        alone_s, beside_s = (
            kernels.spread_s(np.maximum(decodes, 1.0), heads, mixed=mixed) for mixed in (False, True)
        )
        self.is_known = any(each is not None for each in (mixing_s, alone_s, beside_s))
        self._chunks: list[float] = chunks.tolist()
        self._decodes: list[float] = decodes.tolist()
        self._contexts: list[float] = contexts.tolist()
        known_s = np.zeros_like(flat[0]) if mixing_s is None else np.where(flat[1] > 0, mixing_s, 0.0)
        self._mixing_s: list[list[list[float]]] = (known_s * layers).reshape(grid[0].shape).tolist()
        self._alone_s, self._beside_s = (_of_layers(each, decodes, layers) for each in (alone_s, beside_s))

    def at(self, chunk_tokens: int, decodes: int, total_context: int, spread: float) -> float:
        """Seconds over all layers."""
        if decodes == 0 or not self.is_known:
            return 0.0
        j, v = _place(self._decodes, decodes)
        per_token = self._beside_s if chunk_tokens else self._alone_s
        spread_s = spread * (per_token[j] + v * (per_token[j + 1] - per_token[j]))
        if not chunk_tokens:
            return spread_s
        i, u = _place(self._chunks, chunk_tokens)
        k, w = _place(self._contexts, total_context / decodes)
        low, high = self._mixing_s[i], self._mixing_s[i + 1]
        at_low = _bilinear(low[j], low[j + 1], k, v, w)
        at_high = _bilinear(high[j], high[j + 1], k, v, w)
        return at_low + u * (at_high - at_low) + spread_s


def _of_layers(per_token_s: FloatArray | None, decodes: FloatArray, layers: int) -> list[float]:
    if per_token_s is None:
        return [0.0] * len(decodes)
    found: list[float] = (per_token_s * layers).tolist()
    return found


def _bilinear(one: list[float], other: list[float], k: int, v: float, w: float) -> float:
    first = one[k] + w * (one[k + 1] - one[k])
    second = other[k] + w * (other[k + 1] - other[k])
    return first + v * (second - first)


def _place(knots: list[float], x: float) -> tuple[int, float]:
    """The segment of ``x`` and where in it, within the knots."""
    x = min(max(x, knots[0]), knots[-1])
    i = min(bisect_right(knots, x) - 1, len(knots) - 2)
    return i, (x - knots[i]) / (knots[i + 1] - knots[i])
