"""Whether cores slow each other: the figures by hand, and that a short measurement ends."""

from __future__ import annotations

import os

import numpy as np
import pytest

from experiments.bench_cores import NEIGHBOUR, measure, slowdown
from specs.errors import InputError

pytest.importorskip("torch")


def test_a_slowdown_is_a_mean_of_ratios_turn_by_turn() -> None:
    """By hand: turns of 2 and 8 times as long are 4 times, whatever else was going on."""
    ratio, error = slowdown(np.array([1.0, 5.0]), np.array([2.0, 40.0]))
    assert ratio == pytest.approx(4.0)
    assert error == pytest.approx(4.0 * np.log(4.0) / np.sqrt(2.0) / np.sqrt(2.0))


def test_a_short_measurement_has_all_turns_and_leaves_the_process_where_it_was() -> None:
    if not hasattr(os, "sched_getaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        pytest.skip("needs two cores to choose from")
    found = measure(2.0, cores[0], cores[1])
    assert len(found) == 3
    for times_s in found.values():
        assert times_s.shape == (2, len(NEIGHBOUR)) and (times_s > 0.0).all()
    assert sorted(os.sched_getaffinity(0)) == cores
    with pytest.raises(InputError, match="at least 2 for two turns"):
        measure(1.0, cores[0], cores[1])
