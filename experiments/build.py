"""From a configuration to everything a simulation needs: the one place where the rooms are put together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.config import Config, SloClassConfig
from experiments.keys import suggestion
from experiments.separate import SeparatePools, check_sharding
from policies.priorities import PRIORITIES, find_priority
from policies.scheduler import SchedulerSettings
from policies.sharding import Sharding
from policies.slo import Slo, TtftTarget
from profiler.iteration import HostOverhead, IterationModel
from profiler.kernels import Kernels, load_kernels
from profiler.ring import RingModel
from profiler.step_kernels import StepKernels
from sim.cluster import Setup
from sim.cost import IterationCost
from specs import (
    DeviceSpec,
    InputError,
    MemoryFit,
    ModelSpec,
    ParallelSpec,
    fit_memory,
    get_device,
    get_model,
)
from traces.build import build_workload
from traces.workload import Workload


@dataclass(frozen=True, slots=True)
class Experiment:
    """A configuration made real.

    Attributes:
        parallel, memory, iteration: of the replicas where requests arrive.
        decode_parallel: of those where they decode, if that is elsewhere.
        notes: what a reader of the results should know, one line each.
    """

    config: Config
    model: ModelSpec
    device: DeviceSpec
    parallel: ParallelSpec
    memory: MemoryFit
    iteration: IterationModel
    workload: Workload
    setup: Setup
    notes: tuple[str, ...]
    decode_parallel: ParallelSpec | None = None

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.parallel.gpus + (0 if self.decode_parallel is None else self.decode_parallel.gpus)

    def perturbed_setup(self, factors: Mapping[str, float]) -> Setup:
        """The setup with every operator's times multiplied by its factor; see ``Kernels.perturbed``."""

        def perturbed(cost: IterationCost) -> IterationCost:
            assert isinstance(cost, IterationModel)
            return cost.perturbed(factors)

        return self.setup.with_costs(perturbed)

    @property
    def tpot_targets_s(self) -> tuple[float | None, ...]:
        """TPOT target of each SLO class of the workload, seconds."""
        return tuple(slo.tpot_s for slo in self.setup.slos)


def build(config: Config, where: str) -> Experiment:
    """Read the model, the device, the profile and the workload, and check that they go together.

    ``where`` begins every message: the configuration's file.

    Raises:
        InputError: something is missing, doesn't fit or isn't simulated.
    """
    with errors_from(where):
        model, device = get_model(config.model), get_device(config.device)
        parallel = ParallelSpec(**config.parallel.shape)
        check_sharding(parallel, config.scheduler.kv.block_tokens)
        stages = max(parallel.spp, 1 if config.parallel.decode is None else config.parallel.decode.spp)
        if config.scheduler.async_scheduling and stages > 1:
            raise InputError(f"scheduler.async_scheduling: is for replicas of one stage; an spp is {stages}")
        memory = fit_config_memory(config, model, device, parallel)
        settings = _scheduler_settings(config)
        workload, closed_loop = build_workload(
            config.workload.lengths,
            config.workload.arrivals,
            config.workload.num_requests,
            config.workload.duration_s,
            config.seed,
            Path(),
        )
        slos = _slos(config, workload.slo_names)
        sharding = Sharding(parallel.kvp, parallel.kvp_tokens_per_group)
        fit = partial(fit_config_memory, config, model, device)
        pools = SeparatePools(config, model, device, parallel, fit)
        notes = _check_lengths(workload, model, memory, sharding, pools)
        notes += _check_prefixes(workload, config)
        make_cost = partial(_iteration_model, config, model, device, workload)
        iteration = make_cost(parallel)
        scheduler = config.scheduler
        setup = Setup(
            cost=iteration,
            kv_capacity_tokens=memory.kv_capacity_tokens,
            scheduler=settings,
            replicas=parallel.replicas,
            sharding=sharding,
            slos=slos,
            router=scheduler.router,
            length_threshold_tokens=scheduler.length_threshold_tokens,
            long_replicas=scheduler.long_replicas,
            closed_loop=closed_loop,
            send_until_s=config.workload.duration_s,
            seed=config.seed,
            stop_s=config.stop_s,
            prefix_block_tokens=None if workload.prefix is None else workload.prefix.block_tokens,
            decode=pools.decode_setup(make_cost),
            elastic=pools.elastic_setup(make_cost),
        )
    return Experiment(
        config,
        model,
        device,
        parallel,
        memory,
        iteration,
        workload,
        setup,
        notes,
        pools.decode,
    )


@contextmanager
def errors_from(where: str) -> Iterator[None]:
    """Put the configuration's file before the message of bad input."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _scheduler_settings(config: Config) -> SchedulerSettings:
    scheduler = config.scheduler
    if ":" in scheduler.priority:
        sys.path.insert(0, str(Path.cwd()))  # where a user's own module is; the command's path leaves it out
    try:
        find_priority(scheduler.priority)
    except InputError as error:
        raise InputError(f"scheduler.priority: {error}") from None
    check_priority(scheduler.priority)
    own = {"preset", "router", "length_threshold_tokens", "long_replicas", "kv"}
    return SchedulerSettings(
        **scheduler.model_dump(exclude=own), **scheduler.kv.model_dump(), pipeline=config.parallel.pipeline
    )


def check_priority(name: str) -> None:
    """Try a user's own priority on a request.

    Raises:
        InputError: it can't be made, or its key is no number.
    """
    if name in PRIORITIES:
        return
    from policies.cost import PrefillWork
    from policies.request import Request

    try:
        priority = find_priority(name)(PrefillWork(_NoCost(), target_s=0.05))
        request = Request(0, 1.0, 1000, 10, work_s=1.0, deadline_s=1.5)
        key = priority.key(request, 2.0)
        key = float(key) if isinstance(key, int | float | np.number) else key
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise InputError(
            f"scheduler.priority: '{name}' fails on a request: {text}; "
            "it needs key(self, request, now_s), which returns a number"
        ) from None
    if not isinstance(key, float) or key != key:
        raise InputError(
            f"scheduler.priority: '{name}' gives {key!r} as a request's key; it must be a number"
        )


class _NoCost:
    """Some cost model to try a priority with."""

    def tokens_s(self, tokens: int, rows: int, requests: int) -> float:
        return 1e-3 + 1e-5 * tokens

    def chunk_attention_s(self, chunk_tokens: int, context_tokens: int) -> float:
        return 1e-9 * chunk_tokens * context_tokens

    def decode_attention_s(self, decodes: int, total_context: int) -> float:
        return 1e-9 * total_context


def fit_config_memory(
    config: Config, model: ModelSpec, device: DeviceSpec, parallel: ParallelSpec
) -> MemoryFit:
    """What the configuration leaves for the KV cache; see :func:`specs.fit_memory`."""
    return fit_memory(
        model,
        device,
        parallel,
        weight_dtype=config.dtype.weight,
        kv_dtype=config.dtype.kv,
        memory_utilization=config.memory_utilization,
        max_batch_tokens=_batch_tokens(config),
        max_batch_requests=config.scheduler.max_batch_requests,
    )


def _batch_tokens(config: Config) -> int:
    """The most tokens a batch holds: a static chunk is a budget for the decodes as well."""
    scheduler = config.scheduler
    if scheduler.chunking == "static":
        return max(scheduler.chunk_tokens, scheduler.max_batch_requests)
    return scheduler.max_batch_tokens


def _iteration_model(
    config: Config,
    model: ModelSpec,
    device: DeviceSpec,
    workload: Workload,
    parallel: ParallelSpec,
    is_inter_node: bool | None = None,
) -> IterationModel:
    """The cost model of one replica; ``is_inter_node``: whether a ring leaves a node, if that is known."""
    kernels = _kernels(config, model, device, parallel)
    if factors := config.predictor.factors:
        for name in factors:
            if name not in kernels.operators:
                raise InputError(
                    f"predictor.factors.{name}: is no operator with a table in this profile"
                    f"{suggestion(name, tuple(kernels.operators))} ({', '.join(sorted(kernels.operators))})"
                )
        kernels = kernels.perturbed(factors)
    scheduler = config.scheduler
    longest_chunk = max(scheduler.max_chunk_tokens, scheduler.chunk_tokens)
    if scheduler.chunking == "whole":
        # Recomputation after a preemption runs over the output too.
        longest = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
        longest_chunk = max(longest_chunk, int(longest.max()))
    host = config.predictor.host
    kind = IterationModel if parallel.cp == 1 else partial(RingModel, is_inter_node=is_inter_node)
    return kind(
        model,
        kernels,
        parallel,
        max_batch_tokens=max(scheduler.max_batch_tokens, longest_chunk),
        max_batch_requests=scheduler.max_batch_requests,
        max_chunk_tokens=longest_chunk,
        host=None if host is None else HostOverhead(**host.model_dump()),
        graph_tokens=graph_sizes(config.predictor.cuda_graphs),
    )


def _kernels(config: Config, model: ModelSpec, device: DeviceSpec, parallel: ParallelSpec) -> Kernels:
    """Kernel times as the configuration wants them."""
    predictor, dtype = config.predictor, config.dtype
    if predictor.steps is not None:
        return _step_kernels(config, model, device, parallel)
    return load_kernels(
        device,
        predictor.source,
        weight_dtype=dtype.weight,
        kv_dtype=dtype.kv,
        profile=None if predictor.profile is None else Path(predictor.profile),
        model=model,
        tp=parallel.tp,
    )


def _step_kernels(
    config: Config, model: ModelSpec, device: DeviceSpec, parallel: ParallelSpec
) -> StepKernels:
    """Those of an engine whose steps were timed as a whole."""
    steps, dtype = config.predictor.steps, config.dtype
    assert steps is not None
    for key in ("profile", "host", "cuda_graphs"):
        if getattr(config.predictor, key):
            raise InputError(f"predictor.{key}: predictor.steps has it all; leave out one of them")
    for key in ("spp", "kvp", "cp"):
        if getattr(parallel, key) > 1:
            raise InputError(
                f"parallel.{key}: predictor.steps are those of one stage and one group; 1 would do"
            )
    if parallel.tp != steps.tp:
        raise InputError(f"parallel.tp: predictor.steps are those of tp {steps.tp}, not of {parallel.tp}")
    return StepKernels(
        device, model, steps.tokens, steps.seconds, weight_dtype=dtype.weight, kv_dtype=dtype.kv
    )


def graph_sizes(largest: int) -> tuple[int, ...]:
    """Batches that vLLM makes CUDA graphs for, up to ``largest`` tokens: 1, 2, 4, multiples of 8 below 256
    and of 16 from there."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    return tuple(size for size in sizes if size <= largest)


def _slos(config: Config, names: tuple[str, ...]) -> tuple[Slo, ...]:
    for name in config.slo.classes:
        if name not in names:
            known = f"{suggestion(name, names)} ({', '.join(names)})"
            raise InputError(f"slo.classes.{name}: the workload has no such class{known}")
    return tuple(slo_of(config.slo.of_class(name)) for name in names)


def slo_of(promise: SloClassConfig) -> Slo:
    """What a class was promised, as the scheduler takes it."""
    return Slo(TtftTarget(promise.ttft.multiplier, promise.ttft.floor_s), promise.tpot_s)


def _check_lengths(
    workload: Workload, model: ModelSpec, memory: MemoryFit, sharding: Sharding, pools: SeparatePools
) -> tuple[str, ...]:
    """Notes on requests that are too long for the KV cache or for the model; an error if all are."""
    longest = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
    limits = pools.limits(memory, sharding, longest - 1, workload.prompt_tokens.astype(np.int64))
    too_long = np.zeros(len(longest), dtype=np.bool_)
    for limit in limits:
        too_long |= (stored := _largest_shard(limit.tokens, limit.sharding)) > limit.capacity_tokens
        if (stored > limit.capacity_tokens).all():
            raise InputError(
                f"workload.lengths: the KV cache of {limit.holder} holds {limit.capacity_tokens:,} tokens, "
                f"and even the shortest request has {int(stored.min()):,} there; give it more GPUs "
                f"({limit.keys}), or take kv: fp8 in dtype"
            )
    over = int(np.count_nonzero(too_long))
    of_all = f"of the workload's {len(longest):,} requests"
    if over == len(longest):
        raise InputError("workload.lengths: every request is too long for the KV caches that it needs")
    notes = [f"The trace: {note}." for note in workload.notes]
    if over:
        held = " or ".join(
            f"the {limit.capacity_tokens:,} tokens that the KV cache of {limit.holder} holds"
            for limit in limits
        )
        notes.append(f"{over:,} {of_all} need more than {held}; they are rejected.")
    beyond = int(np.count_nonzero(longest > model.max_context_tokens))
    if beyond:
        notes.append(
            f"{beyond:,} {of_all} are longer than the {model.max_context_tokens:,} tokens that {model.name} "
            "was made for; they are timed as if it could."
        )
    if sharding.groups > 1 and longest.max() - 1 <= sharding.tokens_per_group:
        notes.append(
            f"No request is longer than the {sharding.tokens_per_group:,} tokens of one KVP group "
            "(parallel.kvp_tokens_per_group): the groups work side by side, never together."
        )
    if model.sliding_window is not None and int(longest.max()) > model.sliding_window:
        notes.append(
            f"{model.name} attends to the last {model.sliding_window:,} tokens only; attention is timed, and "
            "its KV cache counted, as if to all of them."
        )
    return tuple(notes)


def _check_prefixes(workload: Workload, config: Config) -> tuple[str, ...]:
    """Notes on what requests share, and whether that is used.

    Raises:
        InputError: prefixes can't be cached as the configuration asks.
    """
    prefix, kv = workload.prefix, config.scheduler.kv
    if not kv.prefix_caching:
        if prefix is None:
            return ()
        return ("Prefixes that requests share are not reused (scheduler.kv.prefix_caching): every prompt is "
            "computed in full.",)  # fmt: skip
    if config.parallel.kvp > 1:
        raise InputError(
            f"scheduler.kv.prefix_caching: prefixes can't be cached over several KVP groups; parallel.kvp is "
            f"{config.parallel.kvp}, 1 would do"
        )
    if prefix is None:
        return ("The workload doesn't say what prompts share, so no prefix is found in the cache.",)
    if prefix.block_tokens % kv.block_tokens:
        raise InputError(
            f"scheduler.kv.block_tokens: {kv.block_tokens} doesn't divide the {prefix.block_tokens} tokens "
            f"of the workload's prefix blocks, as prefix caching needs; {gcd(prefix.block_tokens, 16)} would"
        )
    return ()


def _largest_shard(tokens: NDArray[np.int64], sharding: Sharding) -> NDArray[np.int64]:
    """The most tokens that any group holds of requests with so many tokens each."""
    full = (sharding.groups - 1) * sharding.tokens_per_group
    return np.maximum(np.minimum(tokens, sharding.tokens_per_group) if full else tokens, tokens - full)
