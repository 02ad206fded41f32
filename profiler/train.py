"""Fitting a profile's predictors, and saying honestly how good they are.

Held-out error: the table's shapes (n × k of a weight, heads × KV heads of attention) are dealt into
folds, so that a fold is predicted without one measurement of its shapes; hyper-parameters are chosen
within the training rows. A measured profile has few such shapes and holds for those alone, so there the
rows are dealt. Extrapolation: train on sizes up to 1/8 of the largest, test on the rest. Every row of the
table is tested, those under the physical floor and outliers included; rows under the floor are left out of
the fit only, since a predictor may not go there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from profiler.coverage import part_used
from profiler.estimate import FloatArray
from profiler.evaluation import (
    Errors,
    FamilyErrors,
    extrapolated,
    family_errors,
    folds_of,
    groups_of,
    take,
)
from profiler.families import FAMILIES, OURS, fit_family
from profiler.formulas import MODELLED, make_physics
from profiler.operators import OperatorModel
from profiler.physics import Physics
from profiler.predictor import FILE, Predictor, save_predictor
from profiler.tables import Profile, Table, TableInfo, read_profile, read_table
from profiler.train_report import OperatorReport, TrainReport
from profiler.trained_kernels import TrainedKernels
from profiler.whole_layers import judge_host, judge_iterations, judge_layers, judge_skewed, noise_of
from specs.devices import DeviceSpec, get_device
from specs.errors import InputError

FEWEST_ROWS = 5  # of a table that is learned from

__all__ = ["Errors", "OperatorReport", "TrainReport", "train"]


def train(
    profile_dir: Path,
    *,
    out: Path | None = None,
    device: DeviceSpec | None = None,
    folds: int = 5,
    tables: Sequence[str] | None = None,
    max_rows: int | None = None,
    compare: bool = False,
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
        compare: evaluate other kinds of models as well.
        save: write the predictor.

    Raises:
        InputError: the profile is unsound, or names a device that isn't known; or ``out`` has no folder.
    """
    if folds < 2:
        raise InputError(f"folds: must be at least 2, not {folds}")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"--out {out}: must be a file in a folder that is there")
    # The order of sums goes by the number of threads, and with it the last digits of what is written. Only
    # libraries that are loaded are limited: scipy brings one of its own.
    import scipy.linalg
    import scipy.optimize  # noqa: F401

    with threadpool_limits(limits=1):
        return _train(profile_dir, out, device, folds, tables, max_rows, compare, save)


def _train(
    profile_dir: Path,
    out: Path | None,
    device: DeviceSpec | None,
    folds: int,
    tables: Sequence[str] | None,
    max_rows: int | None,
    compare: bool,
    save: bool,
) -> TrainReport:
    profile = read_profile(profile_dir)
    device = device or get_device(profile.device)
    infos = [info for info in profile.tables if tables is None or info.key in tables]
    if tables is not None and len(infos) != len(tables):
        known = [info.key for info in profile.tables]
        missing = ", ".join(sorted(set(tables) - set(known)))
        raise InputError(f"{profile_dir}: has no table {missing}; it has {', '.join(known)}")
    found = {info.key: _sample(read_table(profile, info), max_rows) for info in infos}
    # A session that was cut short has too few points of some operators to learn from; those stay roofline.
    few = [info for info in infos if len(found[info.key]) < max(folds, FEWEST_ROWS)]
    infos = [info for info in infos if info not in few]
    modelled = [info for info in infos if info.operator in MODELLED]
    reports, models, residuals = [], {}, {}
    for info in modelled:
        physics = make_physics(
            part_used(device, profile.threads), info.operator, info.dtype, profile.cached_bytes
        )
        report, model, quantiles = _train_operator(profile, info, found[info.key], physics, folds, compare)
        reports.append(report)
        models[info.key], residuals[info.key] = model, quantiles
    whole = _Whole(
        profile, device, Predictor(models, residuals), [(info, found[info.key]) for info in infos], folds
    )
    path = out or profile_dir / FILE
    save = save and tables is None and max_rows is None
    if save:
        save_predictor(path, profile, device, whole.predictor)
    dropped: dict[str, int] = {}
    for info in infos:
        for reason, count in info.dropped.items():
            dropped[f"{info.key}: {reason}"] = count
    return TrainReport(
        profile=profile.name,
        device=profile.device,
        source=profile.source,
        folds=folds,
        whole_shapes=_has_many_shapes(profile),
        operators=tuple(reports),
        layer=whole.layer,
        skewed=whole.skewed,
        host=whole.host,
        iterations=whole.iterations,
        stage_gap=whole.stage_gap,
        predictor_path=path,
        saved=save,
        dropped=dropped,
        untrained={info.key: info.rows for info in few},
    )


class _Whole:
    """What is judged with all operators at hand; None where there is no table of it."""

    def __init__(
        self,
        profile: Profile,
        device: DeviceSpec,
        predictor: Predictor,
        found: Sequence[tuple[TableInfo, Table]],
        folds: int,
    ) -> None:
        by_operator = {info.operator: (info, table) for info, table in found}
        self.predictor = predictor
        self.layer = self.skewed = self.host = self.iterations = self.stage_gap = None
        if "host" in by_operator:
            self.host = judge_host(by_operator["host"][1], folds)
            self.predictor = replace(predictor, host=self.host[1])
        if "stage_gap" in by_operator:
            self.stage_gap = judge_host(by_operator["stage_gap"][1], folds)
            self.predictor = replace(self.predictor, stage_gap=self.stage_gap[1])
        # Each is judged with what those before it have added.
        for operator in ("skewed_decode", "layer", "iteration"):
            if operator not in by_operator:
                continue
            info, table = by_operator[operator]
            kernels = TrainedKernels(
                part_used(device, profile.threads),
                self.predictor,
                source=profile.source,
                weight_dtype=info.dtype,
                kv_dtype=info.dtype,
            )
            if operator == "skewed_decode":
                self.skewed = judge_skewed(table, kernels)
            elif operator == "layer":
                self.layer = judge_layers(profile, table, kernels, folds)
                self.predictor = replace(self.predictor, layer=self.layer.correction)
            elif self.host is not None:
                self.iterations = judge_iterations(profile, table, kernels, self.host[1], folds)
                self.predictor = replace(self.predictor, serving=self.iterations.serving)


def _train_operator(
    profile: Profile, info: TableInfo, table: Table, physics: Physics, folds: int, compare: bool
) -> tuple[OperatorReport, OperatorModel, tuple[float, float, float]]:
    groups = groups_of(info.operator, table.shape, whole_shapes=_has_many_shapes(profile))
    sound = table.time_s >= physics.floor_s(table.shape)
    held_s, physics_s = _held_out(physics, table, groups, folds, info.warm)
    far = extrapolated(OURS, info.operator, physics, table, groups, info.warm)
    roofline = fit_family("roofline", physics, table.shape, table.time_s, groups, info.warm)(table.shape)
    report = OperatorReport(
        operator=info.operator,
        dtype=info.dtype,
        rows=len(table),
        below_floor=int(np.sum(~sound)),
        held_out=Errors.of(held_s, table.time_s),
        held_out_by_head_dim=_by_head_dim(table, held_s),
        physics=Errors.of(physics_s, table.time_s),
        roofline=Errors.of(roofline, table.time_s),
        extrapolation=far,
        noise=noise_of(table),
        families={},
        measured_s=table.time_s,
        predicted_s=held_s,
    )
    if compare:
        for family in FAMILIES:
            report.families[family] = (
                FamilyErrors(report.held_out, far)
                if family == OURS
                else family_errors(family, info.operator, physics, table, groups, folds, info.warm)
            )
    low, middle, high = np.quantile(np.log(table.time_s / held_s), [0.05, 0.5, 0.95])
    rows = np.flatnonzero(sound)
    part = take(table, rows)
    final = OperatorModel(physics).fit(part.shape, part.time_s, groups[rows], warm=info.warm)
    return report, final, (float(low), float(middle), float(high))


def _held_out(
    physics: Physics, table: Table, groups: NDArray[np.int64], count: int, warm: bool
) -> tuple[FloatArray, FloatArray]:
    """Every row predicted by a model that hasn't seen its group, with the learned residual and without."""
    held_s, physics_s = np.empty(len(table)), np.empty(len(table))
    sound = table.time_s >= physics.floor_s(table.shape)
    for held in folds_of(groups, count):
        rows = np.flatnonzero(~held & sound)
        part = take(table, rows)
        model = OperatorModel(physics).fit(part.shape, part.time_s, groups[rows], warm=warm)
        test = take(table, np.flatnonzero(held))
        held_s[held] = model.predict(test.shape, cold=not warm).time_s
        physics_s[held] = model.physics_only(test.shape, cold=not warm)
    return held_s, physics_s


def _has_many_shapes(profile: Profile) -> bool:
    """Whether its tables span models: imported ones do, measured ones are of one."""
    return profile.source != "measured"


def _by_head_dim(table: Table, predicted_s: FloatArray) -> dict[int, Errors]:
    if "head_dim" not in table.shape:
        return {}
    dims = table.shape["head_dim"]
    return {
        int(dim): Errors.of(predicted_s[dims == dim], table.time_s[dims == dim]) for dim in np.unique(dims)
    }


def _sample(table: Table, most: int | None) -> Table:
    if most is None or len(table) <= most:
        return table
    return take(table, np.random.default_rng(0).permutation(len(table))[:most])
