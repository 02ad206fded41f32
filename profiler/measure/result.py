"""From visits to a profile: tables with spread and count, and the conditions they were measured under."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from profiler.formulas import MODELLED, make_physics
from profiler.measure.grid import shape_of
from profiler.measure.store import Store
from profiler.tables import Profile, Table, TableInfo, write_profile, write_table
from specs.devices import DeviceSpec

# On a CPU others interfere, and only ever add time: the lower quartile of the visits. A GPU is our own.
QUANTILE = {"cpu": 0.25, "cuda": 0.5}


def statistic(device_type: str) -> str:
    """What is taken of a point's visits, in words."""
    return (
        f"{QUANTILE[device_type]:g} quantile over visits of the median over samples, "
        f"{quantile_of('iteration', device_type):g} for whole iterations"
    )


def quantile_of(operator: str, device_type: str) -> float:
    """Which quantile of a point's visits is its time.

    What disturbs a CPU adds time. But whole iterations in a running engine are to be what serving meets on
    cores of its own, with caches and memory that others use as well: the least of it would be too short for
    most of the time.
    """
    return 0.5 if operator == "iteration" else QUANTILE[device_type]


def write_result(
    folder: Path,
    store: Store,
    device: DeviceSpec,
    dtype: str,
    *,
    device_type: str,
    created: str,
    versions: Mapping[str, str],
    model: Mapping[str, Any],
    conditions: Mapping[str, str],
    kernel_source: str,
    cached_bytes: int,
    threads: int,
) -> Profile:
    """Write the tables of everything measured, and `profile.yaml`."""
    infos = []
    for operator, measured in sorted(store.measured().items()):
        points = sorted(measured)
        found = [measured[point] for point in points]
        taken = quantile_of(operator, device_type)
        table = Table(
            shape_of(points),
            np.array([each.time_s(taken) for each in found]),
            np.array([each.spread_s() for each in found]),
            np.array([each.samples for each in found], dtype=np.float64),
        )
        sha256, rows = write_table(folder, operator, dtype, table)
        infos.append(TableInfo(operator, dtype, rows, sha256, kernel_source, "convoy profile", warm=False))
    profile = Profile(
        path=folder,
        device=device.name,
        source="measured",
        created=created,
        licence="Apache-2.0",
        versions=versions,
        notes=(
            "Measured by `convoy profile` with the layers of Convoy's own runtime.",
            f"time_s is the {statistic(device_type)}; spread_s is half the interquartile range within "
            "visits, or half the range between them if that is more.",
        ),
        tables=tuple(infos),
        model=model,
        conditions=conditions,
        skipped=tuple(f"{point}: {reason}" for point, reason in store.failed()),
        cached_bytes=cached_bytes,
        threads=threads,
    )
    write_profile(profile)
    return profile


def below_floor(profile: Profile, device: DeviceSpec, store: Store, quantile: float) -> dict[str, int]:
    """How many measurements of each operator with a formula beat the floor: there should be none."""
    counts = {}
    for info in profile.tables:
        if info.operator not in MODELLED:
            continue
        measured = store.measured()[info.operator]
        points = list(measured)
        physics = make_physics(device, info.operator, info.dtype, profile.cached_bytes)
        time_s = np.array([measured[point].time_s(quantile) for point in points])
        counts[info.operator] = int(np.sum(time_s < physics.floor_s(shape_of(points))))
    return counts
