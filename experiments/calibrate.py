"""``convoy calibrate``: what tables of kernels don't hold, from a part of a measured run.

That is the host's time in each iteration (`predictor.host`) and a factor (`predictor.factors`), the same for
all requests and iterations; nothing is fitted a metric at a time. Of the measurements a run may have, the
first of these are used:

    iterations    the log's first share; least relative errors of the times of its iterations; the host alone,
                  or, where no kernel is known, steps by their tokens (`predictor.steps`) and factors on
                  attention
    throughput    tokens a second, in the first share of the run; the workload is simulated for every trial;
                  `prefill_s`, and how much of what tables add to mixed batches the engine's have
    requests      the first share of the requests; simulated likewise; least relative errors of TTFT and TPOT;
                  the host, and one factor on all times of the data sheet (`roofline`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from experiments.build import Experiment, build, errors_from
from experiments.config import Config, StepsConfig
from experiments.engine_replay import as_sent, simulated_latencies
from experiments.iteration_log import errors_by_phase, first_of_each, fit_host, fit_steps, predict
from experiments.load import dump_yaml, load_config
from experiments.measured import FloatArray, Iterations, MeasuredRun, Throughput, read_measured
from experiments.text import percent
from profiler.overheads import HostOverhead
from sim.cluster import simulate
from specs.errors import InputError
from traces.records import RunRecords

_MOST_S = 1.0  # of host time in an iteration that is looked for
_TRIALS = 120
_SLOWER = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)  # than its data sheet a machine may be
_KEPT = 0.8  # of the requests' errors that count
_WARM_UP_S = 2.0  # of a throughput series that is left out
_MIXED, _ROOFLINE = "mixed_attention", "roofline"
_FACTORS = (1.0, 0.8, 0.6, 0.4, 0.2)
_TICKS_S = np.arange(-1.0, 1.0, 0.02)  # by which a series' clock may be off: it says seconds only


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """The options of ``convoy calibrate``; see ``convoy calibrate --help``."""

    records: Path
    config: Path
    overrides: Sequence[str] = ()
    share: float = 0.5
    out: Path | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found: the host, or with nothing known of an engine its steps as a whole, and factors.
    ``basis`` says in words from what."""

    host: HostOverhead | None
    factors: Mapping[str, float]
    basis: str
    steps: StepsConfig | None = None

    @property
    def shown_host(self) -> dict[str, float]:
        """The host's three numbers, as a configuration has them."""
        assert self.host is not None
        return {name: getattr(self.host, name) for name in ("base_s", "per_request_s", "prefill_s")}


def calibrate(options: CalibrateOptions) -> int:
    """Fit, show what was found, and write the configuration with it if asked to. Returns 0.

    Raises:
        InputError: the configuration or the records are unsound, don't belong together, or the file to write
            is there.
    """
    if options.out is not None and options.out.exists() and not options.force:
        raise InputError(f"--out {options.out}: is there already; add --force to replace it")
    where = str(options.config)
    config = _without_earlier(load_config(options.config, options.overrides))
    with errors_from(str(options.records)):
        run = read_measured(options.records)
    experiment = build(config, where)
    found = fit(experiment, run, options.share)
    _show(found)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(dump_yaml(with_found(config, found)), encoding="utf-8")
        print(f"Written to {options.out}")
    return 0


def _show(found: Calibration) -> None:
    """Print what was found as a configuration says it."""
    print(f"From {found.basis}:")
    parts: dict[str, Mapping[str, float]] = {}
    if found.host is not None:
        parts["host"] = found.shown_host
    if found.steps is not None:
        tp = "" if found.steps.tp == 1 else f", tp: {found.steps.tp}"
        print(f"  predictor.steps: {{tokens: {found.steps.tokens}, seconds: {found.steps.seconds}{tp}}}")
    if found.factors:
        parts["factors"] = found.factors
    for name, values in parts.items():
        shown = ", ".join(f"{key}: {value:.4g}" for key, value in values.items())
        print(f"  predictor.{name}: {{{shown}}}")


def _without_earlier(config: Config) -> Config:
    """The configuration without what a calibration has found before."""
    data = config.model_dump(by_alias=True)
    found = [_MIXED, _ROOFLINE]
    if config.predictor.steps is not None:  # which come with factors on attention
        found += ["prefill_attention", "decode_attention"]
    data["predictor"]["host"] = data["predictor"]["steps"] = None
    for name in found:
        data["predictor"]["factors"].pop(name, None)
    return Config(**data)


def fit(experiment: Experiment, run: MeasuredRun, share: float) -> Calibration:
    """What the first ``share`` of the run says."""
    experiment = as_sent(experiment, run)
    if run.iterations is not None:
        log = run.iterations.take(first_of_each(run.iterations, share))
        if not len(log):
            raise InputError(f"{run.folder}: the first {percent(share)} of its log holds no iteration")
        return _fit_log(experiment, log, share)
    if run.throughput is not None:
        return _fit_throughput(experiment, run.throughput, share)
    return _fit_requests(experiment, run, share)


def _fit_log(experiment: Experiment, log: Iterations, share: float) -> Calibration:
    """The host's time, or all of a step's where no kernel is known."""
    cost = experiment.iteration
    parallel = experiment.parallel
    if cost.kernels.kinds or parallel.spp * parallel.kvp * parallel.cp > 1:
        host = fit_host(cost, log)
        found, fitted = Calibration(host, {}, ""), cost.with_host(host)
    else:
        steps = fit_steps(cost, log)
        table = StepsConfig(tokens=[*steps.tokens], seconds=[*steps.seconds], tp=experiment.parallel.tp)
        found = Calibration(None, steps.factors, "", table)
        fitted = build(with_found(experiment.config, found), "calibrated").iteration
    errors = errors_by_phase(log, predict(fitted, log))["all"]
    basis = (
        f"{len(log):,} iterations, the first {percent(share)} of each segment; "
        f"their median error is then {percent(errors.p50)}"
    )
    return replace(found, basis=basis)


def with_found(config: Config, found: Calibration) -> Config:
    """The configuration with what a calibration found, and nothing of an earlier one."""
    data = _without_earlier(config).model_dump(by_alias=True)
    predictor = data["predictor"]
    predictor["host"] = None if found.host is None else found.shown_host
    if found.steps is not None:
        predictor |= {"steps": found.steps.model_dump(), "cuda_graphs": 0}  # these are within the steps
    predictor["factors"] |= found.factors
    return Config(**data)


def _simulate(experiment: Experiment, host: HostOverhead) -> RunRecords:
    setup = replace(experiment.setup, cost=experiment.iteration.with_host(host))
    return simulate(experiment.workload, setup, step_by_step=True)


# -- tokens a second ----------------------------------------------------------------------------------------


def _fit_throughput(experiment: Experiment, series: Throughput, share: float) -> Calibration:
    """``prefill_s``, and how much of what the tables add to mixed batches there is, with which the sum of
    generated tokens follows the measured one."""
    end_s = float(series.end_s[-1]) * share
    use = (series.end_s >= _WARM_UP_S) & (series.end_s <= end_s)
    if use.sum() < 3:
        raise InputError(f"the first {percent(share)} of the series has fewer than three seconds of use")
    measured = np.cumsum(series.generated)[use]
    at_s = series.end_s[use]
    mixes = _MIXED in experiment.iteration.kernels.operators
    by_factor: dict[float, Experiment] = {}

    def distance(point: FloatArray) -> float:
        prefill_s, factor = max(float(point[0]), 0.0) * 1e-3, round(max(float(point[1]), 0.0), 2)
        if factor not in by_factor:
            by_factor[factor] = _with_factor(experiment, _MIXED, factor) if mixes else experiment
        generated = _generated(_simulate(by_factor[factor], HostOverhead(prefill_s=prefill_s)))
        return min(float(np.square(generated(at_s + tick_s) - measured).mean()) for tick_s in _TICKS_S)

    grid = [(ms, factor) for ms in (0.0, 2.0, 5.0, 8.0, 12.0) for factor in _FACTORS[: 5 if mixes else 1]]
    start = np.array(min(grid, key=lambda point: distance(np.array(point))))
    steps = start + np.array([[0.0, 0.0], [1.5, 0.0], [0.0, -0.15]])
    options = {"initial_simplex": steps, "maxfev": 40, "xatol": 0.02, "fatol": 1.0}
    best = minimize(distance, start, method="Nelder-Mead", options=options).x
    host = HostOverhead(prefill_s=float(f"{max(best[0], 0.0) * 1e-3:.3g}"), source="measured")
    basis = f"the tokens generated in seconds {at_s[0]:g} to {at_s[-1]:g}"
    factors = {_MIXED: round(max(float(best[1]), 0.0), 2)} if mixes else {}
    return Calibration(host, factors, basis)


def _generated(records: RunRecords) -> Callable[[FloatArray], FloatArray]:
    """Tokens generated up to a time."""
    batches = records.batches
    order = np.argsort(batches["end_s"], kind="stable")
    ends_s, decodes = batches["end_s"][order], np.cumsum(batches["num_decodes"][order])
    first_s = np.sort(records.requests["first_token_s"])

    def upto(time_s: FloatArray) -> FloatArray:
        counts = np.concatenate([[0], decodes])[np.searchsorted(ends_s, time_s, side="right")]
        return np.asarray(counts + np.searchsorted(first_s, time_s, side="right"), dtype=np.float64)

    return upto


# -- requests -----------------------------------------------------------------------------------------------


def _fit_requests(experiment: Experiment, run: MeasuredRun, share: float) -> Calibration:
    """The host's three numbers, and the factor of a roofline, with which TTFT and TPOT come out."""
    count = int(share * len(run.prompt_tokens))
    if count < 2 or not {"ttft_s", "tpot_s"} <= run.latencies_s.keys():
        raise InputError(f"{run.folder}: needs ttft_s and tpot_s of at least two requests to fit to")
    scales = _ROOFLINE in experiment.iteration.source
    measured = {name: run.latencies_s[name][:count] for name in ("ttft_s", "tpot_s")}

    def distance(logs: FloatArray) -> float:
        host, factor = _parameters(logs, scales)
        trial = _with_factor(experiment, _ROOFLINE, factor) if scales else experiment
        found = simulated_latencies(_simulate(trial, host), from_notice=run.from_notice)
        return _relative_errors(measured, {name: values[:count] for name, values in found.items()})

    guesses = [_guess(experiment, measured, factor) for factor in (_SLOWER if scales else (1.0,))]
    best = min(guesses, key=distance)[: 4 if scales else 3]
    for step in (0.5, 0.2):  # twice: the first simplex may have collapsed where batches change abruptly
        simplex = np.vstack([best, best + step * np.eye(len(best))])
        options = {"initial_simplex": simplex, "maxfev": _TRIALS, "xatol": 0.005, "fatol": 1e-4}
        found = minimize(distance, best, method="Nelder-Mead", options=options)
        best = found.x
    host, factor = _parameters(best, scales)
    basis = f"TTFT and TPOT of the first {count:,} requests; their mean error is then {percent(found.fun)}"
    return Calibration(host, {_ROOFLINE: factor} if scales else {}, basis)


def _guess(experiment: Experiment, measured: dict[str, FloatArray], factor: float) -> FloatArray:
    """Logarithms of base_s, per_request_s and prefill_s, and of the factor: the quickest token tells what a
    step takes at least."""
    alone_s = factor * experiment.iteration.tokens_s(1, 1, 1)
    over_s = max(float(np.nanquantile(measured["tpot_s"], 0.05)) - alone_s, 1e-4)
    return np.log([0.7 * over_s, over_s / 50.0, over_s, factor])


def _parameters(logs: FloatArray, scales: bool) -> tuple[HostOverhead, float]:
    base_s, per_request_s, prefill_s = (float(f"{min(np.exp(x), _MOST_S):.4g}") for x in logs[:3])
    factor = float(f"{np.exp(np.clip(logs[3], -5.0, 8.0)):.4g}") if scales else 1.0
    return HostOverhead(base_s, per_request_s, prefill_s=prefill_s, source="measured"), factor


def _with_factor(experiment: Experiment, operator: str, factor: float) -> Experiment:
    return replace(experiment, iteration=experiment.iteration.perturbed({operator: factor}))


def _relative_errors(measured: dict[str, FloatArray], found: dict[str, FloatArray]) -> float:
    """Mean |log(simulated ÷ measured)| without the largest fifth, which are a machine's hiccups more often
    than not; the two latencies weigh the same."""
    parts = []
    for name, values in measured.items():
        there = (values > 0) & (found[name] > 0)
        if there.any():
            errors = np.sort(np.abs(np.log(found[name][there] / values[there])))
            parts.append(float(errors[: max(int(_KEPT * len(errors)), 1)].mean()))
    return float(np.mean(parts)) if parts else float("inf")
