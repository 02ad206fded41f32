"""Timing one call that is over in microseconds, or in seconds, on a machine that others may use as well."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from runtime.core_probe import CoreProbe
from traces.records import SLOW_PROBE

Call = Callable[[int], object]
"""One call of the operator on its i-th set of inputs."""

WARM_UP = 2
SHORTEST_SAMPLE_S = 2e-4  # shorter calls are repeated within a sample, so that reading the clock is nothing
MOST_SAMPLES = 50
FEWEST_SAMPLES = 5
MOST_REPEATS = 200
PATIENCE = 4  # times the intended duration that a visit may last for the sake of undisturbed samples …
PATIENCE_S = 1.0  # … and this long at least: on a shared host, slow moments last up to a second
_PROBES = 4000  # of which the usual duration is taken
MOST_LAUNCHES = 20  # calls queued at once on a GPU, so that the launch queue is never full
_SLEEP_CYCLES_PER_S = 2e9


class Samples(NamedTuple):
    """Seconds of a call: the median and half the interquartile range of so many `samples`."""

    time_s: float
    spread_s: float
    samples: int


def sample(call: Call, device: torch.device, visit_s: float) -> Samples:
    """Time `call` for about `visit_s` seconds, after warming up."""
    for i in range(WARM_UP):
        call(i)
    gc.disable()
    try:
        times = _on_cuda(call, device, visit_s) if device.type == "cuda" else _on_cpu(call, visit_s)
    finally:
        gc.enable()
    low, high = np.quantile(times, [0.25, 0.75])
    return Samples(float(median(times)), float(high - low) / 2, len(times))


def _on_cpu(call: Call, visit_s: float) -> list[float]:
    """Samples in which no thread of ours had to wait for a core and the core ran at its usual speed; the
    quickest of all if there are too few."""
    clock = time.perf_counter
    began_s = clock()
    call(WARM_UP)
    once_s = max(clock() - began_s, 1e-7)
    repeats = min(max(math.ceil(SHORTEST_SAMPLE_S / once_s), 1), MOST_REPEATS)
    wanted = _number_of_samples(once_s * repeats, visit_s)
    give_up_s = clock() + max(PATIENCE * max(visit_s, 2 * once_s), PATIENCE_S)
    waiting = _Waiting()
    times: list[float] = []
    disturbed: list[float] = []
    done = WARM_UP + 1
    while len(times) < wanted and (clock() < give_up_s or not (times or disturbed)):
        quiet = CORE.is_quiet()
        if not quiet and clock() < give_up_s:
            continue
        waited_s = waiting.seconds()
        began_s = clock()
        for i in range(done, done + repeats):
            call(i)
        elapsed_s = clock() - began_s
        done += repeats
        is_clean = quiet and waiting.seconds() - waited_s < 0.01 * elapsed_s and CORE.is_quiet()
        (times if is_clean else disturbed).append(elapsed_s / repeats)
    waiting.close()
    if len(times) >= min(wanted, 3):
        return times
    # Disturbances only ever add time, so of disturbed samples the quickest are the nearest to the truth.
    return times + sorted(disturbed)[: max(wanted // 2, 1)]


def _on_cuda(call: Call, device: torch.device, visit_s: float) -> list[float]:
    """Device time between two events. A kernel that only waits goes first, so that the calls are all queued
    when the device gets to them, and the host's launching is not in the time."""
    torch.cuda.synchronize(device)
    began_s = time.perf_counter()
    call(WARM_UP)
    launch_s = time.perf_counter() - began_s
    torch.cuda.synchronize(device)
    once_s = max(time.perf_counter() - began_s, 1e-6)
    repeats = min(max(math.ceil(SHORTEST_SAMPLE_S / once_s), 1), MOST_LAUNCHES)
    sleep = int(min(launch_s * repeats * 1.5 + 2e-5, 0.05) * _SLEEP_CYCLES_PER_S)
    events = []
    done = WARM_UP + 1
    for _ in range(_number_of_samples(once_s * repeats, visit_s)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(sleep)  # type: ignore[no-untyped-call]
        start.record()
        for i in range(done, done + repeats):
            call(i)
        end.record()
        done += repeats
        events.append((start, end))
        end.synchronize()
    return [start.elapsed_time(end) * 1e-3 / repeats for start, end in events]


def keep_freed_memory() -> None:
    """Bring the C library's heap to where a server's is after its first large batch.

    glibc gives freed blocks back to the system, and takes them again page by page, until a large one has
    been freed: then it keeps all that are smaller (mallopt(3), M_MMAP_THRESHOLD).
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)  # the largest that counts, freed at once


def _number_of_samples(sample_s: float, visit_s: float) -> int:
    if sample_s > visit_s:
        return 3 if sample_s < 4 * visit_s else 1
    return int(min(max(visit_s / sample_s, FEWEST_SAMPLES), MOST_SAMPLES))


class Core:
    """Whether this core runs at its usual speed.

    It is slow where a probe takes noticeably longer than most of the quickest so far.
    """

    def __init__(self) -> None:
        self._core: CoreProbe | None = None
        self._durations_s: list[float] = []
        self._usual_s = 0.0
        self.probes = self.slow = 0

    def is_quiet(self) -> bool:
        """Take a probe, of about 80 µs."""
        duration_s = self._probe()
        self.probes += 1
        is_quiet = duration_s < SLOW_PROBE * self._usual_s
        self.slow += not is_quiet
        return is_quiet

    @property
    def slow_share(self) -> float:
        """Share of the probes so far that found the machine slow."""
        return self.slow / max(self.probes, 1)

    def _probe(self) -> float:
        if self._core is None:
            self._core = CoreProbe()
            for _ in range(60):
                self._probe()
        duration_s = self._core.duration_s()
        durations = self._durations_s
        durations.append(duration_s)
        if len(durations) % 50 == 0:
            self._usual_s = float(np.quantile(durations, 0.1))
            del durations[: len(durations) - _PROBES]
        return duration_s


CORE = Core()


class _Waiting:
    """How long the threads of this process, all together, were ready to run and had no core to run on.

    Linux counts that for each thread. Elsewhere it is always 0, and every sample counts as undisturbed.
    """

    def __init__(self) -> None:
        self._files: list[int] = []
        for path in Path("/proc/self/task").glob("*/schedstat"):
            try:
                self._files.append(os.open(path, os.O_RDONLY))
            except OSError:
                continue

    def seconds(self) -> float:
        total_ns = 0
        for file in self._files:
            try:
                total_ns += int(os.pread(file, 100, 0).split()[1])
            except (OSError, IndexError, ValueError):  # the thread has ended
                continue
        return total_ns * 1e-9

    def close(self) -> None:
        for file in self._files:
            os.close(file)
