"""What goes between GPUs: collectives by algorithm and size, and what depends on who shares a node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.between_nodes import all_reduce_s, floor_s, ring_s, tree_s, two_levels_s
from profiler.iteration import IterationModel
from profiler.kernels import RooflineKernels
from profiler.shards import ShardTimes
from profiler.work import LSE_BYTES
from specs import ParallelSpec, get_device, get_model
from specs.devices import Link

MODEL = get_model("llama-3-8b")
H100 = replace(
    get_device("h100-sxm"),
    intra_node=Link(400e9, 1e-6),
    inter_node=Link(50e9, 10e-6),
    send_recv=None,
    kernel_launch_s=0.0,
)


def scalar(value: float) -> np.ndarray:
    return np.array([float(value)])


# -- collectives --------------------------------------------------------------------------------------------


def test_all_reduce_of_1_gb_over_two_nodes_by_hand() -> None:
    size, ranks, link = scalar(1e9), scalar(16), H100.inter_node
    assert ring_s(size, ranks, link) == pytest.approx(30 * 10e-6 + 2 * 15 / 16 * 0.02)
    assert tree_s(size, ranks, link) == pytest.approx(8 * 10e-6 + 2 * 0.02)
    # Inside: 2 · 7/8 of 2.5 ms and 14 hops; between: 125 MB from one node to the other and back.
    within_s, between_s = 14e-6 + 2 * 7 / 8 * 2.5e-3, 2 * 10e-6 + 0.125e9 / 50e9
    assert two_levels_s(size, ranks, H100) == pytest.approx(within_s + between_s)
    assert all_reduce_s(size, ranks, H100) == pytest.approx(within_s + between_s)


def test_few_bytes_go_by_tree_and_many_by_ring() -> None:
    """They are equal at B = r · b · a · (r − 1 − log₂ r): 16 · 50e9 · 10e-6 · 11 = 88 MB."""
    ranks, link = scalar(16), H100.inter_node
    border = 16 * 50e9 * 10e-6 * 11
    assert ring_s(scalar(border), ranks, link) == pytest.approx(tree_s(scalar(border), ranks, link))
    for size, tree_is_quicker in ((border / 2, True), (border * 2, False)):
        assert (tree_s(scalar(size), ranks, link) < ring_s(scalar(size), ranks, link)) == tree_is_quicker


@given(st.floats(1.0, 1e11), st.integers(9, 512))
def test_the_quickest_is_taken_and_never_below_the_floor(size: float, ranks: int) -> None:
    arguments = scalar(size), scalar(ranks)
    found = all_reduce_s(*arguments, H100)
    assert found <= ring_s(*arguments, H100.inter_node) and found <= tree_s(*arguments, H100.inter_node)
    assert found >= floor_s(*arguments, H100)
    estimate = RooflineKernels(H100).all_reduce(size, ranks)
    assert estimate.time_s == pytest.approx(found)


@pytest.mark.parametrize(
    ("num_bytes", "measured_s"),
    [  # bf16, heads of 128 (arXiv 2411.01783, tables 5 and 8)
        (1 * 16 * 128 * 2, 32.3e-6),  # the queries of a decode, 16 heads
        (800 * 16 * 128 * 2, 166e-6),
        (3200 * 16 * 128 * 2, 544e-6),
        (32_000 * 2 * 128 * 2, 627e-6),  # keys and values of one head
        (32_000 * 2 * 128 * 2, 631e-6),
    ],
)
def test_a_send_and_receive_between_nodes_takes_what_it_was_measured_to(
    num_bytes: int, measured_s: float
) -> None:
    """Half of the data sheet's 50 GB/s; what is computed for hand-overs, rings and exchanges."""
    estimate = RooflineKernels(get_device("h100-sxm")).send_recv(num_bytes, inter_node=True)
    assert estimate.time_s == pytest.approx(measured_s, rel=0.07)
    assert estimate.floor_s == pytest.approx(num_bytes / 50e9)


# -- who shares a node --------------------------------------------------------------------------------------


def test_a_hand_over_costs_what_its_own_border_costs() -> None:
    """TP 4, four stages, eight GPUs a node: only the one in the middle leaves a node."""
    cost = IterationModel(MODEL, RooflineKernels(H100), ParallelSpec(tp=4, spp=4))
    sent = 2 * 512 * 4096 / 4
    inside_s, between_s = 1e-6 + sent / 400e9, 10e-6 + sent / 50e9
    found = [cost.handover_s(512, stage) for stage in (1, 2, 3)]
    assert found == pytest.approx([inside_s, between_s, inside_s])
    together_s = sum(cost.stage_times_s(512, 1, 1, 0.0)) + sum(found)
    assert cost.tokens_s(512, 1, 1) == pytest.approx(together_s)
    rows = {row.name: row.time_s for row in cost.explain([(512, 0)])}
    assert rows["stage hand-over"] == pytest.approx(2 * inside_s)
    assert rows["stage hand-over between nodes"] == pytest.approx(between_s)


@pytest.mark.parametrize(
    ("parallel", "shards", "elsewhere"),
    [
        (ParallelSpec(tp=2, kvp=8), 4, 0),  # four groups of two fill a node
        (ParallelSpec(tp=2, kvp=8), 5, 4),  # the fifth has all others elsewhere
        (ParallelSpec(tp=2, kvp=8), 8, 4),
        (ParallelSpec(tp=8, kvp=4), 3, 2),
        (ParallelSpec(tp=4, spp=2, kvp=4), 4, 3),
    ],
)
def test_a_merge_goes_between_nodes_only_as_far_as_its_groups_do(
    parallel: ParallelSpec, shards: int, elsewhere: int
) -> None:
    times = ShardTimes(MODEL, RooflineKernels(H100), parallel, np.array([1.0, 64.0]))
    exchange, _ = times.merge(scalar(64), shards)
    sent = 64 * (32 // parallel.tp) * (128 * 2 + LSE_BYTES)
    if elsewhere:
        assert exchange.time_s == pytest.approx(10e-6 + elsewhere * sent / 50e9)
    else:
        assert exchange.time_s == pytest.approx(1e-6 + (shards - 1) * sent / 400e9)
