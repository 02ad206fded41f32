"""How a model is spread over GPUs: replicas × (tensor × pipeline × KV-cache parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from specs.devices import DeviceSpec
from specs.errors import InputError, did_you_mean
from specs.models import ModelSpec

Pipeline = Literal["stream", "microbatch"]
Ring = Literal["striped", "contiguous"]
RingMerge = Literal["end", "step", "eager"]
MAX_KVP = 1024  # groups of a replica; each has its own part in every batch
MAX_CP = 1024


@dataclass(frozen=True, slots=True)
class ParallelSpec:
    """The dimensions of a replica and how many replicas there are (arXiv 2409.17264).

    Context parallelism is an alternative to the pipeline and to KV groups: ``cp`` > 1 goes with neither.

    Raises:
        InputError: at construction, for a size that is not a positive whole number, an unknown pipeline,
            ring or merge, or dimensions that don't go together.
    """

    replicas: int = 1
    tp: int = 1  # tensor parallelism: every layer is split over so many GPUs of one node
    spp: int = 1  # stages: the layers are split over so many groups of GPUs
    kvp: int = 1  # KV groups: one long request's cache is cut along the sequence over so many
    pipeline: Pipeline = "stream"  # stream (SPP): a request's chunks follow each other; microbatch: plain PP
    kvp_tokens_per_group: int = 524288  # group g joins once a request has more than g times this many
    cp: int = 1  # context parallelism: the tokens of a prompt are split over so many ranks in a ring
    ring: Ring = "striped"  # which tokens a rank has: every cp-th, or a contiguous part
    ring_merge: RingMerge = "step"  # of partial results: at the end, or each step by one or several kernels

    def __post_init__(self) -> None:
        for key in ("replicas", "tp", "spp", "kvp", "kvp_tokens_per_group", "cp"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"parallel.{key}: must be a whole number of at least 1, not {value!r}")
        if self.kvp > MAX_KVP:
            raise InputError(f"parallel.kvp: {self.kvp} is more than {MAX_KVP}, the most that is simulated")
        if self.cp > MAX_CP:
            raise InputError(f"parallel.cp: {self.cp} is more than {MAX_CP}, the most that is simulated")
        for key, kinds in (("pipeline", Pipeline), ("ring", Ring), ("ring_merge", RingMerge)):
            value, known = getattr(self, key), get_args(kinds)
            if value not in known:
                hint = did_you_mean(str(value), known)
                raise InputError(f"parallel.{key}: {value!r} is none of {', '.join(known)}{hint}")
        if self.cp > 1 and self.spp * self.kvp > 1:
            other = "spp" if self.spp > 1 else "kvp"
            raise InputError(
                f"parallel.cp: {self.cp} ranks in a ring don't go together with parallel.{other} "
                f"{getattr(self, other)}; one of the two must be 1"
            )

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica: tp × spp × kvp × cp."""
        return self.tp * self.spp * self.kvp * self.cp

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
