"""Kernels of an engine whose steps were timed as a whole: by tokens, attention aside.

`convoy calibrate` finds such a table in an engine's log. What the host takes and the LM head are in it.
Attention comes from the data sheet, times a factor for prompts and one for decodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from profiler.estimate import Estimate, FloatArray, broadcast
from profiler.ladders import Curve
from profiler.overheads import HostOverhead
from profiler.passes import linear_floor_s
from profiler.roofline_kernels import RooflineKernels
from specs.devices import DeviceSpec
from specs.models import ModelSpec


class StepKernels(RooflineKernels):
    """A step's seconds at some numbers of tokens, linear between them; attention by the roofline.

    For engines whose ranks, if there are several, are split by tensors only: what they tell each other is in
    the steps as well.

    Args:
        model: what was served.
        tokens, step_s: of a batch, and the seconds that a step takes beyond attention.
    """

    def __init__(
        self,
        device: DeviceSpec,
        model: ModelSpec,
        tokens: Sequence[int],
        step_s: Sequence[float],
        *,
        weight_dtype: str = "bf16",
        kv_dtype: str = "bf16",
    ) -> None:
        super().__init__(device, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
        self._model, self._weight_dtype = model, weight_dtype
        self._steps = Curve(np.array(tokens, dtype=np.float64), np.array(step_s))
        self.kinds = frozenset({"forward_pass"})
        self.attention_includes_kv_write = self.steps_may_fall = True
        self.host = HostOverhead(source="measured")

    @property
    def operators(self) -> frozenset[str]:
        return super().operators - self.kinds  # steps are as measured: no factor changes them

    def rest_of_layer(self, tokens: FloatArray, tp: int) -> Estimate:
        layers = self._model.num_layers
        floor_s = linear_floor_s(self._model, self.device, self._weight_dtype, tp, tokens) / layers
        time_s = np.maximum(self._steps.at(tokens) / layers, floor_s)
        return Estimate(time_s, floor_s, tokens > self._steps.largest, "measured", None, "rest_of_layer")

    def all_reduce(self, num_bytes: ArrayLike, ranks: ArrayLike) -> Estimate:
        num_bytes, _ = broadcast(num_bytes, ranks)
        nothing = np.zeros_like(num_bytes)
        return Estimate(nothing, nothing, nothing > 0, "measured")
