"""How a predictor is tested: rows it hasn't seen, sizes beyond those it has seen, other kinds of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profiler.estimate import BoolArray, FloatArray
from profiler.families import Fitted, fit_family
from profiler.physics import Physics, Shape
from profiler.tables import Table

# What grows in serving, per operator: the axes along which a predictor is asked beyond its table.
_SIZES: dict[str, dict[str, tuple[str, ...]]] = {
    "gemm": {"tokens": ("m",), "FLOP": ("m", "n", "k")},
    "prefill_attention": {"length": ("length",), "FLOP": ("batch", "length", "length", "heads")},
    "shard_attention": {"context": ("context",)},
    "decode_attention": {"context of one": ("each",), "KV bytes": ("total_context", "kv_heads", "head_dim")},
}
_SIZE_OF_THE_REST = {"bytes": ("num_bytes",)}
_SHAPE_COLUMNS = {
    "gemm": ("n", "k"),
    "prefill_attention": ("heads", "kv_heads"),
    "decode_attention": ("heads", "kv_heads"),
    "all_reduce": ("num_bytes", "ranks"),
}
NEAR = 1 / 8  # share of the largest size that is learned from, to predict what lies beyond
FEWEST_NEAR_ROWS = 10


@dataclass(frozen=True, slots=True)
class Errors:
    """|predicted ÷ measured − 1| over some rows, as fractions."""

    rows: int
    median: float
    p90: float

    def __str__(self) -> str:
        return f"{100 * self.median:.1f} / {100 * self.p90:.1f} %"

    @classmethod
    def of(cls, predicted_s: FloatArray, measured_s: FloatArray) -> Errors:
        error = np.abs(predicted_s / measured_s - 1.0)
        return cls(len(error), float(np.median(error)), float(np.quantile(error, 0.9)))


@dataclass(frozen=True, slots=True)
class FamilyErrors:
    """How one kind of model does on one operator, held out and beyond its sizes."""

    held_out: Errors
    extrapolation: dict[str, Errors]  # by size axis


def extrapolated(
    family: str, operator: str, physics: Physics, table: Table, groups: NDArray[np.int64], warm: bool
) -> dict[str, Errors]:
    """Errors on sizes beyond 1/8 of the largest, of a model that has seen the rest, by size axis."""
    sound = table.time_s >= physics.floor_s(table.shape)
    found = {}
    for axis, columns in _SIZES.get(operator, _SIZE_OF_THE_REST).items():
        size = _size(table.shape, columns)
        near = size <= size.max() * NEAR
        if near.sum() < FEWEST_NEAR_ROWS or near.all():
            continue
        model = fit_on(family, physics, table, groups, near & sound, warm)
        far = take(table, np.flatnonzero(~near))
        found[axis] = Errors.of(model(far.shape), far.time_s)
    return found


def fit_on(
    family: str, physics: Physics, table: Table, groups: NDArray[np.int64], rows: BoolArray, warm: bool
) -> Fitted:
    """A model of some of the rows."""
    chosen = np.flatnonzero(rows)
    part = take(table, chosen)
    return fit_family(family, physics, part.shape, part.time_s, groups[chosen], warm)


def by_folds(count: int, rows: int, predict: Callable[[BoolArray, BoolArray], FloatArray]) -> FloatArray:
    """Predictions of every row by `predict(train, held)`, which answers with those of the held rows."""
    predicted = np.empty(rows)
    for held in folds_of(np.arange(rows), count):
        predicted[held] = predict(~held, held)
    return predicted


def folds_of(groups: NDArray[np.int64], count: int) -> Iterator[BoolArray]:
    """Masks of the held-out rows; groups stay whole."""
    names = np.unique(groups)
    deal = np.random.default_rng(1).permutation(len(names)) % min(count, len(names))
    fold = deal[np.searchsorted(names, groups)]
    for number in range(int(fold.max()) + 1):
        yield fold == number


def groups_of(operator: str, shape: Shape, *, whole_shapes: bool) -> NDArray[np.int64]:
    """A number for each distinct weight or number of heads; each row its own where there are too few of them,
    or where `whole_shapes` is false: a measured profile holds for the shapes that it has."""
    rows = len(next(iter(shape.values())))
    if not whole_shapes or operator not in _SHAPE_COLUMNS:
        return np.arange(rows, dtype=np.int64)
    columns = np.stack([shape[name] for name in _SHAPE_COLUMNS[operator]], axis=1)
    _, groups = np.unique(columns, axis=0, return_inverse=True)
    if groups.max() < 9:
        groups = np.arange(rows)
    return np.asarray(groups.ravel(), dtype=np.int64)


def take(table: Table, rows: NDArray[np.intp]) -> Table:
    """Some rows of a table."""
    return Table({name: column[rows] for name, column in table.shape.items()}, table.time_s[rows])


def family_errors(
    family: str,
    operator: str,
    physics: Physics,
    table: Table,
    groups: NDArray[np.int64],
    count: int,
    warm: bool,
) -> FamilyErrors:
    """How a kind of model does on a table."""
    predicted = np.empty(len(table))
    sound = table.time_s >= physics.floor_s(table.shape)
    for held in folds_of(groups, count):
        model = fit_on(family, physics, table, groups, ~held & sound, warm)
        predicted[held] = model(take(table, np.flatnonzero(held)).shape)
    return FamilyErrors(
        Errors.of(predicted, table.time_s), extrapolated(family, operator, physics, table, groups, warm)
    )


def _size(shape: Shape, columns: tuple[str, ...]) -> FloatArray:
    derived = dict(shape)
    if "chunk" in shape:
        derived["length"] = shape["chunk"] + shape["context"]
    if "total_context" in shape:
        derived["each"] = shape["total_context"] / shape["batch"]
    return np.asarray(np.prod([derived[name] for name in columns], axis=0))
