"""Which GPUs of a deployment share a node.

GPUs are given out in order. The ``tp`` GPUs of a stage never straddle two nodes, and a replica that doesn't
fit into what is left of a node begins a new one, so all replicas of one shape are laid out alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from specs.parallel import ParallelSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of one replica lie, counted in nodes from its first.

    Attributes:
        nodes: [groups][stages], the node of each stage of each KVP group (or rank of a ring).
        gpus: GPUs that it takes up, those that can't be used included.
    """

    nodes: tuple[tuple[int, ...], ...]
    gpus: int

    def crosses(self, stage: int) -> bool:
        """Whether the hand-over to ``stage`` from the one before it leaves a node, in any group."""
        return any(group[stage] != group[stage - 1] for group in self.nodes)

    def farthest(self, groups: int) -> int:
        """Of the first ``groups`` groups: how many of the others the worst placed one has in other nodes."""
        stages = range(len(self.nodes[0]))
        return max(
            sum(other[stage] != mine[stage] for other in self.nodes[:groups])
            for stage in stages
            for mine in self.nodes[:groups]
        )


def layout_of(parallel: ParallelSpec, gpus_per_node: int) -> Layout:
    """The layout of one replica: group after group, stage after stage."""
    groups = max(parallel.kvp, parallel.cp)
    used = 0
    nodes = []
    for _ in range(groups):
        group = []
        for _ in range(parallel.spp):
            if used % gpus_per_node + parallel.tp > gpus_per_node:
                used = -(-used // gpus_per_node) * gpus_per_node
            group.append(used // gpus_per_node)
            used += parallel.tp
        nodes.append(tuple(group))
    return Layout(tuple(nodes), used)


def first_nodes(pools: list[tuple[int, Layout]], gpus_per_node: int) -> Iterator[list[int]]:
    """For each pool of (replicas, layout), the node in which each of its replicas begins.

    Several replicas share a node if a whole number of them fits into it, side by side.
    """
    used = 0
    for replicas, layout in pools:
        found = []
        for _ in range(replicas):
            if used % gpus_per_node + min(layout.gpus, gpus_per_node) > gpus_per_node:
                used = -(-used // gpus_per_node) * gpus_per_node
            found.append(used // gpus_per_node)
            used += layout.gpus
        yield found
