"""Claims as a list: who is in it, how a selection is measured, and what goes on record."""

import json
import math
from collections.abc import Callable

import pytest
import torch

from rtrl.errors import ConfigError
from rtrl.report import plain
from rtrl.verification import record, registry, runner
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table

GOOD = Finding("2 ×", "≥ 1 ×", "holds")


def made(name: str, measure: Callable[[Settings, Progress], Finding]) -> Claim:
    return Claim(name, f"{name} was claimed", measure)


def test_every_claim_has_an_id_of_its_own_and_says_how_it_is_measured() -> None:
    found = registry.claims()
    assert found[0].id == "gradient-equivalence"
    ids = [claim.id for claim in found]
    assert len(set(ids)) == len(ids)
    for claim in found:
        assert claim.claimed
        module = __import__(claim.measure.__module__, fromlist=["CLAIM"])
        assert module.CLAIM is claim
        for word in ("How it is measured", "Why that is fair", "What it leaves open"):
            assert word in module.__doc__, (claim.id, word)


def test_a_selection_keeps_the_order_and_knows_its_names() -> None:
    first = registry.claims()[0]
    assert registry.select([first.id, first.id]) == [first]
    assert registry.select([]) == registry.claims()
    with pytest.raises(ConfigError, match="there is no claim 'nope'; there are: gradient-equivalence"):
        registry.select(["nope"])


def test_what_one_claim_raises_is_its_own_failure() -> None:
    def raises(settings: Settings, progress: Progress) -> Finding:
        raise ZeroDivisionError("by nothing")

    seen: list[str] = []
    outcomes = runner.measure(
        [made("bad", raises), made("good", lambda *_: GOOD)], Settings(), each=lambda o: seen.append(o.claim.id)
    )
    assert seen == ["bad", "good"]
    assert outcomes[1].finding is GOOD
    assert outcomes[0].finding.verdict == "not measured"
    entries = [record.entry(outcome) for outcome in outcomes]
    assert record.failures(entries) == ["bad: ZeroDivisionError: by nothing"]
    assert record.failures(entries[1:]) == []
    assert record.failures([]) == ["no claim was measured"]


def test_a_stop_by_hand_is_no_failure_of_a_claim() -> None:
    def stopped(settings: Settings, progress: Progress) -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.measure([made("stopped", stopped)], Settings())


def test_a_claim_measures_the_same_alone_and_after_another() -> None:
    drawn: list[float] = []
    threads = torch.get_num_threads()

    def draws(settings: Settings, progress: Progress) -> Finding:
        drawn.append(float(torch.rand(())))
        assert torch.get_num_threads() == threads
        torch.set_num_threads(threads + 1)
        return GOOD

    before = torch.random.get_rng_state()
    runner.measure([made("one", draws), made("two", draws)], Settings(seed=5))
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_progress_names_the_claim() -> None:
    told: list[tuple[str, int, int]] = []

    def works(settings: Settings, progress: Progress) -> Finding:
        progress("a piece", 3, 7)
        return GOOD

    runner.measure([made("one", works), made("two", works)], Settings(), lambda *what: told.append(what))
    assert ("two: a piece", 1, 2) in told


def test_the_record_is_json_without_nan() -> None:
    finding = Finding(
        "1", "2", "does not hold", "3", ["4"],
        [Table("t", ["a", "b"], [["x", math.nan], [None, 2]])],
        [Plot("p", "x", "y", [Series("s", [1.0], [math.inf], dashed=True)], kind="raster", log_x=True)],
        {"tuple": (1, 2.5)},
    )  # fmt: skip
    (outcome,) = runner.measure([made("one", lambda *_: finding)], Settings(full=True, seed=3))
    made_of = record.record([record.entry(outcome)], Settings(full=True, seed=3), "rtrl verify")
    whole = json.loads(json.dumps(made_of, allow_nan=False))
    assert whole.keys() == {
        "schema", "created", "command", "mode", "seed", "device", "machine", "versions", "duration_s", "claims",
    }  # fmt: skip
    assert (whole["schema"], whole["mode"], whole["seed"], whole["device"]) == (2, "full", 3, "cpu")
    assert whole["machine"].keys() == {"cpu", "cores", "threads", "memory_bytes", "os"}
    assert {"rtrl", "torch", "python"} <= whole["versions"].keys()
    (one,) = whole["claims"]
    assert whole["duration_s"] == one["duration_s"]
    assert one.pop("duration_s") >= 0
    assert one.pop("explanation") == __doc__
    assert one == {
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
                "series": [{"name": "s", "x": [1.0], "y": [None], "dashed": True}],
            }
        ],
        "data": {"tuple": [1, 2.5]},
    }  # fmt: skip


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="Tensor is not a plain JSON value"):
        plain({"a": [torch.ones(1)]})
