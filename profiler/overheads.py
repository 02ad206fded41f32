"""What an iteration costs beyond its operators: the host's work, and what lies between operators."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiler.estimate import FloatArray


@dataclass(frozen=True, slots=True)
class HostOverhead:
    """Time the host adds to each iteration (scheduling, launching, sampling) that the device doesn't hide;
    `prefill_s` only if it has prompt tokens: an engine runs decodes alone as one CUDA graph, and all else
    kernel by kernel."""

    base_s: float = 0.0
    per_request_s: float = 0.0
    source: str = "assumed"
    prefill_s: float = 0.0

    def at(self, requests: FloatArray) -> FloatArray:
        """Seconds of an iteration of so many requests."""
        return self.base_s + self.per_request_s * requests


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


def fit_host(requests: FloatArray, time_s: FloatArray) -> HostOverhead:
    """A line through host times, fitted to relative errors."""
    base_s, per_request_s = _relative_line(requests, time_s, time_s)
    return HostOverhead(max(base_s, 0.0), max(per_request_s, 0.0), "measured")


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
