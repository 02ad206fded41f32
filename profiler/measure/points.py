"""What can be measured: one operator at one shape."""

from __future__ import annotations

from dataclasses import dataclass

from profiler.tables import COLUMNS
from specs.errors import InputError


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """One operator at one shape; `shape` follows the columns of the operator's table."""

    operator: str
    shape: tuple[int, ...]

    @staticmethod
    def of(operator: str, **values: int) -> Point:
        """The point with these values, by their names in formulas."""
        return Point(operator, tuple(values[name] for name in COLUMNS[operator].values()))

    def __getitem__(self, name: str) -> int:
        return self.shape[list(COLUMNS[self.operator].values()).index(name)]

    def __str__(self) -> str:
        values = zip(COLUMNS[self.operator], self.shape, strict=True)
        return f"{self.operator} {' '.join(f'{name}={value}' for name, value in values)}"

    @staticmethod
    def parse(operator: str, text: str) -> Point:
        """The point whose shape was written as `1;2;3`.

        Raises:
            InputError: unknown operator, or not its number of whole numbers.
        """
        if operator not in COLUMNS:
            raise InputError(f"unknown operator {operator!r}; there are {', '.join(COLUMNS)}")
        try:
            shape = tuple(int(value) for value in text.split(";"))
        except ValueError:
            shape = ()
        if len(shape) != len(COLUMNS[operator]):
            raise InputError(f"shape {text!r} of {operator} is not {len(COLUMNS[operator])} whole numbers")
        return Point(operator, shape)

    @property
    def shape_text(self) -> str:
        """The inverse of `parse`."""
        return ";".join(map(str, self.shape))
