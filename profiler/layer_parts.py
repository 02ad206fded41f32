"""Of which operators an iteration consists."""

from __future__ import annotations

import numpy as np

from profiler.estimate import Estimate, FloatArray
from profiler.kernels import Kernels
from profiler.work import (
    activation_bytes,
    embedding_bytes,
    kv_write_bytes,
    norm_bytes,
    rope_angle_bytes,
    rope_bytes,
    sampling_bytes,
)
from specs.models import ModelSpec

Named = list[tuple[str, Estimate]]


def token_operators(model: ModelSpec, kernels: Kernels, tp: int, tokens: FloatArray) -> Named:
    """The operators of one layer on one rank that go by the number of tokens alone, without collectives."""
    if (rest := kernels.rest_of_layer(tokens, tp)) is not None:
        return [("layer without attention", rest)]
    hidden, inter, element = model.hidden_size, model.intermediate_size // tp, kernels.activation_bytes
    q_size, kv_size = model.query_size // tp, model.kv_size // tp
    norm = kernels.elementwise(norm_bytes(tokens, hidden, element), kind="norm", rows=tokens)
    rope = kernels.elementwise(rope_bytes(tokens, q_size + kv_size, element), kind="rope", rows=tokens)
    kv_write = kernels.elementwise(kv_write_bytes(tokens, kv_size, element), kind="kv_write", rows=tokens)
    swiglu = kernels.elementwise(activation_bytes(tokens, inter, element), kind="activation", rows=tokens)
    operators = [
        ("qkv projection", kernels.gemm(tokens, q_size + 2 * kv_size, hidden)),
        ("output projection", kernels.gemm(tokens, hidden, q_size)),
        ("gate and up projection", kernels.gemm(tokens, 2 * inter, hidden)),
        ("down projection", kernels.gemm(tokens, hidden, inter)),
        ("attention norm", norm),
        ("mlp norm", norm),
        ("rope", rope),
    ]
    if not kernels.attention_includes_kv_write:
        operators.append(("kv write", kv_write))
    return [*operators, ("activation", swiglu)]


def collectives(model: ModelSpec, kernels: Kernels, tp: int, tokens: FloatArray) -> Named:
    """The collectives of one layer."""
    if tp == 1:
        return []
    all_reduce = kernels.all_reduce(kernels.activation_bytes * tokens * model.hidden_size, tp)
    return [("all-reduce after attention", all_reduce), ("all-reduce after mlp", all_reduce)]


def first_operators(model: ModelSpec, kernels: Kernels, tokens: FloatArray) -> Named:
    """What an iteration does once for its tokens, before the layers."""
    if _is_in_layers(kernels):
        return [("embedding", _nothing(kernels, tokens))]
    element = kernels.activation_bytes
    moved = embedding_bytes(tokens, model.hidden_size, element)
    operators = [("embedding", kernels.elementwise(moved, kind="embedding", rows=tokens))]
    if "rope_angles" in kernels.kinds:
        # Where they weren't measured they were looked up, within the rotation.
        moved = rope_angle_bytes(tokens, model.head_dim, element)
        operators.append(("rope angles", kernels.elementwise(moved, kind="rope_angles", rows=tokens)))
    return operators


def row_operators(model: ModelSpec, kernels: Kernels, tp: int, rows: FloatArray) -> Named:
    """What comes behind the last layer, by the rows whose logits are wanted."""
    if _is_in_layers(kernels):
        return [("lm head", _nothing(kernels, rows))]
    element, vocab = kernels.activation_bytes, model.vocab_size // tp
    norm = norm_bytes(rows, model.hidden_size, element)
    sampled = sampling_bytes(rows, model.vocab_size, element)
    operators = [
        ("final norm", kernels.elementwise(norm, kind="norm", rows=rows)),
        ("lm head", kernels.gemm(rows, vocab, model.hidden_size)),
        ("sampling", kernels.elementwise(sampled, kind="sampling", rows=rows)),
    ]
    if tp > 1:
        operators.append(("logits gather", kernels.all_gather(element * rows * vocab, tp)))
    return operators


def _is_in_layers(kernels: Kernels) -> bool:
    """Whether what comes once is in the times of the layers."""
    return "forward_pass" in kernels.kinds


def _nothing(kernels: Kernels, sizes: FloatArray) -> Estimate:
    """The time of what was counted elsewhere."""
    nothing = np.zeros_like(sizes)
    return Estimate(nothing, nothing, nothing > 0, "imported")


def between_operators(kernels: Kernels, parts_s: FloatArray) -> Estimate | None:
    """What one layer takes beyond the sum of its operators, `parts_s`; None if it wasn't measured."""
    if kernels.layer is None:
        return None
    beyond_s = kernels.layer.at(parts_s)
    nothing = np.zeros_like(beyond_s)
    return Estimate(beyond_s, nothing, nothing > 0, kernels.layer.source)


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
