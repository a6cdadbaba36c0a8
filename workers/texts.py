"""Lists in messages: ten entries at most, and how many more there are."""

from __future__ import annotations

from collections.abc import Sequence


def first_ten(names: Sequence[str]) -> str:
    """Return names joined by commas."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def ten_lines(lines: Sequence[str]) -> str:
    """Return lines, all but the first indented."""
    return "\n  ".join([*lines[:10], *([f"and {len(lines) - 10:,} more"] if len(lines) > 10 else [])])
