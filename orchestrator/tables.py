"""Tables of text for the terminal: no lines, two spaces before each column."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rich.table import Table
from rich.text import Text

Column = tuple[str, Literal["left", "right"]]


def table(*columns: Column) -> Table:
    """Return an empty table. A table whose columns have no titles has no header."""
    made = Table(box=None, padding=(0, 0, 0, 2), show_header=any(name for name, _ in columns))
    for name, justify in columns:
        made.add_column(name, justify=justify, overflow="fold", no_wrap=justify == "right")
    return made


def rows_table(rows: Iterable[tuple[str, str]], justify: Literal["left", "right"] = "left") -> Table:
    """Return a table of two columns without titles: names and values."""
    made = table(("", "left"), ("", justify))
    for cells in rows:
        add(made, *cells)
    return made


def add(made: Table, *cells: str) -> None:
    """Add a row of plain text.

    Rich would read "[red]" in a string, such as a caption, as markup."""
    made.add_row(*(Text(printable(cell, 2000)) for cell in cells))


def printable(text: str, length: int) -> str:
    """Return text from data as one printable line of at most `length` characters."""
    line = "".join(character if character.isprintable() else " " for character in text[: 4 * length])
    line = " ".join(line.split())
    return line if len(line) <= length else line[: length - 1] + "…"
