"""A deployment and what a simulation said of it, and how deployments are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.bounds import allowance
from experiments.deployments import Deployment, order


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulation of a deployment, on the whole workload or on its first part.

    Attributes:
        load: factor on the traffic.
        requests: of the workload that were simulated.
        attainment: share of requests that met their SLO, of the class where it is lowest.
        holds: every class has its share on this part.
        lost: more requests of a class have missed than may of the whole workload. Requests to come can't
            make that good: a part of the workload is enough to know.
    """

    deployment: Deployment
    load: float
    requests: int
    attainment: float
    holds: bool
    lost: bool
    summary: Mapping[str, Any] = field(hash=False, compare=False)

    @property
    def latencies(self) -> tuple[float, float]:
        """TTFT p99 and TPOT p99, seconds; infinite without a sample."""
        ttft, tpot = self.summary.get("ttft_s", {}), self.summary.get("tpot_s", {})
        return ttft.get("p99", math.inf), tpot.get("p99", math.inf)

    @property
    def rank(self) -> tuple[Any, ...]:
        """The smallest of those that hold is the answer: the cheapest, then the safest, then the fastest."""
        deployment = self.deployment
        cost = round(deployment.usd_per_hour, 9)
        return cost, -self.attainment, *self.latencies, order(deployment)


def judge(
    deployment: Deployment,
    load: float,
    summary: Mapping[str, Any],
    names: Sequence[str],
    allowed: Sequence[int],
    attainment: float,
) -> Trial:
    """Say whether promises are kept; ``allowed`` are the misses of each class in the whole workload."""
    worst, holds, lost = 1.0, True, False
    for name, of_all in zip(names, allowed, strict=True):
        found = class_of(summary, name)
        if found is None:
            continue
        requests, share = found
        missed = round(requests * (1.0 - share))
        worst = min(worst, share)
        holds &= missed <= allowance(requests, attainment)
        lost |= missed > of_all
    return Trial(deployment, load, int(summary["num_requests"]), worst, holds and not lost, lost, summary)


def class_of(summary: Mapping[str, Any], name: str) -> tuple[int, float] | None:
    """Requests and attainment of a class; None if it had no requests."""
    classes = summary.get("classes")
    found = summary if classes is None else classes.get(name)
    if found is None or not found["num_requests"]:
        return None
    return found["num_requests"], found["slo_attainment"]


def worst_attainment(summary: Mapping[str, Any]) -> float:
    """The attainment of the class where it is lowest."""
    classes = summary.get("classes") or {"": summary}
    return min(float(each["slo_attainment"]) for each in classes.values())


def front(trials: Iterable[Trial]) -> list[Trial]:
    """Those that no other beats in cost, TTFT p99 and TPOT p99 at once; the cheapest first."""
    found: list[tuple[tuple[float, ...], Trial]] = []
    for trial in sorted(trials, key=lambda each: (each.deployment.usd_per_hour, *each.latencies)):
        point = (trial.deployment.usd_per_hour, *trial.latencies)
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other, _ in found):
            found.append((point, trial))
    return [trial for _, trial in found]
