"""Numbers and cells as people read them: 0.0123, 82.3, 131 072, 1.2·10⁹."""

from rtrl.report.load import Cell

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SPACE = "\u202f"  # narrow, and no line breaks at it


def number(value: float, digits: int = 4, whole: float = 1e7) -> str:
    """``value`` to ``digits`` significant digits; whole numbers below ``whole`` in full."""
    if value == int(value) and abs(value) < whole:
        text = f"{int(abs(value)):,}".replace(",", SPACE) if abs(value) >= 1e4 else str(int(abs(value)))
    elif 1e-3 <= abs(value) < 1e5:
        text = f"{abs(value):.{digits}g}" if abs(value) < 10**digits else f"{abs(value):.0f}"
    else:
        mantissa, power = f"{abs(value):.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        raised = f"10{str(int(power)).translate(_RAISED)}"
        text = raised if mantissa == "1" else f"{mantissa}·{raised}"
    return f"−{text}" if value < 0 else text


def cell(value: Cell) -> str:
    """A cell of a table; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value)


def is_number(value: Cell) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numeric(columns: list[str], rows: list[list[Cell]]) -> list[bool]:
    """Of every column, whether it holds numbers alone, to be set flush right."""
    return [
        any(is_number(row[i]) for row in rows) and all(row[i] is None or is_number(row[i]) for row in rows)
        for i in range(len(columns))
    ]


def bytes_text(value: float) -> str:
    """A number of bytes: 23.5 GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{value / 2**power:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """A time: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
