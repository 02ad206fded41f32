"""Keys of the configuration: which there are, which one is meant, and what stands under one."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from experiments.section import Section


def known_name(name: str, names: tuple[str, ...], what: str) -> str:
    """``name`` if it is one of ``names``.

    Raises:
        ValueError: it isn't; suggests the nearest.
    """
    if name in names:
        return name
    raise ValueError(f"'{name}' is not a known {what}{suggestion(name, names)} ({', '.join(names)})")


def suggestion(name: str, names: tuple[str, ...]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``names``, or nothing."""
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_key(root: type[Section], path: str) -> None:
    """Check that a dotted path names a key that ``root``, or a section in it, may hold.

    Raises:
        ValueError: it doesn't; suggests the nearest key.
    """
    annotation: Any = root
    parts = path.split(".")
    for depth, part in enumerate(parts):
        section = _section_in(annotation)
        if section is not None and part not in _fields(section):
            key = ".".join(parts[: depth + 1])
            names = tuple(_fields(section))
            raise ValueError(f"'{key}' is not a key of the configuration{suggestion(part, names)}")
        if section is None and _values_of(annotation) is None:
            raise ValueError(f"'{'.'.join(parts[:depth])}' is a value, so '{path}' is not a key")
        annotation = _below(annotation, part)


def names_beside(root: type[Section], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Keys of the section, of those in ``root``, in which the last part of ``location`` stands."""
    annotation: Any = root
    for part in location[:-1]:
        annotation = _below(annotation, str(part))
    section = _section_in(annotation)
    return tuple(_fields(section)) if section is not None else ()


def _below(annotation: Any, part: str) -> Any:
    """The annotation of what stands under the key ``part``."""
    section = _section_in(annotation)
    return _fields(section)[part].annotation if section is not None else _values_of(annotation)


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by their keys in a configuration."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def _section_in(annotation: Any) -> type[Section] | None:
    """The section class in an annotation such as ``HostConfig | None``."""
    kinds = [annotation] if get_origin(annotation) is None else []
    if get_origin(annotation) is UnionType:
        kinds = list(get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _values_of(annotation: Any) -> Any:
    """The annotation of a dict's values; None if it isn't a dict. What is below ``Any`` is free."""
    if annotation is Any:
        return Any
    kinds = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    return next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), None)


def merged(data: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of ``data`` with the value at the dotted ``path`` replaced; numbers index lists.

    Raises:
        ValueError: something on the way isn't a mapping or a list, or an index is out of range.
    """
    head, _, rest = path.partition(".")
    if not rest:
        return {**data, head: value}
    below = data.get(head)
    if isinstance(below, list):
        return {**data, head: _merged_list(below, head, rest, value)}
    if below is not None and not isinstance(below, Mapping):
        raise ValueError(f"'{head}' is a value ({below!r}), so it has no '{rest}'")
    return {**data, head: merged(below or {}, rest, value)}


def _merged_list(items: list[Any], head: str, path: str, value: Any) -> list[Any]:
    index, _, rest = path.partition(".")
    if not index.isdecimal() or int(index) >= len(items):
        raise ValueError(f"'{head}' is a list of {len(items)}, so '{index}' must be 0 to {len(items) - 1}")
    item = items[int(index)]
    if rest and not isinstance(item, Mapping):
        raise ValueError(f"'{head}.{index}' is a value ({item!r}), so it has no '{rest}'")
    new = merged(item, rest, value) if rest else value
    return [*items[: int(index)], new, *items[int(index) + 1 :]]
