"""Kernel times from the data sheet alone."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from profiler import between_nodes
from profiler.estimate import Estimate, FloatArray, broadcast
from profiler.formulas import make_physics
from profiler.overheads import HostOverhead, LayerCorrection, ServingOverhead
from profiler.physics import STREAM_EFFICIENCY, Physics, Shape, activation_element
from specs.devices import DeviceSpec
from specs.errors import InputError
from specs.models import DTYPE_BYTES

# What a factor can multiply: all of it, or attention beyond that.
_ON_SHEET = frozenset({"roofline", "prefill_attention", "decode_attention"})


class RooflineKernels:
    """Physics with default parameters: nothing was measured, everything counts as extrapolated.

    `weight_dtype` sets the bytes and the rate of GEMMs, `kv_dtype` those of the KV cache.

    Raises:
        InputError: unknown dtype, or one the device can't compute in.
    """

    def __init__(
        self,
        device: DeviceSpec,
        *,
        weight_dtype: str = "bf16",
        kv_dtype: str = "bf16",
        passed_over: tuple[str, ...] = (),
    ) -> None:
        for key, dtype in (("weight_dtype", weight_dtype), ("kv_dtype", kv_dtype)):
            if dtype not in DTYPE_BYTES:
                raise InputError(f"{key}: {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        self.device = device
        self._gemm = make_physics(device, "gemm", weight_dtype)
        self._prefill = make_physics(device, "prefill_attention", kv_dtype)
        self._decode = make_physics(device, "decode_attention", kv_dtype)
        self._shard = make_physics(device, "shard_attention", kv_dtype)
        self._all_reduce = make_physics(device, "all_reduce", weight_dtype)
        self.activation_bytes = max(activation_element(weight_dtype), activation_element(kv_dtype))
        self.host: HostOverhead | None = None
        self.layer: LayerCorrection | None = None
        self.serving: ServingOverhead | None = None
        self.stage_gap: HostOverhead | None = None
        self.kinds: frozenset[str] = frozenset()
        self.attention_includes_kv_write = False
        self.steps_may_fall = False
        self.passed_over = passed_over
        self._factors: Mapping[str, float] = {}

    @property
    def operators(self) -> frozenset[str]:
        return self.kinds | _ON_SHEET

    @property
    def intervals(self) -> Mapping[str, tuple[float, float]]:
        return {}

    def perturbed(self, factors: Mapping[str, float]) -> Self:
        other = copy(self)
        more = {name: factor * self._factor(name) for name, factor in factors.items()}
        other._factors = {**self._factors, **more}
        return other

    def _factor(self, operator: str) -> float:
        """The product of all factors that an operator was given."""
        return self._factors.get(operator, 1.0)

    def gemm(self, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Estimate:
        m, n, k = broadcast(m, n, k)
        return self._estimate(self._gemm, {"m": m, "n": n, "k": k})

    def prefill_attention(
        self, chunk: ArrayLike, context: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike, head_dim: ArrayLike
    ) -> Estimate:
        names = ("batch", "chunk", "context", "heads", "kv_heads", "head_dim")
        arrays = broadcast(1.0, chunk, context, heads, kv_heads, head_dim)
        return self._estimate(self._prefill, dict(zip(names, arrays, strict=True)))

    def decode_attention(
        self,
        batch: ArrayLike,
        total_context: ArrayLike,
        heads: ArrayLike,
        kv_heads: ArrayLike,
        head_dim: ArrayLike,
    ) -> Estimate:
        names = ("batch", "total_context", "heads", "kv_heads", "head_dim")
        arrays = broadcast(batch, total_context, heads, kv_heads, head_dim)
        return self._estimate(self._decode, dict(zip(names, arrays, strict=True)))

    def shard_attention(
        self, chunk: ArrayLike, context: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike, head_dim: ArrayLike
    ) -> Estimate:
        names = ("chunk", "context", "heads", "kv_heads", "head_dim")
        arrays = broadcast(chunk, context, heads, kv_heads, head_dim)
        return self._estimate(self._shard, dict(zip(names, arrays, strict=True)))

    def elementwise(
        self, num_bytes: ArrayLike, *, kind: str = "", rows: ArrayLike = 1.0, shards: ArrayLike = 2.0
    ) -> Estimate:
        num_bytes, _ = broadcast(num_bytes, rows)
        floor_s = num_bytes / self.device.memory_bandwidth_bytes_per_s
        return self._roofline(self.device.kernel_launch_s + floor_s / STREAM_EFFICIENCY, floor_s)

    def all_reduce(self, num_bytes: ArrayLike, ranks: ArrayLike) -> Estimate:
        num_bytes, ranks = broadcast(num_bytes, ranks)
        if np.any(ranks > self.device.gpus_per_node):
            device = self.device
            return self._roofline(
                between_nodes.all_reduce_s(num_bytes, ranks, device),
                between_nodes.floor_s(num_bytes, ranks, device),
            )
        estimate = self._estimate(self._all_reduce, {"num_bytes": num_bytes, "ranks": ranks})
        alone = ranks <= 1
        return Estimate(
            np.where(alone, 0.0, estimate.time_s),
            np.where(alone, 0.0, estimate.floor_s),
            estimate.extrapolated & ~alone,
            estimate.source,
        )

    def all_gather(self, num_bytes: ArrayLike, ranks: ArrayLike) -> Estimate:
        num_bytes, ranks = broadcast(num_bytes, ranks)
        return self.send_recv(num_bytes * (ranks - 1.0), inter_node=False)

    def send_recv(self, num_bytes: ArrayLike, inter_node: bool) -> Estimate:
        (num_bytes,) = broadcast(num_bytes)
        link = self.device.inter_node if inter_node else self.device.intra_node
        floor_s = num_bytes / link.bandwidth_bytes_per_s
        if inter_node and self.device.send_recv is not None:
            link = self.device.send_recv
        return self._roofline(link.latency_s + num_bytes / link.bandwidth_bytes_per_s, floor_s)

    def rest_of_layer(self, tokens: FloatArray, tp: int) -> Estimate | None:
        return None

    def mixing_s(
        self, chunk: FloatArray, decodes: FloatArray, mean_context: FloatArray, heads: tuple[int, int, int]
    ) -> FloatArray | None:
        return None

    def spread_s(self, decodes: FloatArray, heads: tuple[int, int, int], *, mixed: bool) -> FloatArray | None:
        return None

    def _estimate(self, physics: Physics, shape: Shape) -> Estimate:
        time_s, floor_s = physics.time_s(shape, physics.defaults()), physics.floor_s(shape)
        operator = physics.operator
        # The factor of an operator with a table is on the table's times.
        return self._roofline(time_s * (1.0 if operator in self.kinds else self._factor(operator)), floor_s)

    def _roofline(self, time_s: FloatArray, floor_s: FloatArray) -> Estimate:
        time_s = np.maximum(time_s * self._factor("roofline"), floor_s)
        return Estimate(time_s, floor_s, np.ones(floor_s.shape, dtype=np.bool_), "roofline")
