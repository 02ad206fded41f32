"""What a validation says beside its figures: which rung to look at and why, and when there is no verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from experiments.batch_times import BatchTimes
from experiments.blame import blame
from experiments.build import Experiment
from experiments.chance import chance_to_hold
from experiments.config import RequestTolerance
from experiments.live_records import LiveRun
from experiments.pace import leftover, measured_paces
from experiments.run import summarize_run
from experiments.rungs import Ladder, Rung, climb
from experiments.slow_moments import Probes, slowdowns
from experiments.text import percent
from experiments.validation_files import Outcome, pace_data, write_case
from experiments.validation_text import _slow_moments, print_outcome, verdict
from policies.batch import Batch
from sim.cluster import simulate
from sim.paced import Factors, Pace, simulate_paced
from sim.slowed import SlowMoments, Slowness
from tests.test_replayed_runs import experiment, noted
from traces.stored import read_host_csv

TIGHT = {"p50": 1e-9, "p90": 1e-9, "noise_factor": 0.0}


def ladder(made: Experiment, *runs: LiveRun, simulated: Experiment | None = None) -> Ladder:
    """That of a simulation of ``simulated``, or of the same experiment."""
    records = simulate((simulated or made).workload, (simulated or made).setup)
    return climb(made, summarize_run(records, made), runs)


# -- slow moments -----------------------------------------------------------------------------------------


def probed(made: Experiment, start_s: list[float], probe_s: list[float], stage: list[int]) -> LiveRun:
    """Batches of 10 ms each, and what probes before them took."""
    _, live = noted(made)
    start = np.array(start_s)
    batches = {"start_s": start, "end_s": start + 0.01, "stage": np.array(stage)}
    return replace(live, records=replace(live.records, batches=batches), host={"probe_s": np.array(probe_s)})


def test_a_batch_has_its_core_to_itself_between_two_quick_probes(tmp_path: Path) -> None:
    """By hand. Probes of 10 are usual, one of 20 is slow; 0 is none."""
    nothing = pytest.approx(float("nan"), nan_ok=True)
    made = experiment(tmp_path)
    run = probed(made, [0.0, 0.01, 0.02, 0.03, 0.04, 0.05], [10.0, 0.0, 20.0, 10.3, 0.0, 10.0], [0] * 6)
    found = Probes([run], 1)
    assert found.slowness(0).tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]
    assert found.slow_share(0) == pytest.approx(1 / 4) and found.are_known
    # The next probe is slow, but comes after a pause: it says nothing of the batch before.
    paused = probed(made, [0.0, 0.5], [10.0, 20.0], [0, 0])
    assert Probes([paused], 1).slowness(0).tolist() == [0.0, 1.0]
    # Each stage has its own cores; of what was before its first probe nothing is known.
    two = probed(made, [0.0, 0.0, 0.01, 0.01], [10.0, 0.0, 10.0, 20.0], [0, 1, 0, 1])
    found = Probes([two], 2)
    assert found.slowness(0).tolist() == [0.0, nothing, 0.0, 0.0]
    assert found.moments(0) == [SlowMoments([0.0, 0.01], [False, False]), SlowMoments([0.01], [False])]
    without = probed(made, [0.0, 0.01], [0.0, 0.0], [0, 0])
    found = Probes([without], 1)
    assert found.slow_share(0) is None and found.slowness(0).tolist() == [nothing, nothing]
    assert found.moments(0) == [SlowMoments([], [])] and not found.are_known
    # Usual is what it is in all runs: one that was slow throughout shows beside one that wasn't.
    slow = probed(made, [0.0, 0.01], [20.0, 20.0], [0, 0])
    both = Probes([paused, slow], 1)
    assert both.slow_share(1) == 1.0 and both.slowness(1).tolist() == [1.0, 1.0]
    assert not Probes([paused, without], 1).are_known


def test_slow_batches_are_held_against_like_ones() -> None:
    """By hand: decodes of one run took 1.2 times what is predicted on own cores and 1.8 in slow moments, of
    another, slower run 2 and 3 times: 1.5 times either way, though that run was slow more often."""
    run = np.array([0] * 40 + [1] * 40)
    slow = np.array([0.0] * 30 + [1.0] * 10 + [0.0] * 10 + [1.0] * 30)
    ratio = np.where(slow > 0.0, 1.5, 1.0) * np.where(run == 1, 2.0, 1.2)
    predicted_s = np.linspace(1.0, 3.0, 80)
    bound = np.zeros(80, dtype=np.int64)

    def found(keys: NDArray[np.int64], ratio: NDArray[np.float64], slow: NDArray[np.float64]) -> list[float]:
        return slowdowns(keys, bound, (predicted_s, ratio * predicted_s), slow)

    by_run = np.stack([run], axis=1)
    assert found(by_run, ratio, slow) == pytest.approx([1.5] * 4)
    # Halfway ones and those of which nothing is known count on neither side; nothing is quicker when slow.
    assert found(by_run, ratio, slow * 0.5) == [1.0] * 4
    assert found(by_run, ratio, slow * np.nan) == [1.0] * 4
    assert found(by_run, 1.0 / ratio, slow) == [1.0] * 4
    # Nobody to be held against: no slow batch has ten like ones on own cores.
    assert found(np.stack([run, slow.astype(np.int64)], axis=1), ratio, slow) == [1.0] * 4
    # Few of one bound take what all have, each against its own like ones.
    bound[38:42] = 1
    assert found(by_run, ratio, slow)[1] == pytest.approx(1.5)


def test_a_share_of_slow_moments_is_that_of_the_probes_around() -> None:
    """By hand: those within, and the ones before and after if they are at most 0.1 s away; else all."""
    moments = SlowMoments([1.0, 1.05, 1.1, 1.15], [False, True, True, False])
    assert moments.share(1.06, 1.09) == 1.0
    assert moments.share(1.04, 1.06) == pytest.approx(2 / 3)
    assert moments.share(0.5, 0.95) == 0.0 and moments.share(1.2, 1.3) == 0.0
    assert moments.share(0.0, 0.5) == moments.share(9.0, 9.5) == 0.5
    assert moments.share(1.0, 1.15) == 0.5
    assert SlowMoments().share(0.0, 1.0) == 0.0


def test_slow_moments_slow_down_what_falls_into_them(tmp_path: Path) -> None:
    """Requests one at a time: those while the machine is slow take longer, by what binds them."""
    made = experiment(tmp_path, scheduler={"priority": "fcfs", "chunking": "static", "chunk_tokens": 4096})
    one = replace(made.workload, arrival_s=np.arange(len(made.workload)) * 100.0)
    half_s = 50.0 * len(one)
    at_s = np.arange(0.0, 2 * half_s, 0.5)
    moments = [SlowMoments(at_s.tolist(), (at_s >= half_s - 50.0).tolist())]
    plain = simulate(one, made.setup)
    slowness = Slowness(moments, (9.0, 2.0, 9.0, 3.0))  # nobody decodes beside another
    slowed = simulate_paced(one, made.setup, [Pace()], slowness=slowness)
    factor = np.where(one.arrival_s >= half_s, 2.0, 1.0)
    np.testing.assert_allclose(slowed.ttft_s, factor * plain.ttft_s, rtol=1e-6)
    rest_s = plain.e2e_s - plain.ttft_s
    np.testing.assert_allclose(slowed.e2e_s - slowed.ttft_s, (2 * factor - 1) * rest_s, rtol=1e-6, atol=1e-12)
    # On top of a pace: a chunk that takes five times as long takes ten in a slow moment.
    both = simulate_paced(one, made.setup, [Pace(linear=Factors((5.0,)))], slowness=slowness)
    np.testing.assert_allclose(both.ttft_s, 5.0 * factor * plain.ttft_s, rtol=1e-6)
    with pytest.raises(ValueError, match="there are 4 slowdowns, not 1"):
        simulate_paced(one, made.setup, [Pace()], slowness=Slowness(moments, (1.0,)))


def test_host_times_of_older_runs_have_no_probes(tmp_path: Path) -> None:
    path = tmp_path / "host.csv"
    header, row = "batch,stage,schedule_s,launch_s,execute_s,sample_s", "0,0,0.1,0.2,0.3,0.4"
    path.write_text(f"{header}\n{row}\n")
    assert read_host_csv(path)["probe_s"].tolist() == [0.0]
    path.write_text(f"{header},probe_s\n{row},0.5\n")
    assert read_host_csv(path)["probe_s"].tolist() == [0.5]


def test_batches_on_own_cores_are_judged_apart(tmp_path: Path) -> None:
    """Those in slow moments took twice as long as predicted, the others as long: by hand."""
    made = experiment(tmp_path)
    _, live = noted(made, slower=0.0)
    batches = dict(live.records.batches)
    count = len(batches["start_s"])
    probe_s = np.where(np.arange(count) < count // 2, 10.0, 20.0)
    took_s = batches["end_s"] - batches["start_s"]
    batches["end_s"] = batches["start_s"] + took_s * np.where(probe_s > 10.0, 2.0, 1.0)
    zeros = np.zeros(count)
    host = dict.fromkeys(("execute_s", "sample_s"), zeros) | {"probe_s": probe_s}
    slowed = replace(live, records=replace(live.records, batches=batches), host=host)
    found = ladder(made, slowed)
    own = found.iterations.own_cores
    assert own is not None and own.count in (count // 2 - 1, count // 2) and own.p90 < 1e-6
    assert found.iterations.total is not None and found.iterations.total.p90 > 0.4
    assert f"over the {own.count:,} whose cores nobody else was on: median error" in found.rungs[1].text


# -- what is left at pace ---------------------------------------------------------------------------------


def times(bound: list[int], decodes: list[int], factor: list[float]) -> BatchTimes:
    """Batches of one stage, for each of which a second is predicted."""
    count = len(bound)
    parts_s = np.stack([np.ones(count), np.zeros(count), np.zeros(count)], axis=1)
    waits_s = np.zeros((2, count))
    held = (np.zeros(count, dtype=np.int64), np.array(bound), np.zeros(count, dtype=np.int64))
    known = np.array(decodes), np.zeros(count)
    return BatchTimes(parts_s, parts_s * np.nan, np.array(factor), *waits_s, *held, *known)


def at_pace_s(times: BatchTimes) -> NDArray[np.float64]:
    """With one stage and one bound: each batch as long as all are in the mean."""
    (pace,) = measured_paces(times, 1)
    return times.predicted_s * pace.decode.mean


def test_what_pace_leaves_is_what_like_batches_are_off_by() -> None:
    """By hand: 200 decodes of two took 1 s each, 200 of three 2 s: at a pace of 1.5 all are off, by 200 s of
    600 together."""
    found = times([0] * 400, [2, 3] * 200, [1.0, 2.0] * 200)
    left = leftover(found, at_pace_s(found))
    assert left is not None and left.share == pytest.approx(200 / 600)
    assert (left.worst, left.worst_error, left.worst_share) in (
        ("batches of 2 decodes", pytest.approx(0.5), pytest.approx(1 / 3)),
        ("batches of 3 decodes", pytest.approx(-0.25), pytest.approx(2 / 3)),
    )
    # All alike, however they scatter: nothing is left.
    alike = times([0] * 40, [2] * 40, [1.0, 3.0] * 20)
    left = leftover(alike, at_pace_s(alike))
    assert left is not None and left.share == pytest.approx(0.0)
    # Fewer than ten alike count together.
    few = times([0] * 10, list(range(10)), [1.0, 3.0] * 5)
    left = leftover(few, at_pace_s(few))
    assert left is not None
    assert (left.worst, left.share) == ("batches of other numbers of decodes", pytest.approx(0.0))


def test_what_is_left_by_chance_is_told_from_what_is_not() -> None:
    """Factors that have nothing to do with the number of decodes leave what they leave shifted; ones that do
    leave more."""
    rng = np.random.default_rng(4)
    decodes = rng.integers(1, 6, 600)
    slow = np.repeat(rng.choice([1.0, 1.8], 30), 20)
    by_chance = times([0] * 600, decodes.tolist(), slow.tolist())
    left = leftover(by_chance, at_pace_s(by_chance))
    assert left is not None and 0.0 < left.share < 1.3 * left.by_chance
    real = times([0] * 600, decodes.tolist(), (slow * (1.0 + 0.2 * decodes)).tolist())
    left = leftover(real, at_pace_s(real))
    assert left is not None and left.share > 2.0 * left.by_chance


def test_a_pace_of_too_few_batches_is_not_shown_as_measured() -> None:
    data = pace_data(Pace(Factors((2.0,)), Factors((1.0,), is_shared=True), Factors((3.0,))))
    assert data["linear"] is None and data["attention"] == {"mean": 3.0, "p10": 3.0, "p90": 3.0}


# -- the verdict ------------------------------------------------------------------------------------------


def test_where_decisions_hold_batch_times_are_to_blame(tmp_path: Path) -> None:
    made = experiment(tmp_path, validate={"request": TIGHT})
    _, live = noted(made)
    found = blame(ladder(made, live))
    assert found is not None and found.rung == "iteration"
    assert found.why.startswith("with the measured times fed back it decides alike, so what differs is batch")


def test_at_pace_the_evidence_is_what_pace_leaves(tmp_path: Path) -> None:
    made = experiment(tmp_path, parallel={"spp": 2}, validate={"request": TIGHT | {"speed": "measured"}})
    _, live = noted(made)
    judged = ladder(made, live)
    found = blame(judged)
    assert found is not None and found.rung == "iteration" and judged.leftover is not None
    assert "or which of them comes when: TTFT p50 is off by " in found.why
    assert f"like batches by {percent(judged.leftover.share)}" in found.why
    assert "what lies between stages by" in found.why
    # What like batches are off by is only held against them if it is more than chance.
    for by_chance, word in ((1.0, ", which is chance"), (-1.0, " by chance (")):
        left = replace(judged.leftover, by_chance=by_chance)
        again = blame(replace(judged, leftover=left))
        assert again is not None and word in again.why


def test_kernels_are_blamed_if_they_and_their_operators_are_off(tmp_path: Path) -> None:
    made = experiment(tmp_path, validate={"request": TIGHT})
    _, live = noted(made)
    judged = ladder(made, live)
    broken = Rung("operator", "broken", "gemm is off")
    for kernels, rung in ((0.2, "operator"), (-0.2, "operator"), (0.01, "iteration"), (None, "operator")):
        iterations = replace(judged.iterations, kernels=kernels)
        found = blame(replace(judged, rungs=(broken, *judged.rungs[1:]), iterations=iterations))
        assert found is not None and found.rung == rung
    assert blame(judged).rung == "iteration"  # type: ignore[union-attr]


def test_without_known_decisions_nothing_is_fed_back(tmp_path: Path) -> None:
    made = experiment(tmp_path, validate={"request": TIGHT})
    _, live = noted(made)
    judged = ladder(made, live)
    operator, iteration, decisions, request = judged.rungs
    unknown = replace(decisions, status="unknown")
    for status, rung in (("broken", "iteration"), ("holds", "request")):
        rungs = (operator, replace(iteration, status=status), unknown, request)
        found = blame(replace(judged, rungs=rungs))
        assert found is not None and found.rung == rung and "fed back" not in found.why


def test_a_latency_that_is_missing_is_the_requests_own(tmp_path: Path) -> None:
    made = experiment(tmp_path, validate={"request": TIGHT})
    _, live = noted(made)
    judged = ladder(made, live)
    comparisons = [replace(each, error=float("inf")) for each in judged.comparisons]
    found = blame(replace(judged, comparisons=comparisons))
    assert found is not None and found.rung == "request"


def test_a_run_with_slow_moments_is_right_as_probed(tmp_path: Path) -> None:
    """Requests one at a time: every other one finds the machine slow and takes twice what is predicted."""
    request = {"p50": 1e-6, "p90": 1e-6, "noise_factor": 0.0, "speed": "probed"}
    made = experiment(tmp_path, validate={"request": request})
    alone = replace(made.workload, arrival_s=np.arange(len(made.workload)) * 10.0)
    made = replace(made, workload=alone)

    def slower(batch: Batch, now_s: float) -> float:
        return 2.0 if now_s % 20.0 >= 10.0 else 1.0

    _, live = noted(made, slower=slower)
    start_s = live.records.batches["start_s"]
    host = dict.fromkeys(("execute_s", "sample_s"), np.zeros(len(start_s)))
    live = replace(live, host=host | {"probe_s": np.where(start_s % 20.0 >= 10.0, 20.0, 10.0)})
    judged = ladder(made, live)
    assert judged.slowdowns == pytest.approx([2.0] * 4)
    assert judged.passes and judged.rungs[-1].text.startswith("probed; nearest")
    as_it_is = [each for each in judged.comparisons if each.allowed is not None]
    assert max(abs(each.error) for each in as_it_is) > 0.3


def test_decisions_that_differ_need_no_other_reason(tmp_path: Path) -> None:
    made = experiment(tmp_path, validate={"request": TIGHT})
    _, live = noted(made)
    (tmp_path / "other").mkdir()
    other = experiment(
        tmp_path / "other",
        scheduler={"priority": "fcfs", "chunking": "static", "chunk_tokens": 64},
        validate={"request": TIGHT},
    )
    found = blame(ladder(other, live))
    assert found is not None and found.rung == "decisions" and "live run 1, after" in found.why


def test_as_it_is_comes_before_at_pace(tmp_path: Path) -> None:
    """A simulation that is right as it is needs no pace; another one has it, if the configuration says so."""
    request = {"p50": 1e-6, "p90": 1e-6, "noise_factor": 0.0}
    made = experiment(tmp_path, validate={"request": request | {"speed": "measured"}})
    _, same = noted(made, slower=0.0)
    held = ladder(made, same)
    assert held.passes and {each.speed for each in held.comparisons} == {"profile"}
    assert held.rungs[-1].text.startswith("as it is; nearest to its limit: ")
    _, slower = noted(made)
    failed = ladder(made, slower)
    assert not failed.passes and {each.speed for each in failed.comparisons} == {"measured"}
    assert failed.rungs[-1].text.startswith("at pace: TTFT p50 ")


def test_live_runs_that_differ_too_much_give_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = experiment(tmp_path, validate={"request": {"p50": 0.05, "p90": 0.1, "speed": "measured"}})
    runs = [noted(made, slower=slower)[1] for slower in (0.0, 1.0)]
    found = ladder(made, *runs)
    assert found.rungs[-1].status == "unknown" and not found.passes and blame(found) is None
    outcome = Outcome("noisy", made, runs, None, None, found, None, False, True)
    assert not outcome.passes
    assert verdict(outcome).startswith("no verdict: the live runs differ by ")
    assert verdict(outcome).endswith("; up to 33.0 % there is a verdict")
    print_outcome(outcome)
    assert "  noisy" in capsys.readouterr().out
    write_case(tmp_path / "out", outcome, plots=False)
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    assert suite.get("errors") == "1" and suite.get("failures") == "0"
    data = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not data["passes"] and data["blamed_rung"] is None
    # What is outside even of what such a difference allows is outside.
    strict: Any = {"request": {"p50": 1e-9, "p90": 1e-9, "noise_factor": 0.0}}
    (tmp_path / "strict").mkdir()
    assert blame(ladder(experiment(tmp_path / "strict", validate=strict), *runs)) is not None


# -- chance -----------------------------------------------------------------------------------------------


def test_a_right_simulation_misses_bounds_by_chance() -> None:
    """By hand: of draws 1, 1 and 2 the others' mean is within 5 % of none: 1.5 of 1, 1.5 of 1, 1 of 2."""

    def drawn(*ttfts_s: float) -> list[dict[str, Any]]:
        return [{"ttft_s": dict.fromkeys(("mean", "p50", "p90", "p99"), each)} for each in ttfts_s]

    tight = RequestTolerance(p50=0.05, p90=0.05, noise_factor=0.0, metrics=["ttft_s"])
    assert chance_to_hold([drawn(1.0, 1.0, 2.0)], tight) == 0.0
    assert chance_to_hold([drawn(1.0, 1.0, 1.0)], tight) == 1.0
    # Draws of 1.00, 1.00 and 1.09: the others are 4.5, 4.5 and 8.3 % off.
    near = drawn(1.0, 1.0, 1.09)
    assert chance_to_hold([near], tight) == pytest.approx(2 / 3)
    # Two runs have to hold together, and may be as far off as they are apart.
    assert chance_to_hold([near, near], tight) == pytest.approx(4 / 9)
    loose = tight.model_copy(update={"noise_factor": 1.5})
    assert chance_to_hold([near, near], loose) == pytest.approx(8 / 9)
    assert chance_to_hold([drawn(1.0)], tight) is None and chance_to_hold([], tight) is None


def test_what_slow_moments_did_is_said_or_that_nothing_is_known() -> None:
    first = "live run 1: somebody else was on a core at 40.0 % of the probes"
    factors = "decodes 1.50, with chunks 1.20, bound by attention 1.00, lone decodes 1.40"
    assert list(_slow_moments([0.4, 0.001, None], [1.5, 1.2, 1.0, 1.4])) == [
        first,
        f"then batches took so many times as long as on cores of their own: {factors}",
    ]
    found, unknown = _slow_moments([0.4, 0.001], [1.0] * 4)
    assert found == first and "isn't known" in unknown and "counts as nothing" in unknown
    assert list(_slow_moments([0.001, None], [1.0] * 4)) == []
