"""What operators are held against: whole layers, whole iterations, uneven contexts, the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from profiler.coverage import entry_model
from profiler.estimate import BoolArray, FloatArray
from profiler.evaluation import Errors, by_folds, take
from profiler.iteration import IterationModel
from profiler.kernels import Kernels
from profiler.layer_parts import layer_parts_s
from profiler.overheads import (
    HostOverhead,
    LayerCorrection,
    ServingOverhead,
    fit_host,
    fit_layer,
    fit_serving,
    host_s,
    serving_s,
)
from profiler.tables import Profile, Table
from specs import ParallelSpec

MOST_LAYERS = 4  # of the model that are measured: enough that none finds its own weights in a GPU's cache


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Whole layers against the sum of their operators: `corrected` by a line in that sum, held out."""

    parts: Errors
    corrected: Errors
    correction: LayerCorrection
    noise: float | None  # median spread between repeats ÷ time

    def lines(self) -> list[str]:
        """For people."""
        found = self.correction
        return [
            f"whole layers ({self.parts.rows} batches): sum of the parts {self.parts}, corrected by "
            f"{1e6 * found.base_s:+.1f} µs and {100 * found.share:+.1f} % {self.corrected}"
        ]


def judge_layers(profile: Profile, table: Table, kernels: Kernels, count: int) -> LayerReport:
    """Predict every whole layer from its operators; fit what is missing, and say how well that does held out.

    Raises:
        InputError: the profile doesn't say of which model they are.
    """
    parts_s = whole_layers_s(profile, table, kernels)

    def predict(train: BoolArray, held: BoolArray) -> FloatArray:
        return parts_s[held] + fit_layer(parts_s[train], table.time_s[train]).at(parts_s[held])

    predicted_s = by_folds(count, len(table), predict)
    low, high = np.quantile(np.log(table.time_s / predicted_s), [0.05, 0.95])
    return LayerReport(
        Errors.of(parts_s, table.time_s),
        Errors.of(predicted_s, table.time_s),
        replace(fit_layer(parts_s, table.time_s), interval=(float(low), float(high))),
        noise_of(table),
    )


def whole_layers_s(profile: Profile, table: Table, kernels: Kernels) -> FloatArray:
    """Seconds of each row of a table of layers, summed over its operators."""
    model = entry_model(profile.model, str(profile.path))
    shape = {name: column for name, column in table.shape.items() if name != "tp"}
    seconds = np.empty(len(table))
    for tp in np.unique(table.shape["tp"]):
        rows = table.shape["tp"] == tp
        part = {name: column[rows] for name, column in shape.items()}
        seconds[rows] = layer_parts_s(model, kernels, tp=int(tp), **part)
    return seconds


def judge_skewed(table: Table, kernels: Kernels) -> Errors:
    """Decodes of very different contexts, predicted by their sum alone."""
    shape = {name: column for name, column in table.shape.items() if name != "longest_context"}
    return Errors.of(kernels.decode_attention(**shape).time_s, table.time_s)


def judge_host(table: Table, count: int) -> tuple[Errors, HostOverhead]:
    """What the host takes, or that of a later stage, and how well that does held out."""

    def predict(train: BoolArray, held: BoolArray) -> FloatArray:
        fitted = fit_host(take(table, np.flatnonzero(train)).shape, table.time_s[train])
        return host_s(fitted, take(table, np.flatnonzero(held)).shape)

    errors = Errors.of(by_folds(count, len(table), predict), table.time_s)
    return errors, fit_host(table.shape, table.time_s)


@dataclass(frozen=True, slots=True)
class IterationReport:
    """Whole iterations in a running engine against their operators and the host: `corrected` by what serving
    adds, held out."""

    parts: Errors
    corrected: Errors
    serving: ServingOverhead

    def lines(self) -> list[str]:
        """For people."""
        found = self.serving
        return [
            f"iterations in the running engine ({self.parts.rows}): operators and host {self.parts}, "
            f"corrected by {100 * found.share:.1f} % of the operators, {100 * found.ranks_share:.1f} more on "
            f"several ranks, {1e6 * found.base_s:.0f} µs, {1e6 * found.per_request_s:.1f} a request, "
            f"{1e6 * found.prefill_s:.0f} with a chunk, {1e6 * found.tp_s:.0f} if split by tensors, "
            f"{1e6 * found.idle_s:.0f} after a pause and {1e6 * found.idle_ranks_s:.0f} more on several "
            f"ranks {self.corrected}"
        ]


def judge_iterations(
    profile: Profile, table: Table, kernels: Kernels, host: HostOverhead, count: int
) -> IterationReport:
    """Predict every iteration from its operators and the host; fit what is missing, and say how well that
    does held out.

    Raises:
        InputError: the profile doesn't say of which model they are.
    """
    operators_s, hosts_s = iterations_s(profile, table, kernels, host)
    parts_s = operators_s + hosts_s

    def predict(train: BoolArray, held: BoolArray) -> FloatArray:
        rows = np.flatnonzero(train)
        found = fit_serving(take(table, rows).shape, operators_s[rows], hosts_s[rows], table.time_s[rows])
        shape = take(table, np.flatnonzero(held)).shape
        return np.asarray(parts_s[held] + serving_s(found, shape, operators_s[held]))

    return IterationReport(
        Errors.of(parts_s, table.time_s),
        Errors.of(by_folds(count, len(table), predict), table.time_s),
        fit_serving(table.shape, operators_s, hosts_s, table.time_s),
    )


def iterations_s(
    profile: Profile, table: Table, kernels: Kernels, host: HostOverhead
) -> tuple[FloatArray, FloatArray]:
    """Seconds of each row of a table of iterations: of its operators, of all stages together, and of the
    host."""
    model = entry_model(profile.model, str(profile.path))
    served = replace(model, num_layers=min(model.num_layers, MOST_LAYERS))
    operators_s, hosts_s = np.empty(len(table)), np.empty(len(table))
    columns = [table.shape[name].astype(np.int64).tolist() for name in table.shape]
    costs: dict[tuple[int, ...], IterationModel] = {}
    for row, values in enumerate(zip(*columns, strict=True)):
        shape = dict(zip(table.shape, values, strict=True))
        chunk, decodes = shape["chunk"], shape["requests"] - (shape["chunk"] > 0)
        layout = shape["tp"], shape["spp"], shape["kvp"]
        if layout not in costs:
            parallel = ParallelSpec(tp=layout[0], spp=layout[1], kvp=layout[2])
            costs[layout] = IterationModel(served, kernels, parallel, host=host)
        cost = costs[layout]
        # Of a prompt's chunks only the last yields a token; one that is sent alone has no other.
        rows = 1 if shape["idle"] else decodes
        attention_s = cost.chunk_attention_s(chunk, shape["context"]) if chunk else 0.0
        if decodes:
            attention_s += cost.decode_attention_s(decodes, shape["decode_context"])
        tokens, requests = decodes + chunk, shape["requests"]
        hosts_s[row] = cost.host_s(tokens, requests)
        operators_s[row] = sum(cost.stage_times_s(tokens, rows, requests, attention_s)) - hosts_s[row]
    return operators_s, hosts_s


def noise_of(table: Table) -> float | None:
    """Median of the spread between repeats, as a share of the time: no predictor is better than that."""
    return None if table.spread_s is None else float(np.median(table.spread_s / table.time_s))
