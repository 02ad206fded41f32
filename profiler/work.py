"""Bytes that the operators without a matrix move: one definition for what is measured and what is predicted.

Every value counts once, read or written, as if the kernels of one operator were fused. `element` is the
size of an activation in bytes.
"""

from __future__ import annotations

from profiler.estimate import FloatArray

KINDS = (
    "norm",
    "rope_angles",
    "rope",
    "activation",
    "kv_write",
    "embedding",
    "sampling",
    "kvp_merge",
)
LSE_BYTES = 4  # log-sum-exps are fp32


def norm_bytes(tokens: FloatArray, hidden: int, element: int) -> FloatArray:
    """A norm and the addition to the residual: both inputs read, both results written."""
    return element * tokens * 4 * hidden


def rope_angle_bytes(tokens: FloatArray, head_dim: int, element: int) -> FloatArray:
    """Sines and cosines of a token's position, written once for all layers."""
    return element * tokens * 2 * head_dim


def rope_bytes(tokens: FloatArray, q_and_k_size: int, element: int) -> FloatArray:
    """Rotation of queries and keys, read and written; `q_and_k_size` elements of both in a token."""
    return element * tokens * 2 * q_and_k_size


def kv_write_bytes(tokens: FloatArray, kv_size: int, element: int) -> FloatArray:
    """Keys and values of a token, read and written; `kv_size` elements of each."""
    return element * tokens * 4 * kv_size


def activation_bytes(tokens: FloatArray, inter: int, element: int) -> FloatArray:
    """SwiGLU: gate and up read, one written."""
    return element * tokens * 3 * inter


def embedding_bytes(tokens: FloatArray, hidden: int, element: int) -> FloatArray:
    """A row of the embedding a token, read and written."""
    return element * tokens * 2 * hidden


def sampling_bytes(rows: FloatArray, vocab: int, element: int) -> FloatArray:
    """The largest logit of each row: all of them read."""
    return element * rows * vocab


def ring_merge_bytes(tokens: FloatArray, heads: int, head_dim: int, element: int) -> FloatArray:
    """A partial output merged into the sum so far, which is kept in fp32: both read, the sum written."""
    return tokens * heads * (head_dim * (element + 8) + 3 * LSE_BYTES)


def eager_merge_bytes(tokens: FloatArray, heads: int, head_dim: int, element: int) -> FloatArray:
    """The same as four operators one after the other, ``sum − sigmoid(…) · (sum − partial.float())``, as in
    github.com/zhuzilin/ring-flash-attention: a conversion, two differences and a product, all in fp32."""
    return tokens * heads * (head_dim * (element + 4 + 12 + 8 + 12) + 6 * LSE_BYTES)


def kvp_merge_bytes(
    tokens: FloatArray, shards: FloatArray, heads: int, head_dim: int, element: int
) -> FloatArray:
    """Partial outputs and log-sum-exps of all shards read, one output written."""
    return tokens * heads * ((shards + 1) * head_dim * element + shards * LSE_BYTES)
