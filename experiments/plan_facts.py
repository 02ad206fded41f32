"""What a plan has found, and its plan.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.binding import Binding, binding
from experiments.capacity_search import Capacity
from experiments.config import Config
from experiments.deployments import Deployment
from experiments.plan_config import PlanConfig
from experiments.search import Findings
from experiments.trials import Trial, front
from traces.workload import Workload


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """Everything that the answer is made of.

    Attributes:
        found: the search at the configured traffic.
        growth: the searches at more traffic, in ascending order.
        capacity: how much more the choice takes; None without a choice.
        random: whether seeds make a difference.
    """

    config: Config
    settings: PlanConfig
    folder: Path
    workload: Workload
    candidates: Sequence[Deployment]
    found: Findings
    growth: Sequence[Findings]
    capacity: Capacity | None
    random: bool

    @property
    def choice(self) -> Trial | None:
        """The cheapest deployment that holds."""
        return self.found.choice

    @property
    def full(self) -> list[Trial]:
        """Simulations of the whole workload, by rank."""
        return sorted(self.found.full(len(self.workload)), key=lambda trial: trial.rank)

    @property
    def front(self) -> list[Trial]:
        """Of those that hold, the ones that no other beats in cost, TTFT p99 and TPOT p99 at once."""
        return front(trial for trial in self.full if trial.holds)

    @property
    def binding(self) -> Binding | None:
        """What binds at the lowest load at which the choice was found to fail."""
        edge = self.capacity and self.capacity.edge
        return binding(edge.summaries[0]) if edge else None

    @property
    def notes(self) -> list[str]:
        """What a reader should know, one line each."""
        notes = []
        if any(self.config.slo.of_class(name).ttft.multiplier for name in self.workload.slo_names):
            notes.append(
                "The promised TTFT grows with the time that a prompt takes alone on each deployment "
                "(slo.ttft.multiplier): a slower one promises less. slo.ttft in seconds asks the same of all."
            )
        if all(self.config.slo.of_class(name).tpot_s is None for name in self.workload.slo_names):
            notes.append("No time per output token is promised (slo.tpot_s), so it counts for nothing here.")
        if self.choice is not None:
            share = self.choice.summary.get("extrapolated_time_share", 0.0)
            if share > 0.25:
                notes.append(f"{100 * share:.0f} % of the choice's time lies outside what was measured.")
        return notes


def usd_per_million_tokens(trial: Trial, workload: Workload) -> tuple[float, float]:
    """USD per million tokens, prompts included, and per million output tokens, at the trial's traffic."""
    per_s = trial.deployment.usd_per_hour / 3600
    output_per_s = trial.summary.get("output_tokens_per_s", 0.0)
    if not output_per_s:
        return float("inf"), float("inf")
    share = float(workload.output_tokens.sum(dtype=float)) / workload.total_tokens
    return 1e6 * per_s / (output_per_s / share), 1e6 * per_s / output_per_s


def as_json(facts: PlanFacts) -> dict[str, Any]:
    """plan.json; the same whenever the same plan is made."""
    choice, capacity, bound = facts.choice, facts.capacity, facts.binding
    return {
        "model": facts.config.model,
        "requests": len(facts.workload),
        "attainment_asked": facts.settings.attainment,
        "gpus_allowed": facts.settings.gpus,
        "answer": None if choice is None else trial_json(choice, facts.workload),
        "headroom": None if capacity is None else capacity_json(capacity),
        "binds": None if bound is None else {"what": bound.what, "why": bound.why},
        "traffic": [
            {
                "factor": each.load,
                "answer": None if each.choice is None else trial_json(each.choice, facts.workload),
            }
            for each in facts.growth
        ],
        "front": [trial_json(trial, facts.workload) for trial in facts.front],
        "neighbours": [trial_json(trial, facts.workload) for trial in facts.found.neighbours],
        "simulated_in_full": [trial_json(trial, facts.workload) for trial in facts.full],
        "deployments": len(facts.candidates),
        "ruled_out": dict(reasons(facts.found)),
        "rungs": [
            {"share": share, "simulated": simulated, "left": left}
            for share, simulated, left in facts.found.rungs
        ],
        "notes": facts.notes,
    }


def reasons(found: Findings) -> Counter[str]:
    """How many deployments each bound has ruled out."""
    return Counter(why.split(":")[0] for why in found.ruled_out.values())


def trial_json(trial: Trial, workload: Workload) -> dict[str, Any]:
    """One simulated deployment."""
    deployment = trial.deployment
    total, output = usd_per_million_tokens(trial, workload)
    found: dict[str, Any] = {
        "name": deployment.name,
        "device": deployment.device,
        "gpus": deployment.gpus,
        "replicas": deployment.replicas,
        "tp": deployment.tp,
        "spp": deployment.spp,
        "kvp": deployment.kvp,
        "decode": deployment.decode,
        "policy": deployment.policy,
        "usd_per_hour": round(deployment.usd_per_hour, 6),
        "usd_per_million_tokens": total,
        "usd_per_million_output_tokens": output,
        "holds": trial.holds,
        "attainment": trial.attainment,
        "requests": trial.requests,
    }
    keys = ("ttft_s", "tpot_s", "classes", "missed", "phases_s", "pressure", "kv_utilization", "mfu", "mbu")
    return found | {key: trial.summary[key] for key in keys if key in trial.summary}


def capacity_json(capacity: Capacity) -> dict[str, Any]:
    """The headroom, or a capacity: loads are factors on the configured traffic."""
    return {
        "load": capacity.load,
        "surely_holds_at": capacity.low,
        "surely_fails_at": capacity.high,
        "trials": [
            {
                "load": trial.load,
                "holds": trial.holds,
                "settled": trial.settled,
                "mean_attainment": trial.mean,
                "interval": [trial.low, trial.high],
                "attainments": list(trial.attainments),
            }
            for trial in capacity.trials
        ],
    }


def is_edge_of_search(capacity: Capacity) -> bool:
    """Whether no load was found to fail: the search ended before the capacity did."""
    return all(trial.holds for trial in capacity.trials)
