"""How a model is spread over GPUs: replicas × (tensor × pipeline × KV-cache parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from specs.devices import DeviceSpec
from specs.errors import InputError, did_you_mean
from specs.models import ModelSpec

Pipeline = Literal["stream", "microbatch"]
MAX_KVP = 1024  # groups of a replica; each has its own part in every batch


@dataclass(frozen=True, slots=True)
class ParallelSpec:
    """The three dimensions of a replica and how many replicas there are (arXiv 2409.17264).

    Raises:
        InputError: at construction, for a size that is not a positive whole number or an unknown pipeline.
    """

    replicas: int = 1
    tp: int = 1  # tensor parallelism: every layer is split over so many GPUs of one node
    spp: int = 1  # stages: the layers are split over so many groups of GPUs
    kvp: int = 1  # KV groups: one long request's cache is cut along the sequence over so many
    pipeline: Pipeline = "stream"  # stream (SPP): a request's chunks follow each other; microbatch: plain PP
    kvp_tokens_per_group: int = 524288  # group g joins once a request has more than g times this many

    def __post_init__(self) -> None:
        for key in ("replicas", "tp", "spp", "kvp", "kvp_tokens_per_group"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"parallel.{key}: must be a whole number of at least 1, not {value!r}")
        if self.kvp > MAX_KVP:
            raise InputError(f"parallel.kvp: {self.kvp} is more than {MAX_KVP}, the most that is simulated")
        known = get_args(Pipeline)
        if self.pipeline not in known:
            hint = did_you_mean(str(self.pipeline), known)
            raise InputError(f"parallel.pipeline: {self.pipeline!r} is none of {', '.join(known)}{hint}")

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica: tp × spp × kvp."""
        return self.tp * self.spp * self.kvp

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.replicas * self.gpus_per_replica

    def check(self, model: ModelSpec, device: DeviceSpec) -> None:
        """Check that `model` can be cut this way on nodes of `device`.

        Raises:
            InputError: naming the key that is wrong and the values that would be right.
        """
        if self.tp > device.gpus_per_node:
            raise InputError(
                f"parallel.tp: {self.tp} is more than the {device.gpus_per_node} GPUs of one {device.name} "
                f"node; possible are {_join(tp_choices(model, device))}, and spp spreads over nodes"
            )
        if self.tp not in tp_choices(model, device):
            over = self.tp > model.num_kv_heads
            problem = "is more than" if over else "must divide"
            raise InputError(
                f"parallel.tp: {self.tp} {problem} the {model.num_kv_heads} KV heads of {model.name} "
                f"({model.num_heads} query heads, MLP of {model.intermediate_size}); "
                f"possible are {_join(tp_choices(model, device))}"
            )
        if self.spp > model.num_layers:
            raise InputError(
                f"parallel.spp: {self.spp} stages are more than the {model.num_layers} layers of {model.name}"
            )

    def layers_of_stage(self, model: ModelSpec) -> tuple[int, ...]:
        """Layers of each stage, as even as possible; the first stages take what is left over.

        The last stage is the one to spare, as it also computes the LM head.
        """
        base, left_over = divmod(model.num_layers, self.spp)
        return tuple(base + (stage < left_over) for stage in range(self.spp))


def tp_choices(model: ModelSpec, device: DeviceSpec) -> list[int]:
    """Tensor-parallel degrees that cut `model` evenly within one node of `device`, ascending."""
    return [
        tp
        for tp in range(1, min(model.num_kv_heads, device.gpus_per_node) + 1)
        if model.num_kv_heads % tp == 0 and model.num_heads % tp == 0 and model.intermediate_size % tp == 0
    ]


def _join(values: list[int]) -> str:
    return ", ".join(map(str, values))
