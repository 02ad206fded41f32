"""What a measuring session keeps: every visit that ended, through kills, resumes and failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiler.measure.points import Point
from profiler.measure.session import FIRST, Session, interleave
from profiler.measure.store import OK, OUT_OF_MEMORY, Store, Visit
from specs.errors import InputError

SETUP = {"device": "cpu", "threads": 1}
GEMM = [Point("gemm", (m, 64, 32)) for m in (1, 2, 4, 8)]
NORM = [Point("norm", (m * 1024, m, 64)) for m in (1, 2)]


def visit(time_s: float = 1e-3, cost_s: float = 0.5, status: str = OK) -> Visit:
    return Visit(time_s, 1e-5, 9, cost_s, status)


def test_a_resumed_store_holds_what_was_added(tmp_path: Path) -> None:
    store = Store(tmp_path, SETUP, resume=False)
    store.add(GEMM[0], visit(1e-3))
    store.add(GEMM[0], visit(3e-3))
    store.add(NORM[0], visit(0.0, status=OUT_OF_MEMORY))
    store.close()
    again = Store(tmp_path, SETUP, resume=True)
    assert again.points == store.points and again.cost_s == pytest.approx(1.5)
    assert again.measured()["gemm"][GEMM[0]].time_s(0.5) == pytest.approx(2e-3)
    assert again.failed() == [(NORM[0], OUT_OF_MEMORY)] and "norm" not in again.measured()
    again.close()


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path, SETUP, resume=False)
    for point in GEMM:
        store.add(point, visit())
    store.close()
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-7])
    again = Store(tmp_path, SETUP, resume=True)
    assert list(again.points) == GEMM[:3]
    again.add(GEMM[3], visit())
    again.close()
    assert store.path.read_bytes() == whole


def test_another_set_up_is_refused_by_name(tmp_path: Path) -> None:
    Store(tmp_path, SETUP, resume=False).close()
    with pytest.raises(InputError, match="is there already; go on with --resume"):
        Store(tmp_path, SETUP, resume=False)
    with pytest.raises(InputError, match="another set-up: threads is 1, now 2"):
        Store(tmp_path, {**SETUP, "threads": 2}, resume=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("gemm,1;2,0,1e-3,0,9,0.1,ok", "row 3 is unreadable .*not 3 whole numbers"),
        ("conv,1;2,0,1e-3,0,9,0.1,ok", "row 3 is unreadable .*unknown operator 'conv'"),
        ("gemm,1;2;3,0,soon,0,9,0.1,ok", "row 3 is unreadable"),
    ],
)
def test_unreadable_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    store = Store(tmp_path, SETUP, resume=False)
    store.close()
    with store.path.open("a") as file:
        file.write(row + "\n")
    with pytest.raises(InputError, match=message):
        Store(tmp_path, SETUP, resume=True)


def run_session(
    store: Store, budget_s: float, *, refine: list[Point] | None = None, times: dict[Point, list[float]]
) -> list[Point]:
    order: list[Point] = []

    def measure(point: Point) -> Visit:
        order.append(point)
        values = times.get(point, [1e-3])
        return visit(values[min(order.count(point), len(values)) - 1], cost_s=1.0)

    def propose(_store: Store, _count: int) -> list[Point]:
        return refine or []

    Session(store, interleave({"gemm": GEMM, "norm": NORM}), measure, propose, budget_s).run()
    return order


def test_the_budget_goes_to_the_grid_then_to_doubt_then_to_repeats(tmp_path: Path) -> None:
    extra = Point("gemm", (16, 64, 32))
    unsteady = {NORM[1]: [1e-3, 2e-3, 3e-3, 2e-3]}
    store = Store(tmp_path, SETUP, resume=False)
    order = run_session(store, 25.0, refine=[extra], times=unsteady)
    assert set(order[:6]) == {*GEMM, *NORM} and order[6] == extra
    assert sorted(order[7:14]) == sorted({*GEMM, *NORM, extra})
    assert order[14:] == [NORM[1]] * 7  # only the point whose visits disagree, nine times in all
    store.close()


def test_the_first_points_of_every_operator_come_before_more_of_any() -> None:
    many = [Point("gemm", (m, 8, 8)) for m in range(1, 41)]
    few = [Point("norm", (64, rows, 4)) for rows in range(1, 9)]
    order = interleave({"gemm": many, "norm": few})
    for rank in range(FIRST):  # in turn
        assert set(order[2 * rank : 2 * rank + 2]) == {many[rank], few[rank]}
    assert sorted(order) == sorted([*many, *few])
    # The rest of either is spread over the rest of the time.
    assert 10 < order.index(few[-2]) < len(order) - 5 and order[-1] in (many[-1], few[-1])


def test_an_early_stop_and_a_resume_measure_each_point_once(tmp_path: Path) -> None:
    store = Store(tmp_path, SETUP, resume=False)
    first = run_session(store, 3.0, times={})
    store.close()
    again = Store(tmp_path, SETUP, resume=True)
    second = run_session(again, 6.0, times={})
    again.close()
    assert len(first) == len(second) == 3
    assert {*first, *second} == {*GEMM, *NORM}


def test_what_failed_is_not_visited_again(tmp_path: Path) -> None:
    store = Store(tmp_path, SETUP, resume=False)
    visits: list[Point] = []

    def measure(point: Point) -> Visit:
        visits.append(point)
        return visit(status=OUT_OF_MEMORY if point == GEMM[3] else OK)

    Session(store, GEMM, measure, lambda *_: [], 100.0).run()
    assert visits.count(GEMM[3]) == 1 and visits.count(GEMM[0]) == 2
    assert [str(point) for point, _ in store.failed()] == ["gemm m=8 n=64 k=32"]
    store.close()


def test_only_the_chosen_operators_are_visited_again(tmp_path: Path) -> None:
    store, order = Store(tmp_path, SETUP, resume=False), list[Point]()
    for point in GEMM:
        store.add(point, Visit(1e-3, 0.0, 5, 1.0))

    def measure(point: Point) -> Visit:
        order.append(point)
        return Visit(1e-3, 0.0, 5, 1.0)

    Session(store, NORM, measure, lambda *_: [], 100.0, only=("norm",)).run()
    assert {point.operator for point in order} == {"norm"} and len(order) == 2 * len(NORM)
