"""Simulations of live runs at the machine's speed: what each of them takes from which run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from experiments.batch_times import BatchTimes, batch_times
from experiments.blame import blame
from experiments.build import Experiment
from experiments.forecasts import SIMULATIONS, Forecasts, forecast
from experiments.live_records import LiveRun
from experiments.run import summarize_run
from experiments.rungs import climb
from experiments.slow_moments import Probes
from experiments.validation_files import Outcome
from experiments.validation_text import print_outcome
from policies.batch import Batch
from sim.cluster import simulate
from tests.test_replayed_runs import experiment, noted
from traces.records import RunRecords

FACTOR = 3.0  # of slow moments, unless something else is said


def one_at_a_time(tmp_path: Path, count: int = 40) -> Experiment:
    """Requests that never meet, so that each latency is a sum of its own batches' times."""
    request = {"p50": 1e-6, "p90": 1e-6, "noise_factor": 0.0, "most_noise": 1e6, "speed": "calibrated"}
    made = experiment(tmp_path, validate={"request": request})
    workload = made.workload.head(count)
    alone = replace(workload, arrival_s=np.arange(len(workload)) * 10.0)
    return replace(made, workload=alone)


def served(
    made: Experiment,
    own: float,
    is_slow: Callable[[float], bool],
    *,
    factor: float = FACTOR,
    probes: bool = True,
) -> LiveRun:
    """A run whose batches take ``own`` times what is predicted, and ``factor`` times that in slow moments."""

    def slower(batch: Batch, now_s: float) -> float:
        return own * (factor if is_slow(now_s) else 1.0)

    _, live = noted(made, slower=slower)
    start_s = live.records.batches["start_s"]
    host = dict.fromkeys(("execute_s", "sample_s"), np.zeros(len(start_s)))
    if probes:
        host["probe_s"] = np.array([20.0 if is_slow(at_s) else 10.0 for at_s in start_s.tolist()])
    return replace(live, host=host)


def of(made: Experiment, runs: list[LiveRun]) -> Forecasts:
    probes = Probes(runs, made.parallel.spp)
    return forecast(made, parts(made, runs, probes), probes)


def parts(made: Experiment, runs: list[LiveRun], probes: Probes) -> list[BatchTimes]:
    cost, sharding = made.iteration, made.setup.sharding
    found = [batch_times(run, made.workload, cost, sharding) for run in runs]
    return [replace(part, slowness=probes.slowness(place)) for place, part in enumerate(found)]


def odd(at_s: float) -> bool:
    return at_s % 20.0 >= 10.0


def even(at_s: float) -> bool:
    return not odd(at_s)


def never(at_s: float) -> bool:
    return False


def test_a_run_is_forecast_by_another_one_and_its_own_slow_moments(tmp_path: Path) -> None:
    """The other run was slow at other times, and equally fast otherwise: so the forecast is right."""
    made = one_at_a_time(tmp_path)
    runs = [served(made, 1.4, odd), served(made, 1.4, even)]
    found = of(made, runs)
    assert [len(draws) for draws in found.calibrated] == [SIMULATIONS] * 2
    for run, draws, paced, probed in zip(runs, found.calibrated, found.at_pace, found.probed, strict=True):
        for records in (*draws, *paced):
            np.testing.assert_allclose(records.ttft_s, run.records.ttft_s, rtol=1e-6)
            np.testing.assert_allclose(records.e2e_s, run.records.e2e_s, rtol=1e-6)
        # Its slow moments alone don't say how fast it was otherwise.
        np.testing.assert_allclose(1.4 * probed.ttft_s, run.records.ttft_s, rtol=1e-6)
    assert found.batch_errors == pytest.approx([0.0, 0.0], abs=1e-9)
    simulated = summarize_run(simulate(made.workload, made.setup), made)
    judged = climb(made, simulated, runs)
    assert judged.passes and {each.speed for each in judged.comparisons} == {"calibrated"}
    assert judged.rungs[-1].text.startswith("calibrated; nearest to its limit")


def test_a_run_that_was_slower_than_the_others_is_forecast_too_fast(tmp_path: Path) -> None:
    """By hand: of runs at 1 and 1.5 times what is predicted each is taken for the other."""
    made = one_at_a_time(tmp_path)
    runs = [served(made, 1.0, never), served(made, 1.5, never)]
    found = of(made, runs)
    assert found.batch_errors == pytest.approx([0.5, 1.0 / 1.5 - 1.0])
    np.testing.assert_allclose(found.calibrated[0][0].ttft_s, runs[1].records.ttft_s, rtol=1e-6)
    np.testing.assert_allclose(found.calibrated[1][0].ttft_s, runs[0].records.ttft_s, rtol=1e-6)
    simulated = summarize_run(simulate(made.workload, made.setup), made)
    judged = climb(made, simulated, runs)
    (ttft, *_) = judged.comparisons
    assert ttft.error_calibrated == pytest.approx(0.5) and not judged.passes
    named = blame(judged)
    assert named is not None and named.rung == "iteration"
    assert "calibrated on the others, those of each live run are off by +50.0 %, -33.3 %" in named.why
    assert named.why.endswith("at the pace of its own batches all is within tolerance")
    worse = [replace(each, error_at_pace=0.5, scatter_at_pace=0.1) for each in judged.comparisons]
    named = blame(replace(judged, comparisons=worse))
    assert named is not None and "at the pace of its own batches TTFT p50 is off by " in named.why
    # Of three, the other two count together: a third run like the first halves what the second is taken for.
    three = of(made, [*runs, served(made, 1.0, never)])
    assert three.batch_errors == pytest.approx([0.25, 1.0 / 1.5 - 1.0, 0.25])


def test_what_slow_moments_do_is_taken_from_the_other_run(tmp_path: Path) -> None:
    """By hand: batches of one run took three times as long in slow moments, of the other one 1.5 times."""
    made = one_at_a_time(tmp_path)
    runs = [served(made, 1.0, odd), served(made, 1.0, odd, factor=1.5)]
    found = of(made, runs)
    plain = simulate(made.workload, made.setup)
    is_slow = np.array([odd(at_s) for at_s in made.workload.arrival_s.tolist()])
    for place, theirs, its_own in ((0, 1.5, 3.0), (1, 3.0, 1.5)):
        for records in (*found.calibrated[place], found.probed[place]):
            np.testing.assert_allclose(
                records.ttft_s, np.where(is_slow, theirs, 1.0) * plain.ttft_s, rtol=1e-6
            )
        for records in found.at_pace[place]:
            np.testing.assert_allclose(
                records.ttft_s, np.where(is_slow, its_own, 1.0) * plain.ttft_s, rtol=1e-6
            )


@pytest.mark.parametrize("only_slow", [False, True])
@pytest.mark.parametrize("changes", [{}, {"parallel": {"spp": 2}}])
def test_no_batch_time_is_in_the_forecast_of_its_own_run(
    tmp_path: Path, changes: dict[str, object], only_slow: bool
) -> None:
    """Other times of one run's batches, or of those in slow moments, change all forecasts but its own."""
    made = experiment(tmp_path, **changes)
    runs = [noted(made, slower=slower)[1] for slower in (0.1, 0.2)]
    for place, run in enumerate(runs):
        count = len(run.records.batches["start_s"])
        probe_s = np.where(np.arange(count) // 6 % 2 == 0, 10.0, 20.0)
        runs[place] = replace(
            run, host={"probe_s": probe_s, "execute_s": 0 * probe_s, "sample_s": 0 * probe_s}
        )
    probes = Probes(runs, made.parallel.spp)
    assert probes.are_known
    before_parts = parts(made, runs, probes)
    chosen = before_parts[0].slowness == 1.0 if only_slow else np.ones(len(before_parts[0].stage), dtype=bool)
    assert chosen.sum() > 10
    longer = np.where(chosen, 2.0, 1.0) * before_parts[0].measured_s
    changed = [replace(before_parts[0], measured_s=longer), before_parts[1]]
    before, after = (forecast(made, found, probes) for found in (before_parts, changed))

    def ends_s(records: RunRecords) -> NDArray[np.float64]:
        found: NDArray[np.float64] = records.batches["end_s"]
        return found

    def are_equal(one: Sequence[RunRecords], other: Sequence[RunRecords]) -> bool:
        return all(np.array_equal(ends_s(a), ends_s(b)) for a, b in zip(one, other, strict=True))

    assert are_equal(before.calibrated[0], after.calibrated[0])
    assert are_equal(before.probed[:1], after.probed[:1])
    assert are_equal(before.at_pace[1], after.at_pace[1])
    assert not are_equal(before.calibrated[1], after.calibrated[1])
    # All longer by the same, slow moments make as much of them as before.
    assert are_equal(before.probed[1:], after.probed[1:]) != only_slow
    assert not are_equal(before.at_pace[0], after.at_pace[0])


def test_without_probes_a_run_is_as_fast_as_the_others_were_in_all(tmp_path: Path) -> None:
    made = one_at_a_time(tmp_path)
    runs = [served(made, 1.4, never, probes=False), served(made, 1.4, never, probes=False)]
    found = of(made, runs)
    assert found.probed == []
    np.testing.assert_allclose(found.calibrated[0][0].ttft_s, runs[0].records.ttft_s, rtol=1e-6)


def test_one_run_without_probes_leaves_slow_moments_in_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slow moments that can't be put back into a run aren't taken out of what it is forecast by."""
    made = one_at_a_time(tmp_path)
    runs = [served(made, 1.0, odd), served(made, 1.0, odd, probes=False)]
    found = of(made, runs)
    assert found.probed == [] and found.batch_errors == pytest.approx([0.0, 0.0], abs=1e-9)
    total_s = [float(records.e2e_s.sum()) for records in (runs[1].records, found.calibrated[1][0])]
    assert total_s[1] == pytest.approx(total_s[0], rel=0.3)
    judged = climb(made, summarize_run(simulate(made.workload, made.setup), made), runs)
    print_outcome(Outcome("half", made, runs, None, None, judged, None, False, True))
    assert "live run 2 has no probes: slow moments are left out of all" in capsys.readouterr().out


def test_every_run_has_draws_of_its_own(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    live = noted(made)[1]
    found = of(made, [live, live])
    ends_s = [tuple(r.batches["end_s"].tolist()) for draws in found.at_pace for r in draws]
    assert len(set(ends_s)) == 2 * SIMULATIONS


def test_a_single_run_has_no_others(tmp_path: Path) -> None:
    made = one_at_a_time(tmp_path)
    found = of(made, [served(made, 1.4, odd)])
    assert found.calibrated == [] and found.batch_errors == []
    assert len(found.probed) == 1 and len(found.at_pace) == 1
    judged = climb(made, summarize_run(simulate(made.workload, made.setup), made), [served(made, 1.4, odd)])
    assert {each.speed for each in judged.comparisons} == {"probed"}


def test_batches_that_no_probe_speaks_of_count_as_the_others(tmp_path: Path) -> None:
    """Of a run that was slow every other time, the first half has no probe: it counts as half slow."""
    made = one_at_a_time(tmp_path)
    runs = [served(made, 1.0, odd), served(made, 1.0, odd)]
    probe_s = runs[0].host["probe_s"].copy()
    half = len(probe_s) // 2
    probe_s[:half] = 0.0
    runs[0] = replace(runs[0], host={**runs[0].host, "probe_s": probe_s})
    slowness = Probes(runs, 1).slowness(0)
    assert np.isnan(slowness[:half]).all() and not np.isnan(slowness[half:]).any()
    found = of(made, runs)
    assert found.batch_errors[0] == pytest.approx(0.0, abs=0.05)
