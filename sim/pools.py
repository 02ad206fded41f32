"""The replicas of a cluster, put together: one pool, or one that prefills and one that decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import simpy

from policies.elastic import ElasticScheduler
from policies.request import Request
from policies.routers import LeastLoaded
from policies.scheduler import Scheduler
from sim.elastic import ElasticPool
from sim.handover import Handovers
from sim.network import Network, Port
from sim.replica import Replica
from sim.setup import DecodeSetup, ElasticSetup, NetworkSetup, Setup
from specs.topology import Layout, first_nodes
from traces.records import Recorder

Ports = Sequence[Sequence[Port]]
"""[groups][stages]"""


class Pools:
    """All replicas, and the way between them.

    Attributes:
        entries: what requests are sent to as they arrive: the replicas, or the elastic pool as a whole.
        entry_schedulers: theirs, which a router looks at.
        schedulers: of all replicas that aren't elastic, those that only decode last.
    """

    def __init__(
        self,
        env: simpy.Environment,
        setup: Setup,
        recorder: Recorder,
        on_finish: Callable[[Request], None],
        *,
        step_by_step: bool,
        replica: Callable[..., Replica],
    ) -> None:
        self._env, self._setup, self._recorder, self._on_finish = env, setup, recorder, on_finish
        self._make = partial(replica, step_by_step=step_by_step)
        self._decoding: list[Scheduler] = []
        self._elastic: ElasticScheduler | None = None
        self._handovers: Handovers | None = None
        self.entries: Sequence[Replica | ElasticPool]
        self.entry_schedulers: Sequence[Scheduler | ElasticScheduler]
        decode = setup.decode
        network: Network | None = None
        ports: Sequence[Ports] = [()] * setup.replicas
        decode_ports: Sequence[Ports] = [()] * (0 if decode is None else decode.replicas)
        if decode is not None and decode.network is not None:
            network = Network(env, decode.network.intra_node, decode.network.inter_node)
            ports, decode_ports = _ports(env, setup.replicas, decode.replicas, decode.network)
        if setup.elastic is not None:
            pool = self._make_elastic(setup.elastic, ports)
            self.schedulers = []
            self.entries, self.entry_schedulers = [pool], [pool.scheduler]
        else:
            replicas = self._make_entries(ports, network)
            self.schedulers = [entry.scheduler for entry in replicas]
            self.entries, self.entry_schedulers = replicas, self.schedulers.copy()
        if decode is not None:
            self._handovers = self._make_decodes(decode, decode_ports, network)

    def could_decode(self, request: Request) -> bool:
        """Whether the request fits where it will decode, if that is elsewhere."""
        return request.output_tokens == 1 or not self._decoding or self._decoding[0].fits(request)

    def kv_capacities(self) -> tuple[int, ...]:
        """KV blocks of each replica, in the order of the records."""
        instances = [] if self._elastic is None else [c.capacity_blocks for c in self._elastic.caches]
        return (*instances, *(scheduler.kv.capacity_blocks for scheduler in self.schedulers))

    def _make_entries(self, ports: Sequence[Ports], network: Network | None) -> list[Replica]:
        setup = self._setup
        made = []
        for index, mine in enumerate(ports):
            scheduler = Scheduler(
                setup.scheduler,
                setup.cost,
                setup.kv_capacity_tokens,
                slos=setup.slos,
                stages=len(setup.cost.stage_layers),
                sharding=setup.sharding,
                prefix_block_tokens=setup.prefix_block_tokens,
                hands_over=setup.decode is not None,
            )
            common = self._env, index, scheduler, setup.cost, self._recorder, self._on_finish
            if setup.decode is None:
                made.append(self._make(*common))
            else:
                made.append(self._make(*common, on_prefilled=self._prefilled, network=network, ports=mine))
        return made

    def _make_decodes(
        self, decode: DecodeSetup, ports: Sequence[Ports], network: Network | None
    ) -> Handovers:
        targets = []
        for place, mine in enumerate(ports):
            scheduler = Scheduler(
                replace(self._setup.scheduler, prefix_caching=False),
                decode.cost,
                decode.kv_capacity_tokens,
                slos=self._setup.slos,
                stages=len(decode.cost.stage_layers),
                sharding=decode.sharding,
            )
            self.schedulers.append(scheduler)
            self._decoding.append(scheduler)
            index = self._setup.replicas + place
            common = self._env, index, scheduler, decode.cost, self._recorder, self._on_finish
            targets.append(self._make(*common, network=network, ports=mine))
        layer_bytes = 0.0 if decode.network is None else decode.network.layer_bytes_per_token
        return Handovers(self._env, self._recorder, targets, LeastLoaded(), network, layer_bytes)

    def _make_elastic(self, elastic: ElasticSetup, ports: Sequence[Ports]) -> ElasticPool:
        setup = self._setup
        self._elastic = ElasticScheduler(
            elastic.settings,
            setup.scheduler,
            elastic.costs,
            elastic.nodes,
            setup.kv_capacity_tokens,
            slos=setup.slos,
        )
        return ElasticPool(
            self._env,
            self._elastic,
            setup.cost,
            self._recorder,
            self._on_finish,
            self._prefilled,
            [mine[0][0] for mine in ports if mine],
        )

    def _prefilled(self, request: Request, source: Replica | ElasticPool) -> None:
        assert self._handovers is not None
        self._handovers.prefilled(request, source)


def _ports(
    env: simpy.Environment, prefills: int, decodes: int, network: NetworkSetup
) -> tuple[list[Ports], list[Ports]]:
    """Ports of all prefill replicas, and of all decode replicas, which lie behind them."""
    layouts = network.prefill_layout, network.decode_layout
    places = first_nodes(list(zip((prefills, decodes), layouts, strict=True)), network.gpus_per_node)
    gpus = network.tp_of_prefill, network.tp_of_decode
    prefill, decode = (
        [_ports_of(env, tp, first, layout) for first in firsts]
        for tp, firsts, layout in zip(gpus, places, layouts, strict=True)
    )
    return prefill, decode


def _ports_of(env: simpy.Environment, gpus: int, first_node: int, layout: Layout) -> Ports:
    return [[Port(env, gpus, first_node + node) for node in group] for group in layout.nodes]
