"""A profile of looked-up tables, written whole or not at all."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiler.coverage import model_entry
from profiler.tables import Profile, Table, TableInfo, write_profile, write_table
from specs.devices import get_device
from specs.errors import InputError
from specs.models import ModelSpec


@dataclass(frozen=True, slots=True)
class Imported:
    """One table for the profile; ``dropped`` says how many rows were left out, and why."""

    operator: str
    table: Table
    origin: str
    dropped: Mapping[str, int]


def write_lookup_profile(
    folder: Path,
    *,
    device: str,
    model: ModelSpec,
    tps: Sequence[int],
    tables: Sequence[Imported],
    source: str,
    notes: Sequence[str],
    versions: Mapping[str, str],
    replace: bool,
    today: datetime.date | None = None,
) -> Profile:
    """Write ``folder``.

    Raises:
        InputError: it is there already and may not be replaced, or can't be written; an unknown device.
    """
    get_device(device)
    if folder.exists() and not replace:
        raise InputError(f"{folder}: is there already; add --force to replace it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{partial}: can't be made ({error.strerror})") from None
    infos = []
    for each in tables:
        sha256, rows = write_table(partial, each.operator, "bf16", each.table)
        infos.append(
            TableInfo(
                operator=each.operator,
                dtype="bf16",
                rows=rows,
                sha256=sha256,
                kernel_source=source,
                origin=each.origin,
                warm=False,
                dropped=dict(each.dropped),
            )
        )
    profile = Profile(
        path=partial,
        device=device,
        source="imported",
        created=(today or datetime.date.today()).isoformat(),
        licence="see notes",
        versions=dict(versions),
        notes=tuple(notes),
        tables=tuple(infos),
        model=model_entry(model, tps),
        predictor="lookup",
    )
    write_profile(profile)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return Profile(
        **{**{name: getattr(profile, name) for name in Profile.__dataclass_fields__}, "path": folder}
    )
