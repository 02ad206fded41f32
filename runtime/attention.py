"""Exact attention in parts: every part returns its output and its log-sum-exp, and parts merge.

A chunk behind a prefix is plain attention over the prefix merged with causal attention within the chunk;
shards of a KV cache cut along the sequence merge in the same way (online softmax, arXiv 1805.02867).

Shapes: queries and outputs are ``[tokens, heads, head_dim]``, keys and values ``[kv_heads, tokens,
head_dim]`` (views into a cache, any strides with contiguous elements), log-sum-exps ``[tokens, heads]`` in
fp32 or wider. Grouped heads are never copied: query head i reads KV head i // (heads / kv_heads).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specs.errors import InputError

Partial = tuple[Tensor, Tensor]
"""Output [tokens, heads, head_dim] and log-sum-exp [tokens, heads] of attention over some of the keys."""


class Extent(NamedTuple):
    """Keys of one request in a cache layer: a run of slots, or with ``slots`` scattered ones."""

    start: int
    length: int
    slots: Tensor | None = None  # [length], when they don't follow each other

    def of(self, cache: Tensor) -> Tensor:
        """The keys or values ``[kv_heads, length, head_dim]`` in ``cache`` ``[kv_heads, slots, head_dim]``:
        a view where the slots follow each other, else a copy."""
        if self.slots is None:
            return cache.narrow(1, self.start, self.length)
        return cache.index_select(1, self.slots)


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over all keys from attention over disjoint parts of them.

    out = Σ exp(lse_i − lse) · out_i with lse = log Σ exp(lse_i); a part without keys has lse −∞ and counts
    for nothing. The order of the parts decides the rounding, so equal order gives equal bits.
    """
    out, lse = parts[0]
    for other_out, other_lse in parts[1:]:
        weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # share of the other part
        out = torch.lerp(out.to(weight.dtype), other_out.to(weight.dtype), weight)
        lse = torch.logaddexp(lse, other_lse)
    return out.to(parts[0][0].dtype), lse


class Backend:
    """Attention in plain matrix products: the reference, in fp32 or wider, on any device.

    Subclasses override :meth:`attend`, and :meth:`decode` where there is a kernel for many requests at once.
    """

    name = "reference"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Partial:
        """Attention of every query over every key, or with ``causal`` over those up to its own position
        (then there are as many keys as queries)."""
        tokens, heads, head_dim = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.matmul(_fold(q, k.shape[0]).to(wide), k.to(wide).transpose(-1, -2))
        scores *= 1.0 / math.sqrt(head_dim)
        if causal:
            hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu_(1)
            scores.masked_fill_(hidden.repeat(heads // k.shape[0], 1), -math.inf)
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), v.to(wide))
        return _unfold(out, tokens).to(q.dtype), _unfold(lse.unsqueeze(-1), tokens).squeeze(-1)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, extents: Sequence[Extent]) -> Partial:
        """One query for each request: row i attends to all of ``extents[i]`` in a cache layer
        ``[kv_heads, slots, head_dim]``. One request after the other, unless a back end knows better."""
        parts = [
            self.attend(row, extent.of(k_cache), extent.of(v_cache), causal=False)
            for row, extent in zip(torch.split(q, 1), extents, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


class TorchCpu(Backend):
    """torch's own flash kernel for CPUs."""

    name = "torch-flash-cpu"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Partial:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        tokens = q.shape[0]
        if causal:
            out, lse = kernel(q.transpose(0, 1)[None], k[None], v[None], 0.0, True)
            return out[0].transpose(0, 1), lse[0].transpose(0, 1)
        # Without a mask the heads of a group are just more rows, and each key is read once for all of them.
        out, lse = kernel(_fold(q, k.shape[0])[None], k[None], v[None], 0.0, False)
        return _unfold(out[0], tokens), _unfold(lse[0].unsqueeze(-1), tokens).squeeze(-1)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, extents: Sequence[Extent]) -> Partial:
        # One after the other, as above, but a single query needs no folding: half the time of a short decode
        # would go into views.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        tokens, heads, head_dim = q.shape
        kv_heads = k_cache.shape[0]
        rows = torch.split(q.view(tokens, kv_heads, heads // kv_heads, head_dim), 1)
        parts = [
            kernel(row, extent.of(k_cache)[None], extent.of(v_cache)[None], 0.0, False)
            for row, extent in zip(rows, extents, strict=True)
        ]
        if tokens == 1:
            out, lse = parts[0]
        else:
            out, lse = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
        return out.reshape(tokens, heads, head_dim), lse.reshape(tokens, heads)


class TorchCuda(Backend):
    """torch's own flash kernel for CUDA (fp16 and bf16)."""

    name = "torch-flash-cuda"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Partial:
        tokens, keys = q.shape[0], k.shape[1]
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q[None], *_token_major(k, v), None, None, tokens, keys, 0.0, causal, False
        )
        return out[0], lse[0].transpose(0, 1)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, extents: Sequence[Extent]) -> Partial:
        if any(extent.slots is not None for extent in extents):
            return super().decode(q, k_cache, v_cache, extents)
        rows, starts, lengths = _decode_index(extents, q.device)
        k, v = (x[0] for x in _token_major(k_cache, v_cache))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, rows, starts, 1, max(e.length for e in extents), 0.0, False, False, seqused_k=lengths
        )
        return out, lse.reshape(q.shape[1], q.shape[0]).transpose(0, 1)


class FlashAttention2(TorchCuda):
    """The flash-attn package, second generation; decodes stay with torch's kernel, which reads in place."""

    name = "flash-attn-2"

    def __init__(self) -> None:
        self._module = importlib.import_module("flash_attn")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Partial:
        out, lse, _ = self._module.flash_attn_func(
            q[None], *_token_major(k, v), causal=causal, return_attn_probs=True
        )
        return out[0], lse[0].transpose(0, 1)


class FlashAttention3(Backend):
    """The flash-attn package, third generation (Hopper)."""

    name = "flash-attn-3"

    def __init__(self) -> None:
        self._module = importlib.import_module("flash_attn_interface")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Partial:
        out, lse = self._module.flash_attn_func(
            q[None], *_token_major(k, v), causal=causal, return_attn_probs=True
        )
        return out[0], lse[0].transpose(0, 1)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, extents: Sequence[Extent]) -> Partial:
        if any(extent.slots is not None for extent in extents):
            return super().decode(q, k_cache, v_cache, extents)
        rows, starts, lengths = _decode_index(extents, q.device)
        k, v = (x[0] for x in _token_major(k_cache, v_cache))
        out, lse = self._module.flash_attn_varlen_func(
            q,
            k,
            v,
            rows,
            starts,
            1,
            max(e.length for e in extents),
            seqused_k=lengths,
            return_attn_probs=True,
        )
        return out, lse.reshape(q.shape[1], q.shape[0]).transpose(0, 1)


_BACKENDS: dict[str, tuple[type[Backend], ...]] = {
    "cpu": (TorchCpu, Backend),
    "cuda": (FlashAttention3, FlashAttention2, TorchCuda, Backend),
}


def choose_backend(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, name: str = "auto"
) -> Backend:
    """The fastest back end that is there and agrees with the reference on a small case of this shape.

    Kernels differ in the head sizes, types and devices they take; trying is the only check that covers
    them all.

    Raises:
        InputError: the back end called ``name`` is not among those that work here.
    """
    working = _working(device, dtype, heads, kv_heads, head_dim)
    if name == "auto":
        return next(working)
    found = {backend.name: backend for backend in working}
    if name not in found:
        raise InputError(
            f"attention '{name}' doesn't work on this {device.type}; what does: {', '.join(found)}"
        )
    return found[name]


def _working(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> Iterator[Backend]:
    for kind in _BACKENDS.get(device.type, (Backend,)):
        try:
            backend = kind()
            if kind is Backend or _agrees(backend, device, dtype, heads, kv_heads, head_dim):
                yield backend
        except (ImportError, AttributeError, RuntimeError, TypeError, ValueError):  # missing, or it refuses
            continue


def _agrees(
    backend: Backend, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k, v = draw(5, heads, head_dim), draw(kv_heads, 48, head_dim), draw(kv_heads, 48, head_dim)
    extents = [Extent(30, 17), Extent(3, 1), Extent(0, 48), Extent(16, 9), Extent(7, 20)]
    reference = Backend()
    pairs = [
        (backend.attend(q, k, v, causal=False), reference.attend(q, k, v, causal=False)),
        (
            backend.attend(q, k[:, :5], v[:, :5], causal=True),
            reference.attend(q, k[:, :5], v[:, :5], causal=True),
        ),
        (backend.decode(q, k, v, extents), reference.decode(q, k, v, extents)),
    ]
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2
    return all(
        got.shape == wanted.shape
        and torch.allclose(got.double(), wanted.double(), atol=tolerance, rtol=tolerance)
        for found, expected in pairs
        for got, wanted in zip(found, expected, strict=True)
    )


def _fold(q: Tensor, kv_heads: int) -> Tensor:
    """[tokens, heads, d] as [kv_heads, heads / kv_heads · tokens, d]: one matrix for each KV head."""
    tokens, heads, head_dim = q.shape
    grouped = q.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    return grouped.reshape(kv_heads, -1, head_dim)


def _unfold(out: Tensor, tokens: int) -> Tensor:
    """The inverse of :func:`_fold`."""
    kv_heads, _, size = out.shape
    return out.view(kv_heads, -1, tokens, size).permute(2, 0, 1, 3).reshape(tokens, -1, size)


def _token_major(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as flash-attn wants them, [1, tokens, kv_heads, d]: views."""
    return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def _decode_index(extents: Sequence[Extent], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For a kernel over requests of different lengths: row borders [n + 1], first slots [n + 1], lengths [n].

    The kernel takes lengths from the third, so that the second may name any slots of the cache.
    """
    starts = [extent.start for extent in extents]
    table = torch.tensor(
        [list(range(len(extents) + 1)), [*starts, 0], [*(e.length for e in extents), 0]], dtype=torch.int32
    ).to(device, non_blocking=True)
    return table[0], table[1], table[2, :-1]
