"""A run in the words of its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.build import Experiment
from experiments.load import dump_yaml
from experiments.report import ClassRow, PhaseBar, ReportFacts
from experiments.text import percent, seconds
from experiments.version import version
from policies.slo import Slo
from traces.metrics import describe_values, slo_met
from traces.pressure import phases
from traces.records import FINISHED, RunRecords

_SLOWEST = (0.1, 0.01)


def report_facts(records: RunRecords, experiment: Experiment) -> ReportFacts:
    """What the report says besides the summary."""
    config = experiment.config
    notes = list(experiment.notes)
    if records.interrupted:
        notes.insert(
            0, f"Interrupted after {seconds(records.end_s)} of simulated time; what follows is partial."
        )
    return ReportFacts(
        name=config.name,
        model=experiment.model.name,
        device=experiment.device.vendor_name,
        gpus=experiment.gpus,
        layout=_layout(experiment),
        load=_load(config.workload.arrivals),
        classes=_classes(records, experiment),
        notes=notes,
        config_yaml=dump_yaml(config),
        version=version(),
        phase_names=tuple(phases(records)),
        phases=_phases(records),
    )


def _phases(records: RunRecords) -> list[PhaseBar]:
    """Of all finished requests, of the slowest, and of each class if there are several."""
    finished = records.requests["status"] == FINISHED
    if not finished.any():
        return []
    e2e_s = np.where(finished, records.e2e_s, -1.0)
    groups = [("all finished requests", finished)]
    groups += [
        (f"the slowest {percent(share)}", finished & (e2e_s >= np.quantile(e2e_s[finished], 1 - share)))
        for share in _SLOWEST
        if finished.sum() >= 10 / share
    ]
    if len(records.slo_names) > 1:
        codes = records.requests["slo_class"]
        groups += [(name, finished & (codes == code)) for code, name in enumerate(records.slo_names)]
    parts = phases(records)
    return [
        phase_bar(label, {name: float(values[mine].mean()) for name, values in parts.items()})
        for label, mine in groups
        if mine.any()
    ]


def phase_bar(label: str, means_s: Mapping[str, float]) -> PhaseBar:
    """A bar of the mean seconds in each phase, by their names in ``phases_s`` of summary.json."""
    total_s = sum(means_s.values())
    texts = ", ".join(f"{name} {seconds(value)}" for name, value in means_s.items())
    return label, f"{seconds(total_s)}: {texts}", [value / max(total_s, 1e-12) for value in means_s.values()]


def _layout(experiment: Experiment) -> str:
    parallel, config = experiment.parallel, experiment.config.parallel
    replicas = "1 replica" if parallel.replicas == 1 else f"{parallel.replicas} replicas"
    stages = {"stream": "SPP", "microbatch": "PP"}[parallel.pipeline]
    scheduler = experiment.config.scheduler
    chunks = (
        f"static chunks of {scheduler.chunk_tokens}" if scheduler.chunking == "static" else scheduler.chunking
    )
    groups = f", KVP {parallel.kvp}" if parallel.kvp > 1 else ""
    if parallel.cp > 1:
        groups += f", CP {parallel.cp} ({parallel.ring} ring)"
    if config.elastic is not None:
        groups += f", elastic CP up to {config.elastic.max_cp}"
        if config.elastic.reserved_replicas:
            groups += f" ({config.elastic.reserved_replicas} kept for short prompts)"
    layout = f"{replicas} of TP {parallel.tp}, {stages} {parallel.spp}{groups}"
    decode = experiment.decode_parallel
    if decode is not None:
        shards = f", KVP {decode.kvp}" if decode.kvp > 1 else ""
        layout = f"prefill: {layout}; decode: {decode.replicas} of TP {decode.tp}, PP {decode.spp}{shards}"
    return f"{layout}; {scheduler.priority}, {chunks}"


def _load(arrivals: Mapping[str, Any]) -> str:
    process = str(arrivals["process"]).replace("_", " ")
    details = ", ".join(f"{key} {value}" for key, value in arrivals.items() if key != "process")
    return f"{process} arrivals{f' ({details})' if details else ''}"


def _classes(records: RunRecords, experiment: Experiment) -> list[ClassRow]:
    met = slo_met(records, experiment.tpot_targets_s)
    codes = records.requests["slo_class"]
    rows = []
    for code, (name, slo) in enumerate(zip(records.slo_names, experiment.setup.slos, strict=True)):
        mine = codes == code
        count = int(mine.sum())
        ttft, tpot = describe_values(records.ttft_s[mine]), describe_values(records.tpot_s[mine])
        wanted = [ttft.get("p50"), ttft.get("p90"), ttft.get("p99"), tpot.get("p50"), tpot.get("p99")]
        rows.append(
            ClassRow(
                name=name,
                promise=promise(slo),
                requests=f"{count:,}",
                met=percent(float(met[mine].mean())) if count else "",
                latencies=["" if value is None else seconds(value) for value in wanted],
            )
        )
    return rows


def promise(slo: Slo) -> str:
    """A promise in words."""
    target = slo.ttft
    floor = seconds(target.floor_s)
    ttft = (
        f"TTFT ≤ {floor}"
        if target.multiplier == 0
        else f"TTFT ≤ max({target.multiplier:g} × prefill alone, {floor})"
    )
    return ttft if slo.tpot_s is None else f"{ttft}, TPOT ≤ {seconds(slo.tpot_s)}"
