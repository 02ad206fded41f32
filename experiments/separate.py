"""Prefills and decodes in different places: what a configuration says of it, for the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from experiments.config import Config
from policies.elastic import ElasticSettings
from policies.sharding import Sharding
from profiler.iteration import IterationModel
from sim.setup import DecodeSetup, ElasticSetup, NetworkSetup
from specs import DeviceSpec, InputError, MemoryFit, ModelSpec, ParallelSpec
from specs.models import dtype_bytes
from specs.topology import first_nodes, layout_of

MakeCost = Callable[..., IterationModel]
"""From a ``ParallelSpec``, and whether a ring leaves a node, to the cost model of a replica."""


def check_sharding(parallel: ParallelSpec, block_tokens: int) -> None:
    """Refuse a KV cache that would be cut within a block.

    Raises:
        InputError: naming the key, and the nearest size that would do.
    """
    tokens = parallel.kvp_tokens_per_group
    if parallel.kvp > 1 and tokens % block_tokens:
        nearest = max(round(tokens / block_tokens), 1) * block_tokens
        raise InputError(
            f"parallel.kvp_tokens_per_group: {tokens} is no multiple of scheduler.kv.block_tokens "
            f"({block_tokens}); {nearest} would be"
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """How many tokens of a request a KV cache holds: of ``tokens``, those of its largest shard."""

    holder: str
    keys: str  # which would make it larger
    tokens: NDArray[np.int64]
    sharding: Sharding
    capacity_tokens: int


class SeparatePools:
    """The replicas that only decode, and the elastic ones, if a configuration has such.

    Attributes:
        decode: how those that decode are parallel; None if requests decode where they prefill.
        decode_memory: what their GPUs hold.
    """

    def __init__(
        self,
        config: Config,
        model: ModelSpec,
        device: DeviceSpec,
        parallel: ParallelSpec,
        fit: Callable[[ParallelSpec], MemoryFit],
    ) -> None:
        self._config, self._model, self._device, self._parallel = config, model, device, parallel
        self.decode: ParallelSpec | None = None
        self.decode_memory: MemoryFit | None = None
        section = config.parallel.decode
        if section is not None:
            try:
                self.decode = ParallelSpec(
                    replicas=section.replicas,
                    tp=section.tp or parallel.tp,
                    spp=section.spp,
                    kvp=section.kvp,
                    kvp_tokens_per_group=section.kvp_tokens_per_group,
                )
                check_sharding(self.decode, config.scheduler.kv.block_tokens)
                self.decode_memory = fit(self.decode)
            except InputError as error:
                text = str(error).replace("parallel.", "parallel.decode.")
                raise InputError(text.replace("model: ", "parallel.decode: ", 1)) from None

    def limits(
        self,
        memory: MemoryFit,
        sharding: Sharding,
        longest: NDArray[np.int64],
        prompts: NDArray[np.int64],
    ) -> list[Limit]:
        """The KV caches that a request goes through; ``memory`` and ``sharding`` are of the replicas where it
        arrives, where it needs room for its prompt, or for its ``longest`` length if it decodes there."""
        keys, name = "parallel.tp, parallel.spp", "a replica" if sharding.groups == 1 else "a KVP group"
        if self.decode is None or self.decode_memory is None:
            return [Limit(name, keys, longest, sharding, memory.kv_capacity_tokens)]
        capacity = memory.kv_capacity_tokens
        elastic = self._config.parallel.elastic
        if elastic is not None:
            ranks = min(elastic.max_cp, self._parallel.replicas - elastic.reserved_replicas)
            capacity, keys, name = capacity * ranks, "parallel.elastic.max_cp", f"{ranks} replicas"
        there = Sharding(self.decode.kvp, self.decode.kvp_tokens_per_group)
        decodes = "a replica that decodes" if there.groups == 1 else "a KVP group that decodes"
        return [
            Limit(f"{name} that prefill{'' if elastic else 's'}", keys, prompts, sharding, capacity),
            Limit(
                decodes,
                "parallel.decode.tp, .spp",
                longest,
                there,
                self.decode_memory.kv_capacity_tokens,
            ),
        ]

    def decode_setup(self, make_cost: MakeCost) -> DecodeSetup | None:
        """The replicas that decode, for the simulator."""
        section, decode = self._config.parallel.decode, self.decode
        if section is None or decode is None or self.decode_memory is None:
            return None
        return DecodeSetup(
            cost=make_cost(decode),
            kv_capacity_tokens=self.decode_memory.kv_capacity_tokens,
            replicas=decode.replicas,
            sharding=Sharding(decode.kvp, decode.kvp_tokens_per_group),
            network=self._network(decode) if section.transfer == "after" else None,
        )

    def elastic_setup(self, make_cost: MakeCost) -> ElasticSetup | None:
        """Elastic context parallelism, for the simulator: a cost model for every size of a group."""
        section, parallel, device = self._config.parallel.elastic, self._parallel, self._device
        if section is None:
            return None
        most = min(section.max_cp, parallel.replicas)
        alone = make_cost(replace(parallel, cp=1))
        costs = [(alone, alone)]
        for ranks in range(2, most + 1):
            ring = replace(parallel, cp=ranks)
            costs.append((make_cost(ring, False), make_cost(ring, True)))
        layout = layout_of(replace(parallel, cp=1), device.gpus_per_node)
        (nodes,) = first_nodes([(parallel.replicas, layout)], device.gpus_per_node)
        return ElasticSetup(ElasticSettings(**section.model_dump()), costs, nodes)

    def _network(self, decode: ParallelSpec) -> NetworkSetup:
        device, model = self._device, self._model
        return NetworkSetup(
            intra_node=device.intra_node,
            inter_node=device.inter_node,
            gpus_per_node=device.gpus_per_node,
            tp_of_prefill=self._parallel.tp,
            tp_of_decode=decode.tp,
            prefill_layout=layout_of(self._parallel, device.gpus_per_node),
            decode_layout=layout_of(decode, device.gpus_per_node),
            layer_bytes_per_token=2.0 * model.kv_size * dtype_bytes(self._config.dtype.kv, "dtype.kv"),
        )
