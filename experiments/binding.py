"""What keeps a deployment from taking more traffic, read off a simulation in which it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.text import percent

_KV_SHARE = 0.1  # of the busy time with a full cache and requests waiting, from which memory binds
_MOSTLY = 0.5
_BUSY = 0.8  # of the time, from which a replica has little left


@dataclass(frozen=True, slots=True)
class Binding:
    """``what`` is KV memory, compute, bandwidth or queueing; ``why`` says so in a sentence."""

    what: str
    why: str


def binding(summary: Mapping[str, Any]) -> Binding | None:
    """What the run was short of; None where no promise was broken.

    - KV memory: requests were rejected, or the cache was full with requests waiting for a good part of the
      busy time.
    - queueing: most misses are late first tokens that spent most of the time waiting, although the replicas
      were idle now and then: bursts, not the mean load.
    - compute or bandwidth otherwise, whichever of MFU and MBU is higher while a batch runs.
    """
    missed, strain = summary.get("missed", {}), summary.get("pressure", {})
    if not missed or not strain or sum(missed.values()) == 0.0:
        return None
    busy = max(strain["busy_share"], 1e-9)
    mfu, mbu = min(summary.get("mfu", 0.0) / busy, 1.0), min(summary.get("mbu", 0.0) / busy, 1.0)
    if strain["kv_full_share"] >= _KV_SHARE or missed["unserved"] > max(missed["ttft"], missed["tpot"]):
        full = percent(strain["kv_full_share"])
        return Binding("KV memory", f"requests wait for a full KV cache during {full} of the busy time")
    waiting = strain.get("late_queue_share", 0.0)
    if missed["ttft"] >= missed["tpot"] and waiting >= _MOSTLY and busy < _BUSY:
        return Binding(
            "queueing",
            f"late first tokens spent {percent(waiting)} of their time waiting for a first batch, though a "
            f"replica is busy only {percent(busy)} of the time: bursts",
        )
    what = "compute" if mfu >= mbu else "bandwidth"
    late = "first tokens are late" if missed["ttft"] >= missed["tpot"] else "output tokens are slow"
    return Binding(
        what,
        f"{late} with the replicas busy {percent(strain['busy_share'])} of the time, at {percent(mfu)} of "
        f"the peak FLOP/s and {percent(mbu)} of the bandwidth while they are",
    )
