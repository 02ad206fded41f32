"""What no deployment can beat: memory, FLOP ÷ peak, bytes ÷ bandwidth; rules out without simulating."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.build import fit_config_memory
from experiments.config import Config
from experiments.text import number, percent, seconds
from policies.sharding import Sharding
from specs import DeviceSpec, InputError, ModelSpec, ParallelSpec, get_device
from specs.models import dtype_bytes
from traces.workload import Workload

FloatArray = NDArray[np.float64]
_WORST_LONE_EFFICIENCY = 0.05  # of the peak: no prompt prefills alone at less, so deadlines end before that


@dataclass(frozen=True, slots=True)
class Demand:
    """What a workload asks for, whatever serves it.

    Attributes:
        allowed: requests of each class that may miss their SLO.
        prefill_flops: [n], of each request's prompt.
        flops, read_bytes: of all requests but the dearest that may miss; whole prompts and outputs. Bytes
            count the KV cache once for every output token, and the weights once a batch as large as allowed.
        span_s: between the first and the last arrival; None for a closed loop.
    """

    model: ModelSpec
    workload: Workload
    classes: NDArray[np.uint8]
    allowed: tuple[int, ...]
    prefill_flops: FloatArray
    flops: float
    read_bytes: float
    weight_bytes: float
    span_s: float | None


def demand(config: Config, model: ModelSpec, workload: Workload, attainment: float) -> Demand:
    """Add up what ``workload`` needs at least for ``attainment`` of each class to be served."""
    n = len(workload)
    classes = workload.slo_class if workload.slo_class is not None else np.zeros(n, dtype=np.uint8)
    counts = np.bincount(classes, minlength=len(workload.slo_names))
    allowed = tuple(allowance(int(count), attainment) for count in counts)
    prompt, output = workload.prompt_tokens.astype(np.float64), workload.output_tokens.astype(np.float64)
    per_pair = 4.0 * model.num_heads * model.head_dim * model.num_layers
    prefill = model.linear_flops_per_token() * prompt + per_pair * prompt * prompt / 2
    contexts = (output - 1) * (prompt + output / 2)  # summed over the output tokens after the first
    flops = prefill + model.linear_flops_per_token() * (output - 1) + per_pair * contexts
    kv_bytes = contexts * model.kv_bytes_per_token(config.dtype.kv)
    weights = model.num_layers * model.layer_linear_weights * dtype_bytes(config.dtype.weight, "dtype.weight")
    weights += 2 * model.vocab_size * model.hidden_size  # the LM head
    spared = sum(allowed)
    batches = _lightest(output - 1, spared) / config.scheduler.max_batch_requests
    arrivals = workload.arrival_s
    return Demand(
        model=model,
        workload=workload,
        classes=classes,
        allowed=allowed,
        prefill_flops=prefill,
        flops=_lightest(flops, spared),
        read_bytes=_lightest(kv_bytes, spared) + batches * weights,
        weight_bytes=float(weights),
        span_s=None if arrivals is None else float(arrivals[-1] - arrivals[0]),
    )


def allowance(requests: int, attainment: float) -> int:
    """How many of so many requests may miss if ``attainment`` of them must not."""
    return int(np.floor(requests * (1.0 - attainment) + 1e-9))


def ruled_out(config: Config, needs: Demand) -> str | None:
    """Why the deployment of ``config`` can't hold the SLOs, or None if these bounds don't say.

    Only what is certain counts: a deployment that is let through may still miss them.
    """
    device = get_device(config.device)
    parallel = ParallelSpec(**config.parallel.shape)
    try:
        capacity = fit_config_memory(config, needs.model, device, parallel).kv_capacity_tokens
    except InputError as error:
        return f"memory: {str(error).split(': ', 1)[-1].split(';')[0]}"
    return (
        _too_long(needs, capacity, parallel)
        or _too_slow(config, needs, device, parallel)
        or _too_much(config, needs, device, parallel)
    )


def _too_long(needs: Demand, capacity: int, parallel: ParallelSpec) -> str | None:
    sharding = Sharding(parallel.kvp, parallel.kvp_tokens_per_group)
    total = needs.workload.prompt_tokens.astype(np.int64) + needs.workload.output_tokens - 1
    full = (sharding.groups - 1) * sharding.tokens_per_group
    largest = np.maximum(np.minimum(total, sharding.tokens_per_group) if full else total, total - full)
    if _more_than_allowed(largest > capacity, needs):
        return (
            f"KV memory: holds {capacity:,} tokens, too few for {int((largest > capacity).sum()):,} requests"
        )
    return None


def _too_slow(config: Config, needs: Demand, device: DeviceSpec, parallel: ParallelSpec) -> str | None:
    """Requests that would miss if each were alone."""
    step_s = needs.weight_bytes / (parallel.tp * device.memory_bandwidth_bytes_per_s)
    peak = device.peak_flops_for(config.dtype.weight) * parallel.gpus_per_replica
    first_s = needs.prefill_flops / peak
    missed: NDArray[np.bool_] = np.zeros(len(needs.classes), dtype=bool)
    reason = ""
    for code, name in enumerate(needs.workload.slo_names):
        slo, mine = config.slo.of_class(name), needs.classes == code
        if slo.tpot_s is not None and step_s > slo.tpot_s:
            missed |= mine & (needs.workload.output_tokens > 1)
            reason = f"bandwidth: a token takes {seconds(step_s)} at least, {seconds(slo.tpot_s)} is promised"
        if slo.ttft.multiplier == 0:
            late = mine & (first_s > slo.ttft.floor_s)
            missed |= late
            reason = reason or (
                f"compute: {int(late.sum()):,} prompts take over {seconds(slo.ttft.floor_s)} at the peak rate"
            )
    return reason if _more_than_allowed(missed, needs) else None


def _too_much(config: Config, needs: Demand, device: DeviceSpec, parallel: ParallelSpec) -> str | None:
    """More work than can be done until the last promise runs out."""
    if needs.span_s is None:
        return None
    peak = device.peak_flops_for(config.dtype.weight)
    grace_s = 0.0
    for name in needs.workload.slo_names:
        slo = config.slo.of_class(name)
        if slo.tpot_s is None:
            return None
        alone_s = float(needs.prefill_flops.max()) / (
            peak * parallel.gpus_per_replica * _WORST_LONE_EFFICIENCY
        )
        promised_s = max(slo.ttft.multiplier * alone_s, slo.ttft.floor_s)
        grace_s = max(grace_s, promised_s + slo.tpot_s * float(needs.workload.output_tokens.max()))
    decoding = 0 if config.parallel.decode is None else config.parallel.decode.replicas * parallel.tp
    available_s = (needs.span_s + grace_s) * (parallel.gpus + decoding)
    compute = needs.flops / peak / available_s
    bandwidth = needs.read_bytes / device.memory_bandwidth_bytes_per_s / available_s
    if max(compute, bandwidth) <= 1.0:
        return None
    what, share = ("compute", compute) if compute >= bandwidth else ("bandwidth", bandwidth)
    times = number(share) if share >= 2 else percent(share)
    return f"{what}: needs {times}{' times' if share >= 2 else ''} what the GPUs have at their peak"


def _more_than_allowed(missed: NDArray[np.bool_], needs: Demand) -> bool:
    counts = np.bincount(needs.classes[missed], minlength=len(needs.allowed))
    return bool((counts > np.array(needs.allowed)).any())


def _lightest(values: FloatArray, spared: int) -> float:
    """The sum without the ``spared`` largest."""
    kept = np.sort(values)[: len(values) - spared]
    return float(kept.sum())
