"""Formulas of the operators on a CPU: sums of work, each kind at its own rate.

A core does one thing after the other, so there are no waves and no overlap to model: a time is a sum of
terms (calls, rows, products, bytes), and the rates are what is fitted. That is linear, so it is fitted by
non-negative least squares, and it goes on as a line beyond what was measured.
"""

from __future__ import annotations

import numpy as np

from profiler.estimate import FloatArray
from profiler.physics import (
    STREAM_EFFICIENCY,
    Additive,
    OnDevice,
    Parameter,
    Parameters,
    Shape,
    log2_columns,
)
from profiler.small_operators import elementwise_columns
from specs.devices import DeviceSpec

SOCKET_BYTES = 1 << 20  # a message from which on gloo's write to a socket is taken in parts
CORE_CACHE_BYTES = 1 << 20  # of one core's own cache: 1 MiB (Zen 4) to 2 MiB (Sapphire Rapids)
# Keys that torch's flash kernel for CPUs takes at once, and rows, by how many there are
# (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
KEY_BLOCK = 512
ROW_BLOCK = 4  # rows of a matrix product that are taken at once
VECTOR = 16  # fp32 numbers of an AVX-512 register; keys left over are taken one by one
WIDTH_WEIGHT = 4.0  # rows of different widths have less in common than more or fewer of the same
_ROW_BLOCKS = ((768, 256), (192, 64), (0, 32))
_EFFICIENCY = 0.8  # of the peak rate, in the roofline's defaults


def is_cpu(device: DeviceSpec) -> bool:
    """Whether the data sheet is one of a CPU: its name says so."""
    return device.name.split("-")[0] == "cpu"


class CpuGemm(Additive, OnDevice):
    """y[m, n] = x[m, k] · W[k, n].

    Loading (and packing) the weights, every output's column, the products, and the rows in and out. A single
    token takes another kernel, which only reads the weights. Rows are taken by four; those left over go over
    the weights once more, loading them again if they fill the core's cache, and an odd one by itself: three
    tokens may take longer than four.
    """

    operator = "gemm"
    may_fall = True
    columns: tuple[str, ...] = ("m", "n", "k")
    growth_axis = 0
    family_axes: tuple[int, ...] = (1, 2)

    def __init__(self, device: DeviceSpec, dtype: str, cached_bytes: int = 0) -> None:
        super().__init__(device, dtype, cached_bytes)
        self.peak = device.peak_flops_for(dtype)
        load_s = self.element_bytes / (self.bandwidth * STREAM_EFFICIENCY)
        self.parameters = {
            "launch_s": Parameter.rate(device.kernel_launch_s),
            "product_s": Parameter.rate(2.0 / (self.peak * _EFFICIENCY)),
            "weight_s": Parameter.rate(load_s),
            "lone_weight_s": Parameter.rate(load_s),
            "column_s": Parameter.rate(0.0),
            "input_s": Parameter.rate(0.0),
            "output_s": Parameter.rate(0.0),
            "left_over_s": Parameter.rate(0.0),
            "left_over_load_s": Parameter.rate(0.0),
            "odd_s": Parameter.rate(0.0),
        }

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        m, n, k = shape["m"], shape["n"], shape["k"]
        return 2.0 * m * n * k, self.element_bytes * (m * k + k * n + m * n)

    def terms(self, shape: Shape) -> dict[str, FloatArray]:
        m, n, k = shape["m"], shape["n"], shape["k"]
        several = m > 1
        left_over = several & (m % ROW_BLOCK > 0)
        fills_cache = self.element_bytes * n * k >= CORE_CACHE_BYTES
        return {
            "launch_s": np.ones_like(m),
            "product_s": m * n * k,
            "weight_s": n * k * several,
            "lone_weight_s": n * k * ~several,
            "column_s": n * several,
            "input_s": m * k,
            "output_s": m * n,
            "left_over_s": n * k * left_over,
            "left_over_load_s": n * k * (left_over & fills_cache),
            "odd_s": n * k * (several & (m % 2 > 0)),
        }

    def features(self, shape: Shape) -> FloatArray:
        # One token lies apart from two: it is another kernel.
        m = np.where(shape["m"] > 1, 4.0 * shape["m"], 1.0)
        return log2_columns(m, shape["n"], shape["k"])


class _CpuAttention(Additive, OnDevice):
    """What attention of several queries has in common.

    Rows (queries of all heads that share a KV head) come in blocks of 32, 64 or 256; each block loads every
    key once, in blocks of 512, after each of which the rows so far are rescaled. Keys that don't fill a
    vector register cost every row extra.
    """

    columns: tuple[str, ...] = ("chunk", "context", "heads", "kv_heads", "head_dim")
    growth_axis = 1
    family_axes: tuple[int, ...] = (4,)
    size_block = VECTOR

    def __init__(self, device: DeviceSpec, dtype: str, cached_bytes: int = 0) -> None:
        super().__init__(device, dtype, cached_bytes)
        self.peak = device.peak_flops_for(dtype)
        element_s = self.element_bytes / (self.bandwidth * STREAM_EFFICIENCY)
        self.parameters = {
            "launch_s": Parameter.rate(device.kernel_launch_s),
            "row_s": Parameter.rate(0.0),
            "rescale_s": Parameter.rate(0.0),
            "pair_s": Parameter.rate(4.0 / (self.peak * _EFFICIENCY)),
            "load_s": Parameter.rate(0.0),
            "stream_s": Parameter.rate(2.0 * element_s),
            "left_over_s": Parameter.rate(0.0),
        }

    def _prefix(self, shape: Shape) -> dict[str, FloatArray]:
        chunk, context, d = shape["chunk"], shape["context"], shape["head_dim"]
        kv_heads = shape["kv_heads"] * np.ones_like(chunk)
        rows = chunk * shape["heads"] / kv_heads
        some = context > 0
        blocks = np.ceil(rows / _row_block(rows))
        return {
            "launch_s": some.astype(np.float64),
            "row_s": kv_heads * rows * some,
            "rescale_s": kv_heads * rows * np.ceil(context / KEY_BLOCK),
            "pair_s": kv_heads * rows * context * d,
            "load_s": kv_heads * blocks * context * d,
            "stream_s": kv_heads * context * d,
            "left_over_s": kv_heads * rows * (context % VECTOR > 0),
        }

    def features(self, shape: Shape) -> FloatArray:
        chunk, kv_heads = shape["chunk"], shape["kv_heads"]
        # An empty context lies two octaves below that of 16 tokens.
        keys = np.maximum(shape["context"], 4.0)
        return log2_columns(chunk, keys, kv_heads, shape["heads"] / kv_heads, shape["head_dim"])


class CpuShardAttention(_CpuAttention):
    """A chunk over the keys of a shard that holds none of its own."""

    operator = "shard_attention"

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        pairs = shape["chunk"] * shape["context"]
        keys = 2.0 * shape["context"] * shape["kv_heads"] * shape["head_dim"]
        queries = 2.0 * shape["chunk"] * shape["heads"] * shape["head_dim"]
        return 4.0 * pairs * shape["heads"] * shape["head_dim"], self.element_bytes * (keys + queries)

    def terms(self, shape: Shape) -> dict[str, FloatArray]:
        return self._prefix(shape)


class CpuPrefillAttention(_CpuAttention):
    """`batch` chunks, each over its prefix and causally over itself, and the merge of the two parts.

    The causal part takes head by head, without grouping, and up to the block's end beyond the diagonal.
    """

    operator = "prefill_attention"
    columns: tuple[str, ...] = ("batch", "chunk", "context", "heads", "kv_heads", "head_dim")

    def __init__(self, device: DeviceSpec, dtype: str, cached_bytes: int = 0) -> None:
        super().__init__(device, dtype, cached_bytes)
        self.parameters |= {
            "merge_s": Parameter.rate(device.kernel_launch_s),
            "merge_row_s": Parameter.rate(0.0),
            "own_launch_s": Parameter.rate(device.kernel_launch_s),
            "own_row_s": Parameter.rate(0.0),
            "own_pair_s": Parameter.rate(4.0 / (self.peak * _EFFICIENCY)),
            "own_load_s": Parameter.rate(0.0),
            "own_left_over_s": Parameter.rate(0.0),
        }

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        batch, chunk, context = shape["batch"], shape["chunk"], shape["context"]
        pairs = batch * chunk * (context + (chunk + 1.0) / 2.0)
        keys = 2.0 * batch * (context + chunk) * shape["kv_heads"] * shape["head_dim"]
        queries = 2.0 * batch * chunk * shape["heads"] * shape["head_dim"]
        return 4.0 * pairs * shape["heads"] * shape["head_dim"], self.element_bytes * (keys + queries)

    def terms(self, shape: Shape) -> dict[str, FloatArray]:
        batch, chunk, heads, d = shape["batch"], shape["chunk"], shape["heads"], shape["head_dim"]
        some = shape["context"] > 0
        block = _row_block(chunk)
        reached = np.minimum((chunk + block) / 2.0, chunk)  # keys that a row's block takes, on average
        own = {
            "merge_s": 1.0 * some,
            "merge_row_s": chunk * heads * some,
            "own_launch_s": np.ones_like(chunk),
            "own_row_s": chunk * heads,
            "own_pair_s": chunk * heads * reached * d,
            "own_load_s": np.ceil(chunk / block) * heads * reached * d,
            "own_left_over_s": heads * ((chunk - 1.0) % block + 1.0) * (chunk % VECTOR > 0),
        }
        return {name: batch * amount for name, amount in {**self._prefix(shape), **own}.items()}

    def unseen_s(self, shape: Shape, p: Parameters) -> FloatArray | float:
        prefix = sum(p[name] * amount for name, amount in self._prefix(shape).items())
        return np.asarray(shape["batch"] * prefix)


class CpuDecodeAttention(Additive, OnDevice):
    """`batch` decodes, one after the other: a call each, a set-up a KV head, and every key read once."""

    operator = "decode_attention"
    columns: tuple[str, ...] = ("batch", "total_context", "heads", "kv_heads", "head_dim")
    growth_axis = 1
    tiers = ("far_key_s",)
    family_axes: tuple[int, ...] = (3,)

    def __init__(self, device: DeviceSpec, dtype: str, cached_bytes: int = 0) -> None:
        super().__init__(device, dtype, cached_bytes)
        self.peak = device.peak_flops_for(dtype)
        element_s = self.element_bytes / (self.bandwidth * STREAM_EFFICIENCY)
        self.parameters = {
            "launch_s": Parameter.rate(device.kernel_launch_s),
            "request_s": Parameter.rate(device.kernel_launch_s),
            "head_s": Parameter.rate(0.0),
            "block_s": Parameter.rate(0.0),
            "key_s": Parameter.rate(2.0 * element_s),
            "far_key_s": Parameter.rate(0.0),
            "several_s": Parameter.rate(0.0),
        }

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        total, d = shape["total_context"], shape["head_dim"]
        cached = 2.0 * total * shape["kv_heads"] * d
        queries = 2.0 * shape["batch"] * shape["heads"] * d
        return 4.0 * total * shape["heads"] * d, self.element_bytes * (cached + queries)

    def terms(self, shape: Shape) -> dict[str, FloatArray]:
        batch, total, d = shape["batch"], shape["total_context"], shape["head_dim"]
        heads = shape["kv_heads"] * np.ones_like(batch)
        keys = total * heads * d
        held = self.device.l2_bytes / (2.0 * self.element_bytes)  # keys that the last-level cache holds
        return {
            "launch_s": np.ones_like(batch),
            "several_s": 1.0 * (batch > 1),
            "request_s": batch,
            "head_s": batch * heads,
            "block_s": heads * total / KEY_BLOCK,
            "key_s": keys,
            "far_key_s": np.maximum(keys - held, 0.0),
        }

    def features(self, shape: Shape) -> FloatArray:
        keys, kv_heads = shape["total_context"] / shape["batch"], shape["kv_heads"]
        return log2_columns(shape["batch"], keys, kv_heads, shape["heads"] / kv_heads, shape["head_dim"])


class CpuElementwise(Additive):
    """One kind of operator that moves `num_bytes` over `rows` rows: calls, rows, bytes by what holds them.

    With `shards` partial results to merge, a few calls for each but the first.
    """

    growth_axis = 0
    family_axes: tuple[int, ...] = ()
    tiers = ("shared_byte_s", "far_byte_s")

    def __init__(self, device: DeviceSpec, kind: str) -> None:
        self.operator = kind
        self.device = device
        self.columns = elementwise_columns(kind)
        byte_s = 1.0 / (device.memory_bandwidth_bytes_per_s * STREAM_EFFICIENCY)
        self.parameters = {
            "launch_s": Parameter.rate(device.kernel_launch_s),
            "row_s": Parameter.rate(0.0),
            "byte_s": Parameter.rate(byte_s),
            "shared_byte_s": Parameter.rate(0.0),
            "far_byte_s": Parameter.rate(0.0),
        }
        if "shards" in self.columns:
            self.parameters["step_s"] = Parameter.rate(device.kernel_launch_s)

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        return np.zeros_like(shape["num_bytes"]), shape["num_bytes"]

    def floor_s(self, shape: Shape) -> FloatArray:
        beyond = np.maximum(shape["num_bytes"] - self.device.l2_bytes, 0.0)
        return beyond / self.device.memory_bandwidth_bytes_per_s

    def terms(self, shape: Shape) -> dict[str, FloatArray]:
        num_bytes = shape["num_bytes"]
        if "shards" in self.columns:
            # One result after the other is merged into the first: as many bytes each time.
            num_bytes = num_bytes * (shape["shards"] - 1.0) / (shape["shards"] + 1.0)
        found = {
            "launch_s": np.ones_like(num_bytes),
            "row_s": shape["rows"],
            "byte_s": num_bytes,
            "shared_byte_s": np.maximum(num_bytes - CORE_CACHE_BYTES, 0.0),
            # The shared cache holds what came before as well.
            "far_byte_s": np.maximum(num_bytes - self.device.l2_bytes / 4, 0.0),
        }
        if "shards" in self.columns:
            found["step_s"] = shape["shards"] - 1.0
        return found

    def features(self, shape: Shape) -> FloatArray:
        rows, num_bytes = shape["rows"], shape["num_bytes"]
        shards = shape.get("shards", np.ones_like(rows))
        found = log2_columns(rows, num_bytes / (rows * (shards + 1.0)), shards)
        return np.asarray(found * np.array([1.0, WIDTH_WEIGHT, 1.0]))


class CpuCollective(Additive):
    """A collective among processes: waking each other, and bytes through sockets, slower when there are more
    than a cache holds. A message that a socket doesn't take at once costs another round of waking."""

    growth_axis = 0
    tiers = ("round_s", "far_byte_s")

    def __init__(self, device: DeviceSpec, kind: str) -> None:
        self.operator = kind
        self.device = device
        alone = kind == "send_recv"  # between two, however many there are
        self.columns = ("num_bytes",) if alone else ("num_bytes", "ranks")
        self.family_axes: tuple[int, ...] = () if alone else (1,)
        link = device.intra_node
        self.parameters = {
            "base_s": Parameter.rate(device.kernel_launch_s + link.latency_s),
            "step_s": Parameter.rate(link.latency_s),
            "byte_s": Parameter.rate(1.0 / link.bandwidth_bytes_per_s),
            "round_s": Parameter.rate(0.0),
            "far_byte_s": Parameter.rate(0.0),
        }

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        num_bytes = shape["num_bytes"]
        if self.operator == "send_recv":
            return np.zeros_like(num_bytes), num_bytes
        others = shape["ranks"] - 1.0
        received = num_bytes * others / (shape["ranks"] if self.operator == "all_reduce" else 1.0)
        return np.zeros_like(num_bytes), received

    def floor_s(self, shape: Shape) -> FloatArray:
        return self.flop_and_bytes(shape)[1] / self.device.intra_node.bandwidth_bytes_per_s

    def terms(self, shape: Shape) -> dict[str, FloatArray]:
        received = self.flop_and_bytes(shape)[1]
        ranks = shape.get("ranks", np.full_like(received, 2.0))
        return {
            "base_s": np.ones_like(received),
            "step_s": np.log2(ranks),
            # An all-reduce sums what it has received and sends the sums.
            "byte_s": received * (2.0 if self.operator == "all_reduce" else 1.0),
            "round_s": (received / (ranks - 1.0) >= SOCKET_BYTES).astype(np.float64),
            "far_byte_s": np.maximum(received - CORE_CACHE_BYTES, 0.0),
        }

    def features(self, shape: Shape) -> FloatArray:
        return log2_columns(*(shape[name] for name in self.columns))


def _row_block(rows: FloatArray) -> FloatArray:
    block = np.full(np.shape(rows), 32.0)
    for least, size in reversed(_ROW_BLOCKS):
        block = np.where(rows >= least, float(size), block)
    return block
