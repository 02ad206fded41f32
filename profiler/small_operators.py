"""Formulas of the operators that move bytes and compute next to nothing; and of a chunk on a KV shard."""

from __future__ import annotations

import numpy as np

from profiler.estimate import FloatArray
from profiler.physics import (
    STREAM_EFFICIENCY,
    Parameter,
    Parameters,
    Physics,
    Shape,
    log2_columns,
    soft_max,
)
from profiler.roofline import AllReduce, PrefillAttention
from specs.devices import DeviceSpec


def elementwise_columns(kind: str) -> tuple[str, ...]:
    """What the time of such an operator goes by."""
    return ("num_bytes", "rows", "shards") if kind == "kvp_merge" else ("num_bytes", "rows")


class Elementwise(Physics):
    """One kind of operator that moves `num_bytes` over `rows` rows.

    time = launch + rows · row_s + bytes ÷ (bandwidth · efficiency), and a few launches for each partial
    result that is merged beyond the first. Its inputs have just been computed, so
    as many bytes as the last-level cache holds set no floor.
    """

    growth_axis = 0
    family_axes: tuple[int, ...] = ()

    def __init__(self, device: DeviceSpec, kind: str) -> None:
        self.operator = kind
        self.columns = elementwise_columns(kind)
        self.device = device
        self.bandwidth = device.memory_bandwidth_bytes_per_s
        self.parameters = {
            "launch_s": Parameter(device.kernel_launch_s, 5e-7, 4e-4),
            "row_s": Parameter(1e-10, 1e-12, 1e-4),
            "bandwidth_efficiency": Parameter(STREAM_EFFICIENCY, 0.02, 20.0),
            "cached_efficiency": Parameter(2.0, 0.02, 40.0),
        }
        if "shards" in self.columns:
            self.parameters["step_s"] = Parameter(device.kernel_launch_s, 5e-7, 4e-4)

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        return np.zeros_like(shape["num_bytes"]), shape["num_bytes"]

    def floor_s(self, shape: Shape) -> FloatArray:
        return np.maximum(shape["num_bytes"] - self.device.l2_bytes, 0.0) / self.bandwidth

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        num_bytes = shape["num_bytes"]
        cached = np.minimum(num_bytes, self.device.l2_bytes / 2) / p["cached_efficiency"]
        beyond = np.maximum(num_bytes - self.device.l2_bytes / 2, 0.0) / p["bandwidth_efficiency"]
        time_s = p["launch_s"] + shape["rows"] * p["row_s"] + (cached + beyond) / self.bandwidth
        if "shards" in self.columns:
            time_s = time_s + (shape["shards"] - 1.0) * p["step_s"]
        return np.asarray(time_s)

    def features(self, shape: Shape) -> FloatArray:
        return log2_columns(*(shape[name] for name in self.columns))


class ShardAttention(PrefillAttention):
    """A chunk over the keys of a shard that holds none of its own: the prefix of `PrefillAttention` alone."""

    operator = "shard_attention"
    columns: tuple[str, ...] = ("chunk", "context", "heads", "kv_heads", "head_dim")
    growth_axis = 1
    family_axes: tuple[int, ...] = (4,)

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        pairs = shape["chunk"] * shape["context"]
        keys = 2.0 * self.element_bytes * shape["context"] * shape["kv_heads"] * shape["head_dim"]
        queries = 2.0 * self.activation_bytes * shape["chunk"] * shape["heads"] * shape["head_dim"]
        return 4.0 * pairs * shape["heads"] * shape["head_dim"], keys + queries

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        alone = {**shape, "batch": np.ones_like(shape["chunk"])}
        prefix, _ = self._prefix_and_own_s(alone, p)
        io = self.flop_and_bytes(shape)[1] / (self.bandwidth * p["io_efficiency"])
        tiles_s = p["tile_s"] * self.tiles(alone) / self.sms
        return p["launch_s"] + tiles_s + soft_max(prefix, io, p["overlap_power"])

    def features(self, shape: Shape) -> FloatArray:
        return super().features({**shape, "batch": np.ones_like(shape["chunk"])})


class AllGather(AllReduce):
    """Every rank's `num_bytes` on all `ranks`: (r − 1) · bytes received on each link, in steps."""

    operator = "all_gather"

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        return np.zeros_like(shape["num_bytes"]), shape["num_bytes"] * (shape["ranks"] - 1.0)

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        received_s = self.flop_and_bytes(shape)[1] / (self.bandwidth * p["link_efficiency"])
        return p["base_s"] + p["step_s"] * np.log2(shape["ranks"]) + received_s


class SendReceive(AllReduce):
    """`num_bytes` from one rank to another of the same node."""

    operator = "send_recv"
    columns: tuple[str, ...] = ("num_bytes",)
    family_axes: tuple[int, ...] = ()

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        return np.zeros_like(shape["num_bytes"]), shape["num_bytes"]

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        sent_s = shape["num_bytes"] / (self.bandwidth * p["link_efficiency"])
        return p["base_s"] + p["step_s"] + sent_s

    def features(self, shape: Shape) -> FloatArray:
        return log2_columns(shape["num_bytes"])
