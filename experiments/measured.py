"""Measured runs of engines that aren't ours: requests with their times, and perhaps a log of iterations.

A run is a folder. Its requests are in a CSV file whose name ends in `requests.csv`, in one of these forms:

    ours         prompt_tokens, output_tokens, and of arrival_s, ttft_s, tpot_s, e2e_s what is known
                 (`convoy measure` writes it, and so does every run)
    benchmark    input_tokens, output_tokens, queued_s, first_token_s, last_token_s, and perhaps
                 peer_ttft_s, …: what another simulator predicted (casys-kaist/LLMServingSim)

Latencies of the benchmark form count from the moment at which the engine took notice of a request. A log of
iterations is a file whose name begins with `iterations`, one line a forward pass, in order; tokens generated
in each second (t, gen_throughput) are in one whose name ends in `timeseries.csv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from profiler.importers._csv import Csv, read_csv
from specs.errors import InputError

FloatArray = NDArray[np.float64]

LATENCIES = ("ttft_s", "tpot_s", "e2e_s")
PHASES = ("decode", "mixed", "context")
_OURS = ("prompt_tokens", "output_tokens")
_BENCHMARK = ("input_tokens", "output_tokens", "queued_s", "first_token_s", "last_token_s")
_ITERATIONS = (
    "sum_prefill_tokens",
    "num_prefill_requests",
    "sum_prefill_kv_tokens",
    "num_decode_requests",
    "sum_decode_kv_tokens",
    "latency_ms",
)


@dataclass(frozen=True, slots=True)
class Iterations:
    """A log of iterations, one entry each.

    Attributes:
        prefill_context: tokens in the caches of the prefills, before their chunks, all together.
        decode_context: tokens in the caches of the decodes, all together.
        decode_variance: variance of the decodes' contexts, tokens².
        segment: name of the part of the workload; empty if it has none.
    """

    prefills: FloatArray
    prefill_tokens: FloatArray
    prefill_context: FloatArray
    decodes: FloatArray
    decode_context: FloatArray
    decode_variance: FloatArray
    time_s: FloatArray
    segment: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def phase(self) -> NDArray[np.int64]:
        """A place in ``PHASES``."""
        return np.where(self.prefills == 0, 0, np.where(self.decodes > 0, 1, 2))

    def take(self, chosen: NDArray[np.bool_]) -> Iterations:
        """Some of the iterations, in their order."""
        return Iterations(*(getattr(self, name)[chosen] for name in Iterations.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens ``generated`` in each second, the second that ends at ``end_s`` after the run began."""

    end_s: FloatArray
    generated: FloatArray


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A measured run.

    Attributes:
        prompt_tokens, output_tokens: of each request, in the order in which they were sent.
        latencies_s: of each request, by the names in ``LATENCIES`` that were measured; NaN where none is.
        peer_s: the same as another simulator predicted it; may be empty.
        from_notice: whether latencies count from the moment at which the engine took notice of a request, and
            not from its arrival.
        makespan_s: from the first request's arrival to the last token of all; None if it isn't known.
        iterations: the log, if there is one.
        throughput: tokens a second, if they were noted.
    """

    folder: Path
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    latencies_s: Mapping[str, FloatArray]
    from_notice: bool
    makespan_s: float | None
    peer_s: Mapping[str, FloatArray] = field(default_factory=dict)
    iterations: Iterations | None = None
    throughput: Throughput | None = None


def find_requests(folder: Path) -> Path | None:
    """The file of requests in a folder, if it is a measured run of another engine."""
    try:
        if not folder.is_dir() or (folder / "live.json").is_file() or list(folder.glob("live-*")):
            return None
        found = sorted(path for path in folder.glob("*requests.csv*") if "sweep" not in path.name)
    except (OSError, ValueError):
        return None
    return found[0] if len(found) == 1 else None


def read_measured(folder: Path) -> MeasuredRun:
    """Read the measured run in ``folder``.

    Raises:
        InputError: there is no single file of requests, or a file is unsound.
    """
    path = find_requests(folder)
    if path is None:
        raise InputError(f"{folder}: holds no measured run: one file whose name ends in requests.csv")
    csv = read_csv(path, ())
    names = set(csv.data.columns)
    if set(_BENCHMARK) <= names:
        run = _read_benchmark(folder, csv)
    elif set(_OURS) <= names and names & set(LATENCIES):
        run = _read_ours(folder, csv)
    else:
        raise InputError(
            f"{path}: has neither {', '.join(_BENCHMARK)} nor {', '.join(_OURS)} with one of "
            f"{', '.join(LATENCIES)}"
        )
    logs = sorted(folder.glob("iterations*.csv*"))
    if len(logs) > 1:
        raise InputError(f"{folder}: more than one log of iterations: {', '.join(log.name for log in logs)}")
    series = sorted(folder.glob("*timeseries.csv*"))
    throughput = None
    if len(series) == 1:
        rates = read_csv(series[0], ("t", "gen_throughput"))
        throughput = Throughput(rates.numbers("t"), rates.numbers("gen_throughput"))
    return replace(run, iterations=read_iterations(logs[0]) if logs else None, throughput=throughput)


def read_iterations(path: Path) -> Iterations:
    """Read a log of iterations. Iterations that hold nothing are left out.

    Raises:
        InputError: it is unsound.
    """
    csv = read_csv(path, _ITERATIONS)
    tokens, prefills, context, decodes, decode_context, time_ms = (csv.numbers(name) for name in _ITERATIONS)
    names = csv.data.columns
    variance = np.zeros_like(tokens)
    if "var_decode_kv_tokens" in names:
        variance = csv.numbers("var_decode_kv_tokens")
    segment = np.full(len(tokens), "", dtype=np.str_)
    if "workload_segment" in names:
        segment = csv.data["workload_segment"].astype(str).to_numpy(dtype=np.str_)
    found = Iterations(prefills, tokens, context, decodes, decode_context, variance, time_ms * 1e-3, segment)
    return found.take((prefills + decodes > 0) & (time_ms > 0))


def _read_benchmark(folder: Path, csv: Csv) -> MeasuredRun:
    prompt, output, queued_s, first_s, last_s = (csv.numbers(name) for name in _BENCHMARK)
    e2e_s = last_s - queued_s
    latencies_s = {"ttft_s": first_s - queued_s, "tpot_s": _tpot(first_s, last_s, output), "e2e_s": e2e_s}
    peer_s = {name: csv.numbers(f"peer_{name}") for name in LATENCIES if f"peer_{name}" in csv.data.columns}
    arrival = "dataset_arrival_s" if "dataset_arrival_s" in csv.data.columns else "queued_s"
    return MeasuredRun(
        folder=folder,
        prompt_tokens=prompt.astype(np.int64),
        output_tokens=output.astype(np.int64),
        latencies_s=latencies_s,
        from_notice=True,
        makespan_s=float(last_s.max() - csv.numbers(arrival).min()),
        peer_s=peer_s,
    )


def _read_ours(folder: Path, csv: Csv) -> MeasuredRun:
    names = csv.data.columns
    latencies_s = {}
    for name in LATENCIES:
        if name in names:
            latencies_s[name] = csv.data[name].to_numpy(dtype=np.float64, na_value=np.nan)
    start = next((name for name in ("arrival_s", "start_s_reconstructed") if name in names), None)
    makespan_s = None
    if start is not None and "e2e_s" in latencies_s:
        start_s = csv.numbers(start)
        makespan_s = float(np.nanmax(start_s + latencies_s["e2e_s"]) - start_s.min())
    return MeasuredRun(
        folder=folder,
        prompt_tokens=csv.numbers("prompt_tokens").astype(np.int64),
        output_tokens=csv.numbers("output_tokens").astype(np.int64),
        latencies_s=latencies_s,
        from_notice=False,
        makespan_s=makespan_s,
    )


def _tpot(first_s: FloatArray, last_s: FloatArray, output: FloatArray) -> FloatArray:
    later = np.where(output > 1, output - 1, np.nan)
    return np.asarray((last_s - first_s) / later)
