"""A log of iterations held against predictions, and what the tables don't hold fitted to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from experiments.batch_times import ErrorSummary
from experiments.measured import PHASES, FloatArray, Iterations
from profiler.iteration import IterationModel
from profiler.overheads import HostOverhead

_ROUNDS = 60  # of reweighting: least absolute deviations as a limit of least squares
_ENOUGH = 8  # batches between two knots of a curve
_SMALLEST = 1e-3  # relative error below which a row weighs no more
_HICCUP = 0.5  # relative error from which on it says more of the machine than of the engine


def first_of_each(iterations: Iterations, share: float) -> NDArray[np.bool_]:
    """True for the first ``share`` of the iterations of each segment."""
    chosen = np.zeros(len(iterations), dtype=np.bool_)
    for segment in np.unique(iterations.segment):
        rows = np.flatnonzero(iterations.segment == segment)
        chosen[rows[: int(share * len(rows))]] = True
    return chosen


def predict(cost: IterationModel, iterations: Iterations) -> FloatArray:
    """Seconds of each iteration. Prefills of one iteration count as equally long, behind equal contexts: a
    log has their sums."""
    return np.asarray(_parts_of(cost, iterations).sum(axis=1))


def _parts_of(cost: IterationModel, iterations: Iterations) -> FloatArray:
    """Seconds of all but attention, of the prompts' attention and of the decodes', one row an iteration."""
    columns = (
        iterations.prefills,
        iterations.prefill_tokens,
        iterations.prefill_context,
        iterations.decodes,
        iterations.decode_context,
    )
    rows = zip(*(column.astype(np.int64).tolist() for column in columns), strict=True)
    spread = np.sqrt(iterations.decode_variance).tolist()
    return np.array([_parts(cost, row, each) for row, each in zip(rows, spread, strict=True)]).reshape(-1, 3)


def _parts(cost: IterationModel, row: tuple[int, ...], spread: float) -> tuple[float, float, float]:
    prefills, tokens, context, decodes, total = row
    requests = prefills + decodes
    rest_s, chunks_s, decodes_s = cost.tokens_s(tokens + decodes, requests, requests), 0.0, 0.0
    if prefills:
        chunk = max(round(tokens / prefills), 1)
        chunks_s = prefills * cost.chunk_attention_s(chunk, round(context / prefills))
    if decodes:
        decodes_s = cost.decode_attention_s(decodes, total)
        decodes_s += cost.joint_attention_s(tokens, decodes, total, spread)
    return rest_s, chunks_s, decodes_s


def errors_by_phase(iterations: Iterations, predicted_s: FloatArray) -> dict[str, ErrorSummary]:
    """Errors of each kind of iteration, and of all."""
    found = {}
    for place, phase in enumerate(PHASES):
        mine = iterations.phase == place
        if (errors := ErrorSummary.of(predicted_s[mine], iterations.time_s[mine])) is not None:
            found[phase] = errors
    total = ErrorSummary.of(predicted_s, iterations.time_s)
    assert total is not None
    return found | {"all": total}


def fit_host(cost: IterationModel, iterations: Iterations) -> HostOverhead:
    """The host's time that brings predictions nearest to the log: the least sum of relative errors, with no
    coefficient below 0. What ``cost`` says of the host is left out."""
    without = predict(cost.with_host(HostOverhead()), iterations)
    return _host_of(_least_errors(_host_columns(iterations), iterations.time_s - without, iterations.time_s))


@dataclass(frozen=True, slots=True)
class Steps:
    """What an engine's steps take: ``seconds`` by ``tokens``, and ``factors`` on attention."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    factors: Mapping[str, float]


def fit_steps(cost: IterationModel, iterations: Iterations) -> Steps:
    """How long a step takes by its tokens, and attention beside that, of an engine without any tables.

    ``cost`` knows the machine by its data sheet alone, and only its attention is used: a factor for prompts
    and one for decodes, neither below what the data sheet allows. The rest is a line from knot to knot, which
    may fall: matrix libraries have other kernels for one token or two. All of it is fitted at once, by least
    squares of relative errors, so that the mean is right: latencies are sums of steps. Decodes, mixed and
    context steps weigh the same, however many there are of each.
    """
    attention = _parts_of(cost, iterations)[:, 1:]
    floors = _parts_of(cost.perturbed({"roofline": 0.0}), iterations)[:, 1:]
    least = [_ratio(floors[:, place], attention[:, place]) for place in (0, 1)]
    tokens = iterations.prefill_tokens + iterations.decodes
    knots = _knots(tokens)
    columns = np.column_stack([_shares(tokens, knots), attention])
    phase = iterations.phase
    importance = 1.0 / np.bincount(phase, minlength=len(PHASES))[phase]
    importance /= importance.mean()
    bounds = np.array([*np.zeros(len(knots)), *least])
    found = _least_errors(columns, iterations.time_s, iterations.time_s, bounds, importance, _HICCUP)
    names = ("prefill_attention", "decode_attention")
    factors = {name: _rounded(value) for name, value in zip(names, found[-2:], strict=True)}
    seconds = tuple(_rounded(value) for value in found[:-2])
    return Steps(tuple(int(knot) for knot in knots), seconds, factors)


def _ratio(floor_s: FloatArray, part_s: FloatArray) -> float:
    there = part_s > 0
    return float(np.median(floor_s[there] / part_s[there])) if there.any() else 1.0


def _knots(tokens: FloatArray) -> FloatArray:
    """Powers of two and their halfway points, from the smallest batch to the largest, where there are enough
    batches from one to the next to say what they take."""
    powers = 2.0 ** np.arange(31)
    sizes = np.sort(np.concatenate([powers, 1.5 * powers[1:]]))
    knots = [float(tokens.min())]
    largest = float(tokens.max())
    for size in (*sizes[sizes < largest], largest):
        if size > knots[-1] and ((tokens > knots[-1]) & (tokens <= size)).sum() >= _ENOUGH:
            knots.append(float(size))
    knots[-1 if len(knots) > 1 else 1 :] = [largest] if largest > knots[0] else []
    return np.array(knots)


def _shares(tokens: FloatArray, knots: FloatArray) -> FloatArray:
    """How much of each knot's time is in that of a batch: one, or two neighbours'."""
    return np.stack([np.interp(tokens, knots, each) for each in np.eye(len(knots))], axis=1)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _host_columns(iterations: Iterations) -> FloatArray:
    requests = iterations.prefills + iterations.decodes
    prefill = (iterations.prefill_tokens > iterations.prefills).astype(np.float64)
    return np.stack([np.ones_like(requests), requests, prefill], axis=1)


def _host_of(coefficients: FloatArray) -> HostOverhead:
    base_s, per_request_s, prefill_s = (float(f"{value:.4g}") for value in coefficients)
    return HostOverhead(base_s, per_request_s, prefill_s=prefill_s, source="measured")


def _least_errors(
    columns: FloatArray,
    target: FloatArray,
    scale: FloatArray,
    least: FloatArray | None = None,
    importance: FloatArray | float = 1.0,
    smallest: float = _SMALLEST,
) -> FloatArray:
    """Coefficients of the columns, none below ``least``, or 0, with the least sum of importance · |error| ÷
    scale; of its square up to ``smallest``."""
    least = np.zeros(columns.shape[1]) if least is None else least
    design, goal = columns / scale[:, None], (target - columns @ least) / scale
    weight = importance * np.ones_like(goal)
    found = np.zeros(columns.shape[1])
    for _ in range(_ROUNDS):
        root = np.sqrt(weight)
        found, _ = nnls(design * root[:, None], goal * root)
        weight = importance / np.maximum(np.abs(goal - design @ found), smallest)
    return np.asarray(found + least)


def similarity(measured: Mapping[str, FloatArray], simulated: Mapping[str, FloatArray]) -> dict[str, float]:
    """How alike two sequences of batches are, each given as ``prefill_tokens`` and ``decodes`` a batch.

    ``same_mix``: the overlap of the two distributions of (decodes, whether there is a prefill): 1 if each
    kind of batch is as frequent on either side. ``same_order``: one minus the mean difference in decodes
    between the batches that hold the same token, counted from the first, relative to the mean number of
    decodes.
    """
    kinds = []
    for side in (measured, simulated):
        code = side["decodes"].astype(np.int64) * 2 + (side["prefill_tokens"] > 0)
        kinds.append(np.bincount(code) / len(code))
    width = max(map(len, kinds))
    padded = [np.pad(each, (0, width - len(each))) for each in kinds]
    overlap = float(np.minimum(*padded).sum())
    ends = [np.cumsum(side["prefill_tokens"] + side["decodes"]) for side in (measured, simulated)]
    at = np.linspace(0.0, min(end[-1] for end in ends), 20_001)[1:]
    decodes = [
        side["decodes"][np.minimum(np.searchsorted(end, at), len(end) - 1)]
        for side, end in zip((measured, simulated), ends, strict=True)
    ]
    mean = float(decodes[0].mean())
    difference = float(np.abs(decodes[0] - decodes[1]).mean())
    return {"same_mix": overlap, "same_order": 1.0 - difference / mean if mean > 0 else 1.0}
