"""A run in the words of its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.build import Experiment
from experiments.load import dump_yaml
from experiments.report import ClassRow, ReportFacts
from experiments.text import percent, seconds
from experiments.version import version
from policies.slo import Slo
from traces.metrics import describe_values, slo_met
from traces.records import RunRecords


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
        gpus=experiment.parallel.gpus,
        layout=_layout(experiment),
        load=_load(config.workload.arrivals),
        classes=_classes(records, experiment),
        notes=notes,
        config_yaml=dump_yaml(config),
        version=version(),
    )


def _layout(experiment: Experiment) -> str:
    parallel = experiment.parallel
    replicas = "1 replica" if parallel.replicas == 1 else f"{parallel.replicas} replicas"
    stages = {"stream": "SPP", "microbatch": "PP"}[parallel.pipeline]
    scheduler = experiment.config.scheduler
    chunks = (
        f"static chunks of {scheduler.chunk_tokens}" if scheduler.chunking == "static" else scheduler.chunking
    )
    groups = f", KVP {parallel.kvp}" if parallel.kvp > 1 else ""
    if parallel.cp > 1:
        groups += f", CP {parallel.cp} ({parallel.ring} ring)"
    return f"{replicas} of TP {parallel.tp}, {stages} {parallel.spp}{groups}; {scheduler.priority}, {chunks}"


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
                promise=_promise(slo),
                requests=f"{count:,}",
                met=percent(float(met[mine].mean())) if count else "",
                latencies=["" if value is None else seconds(value) for value in wanted],
            )
        )
    return rows


def _promise(slo: Slo) -> str:
    target = slo.ttft
    floor = seconds(target.floor_s)
    ttft = (
        f"TTFT ≤ {floor}"
        if target.multiplier == 0
        else f"TTFT ≤ max({target.multiplier:g} × prefill alone, {floor})"
    )
    return ttft if slo.tpot_s is None else f"{ttft}, TPOT ≤ {seconds(slo.tpot_s)}"
