"""Whether work on one core slows down another: ``python -m experiments.bench_cores [--seconds 60]``.

Two ranks of a live run have a core each. If the cores of a virtual machine are two threads of one real core,
or share what they need, each rank is slower while the other one works, which a profile of one rank doesn't
know. Here one process measures three kinds of work on its core, while another one on the next core does
nothing, computes, or reads memory, for a quarter of a second each, in turns and in random order: what others
do on the host meets all three alike in the mean, and the standard error says how well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.tables import print_table
from specs.errors import InputError

FloatArray = NDArray[np.float64]

NEIGHBOUR = ("nothing", "computes", "reads memory")
_VISIT_S = 0.25
_SETTLE_S = 0.01
_WEIGHTS = 22  # matrices of 704 × 256: as large as the layers and the head of tiny-llama


def main() -> int:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description="whether work on one core slows down another")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure")
    seconds = parser.parse_args().seconds
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        print("bench_cores: this process may not choose between two cores", file=sys.stderr)
        return 2
    try:
        times_s = measure(seconds, cores[0], cores[1])
    except InputError as error:
        print(f"bench_cores: {error}", file=sys.stderr)
        return 2
    rows = []
    for name, found in times_s.items():
        ratios = [slowdown(found[:, 0], found[:, place]) for place in (1, 2)]
        cells = [f"{ratio:.3f} ± {error:.3f}" for ratio, error in ratios]
        rows.append((name, f"{1e6 * float(np.median(found[:, 0])):.0f} µs", *cells))
    rounds = len(next(iter(times_s.values())))
    print_table(("work", "beside nothing", *(f"one that {name}" for name in NEIGHBOUR[1:])), rows)
    print(f"\nMedian times; times as long, geometric mean of {rounds} turns ± standard error.")
    return 0


def slowdown(alone_s: FloatArray, beside_s: FloatArray) -> tuple[float, float]:
    """How many times as long something took beside other work: the geometric mean over turns [turns], and
    its standard error."""
    logs = np.log(beside_s / alone_s)
    ratio = float(np.exp(logs.mean()))
    return ratio, ratio * float(logs.std(ddof=1)) / len(logs) ** 0.5


def measure(seconds: float, core: int, other: int) -> dict[str, FloatArray]:
    """Median times of each kind of work, by what the neighbour does: [turns, ``NEIGHBOUR``].

    Raises:
        InputError: too little time for two turns.
        RuntimeError: the neighbour ended by itself.
    """
    turns = int(seconds / (len(NEIGHBOUR) * (_VISIT_S + _SETTLE_S)))
    if turns < 2:
        raise InputError(f"--seconds {seconds:g}: at least 2 for two turns")
    context = multiprocessing.get_context("spawn")
    doing, is_ready = context.Value("i", 0, lock=False), context.Event()
    neighbour = context.Process(target=_work_beside, args=(other, doing, is_ready, os.getpid()), daemon=True)
    neighbour.start()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        works = _works()
        for work in works.values():
            _repeated_s(work, 10)
        if not is_ready.wait(timeout=60.0):
            raise RuntimeError("the process on the other core didn't start within a minute")
        random = np.random.default_rng(0)
        result = {name: np.zeros((turns, len(NEIGHBOUR))) for name in works}
        for turn in range(turns):
            for place in random.permutation(len(NEIGHBOUR)).tolist():
                doing.value = place
                time.sleep(_SETTLE_S)
                for name, times_s in _visit(works).items():
                    result[name][turn, place] = float(np.median(times_s))
        if not neighbour.is_alive():
            raise RuntimeError(f"the process on the other core ended with {neighbour.exitcode}")
    finally:
        doing.value = -1
        os.sched_setaffinity(0, before)
        neighbour.join(timeout=5.0)
    return result


def _visit(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in works}
    until_s = time.perf_counter() + _VISIT_S
    while time.perf_counter() < until_s:
        for name, work in works.items():
            found[name] += _repeated_s(work, 1)
    return found


def _repeated_s(work: Callable[[], object], times: int) -> Sequence[float]:
    result = []
    for _ in range(times):
        began_s = time.perf_counter()
        work()
        result.append(time.perf_counter() - began_s)
    return result


def _works() -> dict[str, Callable[[], object]]:
    """Kinds of work of a rank with one thread."""
    import torch
    from torch.nn.functional import linear

    from runtime.core_probe import CoreProbe

    torch.set_num_threads(1)
    weights = [torch.randn(704, 256) for _ in range(_WEIGHTS)]
    row, rows = torch.randn(1, 256), torch.randn(256, 256)

    def decode() -> None:
        for weight in weights:
            linear(row, weight)

    def chunk() -> None:
        for _ in range(10):
            linear(rows, weights[0])

    probe = CoreProbe(operations=100)
    return {"reads weights, as a decode": decode, "computes, as a chunk": chunk, "a probe": probe.duration_s}


def _work_beside(core: int, doing: Any, is_ready: Event, parent: int) -> None:
    """What the other process does until it is told to end, or the one that measures is gone."""
    os.sched_setaffinity(0, {core})
    decode, chunk, _ = _works().values()
    is_ready.set()
    while (what := doing.value) >= 0 and os.getppid() == parent:
        if what == 0:
            time.sleep(0.002)
        elif what == 1:
            chunk()
        else:
            decode()


if __name__ == "__main__":
    raise SystemExit(main())
