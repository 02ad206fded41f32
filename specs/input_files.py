"""Reading small files of facts that a user may have written: bounded, typed, one clear line when wrong."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from specs.errors import InputError
from specs.errors import did_you_mean as did_you_mean

_MAX_FILE_BYTES = 1 << 20  # a config.json is about 1 kB; anything near this is not one


def is_kind(path: Path, kind: Literal["file", "folder"]) -> bool:
    """Whether there is such a file or folder; names no file system takes are simply not there."""
    try:
        return path.is_file() if kind == "file" else path.is_dir()
    except (OSError, ValueError):
        return False


def load_mapping(path: Path, syntax: Literal["json", "yaml"]) -> dict[str, Any]:
    """Read the file at `path`, which must hold one mapping with text keys.

    Raises:
        InputError: the file is missing, larger than 1 MiB, not text, not JSON / YAML, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {_MAX_FILE_BYTES} bytes, so it is not a file of this kind")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    data = _parse_json(path, text) if syntax == "json" else _parse_yaml(path, text)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(f"{path}: must hold one mapping of names to values")
    return data


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} is not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml  # only needed for device files, and slow to import

    try:
        # The same loader as safe_load's, written in C where PyYAML was built with it: ten times as fast.
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} is" if mark is not None else "it is"
        problem = getattr(error, "problem", None) or "unreadable"
        raise InputError(f"{path}: {where} not valid YAML ({problem})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None


class Fields:
    """Typed access to the keys of one mapping; every error names the file and the key."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._data = data
        self._where = where

    def fail(self, key: str, problem: str) -> InputError:
        """Return the error to raise for `key`."""
        return InputError(f"{self._where}: {key} {problem}")

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Raise unless every key is one of `known`."""
        known = list(known)
        for key in self._data:
            if key not in known:
                raise InputError(f"{self._where}: unknown key {reprlib.repr(key)}{did_you_mean(key, known)}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._data.get(key) is not None

    def integer(
        self, key: str, *, at_least: int = 1, at_most: int = 1 << 40, default: int | None = None
    ) -> int:
        """The integer under `key`; `default` stands in for an absent or null one."""
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # YAML writes 8.0e10 for large counts of bytes
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(key, f"must be a whole number, not {reprlib.repr(value)}")
        if not at_least <= value <= at_most:
            raise self.fail(key, f"must be between {at_least} and {at_most}, not {value}")
        return value

    def number(self, key: str, *, at_least: float = 0.0, default: float | None = None) -> float:
        """The finite number under `key`."""
        value = self._value(key, default)
        if isinstance(value, str):
            value = _number_in_text(value)  # YAML 1.1 reads 1e9 (no dot) as text
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.fail(key, f"must be a finite number, not {reprlib.repr(value)}")
        if value < at_least:
            raise self.fail(key, f"must be at least {at_least:g}, not {value:g}")
        return float(value)

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        """The boolean under `key`."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {reprlib.repr(value)}")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        """The text under `key`, not empty."""
        value = self._value(key, default)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(key, f"must be text, not {reprlib.repr(value)}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """The mapping under `key`."""
        value = self._value(key, None)
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise self.fail(key, f"must be a mapping, not {type(value).__name__}")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self._data.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        return value


def _number_in_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
