"""Elastic context parallelism: how many instances a prefill gets, and who waits for whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments.build import build
from experiments.load import load_config
from policies.elastic import ElasticScheduler, ElasticSettings, Group
from policies.request import Request
from policies.scheduler import SchedulerSettings
from profiler.ring import RingModel
from sim.cluster import Cluster, DecodeSetup, ElasticSetup, NetworkSetup, Setup, simulate
from specs import InputError, ParallelSpec
from specs.devices import Link
from specs.topology import layout_of
from tests.fakes import LinearCost
from traces.records import FINISHED
from traces.workload import Workload

WHOLE = SchedulerSettings(chunking="whole", max_batch_tokens=1000)
DECODE = LinearCost(base_s=1e-3)


def costs(most: int, *, overhead_s: float = 0.0, across: float = 1.0) -> list[tuple[LinearCost, LinearCost]]:
    """A second for 1,000 tokens, divided by the ranks; ``overhead_s`` for each rank beyond the first; across
    nodes ``across`` times as long."""

    def of(ranks: int, factor: float) -> LinearCost:
        return LinearCost(token_s=factor * 1e-3 / ranks, base_s=overhead_s * (ranks - 1))

    return [(of(ranks, 1.0), of(ranks, across if ranks > 1 else 1.0)) for ranks in range(1, most + 1)]


def make(
    instances: int = 4,
    elastic: ElasticSettings | None = None,
    *,
    kv_tokens: int = 100_000,
    nodes: list[int] | None = None,
    policy: SchedulerSettings = WHOLE,
    overhead_s: float = 0.0,
    across: float = 1.0,
) -> ElasticScheduler:
    elastic = elastic or ElasticSettings()
    table = costs(elastic.max_cp, overhead_s=overhead_s, across=across)
    return ElasticScheduler(elastic, policy, table, nodes or [0] * instances, kv_tokens)


def ask(scheduler: ElasticScheduler, now_s: float) -> tuple[list[int], tuple[int, ...], float] | None:
    """The next group as (ids, instances, seconds)."""
    group = scheduler.next_group(now_s)
    return None if group is None else described(group)


def described(group: Group) -> tuple[list[int], tuple[int, ...], float]:
    return [chunk.request.id for chunk in group.batch.chunks], group.instances, group.seconds


def add(scheduler: ElasticScheduler, *prompts: int, first: int = 0, at_s: float = 0.0) -> None:
    for place, tokens in enumerate(prompts):
        scheduler.add(Request(first + place, at_s, tokens, 10))


# -- how many instances -------------------------------------------------------------------------------------


def test_a_lone_prompt_gets_as_many_as_make_it_end_first() -> None:
    many = make(6)
    add(many, 8000)
    assert ask(many, 0.0) == ([0], (0, 1, 2, 3), pytest.approx(2.0))
    costly = make(6, overhead_s=0.5)  # 0.4 s alone, 0.7 s on two
    add(costly, 400)
    assert ask(costly, 0.0) == ([0], (0,), pytest.approx(0.4))


def test_requests_that_wait_share_a_batch_up_to_its_size() -> None:
    scheduler = make()
    add(scheduler, 400, 400, 400)
    assert ask(scheduler, 0.0) == ([0, 1], (0, 1, 2, 3), pytest.approx(0.2))
    assert ask(scheduler, 0.0) is None  # the third waits for the four: 0.2 + 0.1 s


def test_two_instances_now_or_four_in_a_moment() -> None:
    """Four of six are busy until 2 s. On two, 8,000 tokens take 4 s; on four from 2 s on, 2 s: both end at
    4 s, and fewer instances do. A longer prompt waits."""
    scheduler = make(6)
    add(scheduler, 8000)
    first = scheduler.next_group(0.0)
    assert first is not None
    add(scheduler, 8000, first=1)
    assert ask(scheduler, 0.0) == ([1], (4, 5), pytest.approx(4.0))
    scheduler = make(6)
    add(scheduler, 8000, 8400)
    first = scheduler.next_group(0.0)
    assert first is not None and ask(scheduler, 0.0) is None
    scheduler.complete(first, 2.0)
    assert ask(scheduler, 2.0) == ([1], (0, 1, 2, 3), pytest.approx(2.1))


def test_groups_within_a_node_if_leaving_it_costs_more() -> None:
    scheduler = make(nodes=[0, 1, 1, 1], elastic=ElasticSettings(max_cp=3), across=1.5)
    add(scheduler, 6000)
    assert ask(scheduler, 0.0) == ([0], (1, 2, 3), pytest.approx(2.0))
    spread = make(nodes=[0, 0, 1, 1], elastic=ElasticSettings(max_cp=4), across=1.5)
    add(spread, 6000)
    assert ask(spread, 0.0) == ([0], (0, 1, 2, 3), pytest.approx(2.25))


def test_memory_decides_who_can_take_part() -> None:
    """1,600 tokens don't fit into one instance of 1,008: two are the fewest, and one that is full is none."""
    scheduler = make(3, ElasticSettings(max_cp=4), kv_tokens=1008, overhead_s=10.0)
    add(scheduler, 1000, 1600)
    first = scheduler.next_group(0.0)
    assert first is not None and first.instances == (0,)
    assert ask(scheduler, 0.0) == ([1], (1, 2), pytest.approx(10.8))
    assert [cache.used_blocks for cache in scheduler.caches] == [63, 50, 50]
    assert not scheduler.fits(Request(9, 0.0, 4000, 1))


# -- who waits ----------------------------------------------------------------------------------------------


def test_first_come_first_served_makes_a_convoy() -> None:
    scheduler = make(4)
    add(scheduler, 40_000, 100)
    first = scheduler.next_group(0.0)
    assert first is not None and ask(scheduler, 5.0) is None
    assert scheduler.complete(first, 10.0) == []
    assert [request.id for request in scheduler.prefilled] == [0]
    assert ask(scheduler, 10.0) == ([1], (0, 1, 2, 3), pytest.approx(0.025))


def test_short_prompts_have_the_reserved_instances_to_themselves() -> None:
    elastic = ElasticSettings(max_cp=4, reserved_replicas=2, reserved_below_tokens=200)
    scheduler = make(6, elastic)
    add(scheduler, 40_000, 40_000, 100, 100)
    assert ask(scheduler, 0.0) == ([2, 3], (4, 5), pytest.approx(0.1))
    assert ask(scheduler, 0.0) == ([0], (0, 1, 2, 3), pytest.approx(10.0))
    assert ask(scheduler, 0.0) is None  # the second long one must not take 4 and 5 when they are free
    assert scheduler.waiting == 1 and scheduler.pending_prefill_tokens == 40_000


def test_a_short_prompt_goes_to_the_others_too_when_it_has_waited_longest() -> None:
    elastic = ElasticSettings(max_cp=2, reserved_replicas=1, reserved_below_tokens=200)
    scheduler = make(3, elastic, policy=SchedulerSettings(chunking="whole", max_batch_tokens=150))
    add(scheduler, 100, 100, 5000)
    assert ask(scheduler, 0.0) == ([0], (2,), pytest.approx(0.1))
    assert ask(scheduler, 0.0) == ([1], (0, 1), pytest.approx(0.05))
    assert ask(scheduler, 0.0) is None


# -- simulated ----------------------------------------------------------------------------------------------


def workload(rows: list[tuple[float, int, int]]) -> Workload:
    arrival_s, prompts, outputs = zip(*sorted(rows), strict=True)
    return Workload(
        prompt_tokens=np.array(prompts, dtype=np.int32),
        output_tokens=np.array(outputs, dtype=np.int32),
        arrival_s=np.array(arrival_s, dtype=np.float64),
    )


def setup(elastic: ElasticSettings, instances: int, *, kv_tokens: int, decode_kv: int) -> Setup:
    table = costs(elastic.max_cp, overhead_s=1e-3)
    return Setup(
        table[0][0],
        kv_tokens,
        WHOLE,
        replicas=instances,
        decode=DecodeSetup(DECODE, decode_kv, 1),
        elastic=ElasticSetup(elastic, table, [0] * instances),
    )


def test_a_request_prefills_on_four_and_decodes_elsewhere() -> None:
    what = setup(ElasticSettings(max_cp=4), 4, kv_tokens=10_000, decode_kv=10_000)
    records = simulate(workload([(0.0, 8000, 11), (1.0, 100, 1)]), what)
    assert records.ttft_s == pytest.approx([2.003, 1.003 + 0.028])
    assert records.e2e_s[0] == pytest.approx(2.003 + 0.010)
    assert records.requests["replica"].tolist() == [0, 0]
    assert records.requests["decode_replica"].tolist() == [4, -1]
    first = records.batches["batch"] == 0
    mine = first & (records.batches["replica"] < 4)
    assert records.batches["prefill_tokens"][mine].tolist() == [2000] * 4
    assert records.work.tokens == 8000 + 100 + 10


ALONE = layout_of(ParallelSpec(), 2)
NETWORK = NetworkSetup(Link(1e10, 1e-4), Link(1e9, 1e-3), 2, 1, 1, ALONE, ALONE, 1e5)


def test_each_instance_sends_its_share_of_a_cache() -> None:
    """Four instances in two nodes, one decode replica in the third: 8,000 tokens of 100 kB, a fourth from
    each, one after the other into the one that decodes, in three pieces each and 1 ms before the first."""
    what = setup(ElasticSettings(max_cp=4), 4, kv_tokens=10_000, decode_kv=10_000)
    assert what.decode is not None
    what = replace(what, decode=replace(what.decode, network=NETWORK))
    records = simulate(workload([(0.0, 8000, 2)]), what)
    moved_s = records.requests["transfer_end_s"] - records.requests["transfer_start_s"]
    assert moved_s == pytest.approx([4 * 1e-3 + 8000 * 1e5 / 1e9])


ROW = st.tuples(st.floats(0.0, 1.0), st.integers(1, 900), st.integers(1, 40))


@given(
    st.lists(ROW, min_size=1, max_size=25),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2),
    st.sampled_from([1008, 4000]),
    st.booleans(),
)
# Four prompts that together never fit the memory of the one instance there is.
@example([(0.0, 1, 1)] * 3 + [(0.0, 145, 1), (0.0, 817, 1)], 1, 1, 0, 1008, False)
@settings(max_examples=50, deadline=None)
def test_every_request_finishes_and_no_instance_is_in_two_groups(
    rows: list[tuple[float, int, int]],
    most: int,
    general: int,
    reserved: int,
    kv_tokens: int,
    hidden: bool,
) -> None:
    elastic = ElasticSettings(max_cp=most, reserved_replicas=reserved, reserved_below_tokens=300)
    instances = general + reserved
    what = setup(elastic, instances, kv_tokens=kv_tokens, decode_kv=1008)
    if not hidden:
        assert what.decode is not None
        what = replace(what, decode=replace(what.decode, network=NETWORK), router="length_partitioned")
    cluster = Cluster(workload(rows), what)
    records = cluster.run()
    assert (records.requests["status"] == FINISHED).all()
    (scheduler,) = cluster.schedulers
    assert isinstance(scheduler, ElasticScheduler)
    assert [cache.used_blocks for cache in scheduler.caches] == [0] * instances
    assert (scheduler.outstanding, scheduler.waiting, scheduler.pending_prefill_tokens) == (0, 0, 0)
    batches = records.batches
    for instance in range(instances):
        mine = batches["replica"] == instance
        starts, ends = batches["start_s"][mine], batches["end_s"][mine]
        order = np.argsort(starts, kind="stable")
        assert (starts[order][1:] >= ends[order][:-1] - 1e-9).all()
    prefills = batches["replica"] < instances
    assert batches["prefill_tokens"][prefills].sum() == sum(tokens for _, tokens, _ in rows)


# -- as a configuration -------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parent.parent / "experiments"


@pytest.mark.parametrize("overrides", [[], ["parallel.elastic.reserved_replicas=2"]])
def test_the_example_runs(overrides: list[str]) -> None:
    path = EXAMPLES / "loongserve.yaml"
    experiment = build(load_config(path, ["workload.num_requests=60", *overrides]), str(path))
    assert experiment.gpus == 16
    records = simulate(experiment.workload, experiment.setup)
    assert (records.requests["status"] == FINISHED).all()


YAML = """
model: llama-3-8b
device: a100-80gb-sxm
predictor: {source: roofline}
parallel:
  replicas: 6
  tp: 2
  elastic: {max_cp: 4, reserved_replicas: 2, reserved_below_tokens: 8192}
  decode: {replicas: 2, transfer: hidden}
scheduler: {chunking: whole}
workload:
  lengths: {trace: long_and_short.csv}
  arrivals: {process: trace}
"""
ROWS = "arrival_s,prompt_tokens,output_tokens\n0,100000,5\n0.1,100000,5\n0.2,1000,5\n"


def written(folder: Path) -> Path:
    (folder / "loongserve.yaml").write_text(YAML)
    (folder / "long_and_short.csv").write_text(ROWS)
    return folder / "loongserve.yaml"


def test_loongserve_from_a_file(tmp_path: Path) -> None:
    """The short prompt has its own instances; the second long one waits for the ring of four to be free."""
    path = written(tmp_path)
    experiment = build(load_config(path), str(path))
    assert experiment.gpus == 16
    elastic = experiment.setup.elastic
    assert elastic is not None
    assert elastic.nodes == [0, 0, 0, 0, 1, 1]
    rings = [cost for cost, _ in elastic.costs[1:]]
    assert all(isinstance(ring, RingModel) and not ring.ring.is_inter_node for ring in rings)
    records = simulate(experiment.workload, experiment.setup)
    ring = rings[-1]
    assert isinstance(ring, RingModel)
    assert records.ttft_s[0] == pytest.approx(ring.prefill_s(100_000), rel=0.01)
    assert records.requests["scheduled_s"][1] == records.requests["first_token_s"][0]
    assert records.ttft_s[2] < 0.5
    assert (
        records.requests["decode_replica"].tolist() == [6, 7, 7]
        or (records.requests["decode_replica"] >= 6).all()
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.decode=null", r"parallel.elastic: needs replicas that decode"),
        ("parallel.spp=2", r"parallel.elastic: goes with tp alone"),
        ("scheduler.priority=lars", r"must be whole and .priority fcfs, not whole and lars"),
        (
            "parallel.elastic.reserved_replicas=6",
            r"6 reserved replicas leave none of parallel.replicas \(6\)",
        ),
        ("scheduler.kv.prefix_caching=true", r"parallel.elastic: keeps no prefixes"),
        ("parallel.elastic.max_cp=0", r"parallel.elastic.max_cp"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = written(tmp_path)
    with pytest.raises(InputError, match=message):
        build(load_config(path, [override]), str(path))
