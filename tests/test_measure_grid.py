"""Which points are measured: inside the limits, spread over the space, and where a fit is worst."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from profiler.formulas import make_physics
from profiler.measure.grid import Grid, Limits, coordinates, shape_of, spread
from profiler.measure.points import Point
from profiler.measure.refine import Refiner
from profiler.measure.store import Store, Visit
from specs import get_device, get_model
from specs.errors import InputError
from specs.models import ModelSpec

MODEL, CPU = get_model("tiny-llama"), get_device("cpu")
LIMITS = Limits(
    tps=(1, 2, 4), context_tokens=65536, tokens=2048, decodes=64, point_s=0.2, kv_bytes=1 << 30, ranks=(2,)
)
GRID = Grid(MODEL, CPU, "fp32", LIMITS)


def test_points_are_within_the_limits() -> None:
    for operator, points in GRID.candidates().items():
        assert points and len(set(points)) == len(points)
        for point in points:
            assert point.operator == operator
            if operator in ("prefill_attention", "layer"):
                assert point["chunk"] + point["context"] <= LIMITS.context_tokens
            if operator == "decode_attention":
                assert point["total_context"] <= point["batch"] * LIMITS.context_tokens
                assert 2 * 4 * 32 * point["kv_heads"] * point["total_context"] <= LIMITS.kv_bytes
    physics = make_physics(CPU, "prefill_attention", "fp32")
    shape = shape_of(GRID.candidates()["prefill_attention"])
    assert physics.time_s(shape, physics.defaults()).max() <= LIMITS.point_s


def test_host_points_have_chunks_and_ranks_that_the_model_can_be_cut_for() -> None:
    points = GRID.candidates()["host"]
    assert {(point["chunk"], point["ranks"]) for point in points} == {
        (chunk, ranks) for chunk in (0, 64, 256, 1024) for ranks in (1, 2)
    }
    alone = Grid(MODEL, CPU, "fp32", dataclasses.replace(LIMITS, tps=(1,)))
    assert {point["ranks"] for point in alone.candidates()["host"]} == {1}
    quick = Grid(MODEL, CPU, "fp32", dataclasses.replace(LIMITS, is_quick=True))
    assert {(p["chunk"], p["ranks"]) for p in quick.candidates()["host"]} == {(0, 1), (64, 1), (256, 1)}


def test_a_later_stage_is_timed_where_there_can_be_one() -> None:
    shapes = {point.shape for point in GRID.candidates()["stage_gap"]}
    assert {requests for requests, chunk in shapes if not chunk} >= {1, 2, 4, 64}
    assert {chunk for requests, chunk in shapes if chunk and requests == 1} == {32, 64, 128, 256, 512, 1024}
    assert all(requests == 1 or not chunk for requests, chunk in shapes)
    for limits in ({"ranks": ()}, {"is_quick": True}):
        assert "stage_gap" not in Grid(MODEL, CPU, "fp32", dataclasses.replace(LIMITS, **limits)).candidates()
    shallow = dataclasses.replace(MODEL, num_layers=1)
    assert "stage_gap" not in Grid(shallow, CPU, "fp32", LIMITS).candidates()


ALONE, TP, SPP, KVP = (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)


def _layouts(grid: Grid, *, chunk: int = 0, idle: int = 0) -> dict[tuple[int, int, int], set[int]]:
    """Of iterations with such a chunk, the numbers of requests by how the model is split."""
    found: dict[tuple[int, int, int], set[int]] = {}
    for point in grid.candidates().get("iteration", []):
        if (point["chunk"], point["idle"]) == (chunk, idle):
            found.setdefault((point["tp"], point["spp"], point["kvp"]), set()).add(point["requests"])
    return found


def test_iterations_are_timed_in_every_way_to_split_the_model() -> None:
    few = {1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64}
    assert _layouts(GRID) == {ALONE: few, TP: few, SPP: few, KVP: few}
    octaves = {1, 2, 4, 8, 16, 32, 64}
    for chunk in (64, 256, 1024):
        assert _layouts(GRID, chunk=chunk) == {ALONE: octaves, TP: octaves, SPP: {1}, KVP: octaves}
        # Prompts that come to an engine at rest: one KVP group alone would have nothing else beside it.
        assert _layouts(GRID, chunk=chunk, idle=1) == {ALONE: {1}, TP: {1}, SPP: {1}}
    assert {p["chunk"] for p in GRID.candidates()["iteration"]} == {0, 64, 256, 1024}


def test_iterations_are_timed_where_their_ranks_can_be_had() -> None:
    def layouts(model: ModelSpec = MODEL, **limits: object) -> set[tuple[int, int, int]]:
        changed = dataclasses.replace(LIMITS, **limits)  # type: ignore[arg-type]
        return set(_layouts(Grid(model, CPU, "fp32", changed)))

    assert layouts(ranks=()) == layouts(is_quick=True) == {ALONE}
    assert layouts(tps=(1,)) == {ALONE, SPP, KVP}
    assert layouts(dataclasses.replace(MODEL, num_layers=1)) == {ALONE, TP, KVP}
    few = dataclasses.replace(LIMITS, decodes=4)
    assert _layouts(Grid(MODEL, CPU, "fp32", few))[SPP] == {1, 2, 3, 4}


def test_few_tokens_are_measured_one_by_one_on_a_cpu() -> None:
    """Those that fill no block of four rows take longer than one more that does."""
    assert {point["m"] for point in GRID.candidates()["gemm"]} >= set(range(1, 13))


def test_every_prefix_of_the_coarse_grid_covers_the_range() -> None:
    coarse = GRID.coarse()["gemm"]
    every = GRID.candidates()["gemm"]
    where = coordinates(every)
    gaps = []
    for count in (10, 40, len(coarse)):
        distance = np.linalg.norm(where[:, None] - coordinates(coarse[:count])[None], axis=2).min(axis=1)
        gaps.append(float(distance.max()))
    assert gaps[0] > gaps[1] > gaps[2]
    # Farthest-point sampling: within twice the best possible; 10 points of 15 × 25 shapes leave some octaves.
    assert gaps[0] < 5.0 and gaps[2] < 1.5


def test_spread_points_are_distinct_and_as_many_as_there_are() -> None:
    points = [Point("gemm", (m, 8, 8)) for m in range(1, 6)]
    assert sorted(spread(points, 99)) == points
    assert spread(points, 2) == [points[0], points[-1]]
    assert spread([], 3) == []


def test_hardly_a_context_of_a_layer_fills_a_block_as_in_serving() -> None:
    contexts = {point["context"] for point in GRID.candidates()["layer"]} - {0}
    assert sum(context % 16 > 0 for context in contexts) > 0.7 * len(contexts)


def test_points_as_text() -> None:
    point = Point.of("gemm", m=3, n=8, k=2)
    assert point.shape_text == "3;8;2" and Point.parse("gemm", "3;8;2") == point and point["n"] == 8
    with pytest.raises(InputError, match="unknown operator"):
        Point.parse("gems", "1")


def test_new_points_go_where_neighbours_are_predicted_worst(tmp_path: Path) -> None:
    """Norms that take five times as long between 64 and 256 rows: a fit to the others can't know."""
    candidates = GRID.candidates()["norm"]
    store = Store(tmp_path, {}, resume=False)
    for point in candidates[::2]:
        odd = 64 <= point["rows"] <= 256
        store.add(point, Visit((5.0 if odd else 1.0) * (5e-6 + 1e-8 * point["rows"]), 0.0, 9, 0.1))
    store.close()
    refiner = Refiner({"norm": candidates}, CPU, "fp32", cached_bytes=0, quantile=0.5)
    assert len(store.points) < 12 and refiner(store, 3) == []  # too few to judge by
    for point in candidates[1::4]:
        store._keep(point, Visit(5e-6 + 1e-8 * point["rows"], 0.0, 9, 0.1))
    chosen = refiner(store, 1)
    assert chosen and abs(math.log2(chosen[0]["rows"] / 128)) <= 2
