"""A validation on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.batch_times import ErrorSummary
from experiments.blame import blame
from experiments.ladder import Comparison
from experiments.live import describe_runtime
from experiments.pace import FEWEST
from experiments.rungs import DECIDING, HOW, Ladder, signed
from experiments.tables import print_table
from experiments.text import percent, seconds
from experiments.validation_files import Outcome, pace_data
from sim.paced import BOUNDS, Pace

_DISTURBED = 0.01  # share of a live run without a core from which it is worth saying
_KINDS = ("decodes", "with chunks", "bound by attention", "lone decodes")  # as in BOUNDS
_ERRORS = ("as it is", "probed", "calibrated", "at pace")
_HEADER = ("latency", "", "simulated", "live", *_ERRORS, "live noise", "allowed", "")
_NUMBERS = (
    "simulated",
    "live",
    *_ERRORS,
    "live noise",
    "allowed",
    "batches",
    "median",
    "p90",
    "bias",
)


def print_outcome(outcome: Outcome) -> None:
    """The table of the requests, the batches by kind, the rungs and the verdict of one case."""
    ladder = outcome.ladder
    runs = f"{len(outcome.runs)} live run{'s' if len(outcome.runs) != 1 else ''}"
    if outcome.replayed:
        runs += " from disk"
    title = f"{outcome.name}: simulated against {runs} ({describe_runtime(outcome.experiment)})"
    if ladder is not None and ladder.comparisons and ladder.rungs[-1].status != "unknown":
        title += f", judged {HOW[ladder.comparisons[0].speed]}"
    if ladder is not None:
        print_table(
            _HEADER,
            [_comparison(each) for each in ladder.comparisons],
            title=title,
            right=_NUMBERS,
        )
        print()
        for stage, pace in enumerate(ladder.paces):
            print(_pace(stage, pace, len(ladder.paces)))
        print()
        found = ladder.iterations
        kinds = [*found.by_kind.items(), ("all", found.total), ("all, on own cores", found.own_cores)]
        rows = [_batches(name, errors) for name, errors in kinds if errors is not None]
        print_table(("batches of", "batches", "median", "p90", "bias"), rows, right=_NUMBERS)
        print()
        print_table(("rung", "", ""), [(rung.name, rung.status, rung.text) for rung in ladder.rungs])
        print()
    for number, run in enumerate(outcome.runs, start=1):
        if run.waited_share > _DISTURBED:
            share = percent(run.waited_share)
            print(f"live run {number}: other work had the engine's core for {share} of the time")
    if ladder is not None:
        for line in _slow_moments(ladder.slow_shares, ladder.slowdowns):
            print(line)
    if ladder is not None and ladder.batch_errors:
        off = ", ".join(map(signed, ladder.batch_errors))
        print(f"calibrated on the others, batch times of each live run are off by {off} in the sum")
    for line in _left_out(outcome):
        print(line)
    if ladder is not None and ladder.chance_to_hold is not None:
        print(
            f"a simulation that is right is within these bounds {percent(ladder.chance_to_hold)} of the time"
        )
    print(f"{outcome.name}: {verdict(outcome)}\n")


def print_outcomes(outcomes: Sequence[Outcome], asked: int, folder: Path) -> None:
    """All cases in one table, if there are several, and where the files are."""
    if asked > 1:
        header = ("case", "judged", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90", "batches, bias", "")
        print_table(header, [_line(outcome) for outcome in outcomes], right=header[2:-1])
        passed = sum(outcome.passes for outcome in outcomes)
        print(f"\n{passed} of {asked} cases within tolerance{_against_chance(outcomes)}")
    print(f"Written to {folder}")


def _against_chance(outcomes: Sequence[Outcome]) -> str:
    """How many are inside what is allowed, noisy ones included, and would be if the simulation were right."""
    ladders = [outcome.ladder for outcome in outcomes if outcome.ladder is not None]
    chances = [ladder.chance_to_hold for ladder in ladders if ladder.chance_to_hold is not None]
    if len(chances) < len(outcomes):
        return ""
    inside = sum(ladder.is_inside for ladder in ladders)
    return (
        f"; {inside} inside what is allowed, those without a verdict included, where a simulation that is "
        f"right has {sum(chances):.1f} in the mean"
    )


def _slow_moments(shares: Sequence[float | None], slowdowns: Sequence[float]) -> Iterator[str]:
    """When others were on the cores of each live run, and what that did to batches, if anything is known."""
    were_slow = False
    for number, slow in enumerate(shares, start=1):
        if slow is not None and slow > _DISTURBED:
            were_slow = True
            yield f"live run {number}: somebody else was on a core at {percent(slow)} of the probes"
    if max(slowdowns) > 1.0:
        slower = ", ".join(f"{name} {factor:.2f}" for name, factor in zip(_KINDS, slowdowns, strict=True))
        yield f"then batches took so many times as long as on cores of their own: {slower}"
    elif were_slow:
        yield (
            "what that did to batches isn't known, for want of like ones in quick and in slow moments, and "
            "counts as nothing"
        )


def _left_out(outcome: Outcome) -> Iterator[str]:
    """Why an error is missing."""
    ladder = outcome.ladder
    if ladder is None:
        return
    shares = ladder.slow_shares
    unprobed = [number for number, share in enumerate(shares, start=1) if share is None]
    if unprobed and len(unprobed) < len(shares):
        runs = ", ".join(map(str, unprobed))
        yield f"live run {runs} has no probes: slow moments are left out of all"
    if len(outcome.runs) == 1:
        yield "a single live run: there is no other to calibrate on"


def verdict(outcome: Outcome) -> str:
    """One sentence; of a validation that fails, it names the rung to look at."""
    if outcome.failure is not None:
        return f"no verdict: {outcome.failure}"
    ladder = outcome.ladder
    if ladder is None:
        if outcome.runs and outcome.replayed:
            return "no verdict: interrupted"
        if outcome.runs:
            return "no verdict: interrupted; --replay of this folder judges the live runs that finished"
        return "no verdict: interrupted before a live run was finished"
    text = _of_ladder(ladder)
    return f"interrupted; so far {text}" if outcome.interrupted else text


def _of_ladder(ladder: Ladder) -> str:
    blamed = blame(ladder)
    if blamed is not None:
        broken = ", ".join(r.name for r in ladder.rungs if r.status == "broken" and r.name in DECIDING)
        return f"outside tolerance ({broken}); the rung to look at is {blamed.rung}: {blamed.why}"
    request = ladder.rungs[-1]
    if request.status == "unknown":
        return f"no verdict: {request.text}"
    below = ", ".join(r.name for r in ladder.rungs if r.status == "broken" and r.name not in DECIDING)
    return (
        f"within tolerance; {below}, which doesn't decide, is outside its own bounds"
        if below
        else "within tolerance"
    )


def _pace(stage: int, pace: Pace, stages: int) -> str:
    where = f" in stage {stage}" if stages > 1 else ""
    data = pace_data(pace)
    factors = []
    for name, bound in zip(_KINDS, BOUNDS, strict=True):
        found = data[bound]
        if found is None:
            factors.append(f"{name} as all (fewer than {FEWEST})")
        else:
            factors.append(f"{name} {found['mean']:.2f} ({found['p10']:.2f} … {found['p90']:.2f})")
    return f"batches{where} took, of what is predicted (eight in ten within): {', '.join(factors)}"


def _comparison(each: Comparison) -> tuple[str, ...]:
    return (
        each.metric.removesuffix("_s").upper() if each.statistic == "mean" else "",
        each.statistic,
        seconds(each.simulated_s),
        seconds(each.live_s),
        signed(each.error),
        "" if each.error_probed is None else signed(each.error_probed),
        "" if each.error_calibrated is None else signed(each.error_calibrated),
        signed(each.error_at_pace),
        "" if each.noise is None else percent(each.noise),
        "" if each.allowed is None else percent(each.allowed),
        _mark(each),
    )


def _mark(each: Comparison) -> str:
    if each.allowed is None:
        return ""
    return "outside" if each.is_outside else "noisy" if each.is_noisy else "ok"


def _batches(name: str, errors: ErrorSummary) -> tuple[str, ...]:
    return name, f"{errors.count:,}", percent(errors.p50), percent(errors.p90), signed(errors.bias)


def _line(outcome: Outcome) -> tuple[str, ...]:
    ladder = outcome.ladder
    if ladder is None:
        return outcome.name, *[""] * 6, verdict(outcome)
    errors = {(each.metric, each.statistic): each for each in ladder.comparisons}
    cells = []
    for metric in ("ttft_s", "tpot_s"):
        for statistic in ("p50", "p90"):
            each = errors.get((metric, statistic))
            mark = "" if each is None or each.passes else " !" if each.is_outside else " ?"
            cells.append("" if each is None else signed(each.judged) + mark)
    total = ladder.iterations.total
    blamed = blame(ladder)
    if blamed is not None:
        word = f"outside: {blamed.rung}"
    else:
        word = "holds" if outcome.passes else "interrupted" if outcome.interrupted else "no verdict"
    judged = HOW[ladder.comparisons[0].speed] if ladder.comparisons else ""
    return outcome.name, judged, *cells, "" if total is None else signed(total.bias), word
