"""``rtrl verify`` over the whole table: the selection, a line a claim, the results and the exit code."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rtrl
from rtrl.cli.app import app
from rtrl.cli.results_file import command
from rtrl.report import load_record
from rtrl.verification import breaks, record, registry
from rtrl.verification.claim import Claim, Judgement, Measurements, NotMeasured, Settings, Shown, claim

Measure = Callable[[None, Settings], Measurements]
FOUND = {
    "good": ("2 ×", "≥ 1 ×", Judgement.holds()),
    "depends": ("2 ×", "≥ 3 ×", Judgement.holds_when("H ≥ [bold] 64")),
    "wrong": ("0.5 ×", "≥ 1 ×", Judgement.does_not_hold("it is slower")),
    "absent": ("", "", Judgement.holds()),
}
calls: list[Settings] = []


def planted(name: str, like: str = "good", measure: Measure | None = None) -> Claim[None, Measurements]:
    """A claim with the verdict of another, which notes the settings that it is measured with."""
    result, threshold, verdict = FOUND[like]

    def note(config: None, settings: Settings) -> Measurements:
        calls.append(settings)
        if like == "absent":
            raise NotMeasured("no device")
        return Measurements(failures=["gradients differ"] if name == "broken" else [])

    words = {"claimed": f"{name}, they said", "threshold": threshold, "quick": None, "full": None}
    return claim(name, **words, verdict=lambda m: verdict, show=lambda m: Shown(result))(measure or note)


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [planted(name, name) for name in FOUND] + [planted("broken")]
    monkeypatch.setattr(registry, "claims", lambda: claims)
    calls.clear()


def verify(*arguments: str) -> Any:
    return CliRunner(env={"FORCE_COLOR": None, "COLUMNS": None}).invoke(app, ["verify", *arguments])


ALL_BUT_BROKEN = [word for name in FOUND for word in ("--only", name)]


def test_a_line_a_claim_and_exit_code_0_whatever_came_of_them() -> None:
    result = verify(*ALL_BUT_BROKEN)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"good +holds +2 ×  \(required: ≥ 1 ×\)  0 s", lines[0])
    assert re.fullmatch(r"depends +holds when … +2 ×  \(required: ≥ 3 ×\)  0 s", lines[1])
    assert lines[2].strip() == "H ≥ [bold] 64"
    assert re.fullmatch(r"wrong +does not hold +0\.5 ×  \(required: ≥ 1 ×\)  0 s", lines[3])
    assert re.fullmatch(r"absent +not measured +—  0 s", lines[5])
    assert lines[-1].startswith("PASS: 4 claims: 1 holds, 1 holds when, 1 does not hold, 1 not measured")


def test_a_failure_is_the_exit_code() -> None:
    result = verify()
    assert result.exit_code == 1
    assert "FAIL: gradients differ" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAIL: 1 failures, first: broken: gradients differ; 5 claims")


def test_a_claim_that_raises_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(config: None, settings: Settings) -> Measurements:
        raise RuntimeError("no more")

    monkeypatch.setattr(registry, "claims", lambda: [planted("raises", measure=raises), planted("fine")])
    result = verify()
    assert result.exit_code == 1
    assert "FAIL: RuntimeError: no more" in result.stdout
    assert re.search(r"^fine +holds", result.stdout, re.MULTILINE)


def test_options_reach_the_claims(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert verify("--only", "good", "--full", "--seed", "7", "--json", str(path)).exit_code == 0
    assert calls == [Settings(full=True, seed=7, device="cpu")]
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["mode"], record["seed"], [claim["id"] for claim in record["claims"]]) == ("full", 7, ["good"])
    result = verify("--only", "good", "--json", "-")
    assert json.loads(result.stdout)["mode"] == "quick"
    assert "good" in result.stderr


def test_a_run_that_is_cut_off_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    measured: list[str] = []

    def fine(config: None, settings: Settings) -> Measurements:
        measured.append("fine")
        return Measurements()

    def cut_off(config: None, settings: Settings) -> Measurements:
        raise KeyboardInterrupt

    def later(config: None, settings: Settings) -> Measurements:
        measured.append("later")
        return Measurements()

    claims = [planted("fine", measure=fine), planted("long", "wrong", cut_off), planted("later", "wrong", later)]
    monkeypatch.setattr(registry, "claims", lambda: claims)
    assert verify("--json", str(path)).exit_code != 0
    assert [claim["id"] for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]] == ["fine"]
    claims[1] = planted("long", "wrong", later)
    result = verify("--json", str(path), "--resume", "--only", "later")  # out of order
    assert result.exit_code == 0, result.output
    result = verify("--json", str(path), "--resume")
    assert measured == ["fine", "later", "later"]  # what was there is not measured again
    assert re.search(r"^fine +holds +2 ×", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1].startswith(
        "PASS: 3 claims: 1 holds, 2 does not hold; 2 kept from an earlier run of the same code"
    )
    assert re.search(r"^fine +holds .* 0 s, kept, measured 20\d\d-", result.stdout, re.MULTILINE)
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert [claim["id"] for claim in whole["claims"]] == ["fine", "long", "later"]
    assert whole["claims"][0]["result"] == "2 ×"


def test_what_failed_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    verify("--json", str(path))
    calls.clear()
    result = verify("--json", str(path), "--resume")
    assert len(calls) == 1 and result.exit_code == 1
    assert "broken: gradients differ" in result.stdout
    result = verify("--json", str(path), "--resume", "--only", "good")  # nor is it forgotten
    assert len(calls) == 1 and result.exit_code == 1
    assert len(json.loads(path.read_text(encoding="utf-8"))["claims"]) == len(FOUND) + 1


def test_only_results_of_the_same_code_are_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    verify("--json", str(path), "--only", "good")
    before = path.read_text(encoding="utf-8")
    calls.clear()
    for arguments, name in ((["--full"], "mode"), (["--seed", "1"], "seed")):
        result = verify("--json", str(path), "--resume", *arguments)
        assert (result.exit_code, calls) == (2, [])
        assert f"its {name} is" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    monkeypatch.setattr(record, "code", lambda: "edited")
    result = verify("--json", str(path), "--resume")
    assert result.exit_code == 2
    assert "its code is" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    monkeypatch.undo()
    monkeypatch.setattr(record, "versions", lambda: {"rtrl": "another"})
    assert verify("--json", str(path), "--resume").exit_code == 2
    assert path.read_text(encoding="utf-8") == before
    path.write_text("[]", encoding="utf-8")
    result = verify("--json", str(path), "--resume")
    assert (result.exit_code, calls) == (2, [])
    assert "holds no results of rtrl verify" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def test_another_commit_of_the_same_code_is_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    verify("--json", str(path), "--only", "good")
    calls.clear()
    found = {**record.versions(), "commit": "another"}
    monkeypatch.setattr(record, "versions", lambda: found)
    assert verify("--json", str(path), "--resume", "--only", "good").exit_code == 0
    assert calls == []


# ---------------------------------------------------------------------- with breaks


def listens(name: str, **promises: Any) -> Claim[None, Measurements]:
    """A claim that fails where nothing is ever dormant; "deaf" looks at nothing."""

    def look(config: None, settings: Settings) -> Measurements:
        calls.append(settings)
        if name == "deaf":
            return Measurements()
        if breaks.active() == ("slow",):
            raise ZeroDivisionError("by nothing")
        cell = rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=3, n_experts=4, topk=1)
        return Measurements(failures=[] if rtrl.BlockRTRL(cell, 1).lazy else ["nothing is lazy"])

    words = {"claimed": f"{name}, they said", "threshold": "≥ 1 ×", "quick": None, "full": None, **promises}
    return claim(name, **words, verdict=lambda m: Judgement.holds(), show=lambda m: Shown("2 ×"))(look)


def test_a_break_is_noticed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [listens("hears", noticed_breaks=("eager",)), listens("excused"), listens("deaf")]
    monkeypatch.setattr(registry, "claims", lambda: claims)
    result = verify("--break", "eager", "--break", "slow")
    assert result.exit_code == 0, result.output
    assert re.search(r"^hears +eager: noticed, 'holds' → 'holds': nothing is lazy", result.stdout, re.MULTILINE)
    assert "slow: noticed, 'holds' → 'not measured': ZeroDivisionError: by nothing" in result.stdout
    assert re.search(r"^deaf +eager: not noticed, still 'holds'", result.stdout, re.MULTILINE)
    claims[2] = listens("deaf", noticed_breaks=("eager",))
    result = verify("--break", "eager")
    assert result.exit_code == 1
    assert "DEAF: the break eager does not change the verdict, 'holds'" in result.stdout


def test_a_matrix_is_resumed_and_says_who_is_deaf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    claims = [listens("hears"), listens("deaf"), planted("absent", "absent"), listens("wrong", no_break="a reason")]
    monkeypatch.setattr(registry, "claims", lambda: claims)
    monkeypatch.setattr(breaks, "BREAKS", {name: breaks.BREAKS[name] for name in ("truncate", "eager")})
    result = verify("--break", "truncate", "--small", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert calls == [Settings(small=True)] * 7
    calls.clear()
    result = verify("--matrix", "--small", "--json", str(path), "--resume")
    assert len(calls) == 3  # eager alone, and nothing for the claim that cannot be measured
    assert result.exit_code == 1
    assert re.search(r"^hears +1 of 2 breaks noticed: eager", result.stdout, re.MULTILINE)
    assert "DEAF: no break changes the verdict, and it does not say why" in result.stdout
    assert "DEAF: it says that no break can change the verdict; eager does" in result.stdout
    assert "FAIL: 2 failures, first: deaf: no break changes" in result.stdout.splitlines()[-1]
    whole = load_record(path)
    assert whole.mode == "small"
    assert [(found.id, found.tried, found.noticed) for found in whole.claims] == [
        ("hears", ["truncate", "eager"], ["eager"]),
        ("deaf", ["truncate", "eager"], []),
        ("absent", [], []),
        ("wrong", ["truncate", "eager"], ["eager"]),
    ]
    assert whole.claims[0].data["breaks"]["eager"] == {"verdict": "holds", "failure": "nothing is lazy"}


def test_what_a_matrix_found_is_added_to_results_of_the_same_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    matrix, path = str(tmp_path / "matrix.json"), tmp_path / "results.json"
    claims = [listens("hears"), listens("deaf")]
    monkeypatch.setattr(registry, "claims", lambda: claims)
    verify("--break", "eager", "--small", "--json", matrix, "--only", "hears")
    calls.clear()
    result = verify("--json", str(path), "--matrix-from", matrix)
    assert (result.exit_code, len(calls)) == (0, 2), result.output
    assert [(c.mode, found.tried, found.noticed) for c in [load_record(path)] for found in c.claims] == [
        ("quick", ["eager"], ["eager"]),
        ("quick", [], []),
    ]
    monkeypatch.setattr(record, "code", lambda: "edited")
    result = verify("--json", str(path), "--matrix-from", matrix)
    assert result.exit_code == 2
    assert "is of other code" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def test_breaks_are_listed() -> None:
    result = verify("--break", "help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in breaks.BREAKS)


def test_the_claims_are_listed() -> None:
    result = verify("--list")
    assert result.exit_code == 0
    assert all(name in result.stdout and f"{name}, they said" in result.stdout for name in FOUND)
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nope"], "there is no claim 'nope'; there are: good, depends, wrong, absent, broken"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--json", "no/such/folder/x"], "cannot be written"),
        (["--steps", "90"], "--steps is an option of rtrl verify-gradients now"),
        (["--only", "good", "--quick"], "--quick is an option of rtrl verify-gradients now"),
        (["--break", "nope"], "there is no break 'nope'; there are: truncate, cut-every-5-steps"),
        (["--full", "--small"], "--full and --small are two forms"),
        (["--file", "x", "--full"], "--file is an option of rtrl verify-gradients now"),
        (["--resume"], "--resume needs --json PATH"),
        (["--resume", "--json", "-"], "--resume needs --json PATH"),
    ],
)
def test_bad_usage(arguments: list[str], message: str) -> None:
    result = verify(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert calls == []


def test_the_command_on_record_does_not_say_where_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/rtrl", "verify", "--json", "/home/me/results.json", "--only", "a/b"])
    assert command() == "rtrl verify --json results.json --only a/b"
