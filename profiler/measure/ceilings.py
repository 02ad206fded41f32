"""The two ceilings of a device, measured: how fast it copies, and how fast it multiplies."""

from __future__ import annotations

import math

import torch

from profiler.measure.timing import Call, sample
from specs.devices import DeviceSpec
from specs.models import DTYPE_BYTES


def measure_ceilings(
    spec: DeviceSpec, device: torch.device, dtype_name: str, dtype: torch.dtype, visit_s: float
) -> dict[str, str]:
    """Bandwidth of a copy that no cache holds (bytes read and written) and rate of a large matrix product,
    each with the data sheet's beside it."""
    elements = max(8 * spec.l2_bytes, 1 << 28) // dtype.itemsize
    peak = spec.peak_flops_for(dtype_name)
    size = min(8192, max(1024, 1 << int(math.log2((peak * 0.05) ** (1 / 3)))))
    with torch.inference_mode():
        copy_s = sample(_copy(elements, dtype, device), device, visit_s).time_s
        a = torch.randn(size, size, device=device).to(dtype)
        product_s = sample(lambda i: a @ a, device, visit_s).time_s
    copied = 2.0 * elements * DTYPE_BYTES[dtype_name] / copy_s
    rate = 2.0 * size**3 / product_s
    share = copied / spec.memory_bandwidth_bytes_per_s
    return {
        "copy": f"{copied / 1e9:.1f} GB/s ({share:.0%} of the data sheet)",
        f"matrix product of {size}³": f"{rate / 1e12:.3f} TFLOP/s ({rate / peak:.0%} of the data sheet)",
    }


def _copy(elements: int, dtype: torch.dtype, device: torch.device) -> Call:
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return lambda i: target.copy_(source)
