"""The record of the benchmarks is what ``report.py`` makes of their numbers and of the bars as they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bars import BARS, CLAIMS
from helpers.published import PERFORMANCE
from report import claim_result, joined, main, merged, read

from rtrl.errors import ConfigError
from rtrl.report import ClaimResult, Record, load_record, to_json

STORED = load_record(PERFORMANCE.results)


def raw(size: str = "full", **extra: Any) -> dict[str, Any]:
    """Results as pytest-benchmark writes them, of one test."""
    info = {"size": size, "threads": 2, "measured": {}, "plots": [], "facts": {}, **extra}
    return {
        "machine_info": {
            "cpu": {"brand_raw": "A processor"},
            "processors": 2,
            "memory_bytes": 2**34,
            "load_before": 0.5,
            "node": "secret",
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"fullname": "tests/benchmarks/test_x.py::test_y[a]", "extra_info": info}],
    }


def of(record: Record, claim: str) -> ClaimResult:
    return next(result for result in record.claims if result.id == claim)


def judged(**measured: float) -> list[list[Any]]:
    """The bars of the tanh network without their texts: bar, measured, verdict."""
    names = {f"rnn.{name}": value for name, value in measured.items()}
    table = claim_result("rnn", "full", measured=names, facts={}, tests=[]).tables[0]
    return [list(row[1:]) for row in table.rows]


def test_the_record_is_what_its_numbers_and_the_bars_say() -> None:
    assert [result.id for result in STORED.claims] == list(CLAIMS)
    for result in STORED.claims:
        assert replace(result) == joined(result.id, STORED.mode, [result]), (
            f"a bar of {result.id} was changed: run tests/benchmarks/report.py on {PERFORMANCE.results}, -o the same"
        )


@pytest.mark.parametrize("name", [name for result in STORED.claims for name in result.data["measured"]])
def test_no_number_can_change_unnoticed(name: str) -> None:
    result = of(STORED, name.split(".")[0])
    changed = {**result.data["measured"], name: result.data["measured"][name] * 1.5 + 1}
    other = claim_result(result.id, STORED.mode, result.plots, **{**result.data, "measured": changed})
    assert other.tables[0] != result.tables[0]


def test_every_bar_belongs_to_a_claim_and_every_claim_has_bars() -> None:
    assert {name.split(".")[0] for name in BARS} == set(CLAIMS)


def test_a_verdict_follows_from_the_bar() -> None:
    rows = judged(faster=99.0, fewer=70.0, control=2.0)
    assert rows[0] == ["≥ 100 ×", "99 ×", "does not hold"]
    assert rows[1] == ["≥ 0.4", "", "not measured"]
    assert rows[2] == ["≥ 40 ×", "70 ×", "holds"]
    assert rows[4] == ["≥ 2.25", "2", "does not break it"]
    assert judged(control=3.0)[4][-1] == "breaks it, as it must"
    assert judged(faster=float("nan"))[0][1:] == ["not finite", "does not hold"]
    assert BARS["rnn.faster"].verdict(BARS["rnn.faster"].reached(1.0, "small")) == "not judged at this size"


def test_the_verdict_on_a_claim() -> None:
    def result(size: str = "full", **measured: float) -> ClaimResult:
        return claim_result("jax", size, measured={f"jax.{n[1:]}": x for n, x in measured.items()}, facts={}, tests=[])

    good = result(H32=1.0, H64=2.0, H128=10.0, H256=50.0)
    assert (good.verdict, good.result, good.condition) == ("holds", "4 of 4 bars reached", "")
    part = result(H32=1.0)
    assert (part.verdict, part.result, part.condition) == (
        "holds",
        "1 of 1 bars reached",
        "3 of 4 bars were not judged",
    )
    bad = result(H32=0.5, H64=2.0)
    assert (bad.verdict, bad.result) == ("does not hold", "1 of 2 bars reached")
    assert bad.condition == "0.5 × faster per step than jitted JAX RTRL, H = 32, where ≥ 1 × is asked"
    assert {result().verdict, result("small", H32=9.0).verdict} == {"not measured"}


def test_what_is_read_and_what_is_not(tmp_path: Path) -> None:
    line = {"name": "ours", "x": [1.0, 2.0], "y": [3.0, 4.0], "dashed": False}
    plot = {"title": "T", "x_label": "H", "y_label": "u", "series": [line], "kind": "line", "log_x": True}
    record = read(raw(measured={"jax.32": 2.0}, plots=[plot], facts={"H": [8, 16], "P": 3}))
    assert "secret" not in to_json(record)
    (tmp_path / "performance.json").write_text(to_json(record))
    assert load_record(tmp_path / "performance.json") == record
    assert record.machine["cpu"] == "A processor"
    assert record.machine["load_before"] == 0.5
    assert record.versions["commit"] == "0123456789ab"
    result = of(record, "jax")
    assert result.tables[1].rows == [["H", "8, 16"], ["P", 3]]
    assert (result.tables[2].title, result.tables[2].rows) == ("T, u", [[1.0, 3.0], [2.0, 4.0]])
    assert "``pytest --benchmark-only --size=full tests/benchmarks/test_x.py::test_y``" in result.explanation
    assert result.plots[0].series[0].name == "ours"
    assert of(record, "gru").verdict == "not measured"


def test_later_results_win() -> None:
    first, second = read(raw(measured={"jax.32": 2.0, "jax.64": 3.0})), read(raw(measured={"jax.32": 5.0}))
    assert of(merged([first, second]), "jax").data["measured"] == {"jax.32": 5.0, "jax.64": 3.0}
    assert of(merged([first, second]), "jax").data["tests"] == ["tests/benchmarks/test_x.py::test_y[a]"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: read({}), "no results"),
        (lambda: read(raw(measured={"rnn.no": 1.0})), "has no bar"),
        (lambda: read({**raw(), "benchmarks": []}), "one size"),
        (lambda: merged([read(raw()), read(raw("small"))]), "another size"),
        (lambda: merged([read(raw()), read(raw(threads=1))]), "another machine"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_command_writes_the_record(tmp_path: Path) -> None:
    new = tmp_path / "new.json"
    main([str(PERFORMANCE.results), "-o", str(new)])
    assert new.read_text() == PERFORMANCE.results.read_text()
    (tmp_path / "raw.json").write_text(json.dumps(raw(measured={"jax.32": 5.0})))
    main([str(tmp_path / "raw.json"), "-o", str(new)])
    assert of(load_record(new), "jax").data["measured"] == {"jax.32": 5.0}
