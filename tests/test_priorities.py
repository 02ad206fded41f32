"""Orders of waiting prefills, against arXiv 2409.17264 and hand-computed cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import PrefillWork, largest_chunk
from policies.priorities import EDF, FCFS, LARS, LRS, SRPT, Priority, find_priority
from policies.queue import HeapQueue, LinearQueue, ScanQueue, make_queue
from policies.request import Request
from specs.errors import InputError
from tests.fakes import LinearCost

# One second of prefill for every 100 tokens, whatever the chunk.
WORK = PrefillWork(LinearCost(token_s=0.01), target_s=0.32)


def request(id: int, arrival_s: float, work_s: float, deadline_s: float) -> Request:
    tokens = round(work_s * 100)
    return Request(id, arrival_s, tokens, 1, work_s=work_s, deadline_s=deadline_s)


LONG = request(0, 0.0, 10.0, 16.0)
SHORT = request(1, 5.0, 0.5, 1.0)


def test_worked_example_of_the_paper() -> None:
    lars = LARS(WORK)
    assert lars.relative_slack(LONG, 0.0) == pytest.approx(0.6)
    assert lars.relative_slack(SHORT, 5.0) == pytest.approx(1.0)
    # The long one has run for 5 s: its slack is untouched, the short one's falls by 2 a second of waiting.
    half_done = request(0, 0.0, 10.0, 16.0)
    half_done.scheduled_tokens = 500
    assert lars.relative_slack(half_done, 5.0) == pytest.approx(0.6)
    assert lars.key(half_done, 5.1) < lars.key(SHORT, 5.1)
    assert lars.key(half_done, 5.4) > lars.key(SHORT, 5.4)


def test_the_codes_normalization_divides_by_the_deadline() -> None:
    assert LARS(WORK, "deadline").relative_slack(LONG, 0.0) == pytest.approx(6.0 / 16.0)


@pytest.mark.parametrize(
    ("kind", "long_key", "short_key"),
    [(FCFS, 0.0, 5.0), (EDF, 16.0, 6.0), (SRPT, 10.0, 0.5), (LRS, 16.0 - 10.0, 6.0 - 0.5)],
)
def test_static_keys(kind: type[Priority], long_key: float, short_key: float) -> None:
    priority = kind(WORK)
    assert priority.key(LONG, 0.0) == pytest.approx(long_key)
    assert priority.key(SHORT, 0.0) == pytest.approx(short_key)


def test_slack_is_arrival_plus_deadline_minus_now_minus_remaining() -> None:
    assert LRS(WORK).slack_s(LONG, 2.0) == pytest.approx(0.0 + 16.0 - 2.0 - 10.0)


# Few distinct values, so that ties are frequent in every order.
requests_at = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1.0, 2.5, 40.0]),
        st.sampled_from([0.5, 1.0, 10.0]),
        st.sampled_from([1.0, 16.0]),
    ),
    min_size=1,
    max_size=40,
)


@given(requests_at, st.floats(0.0, 1000.0))
def test_fast_queues_serve_in_the_order_of_a_full_scan(
    rows: list[tuple[float, float, float]], now_s: float
) -> None:
    requests = [request(i, *row) for i, row in enumerate(rows)]
    for kind in (FCFS, SRPT, EDF, LRS, LARS):
        priority = kind(WORK)
        fast, slow = make_queue(priority), ScanQueue(priority)
        assert isinstance(fast, LinearQueue if kind is LARS else HeapQueue)
        for r in requests:
            fast.push(r)
            slow.push(r)
        at = now_s if kind is LARS else 0.0
        for _ in requests:
            assert fast.peek(at) == slow.peek(at)
            assert fast.pop(at) is slow.pop(at)
        assert fast.pop(at) is None
        assert len(fast) == 0


def test_queues_let_go_of_one_request() -> None:
    for kind in (FCFS, LARS):
        queue = make_queue(kind(WORK))
        queue.push(LONG)
        queue.push(SHORT)
        queue.remove(LONG)
        assert queue.requests() == [SHORT]


def test_a_policy_from_outside_is_found_by_its_path() -> None:
    assert find_priority("policies.priorities:SRPT") is SRPT


@pytest.mark.parametrize(
    "name", ["larz", "json:JSONDecoder", "nowhere.at.all:X", "policies.priorities:Nothing", ":"]
)
def test_an_unknown_policy_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        find_priority(name)


def test_an_unknown_policy_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'lars'"):
        find_priority("larz")


def test_largest_chunk_is_the_hand_computed_one() -> None:
    # 1 ms + 10 µs a token + 1 ns a pair: with 100,000 tokens of context a token costs 110 µs.
    cost = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-9)
    assert largest_chunk(cost, context=0, available=4096, budget_s=0.02) == 1888  # (20 − 1) ms ÷ 10 µs = 1900
    assert largest_chunk(cost, context=100_000, available=4096, budget_s=0.02) == 160  # 19 ms ÷ 110 µs = 172
    assert largest_chunk(cost, context=0, available=50, budget_s=0.02) == 50
    assert largest_chunk(cost, context=0, available=4096, budget_s=0.001) == 0


def test_what_is_found_fits_where_more_tokens_take_less() -> None:
    """Steps of 64 tokens, each with a tooth: 10 ms more just behind the borders."""

    class Sawtooth(LinearCost):
        def tokens_s(self, tokens: int, rows: int, requests: int) -> float:
            return super().tokens_s(tokens, rows, requests) + 0.01 * (tokens % 64 != 0)

    cost = Sawtooth(base_s=1e-3, token_s=1e-5, pair_s=0.0)
    for budget_s in (0.005, 0.0117, 0.014, 0.02, 0.0333):
        found = largest_chunk(cost, context=0, available=4095, budget_s=budget_s)
        assert found > 0 and cost.tokens_s(found, 1, 1) <= budget_s


@given(
    st.integers(0, 200_000),
    st.integers(1, 5000),
    st.floats(1e-4, 0.2),
    st.integers(0, 500),
    st.floats(0, 0.05),
)
def test_largest_chunk_equals_a_linear_search(
    context: int, available: int, budget_s: float, tokens: int, attention_s: float
) -> None:
    cost = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-9)
    found = largest_chunk(
        cost, context=context, available=available, budget_s=budget_s, tokens=tokens, attention_s=attention_s
    )
    sizes = [*range(32, available, 32), available]
    fits = [
        c
        for c in sizes
        if cost.tokens_s(tokens + c, 1, 1) + attention_s + cost.chunk_attention_s(c, context) <= budget_s
    ]
    assert found == max(fits, default=0)


def test_prefill_work_is_the_sum_of_a_lone_prefills_iterations() -> None:
    cost = LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-9)
    work = PrefillWork(cost, target_s=0.02)
    done, total_s = 0, 0.0
    while done < 20_000:
        chunk = largest_chunk(cost, context=done, available=min(4096, 20_000 - done), budget_s=0.02)
        total_s += cost.tokens_s(chunk, 1, 1) + cost.chunk_attention_s(chunk, done)
        done += chunk
    assert work.work_s(20_000) == pytest.approx(total_s, rel=0.02)
    assert work.work_s(0) == 0.0


@given(st.lists(st.integers(0, 2_000_000), min_size=2, max_size=20))
def test_prefill_work_is_monotone(lengths: list[int]) -> None:
    work = PrefillWork(LinearCost(base_s=1e-3, token_s=1e-5, pair_s=1e-9), target_s=0.02)
    values = [work.work_s(length) for length in sorted(lengths)]
    assert values == sorted(values)


def test_stream_pipelining_divides_prefill_work_by_the_stages() -> None:
    cost = LinearCost(base_s=1e-3, token_s=1e-5)
    one, four = PrefillWork(cost, target_s=0.02), PrefillWork(cost, target_s=0.02, stages=4)
    assert four.work_s(50_000) == pytest.approx(one.work_s(50_000) / 4)
