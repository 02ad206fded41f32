"""Where the ranks on a CPU run, and how their threads wake each other."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def keep_to_own_cores(rank: int, ranks: int, threads: int = 1) -> None:
    """Let this process run on `threads` cores that none of the machine's `ranks` shares with it.

    Nothing happens where there are too few cores for that, or where processes can't be bound. Call it before
    anything starts threads: they inherit it.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if ranks * threads <= len(cores):
        with suppress(OSError):
            os.sched_setaffinity(0, cores[rank * threads : (rank + 1) * threads])


def calm_gloo() -> None:
    """Keep gloo's receiving threads from pushing aside whom they wait for.

    Such a thread, woken by a message, polls without pause until it gets the lock of the connection. If it was
    given the core of the very thread that holds the lock, that one goes on only at the scheduler's next tick:
    a message of 0.2 ms takes 4 ms. A thread of the batch class never pushes another one aside by waking up.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has ended, or may not be changed
            if (thread / "comm").read_text(encoding="utf-8").startswith("gloo_tcp_loop"):
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
