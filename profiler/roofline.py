"""Kernel times from first principles: FLOP, bytes, and how a kernel's tiles fill a device.

Each operator is a small class with the same four methods. `time_s` is a formula with a handful of
parameters; their defaults make the pure roofline, and `profiler.operators` fits them to a table.
`floor_s` has no parameters: nothing runs faster than the data sheet. `features` are what a learned
residual may look at, chosen so that a chunk over a prefix falls among measured whole prompts.

A shape is a mapping from column name to arrays of one common length.
"""

from __future__ import annotations

import numpy as np

from profiler.estimate import FloatArray
from profiler.physics import (
    STREAM_EFFICIENCY,
    OnDevice,
    Parameter,
    Parameters,
    Physics,
    Shape,
    log2_columns,
    soft_max,
)
from specs.devices import DeviceSpec

# Rows of a query tile in FlashAttention 2 and 3 at head_dim 128 (arXiv 2307.08691, 2407.08608).
QUERY_TILE_ROWS = 128
# Output tiles of a GEMM library, rows × columns; a library picks the best for a shape, so do we.
GEMM_TILES = ((64, 64), (128, 64), (128, 128), (256, 128))
# Split-K factors a GEMM library tries when the output alone can't fill the device.
GEMM_SPLITS = (1, 2, 4, 8, 16)


def attention_peak_flops(device: DeviceSpec, kv_dtype: str) -> float:
    """FLOP/s that attention over a KV cache of `kv_dtype` can't exceed.

    Some kernels multiply in fp8 when the cache is fp8 and the device can, others in bf16: the floor
    takes the faster, the fit finds out.
    """
    return device.peak_flops_for(kv_dtype if kv_dtype in device.peak_flops else "bf16")


def turns_per_tile(tiles: FloatArray, sms: float) -> FloatArray:
    """Tile times that the busiest SM spends on `tiles` tiles that may be split along the keys.

    The number of splits is that of flash-attention's `num_splits_heuristic`: with two blocks to an SM,
    none from 80 % of the slots upwards, else the fewest that use 85 % of what the best number uses.
    """
    counts, index = np.unique(tiles, return_inverse=True)
    splits = np.arange(1.0, 129.0)
    rounds = counts[:, None] * splits / (2.0 * sms)
    use = rounds / np.ceil(rounds)
    enough = np.argmax(use >= 0.85 * use.max(axis=1, keepdims=True), axis=1)
    chosen = np.where(counts >= 0.8 * 2.0 * sms, 1.0, splits[enough])
    turns = np.ceil(counts * chosen / sms) / chosen
    return np.asarray(turns[index.ravel()].reshape(tiles.shape))


class Gemm(OnDevice):
    """y[m, n] = x[m, k] · W[k, n].

    time = launch + soft_max(compute, bytes ÷ (bandwidth · bandwidth_efficiency)), where compute is
    the best over output tiles and split-K factors of
    waves · (fill + k/split · time of one k step of the tile): waves = ⌈tiles · split ÷ SMs⌉, partly
    rounded (`wave_rounding`), and a k step takes at least the pipeline's latency `k_latency_s`.
    With fp8 weights a first kernel scales and converts the bf16 activations, row by row.
    """

    operator = "gemm"
    columns: tuple[str, ...] = ("m", "n", "k")
    growth_axis = 0
    family_axes: tuple[int, ...] = (1, 2)

    def __init__(self, device: DeviceSpec, dtype: str, cached_bytes: int = 0) -> None:
        super().__init__(device, dtype, cached_bytes)
        self.peak = device.peak_flops_for(dtype)
        self.parameters = {
            "launch_s": Parameter(device.kernel_launch_s, 5e-7, 4e-5),
            "flop_efficiency": Parameter(0.8, 0.3, 1.0),
            "bandwidth_efficiency": self._efficiency(0.85, 0.3, 1.2),
            "small_tile_efficiency": Parameter(0.6, 0.2, 1.0),
            "k_latency_s": Parameter(1.2e-9, 1e-10, 1e-8),
            "split_s": Parameter(2e-6, 1e-7, 2e-5),
            "wave_rounding": Parameter(0.7, 0.001, 1.0),
            "overlap_power": Parameter(4.0, 1.0, 12.0),
        }
        if dtype == "fp8":
            self.parameters["quantize_row_s"] = Parameter(1e-9, 1e-10, 1e-7)

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        m, n, k = shape["m"], shape["n"], shape["k"]
        flop = 2.0 * m * n * k
        num_bytes = self.element_bytes * (m * k + k * n) + self.activation_bytes * m * n
        return flop, num_bytes

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        m, n, k = shape["m"], shape["n"], shape["k"]
        _, num_bytes = self.flop_and_bytes(shape)
        sm_rate = self.peak * p["flop_efficiency"] / self.sms
        best = np.full_like(m, np.inf)
        for rows, columns in GEMM_TILES:
            # Efficiency falls with the tile's area: less reuse of shared memory per FLOP.
            smallness = np.log2(256 * 128 / (rows * columns)) / 3.0
            rate = sm_rate * p["small_tile_efficiency"] ** smallness
            step_s = max(2.0 * rows * columns / rate, p["k_latency_s"])
            tiles = np.ceil(m / rows) * np.ceil(n / columns)
            for split in GEMM_SPLITS:
                fraction = tiles * split / self.sms
                waves = fraction + p["wave_rounding"] * (np.ceil(fraction) - fraction)
                waves = np.maximum(waves, 1.0)
                cost = waves * (k / split) * step_s + (p["split_s"] if split > 1 else 0.0)
                np.minimum(best, cost, out=best)
        memory = num_bytes / (self.bandwidth * p["bandwidth_efficiency"])
        time_s = p["launch_s"] + soft_max(best, memory, p["overlap_power"])
        if self.dtype == "fp8":
            quantize = m * k * (self.activation_bytes + 1) / (self.bandwidth * p["bandwidth_efficiency"])
            time_s = time_s + np.maximum(m * p["quantize_row_s"], quantize)
        return time_s

    def features(self, shape: Shape) -> FloatArray:
        return log2_columns(shape["m"], shape["n"], shape["k"])


class PrefillAttention(OnDevice):
    """`batch` chunks of `chunk` new tokens, each causal over `context` cached ones; one layer.

    The queries of a KV head form tiles of 128 rows (heads that share a KV head are packed into a
    tile when that gives fewer); a tile spends `key_s` on each key it reads.

    - The chunk's own triangle: the larger of its work spread over all SMs and its longest tile. How
      far a kernel splits that tile over idle SMs is fitted (`own_split`).
    - The prefix: every tile reads all of it; few tiles are split along the keys, many run in waves
      (`turns_per_tile`). Published tables have no prefix, so for them this split, and a rate of
      `stream_efficiency` for the prefix's bytes, is an assumption and not a measurement.
    - Queries, outputs and the new KV cross memory at `io_efficiency`.
    """

    operator = "prefill_attention"
    columns: tuple[str, ...] = ("batch", "chunk", "context", "heads", "kv_heads", "head_dim")
    growth_axis = 1
    family_axes: tuple[int, ...] = (0, 4)

    def __init__(self, device: DeviceSpec, dtype: str, cached_bytes: int = 0) -> None:
        super().__init__(device, dtype, cached_bytes)
        self.peak = attention_peak_flops(device, dtype)
        self.parameters = {
            "launch_s": Parameter(device.kernel_launch_s, 5e-7, 4e-5),
            "flop_efficiency": Parameter(0.65, 0.1, 1.0),
            "softmax_s": Parameter(1e-11, 1e-12, 1e-9),
            "io_efficiency": self._efficiency(STREAM_EFFICIENCY, 0.1, 1.2),
            "tile_s": Parameter(1e-6, 1e-8, 2e-5),
            "block_keys": Parameter(128.0, 8.0, 512.0),
            "own_split": Parameter(1.0, 0.001, 1.0),
            "overlap_power": Parameter(4.0, 1.0, 12.0),
            "stream_efficiency": self._efficiency(STREAM_EFFICIENCY, 0.3, 1.0),
            "stream_overlap_power": Parameter(4.0, 1.0, 12.0),
        }

    def _cached_and_io_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        kv_token = 2.0 * self.element_bytes * shape["kv_heads"] * shape["head_dim"]
        query_token = 2.0 * self.activation_bytes * shape["heads"] * shape["head_dim"]
        cached = shape["batch"] * shape["context"] * kv_token
        return cached, shape["batch"] * shape["chunk"] * (kv_token + query_token)

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        pairs = shape["batch"] * shape["chunk"] * (shape["context"] + (shape["chunk"] + 1.0) / 2.0)
        cached, io = self._cached_and_io_bytes(shape)
        return 4.0 * pairs * shape["heads"] * shape["head_dim"], cached + io

    def tiles(self, shape: Shape) -> FloatArray:
        """Query tiles of the whole batch."""
        chunk, heads, kv_heads = shape["chunk"], shape["heads"], shape["kv_heads"]
        packed = kv_heads * np.ceil(chunk * heads / kv_heads / QUERY_TILE_ROWS)
        separate = heads * np.ceil(chunk / QUERY_TILE_ROWS)
        return shape["batch"] * np.minimum(packed, separate)

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        prefix, own = self._prefix_and_own_s(shape, p)
        return prefix + own

    def unseen_s(self, shape: Shape, p: Parameters) -> FloatArray | float:
        # How a causal triangle fills the SMs says nothing about a prefix, which every tile reads whole.
        return self._prefix_and_own_s(shape, p)[0]

    def _prefix_and_own_s(self, shape: Shape, p: Parameters) -> tuple[FloatArray, FloatArray]:
        chunk, context, tiles = shape["chunk"], shape["context"], self.tiles(shape)
        # One key for the 128 rows of a tile: two products along head_dim, and one exponential a row.
        products_s = 4.0 * shape["head_dim"] * self.sms / (self.peak * p["flop_efficiency"])
        key_s = QUERY_TILE_ROWS * (products_s + p["softmax_s"])

        work = tiles * (p["tile_s"] + (chunk / 2.0 + p["block_keys"]) * key_s) / self.sms
        idle = np.maximum(self.sms / tiles, 1.0)
        longest = p["tile_s"] + (chunk + p["block_keys"]) * key_s / idle ** p["own_split"]
        own = soft_max(work, longest, p["overlap_power"])

        prefix = turns_per_tile(tiles, self.sms) * context * key_s
        cached_bytes, io_bytes = self._cached_and_io_bytes(shape)
        stream = cached_bytes / (self.bandwidth * p["stream_efficiency"])
        prefix = soft_max(prefix, stream, p["stream_overlap_power"])
        io = io_bytes / (self.bandwidth * p["io_efficiency"])
        return prefix, p["launch_s"] + soft_max(own, io, p["overlap_power"])

    def features(self, shape: Shape) -> FloatArray:
        keys = shape["context"] + (shape["chunk"] + 1.0) / 2.0
        group = shape["heads"] / shape["kv_heads"]
        rows = np.minimum(shape["chunk"], QUERY_TILE_ROWS)
        return log2_columns(self.tiles(shape), keys, group, rows, shape["head_dim"])


class DecodeAttention(OnDevice):
    """`batch` decodes whose contexts add up to `total_context`; one layer.

    time = launch + split_s · log2(1 + keys ÷ 128) + soft_max(tiles · tile_s ÷ SMs, bytes ÷ rate): the
    KV cache is read once, a KV head of a request costs a tile's set-up, and a longer context is split
    over SMs and merged. A benchmark that repeats one kernel finds a small KV cache in L2 and reads it
    at `l2_speedup` times the memory's rate; serving doesn't, since other layers pass through L2 in
    between. `cold` leaves that gain out.
    """

    operator = "decode_attention"
    columns: tuple[str, ...] = ("batch", "total_context", "heads", "kv_heads", "head_dim")
    growth_axis = 1
    family_axes: tuple[int, ...] = (0, 4)

    def __init__(self, device: DeviceSpec, dtype: str, cached_bytes: int = 0) -> None:
        super().__init__(device, dtype, cached_bytes)
        self.peak = attention_peak_flops(device, dtype)
        self.parameters = {
            "launch_s": Parameter(device.kernel_launch_s, 5e-7, 4e-5),
            "bandwidth_efficiency": self._efficiency(STREAM_EFFICIENCY, 0.3, 1.0),
            "tile_s": Parameter(1e-6, 1e-8, 2e-5),
            "split_s": Parameter(3e-7, 1e-9, 5e-6),
            "l2_speedup": Parameter(2.0, 1.0, 10.0),
            "l2_fraction": Parameter(0.8, 0.2, 2.0),
            "overlap_power": Parameter(3.0, 1.0, 12.0),
        }

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        total, head_dim = shape["total_context"], shape["head_dim"]
        flop = 4.0 * total * shape["heads"] * head_dim
        queries = 2.0 * shape["batch"] * shape["heads"] * head_dim
        cached = 2.0 * total * shape["kv_heads"] * head_dim
        return flop, self.element_bytes * cached + self.activation_bytes * queries

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        flop, num_bytes = self.flop_and_bytes(shape)
        memory = num_bytes / (self.bandwidth * p["bandwidth_efficiency"])
        if not cold:
            l2_bytes = self.device.l2_bytes * p["l2_fraction"]
            hit = 1.0 / (1.0 + (num_bytes / l2_bytes) ** 4)
            memory = memory * (1.0 - hit + hit / p["l2_speedup"])
        tiles = shape["batch"] * shape["kv_heads"]
        setup = p["tile_s"] * np.maximum(tiles / self.sms - 1.0, 0.0)
        split = p["split_s"] * np.log2(1.0 + shape["total_context"] / shape["batch"] / QUERY_TILE_ROWS)
        busy = soft_max(setup, memory, p["overlap_power"])
        return p["launch_s"] + split + np.maximum(busy, flop / self.peak)

    def features(self, shape: Shape) -> FloatArray:
        tiles = shape["batch"] * shape["kv_heads"]
        keys = shape["total_context"] / shape["batch"]
        group = shape["heads"] / shape["kv_heads"]
        return log2_columns(tiles, keys, shape["kv_heads"], group, shape["head_dim"])


class AllReduce(Physics):
    """Sum of `num_bytes` on each of `ranks` GPUs of one node.

    time = base + the quicker of one shot (every rank reads all the others) and two steps
    (reduce-scatter, all-gather: 2·(r−1)/r·bytes on each link) plus the second step's latency.
    """

    operator = "all_reduce"
    columns: tuple[str, ...] = ("num_bytes", "ranks")
    growth_axis = 0
    family_axes: tuple[int, ...] = (1,)

    def __init__(self, device: DeviceSpec) -> None:
        self.device = device
        self.bandwidth = device.intra_node.bandwidth_bytes_per_s
        self.parameters = {
            "base_s": Parameter(device.kernel_launch_s + device.intra_node.latency_s, 5e-7, 1e-4),
            "step_s": Parameter(device.intra_node.latency_s, 1e-7, 1e-4),
            "link_efficiency": Parameter(0.8, 0.2, 1.5),
            "one_shot_efficiency": Parameter(0.8, 0.2, 1.5),
        }

    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        num_bytes, ranks = shape["num_bytes"], shape["ranks"]
        # Any algorithm receives at least (r−1)/r of the vector; in-switch reduction does no more.
        return np.zeros_like(num_bytes), num_bytes * (ranks - 1.0) / ranks

    def floor_s(self, shape: Shape) -> FloatArray:
        return self.flop_and_bytes(shape)[1] / self.bandwidth

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        num_bytes, ranks = shape["num_bytes"], shape["ranks"]
        one_shot = num_bytes * (ranks - 1.0) / (self.bandwidth * p["one_shot_efficiency"])
        ring = 2.0 * num_bytes * (ranks - 1.0) / ranks / (self.bandwidth * p["link_efficiency"])
        return p["base_s"] + np.minimum(one_shot, p["step_s"] * np.log2(ranks) + ring)

    def features(self, shape: Shape) -> FloatArray:
        return log2_columns(shape["num_bytes"], shape["ranks"])
