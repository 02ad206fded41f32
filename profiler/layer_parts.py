"""Of which operators a layer consists."""

from __future__ import annotations

import numpy as np

from profiler.estimate import Estimate, FloatArray
from profiler.kernels import Kernels
from profiler.work import activation_bytes, kv_write_bytes, norm_bytes, rope_bytes
from specs.models import ModelSpec


def token_operators(
    model: ModelSpec, kernels: Kernels, tp: int, tokens: FloatArray
) -> list[tuple[str, Estimate]]:
    """The operators of one layer on one rank that go by the number of tokens alone, without collectives."""
    hidden, inter, element = model.hidden_size, model.intermediate_size // tp, kernels.activation_bytes
    q_size, kv_size = model.query_size // tp, model.kv_size // tp
    norm = kernels.elementwise(norm_bytes(tokens, hidden, element), kind="norm", rows=tokens)
    return [
        ("qkv projection", kernels.gemm(tokens, q_size + 2 * kv_size, hidden)),
        ("output projection", kernels.gemm(tokens, hidden, q_size)),
        ("gate and up projection", kernels.gemm(tokens, 2 * inter, hidden)),
        ("down projection", kernels.gemm(tokens, hidden, inter)),
        ("attention norm", norm),
        ("mlp norm", norm),
        (
            "rope",
            kernels.elementwise(rope_bytes(tokens, q_size + kv_size, element), kind="rope", rows=tokens),
        ),
        (
            "kv write",
            kernels.elementwise(kv_write_bytes(tokens, kv_size, element), kind="kv_write", rows=tokens),
        ),
        (
            "activation",
            kernels.elementwise(activation_bytes(tokens, inter, element), kind="activation", rows=tokens),
        ),
    ]


def layer_parts_s(
    model: ModelSpec,
    kernels: Kernels,
    *,
    tp: int,
    chunk: FloatArray,
    context: FloatArray,
    decodes: FloatArray,
    decode_context: FloatArray,
) -> FloatArray:
    """Seconds of one layer of one rank, summed over its operators, for a chunk, decodes, or both."""
    heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
    total_s = sum(estimate.time_s for _, estimate in token_operators(model, kernels, tp, chunk + decodes))
    # A size of 1 stands in where there is none; its time isn't counted.
    prefill = kernels.prefill_attention(chunk.clip(1), context, heads, kv_heads, model.head_dim)
    decode = kernels.decode_attention(
        decodes.clip(1), decode_context.clip(1), heads, kv_heads, model.head_dim
    )
    total_s = total_s + prefill.time_s * (chunk > 0) + decode.time_s * (decodes > 0)
    return np.asarray(total_s)
