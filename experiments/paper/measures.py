"""What is kept of each cell. A hash of this file is part of what a result is known by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from experiments.build import Experiment
from experiments.predict import PredictOptions, iteration_model, predicted_rows
from experiments.run import summarize_run
from policies.request import Request
from policies.scheduler import Scheduler, SchedulerSettings
from policies.sharding import Sharding
from profiler.iteration import IterationModel
from specs import DeviceSpec, ModelSpec
from traces.metrics import describe_values
from traces.records import FINISHED, REJECTED, RunRecords

LONG_TOKENS = 100_000  # the evaluation's long prompts begin here


def measure_run(records: RunRecords, experiment: Experiment) -> dict[str, Any]:
    """The summary of a run and, besides,

    - ``ttft_finished_s``: of requests that have finished;
    - ``ttft_all_s``: of all that were let in; who has no first token yet counts with the time it has
      waited, which is less than its TTFT will be. ``without_first_token`` says how many those are;
    - the same of ``short`` and of ``long`` prompts;
    - ``mixed_batch_s``: times of the iterations with decodes and prefill together, over all stages;
    - ``longest_batch_s``: of the first stage; before a batch has left it, nothing else can begin;
    - ``groups_join_s``: when the KVP groups join the first request, from its first batch on.
    """
    requests = records.requests
    long = requests["prompt_tokens"] >= LONG_TOKENS
    result = summarize_run(records, experiment) | _of_requests(records, np.ones(len(long), dtype=np.bool_))
    result["short"] = _of_requests(records, ~long)
    result["long"] = _of_requests(records, long)
    result["gpus"] = experiment.gpus
    batches = records.batches
    mixed = (batches["num_prefills"] > 0) & (batches["num_decodes"] > 0)
    durations_s = (batches["end_s"] - batches["start_s"])[mixed] * experiment.parallel.spp
    result["mixed_batch_s"] = describe_values(durations_s)
    first = batches["stage"] == 0
    result["longest_batch_s"] = float(
        ((batches["end_s"] - batches["start_s"]) / batches["steps"])[first].max()
    )
    sharding = experiment.setup.sharding
    if sharding.groups > 1:
        result["groups_join_s"] = groups_join_s(records, sharding)
        result["prefill_end_s"] = result["ttft_all_s"]["max"]
    return result


def groups_join_s(records: RunRecords, sharding: Sharding) -> list[float]:
    """Of a run of one request: seconds from its first batch until each KVP group joins it."""
    batches = records.batches
    first = batches["stage"] == 0
    starts_s, tokens = batches["start_s"][first], batches["prefill_tokens"][first]
    context = np.cumsum(tokens) - tokens
    borders = np.arange(sharding.groups) * sharding.tokens_per_group
    places = np.searchsorted(context[tokens > 0], borders)
    return [float(starts_s[place] - starts_s[0]) for place in places if place < np.count_nonzero(tokens)]


def _of_requests(records: RunRecords, chosen: np.ndarray) -> dict[str, Any]:
    requests, ttft_s = records.requests, records.ttft_s
    chosen = chosen & (requests["status"] != REJECTED)
    finished = chosen & (requests["status"] == FINISHED)
    waited_s = np.where(np.isnan(ttft_s), records.end_s - requests["arrival_s"], ttft_s)
    return {
        "requests": int(chosen.sum()),
        "finished": int(finished.sum()),
        "without_first_token": int((chosen & np.isnan(ttft_s)).sum()),
        "ttft_finished_s": describe_values(ttft_s[finished]),
        "ttft_all_s": describe_values(waited_s[chosen]),
        "tpot_finished_s": describe_values(records.tpot_s[finished]),
    }


def measure_prediction(options: Mapping[str, Any]) -> dict[str, Any]:
    """One iteration: its time, its floor and its operators, seconds; and of decodes, the share of the memory
    bandwidth that reading weights and KV cache takes on the GPUs at work (``mbu``)."""
    asked = PredictOptions(**options)
    shape = {name: options[name] for name in ("chunk", "decodes", "context") if name in options}
    model, device, iteration = _model(tuple(sorted((k, v) for k, v in options.items() if k not in shape)))
    rows = predicted_rows(asked, iteration)
    total_s = sum(row.time_s for row in rows)
    result: dict[str, Any] = {
        "total_s": total_s,
        "floor_s": sum(row.floor_s for row in rows),
        "attention_s": sum(
            row.time_s
            for row in rows
            if "attention" in row.name and "norm" not in row.name and "all-reduce" not in row.name
        ),
        "operators": {row.name: row.time_s for row in rows},
    }
    if asked.decodes:
        weights = 2.0 * (model.num_layers * model.layer_linear_weights + model.vocab_size * model.hidden_size)
        cache = asked.decodes * asked.context * model.kv_bytes_per_token("bf16") / asked.kvp
        num_bytes = (weights + cache) / asked.tp
        result["mbu"] = num_bytes / (device.memory_bandwidth_bytes_per_s * total_s)
    return result


@lru_cache(maxsize=8)
def _model(key: tuple[tuple[str, Any], ...]) -> tuple[ModelSpec, DeviceSpec, IterationModel]:
    return iteration_model(PredictOptions(**dict(key)))


def measure_decisions(options: Mapping[str, Any]) -> dict[str, Any]:
    """Wall time of one scheduling decision with so many prefills waiting, LARS, adaptive chunks and space
    sharing; a long prompt among every twenty. Seconds, over 200 decisions."""
    key = tuple(sorted((k, v) for k, v in options.items() if k != "waiting"))
    _, _, iteration = _model(key)
    settings = SchedulerSettings(priority="lars", chunking="adaptive", space_sharing=True)
    scheduler = Scheduler(settings, iteration, 100_000_000)
    rng = np.random.default_rng(0)
    for id, tokens in enumerate(rng.integers(100, 8_000, int(options["waiting"])).tolist()):
        scheduler.add(Request(id, id * 0.01, 400_000 if id % 20 == 0 else tokens, 100))
    spent_s, now_s = [], 20.0
    for _ in range(200):
        began_s = time.perf_counter()
        batch = scheduler.next_batch(now_s)
        spent_s.append(time.perf_counter() - began_s)
        if batch is None:
            break
        scheduler.leave_first_stage(batch)
        scheduler.complete(batch, now_s)
        now_s += 0.05
    return {"decision_s": {"p50": statistics.median(spent_s), "max": max(spent_s)}}
