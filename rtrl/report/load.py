"""Read and validate a results file of ``rtrl verify --json``: nothing is drawn or written before all of it is sound.

The fields of the model say what the file must hold. Numbers that were not finite stand in the file as null; here they
are None, and a line has a gap there.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from rtrl.errors import ConfigError
from rtrl.report.model import SCHEMA, Cell, ClaimResult, Record, Series, Table

READABLE = (1, SCHEMA)
OLDER = {"result": "figure", "tables": "grids"}  # the names of form 1
REQUIRED = {"condition", "failures", "tables", "plots"}  # although the model has defaults for them
_UNFIT = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
LARGEST_FILE = 2**28  # bytes; results of all claims take a few millions
LARGEST = 1e300  # of a number: what is beyond leaves no room for the margins of an axis


def load_record(path: Path) -> Record:
    """Read the record in a results file.

    Args:
        path: a file that ``rtrl verify --json`` wrote.

    Returns:
        The whole record, validated.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or a field is missing or of the wrong kind; the message
            names the field and what was expected there.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
        content = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a JSON file: {error}; make one with rtrl verify --json {path}") from error
    return record(content, str(path))


def record(content: object, name: str = "results") -> Record:
    """Read the record in what was read from JSON.

    Args:
        content: the decoded JSON.
        name: what messages call it.

    Returns:
        The whole record, validated.

    Raises:
        ConfigError: a field is missing or of the wrong kind, as for :func:`load_record`.
    """
    schema = _field(content, "schema", name)
    if isinstance(schema, bool) or schema not in READABLE:
        expected = " or ".join(map(str, READABLE))
        _refuse(schema, f"{name}: schema", f"{expected}, the forms that this version of rtrl reads")
    found: Record = _dataclass(Record, content, name)
    return found


def _refuse(value: object, where: str, expected: str) -> NoReturn:
    shown = repr(value)
    raise ConfigError(f"{where}: expected {expected}, found {shown if len(shown) <= 60 else f'{shown[:57]}...'}")


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if ": " in where else f"{where}: {name}"


def _field(value: object, name: str, where: str) -> Any:
    if not isinstance(value, dict):
        _refuse(value, where, f"an object with a field {name!r}")
    if name not in value:
        raise ConfigError(f"{where}: the field {name!r} is missing; write the file with rtrl verify --json")
    return value[name]


def _dataclass(cls: Any, value: object, where: str) -> Any:
    """The object of the model whose fields stand in ``value``; those with a default may be left out."""
    kinds, found = get_type_hints(cls), {}
    for field in fields(cls):
        name, older = field.name, OLDER.get(field.name, field.name)
        if isinstance(value, dict) and name not in value:
            has_default = field.default is not MISSING or field.default_factory is not MISSING
            if older in value:
                name = older
            elif has_default and name not in REQUIRED:
                continue
        found[field.name] = _value(kinds[field.name], _field(value, name, where), _inside(where, name))
    made = cls(**found)
    _check(made, where)
    return made


def _value(kind: Any, value: Any, where: str) -> Any:
    """``value``, if it is of the kind that the model names."""
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            _refuse(value, where, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (list, Sequence):
        if not isinstance(value, list):
            _refuse(value, where, "a list")
        return [_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    return _READERS[kind](value, where)


def _check(made: object, where: str) -> None:
    """What the kinds of the fields do not say."""
    if isinstance(made, Table):
        for i, row in enumerate(made.rows):
            if len(row) != len(made.columns):
                _refuse(row, _inside(where, f"rows[{i}]"), f"a list of {len(made.columns)} cells, one per column")
    elif isinstance(made, Series):
        for name, values in (("y", made.y), ("low", made.low), ("high", made.high)):
            if len(values) != len(made.x) and (name == "y" or made.low or made.high):
                _refuse(values, _inside(where, name), f"as many numbers as x has, {len(made.x)}, not {len(values)}")
    elif isinstance(made, ClaimResult):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", made.id):
            _refuse(made.id, _inside(where, "id"), "an id of letters, digits, _ and -, for it names files and sections")
        if made.measured:
            _check_time(made.measured, _inside(where, "measured"))
        if not set(made.noticed) <= set(made.tried):
            _refuse(made.noticed, _inside(where, "noticed"), "names that are among those of tried")
    elif isinstance(made, Record):
        _check_time(made.created, _inside(where, "created"))
        if not made.claims:
            _refuse(made.claims, _inside(where, "claims"), "at least one claim")
        ids = [claim.id.casefold() for claim in made.claims]
        for i, claim in enumerate(made.claims):
            if ids[i] in ids[:i]:
                raise ConfigError(f"{where}: two claims are called {claim.id!r}; ids must differ, not only in case")


def _check_time(value: str, where: str) -> None:
    try:
        datetime.fromisoformat(value)
    except ValueError:
        _refuse(value, where, "a time such as 2026-01-31T12:00:00+00:00")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        _refuse(value, where, "a text")
    # No document can hold control characters and halves of pairs; the colours of a terminal leave nothing behind. What
    # turns the direction of writing could make one text look like another.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", value)
    return re.sub(_UNFIT, "\ufffd", plain.replace("\r\n", "\n"))


def _only(kind: type, expected: str) -> Callable[[object, str], Any]:
    def read(value: object, where: str) -> Any:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            _refuse(value, where, expected)
        return value

    return read


def _number(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(value, where, "a number or null")
    if not -LARGEST <= value <= LARGEST:  # before float(), for which a long whole number is too large
        _refuse(value, where, f"a number of at most {LARGEST:.0e}")
    return value


def _cell(value: object, where: str) -> Cell:
    if isinstance(value, str):
        return _text(value, where)
    return value if isinstance(value, bool) else _number(value, where)


_object = _only(dict, "an object")


def _entries(value: object, where: str) -> dict[str, Cell]:
    """Names and plain values; what is nested is written as JSON."""
    return {
        name: _cell(
            json.dumps(item, ensure_ascii=False) if isinstance(item, (dict, list)) else item, f"{where}.{name[:60]}"
        )
        for name, item in ((_text(name, where), item) for name, item in _object(value, where).items())
    }


_READERS: dict[Any, Callable[[object, str], Any]] = {
    str: _text,
    bool: _only(bool, "true or false"),
    int: _only(int, "a whole number"),
    float | None: _number,
    Cell: _cell,
    dict[str, Cell]: _entries,
    dict[str, Any]: _object,
}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON; null stands for it")
