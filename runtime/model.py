"""One rank's part of a Llama-style model: a stage's layers, split over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime import layers
from runtime.attention import Backend, merge
from runtime.distributed import Mesh
from runtime.kv_cache import PagedKV
from runtime.plan import Inputs
from runtime.weights import LayerWeights, Weights, lm_head_is_split
from specs import ModelSpec, ParallelSpec
from specs.errors import InputError


def check_model(model: ModelSpec, parallel: ParallelSpec) -> None:
    """Refuse what isn't executed.

    Raises:
        InputError: the model has a sliding window, or can't be split this way.
    """
    if model.sliding_window is not None:
        raise InputError(
            f"model {model.name}: a sliding window ({model.sliding_window} tokens) is not executed; "
            "set sliding_window to null in its config.json to attend to everything"
        )
    if model.num_kv_heads % parallel.tp or model.intermediate_size % parallel.tp:
        raise InputError(
            f"parallel.tp: {parallel.tp} must divide the {model.num_kv_heads} KV heads of {model.name} and "
            f"its MLP of {model.intermediate_size}"
        )
    if parallel.spp > model.num_layers:
        raise InputError(
            f"parallel.spp: {parallel.spp} stages are more than the {model.num_layers} layers of {model.name}"
        )


class Model:
    """The layers of one rank, over its KV cache.

    A batch's tokens go through the linear layers as one matrix; attention is taken chunk by chunk, and for
    all decodes at once.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, cache: PagedKV, backend: Backend, mesh: Mesh
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.cache = cache
        self.backend = backend
        self.mesh = mesh
        self.heads = spec.num_heads // mesh.tp
        self.kv_heads = spec.num_kv_heads // mesh.tp
        self._frequencies = layers.rope_frequencies(spec, cache.layers[0].device)

    def embed(self, inputs: Inputs) -> Tensor:
        """Activations [tokens, hidden] before the first layer; first stage only."""
        assert self.weights.embedding is not None
        return layers.embed(self.weights.embedding, inputs.token_ids)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Take activations [tokens, hidden] through this rank's layers; ``x`` is overwritten."""
        cos, sin = layers.rope_angles(inputs.positions, self._frequencies, x.dtype)
        eps = self.spec.rms_norm_eps
        for weights, cache in zip(self.weights.layers, self.cache.layers, strict=True):
            normed = layers.rms_norm(x, weights.attention_norm, eps)
            x.add_(self.mesh.all_reduce(self._attention(normed, weights, cache, inputs, cos, sin)))
            normed = layers.rms_norm(x, weights.mlp_norm, eps)
            x.add_(self.mesh.all_reduce(self._mlp(normed, weights)))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits [rows, vocab] of activations [rows, hidden] behind the last layer; last stage only."""
        final_norm, lm_head = self.weights.final_norm, self.weights.lm_head
        assert final_norm is not None and lm_head is not None
        logits = layers.linear(layers.rms_norm(x, final_norm, self.spec.rms_norm_eps), lm_head)
        return self.mesh.gather_columns(logits) if lm_head_is_split(self.spec, self.mesh.tp) else logits

    def _attention(
        self, x: Tensor, weights: LayerWeights, cache: Tensor, inputs: Inputs, cos: Tensor, sin: Tensor
    ) -> Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        qkv = layers.linear(x, weights.qkv, weights.qkv_bias)
        qkv = qkv.view(x.shape[0], heads + 2 * kv_heads, self.spec.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if weights.q_norm is not None and weights.k_norm is not None:
            eps = self.spec.rms_norm_eps
            q = layers.rms_norm(qk[:, :heads], weights.q_norm, eps)
            qk = torch.cat([q, layers.rms_norm(qk[:, heads:], weights.k_norm, eps)], dim=1)
        qk = layers.rope(qk, cos, sin)
        q, k = qk[:, :heads], qk[:, heads:]
        stored = inputs.stored_rows
        if stored is None:
            layers.write_kv(cache, inputs.slots, k, v)
        elif len(stored):
            layers.write_kv(cache, inputs.slots, k[stored], v[stored])
        out = self._attend(q, k, v, cache, inputs)
        return layers.linear(out.reshape(x.shape[0], -1), weights.out, weights.out_bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, inputs: Inputs) -> Tensor:
        """Attention output [tokens, heads, head_dim] of the whole batch."""
        keys, values = cache[0], cache[1]
        partials = []
        for piece in inputs.chunks:
            rows, parts = piece.rows, []
            if piece.prefix is not None:
                prefix = piece.prefix
                parts.append(self.backend.attend(q[rows], prefix.of(keys), prefix.of(values), causal=False))
            if piece.own:
                parts.append(
                    self.backend.attend(
                        q[rows], k[rows].transpose(0, 1), v[rows].transpose(0, 1), causal=True
                    )
                )
            partials.append(merge(parts))
        if inputs.decodes:
            single = q[-len(inputs.decodes) :]
            partials.append(self.backend.decode(single, keys, values, inputs.decodes))
        out = torch.cat([out for out, _ in partials]) if len(partials) > 1 else partials[0][0]
        if not inputs.shared:
            return out
        return self.mesh.merge_shards(out, torch.cat([lse for _, lse in partials]), inputs.shared)

    def _mlp(self, x: Tensor, weights: LayerWeights) -> Tensor:
        gate_up = layers.linear(x, weights.gate_up, weights.gate_up_bias)
        return layers.linear(layers.swiglu(gate_up), weights.down, weights.down_bias)
