"""What was found for a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.paper.figures import PaperFigure


class NotThere(LookupError):
    """A cell that hasn't been computed, or a value that it doesn't have."""


@dataclass(frozen=True, slots=True)
class Results:
    """A figure's cells and, in the same order, their results; None where there is none."""

    figure: PaperFigure
    summaries: tuple[Mapping[str, Any] | None, ...]

    def get(self, path: str, **labels: Any) -> Any:
        """The value at the dotted ``path`` of the only cell that has these ``labels`` (the last part of an
        axis's name is enough).

        Raises:
            NotThere: there is none.
        """
        found = [summary for cell, summary in self.cells() if labels.items() <= cell.items()]
        if len(found) != 1 or found[0] is None:
            raise NotThere(f"figure {self.figure.name}: {labels}")
        return value(found[0], path)

    def cells(self) -> list[tuple[dict[str, Any], Mapping[str, Any] | None]]:
        """Labels by the last part of their axis's name, and results."""
        return [
            ({name.rpartition(".")[2]: label for name, label in cell.labels.items()}, summary)
            for cell, summary in zip(self.figure.cells, self.summaries, strict=True)
        ]

    def labels(self, axis: str) -> list[Any]:
        """The labels on an axis, in order."""
        return list(dict.fromkeys(labels[axis] for labels, _ in self.cells()))


def value(summary: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path.

    Raises:
        NotThere: there is none.
    """
    found: Any = summary
    for part in path.split("."):
        if not isinstance(found, Mapping) or found.get(part) is None:
            raise NotThere(path)
        found = found[part]
    return found
