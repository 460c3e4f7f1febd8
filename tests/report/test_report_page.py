"""The page shows all of the record, escapes its text, and asks nothing of any network."""

import copy
import itertools
import re
from functools import cache
from html.parser import HTMLParser
from importlib import metadata, resources
from pathlib import Path

import pytest
from helpers import fresh_process
from report_samples import NASTY, nasty, sample
from report_samples import claim as claim_of

from rtrl._utils.code_digest import installed_code
from rtrl.report import cards, questions, render_page, tables
from rtrl.report.load import record as read

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Elements and text of a page; that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@cache
def html(spoilt: bool = False) -> str:
    return render_page(read(nasty() if spoilt else sample()))


def test_all_of_the_record_is_there() -> None:
    page, record = Page(html()), sample()
    for claim in record["claims"]:
        for field in ("id", "claimed", "result", "threshold", "condition"):
            assert " ".join(claim[field].split()) in page.text
        assert f"claim-{claim['id']}" in [attributes.get("id") for attributes in page.named("section")]
    plots = [plot for claim in record["claims"] for plot in claim["plots"]]
    grids = [grid for claim in record["claims"] for grid in claim["tables"]]
    assert len(page.named("svg")) == len(page.named("figure")) == len(plots) + 1  # one question has a picture
    assert len(page.named("table")) == 2 + len(plots) + len(grids)
    assert all(thing["title"] in page.text for thing in plots + grids)
    assert "131\u202f072" in html() and "1.5·10⁹" in html()
    for words in ("16.0 GiB", "1 min 15 s", "torch 2.13.0", "2026-01-31 12:00 UTC", "unknown", record["command"]):
        assert words in page.text
    assert "4 claims: 1 holds, 1 holds when a condition is met, 1 does not hold, 1 not measured. 1 failure" in page.text


def test_the_first_table_has_all_claims() -> None:
    rows = html().split('<tbody role="rowgroup">')[1].split("</tbody>")[0].strip().splitlines()
    assert [Page(row).text for row in rows] == [
        "memory ✓ holds what memory claims 3.1 × of memory",
        "depends ◐ holds when what depends claims 3.1 × of depends",
        "slow_thing ✗ does not hold what slow_thing claims 3.1 × of slow_thing",
        "absent ○ not measured what absent claims",
    ]


def test_five_questions_come_first() -> None:
    text = Page(html()).text
    for words in (
        "Are the gradients exact? ○ Not measured Does it learn? ○ Not measured Does it need less memory, and from "
        "where on? ◐ In part Is it faster by the clock? ✗ No Is it better than its rivals? ○ Not measured 4 claims:",
        "on? ◐ In part It holds 500 kB at every T. depends holds when B ≤ 4; from H = 64 on. 2 claims belong to this "
        "question; measured in the quick form, 1 holds, 1 holds when a condition is met. memory , depends Memory",
        "clock? ✗ No slow_thing: 3.1 × of slow_thing. slow_thing does not hold: it is slower. 1 claim belongs to this",
        "rivals? ○ Not measured This record has no claim about it. All claims",
    ):
        assert words in text
    headings = re.findall(r"<h([1-4])", html())
    assert all(int(after) <= int(before) + 1 for before, after in itertools.pairwise(headings)), headings


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        (["holds", "holds"], "Yes"),
        (["holds", "not measured"], "In part"),
        (["holds", "not measured at the claimed size"], "In part"),
        (["does not hold", "holds when"], "In part"),
        (["does not hold"], "No"),
        (["not measured at the claimed size", "not measured"], "Not measured at the claimed size"),
    ],
)
def test_a_plain_yes_needs_every_claim(verdicts: list[str], word: str) -> None:
    claims = [claim_of(f"c{i}", verdict, question="rivals") for i, verdict in enumerate(verdicts)]
    assert questions.answers(read({**sample(), "claims": claims}))[-1].word == word


def test_a_record_without_questions_and_faults_has_no_such_sections() -> None:
    page = render_page(read({**sample(), "claims": [claim_of("old")]}))
    assert "Five questions" not in page and "Could they fail?" not in page


def test_every_claim_has_a_card() -> None:
    text = Page(html()).text
    for words in (
        "memory ✓ holds claimed what memory claims measured 3.1 × of memory threshold ≥ 2.72 × verdict holds "
        "model and seeds GRU, P = 3.2 k, H = 32, T = 1000, seeds 0–2 could this fail? Yes: the verdict changes with 1 "
        "of 2 faults planted in the code: leak; not with truncate. what it does not show The bytes of optimizers .",
        "verdict holds when: B ≤ 4; from H = 64 on could this fail? Not tried: no fault was planted in the code.",
        "could this fail? Not seen to fail: the verdict is the same with leak planted in the code. took 1.5 s kept "
        "from an earlier run of 2026-01-30 11:00: not measured in this one",
        "could this fail? No fault in the code can change it: nothing is measured.",
    ):
        assert words in text
    assert text.count("What it leaves open") == 0 and "More. Of it." in text


def test_faults_have_their_claims() -> None:
    said = "Could they fail? Faults were planted in the code on purpose"
    assert said in Page(html()).text
    found = cards.faults(read(sample())).rows
    assert found == [["leak", "1 of 2", "memory"], ["truncate", "0 of 1", ""]]


def test_the_code_is_held_to_what_is_installed() -> None:
    here = installed_code()
    assert f"code 0123456789abcdef (not the code installed here, {here})" in Page(html()).text
    assert "A results file is a statement of who made it" in Page(html()).text
    same = read({**sample(), "code": here})
    assert ("code", f"{here} (the code that is installed here)") in tables.run(same, here)
    assert ("code", here) in tables.run(same)  # in Markdown, which is not written again with every change of the code


def test_the_digest_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rtrl._utils import code_digest

    package = tmp_path / "pkg_of_digest"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code_digest, "PACKAGES", ("pkg_of_digest",))
    found = []
    for name, text in (("__init__.py", ""), ("a.py", "x = 1\n"), ("a.py", "x = 2\n"), ("data.txt", "x")):
        (package / name).write_text(text)
        found.append(code_digest.installed_code())
    assert len(set(found)) == 3 and found[2] == found[3]


def test_verdicts_are_shown_by_word_and_sign() -> None:
    text = Page(html()).text
    for verdict in ("✓ holds", "◐ holds when", "✗ does not hold", "○ not measured"):
        assert text.count(verdict) == 2  # in the table and in the card


def test_links_have_their_sections() -> None:
    page = Page(html())
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for attributes in page.named("a")]
    assert len(links) == 5 + 4 + 3 + 1 + 1  # questions, table, claims of questions, failures, run
    assert all(link.removeprefix("#") in ids for link in links)


def test_ids_are_unique() -> None:
    ids = [attributes["id"] for _, attributes in Page(html()).elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("spoilt", [False, True])
def test_nothing_is_loaded_from_anywhere(spoilt: bool) -> None:
    page = Page(html(spoilt))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
        "audio",
        "image",
        "foreignobject",
    }
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action", "data")]
        for name, value in attributes.items():
            if name.endswith("href"):
                assert value.startswith("#") or (tag, value) == ("link", "data:,")
            if name not in ("xmlns", "xmlns:xlink", "aria-label", "content", "data-label"):
                assert "//" not in value
    (policy,) = [meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    style = html(spoilt).split("<style>")[1].split("</style>")[0]
    assert not re.search(r"@import|url\(|@font-face|expression", style)


def test_text_is_escaped() -> None:
    page = Page(html(spoilt=True))
    clean = " ".join(NASTY.replace("\x00\x1b[31m", "\ufffd").split())
    assert page.text.count(clean) > 20
    assert html(spoilt=True).count("<script") == 0
    assert page.text.count("{{ 7 * 7 }}") > 20


def test_pictures_have_words_and_numbers() -> None:
    page = Page(html())
    for svg in page.named("svg"):
        assert svg["role"] == "img" and svg["aria-label"]
        assert "width" not in svg and svg["viewbox"]
    assert page.text.count("The numbers") == len(page.named("svg")) - 1
    assert "1 point has no place on a logarithmic axis, being 0 or less." in page.text
    assert page.named("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert html().count("<title>") == 1


def test_tables_can_be_scrolled_by_keyboard() -> None:
    boxes = [attributes for attributes in Page(html()).named("div") if "scroll" in attributes.get("class", "").split()]
    assert len(boxes) == len(Page(html()).named("table"))
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)


def test_dark_light_and_print() -> None:
    style = html().split("<style>")[1].split("</style>")[0]
    light, rest = style.split("@media screen and (prefers-color-scheme: dark)")
    dark, printed = rest.split("@media", 1)[0], rest.split("@media print")[1]
    variables = [set(re.findall(r"(--[\w-]+):", part)) for part in (light, dark)]
    assert variables[0] == variables[1]
    used = set(re.findall(r"var\((--[\w-]+)\)", html()))
    assert used <= variables[0]
    assert "@page" in printed


def test_explanations_are_set() -> None:
    text = html()
    assert "<p>Claim: memory <strong>stays</strong> as <em>it is</em>.</p>" in text
    assert "<pre>S = J S + B</pre>" in text
    assert "<p>Bytes of <code>rtrl.BlockRTRL</code> (<code>sync</code>).</p>" in text
    assert text.count("How it is measured") == 1


def test_the_same_record_gives_the_same_page() -> None:
    assert render_page(read(copy.deepcopy(sample()))) == html()


def test_a_report_loads_no_oracle_and_no_claim() -> None:
    code = (
        "import sys, rtrl.cli.app, rtrl.report; "
        "sys.exit(any(name.split('.')[0] in ('oracles', 'matplotlib') or name.startswith('rtrl.verification') "
        "for name in sys.modules))"
    )
    assert fresh_process.run(code).returncode == 0


def test_the_template_is_in_the_package() -> None:
    assert (resources.files("rtrl.report") / "page.html.j2").is_file()


def test_the_template_is_in_the_wheel() -> None:
    try:
        files = metadata.files("rtrl") or []
    except metadata.PackageNotFoundError:
        files = []
    if not any(str(file) == "rtrl/cli/__init__.py" for file in files):
        pytest.skip("rtrl is not installed from a wheel here; tox installs it from one")
    assert "rtrl/report/page.html.j2" in map(str, files)
