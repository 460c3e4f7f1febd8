"""Format numbers, bytes, counts, times and exceptions for people, and read sizes that people write."""

import re

from rtrl.errors import ConfigError

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_THIN_SPACE = "\u202f"  # no line breaks at it
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str) -> int:
    """Read a number of bytes: ``512MiB`` and ``512M`` are 512·2²⁰, ``512MB`` is 512·10⁶.

    Raises:
        ConfigError: it is not, or is below one byte.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 kB"), parse_bytes("2000")
    (4294967296, 1500, 2000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{text!r} is not a number of bytes; write 4GiB, 512MB or 1000000")
    decimal = found[4] and found[2] and not found[3]
    size = int(float(found[1]) * (_DECIMAL if decimal else _BINARY)[found[2].lower()])
    if size < 1:
        raise ConfigError(f"{text!r} must be at least one byte")
    return size


def number(value: float, digits: int = 4, whole: float = 1e7) -> str:
    """Format ``value`` to ``digits`` significant digits; whole numbers below ``whole`` in full.

    >>> number(0.01234567), number(131072), number(1.2e9), number(-3)
    ('0.01235', '131\u202f072', '1.2·10⁹', '−3')
    """
    if value == int(value) and abs(value) < whole:
        text = f"{int(abs(value)):,}".replace(",", _THIN_SPACE) if abs(value) >= 1e4 else str(int(abs(value)))
    elif 1e-3 <= abs(value) < 1e5:
        text = f"{abs(value):.{digits}g}" if abs(value) < 10**digits else f"{abs(value):.0f}"
    else:
        mantissa, power = f"{abs(value):.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        raised = f"10{str(int(power)).translate(_SUPERSCRIPT)}"
        text = raised if mantissa == "1" else f"{mantissa}·{raised}"
    return f"−{text}" if value < 0 else text


def show_bytes(size: float) -> str:
    """Format a number of bytes in binary units, to three digits.

    >>> show_bytes(4294967296), show_bytes(2000), show_bytes(12)
    ('4.00 GiB', '1.95 KiB', '12 B')
    """
    return _scaled(size, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])


def show_count(count: float) -> str:
    """Format a count in decimal units, to three digits.

    >>> show_count(9750000000000.0), show_count(640)
    ('9.75 T', '640')
    """
    return _scaled(count, 1000, ["", "k", "M", "G", "T", "P", "E"]).rstrip()


def show_seconds(seconds: float) -> str:
    """Format a time in one unit from nanoseconds to days, to three digits.

    >>> show_seconds(0.00123), show_seconds(7200)
    ('1.23 ms', '2.00 h')
    """
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e9)} ns"


def duration(seconds: float) -> str:
    """Format how long something took, as a clock would show it.

    >>> duration(0.41), duration(12), duration(185), duration(7800)
    ('0.4 s', '12 s', '3 min 5 s', '2 h 10 min')
    """
    whole = round(seconds)
    if seconds < 10 or whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _scaled(value: float, factor: int, units: list[str]) -> str:
    power = 0
    while abs(value) >= factor * (1 - 0.0005) and power < len(units) - 1:
        value, power = value / factor, power + 1
    text = str(int(value)) if not power and value == int(value) else _digits(value)
    return f"{text} {units[power]}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def first_line(error: Exception) -> str:
    """The type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
