"""Prefills in one place, decodes in another: hand-overs computed by hand, and what must hold."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.build import build
from experiments.load import load_config
from experiments.run import RunOptions, run
from policies.scheduler import SchedulerSettings
from policies.sharding import Sharding
from sim.cluster import Cluster, DecodeSetup, NetworkSetup, Setup
from sim.network import Holding, Interval, Network, Part, Port, parts_between
from specs import InputError, ParallelSpec
from specs.devices import Link
from specs.topology import first_nodes, layout_of
from tests.fakes import LinearCost
from traces.records import FINISHED, REJECTED, RunRecords
from traces.workload import Workload

MB = 1e6
PREFILL = LinearCost(token_s=1e-4)  # 0.1 s for 1,000 tokens
DECODE = LinearCost(base_s=0.01)  # 0.01 s a step
STATIC = SchedulerSettings(chunk_tokens=512)


def network(
    *, prefill: ParallelSpec | None = None, decode: ParallelSpec | None = None, gpus_per_node: int = 1
) -> NetworkSetup:
    """1 MB a token and layer over links of 1 GB/s and 10 ms between nodes, of 10 GB/s and 1 ms in them."""
    prefill, decode = prefill or ParallelSpec(), decode or ParallelSpec()
    return NetworkSetup(
        intra_node=Link(10e9, 1e-3),
        inter_node=Link(1e9, 10e-3),
        gpus_per_node=gpus_per_node,
        tp_of_prefill=prefill.tp,
        tp_of_decode=decode.tp,
        prefill_layout=layout_of(prefill, gpus_per_node),
        decode_layout=layout_of(decode, gpus_per_node),
        layer_bytes_per_token=MB,
    )


def setup(
    net: NetworkSetup | None,
    *,
    replicas: int = 1,
    decodes: int = 1,
    decode_kv: int = 100_000,
    prefill_kv: int = 100_000,
    policy: SchedulerSettings = STATIC,
    prefill_cost: LinearCost = PREFILL,
    decode_cost: LinearCost = DECODE,
) -> Setup:
    decode = DecodeSetup(decode_cost, decode_kv, decodes, network=net)
    return Setup(prefill_cost, prefill_kv, policy, replicas=replicas, decode=decode)


def workload(*rows: tuple[float, int, int]) -> Workload:
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Workload(
        prompt_tokens=np.array(prompts, dtype=np.int32),
        output_tokens=np.array(outputs, dtype=np.int32),
        arrival_s=np.array(arrival_s, dtype=np.float64),
    )


def simulate(work: Workload, what: Setup, *, step_by_step: bool = False) -> RunRecords:
    return run_cluster(work, what, step_by_step=step_by_step)[1]


def run_cluster(work: Workload, what: Setup, *, step_by_step: bool = False) -> tuple[Cluster, RunRecords]:
    cluster = Cluster(work, what, step_by_step=step_by_step)
    return cluster, cluster.run()


def transfer_s(records: RunRecords) -> np.ndarray:
    return np.asarray(records.requests["transfer_end_s"] - records.requests["transfer_start_s"])


# -- one request, by hand -----------------------------------------------------------------------------------


def test_a_lone_request_waits_for_its_cache_after_the_first_token() -> None:
    """1,000 tokens: prefill 0.1 s; 1 GB over 1 GB/s and 10 ms; then three steps of 10 ms."""
    records = simulate(workload((2.0, 1000, 4)), setup(network()))
    assert records.ttft_s == pytest.approx([0.1])
    assert records.requests["transfer_start_s"] == pytest.approx([2.1])
    assert transfer_s(records) == pytest.approx([1.01])
    assert records.e2e_s == pytest.approx([0.1 + 1.01 + 0.03])
    assert (records.requests["replica"][0], records.requests["decode_replica"][0]) == (0, 1)


@pytest.mark.parametrize(
    ("prefill", "decode", "gpus_per_node", "expected_s"),
    [
        # As many GPUs send as receive: the smaller number counts.
        (ParallelSpec(tp=2), ParallelSpec(tp=4), 4, 0.010 + 0.5),
        (ParallelSpec(tp=4), ParallelSpec(tp=4), 8, 0.001 + 1 / 40),  # side by side in a node
        (ParallelSpec(tp=4), ParallelSpec(tp=4), 4, 0.010 + 0.25),
    ],
)
def test_transfers_go_by_gpus_and_nodes(
    prefill: ParallelSpec, decode: ParallelSpec, gpus_per_node: int, expected_s: float
) -> None:
    net = network(prefill=prefill, decode=decode, gpus_per_node=gpus_per_node)
    assert transfer_s(simulate(workload((0.0, 1000, 2)), setup(net))) == pytest.approx([expected_s])


def test_two_stages_send_to_one_receiver_in_turn() -> None:
    """Each stage has one of two layers, so 1 GB goes over each; both end at the one GPU that decodes."""
    prefill_cost = LinearCost(token_s=1e-4, stages=2)
    decode_cost = replace_layers(DECODE, 2)
    net = network(prefill=ParallelSpec(spp=2))
    records = simulate(
        workload((0.0, 1000, 2)), setup(net, prefill_cost=prefill_cost, decode_cost=decode_cost)
    )
    assert transfer_s(records) == pytest.approx([2 * (0.01 + 1.0)])


def test_two_stages_send_to_two_side_by_side() -> None:
    cost = LinearCost(token_s=1e-4, stages=2)
    net = network(prefill=ParallelSpec(spp=2), decode=ParallelSpec(spp=2))
    records = simulate(workload((0.0, 1000, 2)), setup(net, prefill_cost=cost, decode_cost=cost))
    assert transfer_s(records) == pytest.approx([0.01 + 1.0])


def replace_layers(cost: LinearCost, layers: int) -> LinearCost:
    """The same in one stage of so many layers."""
    other = LinearCost(base_s=cost.base_s, token_s=cost.token_s)
    other.stage_layers = (layers,)
    return other


def test_a_hidden_transfer_takes_no_time_and_one_output_token_needs_none() -> None:
    records = simulate(workload((0.0, 1000, 4), (1.0, 1000, 1)), setup(None))
    assert records.e2e_s == pytest.approx([0.1 + 0.03, 0.1])
    assert records.requests["decode_replica"].tolist() == [1, -1]
    assert np.isnan(records.requests["transfer_end_s"][1])


def test_transfers_to_the_same_receiver_contend_and_take_turns() -> None:
    """Two prefills end together; their gigabytes go over the one link of the receiver, in 15 pieces each."""
    records = simulate(workload((0.0, 1000, 2), (0.0, 1000, 2)), setup(network(), replicas=2))
    assert records.ttft_s == pytest.approx([0.1, 0.1])
    first, last = sorted(transfer_s(records))
    assert last == pytest.approx(2 * 1.01)
    assert first == pytest.approx(2 * 1.01 - 1 / 15)


def test_transfers_to_different_receivers_dont_contend() -> None:
    records = simulate(workload((0.0, 1000, 2), (0.0, 1000, 2)), setup(network(), replicas=2, decodes=2))
    assert transfer_s(records) == pytest.approx([1.01, 1.01])


def test_a_hand_over_between_stages_waits_for_a_cache_on_its_link() -> None:
    """Stage 0 sends a request's cache (2 s to one receiver) and, over the same link, the next prompt's
    activations: those wait for the piece under way, and for the one of stage 1 that it waits for itself."""
    cost = LinearCost(token_s=1e-4, stages=2, handover_s=0.01)
    parts = {"prefill_cost": cost, "decode_cost": replace_layers(DECODE, 2)}
    net = network(prefill=ParallelSpec(spp=2))
    alone = simulate(workload((1.0, 400, 1)), setup(net, **parts))
    # The cache of request 0 begins to move at 0.11 s: its layers of stage 0 over the same link.
    both = simulate(workload((0.0, 1000, 2), (1.0, 400, 1)), setup(net, **parts))
    own = simulate(workload((0.0, 1000, 2), (1.0, 400, 1)), setup(None, **parts))
    assert alone.ttft_s[0] == pytest.approx(0.02 + 0.01 + 0.02)
    assert own.ttft_s[1] == pytest.approx(alone.ttft_s[0])
    assert 0.0 < both.ttft_s[1] - alone.ttft_s[0] <= 2 / 15


# -- memory -------------------------------------------------------------------------------------------------


def test_a_full_decode_replica_holds_requests_back_and_they_hold_their_prefill_replica_back() -> None:
    """Room for one request of 1,000 tokens on either side: the second's cache moves when the first is done,
    and the third's prefill begins when the second's cache has moved."""
    what = setup(network(), decode_kv=1100, prefill_kv=1100)
    records = simulate(workload((0.0, 1000, 11), (0.0, 1000, 11), (0.0, 1000, 11)), what)
    finished = records.requests["finished_s"]
    assert finished[0] == pytest.approx(0.1 + 1.01 + 0.1)
    assert records.requests["scheduled_s"][1] == pytest.approx(0.1 + 1.01)
    assert records.requests["transfer_start_s"][1] == pytest.approx(0.1 + 1.01 + 0.1)
    assert records.requests["scheduled_s"][2] == pytest.approx(records.requests["transfer_end_s"][1])


def test_what_the_decode_replica_could_never_hold_is_rejected() -> None:
    records = simulate(workload((0.0, 1000, 200), (0.0, 900, 10)), setup(network(), decode_kv=1100))
    assert records.requests["status"].tolist() == [REJECTED, FINISHED]


def test_who_loses_its_blocks_while_decoding_prefills_again_where_it_decodes() -> None:
    policy = replace(STATIC, watermark=0.0, block_tokens=1)
    what = setup(None, decode_kv=250, policy=policy)
    cluster, records = run_cluster(workload((0.0, 100, 100), (0.0, 100, 100)), what)
    assert records.requests["status"].tolist() == [FINISHED, FINISHED]
    assert records.requests["preemptions"].sum() >= 1
    prefills = records.batches["prefill_tokens"]
    assert prefills[records.batches["replica"] == 1].sum() > 0
    assert cluster.schedulers[0].preemptions == 0


ROW = st.tuples(st.floats(0.0, 0.3), st.integers(1, 600), st.integers(1, 60))


@given(
    st.lists(ROW, min_size=1, max_size=25),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([672, 800, 3008]),
    st.sampled_from([608, 1312, 4992]),
    st.booleans(),
    st.sampled_from(["one stage", "two stages", "asynchronous"]),
)
@settings(max_examples=40, deadline=None)
def test_every_request_finishes_and_all_blocks_come_back(
    rows: list[tuple[float, int, int]],
    replicas: int,
    decodes: int,
    decode_kv: int,
    prefill_kv: int,
    hidden: bool,
    kind: str,
) -> None:
    """No deadlock, however small the caches; nothing is lost; one step at a time gives the same."""
    rows = sorted(rows)
    stages = 2 if kind == "two stages" else 1
    cost = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-8, stages=stages, handover_s=1e-4)
    # Steps of an odd length: where batches of two replicas end together, their order is a matter of rounding.
    decode_cost = replace_layers(LinearCost(base_s=2.0371e-3, context_s=1.0193e-7), stages)
    net = None if hidden else network(prefill=ParallelSpec(spp=stages))
    what = setup(
        None if net is None else replace(net, layer_bytes_per_token=MB / 20),
        replicas=replicas,
        decodes=decodes,
        decode_kv=decode_kv,
        prefill_kv=prefill_kv,
        policy=replace(STATIC, async_scheduling=kind == "asynchronous"),
        prefill_cost=cost,
        decode_cost=decode_cost,
    )
    cluster, records = run_cluster(workload(*rows), what)
    requests = records.requests
    assert (requests["status"] == FINISHED).all()
    for scheduler in cluster._pools.schedulers:
        assert (scheduler.kv.used_blocks, scheduler.running, scheduler.outstanding) == (0, 0, 0)
        assert not scheduler.prefilled
    moved = requests["output_tokens"] > 1
    assert ((requests["decode_replica"] >= replicas) == moved).all()
    order = ("arrival_s", "scheduled_s", "first_token_s", "transfer_start_s", "transfer_end_s", "finished_s")
    times = np.stack([requests[name][moved] for name in order])
    assert (np.diff(times, axis=0) >= -1e-12).all()
    slow = simulate(workload(*rows), what, step_by_step=True)
    for name in order:
        np.testing.assert_allclose(slow.requests[name], requests[name], rtol=1e-9, atol=1e-9)


# -- the network --------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(1.0, 3e9)), min_size=1, max_size=20)
)
@settings(max_examples=40, deadline=None)
def test_transfers_between_any_ports_all_end_and_no_link_carries_two_at_once(
    moves: list[tuple[int, int, float]],
) -> None:
    env = simpy.Environment()
    net = Network(env, Link(10e9, 0.0), Link(1e9, 0.0))
    ports = [Port(env, 1, node) for node in range(5)]
    parts = [Part(ports[a], ports[b], size) for a, b, size in moves if a != b]
    ends: list[float] = []

    def move(part: Part) -> object:
        yield from net.move([part])
        ends.append(env.now)

    for part in parts:
        env.process(move(part))  # type: ignore[arg-type]
    env.run()
    assert len(ends) == len(parts)
    for port in ports:  # as long as the busiest link at least, and all one after the other at most
        for side in (0, 1):
            carried = sum(part.num_bytes for part in parts if part[side] is port)
            assert env.now >= carried / 1e9 - 1e-6
    assert env.now <= sum(part.num_bytes for part in parts) / 1e9 + 1e-6


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 2000))
def test_every_byte_of_a_cache_is_sent_once(
    stages: int, wanted_stages: int, groups: int, tokens: int
) -> None:
    env = simpy.Environment()
    layers = 60
    sharding = Sharding(groups, 300)
    held, first = [], 0
    for shard in range(sharding.shards(tokens)):
        last = first + sharding.stored(tokens, shard)
        share, first = Interval(first / tokens, last / tokens), last
        for stage in range(stages):
            part = Interval(layers * stage / stages, layers * (stage + 1) / stages)
            held.append(Holding(Port(env, 1, 0), part, share))
    wanted = [
        Holding(
            Port(env, 1, 1),
            Interval(layers * i / wanted_stages, layers * (i + 1) / wanted_stages),
            Interval(0, 1),
        )
        for i in range(wanted_stages)
    ]
    assert sum(part.num_bytes for part in parts_between(held, wanted, 7.0)) == pytest.approx(7.0 * layers)


# -- topology -----------------------------------------------------------------------------------------------


def test_stages_and_groups_are_laid_out_node_by_node() -> None:
    assert layout_of(ParallelSpec(tp=4, spp=4), 8).nodes == ((0, 0, 1, 1),)
    assert layout_of(ParallelSpec(tp=2, kvp=6), 8).nodes == ((0,), (0,), (0,), (0,), (1,), (1,))
    odd = layout_of(ParallelSpec(tp=3, spp=3), 8)  # six of eight, then the next node
    assert (odd.nodes, odd.gpus) == (((0, 0, 1),), 11)
    four = layout_of(ParallelSpec(tp=4, spp=4), 8)
    assert [four.crosses(stage) for stage in (1, 2, 3)] == [False, True, False]
    six = layout_of(ParallelSpec(tp=2, kvp=6), 8)
    assert [six.farthest(groups) for groups in (1, 4, 5, 6)] == [0, 0, 4, 4]
    small, large = layout_of(ParallelSpec(tp=2), 8), layout_of(ParallelSpec(tp=8, spp=2), 8)
    assert list(first_nodes([(5, small), (2, large)], 8)) == [[0, 0, 0, 0, 1], [2, 4]]


# -- as a configuration -------------------------------------------------------------------------------------

YAML = """
model: llama-3-8b
device: h100-sxm
predictor: {source: roofline}
parallel: {replicas: 1, tp: 1, decode: {replicas: 1, tp: 2}}
workload:
  lengths: {distribution: fixed, prompt_tokens: 4000, output_tokens: 5}
  arrivals: {process: uniform, rate_rps: 1}
  num_requests: 3
"""


def test_a_run_says_where_the_time_went(tmp_path: Path) -> None:
    path = tmp_path / "separate.yaml"
    path.write_text(YAML)
    experiment = build(load_config(path), str(path))
    assert experiment.gpus == 3
    assert run(RunOptions(path, out=str(tmp_path / "out"), plots=False, quiet=True)) == 0
    with (tmp_path / "out" / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 131,072 bytes a token, from one GPU to two side by side, so over one link of 450 GB/s and 3.4 µs.
    expected_s = 4000 * 131_072 / 450e9 + 3.4e-6
    for row in rows:
        assert float(row["transfer_end_s"]) - float(row["transfer_start_s"]) == pytest.approx(expected_s)
        assert (row["replica"], row["decode_replica"]) == ("0", "1")
    again = load_config(tmp_path / "out" / "config.yaml")
    assert again.parallel.decode == experiment.config.parallel.decode


@pytest.mark.parametrize("overrides", [[], ["parallel.replicas=4", "parallel.decode=null"]])
def test_the_example_runs(overrides: list[str]) -> None:
    path = Path(__file__).parent.parent / "experiments" / "disaggregated.yaml"
    experiment = build(load_config(path, ["workload.num_requests=100", *overrides]), str(path))
    assert experiment.gpus == 4
    records = simulate(experiment.workload, experiment.setup)
    assert (records.requests["status"] == FINISHED).all()
    assert (records.requests["decode_replica"] > 0).any() == (not overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.decode.tp=3", r"parallel.decode.tp: 3 must divide the 8 KV heads"),
        ("parallel.decode.tp=16", r"parallel.decode.tp: 16 is more than the 8 GPUs"),
        ("parallel.decode.replica=2", r"parallel.decode.replica.*did you mean 'replicas'"),
        ("workload.lengths.prompt_tokens=5000000", r"KV cache of a replica that prefills holds .* tokens"),
        ("parallel.elastic={max_cp: 4}", r"scheduler.chunking must be whole and .priority fcfs"),
        ("parallel.decode.transfer=never", r"parallel.decode.transfer"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "separate.yaml"
    path.write_text(YAML)
    with pytest.raises(InputError, match=message):
        build(load_config(path, [override]), str(path))
