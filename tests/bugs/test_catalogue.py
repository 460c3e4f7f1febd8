"""The suite proves its own teeth: every bug is caught, every check catches one, and the code as it is passes all."""

import re
from contextlib import ExitStack

import pytest
from catalogue import BUGS, Bug
from checks import CHECKS
from rewriting import StaleEntry, rewritten


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.number:02d} {bug.name}")
def test_a_bug_is_caught(bug: Bug) -> None:
    with ExitStack() as broken:
        for function, *changes in bug.edits:
            broken.enter_context(rewritten(function, *changes))
        try:
            CHECKS[bug.check]()
        except StaleEntry:
            raise
        except (Exception, pytest.fail.Exception) as noticed:
            text = f"{type(noticed).__name__}: {noticed}"
        else:
            pytest.fail(f"{bug.check} does not notice: {bug.name}")
    assert not re.search("NameError|SyntaxError|UnboundLocal|ImportError|has no attribute", text), "the edit is no bug"


def test_the_28_bugs_of_others_are_there() -> None:
    assert {bug.number for bug in BUGS} >= set(range(1, 29))


@pytest.mark.parametrize("name", CHECKS)
def test_the_code_as_it_is_passes(name: str) -> None:
    CHECKS[name]()


def test_every_check_catches_a_bug() -> None:
    assert {bug.check for bug in BUGS} == set(CHECKS)


def test_every_number_is_there_once() -> None:
    assert [bug.number for bug in BUGS] == list(range(1, len(BUGS) + 1))


def test_a_stale_entry_is_noticed() -> None:
    with (
        pytest.raises(StaleEntry, match="no longer contains"),
        rewritten(CHECKS["layers_by_hand"], ("no such text", "")),
    ):
        pass


def test_the_code_is_whole_again_afterwards() -> None:
    function, *changes = BUGS[13].edits[0]
    before = function.__code__
    with rewritten(function, *changes):
        assert function.__code__ is not before
    assert function.__code__ is before
