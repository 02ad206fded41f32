"""Reading YAML that anybody may have written: bounded, without duplicate keys, one clear line when wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from specs.errors import InputError

MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_NODES = 100_000  # with every alias counted as often as it is used

# libyaml where there is one. It overflows the C stack on deep nesting, hence the depth check up front.
if TYPE_CHECKING:
    _BaseLoader = yaml.SafeLoader
else:
    _BaseLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_BaseLoader):
    """The safe loader, which also refuses duplicate keys and reads 1e9 as a number (YAML 1.2 does)."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key.value}' is there twice", key.start_mark
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping that the file at ``path`` holds.

    Raises:
        InputError: no such file, over 1 MiB, not UTF-8, not YAML, a key twice, nested too deeply, or not a
            mapping with text keys.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a null byte in the name
        raise InputError(f"{name!r}: cannot be read: {error}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{name}: larger than 1 MiB, so it is not a configuration")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not a text file (byte {error.start} is not UTF-8)") from None
    data = parse_yaml(text, name)
    if data is None:
        raise InputError(f"{name}: is empty; a configuration is a mapping of keys to values")
    if not isinstance(data, dict):
        raise InputError(f"{name}: must be a mapping of keys to values, not {_kind(data)}")
    for key in data:
        if not isinstance(key, str):
            raise InputError(f"{name}: the key {key!r} must be text")
    return data


def parse_yaml(text: str, name: str) -> Any:
    """The value of the one YAML document in ``text``; ``name`` says where it comes from.

    Raises:
        InputError: as for :func:`read_yaml_mapping`.
    """
    try:
        _check_depth(text, name)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, name)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except InputError:
        raise
    except yaml.YAMLError as error:
        raise InputError(f"{name}: {_problem(error, text)}") from None
    except (ValueError, OverflowError, TypeError) as error:  # 2024-13-45, 0o9, a list as a key
        raise InputError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None


def _check_depth(text: str, name: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise InputError(f"{name}: nested more than {_MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_size(root: yaml.Node, name: str) -> None:
    """Refuse a document whose aliases make it huge, or endless, once they are followed."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in open_nodes:
            raise InputError(
                f"{name}: line {node.start_mark.line + 1}: an alias refers to what it is part of"
            )
        open_nodes.add(id(node))
        children = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        total = 1 + sum(size(child) for child in children)
        open_nodes.discard(id(node))
        if total > _MAX_NODES:
            raise InputError(f"{name}: holds more than {_MAX_NODES} values, with its aliases followed")
        sizes[id(node)] = total
        return total

    size(root)


def _problem(error: yaml.YAMLError, text: str) -> str:
    """One line on what is wrong with the YAML."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
    if problem.startswith("but "):  # libyaml splits its sentences
        problem = f"{getattr(error, 'context', '')} {problem}".strip()
    if mark is None:
        return f"not valid YAML: {problem}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f"line {mark.line + 1}: indented with a tab; YAML wants spaces"
    if "there twice" in problem:
        return f"line {mark.line + 1}: {problem}"
    return f"line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {problem}"


def _kind(value: object) -> str:
    return {list: "a list", str: "text", bool: "true or false"}.get(type(value), "a single value")
