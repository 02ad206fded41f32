"""Kernel times looked up in the tables of one model: interpolated, without a trained predictor.

A profile with `predictor: lookup` holds tables of the very shapes that a model has under some degrees of
tensor parallelism, dense enough to be read off. Two forms are known: operator by operator, with attention of
whole batches; and whole forward passes (`profiler.passes`). What they don't hold comes from the roofline.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from profiler.coverage import entry_model
from profiler.estimate import BoolArray, Estimate, FloatArray, broadcast
from profiler.ladders import Curve, Ladder
from profiler.mixed_tables import Mixing, Spread, chunk_attention_s
from profiler.passes import ForwardPasses
from profiler.roofline_kernels import RooflineKernels
from profiler.tables import Profile, Table, read_table
from profiler.work import KINDS
from specs.devices import DeviceSpec

_SAME_WIDTH = 0.02  # bytes a row may differ by, relative
Heads = tuple[int, int, int]  # query heads, KV heads, elements of a head, of one rank


class LookupKernels(RooflineKernels):
    """Times of a profile's tables, and of the roofline where it has none."""

    def __init__(
        self, device: DeviceSpec, profile: Profile, *, weight_dtype: str = "bf16", kv_dtype: str = "bf16"
    ) -> None:
        super().__init__(device, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
        self._source = profile.source
        tables = {
            info.operator: read_table(profile, info)
            for info in profile.tables
            if info.dtype == (kv_dtype if "attention" in info.operator else weight_dtype)
        }
        self._gemms = _by_shape(tables.get("gemm"), ("n", "k"), "m")
        self._elementwise = {
            kind: _by_width(tables[kind]) for kind in (*KINDS, "all_reduce") if kind in tables
        }
        self._prefill_ladders = _ladders(tables.get("prefill_attention"), "chunk", "context")
        self._decode_ladders = _ladders(tables.get("decode_attention"), "batch", "total_context")
        self._mixing: dict[Heads, Mixing] = {}
        self._spread: dict[tuple[Heads, bool], Spread] = {}
        for key in self._prefill_ladders.keys() & self._decode_ladders.keys():
            self._learn_joint(key, tables.get("mixed_attention"), tables.get("uneven_attention"))
        self._passes: ForwardPasses | None = None
        if "forward_pass" in tables:
            model = entry_model(profile.model, str(profile.path))
            self._passes = ForwardPasses(model, device, tables["forward_pass"], weight_dtype)
        self.kinds = frozenset(tables)
        self.attention_includes_kv_write = self._passes is not None or bool(self._prefill_ladders)

    @property
    def operators(self) -> frozenset[str]:
        if self._passes is not None:
            return frozenset({"rest_of_layer", "prefill_attention", "decode_attention", "roofline"})
        return super().operators

    def gemm(self, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Estimate:
        m, n, k = broadcast(m, n, k)
        curve = self._gemms.get((_only(n), _only(k)))
        roofline = super().gemm(m, n, k)
        if curve is None:
            return roofline
        return self._found("gemm", curve.at(m), roofline.floor_s, m > curve.largest)

    def prefill_attention(
        self, chunk: ArrayLike, context: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike, head_dim: ArrayLike
    ) -> Estimate:
        roofline = super().prefill_attention(chunk, context, heads, kv_heads, head_dim)
        chunk, context, heads, kv_heads, head_dim = broadcast(chunk, context, heads, kv_heads, head_dim)
        key = (_only(heads), _only(kv_heads), _only(head_dim))
        if self._passes is not None and self._passes.knows(key):
            time_s, outside = self._passes.prefill_attention(key, chunk, context)
            return self._found("prefill_attention", time_s, roofline.floor_s, outside)
        if (ladder := self._prefill_ladders.get(key)) is None:
            return roofline
        time_s = chunk_attention_s(ladder, chunk, context)
        outside = (chunk > ladder.highest) | (context > ladder.largest)
        return self._found("prefill_attention", time_s, roofline.floor_s, outside)

    def decode_attention(
        self,
        batch: ArrayLike,
        total_context: ArrayLike,
        heads: ArrayLike,
        kv_heads: ArrayLike,
        head_dim: ArrayLike,
    ) -> Estimate:
        roofline = super().decode_attention(batch, total_context, heads, kv_heads, head_dim)
        batch, total, heads, kv_heads, head_dim = broadcast(batch, total_context, heads, kv_heads, head_dim)
        key = (_only(heads), _only(kv_heads), _only(head_dim))
        if self._passes is not None and self._passes.knows(key):
            time_s, outside = self._passes.decode_attention(key, batch, total)
            return self._found("decode_attention", time_s, roofline.floor_s, outside)
        if (ladder := self._decode_ladders.get(key)) is None:
            return roofline
        time_s = ladder.at(batch, total / batch)
        outside = (batch > ladder.highest) | (total / batch > ladder.largest)
        return self._found("decode_attention", time_s, roofline.floor_s, outside)

    def elementwise(
        self, num_bytes: ArrayLike, *, kind: str = "", rows: ArrayLike = 1.0, shards: ArrayLike = 2.0
    ) -> Estimate:
        num_bytes, rows, shards = broadcast(num_bytes, rows, shards)
        roofline = super().elementwise(num_bytes, kind=kind, rows=rows, shards=shards)
        per_row = float((num_bytes / rows).ravel()[0])
        for width, curve in self._elementwise.get(kind, {}).items():
            if abs(per_row / width - 1.0) < _SAME_WIDTH:
                return self._found(kind, curve.at(rows), roofline.floor_s, rows > curve.largest)
        return roofline

    def rest_of_layer(self, tokens: FloatArray, tp: int) -> Estimate | None:
        if self._passes is None:
            return None
        time_s, floor_s, outside = self._passes.rest_of_layer(tokens, tp)
        return self._found("rest_of_layer", time_s, floor_s, outside)

    def mixing_s(
        self, chunk: FloatArray, decodes: FloatArray, mean_context: FloatArray, heads: Heads
    ) -> FloatArray | None:
        if (found := self._mixing.get(heads)) is None:
            return None
        return found.at(chunk, decodes, mean_context) * self._factor("mixed_attention")

    def spread_s(self, decodes: FloatArray, heads: Heads, *, mixed: bool) -> FloatArray | None:
        found = self._spread.get((heads, mixed))
        return None if found is None else found.at(decodes) * self._factor("uneven_attention")

    def _learn_joint(self, key: Heads, mixed: Table | None, uneven: Table | None) -> None:
        """Attention of whole batches, for one number of heads."""
        alone = self._prefill_ladders[key], self._decode_ladders[key]
        if mixed is not None and _has_heads(mixed, key).any():
            self._mixing[key] = Mixing(_of(mixed, key), *alone)
        if uneven is not None and _has_heads(uneven, key).any():
            for beside in (False, True):
                found = Spread(_of(uneven, key), *alone, self._mixing.get(key), mixed=beside)
                self._spread[key, beside] = found

    def _found(self, operator: str, time_s: FloatArray, floor_s: FloatArray, outside: BoolArray) -> Estimate:
        time_s = np.maximum(time_s * self._factor(operator), floor_s)
        return Estimate(time_s, floor_s, outside, self._source, None, operator)


def _only(values: FloatArray) -> int:
    return int(values.ravel()[0])


def _by_shape(table: Table | None, names: tuple[str, str], size: str) -> dict[tuple[int, int], Curve]:
    if table is None:
        return {}
    one, other = (table.shape[name] for name in names)
    found = {}
    for key in sorted({(int(a), int(b)) for a, b in zip(one, other, strict=True)}):
        mine = (one == key[0]) & (other == key[1])
        found[key] = Curve(table.shape[size][mine], table.time_s[mine])
    return found


def _by_width(table: Table) -> dict[float, Curve]:
    per_row = np.round(table.shape["num_bytes"] / table.shape["rows"])
    return {
        float(each): Curve(table.shape["rows"][per_row == each], table.time_s[per_row == each])
        for each in np.unique(per_row)
    }


def _ladders(table: Table | None, height: str, size: str) -> dict[Heads, Ladder]:
    """A ladder for each number of heads; decodes go by their mean context."""
    if table is None:
        return {}
    shape = table.shape
    sizes = shape[size] / shape["batch"] if size == "total_context" else shape[size]
    found = {}
    for key in _heads_of(table):
        mine = _has_heads(table, key)
        found[key] = Ladder(shape[height][mine], sizes[mine], table.time_s[mine])
    return found


def _heads_of(table: Table) -> list[Heads]:
    columns = zip(*(table.shape[name] for name in ("heads", "kv_heads", "head_dim")), strict=True)
    return sorted({(int(a), int(b), int(c)) for a, b, c in columns})


def _has_heads(table: Table, key: Heads) -> BoolArray:
    names = ("heads", "kv_heads", "head_dim")
    return np.asarray(
        np.logical_and.reduce([table.shape[name] == value for name, value in zip(names, key, strict=True)])
    )


def _of(table: Table, key: Heads) -> Table:
    """The rows of one number of heads."""
    mine = _has_heads(table, key)
    return Table({name: column[mine] for name, column in table.shape.items()}, table.time_s[mine])
