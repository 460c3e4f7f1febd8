"""Tables and plots from columns: mappings from a common key, such as the number of steps, to values."""

from collections.abc import Collection, Mapping
from typing import Any

from rtrl.report.model import Plot, Series, Table

Columns = Mapping[str, Any]
"""The columns by name, each a mapping from keys to values."""


def table(title: str, key: str, columns: Columns) -> Table:
    """Return a table with one row per key of the first column; a key that another column lacks is an empty cell."""
    keys = next(iter(columns.values()))
    return Table(title, [key, *columns], [[k, *(column.get(k) for column in columns.values())] for k in keys])


def plot(title: str, x: str, y: str, columns: Columns, *, dashed: Collection[str] = (), log: str = "") -> Plot:
    """Return a plot with one line per column.

    Args:
        title: the title.
        x: the label of the keys.
        y: the label of the values.
        columns: the lines.
        dashed: the names of columns that were predicted or claimed, not measured.
        log: the logarithmic axes, such as "x" or "xy".
    """
    lines = [
        Series(name, [float(x) for x in column], [float(y) for y in column.values()], name in dashed)
        for name, column in columns.items()
    ]
    return Plot(title, x, y, lines, log_x="x" in log, log_y="y" in log)
