"""The page on performance says what its results say: written by ``report.py``, and looked at here."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from bars import BARS, CLAIMS
from report import ReportError, cite, main, merged, number, render, verdict

DOCS = Path(__file__).parent.parent.parent / "docs" / "results"
PAGE, RESULTS = DOCS / "performance.md", DOCS / "performance.json"


def stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())  # type: ignore[no-any-return]


def raw(**extra: Any) -> dict[str, Any]:
    """Results as pytest-benchmark writes them, of one test."""
    info = {"size": "full", "threads": 2, "measured": {}, "series": [], "facts": {}, **extra}
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


def between(page: str, name: str) -> str:
    return page.split(f"<!-- measured: {name} -->")[1].split(f"<!-- end: {name} -->")[0]


def test_the_page_says_what_the_results_say() -> None:
    assert render(PAGE.read_text(), stored()) == PAGE.read_text(), (
        "docs/results/performance.md was changed by hand, or a bar was: "
        "python tests/benchmarks/report.py docs/results/performance.json"
    )


@pytest.mark.parametrize("name", sorted(stored()["measured"]))
def test_no_number_can_change_unnoticed(name: str) -> None:
    changed = copy.deepcopy(stored())
    changed["measured"][name]["value"] *= 1.5
    changed["measured"][name]["value"] += 1
    assert render(PAGE.read_text(), changed) != PAGE.read_text()


def test_every_bar_belongs_to_a_claim_and_every_claim_has_bars() -> None:
    assert {name.split(".")[0] for name in BARS} == set(CLAIMS)
    assert stored()["measured"].keys() <= BARS.keys()


def test_every_plot_is_of_the_results_and_has_no_background() -> None:
    names = {f"performance-{name}.svg" for name in stored()["series"]}
    assert names == {path.name for path in DOCS.glob("performance-*.svg")}
    assert names == set(re.findall(r"\((performance-[\w-]+\.svg)\)", PAGE.read_text()))
    for name in names:
        text = (DOCS / name).read_text()
        assert "<text" in text, "text must stay text"
        assert len(text) < 100_000


def test_a_verdict_follows_from_the_bar() -> None:
    page = render(PAGE.read_text(), cite(raw(measured={"rnn.faster": 99.0, "rnn.fewer": 70.0, "rnn.control": 2.0})))
    rows = [line.split(" | ")[1:] for line in between(page, "rnn").splitlines() if line.startswith("| ")][2:]
    assert rows[0] == ["≥ 100 ×", "99 ×", "**does not hold** |"]
    assert rows[1] == ["≥ 0.4", "", "not measured |"]
    assert rows[2] == ["≥ 40 ×", "70 ×", "holds |"]
    assert rows[4] == ["≥ 2.25", "2", "**does not break it** |"]
    assert verdict(BARS["rnn.control"], 3.0, "full") == "breaks it, as it must"
    assert verdict(BARS["rnn.faster"], 1.0, "small") == "not judged at this size"


def test_what_is_cited_and_what_is_not() -> None:
    series = {"name": "s", "title": "T", "over": "H", "at": [1, 2], "unit": "u", "values": {"ours": [3.0, 4.0]}}
    cited = cite(raw(measured={"jax.32": 2.0}, series=[series], facts={"H": [8, 16], "P": 3}))
    assert "secret" not in json.dumps(cited)
    page = render(PAGE.read_text(), cited)
    assert "A processor" in between(page, "machine") and "0123456789ab," in between(page, "machine")
    assert "| load before | 0.5 (0" in between(page, "machine")
    assert "H = 8, 16; P = 3." in between(page, "jax")
    assert "| 2 | 4 |" in between(page, "jax") and "(performance-s.svg)" in between(page, "jax")
    assert "pytest --benchmark-only --size=full tests/benchmarks/test_x.py::test_y\n" in between(page, "jax")
    assert "not measured" in between(page, "gru")


def test_other_benchmarks_are_listed() -> None:
    results = raw(measured={"jax.32": 2.0})
    results["benchmarks"].append({"fullname": "test_z", "extra_info": {"macs_ratio": 4.12, "setup": {"a": 1}}})
    assert "| `test_z` | macs ratio | 4.12 |" in between(render(PAGE.read_text(), cite(results)), "others")


def test_later_results_win() -> None:
    first, second = cite(raw(measured={"jax.32": 2.0, "jax.64": 3.0})), cite(raw(measured={"jax.32": 5.0}))
    whole = merged([first, second])["measured"]
    assert whole["jax.32"]["value"] == 5.0 and whole["jax.64"]["value"] == 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cite({}), "no results"),
        (lambda: cite(raw(measured={"rnn.no": 1.0})), "there is no bar"),
        (lambda: cite({**raw(), "benchmarks": []}), "one size"),
        (lambda: merged([cite(raw()), cite(raw(size="small"))]), "another size"),
        (lambda: render("# Empty", stored()), "<!-- measured: machine -->"),
        (lambda: render(PAGE.read_text() * 2, stored()), "once each"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        make()


def test_numbers_are_short() -> None:
    values = [0.0, 0.40, 1.2345, 82.34, 131584, 1.5e9, 1e-7, 12345.6, -2.0]
    shown = ["0", "0.4", "1.23", "82.3", "131584", "1.50·10⁹", "1.00·10⁻⁷", "12346", "-2"]
    assert [number(value) for value in values] == shown


def test_the_command_writes_page_results_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'rtrl[bench]'")
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text())
    (tmp_path / "performance-old.svg").write_text("of another run")
    main([str(RESULTS), "-o", str(page)])
    assert page.read_text() == PAGE.read_text()
    assert (tmp_path / "performance.json").read_text() == RESULTS.read_text()
    assert {path.name for path in tmp_path.glob("*.svg")} == {path.name for path in DOCS.glob("performance-*.svg")}
