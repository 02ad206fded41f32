"""Fitting a profile's predictors, and saying honestly how good they are.

Held-out error: the table's shapes (n × k of a weight, heads × KV heads of attention) are dealt into
folds, so that a fold is predicted without one measurement of its shapes; hyper-parameters are chosen
within the training rows. Extrapolation: train on sizes up to 1/8 of the largest, test on the rest.
Every row of the table is tested, those under the physical floor and outliers included; rows under
the floor are left out of the fit only, since a predictor may not go there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from profiler.estimate import BoolArray, FloatArray
from profiler.operators import OperatorModel
from profiler.predictor import FILE, Predictor, make_physics, save_predictor
from profiler.roofline import Physics, Shape
from profiler.tables import Table, TableInfo, read_profile, read_table
from specs.devices import DeviceSpec, get_device
from specs.errors import InputError

# What grows in serving, per operator: the axes along which a predictor is asked beyond its table.
_SIZES: dict[str, dict[str, tuple[str, ...]]] = {
    "gemm": {"tokens": ("m",), "FLOP": ("m", "n", "k")},
    "prefill_attention": {"length": ("length",), "FLOP": ("batch", "length", "length", "heads")},
    "decode_attention": {"context of one": ("each",), "KV bytes": ("total_context", "kv_heads", "head_dim")},
    "all_reduce": {"bytes": ("num_bytes",)},
}
_SHAPE_COLUMNS = {
    "gemm": ("n", "k"),
    "prefill_attention": ("heads", "kv_heads"),
    "decode_attention": ("heads", "kv_heads"),
    "all_reduce": ("num_bytes", "ranks"),
}


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
class OperatorReport:
    """How one operator at one dtype is predicted. `roofline` and `physics` are for comparison."""

    operator: str
    dtype: str
    rows: int
    below_floor: int  # measured faster than FLOP ÷ peak or bytes ÷ bandwidth: inputs came from L2
    held_out: Errors
    held_out_by_head_dim: dict[int, Errors]
    physics: Errors  # held out, without the learned residual
    roofline: Errors  # default parameters, nothing learned
    extrapolation: dict[str, Errors]  # by size axis


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What `convoy train` prints."""

    profile: str
    device: str
    source: str
    folds: int
    operators: tuple[OperatorReport, ...]
    predictor_path: Path
    saved: bool
    dropped: dict[str, int]  # rows that the importer left out, by reason

    def table(self) -> str:
        """The errors as text, one line an operator, and what was left out."""
        name = f"{self.device}/{self.profile} ({self.source})"
        lines = [
            f"{name}; errors: median / p90 of |predicted ÷ measured − 1|",
            f"held out: {self.folds} folds of whole shapes; extrapolation: learned on ≤ 1/8 of the size",
            "",
            _line("operator", "dtype", "rows", "held out", "physics only", "roofline", "extrapolation"),
        ]
        for report in self.operators:
            far = ", ".join(f"{axis} {errors}" for axis, errors in report.extrapolation.items())
            errors = (str(report.held_out), str(report.physics), str(report.roofline))
            lines.append(_line(report.operator, report.dtype, str(report.rows), *errors, far))
            for dim, part in report.held_out_by_head_dim.items():
                if len(report.held_out_by_head_dim) > 1:
                    lines.append(_line("", "", f"d={dim}", str(part), "", "", ""))
        lines.append("")
        for report in self.operators:
            if report.below_floor:
                lines.append(
                    f"{report.operator} {report.dtype}: {report.below_floor} of {report.rows} rows are under "
                    "the floor (inputs in L2); in the errors, not in the fit"
                )
        lines += [f"not imported: {count} rows, {reason}" for reason, count in self.dropped.items()]
        lines.append(f"predictor: {self.predictor_path}" if self.saved else "predictor: not saved")
        return "\n".join(lines)


def _line(*cells: str) -> str:
    name, *middle, last = cells
    columns = [f"{cell:>{width}}" for cell, width in zip(middle, (5, 6, 14, 14, 14), strict=True)]
    return "  ".join([f"{name:<17}", *columns, last]).rstrip()


def train(
    profile_dir: Path,
    *,
    out: Path | None = None,
    device: DeviceSpec | None = None,
    folds: int = 5,
    tables: Sequence[str] | None = None,
    max_rows: int | None = None,
    save: bool = True,
) -> TrainReport:
    """Fit the predictors of a profile, write them and report their errors.

    Args:
        profile_dir: folder with profile.yaml and its tables.
        out: where the predictor goes; predictor.npz in the profile by default.
        device: the device's figures; by default the library's of the profile's name.
        folds: of the held-out evaluation, at least 2.
        tables: only these, as `<operator>_<dtype>`; nothing is then saved.
        max_rows: a random sample of each table, for a quick look; nothing is then saved.
        save: write the predictor.

    Raises:
        InputError: the profile is unsound, or names a device that isn't known.
    """
    if folds < 2:
        raise InputError(f"folds: must be at least 2, not {folds}")
    profile = read_profile(profile_dir)
    device = device or get_device(profile.device)
    infos = [info for info in profile.tables if tables is None or info.key in tables]
    if tables is not None and len(infos) != len(tables):
        known = [info.key for info in profile.tables]
        missing = ", ".join(sorted(set(tables) - set(known)))
        raise InputError(f"{profile_dir}: has no table {missing}; it has {', '.join(known)}")
    reports, models, residuals = [], {}, {}
    for info in infos:
        table = read_table(profile, info)
        if max_rows is not None and len(table) > max_rows:
            table = _take(table, np.random.default_rng(0).permutation(len(table))[:max_rows])
        physics = make_physics(device, info.operator, info.dtype)
        report, model, quantiles = _train_operator(info, table, physics, folds)
        reports.append(report)
        models[info.key], residuals[info.key] = model, quantiles
    path = out or profile_dir / FILE
    save = save and tables is None and max_rows is None
    if save:
        save_predictor(path, profile, device, Predictor(models, residuals))
    dropped: dict[str, int] = {}
    for info in infos:
        for reason, count in info.dropped.items():
            dropped[f"{info.key}: {reason}"] = count
    return TrainReport(
        profile.name, profile.device, profile.source, folds, tuple(reports), path, save, dropped
    )


def _train_operator(
    info: TableInfo, table: Table, physics: Physics, folds: int
) -> tuple[OperatorReport, OperatorModel, tuple[float, float, float]]:
    groups = _groups(info.operator, table.shape)
    sound = table.time_s >= physics.floor_s(table.shape)
    held_s, physics_s = np.empty(len(table)), np.empty(len(table))
    for held in _folds(groups, folds):
        model = _fit(physics, table, groups, ~held & sound, info.warm)
        test = _take(table, np.flatnonzero(held))
        held_s[held] = model.predict(test.shape, cold=not info.warm).time_s
        physics_s[held] = model.physics_only(test.shape, cold=not info.warm)
    extrapolation = {}
    for axis, columns in _SIZES[info.operator].items():
        size = _size(table.shape, columns)
        near = size <= size.max() / 8
        if near.sum() < 10 or near.all():
            continue
        model = _fit(physics, table, groups, near & sound, info.warm)
        far = _take(table, np.flatnonzero(~near))
        extrapolation[axis] = Errors.of(model.predict(far.shape, cold=not info.warm).time_s, far.time_s)
    roofline_s = physics.time_s(table.shape, physics.defaults(), cold=not info.warm)
    report = OperatorReport(
        operator=info.operator,
        dtype=info.dtype,
        rows=len(table),
        below_floor=int(np.sum(~sound)),
        held_out=Errors.of(held_s, table.time_s),
        held_out_by_head_dim=_by_head_dim(table, held_s),
        physics=Errors.of(physics_s, table.time_s),
        roofline=Errors.of(np.maximum(roofline_s, physics.floor_s(table.shape)), table.time_s),
        extrapolation=extrapolation,
    )
    low, middle, high = np.quantile(np.log(table.time_s / held_s), [0.05, 0.5, 0.95])
    final = _fit(physics, table, groups, sound, info.warm)
    return report, final, (float(low), float(middle), float(high))


def _fit(
    physics: Physics, table: Table, groups: NDArray[np.int64], rows: BoolArray, warm: bool
) -> OperatorModel:
    chosen = np.flatnonzero(rows)
    part = _take(table, chosen)
    return OperatorModel(physics).fit(part.shape, part.time_s, groups[chosen], warm=warm)


def _folds(groups: NDArray[np.int64], folds: int) -> Iterator[BoolArray]:
    """Masks of the held-out rows; groups stay whole."""
    names = np.unique(groups)
    deal = np.random.default_rng(1).permutation(len(names)) % min(folds, len(names))
    fold = deal[np.searchsorted(names, groups)]
    for number in range(int(fold.max()) + 1):
        yield fold == number


def _groups(operator: str, shape: Shape) -> NDArray[np.int64]:
    """A number for each distinct shape; rows on their own where there are too few shapes for folds."""
    columns = np.stack([shape[name] for name in _SHAPE_COLUMNS[operator]], axis=1)
    _, groups = np.unique(columns, axis=0, return_inverse=True)
    if groups.max() < 9:
        groups = np.arange(len(columns))
    return np.asarray(groups.ravel(), dtype=np.int64)


def _size(shape: Shape, columns: tuple[str, ...]) -> FloatArray:
    derived = dict(shape)
    if "chunk" in shape:
        derived["length"] = shape["chunk"] + shape["context"]
    if "total_context" in shape:
        derived["each"] = shape["total_context"] / shape["batch"]
    return np.asarray(np.prod([derived[name] for name in columns], axis=0))


def _by_head_dim(table: Table, predicted_s: FloatArray) -> dict[int, Errors]:
    if "head_dim" not in table.shape:
        return {}
    dims = table.shape["head_dim"]
    return {
        int(dim): Errors.of(predicted_s[dims == dim], table.time_s[dims == dim]) for dim in np.unique(dims)
    }


def _take(table: Table, rows: NDArray[np.intp]) -> Table:
    return Table({name: column[rows] for name, column in table.shape.items()}, table.time_s[rows])
