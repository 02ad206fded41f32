"""The answer of a plan on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.plan_facts import PlanFacts, is_edge_of_search, reasons, usd_per_million_tokens
from experiments.tables import print_table
from experiments.text import number, percent, seconds, usd
from experiments.trials import Trial
from traces.workload import Workload

HEADER = ("deployment", "$/h", "$/M tokens", "SLOs met", "TTFT p99", "TPOT p99", "")
_RIGHT = HEADER[1:6]


def print_plan(facts: PlanFacts, wall_s: float) -> None:
    """The answer, its headroom, more traffic, the front, and what it was checked against."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    sentence, lines = answer(facts)
    console.print(Text(sentence, style="bold green" if facts.choice else "bold red"))
    for line in lines:
        console.print(Text(line))
    for note in facts.notes:
        console.print(Text(note, style="yellow"))
    if facts.front:
        title = "For more money, less latency (nothing simulated beats these in cost, TTFT and TPOT):"
        print_table(HEADER, rows(facts.front, facts), title=title, right=_RIGHT)
    if facts.found.neighbours:
        title = "Checked against its neighbours, simulated in full:"
        print_table(HEADER, rows(facts.found.neighbours, facts), title=title, right=_RIGHT)
    elif not facts.choice:
        print_table(HEADER, rows(facts.full[:10], facts), title="Simulated in full:", right=_RIGHT)
    console.print(Text(effort(facts) + f" {seconds(wall_s)}."))
    console.print(Text(f"Report: {facts.folder / 'report.html'}"))


def answer(facts: PlanFacts) -> tuple[str, list[str]]:
    """The answer in one sentence, and what belongs to it, a line each."""
    choice = facts.choice
    asked = f"{percent(facts.settings.attainment)} of requests"
    if choice is None:
        sentence = f"No deployment of up to {facts.settings.gpus} GPUs holds the SLOs for {asked}"
        return sentence, [_nearest(facts)] if facts.full else []
    total, output = usd_per_million_tokens(choice, facts.workload)
    ttft_s, tpot_s = choice.latencies
    sentence = f"{choice.deployment.name}: {usd(choice.deployment.usd_per_hour)} an hour"
    lines = [
        f"The cheapest that holds the SLOs for {asked}: {percent(choice.attainment)} meet them, "
        f"TTFT p99 {seconds(ttft_s)}, TPOT p99 {seconds(tpot_s)}.",
        f"{usd(total)} per million tokens, {usd(output)} per million output tokens, at this traffic.",
        headroom(facts),
    ]
    return sentence, lines + [traffic_line(facts, place) for place in range(len(facts.growth))]


def headroom(facts: PlanFacts) -> str:
    """How much more traffic the choice takes, and what binds then."""
    capacity = facts.capacity
    if capacity is None or capacity.load is None:
        return ""
    if is_edge_of_search(capacity):
        return f"Headroom: it still holds at {number(capacity.load)} times the traffic; more wasn't tried."
    edge = capacity.edge
    assert edge is not None
    text = f"Headroom: it holds up to {number(capacity.load)} times the traffic, not at {number(edge.load)}."
    bound = facts.binding
    return f"{text} What binds there is {bound.what}: {bound.why}." if bound else text


def traffic_line(facts: PlanFacts, place: int) -> str:
    """What the answer becomes with more traffic."""
    found = facts.growth[place]
    more = f"+{100 * (found.load - 1):g} % traffic"
    if found.choice is None:
        return f"{more}: no deployment of up to {facts.settings.gpus} GPUs holds."
    if facts.choice is not None and found.choice.deployment == facts.choice.deployment:
        return f"{more}: the same, {percent(found.choice.attainment)} meet their SLOs."
    deployment = found.choice.deployment
    return f"{more}: {deployment.name}, {usd(deployment.usd_per_hour)} an hour."


def effort(facts: PlanFacts) -> str:
    """What was looked at."""
    found = facts.found
    text = f"{len(facts.candidates):,} deployments within {facts.settings.gpus} GPUs"
    if found.ruled_out:
        parts = ", ".join(f"{count:,} by {reason}" for reason, count in sorted(reasons(found).items()))
        text += f"; {len(found.ruled_out):,} ruled out unsimulated ({parts})"
    steps = ", ".join(f"{count:,} on {percent(share)}" for share, count, _ in found.rungs)
    return f"{text}; simulated {steps} of the workload, {len(facts.full):,} in full."


def rows(trials: Sequence[Trial], facts: PlanFacts) -> list[list[str]]:
    """One row of ``HEADER`` each."""
    return [row(trial, facts.workload, facts.choice) for trial in trials]


def row(trial: Trial, workload: Workload, choice: Trial | None) -> list[str]:
    """A simulated deployment in the columns of ``HEADER``."""
    remark = "holds" if trial.holds else "misses"
    if choice is not None and trial.deployment == choice.deployment:
        remark = "the answer"
    total, _ = usd_per_million_tokens(trial, workload)
    ttft_s, tpot_s = trial.latencies
    return [
        trial.deployment.name,
        usd(trial.deployment.usd_per_hour),
        usd(total),
        percent(trial.attainment),
        seconds(ttft_s),
        seconds(tpot_s),
        remark,
    ]


def _nearest(facts: PlanFacts) -> str:
    best = max(facts.full, key=lambda trial: trial.attainment)
    return f"The nearest is {best.deployment.name}: {percent(best.attainment)} meet them."
