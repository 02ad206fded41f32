"""Whole layers, by the runtime's own model: what the parts are held against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from profiler.measure.points import Point
from profiler.measure.timing import Call, sample
from profiler.whole_layers import MOST_LAYERS
from runtime import layers
from runtime.attention import Backend
from runtime.distributed import Mesh
from runtime.kv_cache import PagedKV
from runtime.model import Model
from runtime.plan import KVGroups, Plan, Slice, make_inputs
from runtime.weights import Part, load_weights
from specs import ParallelSpec
from specs.models import ModelSpec

BLOCK_TOKENS = 16


class LayerBench:
    """A few layers of one tensor-parallel rank, with a KV cache.

    A rank's share is a smaller model of its own: fewer heads, a narrower MLP. So it runs without the others,
    and without their collectives.

    Args:
        model: the whole model.
        tp: degree.
        capacity_tokens: tokens that the KV cache of each layer holds.
    """

    def __init__(
        self,
        model: ModelSpec,
        tp: int,
        *,
        capacity_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.num_layers = min(model.num_layers, MOST_LAYERS)
        share = replace(
            model,
            num_layers=self.num_layers,
            num_heads=model.num_heads // tp,
            num_kv_heads=model.num_kv_heads // tp,
            intermediate_size=model.intermediate_size // tp,
        )
        part = Part(0, self.num_layers, is_first=False, is_last=False)
        self._cache = PagedKV(
            self.num_layers,
            share.num_kv_heads,
            share.head_dim,
            capacity_tokens=capacity_tokens,
            block_tokens=BLOCK_TOKENS,
            dtype=dtype,
            device=device,
        )
        for cache in self._cache.layers:
            cache.normal_()
        weights = load_weights(share, 0, part, dtype, device)
        self._model = Model(share, weights, self._cache, backend, Mesh(ParallelSpec()))
        self._frequencies = layers.rope_frequencies(share, device)

    def call(self, point: Point) -> tuple[Call, Call]:
        """The layers' forward pass on a batch, and the part of it that a pass does once for all layers."""
        slices = []
        if point["chunk"]:
            slices.append(self._slice(0, point["context"], point["chunk"]))
        decodes = point["decodes"]
        slices += [self._slice(1 + i, point["decode_context"] // decodes - 1, 1) for i in range(decodes)]
        tokens = sum(item.tokens for item in slices)
        inputs = make_inputs(
            Plan(0, slices, np.zeros(tokens, dtype=np.int64)), self._cache, KVGroups(), self.device
        )
        for request in list(self._cache.tables):
            self._cache.release(request)
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.empty(tokens, self._model.spec.hidden_size, dtype=self.dtype, device=self.device)
        x.normal_(generator=generator)
        return (
            lambda i: self._model.forward(x, inputs),
            lambda i: layers.rope_angles(inputs.positions, self._frequencies, self.dtype),
        )

    def time(self, point: Point, visit_s: float) -> tuple[float, float, int]:
        """Seconds of one layer, their spread, and the number of samples."""
        forward, once = self.call(point)
        whole = sample(forward, self.device, visit_s)
        shared_s = sample(once, self.device, visit_s / 10).time_s
        n = self.num_layers
        return max(whole.time_s - shared_s, 0.5 * whole.time_s) / n, whole.spread_s / n, whole.samples

    def _slice(self, request: int, context: int, tokens: int) -> Slice:
        """A slice behind `context` tokens, for which room is made in the cache."""
        longest = context + tokens
        if context > 0:
            self._cache.extend(request, context, longest)
        return Slice(request, max(context, 0), tokens, longest, samples=True)
