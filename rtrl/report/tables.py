"""Tables of a record, and their cells as text: the run, and the numbers behind a picture."""

from collections.abc import Sequence
from datetime import datetime

from rtrl._utils.formatting import duration, number, show_bytes
from rtrl.report.draw import axis_text, runs, spacing
from rtrl.report.model import VERDICTS, Cell, ClaimResult, Plot, Record, Table

LONG = 12  # rows that a table may have in the open
ROWS = 200  # of a table of numbers behind a picture; the results file has them all

SIGNS = {
    "holds": "✓",
    "holds when": "◐",
    "does not hold": "✗",
    "not measured at the claimed size": "◔",
    "not measured": "○",
}


def numbers(plot: Plot) -> tuple[Table, str]:
    """The numbers behind a picture, and a note on what was left out, if anything was.

    A line plot has one row per x and one column per series, a raster one row per unbroken run; else a row is a point.
    """
    if plot.kind == "raster" and all(y is None or y == int(y) for series in plot.series for y in series.y):
        rows: list[list[Cell]] = [
            [series.name, _named(y, plot.y_names), _span(begin, end, plot)]
            for i, series in enumerate(plot.series)
            for y, begin, end in runs(plot, i)
        ]
        table = Table(
            plot.title, ["series", plot.y_label, f"{plot.x_label}, in steps of {number(spacing(plot))}"], rows
        )
    elif plot.kind != "raster" and all(len(set(series.x)) == len(series.x) for series in plot.series):
        names, columns = [], []
        for s in plot.series:
            names.append(f"{s.name} (predicted)" if s.dashed else s.name)
            columns.append(dict(zip(s.x, s.y, strict=True)))
            for what, ends in (("low", s.low), ("high", s.high)):
                if ends:
                    names.append(f"{s.name}, {what}")
                    columns.append(dict(zip(s.x, ends, strict=True)))
        xs = sorted({x for column in columns for x in column if x is not None})
        rows = [[_named(x, plot.x_names), *(column.get(x) for column in columns)] for x in xs]
        table = Table(plot.title, [plot.x_label, *names], rows)
    else:
        points = [[s.name, x, y] for s in plot.series for x, y in zip(s.x, s.y, strict=True)]
        table = Table(plot.title, ["series", plot.x_label, plot.y_label], points)
    every = -(-len(table.rows) // ROWS)
    if every <= 1:
        return table, ""
    note = f"One row in {every} of {len(table.rows)}; the results file has them all."
    return Table(table.title, table.columns, table.rows[::every]), note


def _named(value: float, names: Sequence[str]) -> Cell:
    return axis_text(value, names) if names else value


def _span(begin: float, end: float, plot: Plot) -> str:
    first, last = (axis_text(x, plot.x_names) for x in (begin, end))
    return first if begin == end else f"{first} – {last}"


TRUST = (
    "A results file is a statement of who made it: nothing in it proves that it was measured. To check it, run the "
    "command with the same code, and compare."
)


def run(record: Record, installed: str = "") -> list[tuple[str, str]]:
    """How, when and where the record was made: names and texts; ``installed`` is a digest that its code is held to."""
    when = datetime.fromisoformat(record.created)
    zone = when.tzname() or ""
    return [
        ("command", record.command),
        ("measured", f"{when:%Y-%m-%d %H:%M} {zone}".strip() if "T" in record.created else record.created),
        *([] if record.duration_s is None else [("took", duration(record.duration_s))]),
        ("form", f"{record.mode}, seed {record.seed}"),
        *(
            (name.replace("_bytes", "").replace("_", " "), _entry(name, value))
            for name, value in record.machine.items()
        ),
        (
            "versions",
            ", ".join(f"{name} {cell(value)}" for name, value in record.versions.items() if value is not None),
        ),
        *([("code", _code(record.code, installed))] if record.code or installed else []),
    ]


def _code(measured: str, installed: str) -> str:
    """The digest of the code that was measured, and whether it is that of the code here."""
    if not measured:
        return "unknown: the file has no digest of the code that was measured"
    same = "the code that is installed here" if measured == installed else f"not the code installed here, {installed}"
    return f"{measured} ({same})" if installed else measured


def _entry(name: str, value: Cell) -> str:
    if value is None:
        return "unknown"
    return show_bytes(float(value)) if name.endswith("_bytes") and isinstance(value, (int, float)) else cell(value)


def summary(record: Record) -> str:
    """How many claims came to what, and how many failures there are: "12 claims: 9 hold, 2 hold when …"."""
    failed = sum(len(claim.failures) for claim in record.claims)
    text = f"{tally(record.claims)}."
    return text + f" {failed} failure{'s' * (failed > 1)}: the code does not do what it says." * bool(failed)


def tally(claims: Sequence[ClaimResult]) -> str:
    """How many claims came to what."""
    plural = {"holds": "hold", "holds when": "hold when a condition is met", "does not hold": "do not hold"}
    counts = [(verdict, sum(claim.verdict == verdict for claim in claims)) for verdict in VERDICTS]
    parts = [f"{n} {plural.get(verdict, verdict) if n > 1 else verdict}" for verdict, n in counts if n]
    parts = [part.replace("1 holds when", "1 holds when a condition is met") for part in parts]
    return f"{len(claims)} claim{'s' * (len(claims) > 1)}: {', '.join(parts)}"


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
    """For every column, whether it holds numbers alone, to be set flush right."""
    return [
        any(is_number(row[i]) for row in rows) and all(row[i] is None or is_number(row[i]) for row in rows)
        for i in range(len(columns))
    ]
