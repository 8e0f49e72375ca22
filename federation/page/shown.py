"""How the page shows numbers: times, bytes, metrics."""

from typing import Any

UNITS = "B", "kB", "MB", "GB", "TB"


def seconds(value: float | None) -> str:
    """Return a duration in words: "6.1 s", "4 min 10 s", "2 h 5 min", "3 d 4 h"."""
    if value is None:
        return "–"
    whole = max(0, round(value))
    if whole < 60:
        return f"{max(0.0, value):.1f} s" if value < 10 else f"{whole} s"
    for size, unit, smaller, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + f" {rest} {part}" * bool(rest)
    raise AssertionError(value)


def size(value: float | None) -> str:
    """Return a number of bytes in decimal units: "1.25 MB"."""
    if value is None:
        return "–"
    power = 0
    while value >= 1000 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {UNITS[power]}" if power and value < 999.5 else f"{value:.0f} {UNITS[power]}"


def number(value: Any) -> str:
    """Return a metric with four decimals where that says something, and a count with its thousands apart."""
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:.4g}"
    return "–" if value is None else f"{value:,}" if type(value) is int else str(value)
