"""Kernel times from a trained predictor; the roofline where it has no table.

Along the one size that grows during serving (tokens of a GEMM, context of attention, bytes of an
all-reduce) times are made non-decreasing: they are evaluated on a fixed ladder, each rung at least
as high as those before, and interpolated. So a value doesn't depend on what else was asked for. Where a
formula says that they may fall, as those of a GEMM do on a CPU, they are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profiler.estimate import BoolArray, Estimate, FloatArray, broadcast
from profiler.operators import OperatorModel
from profiler.predictor import Predictor
from profiler.roofline_kernels import RooflineKernels
from profiler.tables import COLUMNS
from profiler.work import KINDS
from specs.devices import DeviceSpec

MAX_CONTEXT = 2**25  # 33M tokens; beyond it times follow the last rung's slope


def _token_rungs() -> FloatArray:
    """Sizes of m at and just past the edges of GEMM tiles, where times jump."""
    edges = [
        *range(8, 64, 8),
        *range(64, 1024, 64),
        *range(1024, 4096, 128),
        *range(4096, 16384, 512),
        *(int(16384 * 2 ** (i / 4)) for i in range(33)),
    ]
    return np.unique(np.array([1, 2, 4, *edges, *(edge + 1 for edge in edges)], dtype=np.float64))


def _geometric_rungs(first: float, last: float, per_octave: int) -> FloatArray:
    count = int(np.ceil(np.log2(last / first) * per_octave)) + 1
    return np.asarray(first * 2.0 ** (np.arange(count) / per_octave))


_TOKENS = _token_rungs()
_CONTEXT = np.concatenate([[0.0], _geometric_rungs(16.0, MAX_CONTEXT, 3)])
_KEYS = _geometric_rungs(1.0, MAX_CONTEXT, 3)
_BYTES = _geometric_rungs(1.0, 2.0**36, 4)


class TrainedKernels(RooflineKernels):
    """Predictions of a profile's operators.

    Operators and dtypes that the profile has no table for come from the roofline, and their
    estimates say so in `source`.
    """

    def __init__(
        self,
        device: DeviceSpec,
        predictor: Predictor,
        *,
        source: str,
        weight_dtype: str = "bf16",
        kv_dtype: str = "bf16",
    ) -> None:
        super().__init__(device, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
        self._source = source
        self._models: dict[str, OperatorModel] = {}
        self._intervals: dict[str, tuple[float, float]] = {}
        for operator in COLUMNS:
            key = _table(predictor, operator, weight_dtype, kv_dtype)
            if key in predictor.operators:
                self._models[operator] = predictor.operators[key]
                low, _, high = predictor.residuals[key]
                self._intervals[operator] = (low, high)
        self.host, self.layer, self.serving = predictor.host, predictor.layer, predictor.serving
        self.stage_gap = predictor.stage_gap
        self.kinds = frozenset(self._models)
        self.steps_may_fall = "gemm" in self._models and self._models["gemm"].physics.may_fall
        # Published benchmarks of attention store the new keys in the same call.
        self.attention_includes_kv_write = source == "imported" and {
            "prefill_attention",
            "decode_attention",
        } <= set(self._models)

    @property
    def intervals(self) -> Mapping[str, tuple[float, float]]:
        return self._intervals

    def gemm(self, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Estimate:
        if (model := self._models.get("gemm")) is None:
            return super().gemm(m, n, k)
        m, n, k = broadcast(m, n, k)
        if not model.physics.may_fall:
            return self._climb(model, {"n": n, "k": k}, "m", m, _TOKENS)
        found = model.predict({"m": m.ravel(), "n": n.ravel(), "k": k.ravel()})
        return self._estimate_of("gemm", m.shape, found.time_s, found.floor_s, found.extrapolated)

    def shard_attention(
        self, chunk: ArrayLike, context: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike, head_dim: ArrayLike
    ) -> Estimate:
        if (model := self._models.get("shard_attention")) is None:
            return super().shard_attention(chunk, context, heads, kv_heads, head_dim)
        chunk, context, heads, kv_heads, head_dim = broadcast(chunk, context, heads, kv_heads, head_dim)
        fixed = {"chunk": chunk, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        return self._climb(model, fixed, "context", context, _CONTEXT)

    def elementwise(
        self, num_bytes: ArrayLike, *, kind: str = "", rows: ArrayLike = 1.0, shards: ArrayLike = 2.0
    ) -> Estimate:
        if (model := self._models.get(kind)) is None:
            return super().elementwise(num_bytes, kind=kind, rows=rows, shards=shards)
        num_bytes, rows, shards = broadcast(num_bytes, rows, shards)
        shape = {"num_bytes": num_bytes.ravel(), "rows": rows.ravel(), "shards": shards.ravel()}
        found = model.predict({name: shape[name] for name in model.physics.columns})
        return self._estimate_of(kind, rows.shape, found.time_s, found.floor_s, found.extrapolated)

    def all_gather(self, num_bytes: ArrayLike, ranks: ArrayLike) -> Estimate:
        model = self._models.get("all_gather")
        num_bytes, ranks = broadcast(num_bytes, ranks)
        if model is None or np.any((ranks < 2) | (ranks > self.device.gpus_per_node)):
            return super().all_gather(num_bytes, ranks)
        return self._climb(model, {"ranks": ranks}, "num_bytes", num_bytes, _BYTES)

    def send_recv(self, num_bytes: ArrayLike, inter_node: bool) -> Estimate:
        if inter_node or (model := self._models.get("send_recv")) is None:
            return super().send_recv(num_bytes, inter_node)
        (num_bytes,) = broadcast(num_bytes)
        return self._climb(model, {}, "num_bytes", num_bytes, _BYTES)

    def prefill_attention(
        self, chunk: ArrayLike, context: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike, head_dim: ArrayLike
    ) -> Estimate:
        if (model := self._models.get("prefill_attention")) is None:
            return super().prefill_attention(chunk, context, heads, kv_heads, head_dim)
        batch, chunk, context, heads, kv_heads, head_dim = broadcast(
            1.0, chunk, context, heads, kv_heads, head_dim
        )
        fixed = {"batch": batch, "chunk": chunk, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        return self._climb(model, fixed, "context", context, _CONTEXT)

    def decode_attention(
        self,
        batch: ArrayLike,
        total_context: ArrayLike,
        heads: ArrayLike,
        kv_heads: ArrayLike,
        head_dim: ArrayLike,
    ) -> Estimate:
        if (model := self._models.get("decode_attention")) is None:
            return super().decode_attention(batch, total_context, heads, kv_heads, head_dim)
        batch, total_context, heads, kv_heads, head_dim = broadcast(
            batch, total_context, heads, kv_heads, head_dim
        )
        fixed = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        return self._climb(model, fixed, "total_context", total_context, _KEYS, scale="batch")

    def all_reduce(self, num_bytes: ArrayLike, ranks: ArrayLike) -> Estimate:
        model = self._models.get("all_reduce")
        num_bytes, ranks = broadcast(num_bytes, ranks)
        # The tables hold 2, 4 and 8 ranks of one node; between those the formula interpolates.
        if model is None or np.any((ranks < 2) | (ranks > self.device.gpus_per_node)):
            return super().all_reduce(num_bytes, ranks)
        return self._climb(model, {"ranks": ranks}, "num_bytes", num_bytes, _BYTES)

    def _climb(
        self,
        model: OperatorModel,
        fixed: dict[str, FloatArray],
        name: str,
        size: FloatArray,
        rungs: FloatArray,
        scale: str | None = None,
    ) -> Estimate:
        """Times that don't fall as `size` grows, for each combination of the fixed columns.

        With `scale`, the rungs are in units of that column (context per request of a batch).
        """
        if (block := model.physics.size_block) > 1:
            # In serving hardly a size fills the last block: rungs that do are too low for those between.
            rungs = rungs + ((rungs > 0) & (rungs % block == 0))
        flat = {column: values.ravel() for column, values in fixed.items()}
        combination, first = _combinations(list(flat.values()), size.size)
        unit = flat[scale] if scale else np.ones(size.size)
        at_rungs = {column: np.repeat(values[first], len(rungs)) for column, values in flat.items()}
        at_rungs[name] = (unit[first, None] * rungs).ravel()
        ladder = model.predict(at_rungs).time_s.reshape(len(first), len(rungs))
        ladder = np.maximum.accumulate(ladder, axis=1)

        here = {**flat, name: size.ravel()}
        time_s = _interpolate(ladder, rungs, combination, here[name] / unit)
        floor_s, extrapolated = model.physics.floor_s(here), model.is_extrapolated(here)
        return self._estimate_of(model.physics.operator, size.shape, time_s, floor_s, extrapolated)

    def _estimate_of(
        self,
        operator: str,
        shape: tuple[int, ...],
        time_s: FloatArray,
        floor_s: FloatArray,
        extrapolated: BoolArray,
    ) -> Estimate:
        time_s = np.maximum(time_s * self._factor(operator), floor_s)
        return Estimate(
            time_s.reshape(shape),
            floor_s.reshape(shape),
            extrapolated.reshape(shape),
            self._source,
            self._intervals[operator],
            operator,
        )


def _table(predictor: Predictor, operator: str, weight_dtype: str, kv_dtype: str) -> str:
    """Which table serves an operator."""
    if operator in ("all_reduce", "all_gather", "send_recv"):
        # Bytes are bytes: whichever type they were measured in.
        return next((key for key in predictor.operators if key.rpartition("_")[0] == operator), "")
    dtype = kv_dtype if operator.endswith("attention") else weight_dtype
    if operator in KINDS and dtype == "fp8":
        dtype = "bf16"  # activations are
    # fp16 kernels are those of bf16: same width, same rate.
    return f"{operator}_{'bf16' if dtype == 'fp16' else dtype}"


def _combinations(columns: list[FloatArray], size: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For each row the index of its combination of values, and for each combination its first row."""
    code = np.zeros(size, dtype=np.int64)
    for column in columns:
        values, index = np.unique(column, return_inverse=True)
        code = code * len(values) + index
    _, first, combination = np.unique(code, return_index=True, return_inverse=True)
    return combination, first


def _interpolate(
    ladder: FloatArray, rungs: FloatArray, row: NDArray[np.intp], size: FloatArray
) -> FloatArray:
    """Piecewise linear in each row of the ladder; the last piece goes on beyond the end."""
    lower = np.clip(np.searchsorted(rungs, size, side="right") - 1, 0, len(rungs) - 2)
    start, end = ladder[row, lower], ladder[row, lower + 1]
    fraction = (size - rungs[lower]) / (rungs[lower + 1] - rungs[lower])
    return np.asarray(start + np.maximum(fraction, 0.0) * (end - start))
