"""Short forms of what is done to files at length: damage, and kills of runs. ``-m nightly`` runs the long forms."""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability import damage, fuzz_targets, kills

from rtrl.errors import RTRLError


def test_damaged_files_are_refused_or_load_what_they_say() -> None:
    for kind, make in damage.KINDS.items():
        found = damage.count_outcomes("mixture", make, 4, 7)
        assert found["refused"] >= 2 and (kind == "forged fields" or not found["what it says"])


@pytest.mark.nightly
@pytest.mark.parametrize("name", damage.RUNS)
def test_many_damaged_files_are_refused_or_load_what_they_say(name: str) -> None:
    for kind, make in damage.KINDS.items():
        found = damage.count_outcomes(name, make, 110, 1)
        assert found["refused"] > 50, (kind, found)


def test_that_damage_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = damage.written("rows", 3)
    whole = damage.essence(damage.content_of(data))
    content = damage.content_of(data)
    name = next(iter(content["trainer"]["cell"]))
    case = damage.Case(
        "", damage.as_file(damage.put(content, ("trainer", "cell", name), content["trainer"]["cell"][name] + 1))
    )
    assert damage.outcome(case, tmp_path / "run.pt", whole) == "what it says"
    for error, words in ((KeyError("x"), "KeyError"), (RTRLError("pass weights_only=False"), "weights_only")):

        def fails(path: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(damage, "load", fails)
        with pytest.raises(AssertionError, match=words):
            damage.outcome(case, tmp_path / "run.pt", whole)
    assert len({each.data for each in damage.damaged_bytes(data, random.Random(0), 40)}) > 30


def test_killed_runs_end_as_if_they_had_not_been() -> None:
    tally = kills.kill(3, names=("dense",), steps=6)
    assert tally.runs >= 1 and sum(tally.kills.values()) >= 3


@pytest.mark.nightly
def test_many_killed_runs_end_as_if_they_had_not_been() -> None:
    tally = kills.kill(300)
    assert tally.runs > 10 and tally.in_writes > 5, str(tally)


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=64))
def test_what_reads_files_names_every_error(name: str, data: bytes) -> None:
    fuzz_targets.TARGETS[name](data)
