"""Which formula belongs to which operator on which device."""

from __future__ import annotations

from collections.abc import Callable

from profiler.cpu_operators import (
    CpuCollective,
    CpuDecodeAttention,
    CpuElementwise,
    CpuGemm,
    CpuPrefillAttention,
    CpuShardAttention,
    is_cpu,
)
from profiler.physics import Physics
from profiler.roofline import AllReduce, DecodeAttention, Gemm, PrefillAttention
from profiler.small_operators import AllGather, Elementwise, SendReceive, ShardAttention
from profiler.work import KINDS
from specs.devices import DeviceSpec

_COLLECTIVES: dict[str, Callable[[DeviceSpec], Physics]] = {
    "all_reduce": AllReduce,
    "all_gather": AllGather,
    "send_recv": SendReceive,
}
_ON_GPU: dict[str, Callable[[DeviceSpec, str, int], Physics]] = {
    "gemm": Gemm,
    "prefill_attention": PrefillAttention,
    "decode_attention": DecodeAttention,
    "shard_attention": ShardAttention,
}
_ON_CPU: dict[str, Callable[[DeviceSpec, str, int], Physics]] = {
    "gemm": CpuGemm,
    "prefill_attention": CpuPrefillAttention,
    "decode_attention": CpuDecodeAttention,
    "shard_attention": CpuShardAttention,
}
MODELLED = (*_ON_GPU, *KINDS, *_COLLECTIVES)


def make_physics(device: DeviceSpec, operator: str, dtype: str, cached_bytes: int = 0) -> Physics:
    """The formula of an operator on a device, `cached_bytes` of whose data are in its last-level cache.

    Raises:
        InputError: the device doesn't compute in `dtype`.
    """
    if is_cpu(device):
        if operator in _COLLECTIVES:
            return CpuCollective(device, operator)
        if operator in KINDS:
            return CpuElementwise(device, operator)
        return _ON_CPU[operator](device, dtype, cached_bytes)
    if operator in _COLLECTIVES:
        return _COLLECTIVES[operator](device)
    if operator in KINDS:
        return Elementwise(device, operator)
    return _ON_GPU[operator](device, dtype, cached_bytes)
