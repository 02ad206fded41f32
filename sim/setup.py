"""What is simulated, besides the workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from policies.elastic import ElasticSettings
from policies.scheduler import SchedulerSettings
from policies.sharding import Sharding
from policies.slo import Slo
from sim.cost import IterationCost
from specs.devices import Link
from specs.topology import Layout
from traces.synthesis import ClosedLoop


@dataclass(frozen=True, slots=True)
class NetworkSetup:
    """The links that KV caches move over, and where replicas lie.

    Args:
        intra_node, inter_node: the links of one GPU.
        gpus_per_node: GPUs that share a node.
        tp_of_prefill, tp_of_decode: GPUs of a stage.
        prefill_layout, decode_layout: the stages of a replica.
        layer_bytes_per_token: bytes of keys and values of a token in one layer.
    """

    intra_node: Link
    inter_node: Link
    gpus_per_node: int
    tp_of_prefill: int
    tp_of_decode: int
    prefill_layout: Layout
    decode_layout: Layout
    layer_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class DecodeSetup:
    """Replicas that only decode, requests that the others have prefilled.

    Args:
        cost, kv_capacity_tokens, replicas, sharding: see :class:`Setup`.
        network: what KV caches move over; None if they move while the prefill computes, at no cost.
    """

    cost: IterationCost
    kv_capacity_tokens: int
    replicas: int = 1
    sharding: Sharding = field(default_factory=Sharding)
    network: NetworkSetup | None = None


@dataclass(frozen=True, slots=True)
class ElasticSetup:
    """Elastic context parallelism over the prefill replicas.

    Args:
        settings: how many of them a batch may have.
        costs: of 1, 2, … ranks: in one node, and across nodes.
        nodes: the node of each replica.
    """

    settings: ElasticSettings
    costs: Sequence[tuple[IterationCost, IterationCost]]
    nodes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated, besides the workload.

    Args:
        cost: iteration times of a replica.
        kv_capacity_tokens: tokens that the KV cache of one replica holds, or of each of its KVP groups.
        scheduler: the policy of every replica.
        replicas: how many there are.
        sharding: the KVP groups of a replica.
        slos: one for each SLO class of the workload.
        router: how requests are spread over replicas.
        length_threshold_tokens: where the length-partitioned router draws the line.
        long_replicas: replicas that router keeps for long prompts.
        closed_loop: clients that wait for their answers; None for an open loop.
        seed: of the random streams.
        stop_s: when the clock stops; None lets every request finish.
        prefix_block_tokens: tokens of the workload's prefix blocks; None if it has none.
        decode: where requests decode, if not where they prefill.
        elastic: the replicas prefill together, in groups of changing size.
    """

    cost: IterationCost
    kv_capacity_tokens: int
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    replicas: int = 1
    sharding: Sharding = field(default_factory=Sharding)
    slos: tuple[Slo, ...] = (Slo(),)
    router: str = "least_loaded"
    length_threshold_tokens: int = 8192
    long_replicas: int = 1
    closed_loop: ClosedLoop | None = None
    send_until_s: float | None = None
    seed: int = 0
    stop_s: float | None = None
    prefix_block_tokens: int | None = None
    decode: DecodeSetup | None = None
    elastic: ElasticSetup | None = None

    def with_costs(self, change: Callable[[IterationCost], IterationCost]) -> Setup:
        """The same with every cost model changed."""
        decode, elastic = self.decode, self.elastic
        if decode is not None:
            decode = replace(decode, cost=change(decode.cost))
        if elastic is not None:
            costs = [(change(within), change(across)) for within, across in elastic.costs]
            elastic = replace(elastic, costs=costs)
        return replace(self, cost=change(self.cost), decode=decode, elastic=elastic)
