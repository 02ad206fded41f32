"""What the plots show: small arrays made from a run's records, whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.slo import Slo
from traces.records import RunRecords

FloatArray = NDArray[np.float64]

CDF_POINTS = 1000
TIME_BINS = 600
SCATTER_POINTS = 3000
MAX_CLASSES = 6
MAX_REPLICAS = 64  # of more, evenly chosen ones are shown


@dataclass(frozen=True, slots=True)
class Cdf:
    """Quantiles of one class of requests: ``values[i]`` is the quantile ``shares[i]``."""

    label: str
    values: FloatArray
    shares: FloatArray
    target_s: float | None


@dataclass(frozen=True, slots=True)
class Scatter:
    """TTFT of requests against their arrival; ``shown`` of ``total``, the slowest among them."""

    arrival_s: FloatArray
    ttft_s: FloatArray
    prompt_tokens: FloatArray
    total: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Means over the bins of time whose middles are ``time_s``.

    Of waiting requests and the share of KV blocks in use there is the mean over replicas, and the least and
    the most loaded replica. Batch composition is the mean over the time a batch runs; NaN where none does.
    """

    time_s: FloatArray
    waiting: FloatArray
    waiting_low: FloatArray
    waiting_high: FloatArray
    kv_share: FloatArray
    kv_low: FloatArray
    kv_high: FloatArray
    prefill_tokens: FloatArray
    decode_tokens: FloatArray
    replicas: int


@dataclass(frozen=True, slots=True)
class PlotData:
    """Everything the plots need."""

    ttft: list[Cdf]
    tpot: list[Cdf]
    scatter: Scatter
    timeline: Timeline | None


def plot_data(records: RunRecords, slos: Sequence[Slo]) -> PlotData:
    """Reduce a run to what the plots show; ``slos`` are the promises to the classes of its requests."""
    # A target that grows with the prompt is no one place on the axis.
    ttft_targets_s = [slo.ttft.floor_s if slo.ttft.multiplier == 0 else None for slo in slos]
    return PlotData(
        ttft=_cdfs(records, records.ttft_s, ttft_targets_s),
        tpot=_cdfs(records, records.tpot_s, [slo.tpot_s for slo in slos]),
        scatter=_scatter(records),
        timeline=_timeline(records),
    )


def cdf(label: str, values: FloatArray, target_s: float | None = None) -> Cdf | None:
    """The distribution of the values that are there; None if none is."""
    chosen = np.sort(values[~np.isnan(values)])
    if len(chosen) == 0:
        return None
    ranks = np.unique(np.linspace(0, len(chosen) - 1, min(CDF_POINTS, len(chosen))).astype(np.int64))
    return Cdf(label, chosen[ranks], (ranks + 1) / len(chosen), target_s)


def gap_cdf(label: str, gaps: FloatArray) -> Cdf | None:
    """The distribution of the gaps between tokens, given as in ``RunRecords.gaps``; None if there is none."""
    first, growth, steps, requests = gaps.T
    lengths = steps.astype(np.int64)
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    values = np.repeat(first, lengths) + place * np.repeat(growth, lengths)
    return cdf(label, np.repeat(values, np.repeat(requests.astype(np.int64), lengths)))


def sample_plot_data() -> PlotData:
    """A little of everything there is to draw."""
    values = np.array([0.01, 0.1, 1.0])
    cdfs = [Cdf(label, values, np.array([0.3, 0.6, 1.0]), 0.5) for label in ("a", "b")]
    columns = (values,) * 9
    return PlotData(cdfs, cdfs, Scatter(values, values, 1e5 * values, 3), Timeline(*columns, replicas=2))


def _cdfs(records: RunRecords, values: FloatArray, targets_s: Sequence[float | None]) -> list[Cdf]:
    """One for each of the first classes that have values."""
    codes = records.requests["slo_class"]
    result = []
    for code, name in enumerate(records.slo_names[:MAX_CLASSES]):
        curve = cdf(name, values[codes == code], targets_s[code])
        if curve is not None:
            result.append(curve)
    return result


def _scatter(records: RunRecords) -> Scatter:
    requests, ttft_s = records.requests, records.ttft_s
    present = np.flatnonzero(~np.isnan(ttft_s))
    total = len(present)
    if total > SCATTER_POINTS:
        # The slowest quarter of the points, and the others evenly over time: outliers must not get lost.
        by_ttft = present[np.argsort(ttft_s[present], kind="stable")]
        slowest, others = by_ttft[-SCATTER_POINTS // 4 :], np.sort(by_ttft[: -SCATTER_POINTS // 4])
        picks = np.linspace(0, len(others) - 1, SCATTER_POINTS - len(slowest)).astype(np.int64)
        present = np.concatenate([slowest, others[picks]])
    return Scatter(
        requests["arrival_s"][present],
        ttft_s[present],
        requests["prompt_tokens"][present].astype(np.float64),
        total,
    )


def _timeline(records: RunRecords) -> Timeline | None:
    batches = records.batches
    first_stage = batches["stage"] == 0
    start_s, end_s = batches["start_s"][first_stage], batches["end_s"][first_stage]
    if len(start_s) == 0:
        return None
    columns = {
        name: batches[name][first_stage].astype(np.float64)
        for name in ("replica", "waiting", "kv_used_blocks", "prefill_tokens", "num_decodes")
    }
    edges = np.linspace(0.0, float(end_s.max()), TIME_BINS + 1)
    order = np.lexsort((start_s, columns["replica"]))
    borders = np.searchsorted(columns["replica"][order], np.arange(records.replicas + 1))
    shown = np.unique(np.linspace(0, records.replicas - 1, min(MAX_REPLICAS, records.replicas)).astype(int))
    waiting, kv = np.zeros((len(shown), TIME_BINS)), np.zeros((len(shown), TIME_BINS))
    capacities = np.maximum(records.kv_capacity_of(np.arange(records.replicas)), 1)
    for row, replica in enumerate(shown):
        mine = order[borders[replica] : borders[replica + 1]]
        waiting[row] = _mean_of_steps(end_s[mine], columns["waiting"][mine], edges)
        kv[row] = _mean_of_steps(end_s[mine], columns["kv_used_blocks"][mine] / capacities[replica], edges)
    busy_s = _integral(start_s, end_s, np.ones(len(start_s)), edges)
    with np.errstate(invalid="ignore", divide="ignore"):
        prefill = _integral(start_s, end_s, columns["prefill_tokens"], edges) / busy_s
        decode = _integral(start_s, end_s, columns["num_decodes"], edges) / busy_s
    return Timeline(
        time_s=(edges[:-1] + edges[1:]) / 2,
        waiting=waiting.mean(axis=0),
        waiting_low=waiting.min(axis=0),
        waiting_high=waiting.max(axis=0),
        kv_share=kv.mean(axis=0),
        kv_low=kv.min(axis=0),
        kv_high=kv.max(axis=0),
        prefill_tokens=prefill,
        decode_tokens=decode,
        replicas=records.replicas,
    )


def _mean_of_steps(at_s: FloatArray, values: FloatArray, edges: FloatArray) -> FloatArray:
    """Mean, in each bin, of the function that is 0 first and takes ``values[i]`` at ``at_s[i]``."""
    if len(at_s) == 0:
        return np.zeros(len(edges) - 1)
    lengths = np.diff(at_s, append=max(edges[-1], at_s[-1]))
    area = np.concatenate([[0.0], np.cumsum(values * lengths)])
    times = np.append(at_s, max(edges[-1], at_s[-1]))
    return np.asarray(np.diff(np.interp(edges, times, area)) / np.diff(edges))


def _integral(start_s: FloatArray, end_s: FloatArray, values: FloatArray, edges: FloatArray) -> FloatArray:
    """Σ over intervals of value × the part of the interval that lies in each bin. Intervals may overlap."""
    times = np.concatenate([start_s, end_s])
    slopes = np.concatenate([values, -values])
    order = np.argsort(times, kind="stable")
    times, slope = times[order], np.cumsum(slopes[order])
    area = np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(times))])
    return np.asarray(np.diff(np.interp(edges, times, area)))
