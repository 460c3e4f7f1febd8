"""What README, docs and examples say is run: every block of Python, every script, the commands of the gate."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import fresh_process

from rtrl.testing import cell_checks, learner_checks

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What the gate calls a script with, so that it takes seconds, and what it must print.
ARGUMENTS = {
    "compare_learners.py": (["--hidden", "8", "--batch-size", "1", "2", "--rounds", "1"], r"\| 8 \| 2 \| .* MiB \|"),
    "long_haystack.py": ([], r"BlockRTRL: 100%.*\ntruncated BPTT: +[45]\d%"),
    "online_char_rnn.py": (["--steps", "300", "--hidden", "16"], r"step +300: \d\.\d\d bits per byte"),
    "online_rtu.py": (["--steps", "100"], r"step +100: mean squared error 0\.\d+"),
    "stream_actor_critic.py": (["--steps", "600"], r"step +\d+: mean return -?\d\.\d\d of the last 20 episodes"),
    "own_cell.py": ([], r"0 of \d+ checks failed(.|\n)*step 800: squared error 0\.0[01]"),
}


def blocks(page: Path, language: str = "python") -> list[str]:
    """Every fenced block of a language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------------- code


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_python_blocks_run(page: Path) -> None:
    """Blocks of a page in docs go on from one another, as a reader does; those of README stand alone."""
    namespace = {"__name__": "__main__"}
    for i, text in enumerate(blocks(page)):
        if page == README:
            namespace = {"__name__": "__main__"}
        exec(compile(text, f"{name(page)}, block {i}", "exec"), namespace)


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\na = 1\n```\n\n```python\nassert a == 2\n```\n")
    assert blocks(page) == ["a = 1\n", "assert a == 2\n"]


def test_there_are_blocks_to_run() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 20


def test_readme_begins_with_a_gru_of_pytorch() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    first = lines.index("```python")
    end = lines.index("```", first)
    assert end <= 30 and any("nn.GRUCell" in line for line in lines[first:end])
    assert len(lines) <= 120
    assert blocks(README)[0] == blocks(DOCS / "index.md")[0]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_examples_run(script: Path) -> None:
    arguments, said = ARGUMENTS[script.name]
    code = f"import runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')"
    done = fresh_process.run(code, *arguments, paths=[script.parent, ROOT], strict=True)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout), done.stdout


def test_every_example_is_run_and_explains_itself() -> None:
    assert {script.name for script in EXAMPLES} == set(ARGUMENTS)
    assert all(f"python examples/{script.name}" in script.read_text() for script in EXAMPLES)


# ---------------------------------------------------------------------- the gate


def test_the_gate_runs_the_command_of_the_readme() -> None:
    commands = [text.strip() for text in blocks(README, "sh")]
    (main,) = [command for command in commands if command.endswith("rtrl verify")]
    assert "'.[cli,report]'" in main, "the command installs what it needs"
    (gate,) = [command for command in commands if command.endswith("tox")]
    assert gate in (ROOT / ".ci" / "run").read_text()


# ---------------------------------------------------------------------- links and lists


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE))
    assert listed == {page.relative_to(DOCS).as_posix() for page in PAGES if page != README}


def build(folder: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    """Build the site of a folder; without ``--quiet``, which hides warnings from ``--strict`` as well."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'rtrl[docs]'")
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "reference" / "learners" / "index.html").exists()
    claims = (tmp_path / "results" / "claims" / "index.html").read_text(encoding="utf-8")
    assert "<details" in claims and "| ---" not in claims, "tables inside details are tables"


def test_a_broken_link_or_docstring_stops_the_site(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'rtrl[docs]'")
    (tmp_path / "docs").mkdir()
    (tmp_path / "pkg.py").write_text('def f(x: int) -> int:\n    """Add one.\n\n    Args:\n        y: it.\n    """\n')
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: a\nplugins:\n  - mkdocstrings:\n      handlers: {python: {paths: [.]}}\n"
    )
    page = tmp_path / "docs" / "index.md"
    for text, code in (("# A\n", 0), ("[b](b.md)\n", 1), ("::: pkg\n", 1)):
        page.write_text(text)
        assert build(tmp_path, tmp_path / "site").returncode == code, text


@pytest.mark.parametrize("page", [DOCS / "contributing.md", README], ids=name)
def test_paths_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [path for path in re.findall(r"`([\w./-]+)`", text) if "/" in path]
    assert named
    for path in named:
        known = (ROOT / path, ROOT / "rtrl" / path, DOCS / "results" / path)
        assert any(place.exists() for place in known), path


def test_the_map_has_every_folder() -> None:
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    folders = [path.name for path in (ROOT / "rtrl").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert [folder for folder in folders if f"`rtrl/{folder}/`" not in text] == []


@pytest.mark.parametrize("page", ["limits.md", "reliability.md"])
def test_tests_that_pin_a_limit_or_keep_a_promise_exist(page: str) -> None:
    defined = {
        match
        for path in (ROOT / "tests").rglob("*.py")
        for match in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    pinned = re.findall(r"`(test_\w+)`", (DOCS / page).read_text(encoding="utf-8"))
    assert len(pinned) >= 12
    assert [test for test in pinned if test not in defined] == []


@pytest.mark.parametrize(("page", "checks"), [("cell", cell_checks()), ("learner", learner_checks())])
def test_the_guides_list_every_check_and_no_other(page: str, checks: list[str]) -> None:
    text = (DOCS / "guide" / f"checking-{page}s.md").read_text(encoding="utf-8")
    table = re.search(r"^\| check \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    listed = [check for row in table.group().splitlines()[2:] for check in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(checks)


# ---------------------------------------------------------------------- numbers in README

ROW = re.compile(
    r"^\| \[`([\w-]+)`\]\(docs/results/claims(-full)?\.md#[\w-]+\)(?:, full)? \| (.+) \| ([\w ]+) \|$", re.MULTILINE
)


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d.,]*\d(?:e-?\d+)?|\d", text)


def test_the_six_results_are_those_of_the_run() -> None:
    claims = {}
    for form in ("", "-full"):
        record = json.loads((DOCS / "results" / f"results{form}.json").read_text(encoding="utf-8"))
        claims[form] = {claim["id"]: claim for claim in record["claims"]}
    text = README.read_text(encoding="utf-8")
    rows = ROW.findall(text)
    assert len(rows) == 6
    for claim, form, result, verdict in rows:
        found = claims[form][claim]
        assert len(result) <= 60, claim
        assert verdict == found["verdict"], claim
        assert set(numbers(result)) <= set(numbers(f"{found['result']} {found['threshold']}")), claim
    assert f"[{len(claims[''])} claims]" in text


def test_the_comparison_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from compare_learners import with_table

    record = json.loads((DOCS / "results" / "comparison.json").read_text(encoding="utf-8"))
    assert [(row["hidden"], row["batch_size"]) for row in record["rows"]] == [(32, 1), (32, 16), (128, 1), (128, 16)]
    text = README.read_text(encoding="utf-8")
    assert with_table(text, record) == text
    record["rows"][0]["tbptt_bytes"] *= 2
    assert with_table(text, record) != text
