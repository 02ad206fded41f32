"""Kinds of models for the time of an operator, to be compared: what is gained by each part of ours.

roofline            the formula with the data sheet's rates; nothing is learned
linear              least squares of relative errors on FLOP, bytes and the shape's columns
random forest       scikit-learn's on the same columns, as in Vidur (arXiv 2405.05465, section 4.3)
physics             the formula with fitted rates
physics + residual  and a Gaussian process on what is left: ours
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from profiler.estimate import FloatArray
from profiler.operators import OperatorModel
from profiler.physics import Physics, Shape

OURS = "physics + residual"
FAMILIES = ("roofline", "linear", "random forest", "physics", OURS)
TREES = 100
FOREST_ROWS = 6000  # rows that a forest learns from; more of an imported table would take minutes a fold

Fitted = Callable[[Shape], FloatArray]
"""Seconds of any shapes."""


def fit_family(
    family: str, physics: Physics, shape: Shape, time_s: FloatArray, groups: NDArray[np.int64], warm: bool
) -> Fitted:
    """A model of one of the `FAMILIES`, fitted."""
    if family == "roofline":
        defaults = physics.defaults()
        return lambda asked: np.maximum(
            physics.time_s(asked, defaults, cold=not warm), physics.floor_s(asked)
        )
    if family == "linear":
        return _linear(physics, shape, time_s)
    if family == "random forest":
        return _forest(physics, shape, time_s)
    model = OperatorModel(physics).fit(shape, time_s, groups, warm=warm)
    if family == "physics":
        return lambda asked: model.physics_only(asked, cold=not warm)
    return lambda asked: model.predict(asked, cold=not warm).time_s


def _columns(physics: Physics, shape: Shape) -> FloatArray:
    flop, num_bytes = physics.flop_and_bytes(shape)
    return np.stack([flop, num_bytes, *(shape[name] for name in physics.columns)], axis=1)


def _linear(physics: Physics, shape: Shape, time_s: FloatArray) -> Fitted:
    columns = _columns(physics, shape)
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-30)
    design = np.column_stack([np.ones(len(columns)), columns / scale]) / time_s[:, None]
    line = np.linalg.lstsq(design, np.ones(len(columns)), rcond=None)[0]

    def predict(asked: Shape) -> FloatArray:
        values = np.asarray(line[0] + _columns(physics, asked) / scale @ line[1:])
        return np.asarray(np.maximum(values, 1e-9))

    return predict


def _forest(physics: Physics, shape: Shape, time_s: FloatArray) -> Fitted:
    from sklearn.ensemble import RandomForestRegressor

    columns = _columns(physics, shape)
    rows = np.random.default_rng(0).permutation(len(columns))[:FOREST_ROWS]
    forest = RandomForestRegressor(TREES, random_state=0).fit(columns[rows], time_s[rows])
    return lambda asked: np.asarray(forest.predict(_columns(physics, asked)), dtype=np.float64)
