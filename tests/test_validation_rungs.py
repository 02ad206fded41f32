"""What a validation says beside its figures: which rung to look at and why, and when there is no verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.batch_times import BatchTimes
from experiments.blame import blame
from experiments.build import Experiment
from experiments.live_records import LiveRun
from experiments.pace import leftover, measured_paces
from experiments.run import summarize_run
from experiments.rungs import Ladder, climb
from experiments.slow_moments import slow_moments, slow_share, slowdowns, slowness
from experiments.text import percent
from experiments.validation_files import Outcome, pace_data, write_case
from experiments.validation_text import print_outcome, verdict
from sim.cluster import simulate
from sim.paced import Factors, Pace
from sim.slowed import SlowMoments, simulate_slowed
from tests.test_validate import experiment, noted
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
    assert slowness(run).tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]
    assert slow_share(run) == pytest.approx(1 / 4)
    # The next probe is slow, but comes after a pause: it says nothing of the batch before.
    paused = probed(made, [0.0, 0.5], [10.0, 20.0], [0, 0])
    assert slowness(paused).tolist() == [0.0, 1.0]
    # Each stage has its own cores; of what was before its first probe nothing is known.
    two = probed(made, [0.0, 0.0, 0.01, 0.01], [10.0, 0.0, 10.0, 20.0], [0, 1, 0, 1])
    assert slowness(two).tolist() == [0.0, nothing, 0.0, 1.0]
    assert slow_moments(two, 2) == [SlowMoments([0.0, 0.01], [False, False]), SlowMoments([0.01], [True])]
    without = probed(made, [0.0, 0.01], [0.0, 0.0], [0, 0])
    assert slow_share(without) is None and slowness(without).tolist() == [nothing, nothing]
    assert slow_moments(without, 1) == [SlowMoments()]


def test_slow_batches_are_held_against_those_on_own_cores() -> None:
    """By hand: decodes took 1.2 times as predicted on own cores and 1.8 in slow moments; of chunks there are
    too few on one side, which take what all took: (12 + 8 · 1) ÷ 20 = 1 and (18 + 22) ÷ 20 = 2 times."""
    bound = np.array([0] * 20 + [1] * 18)
    slow = np.array([0.0] * 10 + [1.0] * 10 + [0.0] * 8 + [1.0] * 10)
    ratio = np.array([1.2] * 10 + [1.8] * 10 + [0.75] * 8 + [2.2] * 10)
    found = slowdowns(bound, ratio, np.ones(38), slow)
    everything = 2.0 / ((12.0 + 6.0) / 18.0)
    assert found == pytest.approx([1.5, everything, everything])
    # Halfway ones and those of which nothing is known count on neither side; nothing is quicker when slow.
    assert slowdowns(bound, ratio, np.ones(38), slow * 0.5) == [1.0, 1.0, 1.0]
    assert slowdowns(bound, 1.0 / ratio, np.ones(38), slow)[0] == 1.0
    # The level doesn't matter, however well batches are predicted.
    assert slowdowns(bound, 3.0 * ratio, np.ones(38), slow) == pytest.approx(found)


def test_a_share_of_slow_moments_is_that_of_the_probes_around() -> None:
    """By hand: those within, the one before and the one after."""
    moments = SlowMoments([1.0, 2.0, 3.0, 4.0], [False, True, True, False])
    assert moments.share(2.1, 2.9) == 1.0
    assert moments.share(1.5, 2.5) == pytest.approx(2 / 3)
    assert moments.share(0.0, 0.5) == 0.0 and moments.share(9.0, 9.5) == 0.0
    assert moments.share(0.0, 9.0) == 0.5
    assert SlowMoments().share(0.0, 1.0) == 0.0


def test_slow_moments_slow_down_what_falls_into_them(tmp_path: Path) -> None:
    """Requests one at a time: those while the machine is slow take longer, by what binds them."""
    made = experiment(tmp_path, scheduler={"priority": "fcfs", "chunking": "static", "chunk_tokens": 4096})
    one = replace(made.workload, arrival_s=np.arange(len(made.workload)) * 100.0)
    half_s = 50.0 * len(one)
    at_s = np.arange(0.0, 2 * half_s, 0.5)
    moments = [SlowMoments(at_s.tolist(), (at_s >= half_s - 50.0).tolist())]
    plain = simulate(one, made.setup)
    slowed = simulate_slowed(one, made.setup, moments, (3.0, 2.0, 9.0))
    factor = np.where(one.arrival_s >= half_s, 2.0, 1.0)
    np.testing.assert_allclose(slowed.ttft_s, factor * plain.ttft_s, rtol=1e-6)
    rest_s = plain.e2e_s - plain.ttft_s
    np.testing.assert_allclose(slowed.e2e_s - slowed.ttft_s, (2 * factor - 1) * rest_s, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="there are 3 slowdowns, not 1"):
        simulate_slowed(one, made.setup, moments, (1.0,))


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


def test_what_pace_leaves_is_what_like_batches_are_off_by() -> None:
    """By hand: 20 decodes of two took 1 s, 20 of three 2 s: at a pace of 1.5 both are off by 10 s of 60."""
    found = times([0] * 40, [2] * 20 + [3] * 20, [1.0] * 20 + [2.0] * 20)
    left = leftover(found, measured_paces(found, 1))
    assert left is not None and left.share == pytest.approx(20 / 60)
    assert (left.worst, left.worst_error) in (
        ("decodes of 2", pytest.approx(0.5)),
        ("decodes of 3", pytest.approx(-0.25)),
    )
    # All alike, however they scatter: nothing is left. Fewer than ten alike count together.
    alike = times([0] * 40, [2] * 40, [1.0, 3.0] * 20)
    left = leftover(alike, measured_paces(alike, 1))
    assert left is not None and left.share == pytest.approx(0.0)
    few = times([0] * 10, list(range(10)), [1.0, 3.0] * 5)
    left = leftover(few, measured_paces(few, 1))
    assert left is not None and (left.worst, left.share) == ("few alike", pytest.approx(0.0))


def test_a_pace_of_too_few_batches_is_not_shown_as_measured() -> None:
    data = pace_data(Pace(Factors((2.0,)), Factors((1.0,), is_shared=True), Factors((3.0,))))
    assert data["linear"] is None and data["attention"] == {"mean": 3.0, "p10": 3.0, "p90": 3.0}


# -- the verdict ------------------------------------------------------------------------------------------


def test_where_decisions_hold_batch_times_are_to_blame(tmp_path: Path) -> None:
    made = experiment(tmp_path, validate={"request": TIGHT})
    _, live = noted(made)
    found = blame(ladder(made, live))
    assert found is not None and found.rung == "iteration"
    assert found.why.startswith(
        "with the measured times fed back it decides alike, so batch times are to blame: med"
    )


def test_at_pace_the_evidence_is_what_pace_leaves(tmp_path: Path) -> None:
    made = experiment(tmp_path, parallel={"spp": 2}, validate={"request": TIGHT | {"speed": "measured"}})
    _, live = noted(made)
    judged = ladder(made, live)
    found = blame(judged)
    assert found is not None and found.rung == "iteration" and judged.leftover is not None
    assert f"at pace like batches are off by {percent(judged.leftover.share)} (" in found.why
    assert "what lies between stages by" in found.why and "simulations differ by chance by ±" in found.why


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
    assert verdict(outcome).endswith(", 33.0 % at most say something")
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
