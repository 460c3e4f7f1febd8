"""Numbers of bytes and multiply-adds as people write them."""

import re

from rtrl.errors import ConfigError

_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str) -> int:
    """A number of bytes: ``512MiB`` and ``512M`` are 512·2²⁰, ``512MB`` is 512·10⁶.

    Raises:
        ConfigError: it is none, or not positive.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 kB"), parse_bytes("2000")
    (4294967296, 1500, 2000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{text!r} is no number of bytes; write 4GiB, 512MB or 1000000")
    decimal = found[4] and found[2] and not found[3]
    size = int(float(found[1]) * (_DECIMAL if decimal else _BINARY)[found[2].lower()])
    if size < 1:
        raise ConfigError(f"{text!r} must be at least one byte")
    return size


def show_bytes(size: float) -> str:
    """In binary units, three digits.

    >>> show_bytes(4294967296), show_bytes(2000), show_bytes(12)
    ('4.00 GiB', '1.95 KiB', '12 B')
    """
    return _shown(size, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])


def show_count(count: float) -> str:
    """In decimal units, three digits.

    >>> show_count(9750000000000.0), show_count(640)
    ('9.75 T', '640')
    """
    return _shown(count, 1000, ["", "k", "M", "G", "T", "P", "E"]).rstrip()


def show_seconds(seconds: float) -> str:
    """In s, ms, µs or ns, or hours and days where it is long; three digits.

    >>> show_seconds(0.00123), show_seconds(7200)
    ('1.23 ms', '2.00 h')
    """
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e9)} ns"


def _shown(value: float, step: int, units: list[str]) -> str:
    power = 0
    while value >= step * (1 - 0.0005) and power < len(units) - 1:
        value, power = value / step, power + 1
    if not power:
        return f"{int(value) if value == int(value) else _digits(value)} {units[0]}"
    return f"{_digits(value)} {units[power]}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
