"""The links between GPUs, as resources that transfers wait for."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import simpy

from sim.arrivals import UrgentTimeout
from specs.devices import Link

Process = Generator[simpy.Event, Any, None]

PIECE_BYTES = 64 << 20  # of one GPU; who waits for a link waits for a piece or two


class Interval(NamedTuple):
    """From ``begin`` up to ``end``."""

    begin: float
    end: float

    def overlap(self, other: Interval) -> float:
        return max(min(self.end, other.end) - max(self.begin, other.begin), 0.0)


class Port:
    """The ``gpus`` GPUs of one stage, in one node: what each sends and receives, inside the node and out of
    it, goes over links of its own. A transfer occupies them all, in its direction."""

    def __init__(self, env: simpy.Environment, gpus: int, node: int) -> None:
        self.gpus, self.node = gpus, node
        self._out = (simpy.Resource(env), simpy.Resource(env))  # inside the node, out of it
        self._in = (simpy.Resource(env), simpy.Resource(env))

    def sending(self, is_inter_node: bool) -> simpy.Resource:
        """The links over which it sends."""
        return self._out[is_inter_node]

    def receiving(self, is_inter_node: bool) -> simpy.Resource:
        """The links over which it receives."""
        return self._in[is_inter_node]


class Holding(NamedTuple):
    """A part of a request's KV cache: where it is, which layers, and which tokens (as shares, 0 to 1)."""

    port: Port
    layers: Interval
    tokens: Interval


class Part(NamedTuple):
    """What one port sends to another."""

    source: Port
    target: Port
    num_bytes: float


@dataclass(frozen=True, slots=True)
class Network:
    """Moves bytes between ports.

    First come, first served on every link, in pieces, so that transfers that meet take turns. A transfer
    occupies the sender's links first and the receiver's then; nobody waits for a sender while holding a
    receiver, so nobody waits for ever.

    Args:
        intra_node, inter_node: the links of one GPU.
    """

    env: simpy.Environment
    intra_node: Link
    inter_node: Link

    def move(self, parts: Sequence[Part]) -> Process:
        """Move all parts, side by side; over when the last has arrived."""
        moves = [self.env.process(self._move(part)) for part in parts if part.num_bytes > 0]
        if moves:
            yield self.env.all_of(moves)

    def occupy(self, source: Port, target: Port, seconds: float) -> Process:
        """Hold the links from ``source`` to ``target`` for so long, once they are free."""
        is_inter_node = source.node != target.node
        with source.sending(is_inter_node).request() as sending:
            yield sending
            with target.receiving(is_inter_node).request() as receiving:
                yield receiving
                yield UrgentTimeout(self.env, seconds)

    def occupy_all(self, pairs: Sequence[tuple[Port, Port]], seconds: float) -> Process:
        """The same from port to port of several pairs, side by side; over when all have been."""
        if len(pairs) == 1:
            yield from self.occupy(*pairs[0], seconds)
        else:
            yield self.env.all_of([self.env.process(self.occupy(*pair, seconds)) for pair in pairs])

    def _move(self, part: Part) -> Process:
        link, gpus = self._link(part), min(part.source.gpus, part.target.gpus)
        pieces = max(int(-(-part.num_bytes // (gpus * PIECE_BYTES))), 1)
        piece_s = part.num_bytes / pieces / (gpus * link.bandwidth_bytes_per_s)
        yield from self.occupy(part.source, part.target, link.latency_s + piece_s)
        for _ in range(pieces - 1):
            yield from self.occupy(part.source, part.target, piece_s)

    def _link(self, part: Part) -> Link:
        return self.inter_node if part.source.node != part.target.node else self.intra_node


def parts_between(
    held: Sequence[Holding], wanted: Sequence[Holding], bytes_per_layer: float
) -> Iterator[Part]:
    """Who sends how much to whom, of a KV cache with ``bytes_per_layer`` bytes a layer, so that what is
    ``held`` comes to be where it is ``wanted``."""
    for have, want in product(held, wanted):
        layers, tokens = have.layers.overlap(want.layers), have.tokens.overlap(want.tokens)
        if layers > 0 and tokens > 0:
            yield Part(have.port, want.port, bytes_per_layer * layers * tokens)
