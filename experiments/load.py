"""From a file and ``--set`` options to a :class:`~experiments.config.Config`, or one clear line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from experiments.config import Config, check_path, dump, field_names
from experiments.keys import merged, suggestion
from experiments.yaml_files import parse_yaml, read_yaml_mapping
from specs.errors import InputError

Location = tuple[int | str, ...]

_NOT_OF_TYPE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "list_type": "a list",
}
_OUT_OF_BOUNDS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "at most {}"),
}
_WHAT_TO_GIVE = {
    ("model",): "; `convoy list models` has the names, or give a path to a Hugging Face config.json",
    ("device",): "; `convoy list devices` has the names",
    ("workload",): "; it holds lengths, arrivals and num_requests or duration_s",
    ("workload", "lengths"): "; give {trace: FILE} or {distribution: …}",
    ("workload", "arrivals"): "; give {process: poisson, rate_rps: …}, or gamma, uniform, closed_loop, trace",
}


def load_config(
    path: Path, overrides: Sequence[str] = (), changes: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """Read a configuration; each override is ``key.path=value`` with a YAML value.

    ``changes``, values by dotted keys, come before them and count as the file's own.

    Paths in it (traces, models, devices, profiles) that are relative are looked for in the current folder
    first and then in the configuration's, and become absolute, so that the configuration can be stored
    elsewhere. A configuration without a name gets its file's.

    Raises:
        InputError: one line with the file (or ``--set``) and the key, what is wrong and what would be right.
    """
    data = read_yaml_mapping(path)
    for key, value in changes.items():
        try:
            data = merged(data, key, value)
        except ValueError as error:
            raise InputError(f"{path}: {key}: {error}") from None
    changed: list[str] = []
    for override in overrides:
        key, value = _parse_override(override)
        try:
            data = merged(data, key, value)
        except ValueError as error:
            raise InputError(f"--set {override}: {error}") from None
        changed.append(key)
    if "name" not in data:
        data["name"] = _name_of_file(path)
    return validate(data, str(path), folder=path.parent, changed=changed)


def validate(data: Mapping[str, Any], where: str, *, folder: Path, changed: Sequence[str] = ()) -> Config:
    """The configuration that plain data stands for; ``where`` begins every message, or ``--set`` does for
    the keys in ``changed``. ``folder`` is the second place where relative paths are looked for.

    Raises:
        InputError: see :func:`load_config`.
    """
    return _with_absolute_paths(_parse(data, where, changed), where, folder)


def read_stored_config(path: Path) -> Config:
    """The configuration that an earlier run left; the files it names may be gone, or lie elsewhere.

    Raises:
        InputError: see :func:`load_config`.
    """
    return _parse(read_yaml_mapping(path), str(path))


def _parse(data: Mapping[str, Any], where: str, changed: Sequence[str] = ()) -> Config:
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise InputError(_one_line(error, where, changed)) from None


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML; reading it again gives the same configuration."""
    return yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True, width=100)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(f"--set {override}: must look like key.path=value, as in scheduler.priority=lars")
    value = parse_yaml(text, f"--set {override}")
    try:
        check_path(key)
    except ValueError as error:
        raise InputError(f"--set {override}: {error}") from None
    return key, value


def _name_of_file(path: Path) -> str:
    """A name that can be a folder's, from the file's."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip(".-")[:100] or "run"


# -- what pydantic found, in one line ---------------------------------------------------------------------


def _one_line(error: ValidationError, where: str, changed: Sequence[str]) -> str:
    # An unknown key first: it often explains why another one is missing.
    problems = sorted(
        error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden"
    )
    first = problems[0]
    location: Location = tuple(part for part in first["loc"] if part != "[key]")
    key = ".".join(map(str, location))
    if any(key == path or key.startswith(f"{path}.") for path in changed):
        where = "--set"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    text = _describe(dict(first), location)
    return f"{where}: {key}: {text}{more}" if key else f"{where}: {text}{more}"


def _describe(problem: dict[str, Any], location: Location) -> str:
    kind, value, context = problem["type"], problem.get("input"), problem.get("ctx", {})
    if kind == "missing":
        return f"is missing{_WHAT_TO_GIVE.get(tuple(map(str, location)), '')}"
    if kind == "extra_forbidden":
        names = field_names(location)
        return f"unknown key{suggestion(str(location[-1]), names)} (known: {', '.join(names)})"
    if kind == "literal_error":
        names = tuple(re.findall(r"'([^']*)'", context["expected"]))
        return f"{_show(value)} is not one of {', '.join(names)}{suggestion(str(value), names)}"
    if kind in _NOT_OF_TYPE:
        return f"must be {_NOT_OF_TYPE[kind]}, not {_show(value)}"
    if kind in _OUT_OF_BOUNDS:
        name, phrase = _OUT_OF_BOUNDS[kind]
        return f"must be {phrase.format(f'{context[name]:.12g}')}, not {_show(value)}"
    if kind == "finite_number":
        return f"must be a finite number, not {_show(value)}"
    if kind == "string_pattern_mismatch":
        return f"{_show(value)} can't name a folder; use up to 100 letters, digits and . _ + = , @ -"
    if kind == "value_error":
        return str(context["error"])
    return f"{str(problem['msg']).splitlines()[0]}, not {_show(value)}"


def _show(value: object) -> str:
    """A value as the user wrote it, more or less, and not too much of it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


# -- paths ------------------------------------------------------------------------------------------------


def _with_absolute_paths(config: Config, where: str, folder: Path) -> Config:
    workload = config.workload
    lengths = _absolute_traces(workload.lengths, f"{where}: workload.lengths", folder)
    predictor = config.predictor
    if predictor.profile is not None:
        found = _find(predictor.profile, folder)
        if found is None:
            raise InputError(f"{where}: predictor.profile: {_not_found(predictor.profile, folder)}")
        predictor = predictor.model_copy(update={"profile": found})
    live = config.live
    if isinstance(live.weights, str):
        found = _find(live.weights, folder)
        if found is None:
            raise InputError(f"{where}: live.weights: {_not_found(live.weights, folder)}")
        live = live.model_copy(update={"weights": found})
    return config.model_copy(
        update={
            "model": _absolute_if_path(config.model, folder),
            "device": _absolute_if_path(config.device, folder),
            "predictor": predictor,
            "live": live,
            "workload": workload.model_copy(update={"lengths": lengths}),
        }
    )


def _absolute_traces(lengths: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """The same lengths, a mixture's components included, with absolute ``trace`` paths."""
    result = dict(lengths)
    trace = lengths.get("trace")
    if isinstance(trace, str):
        found = _find(trace, folder)
        if found is None:
            raise InputError(f"{where}.trace: {_not_found(trace, folder)}")
        result["trace"] = found
    components = lengths.get("components")
    if isinstance(components, list):
        result["components"] = [
            _absolute_traces(part, f"{where}.components.{i}", folder) if isinstance(part, Mapping) else part
            for i, part in enumerate(components)
        ]
    return result


def _absolute_if_path(name: str, folder: Path) -> str:
    """A name of the library stays as it is; so does a path to nothing, which the library will refuse."""
    looks_like_path = "/" in name or "\\" in name or name.endswith((".json", ".yaml", ".yml")) or name == "."
    return (_find(name, folder) or name) if looks_like_path else name


def _find(name: str, folder: Path) -> str | None:
    """The absolute path of what ``name`` means, seen from here or else from ``folder``."""
    for base in (Path(), folder):
        try:
            path = base / Path(name).expanduser()
            if path.exists():
                return str(path.resolve())
        except (OSError, ValueError, RuntimeError):  # names that no file system takes
            return None
    return None


def _not_found(name: str, folder: Path) -> str:
    return f"no such file: {_show(name)} (looked in the current folder and in {folder.resolve()})"
