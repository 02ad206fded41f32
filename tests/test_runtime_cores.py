"""Where the ranks on a CPU run: cores of their own, and receiving threads that push nobody aside."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime.cores import calm_gloo

ROOT = Path(__file__).resolve().parent.parent
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cores_of(rank: int, ranks: int, threads: int, allowed: list[int]) -> list[int]:
    """Where a process that may run on `allowed` ends up."""
    code = (
        f"import os; os.sched_setaffinity(0, {allowed}); from runtime.cores import keep_to_own_cores; "
        f"keep_to_own_cores({rank}, {ranks}, {threads}); print(*sorted(os.sched_getaffinity(0)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(core) for core in done.stdout.split()]


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores, and a system that binds processes to them")
def test_ranks_have_cores_of_their_own_where_there_are_enough() -> None:
    two = CORES[:2]
    assert [cores_of(rank, 2, 1, two) for rank in (0, 1)] == [two[:1], two[1:]]
    assert cores_of(0, 1, 2, two) == two
    assert cores_of(1, 3, 1, two) == two  # too few: any core
    assert cores_of(1, 2, 2, two) == two
    assert cores_of(1, 2, 1, two[1:]) == two[1:]  # what the process may not use doesn't count


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a system without the batch class")
def test_only_the_threads_of_gloo_become_batch() -> None:
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        receiving, other = (thread.native_id for thread in threads)
        Path(f"/proc/self/task/{receiving}/comm").write_text("gloo_tcp_loop")
        calm_gloo()
        assert os.sched_getscheduler(receiving) == os.SCHED_BATCH
        assert os.sched_getscheduler(other) == os.sched_getscheduler(0) == os.SCHED_OTHER
    finally:
        end.set()
