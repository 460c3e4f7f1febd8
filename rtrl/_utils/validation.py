"""Check values that a user passes, before anything is built from them."""

import math
from collections.abc import Iterable
from typing import Any, TypeVar

from rtrl.errors import ConfigError

T = TypeVar("T")


def integer(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """Return the value if it is an integer in the range ``least`` … ``most``; None leaves a side open.

    Raises:
        ConfigError: it is not an integer, or out of range.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and (least is None or value >= least) and (most is None or value <= most):
        return int(value)
    if most is not None:
        expected = f"an integer in {least} … {most}"
    elif least == 1:
        expected = "a positive integer"
    else:
        expected = "an integer" if least is None else f"an integer of at least {least}"
    raise ConfigError(f"{name} must be {expected}, got {value!r}")


def positive(name: str, value: Any) -> float:
    """Return the value if it is a finite number above 0.

    Raises:
        ConfigError: it is not.
    """
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """Return the value if it is a number in 0 … 1.

    Raises:
        ConfigError: it is not.
    """
    if not _is_number(value) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a number in 0 … 1, got {value!r}")
    return float(value)


def choice(name: str, value: T, options: Iterable[T]) -> T:
    """Return the value of an argument if it is one of its options.

    Raises:
        ConfigError: it is not; the message lists the options.
    """
    options = list(options)
    if value not in options:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def known(kind: str, name: str, names: Iterable[str]) -> str:
    """Return the name if something of this kind (in a word: "task") has it.

    Raises:
        ConfigError: nothing has this name; the message lists the names there are.
    """
    names = list(names)
    if name not in names:
        raise ConfigError(f"there is no {kind} {name!r}; there are: {', '.join(names)}")
    return name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
