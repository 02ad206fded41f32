"""`convoy profile`: measures one model's operators on the device that is here.

Also `python -m profiler.measure` for machines that have torch, numpy and PyYAML and little else.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from profiler.coverage import model_entry, part_used
from profiler.measure import environment
from profiler.measure.ceilings import measure_ceilings
from profiler.measure.collectives import possible_ranks
from profiler.measure.exactness import exactness
from profiler.measure.grid import Grid, Limits
from profiler.measure.measurer import Measurer
from profiler.measure.points import Point
from profiler.measure.progress import progress
from profiler.measure.refine import Refiner
from profiler.measure.result import QUANTILE, below_floor, statistic, write_result
from profiler.measure.session import Session, interleave
from profiler.measure.store import Store
from profiler.measure.timing import CORE
from profiler.tables import Profile
from runtime.runner import DTYPES, find_device
from specs.devices import DeviceSpec, get_device, list_devices
from specs.errors import InputError, did_you_mean
from specs.models import ModelSpec, get_model
from specs.parallel import tp_choices

QUICK_BUDGET_S = 40.0
QUICK_SCALE = 0.45  # of the coarse grid's points
MEMORY_SHARE = {"cpu": 0.15, "cuda": 0.6}  # of what is free, for one operator's inputs
_MAX_CONTEXT = 10 << 20


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What to measure and for how long.

    Attributes:
        device: auto, cpu, cuda or cuda:1 and so on.
        spec: the data sheet, by name or path; None recognises it from what the device calls itself.
        budget_s: of the whole session; None takes the usual.
        threads: of torch, on a CPU; None is 1.
        only: operators; all if empty.
        tps: tensor-parallel degrees; all that are possible if empty.
        max_context: longest context, tokens; None takes the model's on a CPU and 10M on a GPU.
    """

    model: str
    device: str = "auto"
    out: Path | None = None
    budget_s: float | None = None
    quick: bool = False
    resume: bool = False
    dtype: str | None = None
    spec: str | None = None
    threads: int | None = None
    attention: str = "auto"
    only: tuple[str, ...] = ()
    tps: tuple[int, ...] = ()
    max_context: int | None = None


@dataclass(frozen=True, slots=True)
class SetUp:
    """The options, made real."""

    model: ModelSpec
    spec: DeviceSpec
    device: torch.device
    dtype: str
    budget_s: float
    visit_s: float
    grid: Grid
    scale: float
    tps: tuple[int, ...]
    threads: int

    @property
    def cached_bytes(self) -> int:
        """Data that stays in the last-level cache through an iteration: only if all the weights fit."""
        weights = self.model.num_parameters * self.grid.element
        return self.spec.l2_bytes if weights <= self.spec.l2_bytes else 0


def set_up(options: MeasureOptions) -> SetUp:
    """Check the options against the model and the device.

    Raises:
        InputError: an unknown model, device, type or operator, or a device that isn't here.
    """
    model = get_model(options.model)
    device = find_device(_device_name(options.device))
    spec = get_device(options.spec) if options.spec else recognise(device)
    dtype = options.dtype or ("fp32" if device.type == "cpu" else "bf16")
    if dtype not in ("fp32", "bf16") or dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: is not measured; fp32 and bf16 are")
    spec.peak_flops_for(dtype)
    threads = 0
    if device.type == "cpu":
        threads = options.threads or 1
        torch.set_num_threads(threads)
    spec = part_used(spec, threads)
    possible = tuple(tp_choices(model, spec))
    tps = options.tps or possible
    for tp in tps:
        if tp not in possible:
            raise InputError(
                f"--tp {tp}: {model.name} can be cut by {', '.join(map(str, possible))} on {spec.name}"
            )
    budget_s = options.budget_s or (QUICK_BUDGET_S if options.quick else 300.0)
    is_cpu = device.type == "cpu"
    limits = Limits(
        tps=tuple(sorted(tps)),
        context_tokens=options.max_context
        or (min(model.max_context_tokens, 1 << 20) if is_cpu else _MAX_CONTEXT),
        tokens=2048 if is_cpu else 8192,
        decodes=64 if is_cpu else 256,
        point_s=budget_s / (1500 if is_cpu else 150),
        kv_bytes=int(_free_bytes(device) * MEMORY_SHARE[device.type]),
        ranks=possible_ranks(device),
        is_quick=options.quick,
    )
    for name in options.only:
        if name not in OPERATORS:
            raise InputError(
                f"--only {name}: no such operator{did_you_mean(name, OPERATORS)}; "
                f"there are {', '.join(OPERATORS)}"
            )
    return SetUp(
        model=model,
        spec=spec,
        device=device,
        dtype=dtype,
        budget_s=budget_s,
        visit_s=0.03 if options.quick else 0.05,
        grid=Grid(model, spec, dtype, limits, only=options.only),
        scale=QUICK_SCALE if options.quick else 1.0,
        tps=tuple(sorted(tps)),
        threads=threads,
    )


class Outcome(NamedTuple):
    """What was measured, and whether it was cut short."""

    profile: Profile
    interrupted: bool


def measure(options: MeasureOptions, say: Callable[[str], None] = print) -> Outcome:
    """Measure, and write the profile; Ctrl-C ends it early with what there is.

    Raises:
        InputError: see `set_up`; or the output folder holds another session.
    """
    real = set_up(options)
    folder = options.out or Path("out") / f"profile-{real.spec.name}-{real.model.name}"
    store = Store(folder, _identity(real, options), resume=options.resume)
    before = environment.state(real.device)
    candidates = real.grid.candidates()
    measurer = Measurer(
        real.model,
        real.spec,
        real.device,
        DTYPES[real.dtype],
        points=[point for points in candidates.values() for point in points],
        visit_s=real.visit_s,
        backend=options.attention,
    )
    quantile = QUANTILE[real.device.type]
    refine = Refiner(candidates, real.spec, real.dtype, cached_bytes=real.cached_bytes, quantile=quantile)
    coarse = interleave(real.grid.coarse(real.scale))
    say(
        f"{real.model.name} on {environment.describe(real.device)} ({real.spec.name}), {real.dtype}, "
        f"attention by {measurer.cases.backend.name}: {len(coarse)} points in the coarse grid, "
        f"{real.budget_s:.0f} s"
    )
    interrupted = False
    try:
        with progress(real.budget_s) as on_visit:
            Session(
                store, coarse, measurer.visit, _if_possible(refine), real.budget_s, on_visit, options.only
            ).run()
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted: what was measured is kept; --resume goes on")
    finally:
        measurer.close()
        store.close()
    conditions = _conditions(real, options, measurer, before)
    profile = write_result(
        folder,
        store,
        real.spec,
        real.dtype,
        device_type=real.device.type,
        created=environment.today(),
        versions=environment.versions(),
        model=model_entry(real.model, real.tps),
        conditions=conditions,
        kernel_source=f"runtime, {measurer.cases.backend.name}",
        cached_bytes=real.cached_bytes,
        threads=real.threads,
    )
    _say_result(profile, real, store, quantile, say)
    return Outcome(profile, interrupted)


OPERATORS = (
    "gemm",
    "prefill_attention",
    "shard_attention",
    "decode_attention",
    "skewed_decode",
    "norm",
    "rope_angles",
    "rope",
    "activation",
    "kv_write",
    "embedding",
    "sampling",
    "kvp_merge",
    "all_reduce",
    "all_gather",
    "send_recv",
    "layer",
    "host",
    "iteration",
    "stage_gap",
)


def recognise(device: torch.device) -> DeviceSpec:
    """The data sheet of the library that belongs to the device here.

    Raises:
        InputError: there is none.
    """
    if device.type == "cpu":
        return get_device("cpu")
    called = environment.describe(device)
    if called.split()[-1] == "PCIe":
        raise InputError(
            f"device: no data sheet of '{called}', only of the SXM kind; give one with --spec FILE.yaml"
        )
    for name in list_devices():
        if name.split("-")[0].upper() in called.upper().replace("-", " ").split():
            return get_device(name)
    raise InputError(f"device: no data sheet of '{called}' in the library; give one with --spec FILE.yaml")


def _device_name(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 << 30


def _identity(real: SetUp, options: MeasureOptions) -> dict[str, Any]:
    """What must be the same for measurements to go into one profile."""
    return {
        "device": real.spec.name,
        "called": environment.describe(real.device),
        "model": model_entry(real.model, real.tps),
        "dtype": real.dtype,
        "threads": real.threads,
        "torch": str(torch.__version__),
        "attention": options.attention,
    }


def _if_possible(refine: Refiner) -> Callable[[Store, int], list[Point]]:
    """Refinement needs scipy; without it the coarse grid is visited more often instead."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        return lambda store, count: []
    return refine


def _conditions(
    real: SetUp, options: MeasureOptions, measurer: Measurer, before: dict[str, str]
) -> dict[str, str]:
    found = {
        "device": environment.describe(real.device),
        "system": platform.platform(),
        "dtype": real.dtype,
        "attention": measurer.cases.backend.name,
        "before": _joined(before),
        "after": _joined(environment.state(real.device)),
        "slow moments": f"{CORE.slow_share:.0%} of the probes" if CORE.probes else "",
        "commit": environment.git_commit() or "",
        "statistic": statistic(real.device.type),
    }
    for name, value in measure_ceilings(
        real.spec, real.device, real.dtype, DTYPES[real.dtype], 4 * real.visit_s
    ).items():
        found[f"ceiling, {name}"] = value
    found |= exactness(real.model, measurer.cases.backend, real.device, DTYPES[real.dtype])
    return {key: value for key, value in found.items() if value}


def _joined(state: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in state.items())


def _say_result(
    profile: Profile, real: SetUp, store: Store, quantile: float, say: Callable[[str], None]
) -> None:
    say(", ".join(f"{info.operator} {info.rows}" for info in profile.tables) + " points")
    for key, value in profile.conditions.items():
        if key.startswith(("ceiling", "largest")):
            say(f"{key}: {value}")
    counts = below_floor(profile, real.spec, store, quantile)
    beaten = {operator: count for operator, count in counts.items() if count}
    if beaten:
        say(
            f"FASTER than the physical floor of {real.spec.name}: {beaten}; "
            "the data sheet or the timing is off"
        )
    else:
        say("no measurement is faster than the physical floor")
    for line in profile.skipped:
        say(f"skipped: {line}")
    for line in chunk_cost(store, quantile):
        say(line)
    say(f"profile: {profile.path}")


def chunk_cost(store: Store, quantile: float) -> list[str]:
    """Attention time a token of small chunks against chunks of 2048, for every long context that has both."""
    measured = store.measured().get("prefill_attention", {})
    by_context: dict[tuple[int, int], dict[int, float]] = {}
    for point, found in measured.items():
        if point["context"] >= 16384:
            chunks = by_context.setdefault((point["context"], point["heads"]), {})
            chunks[point["chunk"]] = found.time_s(quantile) / point["chunk"]
    lines = []
    for (context, heads), chunks in sorted(by_context.items()):
        if 32 in chunks and 2048 in chunks:
            shown = ", ".join(f"{chunk}: {chunks[chunk] / chunks[2048] - 1:+.0%}" for chunk in sorted(chunks))
            lines.append(
                f"attention time a token behind {context} tokens, {heads} heads, "
                f"against chunks of 2048: {shown}"
            )
    return lines
