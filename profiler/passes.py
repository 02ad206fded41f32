"""Attention and the rest of a layer, taken apart from times of whole forward passes.

A table of passes has prefills (so many requests of equally many new tokens, each behind equally much context)
and decodes. What a pass takes more behind a longer context is attention; what is left goes by tokens. Of the
prefills only those of a single request are used: with several, in the tables that are known, the host made
the device wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiler.estimate import BoolArray, FloatArray
from profiler.ladders import Curve, Ladder
from profiler.tables import Table
from specs.devices import DeviceSpec
from specs.errors import InputError
from specs.models import DTYPE_BYTES, ModelSpec


@dataclass(frozen=True, slots=True)
class _Parts:
    """Of one degree of tensor parallelism, seconds of all layers."""

    rest: Curve  # by tokens
    chunks: Ladder  # attention of a chunk, by its tokens and its context
    decodes: Ladder  # attention of decodes, by their number and mean context


def linear_floor_s(
    model: ModelSpec, device: DeviceSpec, weight_dtype: str, tp: int, tokens: FloatArray
) -> FloatArray:
    """Seconds below which all linear layers together can't be: their FLOP, and their weights read once."""
    flops = model.linear_flops_per_token() / tp * tokens
    weights = model.linear_flops_per_token() / 2.0 / tp * DTYPE_BYTES[weight_dtype]
    return np.maximum(
        flops / device.peak_flops_for(weight_dtype), weights / device.memory_bandwidth_bytes_per_s
    )


class ForwardPasses:
    """Seconds a layer, for each degree of tensor parallelism that the table has.

    Raises:
        InputError: the table has no prefill of a single request without context, or no decodes.
    """

    def __init__(self, model: ModelSpec, device: DeviceSpec, table: Table, weight_dtype: str) -> None:
        self._model, self._device = model, device
        self._weight_dtype = weight_dtype
        self._parts = {
            int(tp): _take_apart(table, table.shape["tp"] == tp) for tp in np.unique(table.shape["tp"])
        }

    def knows(self, heads: tuple[int, int, int]) -> bool:
        """Whether a rank with so many query heads, KV heads and elements a head was measured."""
        return self._tp(heads) in self._parts

    def rest_of_layer(self, tokens: FloatArray, tp: int) -> tuple[FloatArray, FloatArray, BoolArray]:
        """Seconds, their floor, and whether that is outside the table. The LM head and all else that happens
        once a pass is in it.

        Raises:
            InputError: the table has no such degree of tensor parallelism.
        """
        if tp not in self._parts:
            known = ", ".join(map(str, self._parts))
            raise InputError(f"parallel.tp: the table of passes has {known}, not {tp}")
        rest, layers = self._parts[tp].rest, self._model.num_layers
        floor_s = linear_floor_s(self._model, self._device, self._weight_dtype, tp, tokens)
        return rest.at(tokens) / layers, floor_s / layers, tokens > rest.largest

    def prefill_attention(
        self, heads: tuple[int, int, int], chunk: FloatArray, context: FloatArray
    ) -> tuple[FloatArray, BoolArray]:
        """Seconds of one layer, and whether that is outside the table."""
        ladder = self._parts[self._tp(heads)].chunks
        over = np.maximum(chunk - ladder.highest, 0.0)
        time_s = ladder.at(chunk, context + over / 2.0) / self._model.num_layers
        return time_s, (chunk > ladder.highest) | (context > ladder.largest)

    def decode_attention(
        self, heads: tuple[int, int, int], batch: FloatArray, total_context: FloatArray
    ) -> tuple[FloatArray, BoolArray]:
        """Seconds of one layer, and whether that is outside the table."""
        ladder = self._parts[self._tp(heads)].decodes
        mean = total_context / batch
        time_s = ladder.at(batch, mean) / self._model.num_layers
        return time_s, (batch > ladder.highest) | (mean > ladder.largest)

    def _tp(self, heads: tuple[int, int, int]) -> int:
        return self._model.num_heads // heads[0]


def _take_apart(table: Table, mine: BoolArray) -> _Parts:
    requests, tokens, context, decode = (
        table.shape[name][mine] for name in ("requests", "new_tokens", "context", "decode")
    )
    time_s = table.time_s[mine]
    lone = (decode == 0) & (requests == 1)
    fresh = lone & (context == 0)
    starts: dict[float, float] = dict(zip(tokens[fresh].tolist(), time_s[fresh].tolist(), strict=True))
    steps = decode == 1
    if not starts or not steps.any():
        raise InputError("a table of passes needs prefills of one request without context, and decodes")
    chunks = _chunk_ladder(starts, tokens[lone], context[lone], time_s[lone])
    first = {
        count: float(time_s[steps & (requests == count)][context[steps & (requests == count)].argmin()])
        for count in np.unique(requests[steps])
    }
    base_s = np.array([first[count] for count in requests[steps]])
    decodes = Ladder(requests[steps], context[steps], np.maximum(time_s[steps] - base_s, 0.0))
    own_s = chunks.at(tokens[fresh], np.zeros(int(fresh.sum())))
    sizes = np.concatenate([np.array(list(first)), tokens[fresh]])
    found_s = np.concatenate([np.array(list(first.values())), time_s[fresh] - own_s])
    # Of a prefill and of decodes with as many tokens the quicker: the other waited for the host.
    distinct = np.unique(sizes)
    least_s = np.array([found_s[sizes == size].min() for size in distinct])
    return _Parts(Curve(distinct, least_s), chunks, decodes)


def _chunk_ladder(
    starts: dict[float, float], tokens: FloatArray, context: FloatArray, time_s: FloatArray
) -> Ladder:
    """Attention of chunks: what a context adds; over itself, what half of the chunk as context does."""
    known = np.isin(tokens, np.array(list(starts)))
    tokens, context, time_s = tokens[known], context[known], time_s[known]
    added_s = np.maximum(time_s - np.array([starts[t] for t in tokens]), 0.0)
    by_context = Ladder(tokens, context, added_s)
    return Ladder(tokens, context, added_s + by_context.at(tokens, tokens / 2.0))
