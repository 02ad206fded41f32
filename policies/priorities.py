"""In which order waiting prefills get their next chunk.

A priority gives every waiting request a key; the smallest goes first, ties go to the earlier arrival.
Waiting and half-done prefills compete in one order, and keys are looked at anew for every batch: that is
what makes prefill preemptive. Formulas: arXiv 2409.17264, section 4.
"""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from importlib.metadata import entry_points

from policies.cost import PrefillWork
from policies.request import Request
from specs.errors import InputError


class Priority:
    """Base class of the orders. A subclass writes :meth:`key` and, if true, says it is ``static``.

    Attributes:
        static: the key of a request changes only when the request itself makes progress, never with
            time alone. Such a queue is a heap; otherwise all keys are computed for every batch.
    """

    static = False

    def __init__(self, work: PrefillWork) -> None:
        self.work = work

    def key(self, request: Request, now_s: float) -> float:
        """The request's key at ``now_s``; the smallest is served first."""
        raise NotImplementedError

    def remaining_s(self, request: Request) -> float:
        """Predicted time of the part of its prefill that isn't scheduled yet, seconds."""
        return self.work.remaining_s(request.scheduled_tokens, request.prefill_tokens)

    def slack_s(self, request: Request, now_s: float) -> float:
        """Time it could still wait and meet its deadline: arrival + D − now − remaining."""
        return request.arrival_s + request.deadline_s - now_s - self.remaining_s(request)


class LinearPriority(Priority):
    """A priority whose key is linear in time, so that a whole queue is evaluated as two arrays."""

    def line(self, request: Request) -> tuple[float, float]:
        """Intercept and slope: the key is ``intercept + slope · now_s``."""
        raise NotImplementedError

    def key(self, request: Request, now_s: float) -> float:
        intercept, slope = self.line(request)
        return intercept + slope * now_s


class FCFS(Priority):
    """First come, first served."""

    static = True

    def key(self, request: Request, now_s: float) -> float:
        return request.arrival_s


class SRPT(Priority):
    """Shortest remaining prefill time first."""

    static = True

    def key(self, request: Request, now_s: float) -> float:
        return self.remaining_s(request)


class EDF(Priority):
    """Earliest deadline first."""

    static = True

    def key(self, request: Request, now_s: float) -> float:
        return request.arrival_s + request.deadline_s


class LRS(Priority):
    """Least remaining slack first. `now` is the same for all, so the order doesn't depend on it."""

    static = True

    def key(self, request: Request, now_s: float) -> float:
        return self.slack_s(request, 0.0)


class LARS(LinearPriority):
    """Least length-aware relative slack first: slack divided by the whole prefill's work C[L].

    ``normalization="deadline"`` divides by D instead, as the authors' code does.
    """

    def __init__(self, work: PrefillWork, normalization: str = "work") -> None:
        super().__init__(work)
        self.normalization = normalization

    def line(self, request: Request) -> tuple[float, float]:
        scale = request.work_s if self.normalization == "work" else request.deadline_s
        return self.slack_s(request, 0.0) / scale, -1.0 / scale

    def relative_slack(self, request: Request, now_s: float) -> float:
        """ρ, the share of its work that the request could be held back and still be on time."""
        return self.key(request, now_s)


PRIORITIES: dict[str, type[Priority]] = {"fcfs": FCFS, "srpt": SRPT, "edf": EDF, "lrs": LRS, "lars": LARS}


ENTRY_POINTS = "convoy.priorities"  # the group under which an installed package names its own


def installed_priorities() -> dict[str, str]:
    """Priorities of other installed packages, ``module:Class`` by name; none replaces a built-in one."""
    found = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {name: found[name] for name in sorted(found) if name not in PRIORITIES}


def find_priority(name: str) -> type[Priority]:
    """The priority called ``name``, here or by an installed package, or named by its path ``module:Class``.

    Raises:
        InputError: there is none, or it isn't a subclass of :class:`Priority`.
    """
    if name in PRIORITIES:
        return PRIORITIES[name]
    path = name
    if ":" not in name:
        installed = installed_priorities()
        if name not in installed:
            known = [*PRIORITIES, *installed]
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise InputError(f"'{name}' is not a known priority{hint} ({', '.join(known)}, or module:Class)")
        path = installed[name]
    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:  # it is somebody else's code: whatever it does, say where
        raise InputError(f"priority '{name}' can't be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Priority)):
        raise InputError(f"priority '{name}' is not a subclass of policies.priorities.Priority")
    return found
