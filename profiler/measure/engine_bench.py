"""What an iteration takes while the runtime itself serves: all of it, and the host's part.

The host schedules, prepares and collects. The engine, its scheduler and the runner are those of a live run,
with as many layers of the model as matter: what the layers leave of the engine's code and data in the caches
is part of what the host's work takes. A batch's time less what the layers, the LM head and the sampling took
is the host's. The other way round the host's work pushes the layers' code and data out of the caches: a whole
iteration is longer than its operators, timed in loops.

In a pipeline the host of a later stage reports, fetches the next plan, prepares its inputs and takes the
activations in. While the stage before computes that is hidden; between two batches, the second of which was
waiting, it is not.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from policies.scheduler import SchedulerSettings
from profiler.iteration import IterationModel
from profiler.measure.points import Point
from profiler.measure.rank_cores import RankCores
from profiler.measure.serving_batches import PROMPT_TOKENS, STAGES, STEPS, lone_prompts, workload_of
from profiler.measure.timing import PATIENCE, PATIENCE_S, Samples
from profiler.roofline_kernels import RooflineKernels
from profiler.whole_layers import MOST_LAYERS
from runtime.engine import Engine, LiveRecords, LiveSetup
from runtime.executors import Executor
from runtime.launcher import start_executor
from runtime.plan import Plan, Slice
from runtime.runner import RunnerSpec
from specs import ParallelSpec
from specs.devices import DeviceSpec
from specs.errors import InputError
from specs.models import ModelSpec
from traces.stages import stage_starts
from traces.synthesis import ClosedLoop

BLOCK_TOKENS = 16
RUNS = 6
FEWEST = 3  # iterations on quiet cores that a visit goes on for
ENGINE_OPERATORS = ("host", "iteration", "stage_gap")
IDLE_S = 0.05  # that the engine has nothing to do before an iteration that is to find it so


class EngineBench:
    """Serves batches of one shape over and over, with one rank or, split in any way, with several.

    Args:
        model: the whole model; so many of its layers run that none finds its weights in a cache.
        points: all that may be asked for, for the size of the KV cache.
        parallel: how it is split, see :func:`parallel_of`; ranks are processes of their own if there are
            several.
        device: as torch calls it.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: DeviceSpec,
        points: list[Point],
        parallel: ParallelSpec,
        device: str,
        dtype: str,
    ) -> None:
        served = replace(model, num_layers=min(model.num_layers, MOST_LAYERS))
        at_a_time = parallel.spp * parallel.kvp
        workloads = [workload_of(point["requests"], point["chunk"], at_a_time) for point in points]
        each = [w.prompt_tokens.astype(np.int64) + w.output_tokens + 2 * BLOCK_TOKENS for w in workloads]
        self._runner = RunnerSpec(
            served,
            parallel=parallel,
            dtype=dtype,
            device=device,
            kv_capacity_tokens=max(int(tokens.sum()) for tokens in each),  # also if one group has them all
            block_tokens=BLOCK_TOKENS,
        )
        self._cost = IterationModel(
            served, RooflineKernels(spec, weight_dtype=dtype, kv_dtype=dtype), parallel
        )
        self._executor: Executor = start_executor(self._runner)
        self._cores = RankCores()

    def time(self, point: Point, visit_s: float) -> Samples:
        """Seconds of an iteration of so many requests, one of them a chunk if the point has one: the host's
        part of it, all of it, or what a later stage takes between two of them.

        Raises:
            InputError: the engine made no such batch, or none that waited for the later stage.
        """
        times: list[float] = []
        disturbed: list[float] = []
        began_s = time.perf_counter()
        until_s = began_s + visit_s
        give_up_s = began_s + max(PATIENCE * visit_s, PATIENCE_S)
        while len(times) < RUNS * STEPS:
            if time.perf_counter() >= (until_s if len(times) >= FEWEST else give_up_s):
                break
            for found_s, is_quiet in self._serve(point):
                (times if is_quiet else disturbed).append(found_s)
        if len(times) < FEWEST:
            # A gap ends when the next batch begins: heard of late, the one before makes it too short.
            is_gap = point.operator == "stage_gap"
            times += disturbed if is_gap else sorted(disturbed)[: max(len(disturbed) // 2, 1)]
        found_s = float(median(times)) if times else 0.0
        if found_s <= 0.0:
            raise InputError(f"no batch of {point} that could be timed")
        low, high = np.quantile(times, [0.25, 0.75])
        return Samples(found_s, float(high - low) / 2, len(times))

    def close(self) -> None:
        """End the ranks."""
        self._executor.close()

    def _serve(self, point: Point) -> list[tuple[float, bool]]:
        """Of each iteration of that shape in one run: seconds, and whether nobody else was on its cores."""
        requests, chunk = point["requests"], point["chunk"]
        is_idle = point.operator == "iteration" and bool(point["idle"])
        decodes = requests - bool(chunk)
        groups = self._runner.parallel.kvp
        at_a_time = self._runner.parallel.spp * groups
        tokens = decodes + chunk if chunk else decodes * PROMPT_TOKENS
        setup = LiveSetup(
            runner=self._runner,
            cost=self._cost,
            scheduler=SchedulerSettings(
                chunk_tokens=tokens,
                max_batch_requests=requests * at_a_time,
                max_batch_tokens=tokens,
                block_tokens=BLOCK_TOKENS,
                watermark=0.0,
            ),
            closed_loop=ClosedLoop(1, IDLE_S) if is_idle else None,
        )
        workload = lone_prompts(chunk) if is_idle else workload_of(requests, chunk, at_a_time)
        records = Engine(workload, setup, self._executor).run()
        self._let_go(len(workload))
        batches = records.batches
        wanted = batches["num_decodes"] == decodes * groups
        wanted &= batches["prefill_tokens"] == chunk * groups
        wanted &= batches["num_prefills"] == bool(chunk) * groups
        time_s = _times_s(point.operator, records)
        quiet = self._cores.are_quiet(batches, records.host)
        rows = np.flatnonzero(wanted & ~np.isnan(time_s))
        # Nobody waited before the first one.
        return list(zip(time_s[rows].tolist(), quiet[rows].tolist(), strict=True))[is_idle:]

    def _let_go(self, requests: int) -> None:
        """Free the KV blocks of the requests of a run: its engine would with its next batch."""
        token = Slice(-2, 0, 1, 2, samples=True)
        freed = [token.request, *range(requests)]
        self._executor.submit(Plan(-2, [token], np.zeros(1, dtype=np.int64), freed))
        for _ in range(self._executor.num_stages):
            self._executor.wait()


def parallel_of(point: Point) -> ParallelSpec:
    """How the model is split that an engine serves to time ``point``."""
    if point.operator == "iteration":
        return ParallelSpec(tp=point["tp"], spp=point["spp"], kvp=point["kvp"])
    return ParallelSpec(spp=STAGES) if point.operator == "stage_gap" else ParallelSpec(tp=point["ranks"])


def _times_s(operator: str, records: LiveRecords) -> NDArray[np.float64]:
    """What is asked for, of each row of the table of batches; NaN if it has none."""
    batches, host = records.batches, records.host
    time_s: NDArray[np.float64] = batches["end_s"] - batches["start_s"]
    if operator == "iteration":
        whole_s = np.bincount(batches["batch"], time_s)[batches["batch"]]
        return np.where(batches["stage"] == batches["stage"].max(), whole_s, np.nan)
    if operator == "host":
        return time_s - host["execute_s"] - host["sample_s"]
    between_s = np.full(len(time_s), np.nan)
    starts = stage_starts(batches)
    waiting = starts.sent_s <= starts.free_s
    between_s[starts.rows[waiting]] = starts.waited_s[waiting]
    return between_s
