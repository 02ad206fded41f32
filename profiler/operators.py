"""Operator predictors: physics first, a learned residual second.

An estimator in scikit-learn's manner: what is chosen goes into the constructor, what is learned ends
in an underscore. Prediction needs numpy only; `fit` needs scipy.

    time = max(floor, physics(shape; fitted parameters) · exp(residual(features)))

The residual is a Gaussian process on log2 features with a few hundred inducing points (subset of
regressors; Quiñonero-Candela and Rasmussen, JMLR 2005). Beyond what was measured it keeps its value at
the edge and fades with distance, so that far away the physics is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profiler.estimate import BoolArray, FloatArray
from profiler.physics import Additive, Physics, Shape

MAX_RESIDUAL = 1.5  # |log(measured / physics)| beyond this is taken for an outlier when fitting
PHYSICS_ROWS = 4000  # rows that the handful of physical parameters are fitted on
SELECTION_ROWS = 8000  # rows that hyper-parameters are chosen on
SLACK_OCTAVES = 1e-6  # against rounding of log2
FADE_OCTAVES = 3.0  # distance beyond the measured region at which the residual has faded to 0.6
LENGTH_SCALES = (1.5, 2.5, 4.0)  # octaves
NOISES = (0.3, 3.0)
# Tried as well where the formula is a sum of work: what it leaves is how one shape differs from the next.
FINER_LENGTH_SCALES = (0.8, 6.0)
FINER_NOISES = (0.03, 0.1)
REWEIGHTINGS = 30
FEWEST_IN_TIER = 2  # rows without which nothing is learned about a tier

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds, floor and whether the shape lies outside the measured region; one entry a shape."""

    time_s: FloatArray
    floor_s: FloatArray
    extrapolated: BoolArray


@dataclass(frozen=True, slots=True)
class LearnedState:
    """All that a fitted operator knows; plain numbers and arrays."""

    parameters: Mapping[str, float]
    inducing: Float32Array  # [p, f], in length scales
    weights: Float32Array  # [p]
    low: FloatArray  # [f] measured box of the features
    high: FloatArray  # [f]
    families: NDArray[np.int64]  # [c] octaves of the family axes that were measured, encoded, sorted
    reach: FloatArray  # [c, 2] least and most growth measured in each
    length_scale: float
    noise: float
    has_prefix: bool  # the table has chunks over cached tokens


class OperatorModel:
    """Time of one operator on one device.

    Args:
        physics: the formula and its features.
        length_scale: of the residual, in octaves; None chooses it within the training rows.
        noise: ridge of the residual; None chooses it within the training rows.
        inducing: most points the residual is carried by.
        seed: of the row sub-samples.
    """

    state_: LearnedState

    def __init__(
        self,
        physics: Physics,
        *,
        length_scale: float | None = None,
        noise: float | None = None,
        inducing: int = 256,
        seed: int = 0,
    ) -> None:
        self.physics = physics
        self.length_scale = length_scale
        self.noise = noise
        self.inducing = inducing
        self.seed = seed

    def fit(
        self, shape: Shape, time_s: FloatArray, groups: NDArray[np.int64], *, warm: bool = False
    ) -> OperatorModel:
        """Learn from measured times.

        Args:
            shape: columns of equal length.
            time_s: seconds, positive.
            groups: rows of one group are kept together when hyper-parameters are chosen.
            warm: the inputs were in the cache when measured (a kernel repeated on the same data).
        """
        rng = np.random.default_rng(self.seed)
        parameters = self._fit_physics(shape, time_s, warm, rng)
        features = self.physics.features(shape)
        physics_s = self.physics.time_s(shape, parameters, cold=not warm)
        residual = np.clip(np.log(time_s / physics_s), -MAX_RESIDUAL, MAX_RESIDUAL)
        length_scale, noise = self._choose(features, residual, groups, rng)
        inducing, weights = _fit_residual(features, residual, length_scale, noise, self.inducing, rng)
        low, high = features.min(axis=0), features.max(axis=0)
        families, reach = self._reach(features)
        self.state_ = LearnedState(
            parameters=parameters,
            inducing=inducing.astype(np.float32),
            weights=weights.astype(np.float32),
            low=low,
            high=high,
            families=families,
            reach=reach,
            length_scale=length_scale,
            noise=noise,
            has_prefix=bool(np.any(shape["context"] > 0)) if "context" in shape else False,
        )
        return self

    def predict(self, shape: Shape, *, cold: bool = True) -> Prediction:
        """Times of any shapes. `cold=False` predicts what a cache-warm benchmark would measure."""
        state = self.state_
        known, unseen_s = shape, np.zeros(1)
        if "context" in shape and not state.has_prefix:
            # What was learned holds for the chunk by itself; its prefix comes on top.
            known = {**shape, "context": np.zeros_like(shape["context"])}
            unseen_s = np.asarray(self.physics.unseen_s(shape, state.parameters))
        physics_s = self.physics.time_s(known, state.parameters, cold=cold)
        time_s = physics_s * np.exp(self._residual(self.physics.features(known))) + unseen_s
        floor_s = self.physics.floor_s(shape)
        return Prediction(np.maximum(time_s, floor_s), floor_s, self.is_extrapolated(shape))

    def _residual(self, features: FloatArray) -> FloatArray:
        state = self.state_
        inside, _ = self._moved_inside(features)
        scaled = (inside / state.length_scale).astype(np.float32)
        residual = (_kernel(scaled, state.inducing) @ state.weights).astype(np.float64)
        outside = np.sum((features - inside) ** 2, axis=1)
        residual *= np.exp(-0.5 * outside / FADE_OCTAVES**2)
        return np.clip(residual, -MAX_RESIDUAL, MAX_RESIDUAL)

    def physics_only(self, shape: Shape, *, cold: bool = True) -> FloatArray:
        """The fitted formula without the residual, for comparison."""
        time_s = self.physics.time_s(shape, self.state_.parameters, cold=cold)
        return np.maximum(time_s, self.physics.floor_s(shape))

    def is_extrapolated(self, shape: Shape) -> BoolArray:
        """Which shapes lie outside the measured region: an unknown family, or beyond its reach."""
        features = self.physics.features(shape)
        inside, known = self._moved_inside(features)
        axes = [self.physics.growth_axis, *self.physics.family_axes]
        moved = np.abs(features[:, axes] - inside[:, axes]) > SLACK_OCTAVES
        return np.asarray(~known | np.any(moved, axis=1), dtype=np.bool_)

    def _moved_inside(self, features: FloatArray) -> tuple[FloatArray, BoolArray]:
        """The nearest point of the measured box and reach; and whether the family was measured."""
        state, growth = self.state_, self.physics.growth_axis
        inside = np.clip(features, state.low, state.high)
        families = self._family(inside)
        position = np.minimum(np.searchsorted(state.families, families), len(state.families) - 1)
        known = state.families[position] == families
        reach = np.where(known[:, None], state.reach[position], (state.low[growth], state.high[growth]))
        inside[:, growth] = np.clip(inside[:, growth], reach[:, 0], reach[:, 1])
        return inside, np.asarray(known, dtype=np.bool_)

    def _reach(self, features: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
        families, index = np.unique(self._family(features), return_inverse=True)
        growth = features[:, self.physics.growth_axis]
        reach = np.stack([np.full(len(families), np.inf), np.full(len(families), -np.inf)], axis=1)
        np.minimum.at(reach[:, 0], index, growth)
        np.maximum.at(reach[:, 1], index, growth)
        return families, reach

    def _family(self, features: FloatArray) -> NDArray[np.int64]:
        """One integer for the octaves of each row on the family axes."""
        code = np.zeros(len(features), dtype=np.int64)
        for axis in self.physics.family_axes:
            octave = np.clip(np.floor(features[:, axis] + SLACK_OCTAVES), -20, 43).astype(np.int64) + 20
            code = code * 64 + octave
        return code

    def _fit_physics(
        self, shape: Shape, time_s: FloatArray, warm: bool, rng: np.random.Generator
    ) -> dict[str, float]:
        if isinstance(self.physics, Additive):
            return _fit_rates(self.physics, shape, time_s)
        from scipy.optimize import least_squares

        rows = rng.permutation(len(time_s))[:PHYSICS_ROWS]
        sample = {name: column[rows] for name, column in shape.items()}
        target = np.log(time_s[rows])
        names = list(self.physics.parameters)
        ranges = [self.physics.parameters[name] for name in names]
        low, high, start = (
            np.log(values) for values in zip(*((r.low, r.high, r.default) for r in ranges), strict=True)
        )

        def error(x: FloatArray) -> FloatArray:
            parameters = dict(zip(names, np.exp(x), strict=True))
            return np.log(self.physics.time_s(sample, parameters, cold=not warm)) - target

        # The robust loss keeps a few odd measurements from bending the formula.
        result = least_squares(
            error,
            np.clip(start, low + 1e-6, high - 1e-6),
            bounds=(low, high),
            loss="soft_l1",
            f_scale=0.1,
            max_nfev=60,
        )
        return {name: float(value) for name, value in zip(names, np.exp(result.x), strict=True)}

    def _choose(
        self, features: FloatArray, residual: FloatArray, groups: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[float, float]:
        """Length scale and noise with the least held-out error on whole groups of the training rows."""
        is_additive = isinstance(self.physics, Additive)
        scales = LENGTH_SCALES + is_additive * FINER_LENGTH_SCALES
        scales = scales if self.length_scale is None else (self.length_scale,)
        noises = NOISES + is_additive * FINER_NOISES
        noises = noises if self.noise is None else (self.noise,)
        if len(scales) * len(noises) == 1:
            return scales[0], noises[0]
        names = rng.permutation(np.unique(groups))
        held_groups = names[: max(1, len(names) // 5)]
        rows = rng.permutation(len(residual))[:SELECTION_ROWS]
        held = np.isin(groups[rows], held_groups)
        train, test = rows[~held], rows[held]
        if len(train) == 0 or len(test) == 0:
            return scales[0], noises[-1]
        best = (np.inf, scales[0], noises[-1])
        for scale in scales:
            for noise in noises:
                points, weights = _fit_residual(
                    features[train], residual[train], scale, noise, self.inducing, np.random.default_rng(0)
                )
                error = _kernel(features[test] / scale, points) @ weights - residual[test]
                best = min(best, (float(np.mean(np.abs(error))), scale, noise))
        return best[1], best[2]


def _fit_rates(physics: Additive, shape: Shape, time_s: FloatArray) -> dict[str, float]:
    """Rates of 0 or more with the least Σ |predicted ÷ measured − 1|: reweighted least squares."""
    terms = physics.terms(shape)
    unknown = [name for name in physics.tiers if np.count_nonzero(terms[name]) < FEWEST_IN_TIER]
    names = [name for name in physics.parameters if name not in unknown]
    design = np.stack([terms[name] for name in names], axis=1) / time_s[:, None]
    return {**dict.fromkeys(unknown, 0.0), **dict(zip(names, rates_of_unity(design), strict=True))}


def rates_of_unity(design: FloatArray) -> list[float]:
    """Rates of 0 or more, one a column, that bring Σ rate · column nearest to 1 in every row."""
    return nonnegative_rates(design, np.ones(len(design)))


def nonnegative_rates(design: FloatArray, target: FloatArray) -> list[float]:
    """Rates of 0 or more, one a column, that bring Σ rate · column nearest to `target` in every row: least
    sum of the sizes of errors, by reweighted least squares."""
    from scipy.optimize import nnls

    # In units of the largest value of each, so that their sizes don't matter to the solver.
    scale = np.maximum(design.max(axis=0), 1e-30)
    design = design / scale
    weight = np.ones(len(design))
    rates = np.zeros(design.shape[1])
    for _ in range(REWEIGHTINGS):
        rates, _ = nnls(design * weight[:, None], target * weight)
        # The square root, since it is squared again; errors under 2 % are noise.
        weight = 1.0 / np.sqrt(np.maximum(np.abs(design @ rates - target), 0.02))
    return [float(rate) for rate in rates / scale]


def _kernel(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """exp(−|a − b|²/2) for all pairs of rows, [len(a), len(b)]."""
    product = a @ b.T
    product -= 0.5 * np.sum(a * a, axis=1)[:, None]
    product -= 0.5 * np.sum(b * b, axis=1)[None, :]
    np.minimum(product, 0.0, out=product)
    return np.exp(product, out=product)


def _fit_residual(
    features: FloatArray,
    residual: FloatArray,
    length_scale: float,
    noise: float,
    inducing: int,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray]:
    scaled = features / length_scale
    points = _spread_points(scaled, inducing, rng)
    cross = _kernel(scaled, points)
    own = _kernel(points, points)
    system = cross.T @ cross + noise * own + 1e-4 * np.eye(len(points))
    weights = np.linalg.solve(system, cross.T @ residual)
    return points, np.asarray(weights)


def _spread_points(rows: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """Up to `count` rows, each as far as possible from those before it (farthest-point sampling)."""
    if len(rows) > PHYSICS_ROWS:
        rows = rows[rng.permutation(len(rows))[:PHYSICS_ROWS]]
    chosen = [0]
    distance = np.sum((rows - rows[0]) ** 2, axis=1)
    while len(chosen) < count:
        farthest = int(np.argmax(distance))
        if distance[farthest] < 1e-9:
            break
        chosen.append(farthest)
        distance = np.minimum(distance, np.sum((rows - rows[farthest]) ** 2, axis=1))
    return rows[chosen]
