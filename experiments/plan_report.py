"""report.html of a plan: the answer first, then what it rests on."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.build import slo_of
from experiments.capacity_search import LoadTrial
from experiments.facts import phase_bar, promise
from experiments.load import dump_yaml
from experiments.plan_facts import PlanFacts, is_edge_of_search, usd_per_million_tokens
from experiments.plan_text import HEADER, answer, effort, headroom, rows
from experiments.report import render_page
from experiments.store import write_text
from experiments.text import number, percent, seconds, usd
from experiments.trials import class_of
from experiments.version import version

Rows = Sequence[Sequence[str]]
_MOST_ROWS = 60


def write_report(facts: PlanFacts, *, plots: bool) -> None:
    """Write report.html into the plan's folder."""
    images: list[tuple[str, bytes]] = []
    if plots and facts.full:
        from experiments.plan_plots import PARETO_TITLES, draw_headroom, draw_pareto

        images += [(title, draw_pareto(facts, place)) for place, title in enumerate(PARETO_TITLES)]
        if facts.capacity is not None and len(facts.capacity.trials) > 1:
            images.append(("Headroom", draw_headroom(facts)))
    sentence, lines = answer(facts)
    choice = facts.choice
    phases = choice.summary.get("phases_s") if choice is not None else None
    page = render_page(
        "plan.html.j2",
        images,
        name=facts.config.name,
        found=choice is not None,
        sentence=sentence,
        lines=lines[:1] if choice is None else [lines[0], headroom(facts)],
        question=_question(facts),
        notes=facts.notes,
        headlines=_headlines(facts),
        growth=_growth(facts),
        classes=_classes(facts),
        phase_names=tuple(phases) if phases else (),
        phases=[phase_bar("all finished requests", phases)] if phases else [],
        header=HEADER,
        tables=_tables(facts),
        loads=[_load_row(trial) for trial in facts.capacity.trials] if facts.capacity else [],
        effort=effort(facts),
        rungs=[
            (percent(share), f"{count:,}", f"{left:,}" if share < 1 else f"{left:,} hold")
            for share, count, left in facts.found.rungs
        ],
        config_yaml=dump_yaml(facts.config),
        asked=percent(facts.settings.attainment),
        version=version(),
    )
    write_text(facts.folder / "report.html", page)


def _question(facts: PlanFacts) -> str:
    workload = facts.workload
    span_s = None if workload.arrival_s is None else float(workload.arrival_s[-1] - workload.arrival_s[0])
    rate = f", {number((len(workload) - 1) / span_s)}/s over {seconds(span_s)}" if span_s else ""
    devices = ", ".join(facts.settings.devices or [facts.config.device])
    budget = f"up to {facts.settings.gpus} GPUs of {devices}"
    return f"{facts.config.model}, {len(workload):,} requests{rate}; {budget}"


def _headlines(facts: PlanFacts) -> list[tuple[str, str, str]]:
    choice = facts.choice
    if choice is None:
        return []
    total, output = usd_per_million_tokens(choice, facts.workload)
    ttft_s, tpot_s = choice.latencies
    cards = [
        (
            "Cost",
            f"{usd(choice.deployment.usd_per_hour)}/h",
            f"{usd(730 * choice.deployment.usd_per_hour)} a month",
        ),
        ("Per million tokens", usd(total), f"{usd(output)} per million output tokens"),
        ("SLOs met", percent(choice.attainment), f"{percent(facts.settings.attainment)} asked, worst class"),
        ("TTFT p99", seconds(ttft_s), f"median {seconds(choice.summary['ttft_s']['p50'])}"),
    ]
    if "tpot_s" in choice.summary:
        cards.append(("TPOT p99", seconds(tpot_s), f"median {seconds(choice.summary['tpot_s']['p50'])}"))
    capacity = facts.capacity
    if capacity is not None and capacity.load is not None:
        more = "at least " if is_edge_of_search(capacity) else ""
        bound = facts.binding
        detail = f"then {bound.what} binds" if bound else "times the traffic"
        cards.append(("Headroom", f"{more}{number(capacity.load)} ×", detail))
    return cards


def _growth(facts: PlanFacts) -> Rows:
    found = []
    for each in (facts.found, *facts.growth):
        factor = "as it is" if each.load == 1.0 else f"+{100 * (each.load - 1):g} %"
        choice = each.choice
        if choice is None:
            found.append([factor, f"none of up to {facts.settings.gpus} GPUs", "", "", "", ""])
            continue
        ttft_s, tpot_s = choice.latencies
        found.append(
            [
                factor,
                choice.deployment.name,
                usd(choice.deployment.usd_per_hour),
                percent(choice.attainment),
                seconds(ttft_s),
                seconds(tpot_s),
            ]
        )
    return found


def _classes(facts: PlanFacts) -> Rows:
    if facts.choice is None:
        return []
    summary = facts.choice.summary
    found = []
    for name in facts.workload.slo_names:
        served = class_of(summary, name)
        if served is None:
            continue
        own = summary["classes"][name] if "classes" in summary else summary
        latencies = [seconds(own[key]["p99"]) if key in own else "" for key in ("ttft_s", "tpot_s")]
        words = promise(slo_of(facts.config.slo.of_class(name)))
        found.append([name, words, f"{served[0]:,}", percent(served[1]), *latencies])
    return found


def _tables(facts: PlanFacts) -> list[tuple[str, str, Rows]]:
    neighbours = [*facts.found.neighbours, *([facts.choice] if facts.choice else [])]
    return [
        (
            "For more money, less latency",
            "Of those that hold, what nothing simulated beats in cost, TTFT p99 and TPOT p99 at once.",
            rows(facts.front, facts),
        ),
        (
            "Its neighbours",
            "The nearest that cost less and those that cost as much or more, simulated in full to check.",
            rows(sorted(neighbours, key=lambda trial: trial.deployment.usd_per_hour), facts),
        ),
        (
            "Everything simulated in full",
            "By cost.",
            rows(sorted(facts.full, key=lambda trial: trial.deployment.usd_per_hour)[:_MOST_ROWS], facts),
        ),
    ]


def _load_row(trial: LoadTrial) -> list[str]:
    verdict = ("holds" if trial.holds else "misses") + ("" if trial.settled else ", not settled")
    interval = f"{percent(trial.low)} – {percent(trial.high)}" if len(trial.attainments) > 1 else ""
    return [f"{number(trial.load)} ×", f"{len(trial.attainments)}", percent(trial.mean), interval, verdict]
