"""What a formula of an operator is: parameters to fit, a floor, and coordinates for a learned residual."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from profiler.estimate import FloatArray
from specs.devices import DeviceSpec
from specs.models import DTYPE_BYTES

Shape = Mapping[str, FloatArray]
Parameters = Mapping[str, float]

CACHE_SPEEDUP = 12.0  # most that a fit may make of a last-level cache over the memory behind it

# Share of the data sheet's bandwidth that a streaming kernel reaches: in the shipped tables the
# quickest matrix-vector product reaches 0.88 on H100 and 0.90 on A100.
STREAM_EFFICIENCY = 0.88


@dataclass(frozen=True, slots=True)
class Parameter:
    """A fitted constant: its roofline default and the range, above 0, a fit may move it in."""

    default: float
    low: float
    high: float

    @staticmethod
    def rate(default: float) -> Parameter:
        """Seconds for each unit of work, of an `Additive` operator: anything from 0."""
        return Parameter(default, 0.0, math.inf)


def soft_max(a: FloatArray, b: FloatArray, power: float) -> FloatArray:
    """(aᵖ + bᵖ)^(1/p): the larger of two times that overlap imperfectly; at most 2^(1/p) above it."""
    larger, smaller = np.maximum(a, b), np.minimum(a, b)
    ratio = smaller / np.maximum(larger, 1e-30)
    return np.asarray(larger * (1.0 + ratio**power) ** (1.0 / power))


def log2_columns(*columns: FloatArray) -> FloatArray:
    """Coordinates [n, columns] in octaves."""
    # An empty size (no cached token, no byte) counts as a thousandth of one.
    return np.log2(np.maximum(np.stack(columns, axis=1), 1e-3))


class Physics(ABC):
    """One operator on one device."""

    operator: str
    columns: tuple[str, ...]
    growth_axis: int  # the feature that grows during serving
    family_axes: tuple[int, ...]  # shapes alike (to an octave) in these were measured up to some growth
    parameters: dict[str, Parameter]
    size_block = 1  # sizes of which a kernel takes its growing size at once; what is left over costs extra
    may_fall = False  # whether a larger size may take less time; else that counts as noise

    @abstractmethod
    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        """Predicted seconds. `cold`: the caches hold none of the input, as in serving."""

    @abstractmethod
    def flop_and_bytes(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        """Useful FLOP, and bytes with everything read or written once."""

    @abstractmethod
    def features(self, shape: Shape) -> FloatArray:
        """log2 coordinates of the learned residual, [n, f]."""

    @abstractmethod
    def floor_s(self, shape: Shape) -> FloatArray:
        """Seconds below which no kernel can go."""

    def unseen_s(self, shape: Shape, p: Parameters) -> FloatArray | float:
        """Seconds of `time_s` that a table without prefixes says nothing about."""
        return 0.0

    def defaults(self) -> dict[str, float]:
        """The parameters of the pure roofline."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


def activation_element(dtype: str) -> int:
    """Bytes of an activation beside weights or a KV cache of `dtype`: bf16 unless that is wider."""
    return max(2, DTYPE_BYTES[dtype])


class OnDevice(Physics):
    """Shared by the operators that compute: a peak rate, a memory, and SMs.

    `cached_bytes` of an operator's data are in the last-level cache when it begins, since a small model's
    weights never leave it: memory sets no floor to so many.
    """

    def __init__(self, device: DeviceSpec, dtype: str, cached_bytes: int = 0) -> None:
        self.device = device
        self.dtype = dtype
        self.cached_bytes = cached_bytes
        self.element_bytes = DTYPE_BYTES[dtype]
        self.activation_bytes = activation_element(dtype)
        self.bandwidth = device.memory_bandwidth_bytes_per_s
        self.sms = float(device.num_sms)

    peak: float

    def floor_s(self, shape: Shape) -> FloatArray:
        flop, num_bytes = self.flop_and_bytes(shape)
        from_memory = np.maximum(num_bytes - self.cached_bytes, 0.0)
        return np.maximum(flop / self.peak, from_memory / self.bandwidth)

    def _efficiency(self, default: float, low: float, high: float) -> Parameter:
        """Of a stream of bytes: beyond the memory's rate if they may come from the cache."""
        return Parameter(default, low, CACHE_SPEEDUP if self.cached_bytes else high)


class Additive(Physics):
    """An operator whose time is a sum of terms, each at a fitted rate: fitted by linear least squares.

    Attributes:
        tiers: parameters of what only large sizes have. A single row just beyond the border would fit them to
            noise, and the line would go anywhere from there.
    """

    tiers: tuple[str, ...] = ()

    @abstractmethod
    def terms(self, shape: Shape) -> dict[str, FloatArray]:
        """How much of each parameter's unit a shape has, [n] each."""

    def time_s(self, shape: Shape, p: Parameters, *, cold: bool = True) -> FloatArray:
        return np.asarray(sum(p[name] * amount for name, amount in self.terms(shape).items()))
