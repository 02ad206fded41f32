"""The values that a sweep gives to a key of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from experiments.section import Positive, Section, whole_number


class RangeConfig(Section):
    """Numbers from ``start`` to ``stop``, both included: ``step`` apart, or ``count`` of them, evenly spread
    or with ``log`` in equal ratios."""

    start: float
    stop: float
    step: Positive | None = None
    count: Annotated[int, BeforeValidator(whole_number), Field(ge=1, le=100_000)] | None = None
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> RangeConfig:
        if (self.step is None) == (self.count is None):
            raise ValueError("a range has a step or a count, one of them")
        if self.stop < self.start:
            raise ValueError(f"stop ({self.stop:g}) must not be below start ({self.start:g})")
        if self.step is not None and (self.stop - self.start) / self.step > 100_000:
            raise ValueError("that makes more than 100,000 values")
        if self.log and (self.start <= 0 or self.step is not None):
            raise ValueError("log needs a count and a start above 0")
        return self


def _range_or_list(values: Any) -> str:
    return "range" if isinstance(values, Mapping | RangeConfig) else "list"


SweptValues = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[RangeConfig, Tag("range")], Discriminator(_range_or_list)
]


def check_rows(names: str, width: int, values: list[Any] | RangeConfig) -> None:
    """Check that the values of several keys at once are lists of one value for each.

    Raises:
        ValueError: one isn't.
    """
    rows = values if isinstance(values, list) else [values]
    for row in rows:
        if not isinstance(row, list) or len(row) != width:
            raise ValueError(f"{names}: each value must be a list of {width}, one for each key")
