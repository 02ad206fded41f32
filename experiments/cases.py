"""Several cases in one file: a configuration, and named changes to it along one axis or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.keys import suggestion
from experiments.load import load_config
from specs.errors import InputError


@dataclass(frozen=True, slots=True)
class Case:
    """One case of a file.

    Attributes:
        name: of each axis one name, joined by dots; empty for a file without cases.
        where: what messages about it begin with.
    """

    name: str
    where: str
    config: Config


def load_cases(path: Path, overrides: Sequence[str], wanted: Sequence[str] = ()) -> list[Case]:
    """All cases of a file, in the order of their axes; or the file itself, if it has none.

    Each case's configuration stands for itself: its name is the file's and its own, and it has no cases.
    Overrides come last and hold for all.

    Args:
        wanted: names of cases, or patterns such as ``*.spp2-*``; none means all.

    Raises:
        InputError: see :func:`experiments.load.load_config`; or a case that is wanted isn't there.
    """
    config = load_config(path, overrides)
    axes = config.validation.cases
    if not axes:
        if wanted:
            raise InputError(f"--case {wanted[0]}: {path} has no cases (validate.cases)")
        return [Case("", str(path), config)]
    combinations = {".".join(names): names for names in product(*axes)}
    chosen = {name: names for name, names in combinations.items() if _is_wanted(name, wanted)}
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in combinations):
            raise InputError(
                f"--case {pattern}: {path} has no such case{suggestion(pattern, tuple(combinations))} "
                f"({', '.join(combinations)})"
            )
    return [_case(path, overrides, config, name, names) for name, names in chosen.items()]


def _is_wanted(name: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)


def _case(path: Path, overrides: Sequence[str], whole: Config, name: str, names: Sequence[str]) -> Case:
    changes: dict[str, Any] = {"name": f"{whole.name}.{name}", "validate.cases": []}
    for axis, chosen in zip(whole.validation.cases, names, strict=True):
        changes |= axis[chosen]
    return Case(name, f"{path}: {name}", load_config(path, overrides, changes))
