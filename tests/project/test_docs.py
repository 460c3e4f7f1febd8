"""What README and docs say is run: every Python block, and the commands that the gate is to use."""

import re
from pathlib import Path

import pytest

from rtrl.testing import cell_checks, learner_checks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(where, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        for i, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)):
            found.append((f"{page.name}-{i}", text))
    return found


@pytest.mark.parametrize(("where", "text"), [pytest.param(*block, id=block[0]) for block in blocks("python")])
def test_python_blocks_run(where: str, text: str) -> None:
    exec(compile(text, where, "exec"), {"__name__": "__main__"})


def test_there_are_blocks_to_run() -> None:
    assert len(blocks("python")) >= 2


def test_the_gate_runs_the_command_of_the_readme() -> None:
    commands = [text.strip() for where, text in blocks("sh") if where.startswith("README")]
    assert len(commands) >= 2, "one command runs the main job, one passes the tests"
    assert any(command.endswith("rtrl verify") for command in commands)
    (gate,) = [command for command in commands if command.endswith("tox")]
    assert gate in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_table_of_folders_is_true() -> None:
    text = (ROOT / "README.md").read_text().split("## Find your way")[1]
    for name in re.findall(r"`([\w./]+)`", text):
        if name.endswith(".py") and "/" not in name:
            assert (ROOT / "rtrl" / name).exists(), name
        elif "/" in name and not name.startswith("rtrl "):
            assert (ROOT / name).exists() or (ROOT / "rtrl" / name).exists(), name


@pytest.mark.parametrize(("page", "checks"), [("cell", cell_checks()), ("learner", learner_checks())])
def test_the_guides_list_every_check_and_no_other(page: str, checks: list[str]) -> None:
    text = (ROOT / "docs" / "guide" / f"checking-{page}s.md").read_text()
    table = re.search(r"^\| check \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    named = [name for row in table.group().splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(checks)
