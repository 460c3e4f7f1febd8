"""``rtrl report``: what it writes, what it checks, and that nothing is written where something is wrong."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from report_samples import CURVE, claim, sample, written
from typer.testing import CliRunner

from rtrl.cli.app import app, flowing
from rtrl.cli.report import report as command

PAGE = "<!-- rtrl:claims-table -->\n<!-- /rtrl:claims-table -->\n"


def report(*arguments: Any) -> Any:
    return CliRunner(env={"FORCE_COLOR": None, "COLUMNS": None}).invoke(app, ["report", *map(str, arguments)])


def words(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def results(tmp_path: Path) -> Path:
    whole = sample()
    whole["claims"] = [claim("learning", plots=[{**CURVE, "series": CURVE["series"][:1]}])]
    return written(tmp_path / "results.json", whole)


def test_a_page_is_what_one_gets(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = report(results.name)
    assert result.exit_code == 0, result.output
    assert result.stdout == "report.html: 1 claims\n"
    assert result.stderr.startswith("results.json was measured with other code (0123456789abcdef) than is installed")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert report(results, "-o", tmp_path / "other.html").exit_code == 0
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_pages_and_pictures_written_and_checked(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    options = ["--update", page, "--pictures", tmp_path / "pictures", "--format", "svg"]
    result = report(results, *options, "--check")
    assert result.exit_code == 1, result.output
    assert f"{page} is not what the results say" in result.stderr
    assert "learning-1.svg is not what the results say" in result.stderr
    assert page.read_text(encoding="utf-8") == PAGE
    assert not (tmp_path / "pictures").exists()
    assert report(results, *options).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.md", "pictures", "results.json"]
    assert "`learning`" in page.read_text(encoding="utf-8")
    result = report(results, *options, "--check")
    assert (result.exit_code, result.output) == (0, "")
    page.write_text(page.read_text(encoding="utf-8").replace("3.1", "3.2"), encoding="utf-8")
    assert report(results, *options, "--check").exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--check"], "--check goes with --update and --pictures"),
        (["--check", "-o", "x.html", "--update", "page.md"], "and not with --output"),
        (["-o", "results.json"], "is among the files that are read"),
        (["-o", "no/such/folder.html"], "cannot be written"),
        (["-o", "x.html", "--update", "absent.md"], "absent.md cannot be read"),
        (["-o", "x.html", "--update", "results.json"], "results.json is among the files"),
        (["-o", "x.html", "--pictures", "p", "--format", "gif"], "no form 'gif'"),
    ],
)
def test_what_cannot_be_done_leaves_nothing_behind(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = report("results.json", *options)
    assert result.exit_code == 2, result.output
    assert message in words(result.stderr)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_wrong_results_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = sample()
    del whole["claims"][2]["result"]
    written(tmp_path / "results.json", whole)
    result = report("results.json", "-o", "x.html")
    assert result.exit_code == 2
    assert "results.json: claims[2]: the field 'result' is missing" in words(result.stderr)
    assert not (tmp_path / "x.html").exists()


def test_without_matplotlib(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.style"):
        monkeypatch.setitem(sys.modules, name, None)
    result = report(results, "-o", tmp_path / "x.html")
    assert result.exit_code == 2
    assert "pip install 'rtrl[report]'" in words(result.stderr)
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    assert report(results, "--update", tmp_path / "page.md").exit_code == 0


def test_the_command_is_listed() -> None:
    assert "report" in CliRunner().invoke(app, ["--help"]).stdout
    assert "\n\n" in flowing(command) and "\n" not in flowing(command).replace("\n\n", "")
    for option in ("--output", "--pictures", "--format", "--update", "--check"):
        assert option in report("--help").stdout
