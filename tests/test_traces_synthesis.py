"""Samplers against their laws, arrivals against theirs, and the workloads that are built from both."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import ClosedLoop, Workload, arrival_times, build_workload, sample_lengths, stream
from traces.synthesis import sample_requests

stats = pytest.importorskip("scipy.stats")

ROOT = Path(__file__).parent.parent
N = 20_000
# Seeds are fixed, so a test that passes once passes always; p-values are asked to be unremarkable.
P_VALUE = 0.01


def sample_prompts(distribution: str, prompt: Any, n: int = N, seed: int = 1) -> np.ndarray[Any, Any]:
    spec = {"distribution": distribution, "prompt_tokens": prompt, "output_tokens": 3}
    prompts, outputs = sample_lengths(spec, n, stream(seed, "lengths"))
    assert prompts.dtype == outputs.dtype == np.int32
    assert set(outputs.tolist()) <= {3}
    return prompts


class TestStreams:
    def test_a_seed_and_purpose_give_the_same_numbers_in_every_process(self) -> None:
        script = "import traces; print(traces.stream(42, 'arrivals').integers(0, 10**9, 3).tolist())"
        command = [sys.executable, "-c", script]
        for hash_seed in ("1", "2"):  # hash() of a text depends on it
            environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
            )
            assert done.stdout.strip() == str(stream(42, "arrivals").integers(0, 10**9, 3).tolist())

    def test_purposes_and_seeds_differ(self) -> None:
        draws = {
            tuple(stream(seed, purpose).integers(0, 10**9, 4).tolist())
            for seed in range(5)
            for purpose in ("lengths", "arrivals", "router")
        }
        assert len(draws) == 15


class TestLengths:
    def test_fixed(self) -> None:
        assert set(sample_prompts("fixed", 512).tolist()) == {512}

    def test_a_number_is_a_constant_in_any_distribution(self) -> None:
        assert set(sample_prompts("lognormal", 512).tolist()) == {512}

    def test_uniform_reaches_both_ends_and_nothing_else_more_often(self) -> None:
        counts = np.bincount(sample_prompts("uniform", [3, 12]))[3:]
        assert len(counts) == 10
        assert stats.chisquare(counts).pvalue > P_VALUE

    def test_lognormal_against_scipy(self) -> None:
        # A median this large makes rounding invisible to the test.
        values = sample_prompts("lognormal", {"median": 1_000_000, "sigma": 0.8})
        assert stats.kstest(values, stats.lognorm(s=0.8, scale=1_000_000).cdf).pvalue > P_VALUE

    def test_a_bounded_lognormal_is_truncated_not_clipped(self) -> None:
        low, high = 500_000, 2_000_000
        law = stats.lognorm(s=0.8, scale=1_000_000)
        values = sample_prompts("lognormal", {"median": 1_000_000, "sigma": 0.8, "min": low, "max": high})
        assert low <= values.min() <= values.max() <= high

        def truncated(x: Any) -> Any:
            return (law.cdf(x) - law.cdf(low)) / (law.cdf(high) - law.cdf(low))

        assert stats.kstest(values, truncated).pvalue > P_VALUE

    def test_a_lognormal_without_spread(self) -> None:
        assert set(sample_prompts("lognormal", {"median": 77, "sigma": 0}).tolist()) == {77}

    @pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.7, 4.0])
    @pytest.mark.parametrize("low, high", [(1, 12), (100, 109)])
    def test_zipf_against_its_probabilities(self, exponent: float, low: int, high: int) -> None:
        values = sample_prompts("zipf", {"exponent": exponent, "min": low, "max": high})
        support = np.arange(low, high + 1, dtype=float)
        law = support**-exponent
        counts = np.bincount(values, minlength=high + 1)[low:]
        assert counts.sum() == N
        expected = N * law / law.sum()
        large = expected >= 5  # the chi-square approximation asks for that
        observed = [*counts[large], counts[~large].sum()] if not large.all() else counts
        theory = [*expected[large], expected[~large].sum()] if not large.all() else expected
        assert stats.chisquare(observed, theory).pvalue > P_VALUE

    def test_zipf_over_ten_million_lengths_needs_no_table(self) -> None:
        values = sample_prompts("zipf", {"exponent": 1.2, "min": 1, "max": 10_000_000})
        law = stats.zipfian(1.2, 10_000_000)
        for tokens in (1, 10, 1000):
            share = float((values <= tokens).mean())
            sigma = math.sqrt(law.cdf(tokens) * (1 - law.cdf(tokens)) / N)
            assert share == pytest.approx(law.cdf(tokens), abs=4 * sigma)

    def test_empirical_keeps_pairs_and_weights(self) -> None:
        spec = {
            "distribution": "empirical",
            "prompt_tokens": [10, 20, 30],
            "output_tokens": [1, 2, 3],
            "weights": [1, 1, 2],
        }
        prompts, outputs = sample_lengths(spec, N, stream(1, "lengths"))
        assert (prompts == 10 * outputs).all()
        assert stats.chisquare(np.bincount(outputs)[1:], [N / 4, N / 4, N / 2]).pvalue > P_VALUE

    def test_mixture_shares_and_classes(self) -> None:
        spec = {
            "distribution": "mixture",
            "components": [
                {"weight": 9, "distribution": "uniform", "prompt_tokens": [1, 100], "output_tokens": 5},
                {
                    "weight": 1,
                    "distribution": "fixed",
                    "prompt_tokens": 900,
                    "output_tokens": 5,
                    "slo_class": "long",
                },
            ],
        }
        sample = sample_requests(spec, N, stream(1, "lengths"))
        assert sample.slo_names == ("default", "long")
        assert sample.slo_class is not None
        assert ((sample.prompt_tokens == 900) == (sample.slo_class == 1)).all()
        assert stats.binomtest(int(sample.slo_class.sum()), N, 0.1).pvalue > P_VALUE

    def test_the_first_requests_do_not_depend_on_the_class_names(self) -> None:
        part = {"weight": 1, "distribution": "uniform", "prompt_tokens": [1, 100], "output_tokens": 5}
        plain = sample_requests({"distribution": "mixture", "components": [part]}, 50, stream(1, "x"))
        assert plain.slo_class is None
        named = {"distribution": "mixture", "components": [{**part, "slo_class": "a"}]}
        sample = sample_requests(named, 50, stream(1, "x"))
        assert sample.slo_names == ("a",)
        assert (sample.prompt_tokens == plain.prompt_tokens).all()

    @pytest.mark.parametrize(
        "distribution, prompt",
        [
            ("uniform", [1, 50]),
            ("lognormal", {"median": 100, "sigma": 2.0, "min": 50, "max": 200}),
            ("zipf", {"exponent": 1.1, "min": 5, "max": 5000}),
        ],
    )
    @given(n=st.integers(1, 60), more=st.integers(0, 300), seed=st.integers(0, 99))
    def test_a_longer_workload_begins_as_a_shorter_one(
        self, distribution: str, prompt: Any, n: int, more: int, seed: int
    ) -> None:
        part = {"distribution": distribution, "prompt_tokens": prompt, "output_tokens": prompt, "weight": 1}
        spec = {"distribution": "mixture", "components": [part, {**part, "slo_class": "b"}]}
        short, long = (sample_requests(spec, size, stream(seed, "lengths")) for size in (n, n + more))
        for name in ("prompt_tokens", "output_tokens", "slo_class"):
            assert getattr(long, name)[:n].tolist() == getattr(short, name).tolist()

    @given(
        low=st.integers(1, 2**31 - 1),
        width=st.integers(0, 2**31),
        exponent=st.floats(0, 100),
        n=st.integers(0, 200),
        seed=st.integers(0, 2**64),
    )
    def test_zipf_and_uniform_stay_within_any_bounds(
        self, low: int, width: int, exponent: float, n: int, seed: int
    ) -> None:
        high = min(low + width, 2**31 - 1)
        zipf = sample_prompts("zipf", {"exponent": exponent, "min": low, "max": high}, n, seed)
        uniform = sample_prompts("uniform", [low, high], n, seed)
        for values in (zipf, uniform):
            assert len(values) == n
            assert ((values >= low) & (values <= high)).all()

    @given(median=st.floats(1, 1e6), sigma=st.floats(0, 3), n=st.integers(0, 200))
    def test_lognormal_lengths_are_possible_ones(self, median: float, sigma: float, n: int) -> None:
        values = sample_prompts("lognormal", {"median": median, "sigma": sigma, "max": 10_000_000}, n)
        assert len(values) == n
        assert ((values >= 1) & (values <= 10_000_000)).all()


class TestArrivals:
    def test_poisson_gaps_are_exponential_and_uncapped(self) -> None:
        times = arrival_times({"process": "poisson", "rate_rps": 4.0}, stream(1, "arrivals"), n=N)
        gaps = np.diff(times, prepend=0.0)
        assert stats.kstest(gaps, stats.expon(scale=0.25).cdf).pvalue > P_VALUE
        assert gaps.max() > 6 * 0.25  # a cap at three means would load 5 % more than is asked for

    def test_poisson_counts_are_poisson(self) -> None:
        counts = [
            len(arrival_times({"process": "poisson", "rate_rps": 2.0}, stream(seed, "a"), duration_s=25.0))
            for seed in range(400)
        ]
        # The sum of 400 Poisson(50) is Poisson(20000); their dispersion is chi-square.
        assert abs(sum(counts) - 20_000) < 4 * math.sqrt(20_000)
        dispersion = sum((count - 50) ** 2 / 50 for count in counts)
        assert 0.001 < stats.chi2(400).cdf(dispersion) < 0.999

    @pytest.mark.parametrize("cv", [0.25, 1.0, 3.0])
    def test_gamma_gaps_have_the_rate_and_the_cv(self, cv: float) -> None:
        process = {"process": "gamma", "rate_rps": 5.0, "cv": cv}
        gaps = np.diff(arrival_times(process, stream(1, "arrivals"), n=N), prepend=0.0)
        law = stats.gamma(a=cv**-2, scale=cv**2 / 5.0)
        # Adding the gaps up rounds the tiny ones, of which a bursty process has many: count those.
        tiny = 1e-6
        assert stats.binomtest(int((gaps <= tiny).sum()), N, law.cdf(tiny)).pvalue > P_VALUE
        rest = gaps[gaps > tiny]
        assert stats.kstest(rest, lambda x: 1.0 - law.sf(x) / law.sf(tiny)).pvalue > P_VALUE

    def test_uniform(self) -> None:
        process = {"process": "uniform", "rate_rps": 4.0}
        assert arrival_times(process, stream(1, "a"), n=3).tolist() == [0.0, 0.25, 0.5]
        assert len(arrival_times(process, stream(1, "a"), duration_s=10.0)) == 40

    @given(
        rate_rps=st.floats(0.01, 100),
        cv=st.floats(0.1, 20),
        n=st.none() | st.integers(1, 300),
        duration_s=st.none() | st.floats(0.1, 30),
        kind=st.sampled_from(["poisson", "gamma", "uniform"]),
    )
    def test_bounds_are_kept_and_both_bind(
        self, rate_rps: float, cv: float, n: int | None, duration_s: float | None, kind: str
    ) -> None:
        if n is None and duration_s is None:
            return
        process = {"process": kind, "rate_rps": rate_rps} | ({"cv": cv} if kind == "gamma" else {})
        times = arrival_times(process, stream(3, "a"), n=n, duration_s=duration_s)
        assert (np.diff(times) >= 0).all()
        assert n is None or len(times) <= n
        assert duration_s is None or (times < duration_s).all()
        if duration_s is None:
            assert len(times) == n

    def test_a_longer_run_begins_as_a_shorter_one(self) -> None:
        process = {"process": "poisson", "rate_rps": 3.0}
        short = arrival_times(process, stream(1, "a"), duration_s=10.0)
        long = arrival_times(process, stream(1, "a"), duration_s=1000.0)
        assert long[: len(short)] == pytest.approx(short, rel=1e-12)


TIMED = "arrival_s,prompt_tokens,output_tokens\n10,1,11\n12,2,12\n16,3,13\n"
FIXED = {"distribution": "fixed", "prompt_tokens": 10, "output_tokens": 100}


def build(
    folder: Path,
    lengths: dict[str, Any],
    arrivals: dict[str, Any],
    n: int | None = None,
    duration_s: float | None = None,
    seed: int = 1,
) -> tuple[Workload, ClosedLoop | None]:
    (folder / "timed.csv").write_text(TIMED)
    return build_workload(lengths, arrivals, n, duration_s, seed, folder)


def times_of(workload: Workload) -> list[float]:
    assert workload.arrival_s is not None
    return workload.arrival_s.tolist()


class TestBuild:
    def test_a_trace_at_its_own_times_stretched_and_bounded(self, tmp_path: Path) -> None:
        trace = {"trace": "timed.csv"}
        assert times_of(build(tmp_path, trace, {"process": "trace"})[0]) == [0.0, 2.0, 6.0]
        stretched = {"process": "trace", "time_scale": 0.5}
        assert times_of(build(tmp_path, trace, stretched)[0]) == [0.0, 1.0, 3.0]
        assert times_of(build(tmp_path, trace, stretched, duration_s=3.0)[0]) == [0.0, 1.0]
        assert times_of(build(tmp_path, trace, stretched, n=1, duration_s=3.0)[0]) == [0.0]

    def test_a_trace_s_lengths_at_other_times_go_round(self, tmp_path: Path) -> None:
        arrivals = {"process": "uniform", "rate_rps": 1.0}
        workload, loop = build(tmp_path, {"trace": "timed.csv"}, arrivals, n=5)
        assert loop is None
        assert workload.prompt_tokens.tolist() == [1, 2, 3, 1, 2]
        assert workload.output_tokens.tolist() == [11, 12, 13, 11, 12]
        assert times_of(workload) == [0.0, 1.0, 2.0, 3.0, 4.0]

    def test_without_bounds_a_trace_is_taken_once(self, tmp_path: Path) -> None:
        arrivals = {"process": "poisson", "rate_rps": 1.0}
        assert len(build(tmp_path, {"trace": "timed.csv"}, arrivals)[0]) == 3

    def test_prefix_blocks_are_kept(self, tmp_path: Path) -> None:
        row = '{"timestamp": %d, "input_length": 600, "output_length": 5, "hash_ids": [0, %d]}\n'
        (tmp_path / "m.jsonl").write_text("".join(row % (i, i + 1) for i in range(2)))
        workload, _ = build(tmp_path, {"trace": "m.jsonl"}, {"process": "uniform", "rate_rps": 1.0}, n=3)
        assert workload.prefix is not None
        assert [workload.prefix.row(i).tolist() for i in range(3)] == [[0, 1], [0, 2], [0, 1]]

    def test_a_trace_can_be_drawn_from(self, tmp_path: Path) -> None:
        spec = {"distribution": "empirical", "trace": "timed.csv"}
        workload, _ = build(tmp_path, spec, {"process": "uniform", "rate_rps": 1.0}, n=300)
        assert (workload.output_tokens == workload.prompt_tokens + 10).all()
        assert workload.prompt_tokens.tolist() != [1, 2, 3] * 100
        assert set(workload.prompt_tokens.tolist()) == {1, 2, 3}

    def test_a_trace_can_be_part_of_a_mixture(self, tmp_path: Path) -> None:
        components = [
            {"weight": 0.5, "trace": "timed.csv", "slo_class": "chat"},
            {"weight": 0.5, **FIXED, "slo_class": "batch"},
        ]
        spec = {"distribution": "mixture", "components": components}
        workload, _ = build(tmp_path, spec, {"process": "uniform", "rate_rps": 1.0}, n=300)
        assert workload.slo_names == ("chat", "batch")
        assert workload.slo_class is not None
        assert ((workload.slo_class == 1) == (workload.prompt_tokens == 10)).all()

    def test_closed_loop(self, tmp_path: Path) -> None:
        arrivals = {"process": "closed_loop", "concurrency": 4, "think_time_s": 0.5}
        workload, loop = build(tmp_path, FIXED, arrivals, n=40)
        assert loop == ClosedLoop(4, 0.5)
        assert len(workload) == 40
        assert workload.arrival_s is None
        of_trace, _ = build(tmp_path, {"trace": "timed.csv"}, {"process": "closed_loop", "concurrency": 2})
        assert len(of_trace) == 3

    def test_a_closed_loop_bounded_by_time_cannot_run_dry(self, tmp_path: Path) -> None:
        arrivals = {"process": "closed_loop", "concurrency": 4, "think_time_s": 0.4}
        workload, _ = build(tmp_path, FIXED, arrivals, duration_s=100.0)
        # 100 output tokens at a millisecond each and 0.4 s of thinking: 200 rounds and the first.
        assert len(workload) == 4 * 201

    def test_seeds_and_streams(self, tmp_path: Path) -> None:
        spec = {"distribution": "uniform", "prompt_tokens": [1, 10_000], "output_tokens": [1, 10_000]}
        poisson = {"process": "poisson", "rate_rps": 1.0}
        gamma = {"process": "gamma", "rate_rps": 1.0, "cv": 4.0}
        one, same, other = (build(tmp_path, spec, poisson, n=50, seed=seed)[0] for seed in (1, 1, 2))
        assert times_of(one) == times_of(same)
        assert one.prompt_tokens.tolist() == same.prompt_tokens.tolist()
        assert one.prompt_tokens.tolist() != other.prompt_tokens.tolist()
        # Lengths have a stream of their own: another process leaves them as they are.
        bursty, _ = build(tmp_path, spec, gamma, n=50, seed=1)
        assert bursty.prompt_tokens.tolist() == one.prompt_tokens.tolist()
        assert times_of(bursty) != times_of(one)
