"""A results file is validated, and a refusal says which field is wrong and what was expected there."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_samples import NASTY, sample, written

from rtrl.errors import ConfigError
from rtrl.report import load, load_record

Change = Callable[[dict[str, Any]], Any]


def at(*path: str | int) -> Callable[[Any], Change]:
    """A change that puts a value there; that takes it away for Ellipsis."""

    def put(value: Any) -> Change:
        def change(record: dict[str, Any]) -> None:
            place: Any = record
            for step in path[:-1]:
                place = place[step]
            if value is ...:
                del place[path[-1]]
            else:
                place[path[-1]] = value

        return change

    return put


PLOT = ("claims", 0, "plots", 0)
GRID = ("claims", 0, "tables", 0)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    record = load_record(written(tmp_path / "r.json", sample()))
    assert [claim.id for claim in record.claims] == ["memory", "depends", "slow_thing", "absent"]
    assert record.claims[0].plots[0].series[1].y == [0, 1e5, None]
    assert record.claims[0].tables[0].rows[1] == ["dense", 16, 1.5e9, None]
    assert record.claims[1].plots[1].kind == "line"  # what has a default may be left out
    assert record.claims[1].explanation == ""


def test_a_file_of_the_first_form_is_read(tmp_path: Path) -> None:
    """It says "figure" and "grids" for "result" and "tables"."""
    first = sample()
    first["schema"] = 1
    for claim in first["claims"]:
        claim["figure"], claim["grids"] = claim.pop("result"), claim.pop("tables")
    assert load_record(written(tmp_path / "1.json", first)) == load_record(written(tmp_path / "2.json", sample()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("schema")(...), "the field 'schema' is missing"),
        (at("schema")(3), "schema: expected 1 or 2, the forms"),
        (at("schema")(True), "schema: expected 1 or 2"),
        (at("created")("yesterday"), "created: expected a time such as"),
        (at("seed")(1.5), "seed: expected a whole number, found 1.5"),
        (at("machine")([]), "machine: expected an object"),
        (at("duration_s")("1"), "duration_s: expected a number"),
        (at("claims")({}), "claims: expected a list"),
        (at("claims")([]), "claims: expected at least one claim"),
        (at("claims", 1)(7), "claims[1]: expected an object with a field 'result'"),
        (at("claims", 1, "id")("MEMORY"), "two claims are called 'MEMORY'"),
        (at("claims", 1, "id")("../../etc"), "claims[1].id: expected an id of letters"),
        (at("claims", 0, "threshold")(...), "claims[0]: the field 'threshold' is missing"),
        (
            at("claims", 0, "verdict")("maybe"),
            "expected one of 'holds', 'holds when', 'does not hold', 'not measured at",
        ),
        (at("claims", 2, "measured")("once"), "claims[2].measured: expected a time such as"),
        (at("claims", 0, "noticed")(["other"]), "claims[0].noticed: expected names that are among those of tried"),
        (at("claims", 0, "question")("why"), "claims[0].question: expected one of '', 'exact', 'learns'"),
        (at("claims", 0, "verdict")([]), "claims[0].verdict: expected one of"),
        (at("claims", 0, "failures")([1]), "claims[0].failures[0]: expected a text, found 1"),
        (at(*GRID, "rows", 1)(["short"]), "claims[0].tables[0].rows[1]: expected a list of 4 cells"),
        (at(*GRID, "rows", 1, 2)({}), "rows[1][2]: expected a number or null, found {}"),
        (at(*GRID, "columns")("ab"), "columns: expected a list"),
        (at(*PLOT, "kind")("pie"), "claims[0].plots[0].kind: expected one of 'line', 'points', 'raster', found 'pie'"),
        (at(*PLOT, "log_x")(1), "log_x: expected true or false, found 1"),
        (at(*PLOT, "series", 0, "y")([1]), "series[0].y: expected as many numbers as x has, 3, not 1"),
        (at(*PLOT, "series", 0, "low")([1]), "series[0].low: expected as many numbers as x has, 3, not 1"),
        (at(*PLOT, "series", 0, "high")([1, 2, 3]), "series[0].low: expected as many numbers as x has, 3, not 0"),
        (at(*PLOT, "vertical_lines")([{"x": 1}]), "vertical_lines[0]: the field 'label' is missing"),
        (at(*PLOT, "series", 0, "x", 1)("7"), "series[0].x[1]: expected a number or null, found '7'"),
        (at(*PLOT, "series", 0, "x", 1)(False), "series[0].x[1]: expected a number"),
        (at(*PLOT, "series", 0, "y", 1)(1e305), "expected a number of at most 1e+300"),
        (at(*PLOT, "series", 0, "y", 1)(10**400), "expected a number of at most 1e+300"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, message: str) -> None:
    record = sample()
    change(record)
    path = written(tmp_path / "r.json", record)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load_record(path)
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value)) < len(str(path)) + 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a JSON file"),
        ("[" * 100_000, "is not a JSON file"),
        ('{"schema": NaN}', "NaN is not a number in JSON; null stands for it"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is not a JSON file"),
        ("9" * 5000, "is not a JSON file"),
        ("[]", "expected an object with a field 'schema'"),
    ],
)
def test_what_is_no_results_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        load_record(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_record(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_record(tmp_path)


def test_a_file_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LARGEST_FILE", 1000)
    with pytest.raises(ConfigError, match="it is larger than 1000 bytes"):
        load_record(written(tmp_path / "r.json", sample()))


def test_names_of_entries_bring_nothing_into_a_message(tmp_path: Path) -> None:
    record = sample()
    record["machine"]["\x1b]0;owned\x07\u202e" + "x" * 500] = 1e305
    with pytest.raises(ConfigError, match="expected a number") as raised:
        load_record(written(tmp_path / "r.json", record))
    assert not any(mark in str(raised.value) for mark in ("\x1b", "\x07", "\u202e", "x" * 100))


def test_no_control_character_comes_in(tmp_path: Path) -> None:
    record = sample()
    record["claims"][0]["claimed"] = NASTY + "\ud800\uffff\x85\u202e a\r\nb\tc"
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    text = load_record(path).claims[0].claimed
    assert "\x1b" not in text and "[31m" not in text
    assert text.endswith("\ufffd\ufffd\ufffd\ufffd\ufffd a\nb\tc".removeprefix("\ufffd"))
    text.encode()
