"""The search for the cheapest deployment that holds: successive halving on longer and longer parts.

Each rung simulates what is left on the first part of the workload. Who has missed more than the whole
workload allows is out for good, and so is the same kind with fewer replicas. Of the rest a few go on: the
cheapest that hold so far, those that nobody beats in cost and latency, and cheaper ones that don't hold yet.
The last rung is the whole workload. What comes out is checked: the nearest deployments that cost less and
those that cost more are simulated in full as well, whatever the rungs said of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

from experiments.bounds import Demand, ruled_out
from experiments.deployments import Deployment, Kind, cell_of, order, with_replicas
from experiments.laboratory import Laboratory
from experiments.plan_config import PlanConfig
from experiments.text import percent
from experiments.trials import Trial, front, judge

NEIGHBOURS = 3
_WIDER = 3  # so many times more deployments go on from each earlier rung


@dataclass(slots=True)
class Findings:
    """What a search has learned at one traffic.

    Attributes:
        ruled_out: deployments that bounds exclude, and why.
        trials: the longest simulation of each deployment.
        rungs: (share of the workload, deployments simulated, left after it) of each rung.
        neighbours: those around the choice that were simulated in full to check it.
    """

    load: float
    ruled_out: dict[Deployment, str] = field(default_factory=dict)
    trials: dict[Deployment, Trial] = field(default_factory=dict)
    rungs: list[tuple[float, int, int]] = field(default_factory=list)
    neighbours: list[Trial] = field(default_factory=list)
    choice: Trial | None = None

    def full(self, requests: int) -> list[Trial]:
        """The simulations of the whole workload."""
        return [trial for trial in self.trials.values() if trial.requests >= requests]


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for the answer to one plan at one traffic, ``load`` times the configured one."""

    path: Path
    overrides: Sequence[str]
    plan: PlanConfig
    needs: Demand
    laboratory: Laboratory
    load: float = 1.0

    def run(self, candidates: Sequence[Deployment], *, keep: int, with_front: bool = True) -> Findings:
        """Search among ``candidates``; the earlier rungs let at most ``keep`` of them come to the last."""
        found = Findings(self.load)
        alive = []
        for deployment in candidates:
            why = self.why_not(deployment)
            if why is None:
                alive.append(deployment)
            else:
                found.ruled_out[deployment] = why
        shares = sorted(set(self.plan.parts))
        for place, share in enumerate(shares):
            width = keep * _WIDER ** (len(shares) - 1 - place)
            if len(alive) <= keep:
                break
            trials = self.simulate(alive, share, found)
            simulated = len(alive)
            alive = promising(trials, width, with_front=with_front)
            found.rungs.append((share, simulated, len(alive)))
        trials = self.simulate(alive, 1.0, found)
        found.rungs.append((1.0, len(alive), sum(trial.holds for trial in trials)))
        self.look_further(candidates, found)
        return found

    def why_not(self, deployment: Deployment) -> str | None:
        """What excludes a deployment without a simulation."""
        return ruled_out(cell_of(deployment, self.path, self.overrides, self.load, None).config, self.needs)

    def simulate(self, chosen: Iterable[Deployment], share: float, found: Findings) -> list[Trial]:
        """Simulate deployments on the first part of the workload, or all of it; the result is kept."""
        chosen = list(chosen)
        whole = len(self.needs.workload)
        requests = None if share == 1.0 else max(round(share * whole), 1)
        cells = [cell_of(each, self.path, self.overrides, self.load, requests) for each in chosen]
        doing = f"{self.load:g} × traffic, " if self.load != 1.0 else ""
        doing += "whole workload" if requests is None else f"first {percent(share)}"
        summaries = self.laboratory.summaries(cells, doing)
        names, allowed = self.needs.workload.slo_names, self.needs.allowed
        trials = [
            judge(each, self.load, summary, names, allowed, self.plan.attainment)
            for each, summary in zip(chosen, summaries, strict=True)
        ]
        found.trials |= {trial.deployment: trial for trial in trials}
        return trials

    # -- around the choice --------------------------------------------------------------------------------

    def look_further(self, candidates: Sequence[Deployment], found: Findings) -> None:
        """Fill gaps in the numbers of replicas and simulate the neighbours, until nothing better turns up."""
        whole = len(self.needs.workload)
        checked: Trial | None = None
        while True:
            holding = [trial for trial in found.full(whole) if trial.holds]
            choice = found.choice = min(holding, key=lambda trial: trial.rank) if holding else None
            if choice is None:
                more = self._next_ones(candidates, found)
            else:
                more = [] if self.plan.replicas else between(choice.deployment, candidates, found)
                if not more and choice != checked:
                    more, checked = self._neighbours(choice, candidates, found), choice
                    found.neighbours = self.simulate(more, 1.0, found)
                    continue
            if not more:
                return
            self.simulate(more, 1.0, found)

    def _next_ones(self, candidates: Sequence[Deployment], found: Findings) -> list[Deployment]:
        """When nothing holds yet: of each kind the most replicas, unless they are lost, the likeliest first.
        If those fail, so do fewer."""
        whole = len(self.needs.workload)
        known = {trial.deployment for trial in found.full(whole)}
        known |= set(found.ruled_out) | outdone(found.trials.values(), candidates)
        most = {each.kind: each for each in sorted(candidates, key=lambda each: each.replicas)}
        left = [each for each in most.values() if each not in known]
        left.sort(key=lambda each: (-_share(each, found), order(each)))
        return left[: 2 * NEIGHBOURS]

    def _neighbours(
        self, choice: Trial, candidates: Sequence[Deployment], found: Findings
    ) -> list[Deployment]:
        """The nearest that cost less and the nearest that cost as much or more; of several at one price,
        those that did best so far. What doesn't fit into memory can't be simulated and is passed over."""
        others = [
            each
            for each in candidates
            if each != choice.deployment and not found.ruled_out.get(each, "").startswith(("memory", "KV"))
        ]
        cost = round(choice.deployment.usd_per_hour, 9)
        cheaper = [each for each in others if round(each.usd_per_hour, 9) < cost]
        dearer = [each for each in others if round(each.usd_per_hour, 9) >= cost]
        cheaper.sort(key=lambda each: (-each.usd_per_hour, -_share(each, found), order(each)))
        dearer.sort(key=lambda each: (each.usd_per_hour, -_share(each, found), order(each)))
        return [*cheaper[:NEIGHBOURS], *dearer[:NEIGHBOURS]]


def promising(trials: Sequence[Trial], width: int, *, with_front: bool = True) -> list[Deployment]:
    """Which deployments go on to a longer part, at most ``width``, of those that aren't lost."""
    lost = outdone(trials, [trial.deployment for trial in trials])
    alive = [trial for trial in trials if trial.deployment not in lost]
    holding = sorted((trial for trial in alive if trial.holds), key=lambda trial: trial.rank)
    fewest: dict[Kind, Trial] = {}
    for trial in holding:
        best = fewest.get(trial.deployment.kind)
        if best is None or trial.deployment.replicas < best.deployment.replicas:
            fewest[trial.deployment.kind] = trial
    cheapest = sorted(fewest.values(), key=lambda trial: trial.rank)
    bar = cheapest[0].deployment.usd_per_hour if cheapest else float("inf")
    hopes = [trial for trial in alive if not trial.holds and trial.deployment.usd_per_hour < bar]
    hopes.sort(key=lambda trial: (-trial.attainment, order(trial.deployment)))
    unbeaten = front(holding) if with_front else []
    # In turn from the three lists, so that none crowds out another.
    turns = chain.from_iterable(zip_longest(cheapest, unbeaten, hopes))
    chosen = dict.fromkeys(trial.deployment for trial in turns if trial is not None)
    return list(chosen)[:width]


def outdone(trials: Iterable[Trial], candidates: Iterable[Deployment]) -> set[Deployment]:
    """The candidates that are lost: their own simulation says so, or one of the same kind with as many
    replicas or more."""
    most: dict[Kind, int] = {}
    for trial in trials:
        if trial.lost:
            kind = trial.deployment.kind
            most[kind] = max(most.get(kind, 0), trial.deployment.replicas)
    return {each for each in candidates if each.replicas <= most.get(each.kind, 0)}


def between(deployment: Deployment, candidates: Sequence[Deployment], found: Findings) -> list[Deployment]:
    """The middle of the gap below a number of replicas, if the candidates leave one; it isn't tried yet."""
    numbers = {each.replicas for each in (*candidates, *found.trials) if each.kind == deployment.kind}
    below = max((number for number in numbers if number < deployment.replicas), default=0)
    middle = (below + deployment.replicas) // 2
    return [with_replicas(deployment, middle)] if middle > below else []


def _share(deployment: Deployment, found: Findings) -> float:
    trial = found.trials.get(deployment)
    return -1.0 if trial is None else trial.attainment
