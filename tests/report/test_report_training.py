"""Logs of ``rtrl train`` become curves with their spread; what is wrong in a log is named with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_report_command import report, words
from test_report_page import Page

from rtrl.errors import ConfigError
from rtrl.report import load_training_log, training_plots, training_tables

START = {
    "event": "start",
    "run": "5f",
    "task": "anbn",
    "learner": "block",
    "learner_options": {"block": 8},
    "lr": 0.002,
    "clip": None,
    "seed": 0,
    "measure": "accuracy",
    "chance": 0.5,
    "solved": 0.9,
}


def row(step: int, score: float | None = 0.5, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "score": score, "bytes_held": 1000, "steps_per_s": 50.0, **changes}


def log(folder: Path, name: str, *rows: dict[str, Any], end: str = "", **changes: Any) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({**START, **changes}, *rows)) + end)
    return path


def test_a_single_run_is_smoothed_with_its_spread(tmp_path: Path) -> None:
    rows = [row(10 * n, 0.5 + n / 20) for n in range(1, 11)]
    found = load_training_log(log(tmp_path, "run", *rows, end='{"step": 11'))
    assert len(found) == 10 and found.incomplete
    assert found.settings["learner block"] == 8 and "chance" not in found.settings
    plots = {plot.title: plot for plot in training_plots([found])}
    assert list(plots) == ["Loss", "Score", "Bytes held", "Steps per second"]
    line, chance, solved = plots["Score"].series
    assert line.x == [10 * n for n in range(1, 11)]
    assert (line.y[-1], line.low[-1], line.high[-1]) == pytest.approx((0.9, 0.8, 1.0))  # of the last five rows
    assert line.y[0] == line.low[0] == pytest.approx(0.55)
    assert chance.dashed and chance.y == [0.5, 0.5] and solved.name == "solved 0.9"
    assert [(mark.x, mark.label) for mark in plots["Score"].vertical_lines] == [(80, "solved at step 80")]
    last = training_tables([found])[0].rows
    assert last == [["run", 10, 100, 1.0, 1.0, 1000, 50.0, 80]]


def test_runs_that_differ_in_the_seed_are_one_curve(tmp_path: Path) -> None:
    paths = [
        log(tmp_path, f"r{seed}", *(row(n, seed / 10, loss=None) for n in (5, 10, 15 + seed)), seed=seed)
        for seed in range(3)
    ]
    paths.append(log(tmp_path, "other", row(5, 0.1, loss=None), learner="tbptt", learner_options={"k": 4}))
    plots = {plot.title: plot for plot in training_plots([load_training_log(path) for path in paths])}
    assert "Loss" not in plots  # no row has one
    first, second, *_ = plots["Score"].series
    assert first.name == "learner block, learner block 8, learner k None (3 runs)"
    assert second.name == "learner tbptt, learner block None, learner k 4 (other)"
    assert (first.x, first.y, first.low, first.high) == ([5, 10], [0.1, 0.1], [0, 0], [0.2, 0.2])


def test_a_long_log_has_a_curve_of_two_hundred_points(tmp_path: Path) -> None:
    found = load_training_log(log(tmp_path, "long", *(row(n) for n in range(1, 1001))))
    assert len(training_plots([found])[0].series[0].x) == 200


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1: expected an object in JSON, found b''"),
        ([row(1)], "line 1: expected the settings of a run, as rtrl train writes them"),
        ([{**START, "chance": "x"}], "line 1: chance: expected a number of at most 1e+300, found 'x'"),
        ([{**START, "measure": 1}], "line 1: measure: expected a text, found 1"),
        ([START, row(5), row(5)], "line 3: step: expected a whole number above 5, that of the row before, found 5"),
        ([START, row(5), {"loss": 1}], "line 3: step: expected a number of at most 1e+300, found None"),
        ([START, row(5, loss="x")], "line 2: loss: expected a number of at most 1e+300 or null, found 'x'"),
        ([START, row(5, score=True)], "line 2: score: expected a number"),
        ([START, row(5, bytes_held=10**400)], "line 2: bytes_held: expected a number"),
        ([START, row(5), START], "line 3: step: expected a number"),
        ([START, [1]], "line 2: expected an object in JSON, found b'[1]"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError) as raised:
        load_training_log(path)
    assert str(raised.value).startswith(f"{path}, {message}")


def test_bytes_that_are_no_json(tmp_path: Path) -> None:
    path = log(tmp_path, "run", row(1))
    path.write_bytes(path.read_bytes() + b"\xff\x00\n" + b"[" * 100_000 + b"\n")
    with pytest.raises(ConfigError, match="line 3: expected an object in JSON"):
        load_training_log(path)


def test_the_command_draws_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row(n, loss=None, bytes_held=None) for n in (5, 10)]
    one, two = (log(tmp_path, name, *rows, end=end, task="<script>") for name, end in (("one", ""), ("two", "{")))
    result = report(one, two, "-o", "page.html", "--pictures", "p", "--format", "svg")
    assert result.exit_code == 0, result.output
    assert result.stdout == "p: 2 pictures\npage.html: 2 training logs\n"
    page = Page(Path("page.html").read_text(encoding="utf-8"))
    for said in (
        "Training of <script> 2 runs of rtrl train, 4 rows.", "Curves", "Last rows", "not yet", "learner block 8 8",
        "two: the last line is not whole and is left out.",
    ):  # fmt: skip
        assert said in page.text
    assert len(page.named("svg")) == 2 and all(svg["role"] == "img" for svg in page.named("svg"))
    for arguments, message in (
        ([one, "--check"], "--check and --update are for results of rtrl verify"),
        ([one, "-o", one], "is among the files that are read"),
        ([log(tmp_path, "empty")], "empty.jsonl has no row yet"),
        ([one, tmp_path / "page.html"], "give one results file of rtrl verify, or logs of rtrl train alone"),
    ):
        result = report(*arguments)
        assert result.exit_code == 2 and message.replace(" ", "") in words(result.stderr).replace(" ", "")
    assert not Path("report.html").exists()
