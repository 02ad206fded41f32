"""``convoy plan``: the cheapest deployment that holds the SLOs, and how far it is from the edge."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.bounds import Demand, demand
from experiments.build import errors_from
from experiments.capacity_search import Capacity, find_capacity
from experiments.config import Config
from experiments.deployments import Deployment, at_load, cell_of, deployments, is_random
from experiments.laboratory import Laboratory
from experiments.load import dump_yaml, load_config
from experiments.plan_config import CapacityConfig, PlanConfig
from experiments.plan_facts import PlanFacts, as_json
from experiments.run import RunOptions, run
from experiments.search import Findings, Search
from experiments.store import StudyOptions, open_store, write_text
from experiments.trials import Trial, worst_attainment
from specs import InputError, get_model
from traces.build import build_workload
from traces.workload import Workload

_MOST_HEADROOM = 4.0  # times the traffic; more isn't looked for


def plan(options: StudyOptions) -> int:
    """Search, check, write plan.json and report.html, print the answer.

    Returns the exit status: 0, or 1 if no deployment holds the SLOs.

    Raises:
        InputError: anything about the configuration or the folder.
        KeyboardInterrupt: Ctrl-C; started again on the same folder, only the rest is done.
    """
    began_s = time.perf_counter()
    where = str(options.config)
    config = load_config(options.config, options.overrides)
    if config.sweep:
        raise InputError(f"{where}: sweep: is for `convoy sweep`; a plan has its own list, under plan")
    with errors_from(where):
        facts = _Planner(options, config, config.plan or PlanConfig()).answer()
    write_text(facts.folder / "plan.json", json.dumps(as_json(facts), indent=2, allow_nan=False) + "\n")
    if facts.choice is not None:
        _run_choice(facts, options)
    from experiments.plan_report import write_report

    write_report(facts, plots=options.plots)
    if not options.quiet:
        from experiments.plan_text import print_plan

        print_plan(facts, time.perf_counter() - began_s)
    return 0 if facts.choice is not None else 1


class _Planner:
    """Carries one plan through its steps."""

    def __init__(self, options: StudyOptions, config: Config, settings: PlanConfig) -> None:
        self.path, self.overrides = options.config, options.overrides
        self.config, self.settings = config, settings
        self.model = get_model(config.model)
        workload = self._workload(1.0)
        self.candidates = deployments(config, settings, self.model, workload)
        self.folder = open_store(options.out, config.name, "plan", dump_yaml(config))
        self.laboratory = Laboratory(
            self.folder, str(options.config), options.jobs, options.backend, options.quiet
        )
        self.random = is_random(config)

    def answer(self) -> PlanFacts:
        """Search at the configured traffic, measure the headroom of the choice, search at more traffic."""
        keep = self.settings.keep
        search = self._search(1.0)
        found = search.run(self.candidates, keep=keep)
        capacity = self._settle(search, found)
        growth = []
        before = found
        for factor in sorted(set(self.settings.traffic)):
            before = self._with_more(factor, before, max(keep // 2, 2))
            growth.append(before)
        return PlanFacts(
            config=self.config,
            settings=self.settings,
            folder=self.folder,
            workload=search.needs.workload,
            candidates=self.candidates,
            found=found,
            growth=growth,
            capacity=capacity,
            random=self.random,
        )

    def _with_more(self, factor: float, before: Findings, keep: int) -> Findings:
        """Search at more traffic, near the answer at less first: it can't be cheaper, and so many times the
        replicas should do."""
        candidates = [each for each in self.candidates if not _failed(each, before)]
        search = self._search(factor)
        if before.choice is not None:
            cost = before.choice.deployment.usd_per_hour
            near = [each for each in candidates if cost <= each.usd_per_hour + 1e-9 <= (1 + factor) * cost]
            found = search.run(near, keep=keep, with_front=False)
            if found.choice is not None:
                return found
        return search.run(candidates, keep=keep, with_front=False)

    def _search(self, load: float) -> Search:
        needs = self._needs(load)
        return Search(self.path, self.overrides, self.settings, needs, self.laboratory, load)

    def _needs(self, load: float) -> Demand:
        return demand(self.config, self.model, self._workload(load), self.settings.attainment)

    def _workload(self, load: float) -> Workload:
        config = load_config(self.path, self.overrides, at_load(self.config, load))
        spec = config.workload
        return build_workload(
            spec.lengths, spec.arrivals, spec.num_requests, spec.duration_s, config.seed, Path()
        )[0]

    def _settle(self, search: Search, found: Findings) -> Capacity | None:
        """The headroom of the choice. One that held with the plan's own seed, but doesn't with several, is
        given up for the next best."""
        while found.choice is not None:
            capacity = self._headroom(found.choice.deployment)
            if not self.random or (capacity.load is not None and capacity.load >= 1.0):
                return capacity
            found.trials[found.choice.deployment] = replace(found.choice, holds=False, lost=True)
            search.look_further(self.candidates, found)
        return None

    def _headroom(self, deployment: Deployment) -> Capacity:
        settings = (self.config.capacity or CapacityConfig()).model_copy(
            update={"attainment": self.settings.attainment}
        )

        def measure(load: float, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
            changes = [{"seed": self.config.seed + seed} for seed in seeds]
            cells = [cell_of(deployment, self.path, self.overrides, load, None, each) for each in changes]
            return self.laboratory.summaries(cells, f"headroom: {load:g} × traffic")

        return find_capacity(measure, worst_attainment, settings, random=self.random, max_load=_MOST_HEADROOM)


def _failed(deployment: Deployment, found: Findings) -> bool:
    """Whether a deployment is known to fail already at less traffic."""
    trial: Trial | None = found.trials.get(deployment)
    return deployment in found.ruled_out or (trial is not None and trial.lost)


def _run_choice(facts: PlanFacts, options: StudyOptions) -> None:
    """Leave the choice's configuration and its run, with plots and timeline, in the plan's folder."""
    assert facts.choice is not None
    cell = cell_of(facts.choice.deployment, options.config, options.overrides, 1.0, None)
    path = facts.folder / "choice.yaml"
    text = dump_yaml(cell.config)
    done = facts.folder / "choice"
    if path.is_file() and path.read_text(encoding="utf-8") == text and (done / "report.html").is_file():
        return
    write_text(path, text)
    run(RunOptions(config=path, out=str(done), plots=options.plots, force=True, quiet=True))
