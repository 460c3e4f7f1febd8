"""What stands between the markers of a page is what the results say, and nothing else is touched."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import published
from report_samples import nasty, sample

from rtrl.errors import ConfigError
from rtrl.report import load_record, outdated_pictures, update_markdown
from rtrl.report.load import record as read
from rtrl.report.markdown import anchor, escape

README, CLAIMS = published.ROOT / "README.md", published.CLAIMS.pages[0]


def pages(folder: Path, **texts: str) -> list[Path]:
    found = []
    for name, text in texts.items():
        path = folder / f"{name}.md"
        path.write_bytes(text.encode())
        found.append(path)
    return found


def marked(*names: str) -> str:
    return "# Title\n\n" + "".join(
        f"before {n}\n<!-- rtrl:{n} -->\nold\n<!-- /rtrl:{n} -->\nafter {n}\n" for n in names
    )


def after(record: Any, paths: list[Path], folder: Path | None = None) -> list[str]:
    return [new for _, new in update_markdown(read(record), paths, folder).values()]


# ---------------------------------------------------------------------- this repository's own pages


@pytest.mark.parametrize("name", published.ALL)
def test_pages_and_pictures_say_what_the_results_say(name: str) -> None:
    files = published.ALL[name]
    record = load_record(files.results)
    for path, (old, new) in update_markdown(record, files.pages, files.pictures).items():
        assert old == new, f"{path.name} is not what {files.results.name} says: {files.command}"
    assert outdated_pictures(record, files.pictures, ("svg",)) == []
    for path in files.pictures.glob("*.svg"):
        assert "<text" in path.read_text(encoding="utf-8"), "text must stay text"
        assert path.stat().st_size < 100_000


def test_every_link_to_a_claim_has_its_section() -> None:
    links = re.findall(r"\]\(docs/results/claims\.md#([^)]+)\)", README.read_text(encoding="utf-8"))
    headings = re.findall(r"^## `(.+)`$", CLAIMS.read_text(encoding="utf-8"), re.MULTILINE)
    assert links
    assert set(links) <= {anchor(heading) for heading in headings}


# ---------------------------------------------------------------------- what is written


def test_the_table_of_claims(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    readme, claims = pages(tmp_path, README=marked("claims-table", "run"), claims=marked("claims"))
    claims = claims.rename(tmp_path / "docs" / "claims.md")
    one, other = after(sample(), [readme, claims], tmp_path / "docs" / "pictures")
    lines = one.splitlines()
    assert "| claim | claimed | measured | threshold | verdict |" in lines
    row = "| [`memory`](docs/claims.md#memory) | what memory claims | 3.1 × of memory | ≥ 2.72 × | ✓ holds |"
    assert row in lines
    assert lines[lines.index(row) + 1].endswith("| ◐ holds when: B ≤ 4; from H = 64 on |")
    assert "[`slow_thing`](docs/claims.md#slow_thing)" in lines[lines.index(row) + 2]
    assert lines[lines.index(row) + 2].endswith("| ✗ **does not hold**: it is slower |")
    assert lines[lines.index(row) + 3].endswith("| ○ not measured: no device |")
    assert "| versions | rtrl 0.1.0, torch 2.13.0 |" in lines
    assert "old" not in lines
    assert [line for line in lines if "claims-table" in line] == [
        "before claims-table",
        "<!-- rtrl:claims-table -->",
        "<!-- /rtrl:claims-table -->",
        "after claims-table",
    ]
    assert (
        "## `memory`\n\n- **claimed**: what memory claims\n- **measured**: 3.1 × of memory\n- **threshold**: ≥ 2.72 ×\n"
        "- **verdict**: ✓ holds\n- **model and seeds**: GRU, P = 3.2 k, H = 32, T = 1000, seeds 0–2\n- **could"
    ) in other
    assert "\n- **what it does not show**: The bytes of `optimizers`.\n" in other
    assert '<details markdown="1">\n<summary>How it is measured</summary>\n\nClaim: memory' in other
    assert "    S = J S + B\n\nBytes of `rtrl.BlockRTRL` (`sync`).\n\n- one\n- two\n\n" in other
    assert "\n\nClaim: memory **stays** as *it is*.\n\n" in other
    assert "nothing in it proves that it was measured" in one
    assert "Costs:\n\n| side | H | multiply-adds | exact |\n| --- | ---: | ---: | --- |\n" in other
    assert "| rtrl | 16 | 131\u202f072 | yes |\n| dense | 16 | 1.5·10⁹ |  |\n\n" in other
    assert "<summary>Every row (40 rows)</summary>\n\n| n | n² |" in other
    assert "![Memory against T](pictures/memory-1.svg)" in other
    assert "- gradients differ at step 3" in other


def test_one_claim_alone(tmp_path: Path) -> None:
    whole, text = (after(sample(), pages(tmp_path, a=marked(n)), tmp_path)[0] for n in ("claims", "claim:memory"))
    body = text.split("<!-- rtrl:claim:memory -->\n\n")[1].split("\n\n<!-- /rtrl:claim:memory -->")[0]
    assert body.startswith("- **claimed**: what memory claims\n")
    assert "![Memory against T](./memory-1.svg)" in body
    assert f"## `memory`\n\n{body}\n\n## `depends`" in whole


def test_five_questions(tmp_path: Path) -> None:
    (text,) = after(sample(), pages(tmp_path, a=marked("questions", "faults", "claims")), tmp_path)
    assert "| fault | claims | whose verdict changes |\n| --- | --- | --- |\n| leak | 1 of 2 | memory |\n" in text
    assert (
        "### Does it need less memory, and from where on?\n\n**◐ In part.**\n\nIt holds 500 kB at every T.\n\n"
        "depends holds when B ≤ 4; from H = 64 on.\n\n2 claims belong to this question; measured in the quick form, 1 "
        "holds, 1 holds when a condition is met.\n\nClaims: [`memory`](#memory), [`depends`](#depends).\n\n"
        "![Memory against T](./memory-1.svg)\n\n### Is it faster by the clock?\n\n**✗ No.**\n\n"
    ) in text
    assert text.count("This record has no claim about it.") == 3


def test_without_sections_and_pictures_there_are_no_links(tmp_path: Path) -> None:
    assert "](" not in after(sample(), pages(tmp_path, a=marked("claims-table")))[0]
    assert "![" not in after(sample(), pages(tmp_path, a=marked("claims")))[0]
    assert "(#memory)" in after(sample(), pages(tmp_path, a=marked("claims-table", "claims")))[0]


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    paths = pages(tmp_path, a=marked("claims-table", "run"), b=marked("claims"))
    for record in (sample(), nasty()):
        for path, text in zip(paths, after(record, paths), strict=True):
            path.write_bytes(text.encode())
        assert all(old == new for old, new in update_markdown(read(record), paths).values())


def test_what_is_outside_stays_byte_for_byte(tmp_path: Path) -> None:
    text = "\ufeffa\r\nb  \n" + marked("run") + "\ttail without an end"
    (new,) = after(sample(), pages(tmp_path, a=text))
    begin, end = "<!-- rtrl:run -->", "<!-- /rtrl:run -->"
    assert new.split(begin)[0] == text.split(begin)[0]
    assert new.split(end)[1] == text.split(end)[1]


def test_nasty_text_stays_in_its_cell(tmp_path: Path) -> None:
    record = nasty()
    record["claims"][0]["claimed"] = "<!-- /rtrl:claims-table --> a\n\n| b"
    (new,) = after(record, pages(tmp_path, a=marked("claims-table")))
    rows = [line for line in new.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    assert "<script" not in new and new.count("<!-- /rtrl:claims-table -->") == 1


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b_c lazy=False", "a_b_c lazy=False"),
        ("_a_ *b* `c`", r"\_a\_ \*b\* \`c\`"),
        ("x < y & z", "x &lt; y &amp; z"),
        ("$O(H^2)$ | ~1", r"\$O(H^2)\$ \| \~1"),
        ("[a](b)\n# c", r"\[a\](b) # c"),
    ],
)
def test_escapes(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "has no marker; put <!-- rtrl:claims-table -->"),
        ("<!-- rtrl:run -->", "<!-- rtrl:run --> is never closed by <!-- /rtrl:run -->"),
        ("\n<!-- /rtrl:run -->", r"a\.md:2: <!-- /rtrl:run --> does not belong here"),
        (marked("run", "run"), r"a\.md:9: <!-- rtrl:run --> does not belong here"),
        ("<!-- rtrl:run --><!-- rtrl:claims --><!-- /rtrl:claims --><!-- /rtrl:run -->", "does not belong here"),
        (marked("runs"), "the marker rtrl:runs is unknown; known are rtrl:questions, rtrl:claims-table, rtrl:faults"),
        (marked("claim:none"), r"a\.md: the marker rtrl:claim:none names a claim that the results do not have"),
    ],
)
def test_markers_must_stand_in_pairs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        update_markdown(read(sample()), pages(tmp_path, a=text))


def test_a_page_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        update_markdown(read(sample()), [tmp_path / "absent.md"])
