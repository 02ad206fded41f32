"""A figure of the paper: one YAML file, and the cells that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from experiments.config import Config
from experiments.grid import cell_id, code_version, hash_of
from experiments.keys import merged
from experiments.load import validate
from experiments.paper import measures
from experiments.section import Section
from experiments.yaml_files import read_yaml_mapping
from specs.errors import InputError

FOLDER = Path(__file__).parent
MIXTURES = FOLDER / "mixtures.yaml"
SYSTEMS = FOLDER / "systems.yaml"
_MEASURES = hash_of(Path(measures.__file__).read_text(encoding="utf-8"))


class FigureFile(Section):
    """What a figure's file holds.

    ``base`` is a configuration for ``runs``, options of ``convoy predict`` for the others. An axis gives
    names to changes by dotted keys; one called by a dotted key may just list its values, and one called
    ``system`` names of systems.yaml. Every combination is a cell, except those in ``without``. ``published``
    has, by the labels of a cell, what others measured: a ``value``.
    """

    title: str
    shows: str
    kind: Literal["runs", "predictions", "decisions"] = "runs"
    base: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, dict[Any, dict[str, Any]] | list[Any]] = Field(default_factory=dict)
    without: list[dict[str, Any]] = Field(default_factory=list)
    published: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_cells(self) -> FigureFile:
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"axes.{name} has no values")
        return self


@dataclass(frozen=True, slots=True)
class PaperCell:
    """One result that a figure needs.

    Attributes:
        labels: its place on each axis.
        work: what is to be run or predicted.
        id: a hash of all that its result depends on; figures share cells.
        published: what others measured; None if they didn't.
    """

    labels: Mapping[str, Any]
    kind: str
    work: Config | dict[str, Any]
    id: str
    published: float | None = None


@dataclass(frozen=True, slots=True)
class PaperFigure:
    """A figure and its cells, in order.

    Attributes:
        stands_in: names of traces that aren't here, for which a mixture was taken.
    """

    name: str
    title: str
    shows: str
    cells: tuple[PaperCell, ...]
    stands_in: frozenset[str]


def figure_names() -> list[str]:
    """The figures there are, in the paper's order."""
    names = [path.stem.removeprefix("fig") for path in FOLDER.glob("fig*.yaml")]
    return sorted(names, key=lambda name: (int("".join(filter(str.isdigit, name)) or 99), name))


def load_figure(name: str) -> PaperFigure:
    """Read a figure's file and make its cells.

    Raises:
        InputError: the file or one of its cells can't be.
    """
    path = FOLDER / f"fig{name}.yaml"
    try:
        file = FigureFile.model_validate(read_yaml_mapping(path))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    missing: set[str] = set()
    cells = tuple(
        replace(_cell(path, file, labels, changes, missing), published=_published(file, labels))
        for labels, changes in _places(file)
    )
    return PaperFigure(name, file.title, file.shows, cells, frozenset(missing))


def _places(file: FigureFile) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Labels and changes of every cell."""
    for chosen in product(*(_axis(name, values) for name, values in file.axes.items())):
        labels = dict(zip(file.axes, (label for label, _ in chosen), strict=True))
        if any(out.items() <= labels.items() for out in file.without):
            continue
        yield labels, {key: value for _, changes in chosen for key, value in changes.items()}


def _published(file: FigureFile, labels: Mapping[str, Any]) -> float | None:
    """What others measured for a cell."""
    for row in file.published:
        if {**labels, "value": row["value"]} == row:
            return float(row["value"])
    return None


def _axis(name: str, values: Mapping[Any, dict[str, Any]] | list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Labels and changes of one axis."""
    if not isinstance(values, list):
        return list(values.items())
    if name != "system":
        return [(value, {name: value}) for value in values]
    try:
        return [(value, _systems()[value]) for value in values]
    except KeyError as error:
        raise InputError(f"{SYSTEMS}: there is no system {error}") from None


def _cell(
    path: Path, file: FigureFile, labels: dict[str, Any], changes: dict[str, Any], missing: set[str]
) -> PaperCell:
    data = file.base
    for key, value in changes.items():
        try:
            data = merged(data, key, value)
        except ValueError as error:
            raise InputError(f"{path}: {key}: {error}") from None
    if file.kind != "runs":
        return PaperCell(labels, file.kind, data, hash_of([file.kind, data, code_version(), _MEASURES]))
    data = _with_lengths(path, data, missing)
    config = validate({"name": path.stem, **data}, f"{path}: {labels}", folder=FOLDER)
    return PaperCell(labels, file.kind, config, cell_id(config, _MEASURES))


def _with_lengths(path: Path, data: dict[str, Any], missing: set[str]) -> dict[str, Any]:
    """The same with the lengths of the mixture that it names, or of one that stands in for a trace that
    isn't here."""
    lengths = data.get("workload", {}).get("lengths", {})
    if "mixture" in lengths:
        return merged(data, "workload.lengths", _mixtures()[lengths["mixture"]])
    trace = lengths.get("trace")
    if not isinstance(trace, str) or Path(trace).exists() or (path.parent / trace).exists():
        return data
    name = Path(trace).name.partition(".")[0]
    if name not in _mixtures():
        return data  # to be refused as any configuration whose trace is missing
    missing.add(name)
    return merged(data, "workload.lengths", _mixtures()[name])


@cache
def _systems() -> dict[str, dict[str, Any]]:
    """Changes to a configuration by the name of the system that they make."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(SYSTEMS.read_text(encoding="utf-8"))
    return found


@cache
def _mixtures() -> dict[str, Any]:
    """Length distributions by the name of the trace that they stand in for."""
    data = yaml.safe_load(MIXTURES.read_text(encoding="utf-8"))
    parts = data.pop("parts")
    return {
        name: {
            "distribution": "mixture",
            "components": [
                {**component, "weight": weight * component["weight"]}
                for part, weight in weights.items()
                if weight
                for component in parts[part]
            ],
        }
        for name, weights in data.items()
    }
