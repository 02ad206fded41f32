"""A log of iterations held against predictions, and what the tables don't hold fitted to it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from experiments.batch_times import ErrorSummary
from experiments.measured import PHASES, FloatArray, Iterations
from profiler.iteration import IterationModel
from profiler.overheads import HostOverhead

_ROUNDS = 60  # of reweighting: least absolute deviations as a limit of least squares
_SMALLEST = 1e-3  # relative error below which a row weighs no more


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
    columns = (
        iterations.prefills,
        iterations.prefill_tokens,
        iterations.prefill_context,
        iterations.decodes,
        iterations.decode_context,
    )
    rows = zip(*(column.astype(np.int64).tolist() for column in columns), strict=True)
    spread = np.sqrt(iterations.decode_variance).tolist()
    return np.array([_predict(cost, row, each) for row, each in zip(rows, spread, strict=True)])


def _predict(cost: IterationModel, row: tuple[int, ...], spread: float) -> float:
    prefills, tokens, context, decodes, total = row
    requests = prefills + decodes
    time_s = cost.tokens_s(tokens + decodes, requests, requests)
    if prefills:
        chunk = max(round(tokens / prefills), 1)
        time_s += prefills * cost.chunk_attention_s(chunk, round(context / prefills))
    if decodes:
        time_s += cost.decode_attention_s(decodes, total)
        time_s += cost.joint_attention_s(tokens, decodes, total, spread)
    return time_s


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
    requests = iterations.prefills + iterations.decodes
    prefill = (iterations.prefill_tokens > iterations.prefills).astype(np.float64)
    design = np.stack([np.ones_like(requests), requests, prefill], axis=1) / iterations.time_s[:, None]
    target = (iterations.time_s - without) / iterations.time_s
    weight = np.ones_like(target)
    found = np.zeros(3)
    for _ in range(_ROUNDS):
        root = np.sqrt(weight)
        found, _ = nnls(design * root[:, None], target * root)
        weight = 1.0 / np.maximum(np.abs(target - design @ found), _SMALLEST)
    base_s, per_request_s, prefill_s = (float(f"{value:.4g}") for value in found)
    return HostOverhead(base_s, per_request_s, prefill_s=prefill_s, source="measured")


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
