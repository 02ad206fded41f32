"""The operators a transformer layer is made of: plain functions of tensors, to be run or timed one by one.

Attention is in :mod:`runtime.attention`; collectives are in :mod:`runtime.distributed`.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from specs import ModelSpec
from specs.errors import InputError
from specs.models import RopeScaling


def embed(weight: Tensor, token_ids: Tensor) -> Tensor:
    """Rows [tokens, hidden] of the embedding [vocab, hidden]."""
    return F.embedding(token_ids, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] through weight [out, in]."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [tokens, 2 · size], gates first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rope_frequencies(model: ModelSpec, device: torch.device) -> Tensor:
    """Radians per position [head_dim / 2], fp32.

    Raises:
        InputError: the model's RoPE scaling is neither linear nor llama3.
    """
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device=device) / model.head_dim
    frequencies = 1.0 / model.rope_theta**exponents
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling, model)
    raise InputError(
        f"model {model.name}: RoPE scaling '{scaling.kind}' is not executed, only linear and llama3 are"
    )


def _llama3(frequencies: Tensor, scaling: RopeScaling, model: ModelSpec) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones kept, those between blended."""
    original = scaling.original_max_position_embeddings or model.max_context_tokens
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    turns = original * frequencies / (2 * math.pi)  # over the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def rope_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [tokens, 1, head_dim] for :func:`rope`; computed in fp32."""
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1)[:, None].to(dtype), torch.cat([-sin, sin], -1)[:, None].to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x [tokens, heads, head_dim]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def write_kv(cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store k and v [tokens, kv_heads, head_dim] in a cache layer [2, kv_heads, all slots, head_dim]."""
    cache[0].index_copy_(1, slots, k.transpose(0, 1))
    cache[1].index_copy_(1, slots, v.transpose(0, 1))


def sample_greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of each row and its token; the former is NaN if the row holds a NaN."""
    return tuple(logits.max(dim=-1))  # type: ignore[return-value]


def sample(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """A token [rows] from softmax(logits / temperature), by inverting its distribution at ``uniforms``."""
    distribution = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    places = torch.searchsorted(distribution, uniforms[:, None] * distribution[:, -1:], right=True)
    return places[:, 0].clamp_(max=logits.shape[-1] - 1)


def uniform(seed: int, request: int, position: int) -> float:
    """A number in [0, 1) for one token of one request: sampling doesn't depend on what shares the batch."""
    return random.Random(f"{seed}/{request}/{position}").random()
