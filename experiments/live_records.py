"""A live run on disk: what ``convoy live`` adds to a run's files, and what ``--replay`` reads of them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.build import Experiment
from experiments.config import dump
from experiments.load import read_stored_config
from experiments.version import version
from policies.cost import CostModel
from sim.replayed import RecordedRun
from specs.errors import InputError
from traces.records import RunRecords, Work, write_batches_csv
from traces.slices import Slices, write_slices_csv
from traces.stored import read_batches_csv, read_host_csv, read_requests_csv, read_slices_csv

FORMAT = 1
_FACTS, _SLICES, _HOST = "live.json", "slices.csv.gz", "host.csv"
_MAX_FACTS_BYTES = 1 << 20
_MOST_LISTED = 100  # entries of a folder
# Keys that may differ between a record and the configuration it is held against: they change neither the
# requests nor what the live run did, or the decisions say so themselves.
_FREE_KEYS = ("name", "predictor", "validate", "live", "sweep")


@dataclass(frozen=True, slots=True)
class LiveRun:
    """A live run.

    Attributes:
        records: its requests and batches.
        slices: what its batches held.
        host: columns of ``traces.records.HOST_COLUMNS``, an entry for each of ``records.batches``.
        cost: fingerprint of the cost model that its decisions were made with; empty if it was made here.
        waited_s: see ``runtime.engine.LiveRecords``.
    """

    records: RunRecords
    slices: Slices
    host: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    cost: str = ""
    waited_s: float | None = None

    @property
    def waited_share(self) -> float:
        """Share of the run for which the engine had no core, as far as is known."""
        return (self.waited_s or 0.0) / max(self.records.end_s, 1e-9)

    def batch_end_s(self) -> NDArray[np.float64]:
        """When each batch left the last stage, by its id; NaN if it never did."""
        return np.where(np.isinf(self.times().end_s[:, -1]), np.nan, self.times().end_s[:, -1])

    def times(self) -> RecordedRun:
        """What a simulation can be driven with."""
        batches = self.records.batches
        count = int(self.slices.batch[-1]) + 1 if len(self.slices) else 0
        stages = int(batches["stage"].max()) + 1 if len(batches["stage"]) else 1
        start_s, end_s = np.full(count, np.nan), np.full((count, stages), np.inf)
        end_s[batches["batch"], batches["stage"]] = batches["end_s"]
        first = batches["stage"] == 0
        start_s[batches["batch"][first]] = batches["start_s"][first]
        return RecordedRun(self.slices, start_s, end_s)


def write_live_records(folder: Path, run: LiveRun, experiment: Experiment, runtime: str) -> None:
    """Write batches.csv with exact times, slices.csv.gz, host.csv and live.json."""
    records = run.records
    write_batches_csv(records, folder / "batches.csv", exact=True)
    write_slices_csv(run.slices, folder / _SLICES)
    with (folder / _HOST).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(run.host)
        columns = [
            [repr(value) if name.endswith("_s") else str(int(value)) for value in column.tolist()]
            for name, column in run.host.items()
        ]
        writer.writerows(zip(*columns, strict=True))
    facts = {
        "format": FORMAT,
        "convoy": version(),
        "runtime": runtime,
        "kv_capacity_blocks": records.kv_capacity_blocks,
        "block_tokens": records.block_tokens,
        "end_s": records.end_s,
        "wall_s": records.wall_s,
        "interrupted": records.interrupted,
        "waited_s": run.waited_s,
        "slo_names": list(records.slo_names),
        "cost": fingerprint(experiment.setup.cost),
    }
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def fingerprint(cost: CostModel) -> str:
    """A hash of what a cost model predicts over a range of shapes, to eight digits: two models with the same
    one decide alike."""
    tokens = [1, 2, 3, 7, 16, 33, 64, 129, 256, 500, 512, 1000, 2048, 4096]
    contexts = [0, 1, 100, 1000, 4095, 20_000, 65_536, 300_000, 1_000_000]
    values = [cost.tokens_s(n, min(n, 64), min(n, 64)) for n in tokens]
    values += [cost.chunk_attention_s(n, c) for n in tokens for c in contexts]
    values += [cost.decode_attention_s(n, n * c) for n in tokens[:8] for c in contexts[1:]]
    text = ",".join(f"{value:.8g}" for value in values)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def find_live_runs(folder: Path) -> list[Path]:
    """The live runs in a folder: itself, or its ``live-1``, ``live-2``, … as ``convoy validate`` leaves them.

    Raises:
        InputError: there are none.
    """
    try:
        is_there = folder.is_dir()
        if (folder / _FACTS).is_file():
            return [folder]
        found = [path for path in folder.glob("live-*") if (path / _FACTS).is_file()]
        beside = "" if is_there else _beside(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"--replay {folder}: cannot be read ({error})") from None
    if not is_there:
        raise InputError(f"--replay {folder}: there is no such folder{beside}")
    if not found:
        raise InputError(
            f"--replay {folder}: holds no live run ({_FACTS} and the other files that `convoy live` writes)"
        )
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _beside(folder: Path) -> str:
    """The cases that are where ``folder`` is not, for those who replay a set of which some are recorded."""
    parent = folder.parent
    if not parent.is_dir():
        return ""
    recorded = sorted(
        path.name for path in islice(parent.iterdir(), _MOST_LISTED) if any(path.glob(f"live-*/{_FACTS}"))
    )
    return f"; {parent} has {', '.join(recorded)} (--case chooses)" if recorded else ""


def read_live_run(folder: Path, experiment: Experiment, where: str) -> LiveRun:
    """The live run in ``folder``, checked to be of this experiment's requests and policy.

    Raises:
        InputError: a file is missing or unsound, the run was cut short, or it is another configuration's.
    """
    facts = _read_facts(folder / _FACTS)
    _check_same(folder, experiment, where)
    names = experiment.workload.slo_names
    if facts["slo_names"] != list(names):
        raise InputError(f"{folder / _FACTS}: slo_names must be {', '.join(names)}, as in {where}")
    if facts["interrupted"]:
        raise InputError(f"{folder}: the live run was interrupted, so there is nothing whole to compare with")
    requests = read_requests_csv(folder / "requests.csv", names)
    batches = read_batches_csv(folder / "batches.csv")
    slices, host = read_slices_csv(folder / _SLICES), read_host_csv(folder / _HOST)
    _check_requests(folder, requests, experiment)
    _check_batches(folder, batches, slices, experiment)
    served = np.unique(slices.request_id)
    if missing := int(np.count_nonzero(~np.isin(served, requests["request_id"]))):
        raise InputError(
            f"{folder / 'requests.csv'}: {missing} of the {len(served)} requests in {_SLICES} are missing"
        )
    if any(not np.array_equal(host[name], batches[name]) for name in ("batch", "stage")):
        raise InputError(f"{folder / _HOST}: batch and stage must be those of batches.csv, row by row")
    records = RunRecords(
        requests=requests,
        batches=batches,
        gaps=np.empty((0, 4)),
        slo_names=names,
        replicas=1,
        kv_capacity_blocks=facts["kv_capacity_blocks"],
        block_tokens=facts["block_tokens"],
        end_s=facts["end_s"],
        work=Work(iterations=int(np.count_nonzero(batches["stage"] == 0))),
        wall_s=facts["wall_s"],
    )
    run = LiveRun(records, slices, host, cost=facts["cost"], waited_s=facts["waited_s"])
    records.gaps = slices.gaps(experiment.workload.prompt_tokens.astype(np.int64), run.batch_end_s())
    return run


_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "kv_capacity_blocks": (int, "a whole number"),
    "block_tokens": (int, "a whole number"),
    "end_s": ((int, float), "a number"),
    "wall_s": ((int, float), "a number"),
    "waited_s": ((int, float, NoneType), "a number or null"),
    "interrupted": (bool, "true or false"),
    "slo_names": (list, "a list"),
    "cost": (str, "text"),
}


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FACTS_BYTES + 1)
        if len(raw) > _MAX_FACTS_BYTES:
            raise InputError(f"{path}: larger than {_MAX_FACTS_BYTES} bytes")
        facts = json.loads(raw)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{path}: must be a mapping with format {FORMAT}; record the run again")
    for key, (kind, what) in _KINDS.items():
        value = facts.get(key)
        is_bool = isinstance(value, bool)
        if not isinstance(value, kind) or is_bool != (kind is bool):
            raise InputError(f"{path}: {key} must be {what}")
        if isinstance(value, int | float) and not 0 <= value < 2**53:
            raise InputError(f"{path}: {key} must be finite and not negative")
    if facts["block_tokens"] < 1:
        raise InputError(f"{path}: block_tokens must be at least 1")
    return facts


def _check_same(folder: Path, experiment: Experiment, where: str) -> None:
    """Refuse a record of another configuration, naming the first key that differs."""
    stored = read_stored_config(folder / "config.yaml")
    ours, theirs = dump(experiment.config), dump(stored)
    for key in sorted({*ours, *theirs} - set(_FREE_KEYS)):
        path = _difference(ours.get(key), theirs.get(key), key)
        if path is not None:
            raise InputError(
                f"{folder / 'config.yaml'}: {path} is not what {where} says; the record is of another run"
            )


def _difference(ours: Any, theirs: Any, path: str) -> str | None:
    """The dotted key of the first difference; paths to files are the same if their names are."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        parts = (_difference(ours.get(k), theirs.get(k), f"{path}.{k}") for k in sorted({*ours, *theirs}))
        return next((part for part in parts if part is not None), None)
    if ours == theirs:
        return None
    if (
        isinstance(ours, str)
        and isinstance(theirs, str)
        and "/" in ours
        and Path(ours).name == Path(theirs).name
    ):
        return None
    return path


def _check_requests(folder: Path, requests: Mapping[str, NDArray[Any]], experiment: Experiment) -> None:
    workload, ids = experiment.workload, requests["request_id"]
    if len(ids) == 0:
        raise InputError(f"{folder / 'requests.csv'}: holds no request")
    known = ids < len(workload)
    for name, wanted in (
        ("prompt_tokens", workload.prompt_tokens),
        ("output_tokens", workload.output_tokens),
    ):
        same = np.zeros(len(ids), dtype=bool)
        same[known] = requests[name][known] == wanted[ids[known]]
        _complain_unless(same, folder, requests, f"{name} is not that of the configuration's workload")
    if workload.arrival_s is not None:
        near = np.abs(requests["arrival_s"] - workload.arrival_s[ids]) < 1e-6
        _complain_unless(near, folder, requests, "arrival_s is not that of the configuration's workload")


def _complain_unless(
    good: NDArray[np.bool_], folder: Path, requests: Mapping[str, Any], problem: str
) -> None:
    if not good.all():
        id = int(requests["request_id"][int(np.argmin(good))])
        raise InputError(f"{folder / 'requests.csv'}: request {id}: {problem}")


def _check_batches(
    folder: Path, batches: Mapping[str, NDArray[Any]], slices: Slices, experiment: Experiment
) -> None:
    stages = experiment.parallel.spp
    count = int(slices.batch[-1]) + 1 if len(slices) else 0
    problems: Sequence[tuple[NDArray[np.bool_], str, str]] = (
        (np.diff(slices.batch, prepend=-1 if count else 0) > 1, _SLICES, "batches must be numbered from 0"),
        (slices.request_id >= len(experiment.workload), _SLICES, "there is no such request"),
        (
            slices.home >= experiment.parallel.kvp,
            _SLICES,
            f"home must be below kvp, {experiment.parallel.kvp}",
        ),
        (batches["batch"] >= count, "batches.csv", "there is no such batch in " + _SLICES),
        (batches["stage"] >= stages, "batches.csv", f"stage must be below spp, which is {stages}"),
        (batches["steps"] != 1, "batches.csv", "steps must be 1 in a live run"),
    )
    for wrong, name, problem in problems:
        if wrong.any():
            raise InputError(f"{folder / name}: row at line {int(np.argmax(wrong)) + 2}: {problem}")
    if count == 0:
        raise InputError(f"{folder / _SLICES}: holds no batch")
    pairs = batches["batch"] * stages + batches["stage"]
    if len(np.unique(pairs)) != len(pairs):
        raise InputError(f"{folder / 'batches.csv'}: a batch is there twice for a stage")
    missing = np.setdiff1d(np.arange(count * stages), pairs)
    if len(missing) and experiment.config.stop_s is None:
        batch, stage = divmod(int(missing[0]), stages)
        raise InputError(f"{folder / 'batches.csv'}: stage {stage} of batch {batch} is missing")
