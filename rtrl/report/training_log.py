"""Read and validate a log of ``rtrl train``: a line of JSON with the settings of the run, then one per row."""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rtrl.errors import ConfigError
from rtrl.report.load import LARGEST, _entries, _text
from rtrl.report.model import Cell

COLUMNS = ("step", "loss", "score", "bytes_held", "steps_per_s")
NOT_SETTINGS = ("event", "run", "measure", "chance", "solved")  # of the first line
LONGEST = 2**20  # bytes of a line


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """The log of one training run.

    Attributes:
        name: the name of the file, without its ending.
        settings: the settings of the run by name; an option as "learner block".
        measure: what the score is: "accuracy", or another measure of the task.
        chance: the score of guessing.
        solved: the score from which the task counts as solved.
        columns: the rows by column: "step", "loss", "score", "bytes_held", "steps_per_s"; NaN where a row has none.
        incomplete: whether the last line is not whole, as while a run is writing it.
    """

    name: str
    settings: dict[str, Cell]
    measure: str
    chance: float
    solved: float
    columns: dict[str, "array[float]"] = field(repr=False)
    incomplete: bool = False

    def __len__(self) -> int:
        return len(self.columns["step"])


def is_training_log(path: Path) -> bool:
    """Tell a log of ``rtrl train`` from a results file.

    Args:
        path: the file.

    Returns:
        Whether its name ends in ".jsonl", or its first line is the first line of a log.
    """
    if path.suffix == ".jsonl":
        return True
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline(LONGEST))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.get("event") == "start"


def load_training_log(path: Path) -> TrainingLog:
    """Read a log that ``rtrl train`` wrote.

    Args:
        path: the file. A last line that is not whole is left out: a run may be writing it.

    Returns:
        The whole log, validated.

    Raises:
        ConfigError: the file cannot be read, or a line is not what it must be; the message names the line, and what was
            expected there.
    """
    try:
        with path.open("rb") as file:
            lines = iter(enumerate(iter(lambda: file.readline(LONGEST), b""), 1))
            return _read(lines, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _read(lines: Iterator[tuple[int, bytes]], path: Path) -> TrainingLog:
    _, first = next(lines, (1, b""))
    where = f"{path}, line 1"
    start = _object(first, where)
    if start.get("event") != "start":
        _refuse(where, "the settings of a run, as rtrl train writes them", first)
    chance, solved = (_number(start, name, where) for name in ("chance", "solved"))
    measure = _text(start.get("measure"), f"{where}: measure")
    settings = _entries(_flat({name: value for name, value in start.items() if name not in NOT_SETTINGS}), where)
    columns = {name: array("d") for name in COLUMNS}
    incomplete = False
    before = 0.0
    for number, line in lines:
        if not line.endswith(b"\n") and len(line) < LONGEST:
            incomplete = True
            break
        where = f"{path}, line {number}"
        row = _object(line, where)
        step = _number(row, "step", where)
        if step <= before or step != int(step):
            _refuse(f"{where}: step", f"a whole number above {before:.0f}, that of the row before", row["step"])
        before = step
        for name in COLUMNS:
            columns[name].append(step if name == "step" else _number(row, name, where, may_lack=True))
    return TrainingLog(_text(path.stem, where), settings, measure, chance, solved, columns, incomplete)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with each option by itself: "learner block" for {"learner_options": {"block": 8}}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        options = value if name.endswith("_options") and isinstance(value, dict) else None
        found |= {name: value} if options is None else {f"{name[:-8]} {key}": one for key, one in options.items()}
    return found


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        _refuse(where, "an object in JSON", line)
    return found


def _number(row: dict[str, Any], name: str, where: str, *, may_lack: bool = False) -> float:
    """A finite number; NaN for null or nothing where a row may lack it."""
    value = row.get(name)
    if value is None and may_lack:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        _refuse(f"{where}: {name}", f"a number of at most {LARGEST:.0e}{' or null' if may_lack else ''}", value)
    return float(value)


def _refuse(where: str, expected: str, value: object) -> NoReturn:
    shown = repr(value)
    raise ConfigError(f"{where}: expected {expected}, found {shown if len(shown) <= 60 else f'{shown[:57]}...'}")
