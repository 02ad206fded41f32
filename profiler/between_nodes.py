"""An all-reduce over more GPUs than a node has: several algorithms, of which the quickest is taken.

With r ranks and B bytes on each, over links of latency a and b bytes/s in each direction:

- ring: 2·(r − 1) steps of B ÷ r bytes, so 2·(r − 1)·a + 2·(r − 1) ÷ r · B ÷ b;
- tree (NCCL's double binary tree): up and down, pipelined, so 2·⌈log₂ r⌉·a + 2·B ÷ b;
- two levels: reduce-scatter inside the nodes, a ring or tree between like GPUs of n nodes, each with its
  share of B ÷ g bytes over its own link, and an all-gather inside the nodes.

Few bytes go by tree, whose steps are fewer; many by ring or in two levels, which send less over each link.
"""

from __future__ import annotations

import numpy as np

from profiler.estimate import FloatArray
from specs.devices import DeviceSpec, Link


def ring_s(num_bytes: FloatArray, ranks: FloatArray, link: Link) -> FloatArray:
    """Seconds of an all-reduce round a flat ring."""
    sent_s = num_bytes * (ranks - 1.0) / ranks / link.bandwidth_bytes_per_s
    return np.asarray(2.0 * ((ranks - 1.0) * link.latency_s + sent_s))


def tree_s(num_bytes: FloatArray, ranks: FloatArray, link: Link) -> FloatArray:
    """Seconds of an all-reduce over a double binary tree."""
    steps = np.ceil(np.log2(ranks))
    return np.asarray(2.0 * (steps * link.latency_s + num_bytes / link.bandwidth_bytes_per_s))


def two_levels_s(num_bytes: FloatArray, ranks: FloatArray, device: DeviceSpec) -> FloatArray:
    """Seconds of an all-reduce inside the nodes first, then between them, then inside again."""
    inside = np.minimum(ranks, float(device.gpus_per_node))
    nodes = np.ceil(ranks / inside)
    share = num_bytes / inside
    within_s = ring_s(num_bytes, inside, device.intra_node)  # its two halves, before and after
    between_s = np.minimum(ring_s(share, nodes, device.inter_node), tree_s(share, nodes, device.inter_node))
    return np.asarray(within_s + between_s)


def all_reduce_s(num_bytes: FloatArray, ranks: FloatArray, device: DeviceSpec) -> FloatArray:
    """Seconds of the quickest of them."""
    link = device.inter_node
    flat = np.minimum(ring_s(num_bytes, ranks, link), tree_s(num_bytes, ranks, link))
    return device.kernel_launch_s + np.minimum(flat, two_levels_s(num_bytes, ranks, device))


def floor_s(num_bytes: FloatArray, ranks: FloatArray, device: DeviceSpec) -> FloatArray:
    """Seconds below which none can go: a GPU receives what its node's share lacks from the other nodes."""
    inside = np.minimum(ranks, float(device.gpus_per_node))
    nodes = np.ceil(ranks / inside)
    return np.asarray(num_bytes / inside * (nodes - 1.0) / nodes / device.inter_node.bandwidth_bytes_per_s)
