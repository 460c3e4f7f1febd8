"""Cells of tables as text."""

from collections.abc import Sequence

from rtrl._utils.formatting import number
from rtrl.report.model import Cell


def cell(value: Cell) -> str:
    """A cell of a table; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value)


def is_number(value: Cell) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numeric(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[bool]:
    """Of every column, whether it holds numbers alone, to be set flush right."""
    return [
        any(is_number(row[i]) for row in rows) and all(row[i] is None or is_number(row[i]) for row in rows)
        for i in range(len(columns))
    ]
