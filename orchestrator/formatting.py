"""Numbers for people: what messages and the pages of runs and sweeps print."""

from __future__ import annotations

import math

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


def scale(largest: float, unit: str | None) -> tuple[float, str]:
    """Return by how much to multiply a value of a Grafana unit, and what follows it.

    (2.5e9, 'bytes') -> (1e-9, ' GB'). Units without a rule follow the number: 'cores' -> ' cores'.
    """
    unit = unit or "short"
    if unit in ("percentunit", "percent", "%"):
        return (100.0 if unit == "percentunit" else 1.0), " %"
    if unit in ("s", "seconds"):
        steps = ((172_800, 86_400, "d"), (7200, 3600, "h"), (120, 60, "min"))
        return next(((1 / size, f" {name}") for least, size, name in steps if largest >= least), (1.0, " s"))
    known = {"short": "", "none": "", "bytes": "B", "Bps": "B/s", "binBps": "B/s", "gbytes": "GiB", "GBs": "GB/s"}
    name = known.get(unit, unit.removeprefix("suffix:"))
    sizes = () if unit in ("gbytes", "GBs") else ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, letter = next((pair for pair in sizes if largest >= pair[0]), (1.0, ""))
    gap = " " if letter and unit not in known and not name.startswith("/") else ""
    return 1 / size, f" {letter}{gap}{name}".rstrip()


def with_unit(value: float, unit: str | None) -> str:
    """Format a value with three digits and its unit: (2.5e9, 'bytes') -> '2.5 GB'."""
    factor, suffix = scale(abs(value), unit)
    return f"{value * factor:.3g}{suffix}"


def ticks(low: float, high: float, unit: str | None) -> list[tuple[float, str]]:
    """Return at most 6 values for an axis, with texts that differ.

    The values are multiples of 1, 2 or 5 in the unit that the texts show.

    Args:
        low, high: ends of the axis, low < high.
    """
    factor, suffix = scale(max(abs(low), abs(high)), unit)
    low, high = low * factor, high * factor
    power = math.floor(math.log10((high - low) / 5))
    size, step = next((n, n * 10.0**power) for n in (1, 2, 5, 10) if n * 10.0**power >= (high - low) / 5)
    decimals = max(0, -power - (size == 10))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(number * step / factor, f"{number * step:,.{decimals}f}{suffix}") for number in numbers]
