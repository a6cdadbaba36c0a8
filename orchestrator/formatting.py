"""Numbers for people: what messages and the pages of runs and sweeps print."""

from __future__ import annotations

from collections.abc import Sequence

NBSP, TIMES = "\u00a0", "\u00d7"


def count(value: float) -> str:
    """84992 -> '84,992'."""
    return f"{value:,.0f}"


def counted(value: float, one: str, many: str | None = None) -> str:
    """(1, 'step') -> '1 step', (1720, 'step') -> '1,720 steps'."""
    return f"{count(value)}{NBSP}{one if value == 1 else many or one + 's'}"


def percent(rate: float) -> str:
    """0.1012 -> '10.1 %', 0.0029 -> '0.29 %', 0.00058 -> '0.058 %', 1.0 -> '100 %'."""
    value = 100 * rate
    if value in (0, 100):
        digits = f"{value:.0f}"
    elif value >= 0.1:
        digits = f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    else:
        digits = f"{value:.2g}" if value >= 0.001 else "under 0.001"
    return f"{digits}{NBSP}%"


def decimal(value: float) -> str:
    """Format with four significant digits and a true minus sign.

    2.1319 -> '2.132', 0.00098 -> '0.00098', -10.0 -> '−10'.
    """
    return (count(value) if abs(value) >= 1000 else f"{value:.4g}").replace("-", "\u2212")


def multiple(rate: float, chance: float) -> str:
    """(0.101, 0.0029) -> '35 times chance'."""
    ratio = rate / chance
    return f"{count(ratio) if ratio >= 10 else f'{ratio:.1f}'} times chance"


def format_duration(seconds: float) -> str:
    """3725 -> '1 h 02 min', 200 -> '3 min 20 s'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def duration(seconds: float) -> str:
    """Format as `format_duration` does, without breaks between its parts."""
    return format_duration(seconds).replace(" ", NBSP)


def byte_count(value: float) -> str:
    """47200000 -> '47.2 MB'."""
    unit, size = next((item for item in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if value >= item[1]), ("kB", 1e3))
    return f"{value / size:,.1f}{NBSP}{unit}"


def short_count(value: float) -> str:
    """20000 -> '20k', 1500000 -> '1.5M'."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def first_ten(names: Sequence[str]) -> str:
    """Return names joined by commas, ten at most, and how many more there are."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
