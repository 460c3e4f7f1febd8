"""What a fuzzer calls with bytes: each makes a file or a declaration of them, and raises if an error has no name.

The bytes choose edits of a sound example, so that most inputs get beyond the first check.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reliability.damage import as_file, at, content_of, hostile, places
from torch import Tensor

from rtrl.cells import Sparsity
from rtrl.cells.protocol import check_sparsity
from rtrl.errors import RTRLError
from rtrl.report.load import record
from rtrl.report.training_log import load_training_log
from rtrl.training.logs import JsonLines


def check(fits: bool) -> None:
    assert fits, "a message has what a terminal acts on, or advises to load what could run code"


class Choices:
    """Numbers taken from bytes, as a stand-in for random draws; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def below(self, count: int) -> int:
        taken = self._data[self._at : self._at + 2]
        self._at += 2
        return int.from_bytes(taken, "little") % max(count, 1)

    def rest(self) -> bytes:
        taken, self._at = self._data[self._at :], len(self._data)
        return taken

    # the parts of random.Random that ``hostile`` uses
    def randrange(self, count: int) -> int:
        return self.below(count)


def edited(example: Any, places_of: list[tuple[Any, ...]], choices: Choices) -> Any:
    """An example with as many parts changed as the bytes last for, at most four."""
    changed = example
    for _ in range(1 + min(choices.left // 4, 3)):
        path = places_of[choices.below(len(places_of))]
        try:
            values = hostile(at(changed, path), choices)  # type: ignore[arg-type]
            values = [value for value in values if not isinstance(value, Tensor)]  # which JSON does not have
            changed = replaced(changed, path, values[choices.below(len(values))])
        except (KeyError, IndexError, TypeError):
            continue  # an earlier edit took it away
    return changed


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A tree with another value at a place; the tree itself stays as it is."""
    if not path:
        return value
    copied = tree.copy() if isinstance(tree, dict) else [*tree]
    copied[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tuple(copied) if isinstance(tree, tuple) else copied


_MACHINE = {"cpu": "A processor", "cores": 2, "threads": 1, "memory_bytes": 2**34, "os": "Linux", "gpu": None}
_PLOT = {
    "title": "Memory",
    "x_label": "T, steps",
    "y_label": "bytes",
    "kind": "line",
    "log_x": True,
    "log_y": True,
    "series": [{"name": "rtrl", "x": [10, 100], "y": [5e5, None], "dashed": False}],
}
_CLAIM = {
    "id": "memory",
    "claimed": "less",
    "result": "3 ×",
    "threshold": "≥ 2 ×",
    "verdict": "holds",
    "condition": "",
    "failures": [],
    "duration_s": 1.5,
    "data": {"free": [1, {"form": None}]},
    "explanation": "*It* is\n\n- one",
    "tables": [{"title": "Costs", "columns": ["side", "H"], "rows": [["rtrl", 16], ["dense", None]]}],
    "plots": [_PLOT],
    "question": "memory",
    "tried": ["leak", "truncate"],
    "noticed": ["leak"],
}
_RECORD = {
    "schema": 2,
    "created": "2026-01-31T12:00:00+00:00",
    "command": "rtrl verify",
    "mode": "quick",
    "seed": 0,
    "machine": _MACHINE,
    "versions": {"rtrl": "0.1.0", "torch": "2.13.0", "commit": None},
    "duration_s": 75.0,
    "code": "0123456789abcdef",
    "claims": [_CLAIM],
}
_RECORD_PLACES = [*places(_RECORD)]


def results(data: bytes) -> None:
    """A results file."""
    choices = Choices(data)
    content: Any = edited(_RECORD, _RECORD_PLACES, choices) if choices.below(8) else _decoded(choices.rest())
    try:
        record(content)
    except RTRLError as error:
        check("\033" not in str(error))


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


_START = {
    "event": "start",
    "run": "a" * 32,
    "task": "anbn",
    "task_options": {},
    "learner": "block",
    "measure": "accuracy",
}
_START |= {
    "learner_options": {},
    "cell": "gru",
    "cell_options": {"hidden": 2},
    "seed": 0,
    "chance": 0.5,
    "solved": 0.99,
}
_ROWS = [{"step": 5 * i, "loss": 0.5 / i, "score": 0.5, "bytes_held": 100 * i, "steps_per_s": 3.5} for i in range(1, 6)]
_LOG = [_START, *_ROWS]
_LOG_PLACES = [*places(_LOG)]
_FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def log(data: bytes) -> None:
    """The log of a run: shown, and continued."""
    choices = Choices(data)
    after, cut = choices.below(30), choices.below(400)
    lines = edited(_LOG, _LOG_PLACES, choices)
    text = b"\n".join(_encoded(line) for line in (lines if isinstance(lines, list) else [lines])) + b"\n"
    if cut < len(text) and cut % 3 == 0:
        text = text[:cut] + choices.rest() + text[cut + 5 :]
    path = Path(_FOLDER.name, "run.jsonl")
    path.write_bytes(text)
    try:
        load_training_log(path)
    except RTRLError as error:
        check("\033" not in str(error))
    try:
        continued = JsonLines(path, _START, after)
    except RTRLError:
        assert path.read_bytes() == text, "a refused log was changed"
        return
    continued.close()
    first, *kept = path.read_bytes().split(b"\n")[:-1]
    assert text.startswith(first) and json.loads(first)["run"] == _START["run"]
    assert all(line in text and json.loads(line)["step"] <= after for line in kept)


def _encoded(value: Any) -> bytes:
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError):
        return b"?"


_SMALL = {"a": torch.arange(3.0), "b": {"c": [1, None, "x", (True, 2.5)], 3: torch.ones(2, dtype=torch.bool)}}
_ARCHIVE = as_file(_SMALL)


def checkpoint(data: bytes) -> None:
    """A file of content: its bytes changed, with a right digest as somebody writes it who means harm."""
    choices, changed = Choices(data), bytearray(_ARCHIVE[:-44])  # without the digest
    for _ in range(1 + choices.below(4)):
        place = choices.below(len(changed))
        kind = choices.below(4)
        if kind == 0:
            changed[place] ^= 1 << choices.below(8)
        elif kind == 1:
            changed[place] = choices.below(256)
        elif kind == 2:
            del changed[place : place + choices.below(40)]
        else:
            changed[place:place] = bytes(choices.below(256) for _ in range(choices.below(9)))
        if not changed:
            return
    total = hashlib.sha256(bytes(changed) + b"\0\0").digest()
    try:
        content = content_of(bytes(changed) + (44).to_bytes(2, "little") + b"rtrl sha256 " + total)
    except RTRLError as error:
        check("weights_only" not in str(error))
        return
    as_file({"content": content})  # what was loaded is plain


_STATE, _NAMED = torch.zeros(2, 3, 2), {"w": torch.zeros(4, 2), "s": torch.zeros(())}


def sparsity(data: bytes) -> None:
    """What a cell declares."""
    choices = Choices(data)
    declared = Sparsity(_index(choices), _index(choices), _active(choices))
    try:
        check_sparsity(declared, _STATE, _NAMED)
    except RTRLError:
        return
    for index, size in ((declared.reads, 3), (declared.writes, 3), *((v, 4) for v in declared.active.values())):
        if index is not None:
            assert index.dtype == torch.int64 and index.ndim == 2 and len(index) == 2
            assert all(len({*row}) == len(row) and all(0 <= i < size for i in row) for row in index.tolist())
    assert declared.active.keys() <= {"w"}


def _index(choices: Choices) -> Any:
    kind = choices.below(12)
    if kind < 3:
        return None
    if kind == 3:
        return [0, [[0], [1]], "rows", 2**63, _STATE, torch.zeros(2, 1, dtype=torch.int32)][choices.below(6)]
    shape = [2, 2, 2, 1, 3, 0][choices.below(6)], choices.below(5)
    numbers = [choices.below(6) - (choices.below(9) == 0) for _ in range(shape[0] * shape[1])]
    index = torch.tensor(numbers, dtype=torch.int64).reshape(shape)
    return index if kind < 10 else [index.flatten(), index.T][kind - 10]


def _active(choices: Choices) -> Any:
    kind = choices.below(8)
    if kind == 0:
        return [None, [], "w", 3][choices.below(4)]
    names = ["w", "w", "w", "s", "nobody", 3]
    active: dict[Any, Tensor] = {names[choices.below(6)]: _index(choices) for _ in range(kind // 3)}
    return active


record(_RECORD)
TARGETS: dict[str, Callable[[bytes], None]] = {
    "results": results,
    "log": log,
    "checkpoint": checkpoint,
    "sparsity": sparsity,
}
