"""Numbers as people read them."""

from __future__ import annotations

import math

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def seconds(value: float) -> str:
    """Three figures and a unit: ``12.3 ms``, ``4.56 s``, ``1,230 s``."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g} s"
    size = abs(value)
    scale, unit = next(
        (pair for pair in _UNITS if size >= pair[0] * 0.9995), _UNITS[-1]
    )  # 999.6 ms is 1.00 s
    return f"{number(value / scale)} {unit}"


def number(value: float) -> str:
    """Three significant figures, thousands separated."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits)}f}"


def usd(value: float) -> str:
    """Dollars, with cents, or three figures of what is below one."""
    if not math.isfinite(value):
        return "–"
    return f"${value:,.2f}" if abs(value) >= 1 or value == 0 else f"${number(value)}"


def percent(share: float) -> str:
    """A share as a percentage that is 100 or 0 only if the share is 1 or 0."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    for digits in (1, 2, 3):
        text = f"{100 * share:.{digits}f}"
        if float(text) not in (0.0, 100.0):
            return f"{text} %"
    return "> 99.999 %" if share > 0.5 else "< 0.001 %"
