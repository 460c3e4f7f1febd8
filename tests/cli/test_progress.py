"""Every command that may take long says on stderr what it does, also without a terminal, and also within one piece."""

import importlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import published
from typer.testing import CliRunner

import rtrl.report
from rtrl.cli import console
from rtrl.cli.app import app
from rtrl.errors import ConfigError
from rtrl.report import load_training_log
from rtrl.testing.pytest_nodes import BoundCheck
from rtrl.verification import registry, runner
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim


def slow(*arguments: Any, **options: Any) -> Any:
    """Stands for any work that takes long: no word of its own progress, then an end."""
    time.sleep(0.1)
    raise ConfigError("the fake is done")


@claim(
    "slow-claim",
    claimed="it is slow",
    threshold="",
    quick="quick",
    full="full",
    verdict=lambda m: Judgement.holds(),
    show=lambda m: Shown("slow"),
)
def slow_claim(config: str, settings: Settings) -> Measurements:
    settings.progress("a long piece")
    time.sleep(0.1)
    return Measurements()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "INTERVAL_S", 0.02)


def lines(*arguments: str) -> list[str]:
    """What a command says on stderr without a terminal."""
    return CliRunner(env={"FORCE_COLOR": None, "TTY_COMPATIBLE": None}).invoke(app, arguments).stderr.splitlines()


def test_no_more_than_ten_seconds_pass_without_a_line() -> None:
    assert 0 < importlib.reload(console).INTERVAL_S <= 10


def test_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "claims", lambda: [slow_claim])
    found = [line for line in lines("verify") if re.fullmatch(r"slow-claim: a long piece 0/1 \d+\.\d s", line)]
    assert len(found) >= 2


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "INTERVAL_S", 0.002)
    options = {"steps": 24, "batch-size": 1, "cell": "rnn", "evaluate": 4, "log-every": 4, "learner-option": "block=4"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    found = lines("train", "anbn", *words, "--checkpoint", str(tmp_path / "run.pt"))
    assert any(re.match(r"anbn \d+/24 .* s loss .* \d+/s .*B$", line) for line in found), found
    assert len(load_training_log(tmp_path / "run.jsonl")) == 6  # what rtrl train writes, rtrl report reads


@pytest.mark.parametrize(
    ("place", "arguments", "said"),
    [
        ((rtrl, "plan"), ["plan", "--steps", "10", "--kind", "rnn", "--no-measure"], r"planning \d+\.\d s"),
        ((runner, "measure_one"), ["verify-gradients", "--quick"], r"reading 0/\d+ \d+\.\d s"),
        ((rtrl.report, "render_page"), ["report", str(published.CLAIMS.results)], r"drawing report.html \d+\.\d s"),
        ((BoundCheck, "report"), ["check", "slow_cell:make"], r"make: .* 0/\d+ \d+\.\d s"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_others(place: Any, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_cell.py").write_text("from rtrl.cells import MinGRU\n\ndef make():\n    return MinGRU(2, 2)\n")
    monkeypatch.setattr(*place, slow)
    found = lines(*arguments)
    assert re.fullmatch(said, found[0]), found
    assert any("the fake is done" in line for line in found)
