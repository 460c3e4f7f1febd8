"""Numbers that a user gives, checked before anything is built from them."""

import math
from typing import Any

from rtrl.errors import ConfigError


def integer(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """The value, if it is an integer of at least ``least`` and at most ``most``.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"in {least} … {most}"
        raise ConfigError(f"{name} must be an integer {wanted}, got {value!r}")
    return value


def positive(name: str, value: Any) -> float:
    """The value, if it is a finite number above 0.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)
