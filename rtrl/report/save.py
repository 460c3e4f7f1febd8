"""Format a record as the text of a results file."""

import json
import math
from dataclasses import asdict
from typing import Any

from rtrl.report.model import SCHEMA, Record


def to_json(record: Record) -> str:
    """Format the record as the text of a results file.

    Args:
        record: the results.

    Returns:
        JSON that :func:`load_record` reads, with a line feed at its end.
    """
    content = plain({"schema": SCHEMA, **asdict(record)})
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Convert containers to plain JSON values: tuples to lists, numbers that are not finite to None.

    Args:
        value: dicts, lists, tuples, texts, booleans, numbers and None, nested as you like.

    Returns:
        The same values, fit for ``json.dumps(..., allow_nan=False)``.

    Raises:
        TypeError: another type is among them; convert it first.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise TypeError(f"{type(value).__name__} is not a plain JSON value: {value!r}")
