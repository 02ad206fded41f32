"""``convoy list``: models, devices, policies and profiles there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from experiments.tables import print_table
from experiments.text import number

Row = Sequence[str]


def show(what: str) -> int:
    """Print what there is of one kind."""
    header, rows = _KINDS[what]()
    print_table(header, rows)
    return 0


def _models() -> tuple[Row, Iterable[Row]]:
    from specs import get_model, list_models

    models = [get_model(name) for name in list_models()]
    header = (
        "model",
        "parameters",
        "layers",
        "heads / KV heads",
        "KV bytes a token, bf16",
        "context, tokens",
    )
    return header, [
        (
            model.name,
            _parameters(model.num_parameters),
            str(model.num_layers),
            f"{model.num_heads} / {model.num_kv_heads}",
            f"{model.kv_bytes_per_token():,}",
            f"{model.max_context_tokens:,}",
        )
        for model in models
    ]


def _devices() -> tuple[Row, Iterable[Row]]:
    from specs import get_device, list_devices

    devices = [get_device(name) for name in list_devices()]
    header = ("device", "called", "bf16 FLOP/s", "memory", "bandwidth", "GPUs a node", "USD an hour")
    return header, [
        (
            device.name,
            device.vendor_name,
            f"{number(device.peak_flops['bf16'] / 1e12)} T",
            f"{device.memory_bytes / 2**30:,.1f} GiB",
            f"{device.memory_bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
            str(device.gpus_per_node),
            f"{device.price_usd_per_hour:.2f}",
        )
        for device in devices
    ]


def _policies() -> tuple[Row, Iterable[Row]]:
    from policies.priorities import PRIORITIES, find_priority, installed_priorities
    from policies.routers import (
        CacheAware,
        JoinShortestQueue,
        LeastLoaded,
        LengthPartitioned,
        Random,
        RoundRobin,
    )
    from policies.settings import PRESETS

    routers = {
        "round_robin": RoundRobin,
        "random": Random,
        "least_loaded": LeastLoaded,
        "join_shortest_queue": JoinShortestQueue,
        "length_partitioned": LengthPartitioned,
        "cache_aware": CacheAware,
    }
    rows = [(name, "scheduler.priority", _first_line(kind)) for name, kind in PRIORITIES.items()]
    rows += [
        (name, "scheduler.priority", f"{_first_line(find_priority(name))} ({path})")
        for name, path in installed_priorities().items()
    ]
    rows.append(("module:Class", "scheduler.priority", "Your own subclass of policies.priorities.Priority."))
    rows += [(name, "scheduler.chunking", text) for name, text in _CHUNKING.items()]
    rows += [(name, "scheduler.packing", text) for name, text in _PACKING.items()]
    rows += [(name, "scheduler.preset", _PRESETS[name]) for name in PRESETS]
    rows += [(name, "scheduler.router", _first_line(kind)) for name, kind in routers.items()]
    rows += _SYSTEMS
    return ("policy", "key", "what it does"), rows


_SYSTEMS = [
    ("context parallelism", "parallel.cp", "Ranks in a ring share every prompt (ring or striped attention)."),
    ("LoongServe", "parallel.elastic", "Each batch of whole prompts gets as many replicas as end it first."),
    ("disaggregated prefill", "parallel.decode", "Requests decode on replicas of their own."),
]
_CHUNKING = {
    "whole": "Whole prompts, as in Orca and early vLLM.",
    "static": "chunk_tokens tokens a batch, decodes included, as in Sarathi.",
    "adaptive": "The largest chunk that keeps an iteration within target_iteration_s, as in Medha.",
}
_PRESETS = {"vllm-v1": "vLLM's scheduler since version 1; keys that are given as well win."}
_PACKING = {
    "decode_first": "Decodes, then chunks beside them, as in Sarathi and vLLM v1.",
    "prefill_first": "Prefills alone while there are any, as in vLLM v0.",
}


def _profiles() -> tuple[Row, Iterable[Row]]:
    from profiler.kernels import list_profiles, profile_info

    header = ("device", "name", "source", "created", "versions", "tables (rows)")
    infos = [profile_info(profile.path) for profile in list_profiles()]
    return header, [
        (info["device"], info["name"], info["source"], info["created"], info["versions"], info["tables"])
        for info in infos
    ]


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


_KINDS: dict[str, Callable[[], tuple[Row, Iterable[Row]]]] = {
    "models": _models,
    "devices": _devices,
    "policies": _policies,
    "profiles": _profiles,
}
