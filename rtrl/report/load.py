"""A results file of ``rtrl verify --json``, read and validated: nothing is drawn or written before all of it is sound.

Numbers that were not finite stand in the file as null; here they are None, and a line has a gap there.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from rtrl.errors import ConfigError
from rtrl.report.model import SCHEMA, VERDICTS, Cell, ClaimResult, Plot, Record, Series, Table

READABLE = (1, SCHEMA)  # form 1 says "figure" and "grids" for "result" and "tables"
KINDS: tuple[Literal["line", "raster"], ...] = ("line", "raster")
LARGEST = 1e300  # of a number: what is beyond leaves no room for the margins of an axis
SMALLEST_LOG = 1e-250  # on a logarithmic axis, for the same reason; its inverse is the largest

T = TypeVar("T")


def load_record(path: Path) -> Record:
    """The record in a results file.

    Raises:
        ConfigError: there is no such file, it is no JSON, or a field is missing or of the wrong kind; the message names
            the field and what was expected there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON file: {error}; make one with rtrl verify --json {path}") from error
    return record(content, str(path))


def record(content: object, name: str = "results") -> Record:
    """The record in what was read from JSON; ``name`` is what messages call it.

    Raises:
        ConfigError: as of :func:`load_record`.
    """
    whole = _Field(content, name)
    schema = whole.get("schema")
    if isinstance(schema.value, bool) or schema.value not in READABLE:
        schema.refuse(f"{' or '.join(map(str, READABLE))}, the forms that this version of rtrl reads")
    claims = whole.get("claims").items(_claim)
    if not claims:
        whole.get("claims").refuse("at least one claim")
    seen: dict[str, str] = {}
    for claim in claims:
        twin = seen.setdefault(claim.id.casefold(), claim.id)
        if twin is not claim.id:
            raise ConfigError(f"{name}: two claims are called {claim.id!r}; ids must differ, not only in case")
    return Record(
        created=whole.get("created").time(),
        command=whole.get("command").text(),
        mode=whole.get("mode").text(),
        seed=whole.get("seed").integer(),
        machine=whole.get("machine").entries(),
        versions=whole.get("versions").entries(),
        duration_s=whole.get("duration_s").number(),
        claims=claims,
        device=whole.get("device").text() if whole.has("device") else "cpu",
    )


class _Field:
    """A value of the file and where it stands, so that a refusal can say so."""

    def __init__(self, value: object, where: str) -> None:
        self.value = value
        self.where = where

    def refuse(self, expected: str) -> NoReturn:
        shown = repr(self.value)
        found = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ConfigError(f"{self.where}: expected {expected}, found {found}")

    def has(self, name: str) -> bool:
        return isinstance(self.value, dict) and name in self.value

    def get(self, name: str, older: str | None = None) -> "_Field":
        if not isinstance(self.value, dict):
            self.refuse(f"an object with a field {name!r}")
        if older is not None and older in self.value and name not in self.value:
            name = older
        if name not in self.value:
            raise ConfigError(f"{self.where}: the field {name!r} is missing; write the file with rtrl verify --json")
        return _Field(self.value[name], f"{self.where}: {name}" if ": " not in self.where else f"{self.where}.{name}")

    def items(self, read: Callable[["_Field"], T]) -> list[T]:
        if not isinstance(self.value, list):
            self.refuse("a list")
        return [read(_Field(item, f"{self.where}[{i}]")) for i, item in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.refuse("a text")
        # No document can hold control characters and halves of pairs; the colours of a terminal leave nothing behind.
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self.value)
        return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", plain.replace("\r\n", "\n"))

    def one_of(self, allowed: tuple[T, ...]) -> T:
        if self.value not in allowed:
            self.refuse(f"one of {', '.join(map(repr, allowed))}")
        return allowed[allowed.index(self.value)]

    def name(self) -> str:
        text = self.text()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", text):
            self.refuse("an id of letters, digits, _ and -, for it names files and sections")
        return text

    def time(self) -> str:
        text = self.text()
        try:
            datetime.fromisoformat(text)
        except ValueError:
            self.refuse("a time such as 2026-01-31T12:00:00+00:00")
        return text

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value

    def integer(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.refuse("a whole number")
        return self.value

    def number(self) -> float:
        value = self.number_or_none()
        if value is None:
            self.refuse("a number")
        return value

    def number_or_none(self) -> float | None:
        if self.value is None:
            return None
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.refuse("a number or null")
        if not -LARGEST <= self.value <= LARGEST:  # before float(), for which a long whole number is too large
            self.refuse(f"a number of at most {LARGEST:.0e}")
        return self.value

    def cell(self) -> Cell:
        if isinstance(self.value, str):
            return self.text()
        return self.value if isinstance(self.value, bool) else self.number_or_none()

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return self.value

    def entries(self) -> dict[str, Cell]:
        """Names and plain values; what is nested is written as JSON."""
        return {
            _Field(name, self.where).text(): _Field(
                json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value,
                f"{self.where}.{name}",
            ).cell()
            for name, value in self.mapping().items()
        }


def _claim(field: _Field) -> ClaimResult:
    return ClaimResult(
        id=field.get("id").name(),
        claimed=field.get("claimed").text(),
        result=field.get("result", "figure").text(),
        threshold=field.get("threshold").text(),
        verdict=field.get("verdict").one_of(VERDICTS),
        condition=field.get("condition").text(),
        failures=field.get("failures").items(_Field.text),
        tables=field.get("tables", "grids").items(_table),
        plots=field.get("plots").items(_plot),
        data=field.get("data").mapping() if field.has("data") else {},
        explanation=field.get("explanation").text() if field.has("explanation") else "",
        duration_s=field.get("duration_s").number_or_none() if field.has("duration_s") else None,
    )


def _table(field: _Field) -> Table:
    columns = field.get("columns").items(_Field.text)

    def row(line: _Field) -> list[Cell]:
        cells = line.items(_Field.cell)
        if len(cells) != len(columns):
            line.refuse(f"a list of {len(columns)} cells, one a column")
        return cells

    return Table(field.get("title").text(), columns, field.get("rows").items(row))


def _plot(field: _Field) -> Plot:
    return Plot(
        title=field.get("title").text(),
        x_label=field.get("x_label").text(),
        y_label=field.get("y_label").text(),
        series=field.get("series").items(_series),
        kind=field.get("kind").one_of(KINDS) if field.has("kind") else "line",
        log_x=field.get("log_x").flag() if field.has("log_x") else False,
        log_y=field.get("log_y").flag() if field.has("log_y") else False,
    )


def _series(field: _Field) -> Series:
    x, y = (field.get(axis).items(_Field.number_or_none) for axis in "xy")
    if len(x) != len(y):
        field.get("y").refuse(f"as many numbers as x has, {len(x)}, not {len(y)}")
    dashed = field.get("dashed").flag() if field.has("dashed") else False
    return Series(field.get("name").text(), x, y, dashed)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON; null stands for it")


def drawn(plot: Plot, series: Series) -> list[tuple[float, float]]:
    """The points that the axes have room for: both numbers are there, and above 0 where an axis is logarithmic."""
    return [
        (x, y)
        for x, y in zip(series.x, series.y, strict=True)
        if x is not None and y is not None and _fits(x, plot.log_x) and _fits(y, plot.log_y)
    ]


def left_out(plot: Plot) -> int:
    """How many measured points a logarithmic axis has no room for."""
    present = sum(x is not None and y is not None for s in plot.series for x, y in zip(s.x, s.y, strict=True))
    return present - sum(len(drawn(plot, series)) for series in plot.series)


def _fits(value: float, log: bool) -> bool:
    return not log or SMALLEST_LOG <= value <= 1 / SMALLEST_LOG
