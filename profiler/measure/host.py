"""What the host does in an iteration: schedule, prepare, collect; with a model that computes nothing.

On a CPU the layers leave nothing of the scheduler's code and data in the caches. So what stands in for them
reads as much as they would, and the time of that is taken off.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch

from policies.scheduler import SchedulerSettings
from profiler.measure.timing import CORE, PATIENCE_S, Samples
from runtime.engine import Engine, LiveSetup
from runtime.executors import StageDone
from runtime.kv_cache import PagedKV
from runtime.plan import KVGroups, Plan, make_inputs
from runtime.runner import RunnerSpec
from specs.models import ModelSpec
from traces.workload import Workload

PROMPT_TOKENS = 16
BLOCK_TOKENS = 16
FEWEST_STEPS = 24


class _FreeCost:
    """A cost model for which everything takes no time; batches are bounded by their tokens alone."""

    def tokens_s(self, tokens: int, rows: int, requests: int) -> float:
        return 0.0

    def chunk_attention_s(self, chunk_tokens: int, context_tokens: int) -> float:
        return 0.0

    def decode_attention_s(self, decodes: int, total_context: int) -> float:
        return 0.0


class _IdleExecutor:
    """Takes plans, prepares a rank's inputs for them, and answers with token 0 for every sampled row.

    Attributes:
        away_s: how long sweeping the caches took, for every plan.
    """

    num_stages = 1

    def __init__(self, device: torch.device, capacity_tokens: int, swept: torch.Tensor | None) -> None:
        self._device = device
        self._swept = swept
        self.away_s: list[float] = []
        self._cache = PagedKV(
            1,
            1,
            1,
            capacity_tokens=capacity_tokens,
            block_tokens=BLOCK_TOKENS,
            dtype=torch.float32,
            device=device,
        )
        self._plan: Plan | None = None

    def submit(self, plan: Plan) -> None:
        self._plan = plan

    def wait(self, timeout_s: float | None = None) -> StageDone | None:
        if self._plan is None:
            return None
        plan, self._plan = self._plan, None
        inputs = make_inputs(plan, self._cache, KVGroups(), self._device)
        began_s = time.perf_counter()
        if self._swept is not None:
            torch.relu(self._swept)  # reads and writes all of it
        self.away_s.append(time.perf_counter() - began_s)
        # What becomes of the sampled tokens on the host.
        largest = torch.zeros(len(inputs.sampled))
        any(torch.isnan(largest).tolist())
        tokens = torch.zeros(len(inputs.sampled), dtype=torch.int64).tolist()
        requests = [request for request, _ in inputs.sampled]
        return StageDone(plan.id, 0, list(zip(requests, tokens, strict=True)), 0.0, 0.0, 0.0)

    def close(self) -> None:
        """Nothing is held."""


def time_iterations(
    model: ModelSpec, requests: int, device: torch.device, visit_s: float, swept_bytes: int = 0
) -> Samples:
    """Host seconds of an iteration of `requests` decodes, served by the runtime's engine and scheduler.

    `swept_bytes` is what an iteration moves through the host's caches.
    """
    swept = torch.ones(swept_bytes // 8) if swept_bytes else None  # read, and as much written
    steps, times = FEWEST_STEPS, list[float]()
    began_s = time.perf_counter()
    give_up_s = began_s + max(visit_s, PATIENCE_S)
    disturbed: list[float] = []
    while len(times) < 4 * steps and (time.perf_counter() < give_up_s or not (times or disturbed)):
        quiet = CORE.is_quiet()
        found = _decode_iterations(model, requests, steps, device, swept)
        (times if quiet and CORE.is_quiet() else disturbed).extend(found)
    times = times or sorted(disturbed)[: len(disturbed) // 2]
    low, high = np.quantile(times, [0.25, 0.75])
    return Samples(float(median(times)), float(high - low) / 2, len(times))


def _decode_iterations(
    model: ModelSpec, requests: int, steps: int, device: torch.device, swept: torch.Tensor | None
) -> list[float]:
    capacity = (requests + 2) * (PROMPT_TOKENS + steps + 2 * BLOCK_TOKENS)
    workload = Workload(
        prompt_tokens=np.full(requests, PROMPT_TOKENS, dtype=np.int32),
        output_tokens=np.full(requests, steps, dtype=np.int32),
        arrival_s=np.zeros(requests),
        slo_class=None,
    )
    setup = LiveSetup(
        runner=RunnerSpec(model, kv_capacity_tokens=capacity, block_tokens=BLOCK_TOKENS),
        cost=_FreeCost(),
        scheduler=SchedulerSettings(
            chunk_tokens=requests * PROMPT_TOKENS,
            max_batch_requests=requests,
            max_batch_tokens=requests * PROMPT_TOKENS,
            block_tokens=BLOCK_TOKENS,
            watermark=0.0,
        ),
    )
    executor = _IdleExecutor(device, capacity, swept)
    batches = Engine(workload, setup, executor).run().batches
    # The engine warms up with some plans of its own before the first batch.
    away_s = np.array(executor.away_s[-len(batches["end_s"]) :])
    durations = batches["end_s"] - batches["start_s"] - away_s
    only_decodes = (batches["num_decodes"] == requests) & (batches["num_prefills"] == 0)
    found: list[float] = durations[only_decodes].tolist()
    return found
