"""``rtrl verify-gradients`` passes the real learner and fails every broken one, and no row passes unseen."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fresh_process
from typer.testing import CliRunner

import rtrl
from rtrl.cli.app import app
from rtrl.errors import ConfigError, NonFiniteError
from rtrl.report.model import SCHEMA
from rtrl.tasks import ByteStream
from rtrl.verification import breaks
from rtrl.verification.gradients import equivalence
from rtrl.verification.gradients.driver import DormancyCount
from rtrl.verification.harness.compare import Comparison, compare_gradients, compare_influences

BROKEN = ["verify-gradients", "--quick"]
SMALL = [*BROKEN, "--window", "3", "--window", "1"]


@pytest.fixture(scope="module", autouse=True)
def _references_once() -> Iterator[None]:
    """The dear references do not depend on the learner: they are computed once for all tests of one size."""
    kept: dict[Any, Any] = {}
    dense, differences = equivalence.dense_rtrl, equivalence.finite_differences

    def once(key: object, segment: Any, compute: Any) -> Any:
        place = f"{key} {segment.inputs.argmax(dim=2).tolist()}"
        if place not in kept:
            kept[place] = compute()
        return kept[place]

    def dense_once(cell: Any, segment: Any, checkpoints: Any, resets: Any = None, offsets: Any = None) -> Any:
        if offsets is not None:
            return dense(cell, segment, checkpoints, resets, offsets)
        return once(("dense", checkpoints, resets is None), segment, lambda: dense(cell, segment, checkpoints, resets))

    def differences_once(cell: Any, segment: Any, sliced: Any, seed: int) -> Any:
        return once(("differences", seed), segment, lambda: differences(cell, segment, sliced, seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equivalence, "QUICK", equivalence.SMALL)
        patch.setattr(equivalence, "dense_rtrl", dense_once)
        patch.setattr(equivalence, "finite_differences", differences_once)
        yield


def run(*arguments: str) -> Any:
    return CliRunner(env={"FORCE_COLOR": None, "COLUMNS": None}).invoke(app, list(arguments))


def words(text: str) -> str:
    """The text without boxes, colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│┃╭╮╰╯─━┏┓┡┩└┘├┤┳╇┬┼┴]", " ", text).split())


def table_lines(stdout: str) -> list[list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in stdout.splitlines() if line.startswith("│")
    ]
    return [line for line in lines if line[0]]


def test_the_real_learner_passes(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = run(*SMALL, "--json", str(path))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("PASS")
    assert "━" not in result.stderr  # no progress bar where there is no terminal
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["versions"]["torch"] == torch.__version__
    assert record["duration_s"] > 0
    (claim,) = record["claims"]  # the form of the file is that of rtrl verify
    assert (record["schema"], claim["id"], claim["verdict"]) == (SCHEMA, "gradient-equivalence", "holds")
    assert claim["failures"] == []
    rows = claim["data"]["rows"]
    assert len(table_lines(result.stdout)) == len(rows) == len(claim["tables"][0]["rows"])
    assert {row["oracle"] for row in rows} == {"BPTT", "dense RTRL", "finite differences"}
    assert {row["window"] for row in rows} == {1, 3}
    assert verdicts(claim) == ["pass"] * len(rows)
    for row in rows:
        assert row["block"] < row["steps"]
        assert row["gradient"]["compared"] > 0
        assert (row["influence"] is not None) == (row["oracle"] == "dense RTRL")
        if row["oracle"] != "finite differences":
            assert row["gradient"]["tolerance"] == 1e-10
        if row["influence"] is not None:
            assert row["influence"]["compared"] > 0
            assert row["influence"]["tolerance"] == 1e-10
    assert any(
        row["dormancy"]["expired"] > 0 and row["dormancy"]["longest"] > row["block"] * row["window"] for row in rows
    )


def verdicts(claim: Any) -> list[str]:
    return [row[-1] for row in claim["tables"][0]["rows"]]


FIXED, SGD, ADAM, RESETS = (
    "fixed parameters",
    "SGD in mid-stream",
    "Adam in mid-stream, slices pending",
    "resets in mid-stream",
)
WRONG = {  # where the break must be seen; where it makes no difference, and must not be
    "truncate": ({FIXED, SGD, ADAM, RESETS}, set()),
    "forget-dormant-losses": ({FIXED, ADAM}, set()),
    "no-catch-up": ({FIXED, SGD, ADAM}, set()),
    "batch-mean": ({FIXED, SGD, ADAM, RESETS}, set()),
    "off-by-one": ({FIXED, SGD, ADAM, RESETS}, set()),
    "drop-expired": ({FIXED}, set()),
    "reverse-products": ({FIXED}, set()),
    "keep-over-resets": ({RESETS}, {FIXED, SGD, ADAM}),
    "count-twice": ({SGD}, {FIXED}),
    "cut-every-5-steps": ({FIXED, SGD, ADAM, RESETS}, set()),
}


def test_every_broken_learner_is_tried() -> None:
    assert WRONG.keys() == set(breaks.OF_GRADIENTS)


IN_THE_GATE = {"truncate"}
"""The other breaks are nightly; the catalogue of bugs has all of these faults."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in IN_THE_GATE else pytest.mark.nightly) for name in breaks.OF_GRADIENTS],
)
def test_a_broken_learner_fails(name: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = run(*BROKEN, "--break", name, "--json", str(path))
    assert result.exit_code == 1, result.output
    assert "FAIL" in result.stdout.splitlines()[-1]
    assert f"broken on purpose: {name}" in words(result.stdout)
    (claim,) = json.loads(path.read_text(encoding="utf-8"))["claims"]
    assert claim["verdict"] == "does not hold"
    failed = [row for row, found in zip(claim["data"]["rows"], verdicts(claim), strict=True) if found == "FAIL"]
    assert len(claim["failures"]) == len(failed)
    shown = [line for line in table_lines(result.stdout) if line[-1] == "FAIL"]
    assert [(line[0], line[2:5]) for line in shown] == [
        (row["oracle"], [str(row[part]) for part in ("block", "window", "steps")]) for row in failed
    ]
    seen, unseen = WRONG[name]
    found = {row["learning"] for row in failed}
    assert seen <= found
    assert not unseen & found
    for row in failed:  # each is a wrong number, not an accident
        assert row["gradient"]["problem"] is None
        assert row["gradient"]["compared"] > 0


def test_what_a_learner_raises_is_a_failure_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(self: rtrl.BlockRTRL, dormant: bool = True) -> None:
        raise NonFiniteError("a Jacobian of step 7")

    monkeypatch.setattr(rtrl.BlockRTRL, "sync", raises)
    result = run(*BROKEN, "--json", "-")
    assert result.exit_code == 1
    assert all(
        "NonFiniteError: a Jacobian of step 7" in failure
        for failure in json.loads(result.stdout)["claims"][0]["failures"]
    )
    assert {line[-1] for line in table_lines(result.stderr)} == {"FAIL"}
    assert result.stderr.splitlines()[-1].startswith("FAIL")


def test_rows_in_which_no_expert_was_dormant_prove_nothing() -> None:
    def rows(*found: equivalence.OracleRow) -> equivalence.OracleRows:
        return equivalence.OracleRows(config=equivalence.QUICK, stream={}, cell="", rows=list(found))

    enough = DormancyCount(1, reactivated=1, expired=1)
    row = equivalence.OracleRow("BPTT", FIXED, 1, 1, 80, Comparison(0.0, 1e-10, 5), None, enough)
    assert rows(row).passed
    assert not rows().passed
    for dormancy in (DormancyCount(1, dormant=1), DormancyCount(1, reactivated=1)):
        few = rows(replace(row, dormancy=dormancy))
        assert not few.passed
        assert "this text says nothing" in few.failures[0]
        assert equivalence.measure.judge(few).name == "does not hold"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--break", "nope"], "there is no break 'nope'; there are: truncate, cut-every-5-steps"),
        (["--steps", "32"], "steps must be more than 64"),
        (["--quick", "--block", "0"], "blocks and windows must be positive"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--file", "no such file"], "does not exist"),
        (["--json", "no/such/folder/x"], "cannot be written"),
        (["--seed", "x"], "Invalid value for '--seed'"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    result = run("verify-gradients", *arguments)
    assert result.exit_code == 2, result.output
    assert message in words(result.stderr)


def test_broken_learners_are_listed() -> None:
    result = run("verify-gradients", "--break", "help")
    assert result.exit_code == 0
    assert all(name in result.stdout and breaks.find(name).fault for name in breaks.OF_GRADIENTS)


def test_the_app_is_a_group() -> None:
    assert run("--version").stdout == f"rtrl {rtrl.__version__}\n"
    assert "verify-gradients" in run("--help").stdout
    common = ("--seed", "--device", "--json")
    for command, options in (
        ("verify", ("--only", "--list", "--full", "--resume")),
        ("verify-gradients", ("--file", "--steps", "--block", "--window", "--quick", "--break")),
    ):
        assert all(option in run(command, "--help").stdout for option in (*common, *options)), command


def test_the_command_line_loads_no_oracle() -> None:
    code = "import sys, rtrl.cli.app; sys.exit(any(name.split('.')[0] == 'oracles' for name in sys.modules))"
    assert fresh_process.run(code).returncode == 0


# ---------------------------------------------------------------------- what a comparison is


ONE = {"p": torch.tensor([[1.0, 2.0], [1e-4, 0.0]])}


def test_equal_gradients_pass_and_are_counted() -> None:
    compared = compare_gradients(ONE, ONE, (), 1e-10)
    assert compared.passed
    assert (compared.error, compared.compared) == (0.0, 3)


@pytest.mark.parametrize(
    "found",
    [{}, {"p": None}, {"p": ONE["p"][0]}, {"p": ONE["p"] * math.nan}, {"q": ONE["p"]}, {"p": ONE["p"] + 1e-8}],
)
def test_other_gradients_do_not_pass(found: dict[str, torch.Tensor | None]) -> None:
    assert not compare_gradients(found, ONE, (), 1e-10).passed


@pytest.mark.parametrize(
    "reference", [{}, {"p": torch.zeros(2, 2)}, {"p": torch.full((2, 2), math.inf)}, {"p": torch.full((2, 2), 1e30)}]
)
def test_a_reference_that_says_nothing_passes_nobody(reference: dict[str, torch.Tensor]) -> None:
    compared = compare_gradients(reference, reference, (), 1e-10)
    assert not compared.passed
    assert compared.problem


def test_a_slice_is_judged_by_its_own_scale() -> None:
    reference = {"p": ONE["p"].double()}
    off = {"p": reference["p"] + torch.tensor([[0.0, 0.0], [1e-12, 0.0]], dtype=torch.float64)}
    assert compare_gradients(off, reference, (), 1e-10).error == pytest.approx(5e-13, rel=1e-3)
    assert compare_gradients(off, reference, ("p",), 1e-10).error == pytest.approx(1e-8, rel=1e-3)


def test_a_column_of_an_influence_is_judged_by_its_own_scale() -> None:
    reference = torch.tensor([[[1.0, 1e-3], [2.0, 0.0]]], dtype=torch.float64)
    off = reference + torch.tensor([[[0.0, 0.0], [0.0, 1e-9]]], dtype=torch.float64)
    assert compare_influences({"p": off}, {"p": reference}, (), 1e-10).error == pytest.approx(1e-6, rel=1e-3)
    silent = {"p": reference, "r": reference * 0}
    assert not compare_influences(silent, silent, (), 1e-10).passed
    assert compare_influences(silent, silent, ("r",), 1e-10).passed
    assert not compare_influences(silent, silent, ("p", "r"), 1e-10).passed
    assert not compare_influences({**silent, "r": reference}, silent, ("r",), 1e-10).passed
    assert not compare_influences({"r": reference * 0}, {"r": reference * 0}, ("r",), 1e-10).passed


def test_dormancy_is_counted_in_whole_blocks() -> None:
    count = DormancyCount(window=2)
    for step, expert in enumerate([0, 1, 1, 1, 0, 2, 2, 2, 2, 0]):  # blocks of two steps
        count.used(step, step // 2, torch.tensor([[expert]]))
    # 0 was dormant through block 1 (3 steps), then through block 3 (4 steps)
    assert (count.reactivated, count.expired, count.longest) == (2, 0, 4)
    end = count.so_far(9, 4)
    assert (end.dormant, end.longest) == (1, 6)  # 1 is dormant since step 3; 2 and 0 were used in the last block
    count.reset([0])
    assert count.so_far(9, 4).dormant == 0


# ---------------------------------------------------------------------- the text


def test_samples_read_from_different_places(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(21)))
    stream = ByteStream(path, 2, offset=3, dtype=torch.float64)
    assert len(stream) == len(list(stream)) == 7
    for t, (x, target) in enumerate(stream):
        assert x.dtype == torch.float64
        assert x.sum(dim=1).tolist() == [1.0, 1.0]
        assert x.argmax(dim=1).tolist() == [3 + t, 13 + t]
        assert target.tolist() == [4 + t, 14 + t]
    assert torch.equal(stream[-1][0], stream[6][0])
    inputs, targets = stream.first(5)
    assert inputs.shape == (5, 2, 256)
    assert targets.shape == (5, 2)
    with pytest.raises(IndexError):
        stream[7]


def test_the_default_text_is_there_and_stays_the_same() -> None:
    one, other = ByteStream(batch_size=2, steps=1000), ByteStream(batch_size=2)
    assert one.digest == other.digest
    assert not torch.equal(one.first(50)[1][:, 0], one.first(50)[1][:, 1])


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, {}, "does not exist"),
        (b"", {}, "is empty"),
        (b"ab", {"batch_size": 2}, "too short: 2 bytes give 0 steps"),
        (b"abcdef", {"steps": 6}, "at least 6 are needed"),
        (b"abcdef", {"offset": 5}, "too short"),
        (b"abcdef", {"batch_size": 0}, "batch_size must be a positive integer"),
        (b"abcdef", {"offset": -1}, "offset must be"),
    ],
)
def test_texts_that_cannot_be_read(
    tmp_path: Path, content: bytes | None, arguments: dict[str, int], message: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        ByteStream(path, **arguments)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        ByteStream(tmp_path)
