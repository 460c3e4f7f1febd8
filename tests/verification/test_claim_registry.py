"""Claims as a list: who is in it, how a selection is measured, and what goes on record."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rtrl.errors import ConfigError
from rtrl.report import plain, to_json
from rtrl.report.model import Plot, Series, Table
from rtrl.verification import record, registry, runner
from rtrl.verification.claim import Claim, Judgement, Measurements, NotMeasured, Settings, Shown, claim

Measure = Callable[[str, Settings], Measurements]
GOOD = Judgement.holds()


def made(name: str, measure: Measure, verdict: Judgement = GOOD, void: str = "") -> Claim[str, Measurements]:
    return claim(
        name,
        claimed=f"{name} was claimed",
        threshold="≥ 1 ×",
        quick="quick",
        full="full",
        verdict=lambda m: verdict,
        show=lambda m: Shown("2 ×"),
        void=void,
    )(measure)


def nothing(config: str, settings: Settings) -> Measurements:
    return Measurements()


def test_every_claim_has_an_id_of_its_own_and_says_how_it_is_measured() -> None:
    found = registry.claims()
    assert found[0].id == "gradient-equivalence"
    ids = [claim.id for claim in found]
    assert len(set(ids)) == len(ids) == 26
    for one in found:
        assert one.claimed and one.threshold
        assert one.question or one.id in ("conditioning", "extraction", "patterns"), one.id
        for word in ("How it is measured", "Why that is fair", "What it leaves open"):
            assert word in one.explanation, (one.id, word)
        assert one.explanation == one.explanation.strip()


def test_a_selection_keeps_the_order_and_knows_its_names() -> None:
    first = registry.claims()[0]
    assert registry.select([first.id, first.id]) == [first]
    assert registry.select([]) == registry.claims()
    with pytest.raises(ConfigError, match="there is no claim 'nope'; there are: gradient-equivalence"):
        registry.select(["nope"])


def test_what_one_claim_raises_is_its_own_failure() -> None:
    def raises(config: str, settings: Settings) -> Measurements:
        raise ZeroDivisionError("by nothing")

    seen: list[str] = []
    outcomes = runner.measure(
        [made("bad", raises), made("good", nothing)], Settings(), each=lambda o: seen.append(o.claim.id)
    )
    assert seen == ["bad", "good"]
    assert (outcomes[1].finding.verdict, outcomes[1].finding.result) == ("holds", "2 ×")
    assert outcomes[0].finding.verdict == "not measured"
    entries = [record.entry(outcome) for outcome in outcomes]
    assert record.failures(entries) == ["bad: ZeroDivisionError: by nothing"]
    assert record.failures(entries[1:]) == []
    assert record.failures([]) == ["no claim was measured"]


def test_a_stop_by_hand_is_no_failure_of_a_claim() -> None:
    def stopped(config: str, settings: Settings) -> Measurements:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.measure([made("stopped", stopped)], Settings())


def test_what_cannot_be_measured_is_no_failure() -> None:
    def absent(config: str, settings: Settings) -> Measurements:
        raise NotMeasured("no device")

    finding = runner.measure_one(made("absent", absent), Settings()).finding
    assert (finding.verdict, finding.condition, finding.failures) == ("not measured", "no device", [])


def test_the_form_is_that_of_the_settings_unless_another_is_given() -> None:
    forms: list[str] = []

    def notes(config: str, settings: Settings) -> Measurements:
        forms.append(config)
        return Measurements()

    one = made("one", notes)
    for settings, config in ((Settings(), None), (Settings(full=True), None), (Settings(full=True), "brief")):
        runner.measure_one(one, settings, config)
    assert forms == ["quick", "full", "brief"]


@pytest.mark.parametrize(("void", "verdict"), [("", "holds"), ("the results are void", "does not hold")])
def test_failures_void_the_verdict_of_a_claim_that_says_so(void: str, verdict: str) -> None:
    def fails(config: str, settings: Settings) -> Measurements:
        return Measurements(failures=["gradients differ"])

    finding = runner.measure_one(made("one", fails, void=void), Settings()).finding
    assert (finding.verdict, finding.condition, finding.failures) == (verdict, void, ["gradients differ"])
    assert runner.measure_one(made("one", nothing, void=void), Settings()).finding.verdict == "holds"


def test_a_claim_measures_the_same_alone_and_after_another() -> None:
    drawn: list[float] = []
    threads = torch.get_num_threads()

    def draws(config: str, settings: Settings) -> Measurements:
        drawn.append(float(torch.rand(())))
        assert torch.get_num_threads() == 1
        torch.set_num_threads(threads + 1)
        return Measurements()

    before = torch.random.get_rng_state()
    runner.measure([made("one", draws), made("two", draws)], Settings(seed=5))
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_number_of_threads_is_restored_after_an_error() -> None:
    def raises(config: str, settings: Settings) -> Measurements:
        raise ZeroDivisionError

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        runner.measure([made("bad", raises)], Settings())
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_progress_names_the_claim() -> None:
    reports: list[tuple[str, int]] = []

    def works(config: str, settings: Settings) -> Measurements:
        settings.progress("a piece")
        return Measurements()

    runner.measure([made("one", works), made("two", works)], Settings(), lambda *what: reports.append(what))
    assert ("two: a piece", 1) in reports


def test_the_record_is_json_without_nan(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Numbers(Measurements):
        pair: tuple[float, float] = (1, 2.5)

    def show(m: Numbers) -> Shown:
        return Shown(
            "1",
            [Table("t", ["a", "b"], [["x", math.nan], [None, 2]])],
            [Plot("p", "x", "y", [Series("s", [1.0], [math.inf], dashed=True)], kind="raster", log_x=True)],
        )

    form = {"claimed": "one was claimed", "threshold": "2", "quick": None, "full": None}
    one = claim("one", **form, verdict=lambda m: Judgement.does_not_hold("3"), show=show)(
        lambda config, settings: Numbers(failures=["4"])
    )
    (outcome,) = runner.measure([one], Settings(full=True, seed=3))
    path = tmp_path / "results.json"
    path.write_text(to_json(record.record([record.entry(outcome)], Settings(full=True, seed=3), "rtrl verify")))
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert whole.keys() == {
        "schema", "created", "command", "mode", "seed", "device", "code", "machine", "versions", "duration_s",
        "claims",
    }  # fmt: skip
    assert (whole["schema"], whole["mode"], whole["seed"], whole["device"]) == (2, "full", 3, "cpu")
    assert whole["machine"].keys() == {"cpu", "cores", "threads", "memory_bytes", "os"}
    assert {"rtrl", "torch", "python"} <= whole["versions"].keys()
    (found,) = whole["claims"]
    assert whole["duration_s"] == found["duration_s"]
    assert found.pop("duration_s") >= 0
    assert found.pop("measured") <= whole["created"]
    assert found.pop("explanation") == __doc__
    assert found == {
        "id": "one",
        "claimed": "one was claimed",
        "result": "1",
        "threshold": "2",
        "verdict": "does not hold",
        "condition": "3",
        "failures": ["4"],
        "tables": [{"title": "t", "columns": ["a", "b"], "rows": [["x", None], [None, 2]]}],
        "plots": [
            {
                "title": "p", "x_label": "x", "y_label": "y", "kind": "raster", "log_x": True, "log_y": False,
                "series": [{"name": "s", "x": [1.0], "y": [None], "dashed": True, "low": [], "high": []}],
                "vertical_lines": [], "x_names": [], "y_names": [],
            }
        ],
        "data": {"failures": ["4"], "pair": [1, 2.5]},
        "headline": "", "model": "", "question": "", "tried": [], "noticed": [], "no_break": "", "kept": False,
    }  # fmt: skip


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="Tensor is not a plain JSON value"):
        plain({"a": [torch.ones(1)]})
