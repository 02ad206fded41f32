"""``convoy traces``: what is in a trace, and traces in our own form."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path

from experiments.tables import print_table
from specs.errors import InputError
from traces.describe import describe
from traces.readers import Reading, read_trace_with_notes
from traces.workload import Workload


def describe_file(path: Path, format: str, *, as_json: bool) -> int:
    """Print the statistics of a trace."""
    reading = read_trace_with_notes(path, format)
    statistics = describe(reading.workload)
    if as_json:
        print(json.dumps({"format": reading.format, **statistics}, indent=2))
        return 0
    lines = [(name, _shown(value)) for name, value in statistics.items()]
    print_table(("statistic", "value"), lines, title=f"{path} ({reading.format})", right=("value",))
    for note in reading.notes:
        print(note)
    return 0


def _shown(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:,.3f}"


def convert_file(path: Path, format: str, out: Path, *, force: bool) -> int:
    """Write a trace as ``[arrival_s,]prompt_tokens,output_tokens[,slo_class]``, gzip if the name says so.

    Prefix block ids are not part of this form.

    Raises:
        InputError: the trace is bad, or ``out`` is there already and ``force`` isn't given.
    """
    if os.path.lexists(out) and not force:
        raise InputError(f"--out {out}: is there already; add --force to overwrite it, or choose another")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: {out.parent} is not a folder")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give the name of a file")
    reading = read_trace_with_notes(path, format)
    _write(reading.workload, out)
    print(f"{len(reading.workload):,} requests ({reading.format}) written to {out}")
    for note in _notes(reading):
        print(note)
    return 0


def _notes(reading: Reading) -> list[str]:
    lost = ["prefix block ids are left out"] if reading.workload.prefix is not None else []
    return [*reading.notes, *lost]


def _write(workload: Workload, out: Path) -> None:
    """Write to a temporary file beside ``out`` first, so that it is complete or not there."""
    columns: dict[str, list[str]] = {}
    if workload.arrival_s is not None:
        columns["arrival_s"] = [f"{value:.9f}" for value in workload.arrival_s.tolist()]
    columns["prompt_tokens"] = [str(value) for value in workload.prompt_tokens.tolist()]
    columns["output_tokens"] = [str(value) for value in workload.output_tokens.tolist()]
    if workload.slo_class is not None:
        columns["slo_class"] = [workload.slo_names[code] for code in workload.slo_class.tolist()]
    lines = [",".join(columns), *map(",".join, zip(*columns.values(), strict=True)), ""]
    data = "\n".join(lines).encode()
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(gzip.compress(data, mtime=0) if out.suffix == ".gz" else data)
        Path(name).chmod(0o644)
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
