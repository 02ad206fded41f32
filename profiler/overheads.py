"""What an iteration costs beyond its operators: the host's work, and what lies between operators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from profiler.estimate import FloatArray
from profiler.operators import nonnegative_rates, rates_of_unity
from specs import ParallelSpec

SERVING_RATES = (
    "base_s",
    "per_request_s",
    "prefill_s",
    "tp_s",
    "idle_s",
    "idle_ranks_s",
    "share",
    "ranks_share",
)
HOST_RATES = ("base_s", "per_request_s", "root_s", "prefill_s", "per_prefill_token_s", "ranks_s")


@dataclass(frozen=True, slots=True)
class HostOverhead:
    """Time the host adds to each iteration (scheduling, launching, collecting) that the device doesn't hide.

    Attributes:
        root_s: times the root of the number of requests: the first find less in the caches than the others.
        prefill_s: of an iteration that takes in a prompt or a part of one. Engines may run decodes alone as
            one CUDA graph, and all else kernel by kernel.
        per_prefill_token_s: of each token beyond one a request.
        ranks_s: of one that several ranks execute, for the messages to them and back.
        stage_s: of each hand-over from one stage to the next.
    """

    base_s: float = 0.0
    per_request_s: float = 0.0
    root_s: float = 0.0
    prefill_s: float = 0.0
    per_prefill_token_s: float = 0.0
    ranks_s: float = 0.0
    stage_s: float = 0.0
    source: str = "assumed"

    def decodes_s(self, requests: int, ranks: int = 1) -> float:
        """Seconds of an iteration of so many decodes and no chunk."""
        fixed_s = self.base_s + self.ranks_s * (ranks > 1)
        return fixed_s + requests * self.per_request_s + math.sqrt(requests) * self.root_s

    def batch_s(self, tokens: int, requests: int) -> float:
        """Seconds of any iteration of one rank: one of more tokens than requests has a chunk."""
        decodes_s = self.decodes_s(requests)
        if tokens <= requests:
            return decodes_s
        return decodes_s + self.prefill_s + (tokens - requests) * self.per_prefill_token_s


@dataclass(frozen=True, slots=True)
class LayerCorrection:
    """What a whole layer takes beyond the sum of its operators, measured one by one: seconds a layer, and a
    share of that sum. Operators that follow each other have to share the caches, but find their inputs there:
    either may be negative.

    `interval` is the 5th and 95th percentile of log(measured ÷ predicted) of whole layers on held-out
    batches.
    """

    base_s: float = 0.0
    share: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    source: str = "measured"

    def at(self, parts_s: FloatArray) -> FloatArray:
        """Seconds beyond the sum `parts_s` of one layer; never less than half of the sum off it."""
        return np.maximum(self.base_s + self.share * parts_s, -0.5 * parts_s)


@dataclass(frozen=True, slots=True)
class ServingOverhead:
    """What an iteration takes in a running engine beyond the host's work and its operators, timed one by one
    in loops: between two iterations the engine's own code and data push theirs out of the caches.

    Attributes:
        prefill_s: of an iteration that takes in a prompt or a part of one.
        tp_s: of one whose layers are split over ranks that have to wait for each other.
        idle_s: of one before which the engine had nothing to do.
        idle_ranks_s: the same beyond that, where several ranks had to be woken.
        share: of what the operators take.
        ranks_share: the same beyond that, where several ranks use caches and memory beside each other.
    """

    base_s: float = 0.0
    per_request_s: float = 0.0
    prefill_s: float = 0.0
    tp_s: float = 0.0
    idle_s: float = 0.0
    idle_ranks_s: float = 0.0
    share: float = 0.0
    ranks_share: float = 0.0

    def at(self, requests: int, parallel: ParallelSpec, *, has_chunk: bool) -> float:
        """Seconds of an iteration that follows another one, beyond the share of its operators."""
        fixed_s = self.base_s + self.prefill_s * has_chunk + self.tp_s * (parallel.tp > 1)
        return fixed_s + requests * self.per_request_s

    def after_a_pause_s(self, parallel: ParallelSpec) -> float:
        """Seconds more of an iteration before which the engine had nothing to do."""
        return self.idle_s + self.idle_ranks_s * (parallel.gpus_per_replica > 1)

    def share_of(self, parallel: ParallelSpec) -> float:
        """How much longer operators take than timed by themselves."""
        return self.share + self.ranks_share * (parallel.gpus_per_replica > 1)


def fit_serving(
    shape: Mapping[str, FloatArray], operators_s: FloatArray, host_s: FloatArray, time_s: FloatArray
) -> ServingOverhead:
    """What brings operators and host nearest to whole iterations, `time_s`, in relative terms."""
    design = _serving_terms(shape, operators_s) / time_s[:, None]
    rates = nonnegative_rates(design, 1.0 - (operators_s + host_s) / time_s)
    return ServingOverhead(**dict(zip(SERVING_RATES, rates, strict=True)))


def serving_s(
    serving: ServingOverhead, shape: Mapping[str, FloatArray], operators_s: FloatArray
) -> FloatArray:
    """Seconds of iterations beyond operators and host, one an entry of the columns of `shape`."""
    rates = np.array([getattr(serving, name) for name in SERVING_RATES])
    return np.asarray(_serving_terms(shape, operators_s) @ rates)


def _serving_terms(shape: Mapping[str, FloatArray], operators_s: FloatArray) -> FloatArray:
    requests, is_idle = shape["requests"], shape["idle"] > 0
    has_ranks = shape["tp"] * shape["spp"] * shape["kvp"] > 1
    flags = (shape["chunk"] > 0, shape["tp"] > 1, is_idle, is_idle & has_ranks)
    shares = (operators_s, operators_s * has_ranks)
    return np.stack([np.ones_like(requests), requests, *flags, *shares], axis=1)


def fit_host(shape: Mapping[str, FloatArray], time_s: FloatArray) -> HostOverhead:
    """What fits host times by `requests`, `chunk` tokens and, if given, `ranks`, to relative errors."""
    rates = rates_of_unity(_host_terms(shape) / time_s[:, None])
    return HostOverhead(**dict(zip(HOST_RATES, rates, strict=True)), source="measured")


def host_s(host: HostOverhead, shape: Mapping[str, FloatArray]) -> FloatArray:
    """Seconds of iterations, one an entry of the columns of `shape`."""
    return np.asarray(_host_terms(shape) @ np.array([getattr(host, name) for name in HOST_RATES]))


def _host_terms(shape: Mapping[str, FloatArray]) -> FloatArray:
    requests = shape["requests"]
    chunk, ranks = shape["chunk"], shape.get("ranks", np.ones_like(requests))
    chunks = (chunk > 0, np.maximum(chunk - 1.0, 0.0))
    return np.stack([np.ones_like(requests), requests, np.sqrt(requests), *chunks, ranks > 1], axis=1)


def fit_layer(parts_s: FloatArray, layer_s: FloatArray) -> LayerCorrection:
    """What brings `parts_s` nearest to `layer_s`, in relative terms."""
    return LayerCorrection(*_relative_line(parts_s, layer_s - parts_s, layer_s))


def _relative_line(x: FloatArray, y: FloatArray, scale: FloatArray) -> tuple[float, float]:
    """Intercept and slope with the least Σ |y − line(x)| ÷ scale: reweighted least squares."""
    design = np.stack([np.ones_like(x), x], axis=1) / scale[:, None]
    target = y / scale
    weight = np.ones_like(x)
    line: FloatArray = np.zeros(2)
    for _ in range(30):
        root = np.sqrt(weight)
        line = np.asarray(np.linalg.lstsq(design * root[:, None], target * root, rcond=None)[0])
        weight = 1.0 / np.maximum(np.abs(target - design @ line), 1e-3)
    return float(line[0]), float(line[1])
