"""From the ``workload`` part of a configuration to the requests of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specs.errors import InputError
from traces import _config
from traces.readers import read_trace
from traces.synthesis import MAX_REQUESTS, ClosedLoop, arrival_times, sample_requests, stream
from traces.workload import Workload

_LENGTHS = "workload.lengths"
_ARRIVALS = "workload.arrivals"

# Nothing answers faster than a millisecond for each output token; it bounds what a closed loop can send.
_FASTEST_TOKEN_S = 1e-3


def build_workload(
    lengths: Mapping[str, Any],
    arrivals: Mapping[str, Any],
    num_requests: int | None,
    duration_s: float | None,
    seed: int,
    base_dir: Path,
) -> tuple[Workload, ClosedLoop | None]:
    """Build the requests of a run.

    Args:
        lengths: ``{trace: FILE}`` (and perhaps ``format``), or a distribution of `sample_requests`, where
            ``empirical`` may have ``trace: FILE`` in place of its lists, and a mixture's components too.
        arrivals: a process of `arrival_times`, or ``{process: trace, time_scale}``, the file's own times
            stretched, or ``{process: closed_loop, concurrency, think_time_s}``.
        num_requests: at most so many requests; None for no bound.
        duration_s: only requests that arrive before; None for no bound.
        seed: of the random streams for lengths and for arrivals.
        base_dir: what relative paths of trace files are relative to.

    Returns:
        The requests, with times of arrival unless the loop is closed, and the closed loop or None. A trace's
        lengths are taken in file order under any process, from the start again when it has too few.
        With a duration alone, a closed loop gets more requests than it can send in that time.

    Raises:
        InputError: a key or value is wrong, a file is unreadable, or no request is left.
    """
    _check_bounds(num_requests, duration_s)
    known = ("poisson", "gamma", "uniform", "trace", "closed_loop")
    process = _config.choice(arrivals, "process", known, _ARRIVALS)
    if not isinstance(lengths, Mapping):
        raise InputError(f"{_LENGTHS}: must be a mapping with trace or distribution")
    trace = None
    if "trace" in lengths and "distribution" not in lengths:
        trace = _read(lengths, base_dir, _LENGTHS)
    if process == "trace":
        return _replay(trace, arrivals, num_requests, duration_s), None
    source = _TraceLengths(trace) if trace is not None else _SampledLengths(lengths, seed, base_dir)
    if process == "closed_loop":
        return _closed_loop(source, arrivals, num_requests, duration_s)
    n = num_requests
    if n is None and duration_s is None and trace is not None:
        n = len(trace)
    times = arrival_times(arrivals, stream(seed, "arrivals"), n=n, duration_s=duration_s, where=_ARRIVALS)
    if len(times) == 0:
        raise InputError(f"workload.duration_s: no request arrives within {duration_s:g} s")
    return source.take(len(times)).with_arrivals(times), None


class _TraceLengths:
    """Lengths in the order of a file."""

    def __init__(self, trace: Workload) -> None:
        self._trace = trace.with_arrivals(None)
        self.natural_size: int | None = len(trace)

    def take(self, n: int) -> Workload:
        """The first `n`, from the start again when there are fewer."""
        return self._trace.take(np.arange(n) % len(self._trace))


class _SampledLengths:
    """Lengths from a distribution."""

    natural_size: int | None = None

    def __init__(self, spec: Mapping[str, Any], seed: int, base_dir: Path) -> None:
        self._spec = _with_traces_read(spec, base_dir, _LENGTHS)
        self._seed = seed

    def take(self, n: int) -> Workload:
        """Draw `n`; the same ones each time."""
        sample = sample_requests(self._spec, n, stream(self._seed, "lengths"), where=_LENGTHS)
        return Workload(
            sample.prompt_tokens,
            sample.output_tokens,
            slo_class=sample.slo_class,
            slo_names=sample.slo_names,
        )


def _replay(
    trace: Workload | None, arrivals: Mapping[str, Any], num_requests: int | None, duration_s: float | None
) -> Workload:
    """The trace at its own times."""
    _config.refuse_unknown(arrivals, ("process", "time_scale"), _ARRIVALS)
    if trace is None:
        raise InputError(f"{_ARRIVALS}.process: trace needs the lengths of a trace, as {_LENGTHS}.trace")
    if trace.arrival_s is None:
        raise InputError(
            f"{_ARRIVALS}.process: the file under {_LENGTHS}.trace holds lengths only, no times; "
            "choose poisson, gamma, uniform or closed_loop"
        )
    if num_requests is not None and num_requests > len(trace):
        raise InputError(f"workload.num_requests: {num_requests} is more than the {len(trace)} of the trace")
    scale = _config.number(arrivals.get("time_scale", 1.0), f"{_ARRIVALS}.time_scale", above=0.0)
    workload = trace.with_arrivals(trace.arrival_s * scale)
    if duration_s is not None:
        workload = workload.until(duration_s)
    return workload if num_requests is None else workload.head(num_requests)


def _closed_loop(
    source: _TraceLengths | _SampledLengths,
    arrivals: Mapping[str, Any],
    num_requests: int | None,
    duration_s: float | None,
) -> tuple[Workload, ClosedLoop]:
    _config.refuse_unknown(arrivals, ("process", "concurrency", "think_time_s"), _ARRIVALS)
    concurrency = _config.whole(
        _config.get(arrivals, "concurrency", _ARRIVALS), f"{_ARRIVALS}.concurrency", at_most=MAX_REQUESTS
    )
    think_s = _config.number(arrivals.get("think_time_s", 0.0), f"{_ARRIVALS}.think_time_s")
    n = num_requests
    if n is None and duration_s is not None:
        mean_output = float(source.take(source.natural_size or 1000).output_tokens.mean())
        rounds = math.ceil(duration_s / (think_s + mean_output * _FASTEST_TOKEN_S)) + 1
        n = concurrency * rounds
    if n is None:
        n = source.natural_size
    if n is None:
        raise InputError("workload: a closed loop needs num_requests or duration_s to know when to stop")
    if n > MAX_REQUESTS:
        raise InputError(f"workload.duration_s: {n} requests could be sent, more than {MAX_REQUESTS}")
    return source.take(n), ClosedLoop(concurrency, think_s)


def _check_bounds(num_requests: int | None, duration_s: float | None) -> None:
    if num_requests is not None:
        _config.whole(num_requests, "workload.num_requests", at_most=MAX_REQUESTS)
    if duration_s is not None:
        _config.number(duration_s, "workload.duration_s", above=0.0)


def _read(spec: Mapping[str, Any], base_dir: Path, where: str) -> Workload:
    """The trace that ``{trace: FILE}`` names."""
    _config.refuse_unknown(spec, ("trace", "format"), where)
    name = _config.text(spec["trace"], f"{where}.trace")
    path = base_dir / Path(name).expanduser()
    return read_trace(path, _config.text(spec.get("format", "auto"), f"{where}.format"))


def _with_traces_read(spec: Mapping[str, Any], base_dir: Path, where: str) -> dict[str, Any]:
    """Replace ``trace: FILE``, here and in components, by the lengths in the file."""
    resolved = dict(spec)
    if "trace" in spec:
        distribution = resolved.pop("distribution", "empirical")
        if distribution != "empirical":
            raise InputError(f"{where}.trace: goes with distribution empirical, not {distribution!r}")
        trace = _read(resolved, base_dir, where)
        return {
            "distribution": "empirical",
            "prompt_tokens": trace.prompt_tokens,
            "output_tokens": trace.output_tokens,
        }
    components = spec.get("components")
    if isinstance(components, list | tuple):
        resolved["components"] = [
            _component_with_trace_read(each, base_dir, f"{where}.components[{index}]")
            for index, each in enumerate(components)
        ]
    return resolved


def _component_with_trace_read(component: Any, base_dir: Path, where: str) -> Any:
    if not isinstance(component, Mapping) or "trace" not in component:
        return component
    own = {key: component[key] for key in ("weight", "slo_class") if key in component}
    rest = {key: value for key, value in component.items() if key not in own}
    return {**own, **_with_traces_read(rest, base_dir, where)}
