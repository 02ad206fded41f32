"""What is left for the KV cache once the weights and the activations have their place."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from specs.devices import DeviceSpec
from specs.errors import InputError
from specs.models import ModelSpec, dtype_bytes
from specs.parallel import ParallelSpec, tp_choices

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """Memory of the tightest GPU of a replica, the one whose stage holds the fewest tokens.

    ``weights_bytes + reserved_bytes + kv_bytes`` is the GPU's whole memory.
    """

    weights_bytes: int
    reserved_bytes: int  # what utilisation leaves free, and activations
    kv_bytes: int
    kv_bytes_per_token: int  # on this GPU: its stage's layers, its rank's KV heads
    kv_capacity_tokens: int  # tokens that one KV group of the replica, or its ring of ranks, can hold


def fit_memory(
    model: ModelSpec,
    device: DeviceSpec,
    parallel: ParallelSpec,
    *,
    weight_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    memory_utilization: float = 0.9,
    max_batch_tokens: int = 8192,
    max_batch_requests: int = 256,
) -> MemoryFit:
    """Divide the memory of each GPU between weights, activations and KV cache.

    As in vLLM, only `memory_utilization` of the memory is used; the rest is left to the driver, the
    CUDA context, NCCL and fragmentation. Every KV group, and every rank of a ring, holds a full copy of
    the weights.

    Raises:
        InputError: the model doesn't fit, or an argument is impossible; says by how much and what would fit.
    """
    parallel.check(model, device)
    if not 0.0 < memory_utilization <= 1.0:
        raise InputError(f"memory_utilization: must be above 0 and at most 1, not {memory_utilization}")
    for key, value in (("max_batch_tokens", max_batch_tokens), ("max_batch_requests", max_batch_requests)):
        if value < 1:
            raise InputError(f"{key}: must be at least 1, not {value}")
    shape = _Shape(
        model, device, weight_dtype, kv_dtype, memory_utilization, max_batch_tokens, max_batch_requests
    )
    fit = shape.fit(parallel)
    if fit.kv_capacity_tokens < 1:
        raise InputError(_does_not_fit(shape, parallel, fit))
    return fit


@dataclass(frozen=True, slots=True)
class _Shape:
    """A model on a device, before it is cut."""

    model: ModelSpec
    device: DeviceSpec
    weight_dtype: str
    kv_dtype: str
    memory_utilization: float
    max_batch_tokens: int
    max_batch_requests: int

    def fit(self, parallel: ParallelSpec) -> MemoryFit:
        """The tightest stage; `kv_bytes` is negative where the weights alone are too much."""
        stages = (self._stage(parallel, stage) for stage in range(parallel.spp))
        return min(stages, key=lambda fit: (fit.kv_capacity_tokens, fit.kv_bytes))

    def _stage(self, parallel: ParallelSpec, stage: int) -> MemoryFit:
        layers = parallel.layers_of_stage(self.model)[stage]
        first, last = stage == 0, stage == parallel.spp - 1
        weights = self._weights_bytes(parallel.tp, layers, first, last)
        unused = self.device.memory_bytes - math.floor(self.device.memory_bytes * self.memory_utilization)
        reserved = unused + self._activation_bytes(parallel.tp, parallel.cp, last)
        kv_bytes = self.device.memory_bytes - weights - reserved
        per_token = 2 * layers * (self.model.kv_size // parallel.tp) * dtype_bytes(self.kv_dtype, "kv_dtype")
        capacity = max(0, kv_bytes // per_token) * parallel.cp  # a ring spreads every request evenly
        return MemoryFit(weights, reserved, kv_bytes, per_token, capacity)

    def _weights_bytes(self, tp: int, layers: int, first: bool, last: bool) -> int:
        """Weights of one rank of a stage: matrices are cut by `tp`, norms and biases counted in full.

        Weights in fp8 means the matrices of the layers; embedding, LM head, norms and biases stay in
        bf16, as in the published fp8 checkpoints.
        """
        model = self.model
        matrix = dtype_bytes(self.weight_dtype, "weight_dtype")
        other = max(matrix, 2)
        size = layers * (model.layer_linear_weights // tp * matrix + model.layer_vector_parameters * other)
        vocabulary = math.ceil(model.vocab_size / tp) * model.hidden_size * other
        shared = model.tie_word_embeddings and first and last
        size += vocabulary * (int(first) + int(last) - int(shared))
        return size + (model.hidden_size * other if last else 0)

    def _activation_bytes(self, tp: int, cp: int, last: bool) -> int:
        """Largest set of activations alive at once, in bf16, and the logits, in fp32.

        Either attention (residual, its norm, q, k, v and the output) or the MLP (residual, its norm,
        gate, up and their product) of `max_batch_tokens` tokens, of which a ring's rank has its share.
        """
        model = self.model
        attention = (2 * model.query_size + 2 * model.kv_size) // tp
        mlp = 3 * model.intermediate_size // tp
        element = max(2, dtype_bytes(self.weight_dtype, "weight_dtype"))
        size = math.ceil(self.max_batch_tokens / cp) * (2 * model.hidden_size + max(attention, mlp)) * element
        if last:
            rows = min(self.max_batch_requests, self.max_batch_tokens)
            size += rows * math.ceil(model.vocab_size / tp) * 4
        return size


def _does_not_fit(shape: _Shape, parallel: ParallelSpec, fit: MemoryFit) -> str:
    model, device = shape.model, shape.device
    usable = device.memory_bytes - fit.reserved_bytes
    short = (fit.kv_bytes_per_token - fit.kv_bytes) / _GIB
    return (
        f"model: {model.name} doesn't fit {device.name} at tp {parallel.tp}, spp {parallel.spp}: "
        f"its {shape.weight_dtype} weights take {fit.weights_bytes / _GIB:.1f} GiB of a GPU and "
        f"{max(usable, 0) / _GIB:.1f} GiB are free for weights and KV cache, {short:.1f} GiB too few; "
        f"{_what_would_fit(shape, parallel)}"
    )


def _what_would_fit(shape: _Shape, parallel: ParallelSpec) -> str:
    """The cut with the fewest GPUs that holds the model, preferring tensor parallelism."""
    candidates = [
        replace(parallel, tp=tp, spp=spp)
        for tp in tp_choices(shape.model, shape.device)
        for spp in range(1, shape.model.num_layers + 1)
    ]
    candidates.sort(key=lambda cut: (cut.tp * cut.spp, cut.spp))
    for cut in candidates:
        if shape.fit(cut).kv_capacity_tokens >= 1:
            return f"tp {cut.tp}, spp {cut.spp} would fit"
    return "no tp and spp would make it fit"
