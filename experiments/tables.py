"""Tables on the screen."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

_WIDTH_OF_A_PIPE = 200  # columns, where nobody's terminal says how many there are


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right: Sequence[str] = (),
) -> None:
    """Print rows of text under a header; the columns named in ``right`` are aligned to the right.

    The first column is never broken, so that names can be copied.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim", show_header=any(header))
    for place, name in enumerate(header):
        side = "right" if name in right else "left"
        table.add_column(Text(name), justify=side, no_wrap=place == 0, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
