"""``rtrl verify`` over the whole table: the selection, a line a claim, the results and the exit code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rtrl.cli.app import app
from rtrl.verification import record, registry
from rtrl.verification.claim import Claim, Finding, Progress, Settings

FOUND = {
    "good": Finding("2 ×", "≥ 1 ×", "holds"),
    "depends": Finding("2 ×", "≥ 3 ×", "holds when", "H ≥ [bold] 64"),
    "wrong": Finding("0.5 ×", "≥ 1 ×", "does not hold", "it is slower"),
    "absent": Finding("—", "", "not measured", "no device"),
}
BROKEN = Finding("2 ×", "≥ 1 ×", "holds", failures=["gradients differ"])
given: list[Settings] = []


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    def claim(name: str, finding: Finding) -> Claim:
        def measure(settings: Settings, progress: Progress) -> Finding:
            given.append(settings)
            return finding

        return Claim(name, f"{name}, they said", measure)

    planted = [claim(name, finding) for name, finding in {**FOUND, "broken": BROKEN}.items()]
    monkeypatch.setattr(registry, "claims", lambda: planted)
    given.clear()


def verify(*arguments: str) -> Any:
    return CliRunner(env={"FORCE_COLOR": None, "COLUMNS": None}).invoke(app, ["verify", *arguments])


ALL_BUT_BROKEN = [word for name in FOUND for word in ("--only", name)]


def test_a_line_a_claim_and_exit_code_0_whatever_came_of_them() -> None:
    result = verify(*ALL_BUT_BROKEN)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"good +holds +2 ×  \(asked: ≥ 1 ×\)  0 s", lines[0])
    assert re.fullmatch(r"depends +holds when … +2 ×  \(asked: ≥ 3 ×\)  0 s", lines[1])
    assert lines[2].strip() == "H ≥ [bold] 64"
    assert re.fullmatch(r"wrong +does not hold +0\.5 ×  \(asked: ≥ 1 ×\)  0 s", lines[3])
    assert re.fullmatch(r"absent +not measured +—  0 s", lines[5])
    assert lines[-1].startswith("PASS: 4 claims: 1 holds, 1 holds when, 1 does not hold, 1 not measured")


def test_a_failure_shuts_the_gate() -> None:
    result = verify()
    assert result.exit_code == 1
    assert "FAIL: gradients differ" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAIL: 1 failures, first: broken: gradients differ; 5 claims")


def test_a_claim_that_raises_shuts_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(settings: Settings, progress: Progress) -> Finding:
        raise RuntimeError("no more")

    monkeypatch.setattr(
        registry, "claims", lambda: [Claim("raises", "", raises), Claim("fine", "", lambda *_: FOUND["good"])]
    )
    result = verify()
    assert result.exit_code == 1
    assert "FAIL: RuntimeError: no more" in result.stdout
    assert re.search(r"^fine +holds", result.stdout, re.MULTILINE)


def test_options_reach_the_claims(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert verify("--only", "good", "--full", "--seed", "7", "--json", str(path)).exit_code == 0
    assert given == [Settings(full=True, seed=7, device="cpu")]
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["mode"], record["seed"], [claim["id"] for claim in record["claims"]]) == ("full", 7, ["good"])
    result = verify("--only", "good", "--json", "-")
    assert json.loads(result.stdout)["mode"] == "quick"
    assert "good" in result.stderr


def test_a_run_that_is_cut_off_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    measured: list[str] = []

    def fine(settings: Settings, progress: Progress) -> Finding:
        measured.append("fine")
        return FOUND["good"]

    def cut_off(settings: Settings, progress: Progress) -> Finding:
        raise KeyboardInterrupt

    def later(settings: Settings, progress: Progress) -> Finding:
        measured.append("later")
        return FOUND["wrong"]

    claims = [Claim("fine", "", fine), Claim("long", "", cut_off), Claim("later", "", later)]
    monkeypatch.setattr(registry, "claims", lambda: claims)
    assert verify("--json", str(path)).exit_code != 0
    assert [claim["id"] for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]] == ["fine"]
    claims[1] = Claim("long", "", later)
    result = verify("--json", str(path), "--resume", "--only", "later")  # out of order
    assert result.exit_code == 0, result.output
    result = verify("--json", str(path), "--resume")
    assert measured == ["fine", "later", "later"]  # what was there is not measured again
    assert re.search(r"^fine +holds +2 ×", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1].startswith("PASS: 3 claims: 1 holds, 2 does not hold")
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert [claim["id"] for claim in whole["claims"]] == ["fine", "long", "later"]
    assert whole["claims"][0]["result"] == "2 ×"


def test_what_failed_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    verify("--json", str(path))
    given.clear()
    result = verify("--json", str(path), "--resume")
    assert len(given) == 1 and result.exit_code == 1
    assert "broken: gradients differ" in result.stdout
    result = verify("--json", str(path), "--resume", "--only", "good")  # nor is it forgotten
    assert len(given) == 1 and result.exit_code == 1
    assert len(json.loads(path.read_text(encoding="utf-8"))["claims"]) == len(FOUND) + 1


def test_only_results_of_the_same_code_are_gone_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    verify("--json", str(path), "--only", "good")
    before = path.read_text(encoding="utf-8")
    given.clear()
    for arguments, name in ((["--full"], "mode"), (["--seed", "1"], "seed")):
        result = verify("--json", str(path), "--resume", *arguments)
        assert (result.exit_code, given) == (2, [])
        assert f"its {name} is" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    monkeypatch.setattr(record, "versions", lambda: {"rtrl": "another"})
    assert verify("--json", str(path), "--resume").exit_code == 2
    assert path.read_text(encoding="utf-8") == before
    path.write_text("[]", encoding="utf-8")
    result = verify("--json", str(path), "--resume")
    assert (result.exit_code, given) == (2, [])
    assert "holds no results of rtrl verify" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def test_the_claims_are_listed() -> None:
    result = verify("--list")
    assert result.exit_code == 0
    assert all(name in result.stdout and f"{name}, they said" in result.stdout for name in FOUND)
    assert given == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nope"], "there is no claim 'nope'; there are: good, depends, wrong, absent, broken"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--json", "no/such/folder/x"], "cannot be written"),
        (["--only", "good", "--steps", "90"], "--steps is of gradient-equivalence alone"),
        (["--only", "good", "--quick"], "--quick is of gradient-equivalence alone"),
        (["--quick", "--full"], "exclude each other"),
        (["--resume"], "--resume needs --json PATH"),
        (["--resume", "--json", "-"], "--resume needs --json PATH"),
        (["--steps", "0"], "steps must be more than"),
    ],
)
def test_bad_usage(arguments: list[str], message: str) -> None:
    result = verify(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert given == []
