"""The deployments that a plan chooses from: what each is, what it costs, how it is configured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.grid import Cell
from experiments.load import load_config
from experiments.plan_config import PlanConfig
from experiments.separate import check_sharding
from specs import DeviceSpec, InputError, ModelSpec, ParallelSpec, get_device
from specs.parallel import tp_choices
from traces.workload import Workload

_FEW_STAGES, _STAGES = (1, 2), (1, 2, 4, 8, 16)
_LONG_TOKENS = 32_768  # requests from which more than two stages are worth a try without being asked for
_GROUPS = (1, 2, 4, 8)
_ALL_REPLICAS_TO = 16  # beyond, each number tried is a quarter more than the last; the plan fills in the rest
MAX_DEPLOYMENTS = 20_000

Kind = tuple[str, int, int, int, int, str]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A number of replicas of one kind, on one device, under one policy.

    Attributes:
        changes: what it changes in the configuration, by dotted keys.
        usd_per_hour, gpus: of all its replicas, those that only decode included.
        gpus_per_replica: of one that prefills.
        decode: replicas that only decode, of the same TP; the others then only prefill.
    """

    device: str
    tp: int
    spp: int
    kvp: int
    replicas: int
    policy: str
    changes: Mapping[str, Any] = field(hash=False, compare=False)
    usd_per_hour: float
    gpus: int
    gpus_per_replica: int
    decode: int = 0

    @property
    def kind(self) -> Kind:
        """All but the number of replicas."""
        return self.device, self.tp, self.spp, self.kvp, self.decode, self.policy

    @property
    def name(self) -> str:
        """``2 × h100-sxm (2 replicas of TP 1), lars``."""
        degrees = [f"TP {self.tp}"]
        degrees += [f"SPP {self.spp}"] if self.spp > 1 else []
        degrees += [f"KVP {self.kvp}"] if self.kvp > 1 else []
        replicas = "1 replica" if self.replicas == 1 else f"{self.replicas} replicas"
        pools = f"{self.replicas} to prefill and {self.decode} to decode" if self.decode else replicas
        return f"{self.gpus} × {Path(self.device).stem} ({pools} of {' '.join(degrees)}), {self.policy}"


def default_policies(config: Config) -> dict[str, dict[str, Any]]:
    """First come, first served in static chunks, and LARS in chunks adapted to the tightest TPOT promise."""
    promises = [config.slo.of_class(name).tpot_s for name in config.slo.classes] + [config.slo.tpot_s]
    target_s = min([config.scheduler.target_iteration_s, *(each for each in promises if each is not None)])
    return {
        "fcfs": {"scheduler.priority": "fcfs", "scheduler.chunking": "static"},
        "lars": {
            "scheduler.priority": "lars",
            "scheduler.chunking": "adaptive",
            "scheduler.space_sharing": True,
            "scheduler.target_iteration_s": target_s,
        },
    }


def deployments(config: Config, plan: PlanConfig, model: ModelSpec, workload: Workload) -> list[Deployment]:
    """All deployments within the budget, the cheaper first; of many replicas, some numbers are left out.

    Raises:
        InputError: a device is unknown, has no price, or there are too many deployments, or none.
    """
    if config.parallel.decode is not None:
        raise InputError("parallel.decode: leave it out; plan.decode has the numbers of replicas that decode")
    policies = plan.policies or default_policies(config)
    longest = int((workload.prompt_tokens.astype(np.int64) + workload.output_tokens).max())
    found: list[Deployment] = []
    devices = list(dict.fromkeys(plan.devices or [config.device]))
    for unknown in set(plan.prices) - set(devices):
        raise InputError(f"plan.prices.{unknown}: is not one of the plan's devices ({', '.join(devices)})")
    for name in devices:
        device = get_device(name)
        price = plan.prices.get(name, device.price_usd_per_hour)
        if price <= 0:
            raise InputError(f"plan.prices: {name} has no price; give {name}: USD per GPU and hour")
        for parallel in _shapes(config, plan, model, device, longest):
            for decode, replicas in _pools(plan, parallel):
                for policy, changes in policies.items():
                    found.append(_deployment(name, parallel, replicas, decode, policy, changes, price))
        if len(found) > MAX_DEPLOYMENTS:
            raise InputError(f"plan: that makes more than {MAX_DEPLOYMENTS:,} deployments; name fewer values")
    if not found:
        raise InputError(f"plan: no deployment of {model.name} has {plan.gpus} GPUs or fewer")
    return sorted(found, key=order)


def order(deployment: Deployment) -> tuple[Any, ...]:
    """By cost; among equals, fewer GPUs and the simpler first. A total order."""
    return (
        round(deployment.usd_per_hour, 9),
        deployment.gpus,
        deployment.spp * deployment.kvp,
        deployment.tp,
        deployment.kind,
    )


def replica_numbers(most: int) -> list[int]:
    """From 1 to ``most``: all of them first, then each a quarter more than the last."""
    numbers: list[int] = []
    number = 1
    while number <= most:
        numbers.append(number)
        number = number + 1 if number < _ALL_REPLICAS_TO else -(-number * 5 // 4)
    return numbers


def with_replicas(deployment: Deployment, replicas: int) -> Deployment:
    """The same kind with another number of replicas."""
    gpus = deployment.gpus + (replicas - deployment.replicas) * deployment.gpus_per_replica
    return replace(
        deployment,
        replicas=replicas,
        changes={**deployment.changes, "parallel.replicas": replicas},
        usd_per_hour=deployment.usd_per_hour / deployment.gpus * gpus,
        gpus=gpus,
    )


def cell_of(
    deployment: Deployment,
    path: Path,
    overrides: Sequence[str],
    load: float,
    requests: int | None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Cell:
    """The simulation of a deployment at ``load`` times the traffic, with the first ``requests`` requests and
    ``more`` changes, by dotted keys.

    Raises:
        InputError: the configuration doesn't allow it.
    """
    changes = {**deployment.changes, **at_load(load_config(path, overrides), load), **more}
    if requests is not None:
        changes["workload.num_requests"] = requests
    config = load_config(path, overrides, changes).model_copy(
        update={"sweep": None, "plan": None, "capacity": None}
    )
    return Cell.of(changes, config)


def at_load(config: Config, load: float) -> dict[str, Any]:
    """What multiplies the traffic by ``load``: rates, times between arrivals of a trace, or clients."""
    if load == 1.0:
        return {}
    arrivals = config.workload.arrivals
    kind = arrivals.get("process")
    if kind == "trace":
        return {"workload.arrivals.time_scale": arrivals.get("time_scale", 1.0) / load}
    if kind == "closed_loop":
        return {"workload.arrivals.concurrency": max(round(arrivals["concurrency"] * load), 1)}
    return {"workload.arrivals.rate_rps": arrivals["rate_rps"] * load}


def is_random(config: Config) -> bool:
    """Whether another seed makes another run: not for a trace at its own times."""
    drawn = "distribution" in config.workload.lengths or config.scheduler.router == "random"
    return drawn or config.workload.arrivals.get("process") in ("poisson", "gamma")


def _deployment(
    device: str,
    parallel: ParallelSpec,
    replicas: int,
    decode: int,
    policy: str,
    policy_changes: Mapping[str, Any],
    usd: float,
) -> Deployment:
    changes = {
        **policy_changes,
        "device": device,
        "parallel.tp": parallel.tp,
        "parallel.spp": parallel.spp,
        "parallel.kvp": parallel.kvp,
        "parallel.replicas": replicas,
    }
    if decode:
        changes["parallel.decode"] = {"replicas": decode}
    each = parallel.gpus_per_replica
    gpus = each * (replicas + decode)
    shape = parallel.tp, parallel.spp, parallel.kvp
    return Deployment(device, *shape, replicas, policy, changes, usd * gpus, gpus, each, decode)


def _pools(plan: PlanConfig, parallel: ParallelSpec) -> Iterator[tuple[int, int]]:
    """(replicas that only decode, the others) within the budget. Pools apart are of TP alone."""
    most = plan.gpus // parallel.gpus_per_replica
    for decode in plan.decode:
        if decode and parallel.spp * parallel.kvp * parallel.cp > 1:
            continue
        numbers = plan.replicas or replica_numbers(most - decode)
        yield from ((decode, replicas) for replicas in numbers if replicas + decode <= most)


def _shapes(
    config: Config, plan: PlanConfig, model: ModelSpec, device: DeviceSpec, longest: int
) -> Iterator[ParallelSpec]:
    """The ways to cut a replica that the model and the device allow."""
    parallel = config.parallel
    groups = _GROUPS if longest > parallel.kvp_tokens_per_group else (1,)
    stages = _STAGES if longest >= _LONG_TOKENS else _FEW_STAGES
    for tp in plan.tp or tp_choices(model, device):
        for spp in plan.spp or stages:
            for kvp in plan.kvp or groups:
                changed = {"replicas": 1, "tp": tp, "spp": spp, "kvp": kvp}
                try:
                    shape = ParallelSpec(**(parallel.shape | changed))
                    if shape.gpus_per_replica > plan.gpus:
                        continue
                    shape.check(model, device)
                    check_sharding(shape, config.scheduler.kv.block_tokens)
                except InputError:
                    if plan.tp is not None and len(plan.tp) == 1:
                        raise
                    continue
                yield shape
