"""The cells of a sweep: which configurations it stands for, and by what each is known."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from itertools import product
from pathlib import Path
from typing import Any

from experiments.config import Config, RangeConfig, dump
from experiments.load import load_config
from experiments.version import version
from policies.priorities import PRIORITIES, installed_priorities
from specs.errors import InputError

_ROOT = Path(__file__).resolve().parent.parent
_CODE = ("specs", "traces", "policies", "profiler", "sim", "experiments")
_SHOWS_ONLY = _ROOT / "experiments" / "paper"  # what it makes results from is hashed with each of them
_HASHED_BYTES = 1 << 20  # larger files count by size and time


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of a sweep.

    Attributes:
        changes: what it changes, by dotted keys.
        text: the whole of it, without the sweep, as JSON: of large grids all cells are held at once, and as
            text they take a fifth.
        id: a hash of all that its result depends on: configuration, files it names, Convoy's own code.
    """

    changes: Mapping[str, Any]
    text: str
    id: str

    @classmethod
    def of(cls, changes: Mapping[str, Any], config: Config, id: str | None = None) -> Cell:
        """The cell of a configuration, known by ``id`` if its result depends on more than a simulation's."""
        return cls(changes, json.dumps(dump(config)), id or cell_id(config))

    @property
    def config(self) -> Config:
        """The configuration."""
        return Config.model_validate(json.loads(self.text))


def cells(path: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """The cells of the configuration at ``path``, the last key varying fastest.

    Raises:
        InputError: there is no sweep, a cell isn't a valid configuration, or ``overrides`` set a swept key.
    """
    config = load_config(path, overrides)
    if not config.sweep:
        raise InputError(f"{path}: sweep: is missing; give dotted keys and their values, or use `convoy run`")
    swept = [key for names in config.sweep for key in split_keys(names)]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in swept:
            raise InputError(f"--set {override}: {key} is swept by {path}; change sweep itself")
    found = []
    for changes in combinations(config.sweep):
        cell = load_config(path, overrides, changes).model_copy(update={"sweep": None})
        found.append(Cell.of(changes, cell))
    return found


def combinations(sweep: Mapping[str, list[Any] | RangeConfig]) -> Iterator[dict[str, Any]]:
    """Every combination of values, by single keys. Keys joined by commas take their values together."""
    axes = []
    for names, values in sweep.items():
        keys = split_keys(names)
        rows: Sequence[Any] = values if isinstance(values, list) else spread(values)
        axes.append([dict(zip(keys, row if len(keys) > 1 else [row], strict=True)) for row in rows])
    for chosen in product(*axes):
        yield {key: value for part in chosen for key, value in part.items()}


def split_keys(names: str) -> list[str]:
    """``"a.b, c"`` as its keys."""
    return [name.strip() for name in names.split(",")]


def spread(values: RangeConfig) -> list[float | int]:
    """The numbers of a range, both ends included."""
    if values.step is not None:
        count = math.floor((values.stop - values.start) / values.step + 1e-9) + 1
        numbers = [values.start + i * values.step for i in range(count)]
    else:
        count = values.count or 2
        places = [i / (count - 1) if count > 1 else 0.0 for i in range(count)]
        if values.log:
            numbers = [values.start * (values.stop / values.start) ** place for place in places]
        else:
            numbers = [values.start + (values.stop - values.start) * place for place in places]
    # Twelve figures are more than anybody means, and 0.1 + 0.2 is meant to be 0.3.
    rounded = [float(f"{number:.12g}") for number in numbers]
    return [int(number) if number.is_integer() else number for number in rounded]


def cell_id(config: Config, *others: str) -> str:
    """A hash of all that the result of ``config`` depends on; ``others`` are what it knows nothing of."""
    data = dump(config)
    data.pop("name")
    files = {text: _stamp(Path(text)) for text in _texts(data) if Path(text).is_absolute()}
    if (source := source_of_priority(config.scheduler.priority)) is not None:
        files["scheduler.priority"] = _stamp(source)
    return hash_of([data, files, code_version(), *others])


def hash_of(data: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode("utf-8")).hexdigest()[:16]


@cache
def code_version() -> str:
    """The version of Convoy, and a hash of the source and the tables that results come from."""
    digest = hashlib.sha256()
    for room in _CODE:
        for file in sorted((_ROOT / room).rglob("*")):
            if file.is_relative_to(_SHOWS_ONLY):
                continue
            if file.is_file() and file.suffix not in (".pyc", ".md"):
                digest.update(str(file.relative_to(_ROOT)).encode("utf-8"))
                digest.update(file.read_bytes())
    return f"{version()}+{digest.hexdigest()[:16]}"


def source_of_priority(name: str) -> Path | None:
    """Where the code of a priority from elsewhere lies, a file or a package's folder; None for our own, whose
    code counts anyway. Nothing is imported."""
    if name in PRIORITIES:
        return None
    path = name if ":" in name else installed_priorities().get(name, "")
    spec = PathFinder.find_spec(path.partition(":")[0].partition(".")[0], [str(Path.cwd()), *sys.path])
    if spec is None:
        return None
    folders = spec.submodule_search_locations
    return Path(folders[0]) if folders else Path(spec.origin) if spec.origin else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _stamp(path: Path) -> str:
    """What tells a file or folder from a changed one."""
    if path.is_dir():
        return ",".join(f"{each.name}:{_stamp(each)}" for each in sorted(path.iterdir()) if each.is_file())
    try:
        facts = path.stat()
        if facts.st_size > _HASHED_BYTES:
            return f"{facts.st_size}-{facts.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"
