"""One call of each operator, exactly as the live runtime makes it.

Inputs are views into one large buffer of random numbers. What a layer has just produced (activations) is
the same from call to call, hence in the cache, as in serving. Weights and KV caches change from call to
call: the same ones come back after as many bytes as a whole iteration touches in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from profiler.measure.points import Point
from profiler.measure.timing import Call
from runtime import layers
from runtime.attention import Backend, Extent, choose_backend, merge
from specs.devices import DeviceSpec
from specs.models import ModelSpec

MOST_DRAWS = 8192  # of token ids; more are never asked for in a visit
CACHES = 4  # last-level caches' worth of other data after which an input is surely cold


class Cases:
    """Makes the calls of one model's operators on one device.

    Args:
        buffer_bytes: of random inputs; bounds the largest weight and KV cache.

    Attributes:
        backend: attention; chosen for the whole model's heads.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: DeviceSpec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        buffer_bytes: int,
        backend: str = "auto",
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.backend: Backend = choose_backend(
            device, dtype, model.num_heads, model.num_kv_heads, model.head_dim, backend
        )
        self.element = dtype.itemsize
        self._cold_bytes = CACHES * spec.l2_bytes
        self._numbers = torch.empty(buffer_bytes // self.element, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        # In pieces: a wider copy of all of it wouldn't fit, and some generators stop at 2³¹ elements.
        for piece in torch.split(self._numbers, 1 << 26):
            piece.normal_(generator=generator)
        self._makers: dict[str, Callable[[Point], Call]] = {
            "gemm": self._gemm,
            "prefill_attention": self._prefill,
            "shard_attention": self._shard,
            "decode_attention": self._decode,
            "skewed_decode": self._skewed,
            "norm": self._norm,
            "rope_angles": self._rope_angles,
            "rope": self._rope,
            "activation": self._activation,
            "kv_write": self._kv_write,
            "embedding": self._embedding,
            "sampling": self._sampling,
            "kvp_merge": self._merge,
        }

    def has(self, operator: str) -> bool:
        """Whether this is where the operator is measured."""
        return operator in self._makers

    def call(self, point: Point) -> Call:
        """The operator at this shape, ready to be called with 0, 1, 2, …"""
        return self._makers[point.operator](point)

    # -- inputs -----------------------------------------------------------------------------------------

    def numbers(self, *shape: int, offset: int = 0) -> Tensor:
        """A view of random numbers; those at another offset are others."""
        size = math.prod(shape)
        if offset + size > len(self._numbers):
            raise MemoryError(f"{size * self.element} bytes of input are more than the buffer holds")
        return self._numbers[offset : offset + size].view(shape)

    def weights(self, *shape: int) -> list[Tensor]:
        """Different weights of one shape, enough that each is as cold as in serving."""
        size = math.prod(shape)
        touched = min(self.model.num_parameters * self.element, self._cold_bytes)
        copies = max(math.ceil(touched / (size * self.element)), 1)
        copies = max(min(copies, len(self._numbers) // size), 1)
        return [self.numbers(*shape, offset=i * size) for i in range(copies)]

    def cache(self, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, slots, head_dim] of as many slots as the buffer holds."""
        slots = len(self._numbers) // (2 * kv_heads * self.model.head_dim)
        keys, values = self.numbers(2, kv_heads, slots, self.model.head_dim)
        return keys, values

    def places(self, kv_heads: int, tokens: int) -> list[int]:
        """First slots of different runs of `tokens` keys, as many as keep each as cold as in serving."""
        token_bytes = 2 * kv_heads * self.model.head_dim * self.element
        slots = len(self._numbers) // (2 * kv_heads * self.model.head_dim)
        if tokens > slots:
            raise MemoryError(f"{tokens} tokens of KV cache are more than the {slots} that the buffer holds")
        others = self.model.num_parameters * self.element
        touched = min(others + self.model.num_layers * tokens * token_bytes, self._cold_bytes)
        copies = max(math.ceil(touched / (max(tokens, 1) * token_bytes)), 1)
        return [i * tokens for i in range(max(min(copies, slots // max(tokens, 1)), 1))]

    # -- matrices and attention -------------------------------------------------------------------------

    def _gemm(self, point: Point) -> Call:
        x = self.numbers(point["m"], point["k"])
        weights = self.weights(point["n"], point["k"])
        return lambda i: layers.linear(x, weights[i % len(weights)])

    def _prefill(self, point: Point) -> Call:
        chunk, context, kv_heads = point["chunk"], point["context"], point["kv_heads"]
        q, k, v = self._qkv(chunk, point["heads"], kv_heads)
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        keys, values = self.cache(kv_heads)
        places = self.places(kv_heads, context)

        def call(i: int) -> Tensor:
            parts = []
            if context:
                prefix = Extent(places[i % len(places)], context)
                parts.append(self.backend.attend(q, prefix.of(keys), prefix.of(values), causal=False))
            parts.append(self.backend.attend(q, k, v, causal=True))
            return merge(parts)[0]

        return call

    def _shard(self, point: Point) -> Call:
        """A chunk over keys of another shard than its own: no causal part, and the log-sum-exp is wanted."""
        q, _, _ = self._qkv(point["chunk"], point["heads"], point["kv_heads"])
        keys, values = self.cache(point["kv_heads"])
        places = self.places(point["kv_heads"], point["context"])

        def call(i: int) -> object:
            shard = Extent(places[i % len(places)], point["context"])
            return self.backend.attend(q, shard.of(keys), shard.of(values), causal=False)

        return call

    def _decode(self, point: Point) -> Call:
        batch, each = point["batch"], point["total_context"] // point["batch"]
        return self._decodes([each] * batch, point["heads"], point["kv_heads"])

    def _skewed(self, point: Point) -> Call:
        batch, longest = point["batch"], point["longest_context"]
        rest = (point["total_context"] - longest) // (batch - 1)
        lengths = [rest] * (batch - 1)
        lengths.insert(batch // 2, longest)
        return self._decodes(lengths, point["heads"], point["kv_heads"])

    def _decodes(self, lengths: list[int], heads: int, kv_heads: int) -> Call:
        q = self.numbers(len(lengths), heads, self.model.head_dim)
        keys, values = self.cache(kv_heads)
        batches = []
        for place in self.places(kv_heads, sum(lengths)):
            extents = []
            for length in lengths:
                extents.append(Extent(place, length))
                place += length
            batches.append(extents)
        return lambda i: self.backend.decode(q, keys, values, batches[i % len(batches)])

    # -- the rest ---------------------------------------------------------------------------------------

    def _norm(self, point: Point) -> Call:
        """A norm, and the addition to the residual of what came of it."""
        rows, width = point["rows"], point["width"]
        x, weight, update = self.numbers(rows, width).clone(), self.numbers(width), self.numbers(rows, width)

        def call(i: int) -> Tensor:
            normed = layers.rms_norm(x, weight, self.model.rms_norm_eps)
            # The sign alternates, so that the residual doesn't grow from call to call.
            x.add_(update, alpha=1 - 2 * (i % 2))
            return normed

        return call

    def _rope_angles(self, point: Point) -> Call:
        positions = torch.arange(point["rows"], device=self.device)
        frequencies = layers.rope_frequencies(self.model, self.device)
        return lambda i: layers.rope_angles(positions, frequencies, self.dtype)

    def _rope(self, point: Point) -> Call:
        tokens, heads = point["rows"], point["width"] // self.model.head_dim
        frequencies = layers.rope_frequencies(self.model, self.device)
        cos, sin = layers.rope_angles(torch.arange(tokens, device=self.device), frequencies, self.dtype)
        q_and_k = self.numbers(tokens, heads + heads // 3, self.model.head_dim)[:, :heads]
        return lambda i: layers.rope(q_and_k, cos, sin)

    def _activation(self, point: Point) -> Call:
        gate_up = self.numbers(point["rows"], 2 * point["width"])
        return lambda i: layers.swiglu(gate_up)

    def _kv_write(self, point: Point) -> Call:
        tokens, kv_heads = point["rows"], point["width"] // self.model.head_dim
        _, k, v = self._qkv(tokens, kv_heads, kv_heads)
        k, v = k.clone(), v.clone()
        keys, _ = self.cache(kv_heads)
        cache = self.numbers(2, kv_heads, keys.shape[1], self.model.head_dim)
        places = self.places(kv_heads, tokens)
        slots = [torch.arange(place, place + tokens, device=self.device) for place in places[:8]]
        return lambda i: layers.write_kv(cache, slots[i % len(slots)], k, v)

    def _embedding(self, point: Point) -> Call:
        """Rows that haven't been read for long: one is wanted when its token comes again."""
        hidden, rows = self.model.hidden_size, point["rows"]
        size = max(self._cold_bytes // self.element // hidden, self.model.vocab_size)
        table = self.numbers(min(size, len(self._numbers) // hidden), hidden)
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(len(table), generator=generator).to(self.device)
        draws = torch.split(order, rows)[:MOST_DRAWS]
        draws = draws[: max(len(table) // rows, 1)]  # the last one may be short
        return lambda i: layers.embed(table, draws[i % len(draws)])

    def _sampling(self, point: Point) -> Call:
        logits = self.numbers(point["rows"], point["width"])
        return lambda i: layers.sample_greedy(logits)

    def _merge(self, point: Point) -> Call:
        tokens, heads = point["rows"], point["width"] // self.model.head_dim
        size = tokens * heads * self.model.head_dim
        parts = [
            (
                self.numbers(tokens, heads, self.model.head_dim, offset=i * size),
                self.numbers(tokens, heads, offset=i * tokens * heads).float(),
            )
            for i in range(point["shards"])
        ]
        return lambda i: merge(parts)

    def _qkv(self, tokens: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head_dim] as the runtime has them: queries and keys come
        from rotation, side by side; values are columns of the projection."""
        d = self.model.head_dim
        qk = self.numbers(tokens, heads + kv_heads, d)
        qkv = self.numbers(tokens, heads + 2 * kv_heads, d)
        return qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :]
