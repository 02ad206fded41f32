"""Which shapes of each operator are worth measuring, in an order that fills the space at any length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from profiler.estimate import FloatArray
from profiler.formulas import make_physics
from profiler.measure.points import Point
from profiler.measure.serving_batches import STAGES, contexts_of
from profiler.measure.session import FIRST
from profiler.tables import COLUMNS
from profiler.work import (
    activation_bytes,
    embedding_bytes,
    kv_write_bytes,
    kvp_merge_bytes,
    norm_bytes,
    rope_angle_bytes,
    rope_bytes,
    sampling_bytes,
)
from specs.devices import DeviceSpec
from specs.models import DTYPE_BYTES, ModelSpec

# Share of the coarse grid that each operator gets: by its share of serving time, and by its dimensions.
_COARSE = {
    "gemm": 240,
    "prefill_attention": 100,
    "decode_attention": 72,
    "layer": 56,
    "shard_attention": 28,
    "skewed_decode": 16,
    "norm": 14,
    "rope_angles": 12,
    "rope": 14,
    "activation": 14,
    "kv_write": 14,
    "embedding": 12,
    "sampling": 12,
    "kvp_merge": 16,
    "all_reduce": 20,
    "all_gather": 20,
    "send_recv": 20,
    "host": 24,
    "iteration": 96,
    "stage_gap": 18,
}
FEW_TOKENS = 12  # up to so many are measured one by one on a CPU
MERGE_SHARDS = (2, 3, 4, 8)
HOST_CHUNKS = (0, 64, 256, 1024)  # tokens of the chunk in a batch whose host time is taken
FEW_DECODES = 8  # up to so many are timed one by one: most batches of decodes have fewer
_CONTEXT_OFFSET = 16  # an empty context lies an octave below one of this many tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """How far the grids reach.

    Attributes:
        tps: tensor-parallel degrees whose shards are measured.
        context_tokens: longest context.
        tokens: most tokens in a batch.
        decodes: most decodes in a batch.
        point_s: longest expected time of one call.
        kv_bytes: most bytes of one layer's keys and values.
        ranks: for collectives; none where they can't be run.
        is_quick: leave out what takes long to set up or to repeat, of the host's work.
    """

    tps: tuple[int, ...]
    context_tokens: int
    tokens: int
    decodes: int
    point_s: float
    kv_bytes: int
    ranks: tuple[int, ...] = ()
    is_quick: bool = False


class Grid:
    """The points of one model on one device.

    Args:
        only: the operators wanted; all if empty.
    """

    def __init__(
        self,
        model: ModelSpec,
        device: DeviceSpec,
        dtype: str,
        limits: Limits,
        *,
        only: Sequence[str] = (),
    ) -> None:
        self.model, self.device, self.dtype, self.limits = model, device, dtype, limits
        self.element = DTYPE_BYTES[dtype]
        wanted = only or tuple(_COARSE)
        self._candidates = {name: self._feasible(name) for name in _COARSE if name in wanted}

    def candidates(self) -> dict[str, list[Point]]:
        """Every point that may be measured, by operator."""
        return {name: list(points) for name, points in self._candidates.items() if points}

    def coarse(self, scale: float = 1.0) -> dict[str, list[Point]]:
        """The coarse grid of each operator, in an order whose every prefix fills the space.

        `scale` multiplies the number of points.
        """
        grids = {}
        for name, points in self.candidates().items():
            count = max(round(_COARSE[name] * scale), 6)
            grids[name] = spread(points, count)
        if "prefill_attention" in grids:
            anchors = [
                point for point in self._anchors() if point in set(self._candidates["prefill_attention"])
            ]
            rest = [point for point in grids["prefill_attention"] if point not in set(anchors)]
            grids["prefill_attention"] = rest[:FIRST] + anchors + rest[FIRST:]
        return grids

    def _feasible(self, operator: str) -> list[Point]:
        points = sorted(set(self._points(operator)))
        if operator not in ("prefill_attention", "decode_attention", "gemm", "shard_attention"):
            return points
        physics = make_physics(self.device, operator, self.dtype)
        if not points:
            return []
        time_s = physics.time_s(shape_of(points), physics.defaults())
        return [point for point, t in zip(points, time_s, strict=True) if t <= self.limits.point_s]

    def _points(self, operator: str) -> Iterable[Point]:
        makers = {
            "gemm": self._gemm,
            "prefill_attention": self._prefill,
            "shard_attention": self._shard,
            "decode_attention": self._decode,
            "skewed_decode": self._skewed,
            "layer": self._layer,
            "host": self._host,
            "iteration": self._iteration,
            "stage_gap": self._stage_gap,
        }
        if operator in makers:
            return makers[operator]()
        if operator in ("all_reduce", "all_gather", "send_recv"):
            return self._collective(operator)
        return self._elementwise(operator)

    # -- one method an operator -------------------------------------------------------------------------

    def _gemm(self) -> Iterable[Point]:
        hidden = self.model.hidden_size
        for tp in self.limits.tps:
            heads, kv_heads, inter = self._shard_sizes(tp)
            q_size, kv_size = heads * self.model.head_dim, kv_heads * self.model.head_dim
            shapes = {
                (q_size + 2 * kv_size, hidden),
                (hidden, q_size),
                (2 * inter, hidden),
                (hidden, inter),
            }
            for (n, k), m in product(sorted(shapes), self._token_counts()):
                yield Point("gemm", (m, n, k))
            vocab = self.model.vocab_size // tp if self.model.vocab_size % tp == 0 else self.model.vocab_size
            for m in self._token_counts():
                if m <= self.limits.decodes:
                    yield Point("gemm", (m, vocab, hidden))

    def _prefill(self) -> Iterable[Point]:
        chunks = _steps(1 if self.device.name == "cpu" else 16, self.limits.tokens, 2)
        for (heads, kv_heads), chunk, context in product(self._heads(), chunks, self._contexts()):
            if context + chunk <= self._longest(kv_heads) and chunk > 1:
                yield Point("prefill_attention", (1, chunk, context, heads, kv_heads, self.model.head_dim))

    def _shard(self) -> Iterable[Point]:
        for (heads, kv_heads), chunk, context in product(
            self._heads(), _steps(2, self.limits.tokens, 1), self._contexts()[1:]
        ):
            if context <= self._longest(kv_heads):
                yield Point("shard_attention", (chunk, context, heads, kv_heads, self.model.head_dim))

    def _decode(self) -> Iterable[Point]:
        for (heads, kv_heads), batch, each in product(
            self._heads(), _steps(1, self.limits.decodes, 2), self._contexts()[1:]
        ):
            if batch * each <= self._longest(kv_heads, requests=batch):
                yield Point("decode_attention", (batch, batch * each, heads, kv_heads, self.model.head_dim))

    def _skewed(self) -> Iterable[Point]:
        """One long context, which holds half or nearly all of the keys, among short ones."""
        for (heads, kv_heads), batch, longest, share in product(
            self._heads(), _steps(4, self.limits.decodes, 1), self._contexts()[4:], (2, 1)
        ):
            total = longest * share + (batch - 1) * 16
            expected_s = 2.0 * total * kv_heads * self.model.head_dim * 2 * self.element
            expected_s /= self.device.memory_bandwidth_bytes_per_s
            if total <= self._longest(kv_heads, requests=batch) and expected_s <= self.limits.point_s:
                shape = (batch, total, longest, heads, kv_heads, self.model.head_dim)
                yield Point("skewed_decode", shape)

    def _elementwise(self, kind: str) -> Iterable[Point]:
        model, element = self.model, self.element
        counts = self.limits.decodes if kind == "sampling" else self.limits.tokens
        for tp, tokens in product(self.limits.tps, _steps(1, counts, 2)):
            heads, kv_heads, inter = self._shard_sizes(tp)
            rows = np.array([float(tokens)])
            d = model.head_dim
            if kind == "kvp_merge":
                for shards in MERGE_SHARDS:
                    moved = kvp_merge_bytes(rows, np.array([float(shards)]), heads, d, element)
                    yield Point(kind, (int(moved[0]), tokens, heads * d, shards))
                continue
            num_bytes, width = {
                "norm": (norm_bytes(rows, model.hidden_size, element), model.hidden_size),
                "rope_angles": (rope_angle_bytes(rows, d, element), d),
                "rope": (rope_bytes(rows, (heads + kv_heads) * d, element), (heads + kv_heads) * d),
                "kv_write": (kv_write_bytes(rows, kv_heads * d, element), kv_heads * d),
                "activation": (activation_bytes(rows, inter, element), inter),
                "embedding": (embedding_bytes(rows, model.hidden_size, element), model.hidden_size),
                "sampling": (sampling_bytes(rows, model.vocab_size, element), model.vocab_size),
            }[kind]
            yield Point(kind, (int(num_bytes[0]), tokens, width))

    def _layer(self) -> Iterable[Point]:
        """Chunks alone, decodes alone, and chunks beside decodes."""
        tps = (min(self.limits.tps), max(self.limits.tps))
        chunks = [0, *_steps(16, self.limits.tokens // 2, 1)]
        # Every second one: those between powers of two, which like most in serving fill no kernel's blocks.
        contexts = [c for c in self._contexts() if c <= max(self.limits.context_tokens // 8, 4096)]
        contexts = [0, *contexts[2::2]]
        for tp, chunk, context, decodes, each in product(
            sorted(set(tps)), chunks, contexts, [0, *_steps(1, self.limits.decodes, 1)], contexts[1:]
        ):
            no_chunk, no_decode = chunk == 0, decodes == 0
            if (no_chunk and (no_decode or context)) or (no_decode and each != contexts[1]):
                continue
            total = decodes * each
            kv_token = 2 * self.element * self.model.kv_size // tp
            # Several layers, of two degrees, beside the buffer that the other operators read.
            if (context + chunk + total) * kv_token * 16 > self.limits.kv_bytes:
                continue
            if self._expected_layer_s(tp, chunk, context, total) <= self.limits.point_s / 4:
                yield Point("layer", (chunk, context, decodes, total, tp))

    def _host(self) -> Iterable[Point]:
        """Decodes alone and beside a chunk; and, sent to ranks in processes of their own."""
        counts = _steps(1, self.limits.decodes, 2)
        quick = self.limits.is_quick
        ranks_of = (1,) if quick else (1, *self.limits.ranks[:1])
        chunks = HOST_CHUNKS[:-1] if quick else HOST_CHUNKS
        for ranks, chunk, requests in product(ranks_of, chunks, counts):
            if ranks == 1 or ranks in self.limits.tps:
                yield Point("host", (requests, chunk, ranks))

    def _iteration(self) -> Iterable[Point]:
        """Decodes alone, few of them one by one, and beside a chunk; prompts that come to an engine at rest;
        of one rank and of several, however they split the work."""
        layouts = [(1, 1, 1)]
        if self.limits.ranks and not self.limits.is_quick:
            ranks = self.limits.ranks[0]
            layouts += [(ranks, 1, 1)] if ranks in self.limits.tps else []
            layouts += [(1, ranks, 1)] if ranks <= self.model.num_layers else []
            layouts += [(1, 1, ranks)]
        few = range(1, min(FEW_DECODES, self.limits.decodes) + 1)
        chunks = HOST_CHUNKS[:-1] if self.limits.is_quick else HOST_CHUNKS
        for layout, chunk in product(layouts, chunks):
            counts = _steps(1, self.limits.decodes, 1)
            beside = [1] if layout[1] > 1 else counts  # stages don't get batches of a chunk and equal decodes
            for requests in beside if chunk else sorted({*few, *counts}):
                behind, decoded = contexts_of(requests, chunk, is_idle=False)
                yield Point("iteration", (requests, chunk, behind, decoded, 0, *layout))
            if chunk and layout[-1] == 1:
                behind, decoded = contexts_of(1, chunk, is_idle=True)
                yield Point("iteration", (1, chunk, behind, decoded, 1, *layout))

    def _stage_gap(self) -> Iterable[Point]:
        """Decodes alone, and a chunk alone, where there can be a later stage."""
        if STAGES in self.limits.ranks and self.model.num_layers > 1 and not self.limits.is_quick:
            for requests in _steps(1, self.limits.decodes, 2):
                yield Point("stage_gap", (requests, 0))
            for chunk in _steps(32, max(HOST_CHUNKS), 1):
                yield Point("stage_gap", (1, chunk))

    def _collective(self, operator: str) -> Iterable[Point]:
        largest = self.limits.tokens * self.model.hidden_size * self.element
        # Closer together where the bytes begin to count beside the waking.
        sizes = sorted({*_steps(256, min(largest, 1 << 16), 1), *_steps(1 << 16, largest, 4)})
        for ranks, num_bytes in product(self.limits.ranks, sizes):
            num_bytes -= num_bytes % (4 * ranks)
            if num_bytes and (operator != "send_recv" or ranks == min(self.limits.ranks)):
                yield Point(operator, (num_bytes, ranks))

    # -- ranges -----------------------------------------------------------------------------------------

    def _anchors(self) -> list[Point]:
        """Chunks behind a million tokens on the smallest shard, as in figure 3b of arXiv 2409.17264."""
        heads, kv_heads, _ = self._shard_sizes(max(self.limits.tps))
        context = min(1 << 20, self.limits.context_tokens)
        chunks = (32, 2048, 64, 128, 256, 512, 1024, 4096)
        return [
            Point("prefill_attention", (1, c, context, heads, kv_heads, self.model.head_dim)) for c in chunks
        ]

    def _shard_sizes(self, tp: int) -> tuple[int, int, int]:
        model = self.model
        return model.num_heads // tp, model.num_kv_heads // tp, model.intermediate_size // tp

    def _heads(self) -> list[tuple[int, int]]:
        return [self._shard_sizes(tp)[:2] for tp in self.limits.tps]

    def _token_counts(self) -> list[int]:
        """Powers of two and halfway between; on CPUs few tokens one by one, since those that fill no block of
        rows cost extra, and on GPUs the counts just behind, where a tile begins."""
        counts = _steps(1, self.limits.tokens, 2)
        if self.device.name == "cpu":
            return sorted({*range(1, FEW_TOKENS + 1), *counts})
        return sorted({*counts, *(count + 1 for count in counts if 64 <= count <= 4096)})

    def _contexts(self) -> list[int]:
        return [0, *_steps(16, self.limits.context_tokens, 2)]

    def _longest(self, kv_heads: int, requests: int = 1) -> int:
        """Keys that fit the memory, and none of the requests longer than the longest context."""
        fitting = self.limits.kv_bytes // (2 * kv_heads * self.model.head_dim * self.element)
        return min(fitting, self.limits.context_tokens * requests)

    def _expected_layer_s(self, tp: int, chunk: int, context: int, total: int) -> float:
        peak = self.device.peak_flops_for(self.dtype)
        linear = 2.0 * self.model.layer_linear_weights / tp * chunk
        pairs = chunk * (context + chunk / 2) + total
        attention = 4.0 * pairs * self.model.query_size / tp
        read = 2.0 * (total + context) * self.model.kv_size / tp * self.element
        return (linear + 2.5 * attention) / peak + read / self.device.memory_bandwidth_bytes_per_s


def shape_of(points: Sequence[Point]) -> dict[str, FloatArray]:
    """Columns, by their names in formulas, of points of one operator."""
    values = np.array([point.shape for point in points], dtype=np.float64)
    return dict(zip(COLUMNS[points[0].operator].values(), values.T, strict=True))


def coordinates(points: Sequence[Point]) -> FloatArray:
    """Octaves, [points, columns]."""
    values = np.array([point.shape for point in points], dtype=np.float64)
    names = list(COLUMNS[points[0].operator].values())
    offset = np.array([_CONTEXT_OFFSET if "context" in name else 0.5 for name in names])
    return np.asarray(np.log2(values + offset))


def spread(points: Sequence[Point], count: int) -> list[Point]:
    """Up to `count` of the points, each as far as possible, in octaves, from those before it; the extremes
    come first."""
    if not points:
        return []
    where = coordinates(points)
    where = where[:, np.ptp(where, axis=0) > 0] if len(points) > 1 else where
    chosen = [int(np.argmin(where.sum(axis=1)))]
    distance = np.full(len(points), np.inf)
    while True:
        distance = np.minimum(distance, np.sum((where - where[chosen[-1]]) ** 2, axis=1))
        farthest = int(np.argmax(distance))
        if len(chosen) == min(count, len(points)) or distance[farthest] <= 0.0:
            return [points[i] for i in chosen]
        chosen.append(farthest)


def _steps(low: int, high: int, per_octave: int) -> list[int]:
    """Whole numbers from `low` to `high`, `per_octave` of them to a doubling, `high` included."""
    if high < low:
        return []
    octaves = np.log2(high / low)
    values = low * 2.0 ** np.arange(0, octaves + 1e-9, 1 / per_octave)
    return sorted({*(round(float(value)) for value in values), high})
