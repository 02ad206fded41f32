"""Measures points, whatever kind they are of."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from profiler.measure import collectives
from profiler.measure.cases import Cases
from profiler.measure.engine_bench import ENGINE_OPERATORS, EngineBench, parallel_of
from profiler.measure.layer import BLOCK_TOKENS, LayerBench
from profiler.measure.points import Point
from profiler.measure.store import OUT_OF_MEMORY, Visit
from profiler.measure.timing import Samples, keep_freed_memory, sample
from runtime.runner import DTYPES
from specs import ParallelSpec
from specs.devices import DeviceSpec
from specs.errors import InputError
from specs.models import ModelSpec

COLLECTIVE_VISITS = 2  # times as long as others: their times scatter most
ENGINE_VISITS = 6


class Measurer:
    """Visits points on one device.

    Args:
        points: all that may be visited, for the sizes of the buffers.
        visit_s: about how long the samples of a visit take together.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: DeviceSpec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        points: Sequence[Point],
        visit_s: float,
        backend: str = "auto",
    ) -> None:
        self._ended_s = time.perf_counter()  # what building takes is part of the first visit's cost
        if device.type == "cpu":
            keep_freed_memory()
        self.model, self.device, self.dtype, self.visit_s = model, device, dtype, visit_s
        buffer_bytes = _buffer_bytes(model, spec, dtype.itemsize, points)
        try:
            self.cases = Cases(model, spec, device, dtype, buffer_bytes=buffer_bytes, backend=backend)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise InputError(
                f"{buffer_bytes >> 20} MiB of inputs don't fit the memory of {device}; "
                "take a smaller --max-context"
            ) from None
        self._layer_tokens: dict[int, int] = {}
        for point in points:
            if point.operator == "layer":
                tokens = point["chunk"] + point["context"] + point["decode_context"]
                tokens += (point["decodes"] + 2) * 2 * BLOCK_TOKENS
                self._layer_tokens[point["tp"]] = max(tokens, self._layer_tokens.get(point["tp"], 0))
        self._spec = spec
        self._engine_points = [point for point in points if point.operator in ENGINE_OPERATORS]
        self._engines: dict[ParallelSpec, EngineBench] = {}
        self._layers: dict[int, LayerBench] = {}
        self._ranks: dict[int, collectives.Ranks] = {}

    def visit(self, point: Point) -> Visit:
        """Measure a point once. What it can't do (memory, a shape no kernel takes) is said in the visit."""
        found, status = Samples(0.0, 0.0, 0), "ok"
        try:
            with torch.inference_mode():
                found = self._samples(point)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError, InputError) as error:
            status = OUT_OF_MEMORY if _is_out_of_memory(error) else str(error).splitlines()[0][:200]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        began_s, self._ended_s = self._ended_s, time.perf_counter()
        return Visit(found.time_s, found.spread_s, found.samples, self._ended_s - began_s, status)

    def close(self) -> None:
        """End the other ranks."""
        for ranks in self._ranks.values():
            ranks.close()
        for engine in self._engines.values():
            engine.close()

    def _samples(self, point: Point) -> Samples:
        operator = point.operator
        if self.cases.has(operator):
            return sample(self.cases.call(point), self.device, self.visit_s)
        if operator == "layer":
            return Samples(*self._layer_bench(point["tp"]).time(point, 2 * self.visit_s))
        if operator in ENGINE_OPERATORS:
            return self._engine_bench(parallel_of(point)).time(point, ENGINE_VISITS * self.visit_s)
        count = point["ranks"]
        if count not in self._ranks:
            self._ranks[count] = collectives.Ranks(count, self.device, self.dtype)
        return self._ranks[count].time(point, COLLECTIVE_VISITS * self.visit_s)

    def _engine_bench(self, parallel: ParallelSpec) -> EngineBench:
        if parallel not in self._engines:
            dtype = next(name for name, each in DTYPES.items() if each == self.dtype)
            points = [point for point in self._engine_points if parallel_of(point) == parallel]
            self._engines[parallel] = EngineBench(
                self.model, self._spec, points, parallel, str(self.device), dtype
            )
        return self._engines[parallel]

    def _layer_bench(self, tp: int) -> LayerBench:
        if tp not in self._layers:
            self._layers[tp] = LayerBench(
                self.model,
                tp,
                capacity_tokens=self._layer_tokens[tp],
                device=self.device,
                dtype=self.dtype,
                backend=self.cases.backend,
            )
        return self._layers[tp]


def _buffer_bytes(model: ModelSpec, spec: DeviceSpec, element: int, points: Sequence[Point]) -> int:
    """Enough for the largest input, and for inputs that change until the cache has forgotten the first."""
    largest = max(model.vocab_size, 2 * model.intermediate_size) * model.hidden_size
    for point in points:
        if point.operator in ("prefill_attention", "shard_attention"):
            tokens, kv_heads, rows = point["context"], point["kv_heads"], point["chunk"]
        elif point.operator in ("decode_attention", "skewed_decode"):
            tokens, kv_heads, rows = point["total_context"], point["kv_heads"], point["batch"]
        elif point.operator in ("gemm", "layer", *ENGINE_OPERATORS, "all_reduce", "all_gather", "send_recv"):
            continue
        else:
            largest = max(largest, point["rows"] * point["width"] * 3)
            continue
        keys = 2 * tokens * kv_heads * model.head_dim
        largest = max(largest, keys, rows * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim)
    return max(largest * element, 4 * spec.l2_bytes) + (1 << 20)


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in words or "memory" in words
